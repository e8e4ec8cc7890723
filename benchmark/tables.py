"""The tables of a report."""

import itertools
import math
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark import page
from benchmark.groups import Group, by_environment, methods_of
from benchmark.runs import names_of, write_atomically, write_table
from benchmark.stats import interquartile_mean, mean, probability_of_improvement, with_interval


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list]  # numbers as they are

    def cells(self) -> list[list[str]]:
        return [[cell(value) for value in row] for row in self.rows]

    def textual(self) -> set[str]:
        return {name for k, name in enumerate(self.header) if all(isinstance(row[k], str) for row in self.rows)}

    def text(self) -> str:
        """For the terminal."""
        lines = [self.header, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        forms = [f"{'<' if name in self.textual() else '>'}{n}" for name, n in zip(self.header, widths, strict=True)]
        return "\n".join("  ".join(map(format, line, forms)).rstrip() for line in lines)

    def markdown(self) -> str:
        rule = [":--" if name in self.textual() else "--:" for name in self.header]
        lines = (self.header, rule, *self.cells())
        return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)

    def html(self) -> str:
        return page.table(self.header, self.cells(), self.textual())

    def write(self, path: Path) -> None:
        columns = [expanded(name, [row[k] for row in self.rows]) for k, name in enumerate(self.header)]
        write_table(path.with_suffix(".csv"), zip(*itertools.chain(*columns), strict=True))
        write_atomically(path.with_suffix(".md"), self.markdown())


@dataclass(frozen=True)
class Estimate:
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return cell(self.middle)
        return f"{cell(self.middle)} [{cell(self.low)}, {cell(self.high)}]"


def expanded(name: str, values: list) -> list[list]:
    """A column, or the three of estimates with intervals, each under its name."""
    if not any(isinstance(value, Estimate) for value in values):
        return [[name, *values]]
    parts = zip(*((value.middle, value.low, value.high) for value in values), strict=True)
    return [[title, *part] for title, part in zip((name, f"{name} low", f"{name} high"), parts, strict=True)]


