"""Runs grouped by script, environment and settings that differ: what a report compares."""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from textwrap import shorten

import numpy as np
import yaml

from benchmark.errors import refuse, unboxed
from benchmark.runs import INCIDENTAL, Run, find_runs, folders_with, read_json
from benchmark.suites import jobs_in_order, settings_swept

NEAR = 0.1  # of a run's steps: evaluations that lie so near to each other are compared
SHORT = {"learning_rate": "lr"}
SPANS = 60  # in which what is measured in training is averaged


def along(table: dict[str, np.ndarray], name: str, last: float) -> np.ndarray:
    """A column's mean in equal spans of the run (SPANS,): NaN before its first number, a line over spans without."""
    known = np.isfinite(table[name])
    span = np.clip(np.ceil(table["step"][known] * SPANS / last) - 1, 0, SPANS - 1).astype(int)
    counts = np.bincount(span, minlength=SPANS)
    if not len(span):
        return np.full(SPANS, np.nan)
    filled = np.flatnonzero(counts)
    means = np.bincount(span, table[name][known], SPANS)[filled] / counts[filled]
    return np.interp(np.arange(SPANS), filled, means, left=np.nan)


@dataclass(frozen=True)
class Group:
    method: str  # in words: the script, and the settings that set it apart
    env_id: str
    runs: list[Run]
    place: int = 0  # of the method among the others

    @cached_property
    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps of the evaluations that all seeds made (K,), and each seed's mean return at them (seeds, K).

        Where iterations are whole episodes, a seed's steps lie beside another's: then it is their mean.
        """
        means = [run.means for run in self.runs]
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
        """Training time of each seed at the steps of its curve (seeds, K)."""
        return np.array([self.seconds_of(run, self.curves[0]) for run in self.runs])

    def seconds_of(self, run: Run, steps: np.ndarray) -> np.ndarray:
        """Training time, without evaluation, when a run reached these steps."""
        evaluating = np.cumsum(run.progress.get("seconds_evaluating", 0))  # before each row
        return np.interp(steps, run.progress["step"], run.progress["wall_time"] - evaluating)

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

    @cached_property
    def spans(self) -> np.ndarray:
        """Steps at the middle of what `along` averages over."""
        return (np.arange(SPANS) + 0.5) / SPANS * self.curves[0][-1]

    @cached_property
    def returns_in_training(self) -> np.ndarray:
        """Mean return of the training episodes that ended in each span (seeds, SPANS)."""
        return np.array([along(run.episodes, "return", self.curves[0][-1]) for run in self.runs])

    def quantities(self) -> list[str]:
        """What all seeds logged of their learning, apart from times."""
        every = [name for name in self.runs[0].progress if name not in ("step", "wall_time", "sps")]
        every = [name for name in every if not name.startswith("seconds_")]
        return [name for name in every if all(name in run.progress for run in self.runs)]

    def quantity(self, name: str) -> np.ndarray:
        """(seeds, SPANS)"""
        return np.array([along(run.progress, name, self.curves[0][-1]) for run in self.runs])

    def at_share(self, share: float) -> np.ndarray:
        """Returns of all evaluation episodes at the evaluation nearest to a share of the run, over all seeds."""
        step, found = self.step_at(share), []
        for table in (run.evaluations for run in self.runs):
            distance = np.abs(table["step"] - step)
            found.append(table["return"][distance == distance.min()])
        return np.concatenate(found)

    def step_at(self, share: float) -> float:
        steps = self.curves[0]
        return steps[np.abs(steps - share * steps[-1]).argmin()]

    def share_near(self, share: float) -> float:
        """Where in the run the evaluation is that is nearest to a share of it."""
        return self.step_at(share) / self.curves[0][-1]

    def reached(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Steps and seconds until each seed's own evaluation first reached the threshold; infinite if never."""
        steps = np.array([next((s for s, mean in run.means.items() if mean >= threshold), np.inf) for run in self.runs])
        seconds = np.array([self.seconds_of(run, step) for run, step in zip(self.runs, steps, strict=True)])
        return steps, np.where(np.isfinite(steps), seconds, np.inf)


