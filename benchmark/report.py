"""Reports: what finished runs reached, with intervals, as tables, figures and one page."""

import csv
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmark import page
from benchmark.errors import refuse
from benchmark.random_policy import arguments_of, baseline_of
from benchmark.runs import write_atomically

FILMS_LIMIT = 40e6  # bytes of films in the page
MOST_METHODS = 8  # in one figure: there are as many colours


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list]  # numbers as they are

    def cells(self) -> list[list[str]]:
        return [[cell(value) for value in row] for row in self.rows]

    def textual(self) -> set[str]:
        return {name for k, name in enumerate(self.header) if all(isinstance(row[k], str) for row in self.rows)}

    def markdown(self) -> str:
        rule = [":--" if name in self.textual() else "--:" for name in self.header]
        return "".join("| " + " | ".join(line) + " |\n" for line in (self.header, rule, *self.cells()))

    def html(self) -> str:
        return page.table(self.header, self.cells(), self.textual())

    def write(self, path: Path) -> None:
        columns = [expanded(name, [row[k] for row in self.rows]) for k, name in enumerate(self.header)]
        with path.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file).writerows(zip(*itertools.chain(*columns), strict=True))
        path.with_suffix(".md").write_text(self.markdown())


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


def summary(groups: list, baselines: dict[str, np.ndarray]) -> Table:
    from benchmark.stats import interquartile_mean, mean, with_interval

    header = [
        "environment",
        "method",
        "seeds",
        "steps",
        "final mean",
        "final IQM",
        "best (optimistic)",
        "training",
        "random",
        "minutes",
    ]
    rows = []
    for group in groups:
        final, best, training = (scores[:, None] for scores in (group.final, group.best, group.training))
        estimates = [Estimate(*with_interval(final, estimator)) for estimator in (mean, interquartile_mean)]
        estimates += [Estimate(*with_interval(scores, mean)) for scores in (best, training)]
        random = float(baselines[group.env_id].mean()) if group.env_id in baselines else math.nan
        minutes = float(np.mean([run.result["wall_time"] for run in group.runs]) / 60)
        steps = int(group.curves[0][-1])
        rows.append([group.env_id, group.method, len(group.runs), steps, *estimates, random, minutes])
    return Table(header, rows)


def all_returns(groups: list) -> Table:
    """Both estimates of all three returns."""
    from benchmark.stats import interquartile_mean, mean, with_interval

    rows = []
    for group in groups:
        for name, scores in (("final", group.final), ("best (optimistic)", group.best), ("training", group.training)):
            estimates = [Estimate(*with_interval(scores[:, None], f)) for f in (mean, interquartile_mean)]
            rows.append([group.env_id, group.method, name, len(scores), *estimates])
    return Table(["environment", "method", "return", "seeds", "mean", "IQM"], rows)


def per_seed(groups: list) -> Table:
    header = ["environment", "method", "seed", "final", "best", "training", "minutes", "run"]
    rows = []
    for group in groups:
        for run, *numbers in zip(group.runs, group.final, group.best, group.training, strict=True):
            numbers = [*map(float, numbers), run.result["wall_time"] / 60]
            rows.append([group.env_id, group.method, run.config["seed"], *numbers, run.directory.name])
    return Table(header, rows)


def thresholds(groups: list, baselines: dict[str, np.ndarray], asked: dict[str, list[float]]) -> tuple[Table, Table]:
    """Steps and seconds to thresholds, of the median seed and of every seed.

    Where none is asked for: half and nine tenths of the way from the random policy to the best mean.
    """
    first = ["environment", "threshold", "return", "method"]
    medians, seeds = [], []
    for env_id in sorted({group.env_id for group in groups}):
        here = [group for group in groups if group.env_id == env_id]
        named = [("asked for", value) for value in asked.get(env_id, [])]
        if not named and (ends := scale(here, baselines)):
            bottom, top = ends
            named = [(f"{share:.0%} of the way", bottom + share * (top - bottom)) for share in (0.5, 0.9)]
        for (name, value), group in itertools.product(named, here):
            row = [env_id, name, float(value), group.method]
            steps, seconds = group.reached(value)
            reached = f"{int(np.isfinite(steps).sum())} of {len(steps)}"
            medians.append([*row, reached, float(np.median(steps)), float(np.median(seconds))])
            for run, *numbers in zip(group.runs, steps, seconds, strict=True):
                seeds.append([*row, run.config["seed"], *map(float, numbers)])
    return (
        Table([*first, "reached by", "median steps", "median seconds"], medians),
        Table([*first, "seed", "steps", "seconds"], seeds),
    )