def cell(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "not reached"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def estimates(scores: np.ndarray) -> tuple[Estimate, Estimate]:
    """Mean and interquartile mean over seeds."""
    means, middles = (with_interval(scores[:, None], estimator) for estimator in (mean, interquartile_mean))
    return Estimate(*means), Estimate(*middles)


def results(groups: list[Group], baselines: dict[str, np.ndarray]) -> Table:
    header = ["environment", "method", "seeds", "steps", "final evaluation", "final evaluation IQM"]
    header += ["best evaluation (optimistic)", "training return", "random policy", "minutes"]
    rows = []
    for group in groups:
        best, training = estimates(group.best)[0], estimates(group.training)[0]
        random = float(baselines[group.env_id].mean()) if group.env_id in baselines else math.nan
        minutes = float(np.mean([run.result["wall_time"] for run in group.runs]) / 60)
        steps = int(group.curves[0][-1])
        first = [group.env_id, group.method, len(group.runs), steps]
        rows.append([*first, *estimates(group.final), best, training, random, minutes])
    return Table(header, rows)


def in_short(table: Table) -> str:
    """The results for a terminal: a table under each environment's name."""
    columns = ["method", "seeds", "steps", "final evaluation", "training return"]
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    parts = []
    for env_id in dict.fromkeys(row["environment"] for row in rows):
        here = [row for row in rows if row["environment"] == env_id]
        random = here[0]["random policy"]
        heading = env_id if math.isnan(random) else f"{env_id}, where a random policy's return is {cell(random)}"
        lines = Table(columns, [[row[name] for name in columns] for row in here]).text().splitlines()
        parts.append("\n".join([heading, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


def per_seed(groups: list[Group]) -> Table:
    header = ["environment", "method", "seed", "final evaluation", "best evaluation", "training return"]
    every = [run for group in groups for run in group.runs]
    rows, names = [], dict(zip(every, names_of(every), strict=True))
    for group in groups:
        for run, *numbers in zip(group.runs, group.final, group.best, group.training, strict=True):
            numbers = [*map(float, numbers), run.result["wall_time"] / 60]
            rows.append([group.env_id, group.method, run.config["seed"], *numbers, names[run]])
    return Table([*header, "minutes", "run"], rows)


def thresholds(groups: list[Group], baselines: dict[str, np.ndarray], asked: dict[str, list[float]]) -> Table:
    """Steps and seconds to thresholds, of the median seed.

    Where none is asked for: half and nine tenths of the way from the random policy to the best mean.
    """
    rows = []
    for env_id, here in by_environment(groups).items():
        named = [("asked for", value) for value in asked.get(env_id, [])]
        if not named and (ends := scale(here, baselines)):
            bottom, top = ends
            named = [(f"{share:.0%} of the way", bottom + share * (top - bottom)) for share in (0.5, 0.9)]
        for (name, value), group in itertools.product(named, here):
            steps, seconds = group.reached(value)
            reached = f"{int(np.isfinite(steps).sum())} of {len(steps)}"
            row = [env_id, name, float(value), group.method, reached]
            rows.append([*row, float(np.median(steps)), float(np.median(seconds))])
    header = ["environment", "threshold", "return", "method", "reached by", "median steps", "median seconds"]
    return Table(header, rows)


def scale(here: list[Group], baselines: dict[str, np.ndarray]) -> tuple[float, float] | None:
    """The random policy's mean and the best group's on one environment; none if nothing is better than random."""
    top = max(group.final.mean() for group in here)
    if here[0].env_id in baselines and (bottom := baselines[here[0].env_id].mean()) < top:
        return float(bottom), float(top)
    return None


def improvements(groups: list[Group], baseline: str | None) -> Table:
    """Of all methods over the baseline, or of each over those before it, on the environments that they share."""
    final: dict[str, dict[str, np.ndarray]] = {method: {} for method in methods_of(groups)}
    for group in groups:
        final[group.method][group.env_id] = group.final
    pairs = [(one, baseline) for one in final if one != baseline]
    rows = []
    for one, other in pairs if baseline else [(b, a) for a, b in itertools.combinations(final, 2)]:
        if shared := sorted(final[one].keys() & final[other].keys()):
            scores = [(final[one][env_id], final[other][env_id]) for env_id in shared]
            rows.append([one, other, ", ".join(shared), Estimate(*probability_of_improvement(scores))])
    return Table(["method", "is better than", "on", "with probability"], rows)


def mixed_versions(groups: list[Group]) -> list[str]:
    """Of a script, under one name: within an environment they are methods of their own."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for group in groups:
        found[group.method][group.env_id] = group.runs[0].version
    return [
        f"{method} is not the same script everywhere: " + ", ".join(f"{k} {v}" for k, v in versions.items())
        for method, versions in found.items()
        if len({*versions.values()}) > 1
    ]


def repeatable(command: str) -> str:
    """A run's command without where python, the script and the run lay."""
    words = shlex.split(command)
    if "--runs-dir" in words:
        del words[(place := words.index("--runs-dir")) : place + 2]
    return shlex.join(["python", *(Path(word).name for word in words[1:2]), *words[2:]])


def provenance(groups: list[Group]) -> Table:
    header = ["environment", "method", "seeds", "commit", "versions", "host", "device", "command of the first"]
    rows = []
    for group in groups:
        metas = [run.meta for run in group.runs]
        commits = {f"{(m.get('git_commit') or 'none')[:7]}{' (dirty)' if m.get('git_dirty') else ''}" for m in metas}
        versions = {" ".join(f"{k} {v}" for k, v in m.get("packages", {}).items()) for m in metas}
        places = [", ".join(sorted({str(m.get(name, "-")) for m in metas})) for name in ("host", "device")]
        seeds = " ".join(str(run.config["seed"]) for run in group.runs)
        told = [
            ", ".join(sorted(commits)),
            "; ".join(sorted(versions)),
            *places,
            repeatable(metas[0].get("command", "")),
        ]
        rows.append([group.env_id, group.method, seeds, *told])
    return Table(header, rows)