@dataclass(frozen=True)
class Material:
    groups: list[Group]
    left_out: dict[Path, str]  # directories, and why


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
        for name, table, needed in (
            ("evaluations", run.evaluations, {"step", "return"}),
            ("progress", run.progress, {"step", "wall_time"}),
            ("episodes", run.episodes, {"step", "return"}),  # of which none may have ended
        ):
            if not needed <= table.keys() or not (len(table["step"]) or name == "episodes"):
                return f"{name}.csv has no rows of {', '.join(sorted(needed))}"
        last = result["evaluation"]["step"], result["evaluation"]["mean"]
        if not np.allclose([*run.means.items()][-1], last, 1e-9):
            return "evaluations.csv does not end with the evaluation of result.json"
        if run.progress["step"][-1] != result["steps"]:
            return f"progress.csv ends at step {run.progress['step'][-1]:,.0f} of {result['steps']:,}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        return f"{type(error).__name__}: {shorten(str(error), 120, placeholder=' …')}"
    return "finished"


def failure(folder: Path) -> str:
    """What a sweep wrote about a job that failed in this folder, and the last that the job itself said."""
    told = read_json(folder / "failed.json")
    if not told:
        return ""
    said = [part for line in told.get("log") or [] for part in unboxed(str(line))]
    return f"failed: {told.get('reason')}" + "".join(f": {shorten(last, 200, placeholder=' …')}" for last in said[-1:])


def remains(paths: list[Path], runs: set[Path]) -> dict[Path, str]:
    """Folders of jobs that failed before there was a run, and of runs that lack what makes them one."""
    jobs = {run.parent for run in runs}
    found = {folder: failure(folder) for folder in folders_with("failed.json", paths) if folder not in jobs}
    for folder in folders_with("progress.csv", paths):
        if folder not in runs:
            found[folder] = "has no meta.json or no config.yaml"
    return {folder: why for folder, why in found.items() if why}


def number(value: float) -> str:
    """Steps in thousands and millions if they are round, small rates as 3e-4."""
    if float(value).is_integer():
        size, unit = next(((s, u) for s, u in ((10**6, "M"), (10**3, "k")) if value and value % s == 0), (1, ""))
        return f"{int(value) // size:,}{unit}"
    if abs(value) >= 0.01 or not math.isfinite(value):
        return f"{value:.15g}"  # other values are other methods
    mantissa, _, exponent = f"{value:.14e}".partition("e")
    return f"{float(mantissa):.15g}e{int(exponent)}"


def in_words(name: str, value: object) -> str:
    """A setting as a label says it: "lr 1e-3", "100k steps", "no norm obs"."""
    flag = SHORT.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    if value is None:
        return f"{flag} none"
    if name == "total_timesteps":
        return f"{number(value)} steps"
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([flag, *(number(v) if isinstance(v, int | float) else str(v) for v in values)])


def differences(runs: list[Run]) -> dict[Run, dict[str, object]]:
    """Of each run's settings those that set methods apart: they vary between runs of its script on one environment."""
    settings, seen = {}, defaultdict(set)
    swept = {folder: settings_swept(folder) for folder in {run.directory.parent.parent for run in runs}}
    for run in runs:
        left_out = INCIDENTAL - swept[run.directory.parent.parent] | {"env_id"}
        settings[run] = {name: value for name, value in run.config.items() if name not in left_out}
        settings[run]["source"] = run.version
        for name, value in settings[run].items():
            seen[run.script, run.config["env_id"], name].add(repr(value))
    apart = {(script, name) for (script, _, name), values in seen.items() if len(values) > 1}
    found = {run: {k: v for k, v in own.items() if (run.script, k) in apart} for run, own in settings.items()}
    for script, name in sorted(apart):
        own = {run: found[run] for run in runs if run.script == script}
        if name not in set.union(*swept.values()) and is_decided(name, own) and all(run.decides(name) for run in own):
            for chosen in own.values():
                del chosen[name]
    return found


