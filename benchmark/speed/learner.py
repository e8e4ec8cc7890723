"""Trains another library's algorithm as a job like our scripts, and leaves a run directory like theirs.

    python benchmark/speed/learner.py --library sb3 --algorithm PPO --env-id CartPole-v1 --total-timesteps 100_000

The directory is there once the run is finished: it cannot be resumed.
"""

import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from operator import mul
from pathlib import Path
from types import ModuleType
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, its own folder is there

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from benchmark.evaluate import play
from benchmark.runs import file_name, write_atomically, write_table
from benchmark.speed.cases import PACKAGES

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    library: str  # "sb3" or "sbx"
    algorithm: str  # its name there
    env_id: str
    total_timesteps: int
    settings: str = "{}"  # as rl-zoo writes them, as JSON
    seed: int = 1
    threads: int = 1
    vec: Literal["sync", "async"] = "sync"
    num_evals: int = 10  # evenly spaced, the last at the end
    eval_episodes: int = 10
    row_every: int = 0  # steps between rows of progress beside those of evaluations
    runs_dir: str = "runs"


def load(library: str, threads: int) -> ModuleType:
    """A library that computes with so many threads, which JAX reads when it is imported."""
    torch.set_num_threads(threads)
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    return import_module(PACKAGES[library])


def build(library: ModuleType, algorithm: str, env: VecEnv, settings: dict, seed: int) -> BaseAlgorithm:
    """A library's algorithm, with settings as rl-zoo writes them; n_envs is the environment's."""
    given = {name: value for name, value in settings.items() if name not in ("normalize", "noise_std", "n_envs")}
    if settings.get("normalize"):
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
    if "noise_std" in settings:
        deviation = np.full(env.action_space.shape, settings["noise_std"])
        given["action_noise"] = NormalActionNoise(np.zeros_like(deviation), deviation)
    for name, value in given.items():
        if str(value).startswith("lin_"):  # in proportion to what is left of the run
            given[name] = partial(mul, float(value.removeprefix("lin_")))
    policy = given.pop("policy_kwargs", {})
    if "activation_fn" in policy:
        name, flax = policy["activation_fn"], library.__name__ == "sbx"
        function = getattr(import_module("flax.linen"), name.lower()) if flax else getattr(torch.nn, name)
        policy = policy | {"activation_fn": function}
    make, kind = getattr(library, algorithm), given.pop("policy", "MlpPolicy")
    return make(kind, env, **given, policy_kwargs=policy, device="cpu", seed=seed)


def make_envs(env_id: str, num_envs: int, vec: str, seed: int) -> VecEnv:
    vector = {"sync": DummyVecEnv, "async": SubprocVecEnv}[vec]
    if not env_id.startswith("ALE/"):
        return make_vec_env(env_id, num_envs, seed=seed, vec_env_cls=vector)
    import ale_py  # noqa: F401  registers the games

    game = gym.spec(env_id).kwargs["game"]
    name = f"ale_py:{game.title().replace('_', '')}NoFrameskip-v4"  # in every process
    return VecFrameStack(make_atari_env(name, num_envs, seed=seed, vec_env_cls=vector), 4)


