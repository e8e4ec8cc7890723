"""Runs grouped by script, environment and settings that differ: what a report compares."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from benchmark.runs import MARKS, Run, find_runs, read_json

# What may differ between runs of one group, as it does not change what is learnt.
INCIDENTAL = {"env_id", "seed", "threads", "compile", "device", "num_evals", "eval_episodes", "checkpoint_every"}
INCIDENTAL |= {"runs_dir", "resume", "config", "capture_video", "track", "wandb_project_name"}

NEAR = 0.1  # of a run's steps: evaluations that lie so near to each other are compared


@dataclass(frozen=True)
class Group:
    method: str  # script, and settings that set it apart
    env_id: str
    runs: list[Run]

    @cached_property
    def evaluations(self) -> list[dict[str, np.ndarray]]:
        return [run.evaluations for run in self.runs]

    @cached_property
    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps of the evaluations that all seeds made (K,), and each seed's mean return at them (seeds, K).

        Where iterations are whole episodes, a seed's steps lie beside another's: then it is their mean.
        """
        means = []
        for table in self.evaluations:
            steps, which = np.unique(table["step"], return_inverse=True)
            means.append(dict(zip(steps, np.bincount(which, table["return"]) / np.bincount(which), strict=True)))
        if len({len(mean) for mean in means}) == 1:
            every = np.array([list(mean) for mean in means])
            if np.ptp(every, axis=0).max() <= NEAR * every.max():
                return every.mean(0), np.array([list(mean.values()) for mean in means])
        steps = sorted(set.intersection(*map(set, means)))
        if not steps:
            return np.array([np.mean([max(mean) for mean in means])]), np.array([[mean[max(mean)]] for mean in means])
        return np.array(steps), np.array([[mean[step] for step in steps] for mean in means])

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training time of each seed when it reached the steps of its curve (seeds, K)."""
        tables = [run.progress for run in self.runs]
        return np.array([np.interp(self.curves[0], table["step"], table["wall_time"]) for table in tables])

    @cached_property
    def final(self) -> np.ndarray:
        return np.array([run.result["evaluation"]["mean"] for run in self.runs])

    @cached_property
    def best(self) -> np.ndarray:
        return np.array([run.result["best"]["mean"] for run in self.runs])

    @cached_property
    def training(self) -> np.ndarray:
        """Mean of the last 100 training episodes."""
        returns = [run.result["training_return"] for run in self.runs]
        return np.array([np.nan if value is None else value for value in returns])

    def at_share(self, share: float) -> np.ndarray:
        """Returns of all evaluation episodes at the evaluation nearest to a share of the run, over all seeds."""
        step, found = self.step_at(share), []
        for table in self.evaluations:
            distance = np.abs(table["step"] - step)
            found.append(table["return"][distance == distance.min()])
        return np.concatenate(found)

    def step_at(self, share: float) -> float:
        steps = self.curves[0]
        return steps[np.abs(steps - share * steps[-1]).argmin()]

    def reached(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Steps and seconds until each seed's evaluation first reached the threshold; infinite if never."""
        steps, curves = self.curves
        above = curves >= threshold
        first, ever = above.argmax(1), above.any(1)
        seconds = self.seconds[np.arange(len(first)), first]
        return np.where(ever, steps[first], np.inf), np.where(ever, seconds, np.inf)


@dataclass(frozen=True)
class Material:
    groups: list[Group]
    unfinished: list[Run]
    unreadable: dict[Path, str]


def read(run: Run) -> str:
    """ "finished", "unfinished", or what is wrong with the directory."""
    try:
        run.script, run.config["env_id"], run.config["seed"]
        result = run.result
        if result is None:
            return failure(run.directory.parent) or "unfinished"
        if not result["evaluation"]:
            return "it was not evaluated (--num-evals 0)"
        numbers = [result["evaluation"]["mean"], result["best"]["mean"], result["wall_time"]]
        if not np.isfinite([*numbers, result["training_return"] or 0.0]).all():
            return "result.json has returns that are not numbers"
        for name, table in (("evaluations", run.evaluations), ("progress", run.progress)):
            needed = {"step", "return"} if name == "evaluations" else {"step", "wall_time"}
            if not needed <= table.keys() or not len(table["step"]):
                return f"{name}.csv has no rows of {', '.join(sorted(needed))}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "finished"


def failure(folder: Path) -> str:
    """What a sweep wrote about a job that failed in this folder."""
    told = read_json(folder / "failed.json")
    return f"failed: {told.get('reason')}" if told else ""


def remains(paths: list[Path], runs: set[Path]) -> dict[Path, str]:
    """Folders of jobs that failed before there was a run, and of runs that lack what makes them one."""
    found, waiting = {}, list(paths)
    while waiting:
        path = waiting.pop()
        if path in runs or not path.is_dir():
            continue
        below = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        waiting += below
        missing = [mark for mark in MARKS if not (path / mark).is_file()]
        if missing and (path / "progress.csv").is_file():
            found[path] = f"has no {' and no '.join(missing)}"
        elif not runs & set(below) and (why := failure(path)):
            found[path] = why
    return found


def short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def gather(paths: list[Path]) -> Material:
    states = {run: read(run) for run in find_runs(paths)}
    finished = [run for run, state in states.items() if state == "finished"]
    settings = {run: {k: v for k, v in run.config.items() if k not in INCIDENTAL} for run in finished}
    # Returns after different numbers of steps are no repetitions of each other; but iterations may be whole episodes.
    shortest: dict[tuple[str, str], int] = {}  # of those that lie beside each other
    for run in sorted(finished, key=lambda run: run.evaluations["step"].max()):
        which, step = (run.script, run.config["env_id"]), int(run.evaluations["step"].max())
        if step > (1 + NEAR) * shortest.get(which, 0):
            shortest[which] = step
        settings[run] |= {"last_step": shortest[which], "source": run.version}

    # A setting sets methods apart if it varies between runs of one script on one environment.
    seen: dict[tuple, set[str]] = defaultdict(set)
    for run in finished:
        for name, value in settings[run].items():
            seen[run.script, run.config["env_id"], name].add(repr(value))
    apart = {(script, name) for (script, _, name), values in seen.items() if len(values) > 1}

    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in finished:
        own = [f"{k.replace('_', '-')}={short(v)}" for k, v in settings[run].items() if (run.script, k) in apart]
        grouped[" ".join([run.script, *own]), run.config["env_id"]].append(run)
    groups = [
        Group(method, env_id, sorted(runs, key=lambda run: run.config["seed"]))
        for (method, env_id), runs in sorted(grouped.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    wrong = remains(paths, {run.directory for run in states})
    wrong |= {run.directory: state for run, state in states.items() if state not in ("finished", "unfinished")}
    return Material(groups, [run for run, state in states.items() if state == "unfinished"], wrong)