def is_decided(name: str, found: dict[Run, dict[str, object]]) -> bool:
    """Whether a setting follows from a script's others and the environment, as `num_steps` from `num_envs`."""
    values: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for run, own in found.items():
        others = repr([(k, v) for k, v in own.items() if k != name])
        values[others][run.config["env_id"]].add(repr(own.get(name)))
    one_each = all(len(seen) == 1 for here in values.values() for seen in here.values())
    return one_each and any(len(set.union(*here.values())) > 1 for here in values.values())


def began(run: Run) -> float:
    """When, wherever that was; 0 where it cannot be told."""
    try:
        return datetime.fromisoformat(str(run.meta.get("started"))).timestamp()
    except ValueError:
        return 0.0


def rank(run: Run, own: dict[str, object], jobs: list[str], paths: list[Path]) -> tuple:
    """Orders methods as the paths are given, and as their sweep did; what it does not know, by script and value."""
    name, folder = run.directory.parent.name, run.directory.resolve()
    given = [k for k, path in enumerate(paths) if folder.is_relative_to(path.resolve())]  # none through a link
    values = [(k, v if isinstance(v, int | float) else math.inf, str(v)) for k, v in sorted(own.items())]
    return min(given, default=0), jobs.index(name) if name in jobs else math.inf, run.script, values


def gather(paths: list[Path]) -> Material:
    states = {run: read(run) for run in find_runs(paths)}
    finished = [run for run, state in states.items() if state == "finished"]
    apart = differences(finished)
    several = len({run.script for run in finished}) > 1
    labels: dict[Run, str] = {}
    for run, own in apart.items():
        script = [run.script] if several or not own else []
        labels[run] = ", ".join([*script, *(in_words(name, value) for name, value in own.items())])
    sweeps = {folder: jobs_in_order(folder) for folder in {run.directory.parent.parent for run in finished}}
    ordered = sorted(finished, key=lambda run: rank(run, apart[run], sweeps[run.directory.parent.parent], paths))
    places = {label: k for k, label in enumerate(dict.fromkeys(labels[run] for run in ordered))}

    latest: dict[tuple[str, str, int], Run] = {}  # a seed that was run twice is no second seed
    for run in sorted(finished, key=began):
        latest[run.config["env_id"], labels[run], run.config["seed"]] = run
    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for (env_id, label, _), run in latest.items():
        grouped[env_id, label].append(run)
    groups = [
        Group(method, env_id, sorted(runs, key=lambda run: run.config["seed"]), places[method])
        for (env_id, method), runs in grouped.items()
    ]
    left_out = remains(paths, {run.directory for run in states})
    left_out |= {run.directory: state for run, state in states.items() if state != "finished"}
    for run in {*finished} - {*latest.values()}:
        other = latest[run.config["env_id"], labels[run], run.config["seed"]]
        left_out[run.directory] = f"its seed was run again: {other.directory}"
    return Material(in_order(groups), dict(sorted(left_out.items())))


def gather_finished(paths: list[Path]) -> Material:
    """Refuses where there is no finished run."""
    for path in paths:
        if not path.is_dir():
            refuse(f"{path}: no such folder")
    material = gather(paths)
    if not material.groups:
        why = "".join(f"; {path.name}: {reason}" for path, reason in [*material.left_out.items()][:1])
        refuse(f"no finished run in {', '.join(map(str, paths))}{why}")
    return material


def in_order(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (group.env_id, group.place))


def methods_of(groups: list[Group]) -> list[str]:
    return list(dict.fromkeys(group.method for group in sorted(groups, key=lambda group: group.place)))


def by_environment(groups: list[Group]) -> dict[str, list[Group]]:
    env_ids = sorted({group.env_id for group in groups})
    return {env_id: [group for group in groups if group.env_id == env_id] for env_id in env_ids}