class Examiner(BaseCallback):
    """Evaluates between updates, at the first after each step that it is due at, and once the last is made."""

    def __init__(self, args: Args, started: float):
        super().__init__()
        self.args, self.started, self.paused = args, started, 0.0
        self.due = [args.total_timesteps * k // args.num_evals for k in range(1, args.num_evals)]
        self.evaluations: list[dict] = []  # rows of the tables
        self.progress: list[dict] = []

    def _on_rollout_start(self) -> None:
        if self.num_timesteps and self.args.row_every and self.num_timesteps % self.args.row_every == 0:
            self.note()
        if self.due and self.num_timesteps >= self.due[0]:
            self.examine()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.args.num_evals:
            self.examine()
        else:
            self.note()

    def note(self) -> None:
        """A row of progress."""
        step, seconds = self.num_timesteps, time.perf_counter() - self.started - self.paused
        self.progress.append({"step": step, "wall_time": round(seconds, 3), "sps": round(step / seconds)})

    def examine(self) -> None:
        """As our scripts do: deterministic, the same seeds each time, and nothing of it changes training."""
        self.note()
        before, step = time.perf_counter(), self.num_timesteps
        self.due = [later for later in self.due if later > step]
        normaliser, seeds = self.model.get_vec_normalize_env(), list(range(10_000, 10_000 + self.args.eval_episodes))

        def policy(observations: np.ndarray) -> np.ndarray:
            seen = normaliser.normalize_obs(observations) if normaliser else observations
            return self.model.predict(seen, deterministic=True)[0]

        envs = [gym.make(self.args.env_id, disable_env_checker=True) for _ in seeds]
        with torch.random.fork_rng(devices=[]):
            episodes = play(policy, envs, seeds, sample=False, values=False)
        for k, (env, episode) in enumerate(zip(envs, episodes, strict=True)):
            env.close()
            row = {"step": step, "episode": k, "seed": episode.seed}
            self.evaluations.append(row | {"return": episode.total, "length": len(episode.rewards)})
        self.paused += time.perf_counter() - before
        print(f"{step:>11,}  evaluation {self.means()[step]:.1f}  {self.progress[-1]['sps']:,} steps/s", flush=True)

    def means(self) -> dict[int, float]:
        """Mean return of each evaluation, by its step."""
        steps = dict.fromkeys(row["step"] for row in self.evaluations)
        return {s: float(np.mean([row["return"] for row in self.evaluations if row["step"] == s])) for s in steps}


def learn(args: Args) -> Path:
    """Returns the run directory. Imports take no time here, compiling does."""
    library, settings = load(args.library, args.threads), json.loads(args.settings)
    examiner = Examiner(args, time.perf_counter())
    env = make_envs(args.env_id, settings.get("n_envs", 1), args.vec, args.seed)
    model = build(library, args.algorithm, env, settings, args.seed)
    model.learn(args.total_timesteps, callback=examiner)
    env.close()
    return keep(args, examiner, [episode["r"] for episode in model.ep_info_buffer])


def keep(args: Args, examiner: Examiner, recent: list[float]) -> Path:
    """Filled under another name and then renamed: a run directory is never half there."""
    means, last = examiner.means(), examiner.progress[-1]
    evaluations = [{"step": step, "mean": mean} for step, mean in means.items()]
    summary = {"script": SCRIPT, "env_id": args.env_id, "seed": args.seed, "steps": last["step"]}
    summary |= {"wall_time": last["wall_time"], "sps": last["sps"], "evaluation": (evaluations or [None])[-1]}
    summary |= {"best": max(evaluations, key=lambda row: row["mean"], default=None)}
    summary |= {"training_return": float(np.mean(recent)) if recent else None}
    packages = ["torch", "gymnasium", "stable_baselines3", *(["sbx-rl", "jax"] if args.library == "sbx" else [])]
    meta = {"script": SCRIPT, "command": shlex.join([sys.executable, *sys.argv]), "device": "cpu"}
    meta |= {"host": platform.node(), "packages": {name: version(name) for name in packages}}
    meta |= {"started": datetime.now().astimezone().isoformat(timespec="seconds")}
    runs, name = Path(args.runs_dir), file_name(f"{args.env_id}__{SCRIPT}__{args.seed}")
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=runs, ignore_cleanup_errors=True) as folder:
        new = Path(folder)
        shutil.copy(__file__, new)
        for table, rows in (("evaluations", examiner.evaluations), ("progress", examiner.progress)):
            write_table(new / f"{table}.csv", [*rows[:1], *(row.values() for row in rows)])
        write_table(new / "episodes.csv", [["step", "wall_time", "return", "length"]])  # which nobody follows
        texts = {"config.yaml": yaml.safe_dump(asdict(args), sort_keys=False)}
        texts |= {"meta.json": json.dumps(meta, indent=2), "result.json": json.dumps(summary, indent=2)}
        for file, text in texts.items():
            write_atomically(new / file, text + "\n")
        new.chmod(0o755)
        return new.rename(runs / f"{name}__{datetime.now():%Y%m%d-%H%M%S}")


if __name__ == "__main__":
    learn(tyro.cli(Args))
