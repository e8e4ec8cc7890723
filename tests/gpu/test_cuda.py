"""On a CUDA device: a captured run learns what an uncaptured one does, never waits for the device, and resumes.

`bash tests/gpu/check.sh` runs them, a process for each script.
"""

import csv
import importlib
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Where warnings are errors nothing is compiled, as the compiler warns of float32, nor is waiting watched.
    pytest.mark.filterwarnings("default"),
]

ROOT = Path(__file__).parent.parent.parent
PPO = {"num_envs": 8, "num_steps": 64, "total_timesteps": 2048, "num_minibatches": 8, "update_epochs": 3}
OFF_POLICY = {"total_timesteps": 1500, "learning_starts": 500, "buffer_size": 2000}
RUNS = {
    "ppo_continuous": PPO | {"env_id": "HalfCheetah-v4"},
    "ppo_beta": PPO | {"env_id": "HalfCheetah-v4"},
    "ppo_beta of images": PPO | {"env_id": "tests.envs:Filmed-v0"},
    "ppo_discrete": PPO | {"env_id": "CartPole-v1"},
    "grpo": {"env_id": "CartPole-v1", "num_groups": 4, "group_size": 4, "total_timesteps": 2000},
    "grpo of a Box": {"env_id": "Pendulum-v1", "num_groups": 4, "group_size": 4, "total_timesteps": 4000},
    "ppo_atari_cnn": PPO | {"env_id": "ALE/Pong-v5", "num_steps": 32, "total_timesteps": 1024},
    "sac_continuous": OFF_POLICY | {"env_id": "HalfCheetah-v4"},
    "td3_continuous": OFF_POLICY | {"env_id": "HalfCheetah-v4"},
    "dqn": OFF_POLICY
    | {"env_id": "CartPole-v1", "num_envs": 1, "updates_per_step": 1.0, "target_network_frequency": 5},
}
ONCE = {"num_evals": 1, "eval_episodes": 1, "device": "cuda", "checkpoint_every": 500}


class After:
    """An interrupt that comes when training has looked for one so many times."""

    def __init__(self, looks: int):
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def __len__(self) -> int:  # one step before
        return int(self.looks < 1)

    def __getitem__(self, _: int) -> int:
        return 2


def run(module: ModuleType, folder: Path, **settings: object) -> tuple[Path, dict]:
    """The run's directory and its last checkpoint."""
    directory = module.train(module.Args(runs_dir=str(folder), **settings))
    assert "not compiled" not in (directory / "run.log").read_text()
    return directory, torch.load(directory / "checkpoint.pt", weights_only=True, map_location="cpu")


def script_of(case: str) -> ModuleType:
    return importlib.import_module(case.split()[0])


def weights(checkpoint: dict) -> list[torch.Tensor]:
    return [value for _, value in sorted(checkpoint["agent"].items())]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def uncapture(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Captured", lambda function, state: function)


@pytest.mark.parametrize("case", RUNS)
def test_a_captured_run_ends_with_the_weights_of_an_uncaptured_one(case, tmp_path, monkeypatch):
    module, settings = script_of(case), RUNS[case] | ONCE
    directory, captured = run(module, tmp_path, **settings)
    with closing(module.make_eval_env(module.Args(env_id=settings["env_id"]))) as env:
        observation, _ = env.reset(seed=0)
    actions = [module.load_policy(directory / "best.pt", device)(observation) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(*actions, rtol=0.05, atol=0.05)
    uncapture(module, monkeypatch)
    _, plain = run(module, tmp_path, **settings)
    assert equal(weights(captured), weights(plain))
    if case == "ppo_continuous":
        _, other = run(module, tmp_path, **settings | {"seed": 2})
        assert not equal(weights(other), weights(plain))


@pytest.mark.parametrize("case", [case for case in RUNS if case.startswith("ppo")])
def test_the_same_when_epochs_end_early(case, tmp_path, monkeypatch):
    module, settings = script_of(case), RUNS[case] | ONCE | {"target_kl": 0.001}
    directory, captured = run(module, tmp_path, **settings)
    made = int(list(csv.DictReader((directory / "progress.csv").open()))[-1]["updates"])
    rollouts = settings["total_timesteps"] // (settings["num_envs"] * settings["num_steps"])
    assert rollouts <= made < rollouts * settings["num_minibatches"] * settings["update_epochs"]
    uncapture(module, monkeypatch)
    _, plain = run(module, tmp_path, **settings)
    assert equal(weights(captured), weights(plain))


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_was_stopped_and_resumed_learns_the_same(case, tmp_path):
    module, settings = script_of(case), RUNS[case] | ONCE | {"vec": "sync"}
    if case == "ppo_atari_cnn":
        del settings["vec"]
    _, whole = run(module, tmp_path, **settings)
    args = module.Args(runs_dir=str(tmp_path / "stopped"), **settings)
    with pytest.raises(SystemExit):
        module.train(args, interrupts=After(900 if "learning_starts" in settings else 2))
    (directory,) = (path for path in (tmp_path / "stopped").iterdir() if path.is_dir())
    assert not (directory / "result.json").exists()
    _, resumed = run(module, tmp_path, **settings | {"resume": str(directory)})
    if case == "ppo_atari_cnn":  # whose emulators begin anew
        assert resumed["step"] == whole["step"]
    else:
        assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("case", [case for case in RUNS if case.startswith("ppo")])
def test_epochs_never_wait_for_the_device(case, tmp_path, monkeypatch):
    module, settings = script_of(case), RUNS[case] | ONCE | {"num_minibatches": 64, "num_evals": 0}
    improve, updates = module.improve, []

    def improve_without_waiting(*arguments: object) -> dict:
        *others, optimise = arguments

        def watched(batch: tuple, rows: torch.Tensor) -> torch.Tensor:
            if not updates:
                optimise(batch, rows)  # captures
            torch.cuda.set_sync_debug_mode("error")
            updates.extend(rows)
            return optimise(batch, rows)

        return improve(*others, watched)

    monkeypatch.setattr(module, "improve", improve_without_waiting)
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # when the results of all epochs are read
            run(module, tmp_path, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(updates) == settings["num_minibatches"] * settings["update_epochs"] >= 100


@pytest.mark.parametrize("case", [case for case in RUNS if "learning_starts" in RUNS[case]])
def test_updates_from_a_buffer_never_wait_for_the_device(case, tmp_path, monkeypatch):
    module, captured = script_of(case), []

    class Watched(module.Captured):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            captured.append(self.graph)
            torch.cuda.set_sync_debug_mode("error" if self.graph else "default")
            try:
                return super().__call__(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(module, "Captured", Watched)
    run(module, tmp_path, **RUNS[case] | ONCE)
    assert len(captured) >= 2000 and sum(graph is None for graph in captured) <= 3


@pytest.mark.parametrize("case", RUNS)
def test_every_script_trains_on_the_device(case, tmp_path):
    settings = ["--total-timesteps", "20000", "--num-evals", "1", "--eval-episodes", "1", "--runs-dir", str(tmp_path)]
    settings += ["--env-id", str(RUNS[case]["env_id"]), "--device", "cuda"]
    subprocess.run([sys.executable, script_of(case).__file__, *settings], cwd=ROOT, check=True)
    (rows,) = (list(csv.DictReader(path.open())) for path in tmp_path.glob("*/progress.csv"))
    assert all(np.isfinite(float(value)) for row in rows for name, value in row.items() if name.startswith("seconds"))
