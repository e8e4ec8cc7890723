"""Steps per second of a script beside other libraries', with equal settings, on this machine."""

import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.errors import refuse
from benchmark.runs import write_atomically
from benchmark.suites import check

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 2  # rows of progress left out at the start of every measurement

ENV_IDS = {
    "ppo_continuous": ["HalfCheetah-v4"],
    "ppo_beta": ["HalfCheetah-v4"],
    "ppo_discrete": ["CartPole-v1", "LunarLander-v3"],
    "ppo_atari_cnn": ["ALE/Pong-v5"],
    "sac_continuous": ["HalfCheetah-v4"],
    "td3_continuous": ["HalfCheetah-v4"],
    "dqn": ["CartPole-v1", "LunarLander-v3"],
}
PPO = {
    "16 x 256, minibatch 64": {"num_envs": 16, "num_steps": 256, "num_minibatches": 64},
    "1 x 2048, minibatch 64": {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32},
    "16 x 256, minibatch 1024": {"num_envs": 16, "num_steps": 256, "num_minibatches": 4},
}
CASES = {
    "ppo_continuous": PPO,
    "ppo_beta": PPO,  # beside Gaussian policies
    "ppo_discrete": {
        "8 x 256, minibatch 64": {"num_envs": 8, "num_steps": 256, "num_minibatches": 32},
        "64 x 64, minibatch 256": {"num_envs": 64, "num_steps": 64, "num_minibatches": 16},
    },
    "ppo_atari_cnn": {"8 x 128, minibatch 256": {"num_envs": 8, "num_steps": 128, "num_minibatches": 4}},
    "sac_continuous": {"1 environment": {"num_envs": 1}},
    "td3_continuous": {"1 environment": {"num_envs": 1}},
    "dqn": {"1 environment": {"num_envs": 1}, "8 environments": {"num_envs": 8, "num_steps": 125}},
}
# Random actions make the first row of progress; an update a step makes all others.
OFF_POLICY = {"num_steps": 1000, "learning_starts": 1000, "batch_size": 256, "sizes": [256, 256]}
COMMON = {
    "ppo_continuous": {"update_epochs": 10, "sizes": [64, 64]},
    "ppo_discrete": {"update_epochs": 10, "sizes": [64, 64]},
    "ppo_beta": {"update_epochs": 10, "sizes": [64, 64]},
    "ppo_atari_cnn": {"update_epochs": 4},
    "sac_continuous": OFF_POLICY,
    "td3_continuous": OFF_POLICY,
    "dqn": OFF_POLICY | {"batch_size": 64, "sizes": [128, 128]},
}
OURS = {  # flags of our variants
    "ppo_continuous": {"ours": ["--no-recompute-advantages"]},
    "ppo_discrete": {"ours": ["--no-recompute-advantages"]},
    "ppo_beta": {"ours": ["--no-recompute-advantages"]},
    "ppo_atari_cnn": {"ours": ["--precision", "fp32"], "ours, bf16": ["--precision", "bf16"]},
    "sac_continuous": {"ours": ["--precision", "fp32"], "ours, bf16": ["--precision", "bf16"]},
    "td3_continuous": {"ours": ["--precision", "fp32"], "ours, bf16": ["--precision", "bf16"]},
    # Others have no double Q-learning; their target is copied at every 500th step.
    "dqn": {
        "ours": ["--no-double-q", "--n-step", "1", "--updates-per-step", "1"]
        + ["--tau", "1", "--target-network-frequency", "500"]
    },
}
VECS = {  # ways of stepping: ours, and others'; for ours processes are slower here
    "ppo_continuous": (["sync", "envpool"], ["sync"]),
    "ppo_beta": (["sync", "envpool"], ["sync"]),
    "ppo_discrete": (["sync", "envpool"], ["sync", "async"]),
    "ppo_atari_cnn": (["ale", "envpool"], ["sync", "async"]),
    "sac_continuous": (["sync"], ["sync"]),
    "td3_continuous": (["sync"], ["sync"]),
    "dqn": (["sync", "envpool"], ["sync"]),
}


@dataclass(frozen=True)
class Contender:
    name: str
    vec: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name} ({self.vec}, {self.threads} thread{'s' * (self.threads > 1)})"


def contenders(script: str) -> list[Contender]:
    """Every way of stepping and thread count worth trying, of what is installed."""
    ours, others = VECS[script]
    ours = [vec for vec in ours if vec != "envpool" or find_spec("envpool")]
    ways = [Contender(name, vec, n) for name in OURS[script] for vec in ours for n in (1, 2)]
    for name, package in (("sb3", "stable_baselines3"), ("sbx", "sbx")):
        if find_spec(package) and (name, script) != ("sbx", "ppo_atari_cnn"):  # whose network for images is another
            ways += [Contender(name, vec, n) for vec in others for n in (1, 2)]
    if script == "ppo_atari_cnn" and find_spec("stable_baselines3"):  # what it would be with our way of stepping
        ways += [Contender("sb3, adapted", "ale", n) for n in (1, 2)]
    return ways


