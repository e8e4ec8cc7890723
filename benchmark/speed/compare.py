"""Steps per second of a script beside other libraries', with equal settings, on this machine."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.errors import refuse
from benchmark.jobs import ROOT
from benchmark.options import at_least
from benchmark.runs import find_runs, write_atomically
from benchmark.speed.cases import CASES, LEARNER, PACKAGES, Case, in_our_words, in_their_words
from benchmark.suites import as_words, check

WARMUP = 2  # rows of progress left out at the start of every measurement


@dataclass(frozen=True)
class Contender:
    name: str
    vec: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name} ({self.vec}, {self.threads} thread{'s' * (self.threads > 1)})"


def without_bf16(case: Case) -> Case:
    """A processor that does not multiply in bf16 imitates it, and is many times as slow."""
    import torch

    if torch.cpu.get_capabilities().get("avx512_bf16", False):
        return case
    return replace(case, ours={name: own for name, own in case.ours.items() if own.get("precision") != "bf16"})


def contenders(case: Case) -> list[Contender]:
    """Every way of stepping and thread count worth trying, of what is installed."""
    ours = [vec for vec in case.ways if vec != "envpool" or find_spec("envpool")]
    others = {name: vecs for name, vecs in case.others.items() if find_spec(PACKAGES[name])}
    ways = dict.fromkeys(case.ours, ours) | others
    return [Contender(name, vec, n) for name, vecs in ways.items() for vec in vecs for n in (1, 2)]


def measure(script: str, contender: Contender, settings: dict) -> tuple[float, dict]:
    """Steps per second after the warm-up; of ours also the shares of the time and the seconds of compiling."""
    case, rollout = CASES[script], settings["num_envs"] * settings["num_steps"]
    own = {"vec": contender.vec, "threads": contender.threads, "num_evals": 0}
    with tempfile.TemporaryDirectory() as runs:
        own |= {"runs_dir": runs}
        if contender.name in case.ours:
            words = [f"{script}.py", "--device", "cpu", *in_our_words(case, settings | own | case.ours[contender.name])]
        else:
            own |= {"library": contender.name, "algorithm": case.algorithm, "env_id": settings["env_id"]}
            own |= {"total_timesteps": rollout * settings["rollouts"], "row_every": rollout}
            own |= {"settings": in_their_words(case, settings)}
            words = [str(LEARNER), *(word for name, value in own.items() for word in as_words(name, value))]
        run_alone([sys.executable, *words])
        (run,) = find_runs([Path(runs)])
        progress, compiling = run.progress, run.compiling
    steps, seconds = (progress[name][-1] - progress[name][WARMUP - 1] for name in ("step", "wall_time"))
    shares = {
        name.removeprefix("seconds_"): float(column[WARMUP:].sum() / seconds)
        for name, column in progress.items()
        if name.startswith("seconds_")
    }
    return float(steps / seconds), shares | {"compiling": compiling}


def run_alone(words: list[str]) -> None:
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # each contender sets its own
    environment = {name: value for name, value in os.environ.items() if name not in threads}
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{result.stderr[-2000:]}")


def find_fastest(script: str, case: Case, settings: dict) -> dict[str, Contender]:
    """Of each library, and of each variant of ours."""
    tried: dict[str, dict[Contender, float]] = {}
    for contender in contenders(case):
        rate, _ = measure(script, contender, settings)
        print(f"  tried {contender!s:<28} {rate:>8,.0f} steps/s", flush=True)
        tried.setdefault(contender.name, {})[contender] = rate
    return {name: max(rates, key=rates.get) for name, rates in tried.items()}


def tell_rates(case: Case, fastest: dict[str, Contender], rates: dict[str, list[float]]) -> None:
    for name, contender in fastest.items():
        low, middle, high = min(rates[name]), statistics.median(rates[name]), max(rates[name])
        against = ""
        for mine in case.ours if name not in case.ours else ():
            ratios = [ours / other for ours, other in zip(rates[mine], rates[name], strict=True)]
            against += f"   {mine} is {statistics.median(ratios):.2f} x"
        print(f"  {contender!s:<34} {middle:>8,.0f} steps/s ({low:,.0f} to {high:,.0f}){against}", flush=True)


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
    at_least(1, rounds=rounds)
    if rollouts <= WARMUP:
        refuse(f"--rollouts {rollouts}: must be at least {WARMUP + 1}, as the first {WARMUP} are left out")
    if json_file and not json_file.parent.is_dir():
        refuse(f"--json {json_file}: there is no folder {json_file.parent}")
    if env_id:
        check(ROOT / f"{script}.py", [env_id], [])
    case, report = without_bf16(CASES[script]), {}
    for environment, title in itertools.product([env_id] if env_id else case.env_ids, case.settings):
        settings = case.settings[title] | {"env_id": environment, "rollouts": rollouts}
        how = "one update of {batch_size} a step" if case.learns_off_policy else "{update_epochs} epochs"
        print(f"\n{environment}, {title}, {how.format(**settings)}", flush=True)
        fastest = find_fastest(script, case, settings | {"rollouts": min(6, rollouts)})
        measured: dict[str, list] = {name: [] for name in fastest}
        for _, (name, contender) in itertools.product(range(rounds), fastest.items()):
            measured[name].append(measure(script, contender, settings))
        rates = {name: [rate for rate, _ in every] for name, every in measured.items()}
        tell_rates(case, fastest, rates)
        shares = {
            name: {part: statistics.median(row[part] for _, row in measured[name]) for part in measured[name][0][1]}
            for name in case.ours
        }
        compiling = {name: parts.pop("compiling") for name, parts in shares.items()}
        for name, parts in shares.items():
            print(f"  {name}: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()), end="")
            print(f"; compiling took {compiling[name]:.1f} s before that", flush=True)
        ways = {name: str(contender) for name, contender in fastest.items()}
        result = {"settings": settings, "ways": ways, "steps_per_second": rates, "shares": shares}
        report[f"{environment}, {title}"] = result | {"compile_seconds": compiling}
    if json_file:
        write_atomically(json_file, json.dumps(report, indent=2) + "\n")
