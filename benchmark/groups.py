"""Runs grouped by script, environment and settings that differ: what a report compares."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmark.runs import Run, find_runs

# What may differ between runs of one group, as it does not change what is learnt.
INCIDENTAL = {"env_id", "seed", "threads", "compile", "device", "num_evals", "eval_episodes", "checkpoint_every"}
INCIDENTAL |= {"runs_dir", "resume", "config", "capture_video", "track", "wandb_project_name"}


@dataclass(frozen=True)
class Group:
    method: str  # script, and settings that set it apart
    env_id: str
    runs: list[Run]

    @cached_property
    def evaluations(self) -> list[dict[str, np.ndarray]]:
        return [run.table("evaluations") for run in self.runs]

    @cached_property
    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps of the evaluations that all seeds made (K,), and each seed's mean return at them (seeds, K)."""
        means = []
        for table in self.evaluations:
            steps, which = np.unique(table["step"], return_inverse=True)
            means.append(dict(zip(steps, np.bincount(which, table["return"]) / np.bincount(which), strict=True)))
        steps = sorted(set.intersection(*map(set, means)))
        return np.array(steps), np.array([[mean[step] for step in steps] for mean in means])

    @cached_property
    def minutes(self) -> np.ndarray:
        """Training time of each seed when it reached the steps of its curve (seeds, K)."""
        times = []
        for run in self.runs:
            progress = run.table("progress")
            times.append(np.interp(self.curves[0], progress["step"], progress["wall_time"]) / 60)
        return np.array(times)

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
        step = self.step_at(share)
        return np.concatenate([table["return"][table["step"] == step] for table in self.evaluations])

    def step_at(self, share: float) -> float:
        steps = self.curves[0]
        return steps[np.abs(steps - share * steps[-1]).argmin()]

    def reached(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Steps and minutes until each seed's evaluation first reached the threshold; infinite if never."""
        steps, curves = self.curves
        above = curves >= threshold
        first, ever = above.argmax(1), above.any(1)
        minutes = self.minutes[np.arange(len(first)), first]
        return np.where(ever, steps[first], np.inf), np.where(ever, minutes, np.inf)


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
            return "unfinished"
        if not result["evaluation"]:
            return "it was not evaluated (--num-evals 0)"
        result["best"]["mean"], result["training_return"], result["wall_time"]
        table = run.table("evaluations")
        if not {"step", "return"} <= table.keys() or not len(table["step"]):
            return "evaluations.csv has no rows"
        run.table("progress")["wall_time"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "finished"


def short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def gather(paths: list[Path]) -> Material:
    states = {run: read(run) for run in find_runs(paths)}
    finished = [run for run, state in states.items() if state == "finished"]
    settings = {run: {k: v for k, v in run.config.items() if k not in INCIDENTAL} for run in finished}

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
    wrong = {run.directory: state for run, state in states.items() if state not in ("finished", "unfinished")}
    return Material(groups, [run for run, state in states.items() if state == "unfinished"], wrong)