def measure(script: str, contender: Contender, settings: dict) -> tuple[float, dict]:
    """Steps per second after the warm-up; of ours also the shares of the time and the seconds of compiling."""
    if contender.name not in OURS[script]:
        words = [sys.executable, "-m", "benchmark.contenders", contender.name.split(",")[0]]
        chosen = settings | {"script": script, "vec": contender.vec, "threads": contender.threads, "warmup": WARMUP}
        return float(run([*words, json.dumps(chosen)]).split()[-1]), {}
    with tempfile.TemporaryDirectory() as runs:
        total = settings["num_envs"] * settings["num_steps"] * settings["rollouts"]
        words = [sys.executable, f"{script}.py", "--vec", contender.vec, "--threads", str(contender.threads)]
        words += ["--env-id", settings["env_id"], "--total-timesteps", str(total), "--runs-dir", runs]
        words += ["--num-evals", "0"]
        flags = ["num_envs", "num_minibatches", "update_epochs", "learning_starts", "batch_size"]
        flags += ["num_steps"] if "learning_starts" not in settings else []
        for name in flags:
            if name in settings:
                words += [f"--{name.replace('_', '-')}", str(settings[name])]
        if sizes := [str(size) for size in settings.get("sizes", [])]:
            flags = ["--hidden-sizes"] if script == "dqn" else ["--actor-sizes", "--critic-sizes"]
            words += [word for name in flags for word in (name, *sizes)]
        words += OURS[script][contender.name]
        output = run(words)
        with next(Path(runs).glob("*/progress.csv")).open() as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    first, last = rows[WARMUP - 1], rows[-1]
    seconds = last["wall_time"] - first["wall_time"]
    shares = {
        name.removeprefix("seconds_"): sum(row[name] for row in rows[WARMUP:]) / seconds
        for name in first
        if name.startswith("seconds_")
    }
    compiling = re.search(r"compiled in ([\d.]+) s", output)
    return (last["step"] - first["step"]) / seconds, shares | {"compiling": float(compiling[1]) if compiling else 0.0}


def run(words: list[str]) -> str:
    threads = {name: "" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}  # each contender sets its own
    environment = {name: value for name, value in os.environ.items() if name not in threads}
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{result.stderr[-2000:]}")
    return result.stdout


def speed(
    script: Annotated[str, tyro.conf.Positional] = "ppo_continuous",
    /,
    env_id: str | None = None,
    rounds: int = 3,
    rollouts: int = 14,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Compare a script's steps per second with other libraries', with equal settings.

    Every way of stepping and thread count is tried once; then the fastest of each library run in turn, so that all of
    them meet the same machine. The first two rollouts, and so all compiling, are left out.

    Args:
        script: which script
        env_id: the environment; by default those that this script is for
        rounds: how often the fastest of each library are run in turn
        rollouts: length of a measurement
        json_file: write all figures into this file
    """
    if script not in CASES:
        refuse(f"no speed comparison for {script!r}; there is one for: {', '.join(CASES)}")
    if rounds < 1:
        refuse(f"--rounds {rounds}: must be at least 1")
    if rollouts <= WARMUP:
        refuse(f"--rollouts {rollouts}: must be at least {WARMUP + 1}, as the first {WARMUP} are left out")
    if json_file and not json_file.parent.is_dir():
        refuse(f"--json {json_file}: there is no folder {json_file.parent}")
    if env_id:
        check(ROOT / f"{script}.py", [env_id], [])
    report = {}
    for environment, case in itertools.product([env_id] if env_id else ENV_IDS[script], CASES[script]):
        settings = COMMON[script] | CASES[script][case] | {"env_id": environment, "rollouts": rollouts}
        per_update = (
            f"{settings['update_epochs']} epochs"
            if "update_epochs" in settings
            else f"one update of {settings['batch_size']} a step"
        )
        title = f"{environment}, {case}"
        print(f"\n{title}, {per_update}", flush=True)
        fastest: dict[str, tuple[float, Contender]] = {}
        for contender in contenders(script):
            rate, _ = measure(script, contender, settings | {"rollouts": min(6, rollouts)})
            print(f"  tried {contender!s:<28} {rate:>8,.0f} steps/s", flush=True)
            fastest[contender.name] = max(
                fastest.get(contender.name, (0.0, contender)), (rate, contender), key=lambda x: x[0]
            )
        rates: dict[str, list[float]] = {name: [] for name in fastest}
        details: dict[str, list[dict]] = {name: [] for name in OURS[script]}
        for _ in range(rounds):
            for name, (_, contender) in fastest.items():
                rate, detail = measure(script, contender, settings)
                rates[name].append(rate)
                if name in details:
                    details[name].append(detail)
        for name, (_, contender) in fastest.items():
            low, middle, high = min(rates[name]), statistics.median(rates[name]), max(rates[name])
            against = ""
            for mine in OURS[script] if name not in OURS[script] else ():
                ratios = [ours / other for ours, other in zip(rates[mine], rates[name], strict=True)]
                against += f"   {mine} is {statistics.median(ratios):.2f} x"
            print(f"  {contender!s:<34} {middle:>8,.0f} steps/s ({low:,.0f} to {high:,.0f}){against}", flush=True)
        shares = {
            name: {part: statistics.median(row[part] for row in rows) for part in rows[0]}
            for name, rows in details.items()
        }
        compiling = {name: parts.pop("compiling") for name, parts in shares.items()}
        for name, parts in shares.items():
            print(f"  {name}: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()), end="")
            print(f"; compiling took {compiling[name]:.1f} s before that", flush=True)
        ways = {name: str(contender) for name, (_, contender) in fastest.items()}
        result = {"settings": settings, "ways": ways, "steps_per_second": rates, "shares": shares}
        report[title] = result | {"compile_seconds": compiling}
    if json_file:
        write_atomically(json_file, json.dumps(report, indent=2) + "\n")