def scale(here: list, baselines: dict[str, np.ndarray]) -> tuple[float, float] | None:
    """The random policy's mean and the best group's on one environment; none if nothing is better than random."""
    top = max(group.final.mean() for group in here)
    if here[0].env_id in baselines and (bottom := baselines[here[0].env_id].mean()) < top:
        return float(bottom), float(top)
    return None


def normalised_scores(
    groups: list, baselines: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Final returns (seeds, environments) of the methods that were run on all environments: 0 random, 1 best mean.

    The environments that have such a scale, and what had to be left out, follow.
    """
    scales = {}
    for env_id in sorted({group.env_id for group in groups}):
        scales[env_id] = scale([group for group in groups if group.env_id == env_id], baselines)
    notes = [
        f"normalised scores leave out {env_id}: no mean there is better than a random policy's"
        for env_id, s in scales.items()
        if not s
    ]
    environments = [env_id for env_id, ends in scales.items() if ends]
    scores = {}
    for method in sorted({group.method for group in groups}):
        own = {group.env_id: group for group in groups if group.method == method}
        if missing := [env_id for env_id in environments if env_id not in own]:
            notes.append(f"normalised scores leave out {method}: it was not run on {', '.join(missing)}")
            continue
        if not environments:
            continue
        seeds = [len(own[env_id].runs) for env_id in environments]
        if min(seeds) < max(seeds):  # the aggregates weigh environments equally
            notes.append(
                f"normalised scores of {method}: the first {min(seeds)} seeds on each environment, of {max(seeds)}"
            )
        columns = []
        for env_id in environments:
            bottom, top = scales[env_id]
            columns.append((own[env_id].final[: min(seeds)] - bottom) / (top - bottom))
        scores[method] = np.stack(columns, 1)
    return scores, environments, notes


def improvements(groups: list) -> Table:
    """Of each method over each other, on the environments that they share."""
    from benchmark.stats import probability_of_improvement

    by_method: dict[str, dict[str, np.ndarray]] = {}
    for group in groups:
        by_method.setdefault(group.method, {})[group.env_id] = group.final
    rows = []
    for one, other in itertools.combinations(sorted(by_method), 2):
        if shared := sorted(by_method[one].keys() & by_method[other].keys()):
            pairs = [(by_method[one][env_id], by_method[other][env_id]) for env_id in shared]
            rows.append([one, other, ", ".join(shared), Estimate(*probability_of_improvement(pairs))])
    return Table(["method", "is better than", "on", "with probability"], rows)


def repeated_seeds(groups: list) -> list[str]:
    """Runs of one seed are no independent samples: intervals over them are too narrow."""
    notes = []
    for group in groups:
        for seed, times in Counter(run.config["seed"] for run in group.runs).items():
            if times > 1:
                notes.append(f"{group.env_id}, {group.method}: {times} runs of seed {seed} count as {times} seeds")
    return notes


def mixed_versions(groups: list) -> list[str]:
    """Of a script, under one name: within an environment they are methods of their own."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for group in groups:
        found[group.method][group.env_id] = group.runs[0].version
    return [
        f"{method} is not the same script everywhere: " + ", ".join(f"{k} {v}" for k, v in versions.items())
        for method, versions in found.items()
        if len({*versions.values()}) > 1
    ]


def provenance(groups: list) -> Table:
    header = ["environment", "method", "seeds", "commit", "versions", "host", "device", "command of the first"]
    rows = []
    for group in groups:
        metas = [run.meta for run in group.runs]
        commits = {f"{(m.get('git_commit') or 'none')[:7]}{' (dirty)' if m.get('git_dirty') else ''}" for m in metas}
        versions = {" ".join(f"{k} {v}" for k, v in m.get("packages", {}).items()) for m in metas}
        places = [", ".join(sorted({str(m.get(name, "-")) for m in metas})) for name in ("host", "device")]
        seeds = " ".join(str(run.config["seed"]) for run in group.runs)
        told = [", ".join(sorted(commits)), "; ".join(sorted(versions)), *places, metas[0].get("command", "-")]
        rows.append([group.env_id, group.method, seeds, *told])
    return Table(header, rows)


def find_baselines(groups: list) -> dict[str, np.ndarray]:
    baselines = {}
    for env_id in sorted({group.env_id for group in groups}):
        runs = [group.runs[0] for group in groups if group.env_id == env_id]
        try:
            made_from = [arguments_of(run) for run in runs]
            if any(one[name] != other[name] for one in made_from for other in made_from for name in one.keys() & other):
                print(f"no random baseline on {env_id}: its arguments differ between methods")
                continue
            baselines[env_id] = baseline_of(runs[0])["return"]
        except Exception as error:  # whatever the environment or a fork's code raises
            print(f"no random baseline on {env_id}: {' '.join(str(error).split())[:150]}")
    return baselines


def best_films(groups: list) -> dict[str, Path]:
    """The last film of the best run on each environment."""
    films = {}
    for env_id in sorted({group.env_id for group in groups}):
        runs = [(value, run) for g in groups if g.env_id == env_id for value, run in zip(g.final, g.runs, strict=True)]
        if filmed := [(value, run) for value, run in runs if run.videos()]:
            _, run = max(filmed, key=lambda pair: pair[0])
            step, path = list(run.videos().items())[-1]
            films[f"{env_id}: {run.script}, seed {run.config['seed']}, at step {step:,}"] = path
    return films


def best_methods(groups: list, count: int) -> list[str]:
    """The methods of the best mean rank among those of their environments, by name."""
    ranks = defaultdict(list)
    for group in groups:
        others = [other.final.mean() for other in groups if other.env_id == group.env_id]
        ranks[group.method].append(sum(other > group.final.mean() for other in others) / len(others))
    return sorted(sorted(ranks, key=lambda method: np.mean(ranks[method]))[:count])


def make_report(
    material, asked: dict[str, list[float]], baselines: dict[str, np.ndarray], films: dict[str, Path], output: Path
) -> Table:
    """Writes everything into `output`; returns the main table."""
    from benchmark import figures, stats

    groups = material.groups
    main = summary(groups, baselines)
    tables = {"results": main, "returns": all_returns(groups), "seeds": per_seed(groups)}
    tables |= {"provenance": provenance(groups)}
    tables["thresholds"], tables["thresholds-seeds"] = thresholds(groups, baselines, asked)
    notes = repeated_seeds(groups) + mixed_versions(groups)
    if (compared := improvements(groups)).rows:
        tables["improvements"] = compared

    number, methods = len(figures.methods_of(groups)), best_methods(groups, MOST_METHODS)
    drawn = [group for group in groups if group.method in methods]
    made = {
        "curves-steps": figures.learning_curves(drawn, baselines, "steps"),
        "curves-time": figures.learning_curves(drawn, baselines, "minutes"),
        "checkpoints": figures.checkpoint_bars(drawn, baselines),
        "boxes": figures.boxes(drawn, baselines),
        "histograms": figures.histograms(drawn, baselines),
    }
    environments = figures.environments_of(groups)
    left_out = []
    if len(environments) > 1 and len(baselines) == len(environments):
        scores, scaled, left_out = normalised_scores(groups, baselines)
        scores = {method: score for method, score in scores.items() if method in methods}
        if scores and len(scaled) > 1:
            levels = np.linspace(0, 1.5, 61)
            profiles = {method: stats.performance_profile(score, levels) for method, score in scores.items()}
            made["profiles"] = figures.profiles(levels, profiles, figures.colours(methods))
            estimators = {"interquartile mean": stats.interquartile_mean, "mean": stats.mean}
            rows = {
                title: [(method, *stats.with_interval(score, estimator)) for method, score in scores.items()]
                for title, estimator in estimators.items()
            }
            made["aggregates"] = figures.intervals(rows, figures.colours(methods), figures.NORMALISED)
    if "improvements" in tables and len(compared.rows) <= MOST_METHODS:
        rows = {
            "probability of improvement": [(f"{a}\nover {b}", e.middle, e.low, e.high) for a, b, _, e in compared.rows]
        }
        made["improvements"] = figures.intervals(rows, {}, "", within=(0, 1))

    output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.write(output / name)
    for name, figure in made.items():
        for suffix in ("png", "svg"):
            figure.savefig(output / f"{name}.{suffix}")
        figures.plt.close(figure)

    about = (
        "Final: the mean over seeds of the deterministic evaluation after the last step. Best: of each seed's best"
        " evaluation, which flatters. Training: of the last 100 training episodes. IQM: interquartile mean. In brackets"
        " the 95% interval of a bootstrap over seeds."
    )
    shown = {
        "Learning curves": ["curves-steps", "curves-time"],
        "Along the run": ["checkpoints", "boxes", "histograms"],
        "Over all environments": ["aggregates", "profiles"],
        "Comparisons": ["improvements"],
    }
    captions = {
        "curves-steps": "Mean evaluation return over environment steps, with its 95% interval over seeds."
        + (" In grey the random policy: its mean and the middle half of its episodes." if baselines else ""),
        "curves-time": "The same over training time, evaluation left out.",
        "checkpoints": "Mean return at 25, 50 and 100% of the run; a dot for each seed.",
        "boxes": "All evaluation episodes at these points, beside the random policy's.",
        "histograms": "The same as histograms.",
        "aggregates": "Normalised scores: 0 is the random policy, 1 the best method's mean, on each environment."
        + "".join(f" {note}." for note in left_out),
        "profiles": "Share of runs above each normalised score.",
        "improvements": "That a seed of the one method ends higher than one of the other.",
    }
    sections = {"Results": page.paragraph(about) + main.html()}
    for title, names in shown.items():
        pictures = [
            page.paragraph(captions[n], soft=True) + page.picture(output / f"{n}.png", captions[n])
            for n in names
            if n in made
        ]
        if pictures:
            sections[title] = "".join(pictures)
    if number > len(methods):
        note = f"The figures show the {len(methods)} of {number} methods that rank best; the tables show all."
        sections["Results"] += page.paragraph(note)
    sections["Results"] += "".join(page.paragraph(note) for note in notes)
    if tables["thresholds"].rows:
        told = "Until the mean of an evaluation first reached the return; thresholds-seeds.csv has every seed."
        if any(name != "asked for" for _, name, *_ in tables["thresholds"].rows):
            told += " The way leads from the random policy's mean to the final mean of the best method."
        sections["Time to a threshold"] = page.paragraph(told) + tables["thresholds"].html()
    sections["All returns"] = tables["returns"].html()
    if films:
        fitting, size = {}, 0
        for title, path in films.items():
            size += path.stat().st_size
            if size <= FILMS_LIMIT:
                fitting[title] = path
        rest = len(films) - len(fitting)
        note = f"{rest} more would make this page larger than {FILMS_LIMIT / 1e6:.0f} MB." if rest else ""
        sections["Films"] = page.films(fitting) + page.paragraph(note)
    sections["Every seed"] = (
        tables["seeds"].html() if len(tables["seeds"].rows) <= 200 else page.paragraph("In seeds.csv.")
    )
    sections["Where it comes from"] = tables["provenance"].html()
    if material.unfinished or material.unreadable:
        rows = [[str(run.directory), "unfinished"] for run in material.unfinished]
        rows += [[str(path), reason] for path, reason in material.unreadable.items()]
        sections["Left out"] = Table(["directory", "why"], rows).html()
    count = sum(len(group.runs) for group in groups)
    subtitle = f"runs: {count}, methods: {number}, environments: {len(environments)}"
    write_atomically(output / "index.html", page.page("SoloRL report", subtitle, sections))
    for note in notes + left_out:
        print(f"note: {note}")
    return main


def need_extra() -> None:
    for package in ("matplotlib", "scipy"):
        if not find_spec(package):
            refuse(f"{package} is not installed; pip install -e '.[benchmark]'")


def report(
    runs: Annotated[list[Path], tyro.conf.Positional],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report"),
    threshold: tuple[str, ...] = (),
    random: bool = True,
) -> None:
    """Write what finished runs reached, with intervals: tables, figures, and a page that needs nothing else.

    Runs are grouped by script, environment and the settings in which they differ. Everything is in the output folder:
    index.html, and the tables (Markdown, CSV) and figures (PNG, SVG) by themselves.

    Args:
        runs: run directories, or folders of them
        output: a folder
        threshold: ENVIRONMENT=RETURN, to tell the steps and seconds until a seed reached it; as many as wanted
        random: compare with a policy that acts at random, which is played once and remembered; the script in the run
            directory makes its environment, so only report on runs whose script you trust
    """
    need_extra()
    from benchmark.groups import gather

    for path in runs:
        if not path.is_dir():
            refuse(f"{path}: no such folder")
    material = gather(runs)
    if not material.groups:
        left = [*material.unreadable.items(), *((run.directory, "unfinished") for run in material.unfinished)]
        why = "".join(f"; {path.name}: {reason}" for path, reason in left[:1])
        refuse(f"no finished run in {', '.join(map(str, runs))}{why}")
    asked: dict[str, list[float]] = {}
    environments = {group.env_id for group in material.groups}
    for pair in threshold:
        env_id, _, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            refuse(f"--threshold {pair}: must be ENVIRONMENT=RETURN")
        asked.setdefault(env_id, []).append(number)
        if env_id not in environments:
            refuse(f"--threshold {pair}: no run on {env_id}; there are {', '.join(sorted(environments))}")
    if output.exists() and not output.is_dir():
        refuse(f"--output {output}: is a file; name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {output}: {error.strerror}")
    baselines = find_baselines(material.groups) if random else {}
    print(make_report(material, asked, baselines, best_films(material.groups), output).markdown())
    for run in material.unfinished:
        print(f"left out: {run.directory} is unfinished")
    for path, reason in material.unreadable.items():
        print(f"left out: {path}: {reason}")
    print(output / "index.html")
