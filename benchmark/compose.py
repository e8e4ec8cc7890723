"""What a report consists of: tables, figures, and the page that shows them."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmark import figures, page, stats, tables
from benchmark.groups import Group, Material, environments_of, methods_of
from benchmark.runs import file_name, write_atomically
from benchmark.tables import Table

FILMS_LIMIT = 40e6  # bytes of films in the page
MOST_METHODS = 8  # in one figure: there are as many colours

ABOUT = (
    "Final evaluation: the mean over seeds of the deterministic evaluation after the last step. Best evaluation: of"
    " each seed's best, which flatters. Training return: of the last 100 training episodes. IQM: interquartile mean."
    f" In brackets the 95% interval of a bootstrap over seeds, where there are at least {stats.FEWEST}."
)
SECTIONS = {
    "Learning curves": ["curves-steps", "curves-time", "training"],
    "Along the run": ["checkpoints", "boxes", "histograms"],
    "Over all environments": ["aggregates", "profiles"],
    "Comparisons": ["improvements"],
}
CAPTIONS = {
    "curves-steps": "Mean evaluation return over environment steps, with its 95% interval over seeds; of two seeds each"
    " as dots.",
    "curves-time": "The same over training time, evaluation left out.",
    "training": "Mean return of the episodes of training, in which actions are sampled, likewise.",
    "checkpoints": "Mean evaluation return at 25, 50 and 100% of the run and its interval; beside it a dot for each"
    " seed.",
    "boxes": "All evaluation episodes at these points.",
    "histograms": "The same as histograms.",
    "aggregates": "Normalised final evaluations: 0 is the random policy, 1 the best mean, on each environment.",
    "profiles": "Share of runs above each normalised score.",
    "improvements": "Probability that a seed of the one method ends higher than one of the other.",
}
IN_GREY = " In grey the random policy: its mean and the middle half of its episodes."


@dataclass(frozen=True)
class Wish:
    """What a report is asked for, beside its runs."""

    title: str
    baseline: str | None = None  # the method that all others are compared with
    thresholds: dict[str, list[float]] = field(default_factory=dict)  # by environment


def best_methods(groups: list[Group], baseline: str | None) -> list[str]:
    """As many methods as there are colours, in order: the baseline, and the best mean ranks where they were run."""
    ranks = defaultdict(list)
    for group in groups:
        others = [other.final.mean() for other in groups if other.env_id == group.env_id]
        ranks[group.method].append(sum(other > group.final.mean() for other in others) / len(others))
    methods = methods_of(groups)
    best = sorted(methods, key=lambda method: (method != baseline, np.mean(ranks[method])))[:MOST_METHODS]
    return [method for method in methods if method in best]


def normalised_scores(
    groups: list[Group], baselines: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Final returns (seeds, environments) of the methods that were run on all environments: 0 random, 1 best mean.

    The environments that have such a scale, and what had to be left out, follow.
    """
    scales = {}
    for env_id in environments_of(groups):
        scales[env_id] = tables.scale([group for group in groups if group.env_id == env_id], baselines)
    notes = [
        f"normalised scores leave out {env_id}: no mean there is better than a random policy's"
        for env_id, s in scales.items()
        if not s
    ]
    environments = [env_id for env_id, ends in scales.items() if ends]
    scores = {}
    for method in methods_of(groups):
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


def make_tables(material: Material, baselines: dict[str, np.ndarray], wish: Wish) -> dict[str, Table]:
    groups = material.groups
    made = {
        "results": tables.results(groups, baselines),
        "returns": tables.all_returns(groups),
        "seeds": tables.per_seed(groups),
        "provenance": tables.provenance(groups),
    }
    made["thresholds"], made["thresholds-seeds"] = tables.thresholds(groups, baselines, wish.thresholds)
    if (compared := tables.improvements(groups, wish.baseline)).rows:
        made["improvements"] = compared
    return made


def draw_runs(drawn: list[Group], baselines: dict[str, np.ndarray], colour: figures.Colours) -> dict[str, Figure]:
    """What is drawn of each environment by itself."""
    made = {
        "curves-steps": figures.learning_curves(drawn, baselines, colour, "steps"),
        "curves-time": figures.learning_curves(drawn, baselines, colour, "minutes"),
        "checkpoints": figures.checkpoints(drawn, baselines, colour),
        "boxes": figures.boxes(drawn, baselines, colour),
        "histograms": figures.histograms(drawn, baselines, colour),
    }
    if any(np.isfinite(group.returns_in_training).any() for group in drawn):
        made["training"] = figures.training_curves(drawn, baselines, colour)
    for env_id in environments_of(drawn):
        here = [group for group in drawn if group.env_id == env_id]
        if any(group.quantities() for group in here):
            made[file_name(f"losses-{env_id}")] = figures.losses(here, colour)
    return made


def draw_scores(scores: dict[str, np.ndarray], colour: figures.Colours) -> dict[str, Figure]:
    """What is drawn of normalised scores, over all environments."""
    levels = np.linspace(0, 1.5, 61)
    profiles = {method: stats.performance_profile(score, levels) for method, score in scores.items()}
    estimators = {"interquartile mean": stats.interquartile_mean, "mean": stats.mean}
    rows = {
        title: [(method, *stats.with_interval(score, estimator)) for method, score in scores.items()]
        for title, estimator in estimators.items()
    }
    return {
        "profiles": figures.profiles(levels, profiles, colour),
        "aggregates": figures.intervals(rows, colour, figures.NORMALISED),
    }


def draw_improvements(compared: Table) -> Figure:
    rows = [(f"{one}\nover {other}", e.middle, e.low, e.high) for one, other, _, e in compared.rows]
    return figures.intervals({"probability of improvement": rows}, {}, "", within=(0, 1))


def pictures(names: dict[str, str], output: Path) -> str:
    return page.pictures({output / f"{name}.png": caption for name, caption in names.items()})


def sections_of_figures(made: dict[str, Figure], captions: dict[str, str], groups: list[Group], output: Path) -> dict:
    found = {}
    for title, names in SECTIONS.items():
        if shown := {name: captions[name] for name in names if name in made}:
            found[title] = pictures(shown, output)
    named = {
        file_name(f"losses-{env_id}"): f"{env_id}: what was logged of learning." for env_id in environments_of(groups)
    }
    if shown := {name: caption for name, caption in named.items() if name in made}:
        found["Losses"] = pictures(shown, output)
    return found


def section_of_thresholds(table: Table) -> str:
    told = "Until the mean of an evaluation first reached the return; thresholds-seeds.csv has every seed."
    if any(name != "asked for" for _, name, *_ in table.rows):
        told += " The way leads from the random policy's mean to the final mean of the best method."
    return page.paragraph(told) + table.html()


def section_of_films(films: dict[str, Path]) -> str:
    """As many as the page may hold."""
    fitting, size = {}, 0
    for title, path in films.items():
        size += path.stat().st_size
        if size <= FILMS_LIMIT:
            fitting[title] = path
    rest = len(films) - len(fitting)
    note = f"{rest} more would make this page larger than {FILMS_LIMIT / 1e6:.0f} MB." if rest else ""
    return page.films(fitting) + page.paragraph(note)


def draw_all(
    groups: list[Group], chosen: list[str], baselines: dict[str, np.ndarray], compared: Table | None
) -> tuple[dict[str, Figure], dict[str, str], list[str]]:
    """The figures of the chosen methods, their captions, and what had to be left out of them."""
    colour, captions, missing = figures.colours(chosen), dict(CAPTIONS), []
    shown = draw_runs([group for group in groups if group.method in chosen], baselines, colour)
    if baselines:
        captions["curves-steps"] += IN_GREY
    if len(baselines) == len(environments_of(groups)) > 1:
        scores, scaled, missing = normalised_scores(groups, baselines)
        scores = {method: score for method, score in scores.items() if method in chosen}
        captions["aggregates"] += "".join(f" {note}." for note in missing)
        if scores and len(scaled) > 1:
            shown |= draw_scores(scores, colour)
    if compared and len(compared.rows) <= MOST_METHODS:
        shown["improvements"] = draw_improvements(compared)
    return shown, captions, missing


def section_of_results(results: Table, groups: list[Group], chosen: list[str], notes: list[str]) -> str:
    section, number = page.paragraph(ABOUT) + results.html(), len(methods_of(groups))
    if number > len(chosen):
        note = f"The figures show the {len(chosen)} of {number} methods that rank best; the tables show all."
        section += page.paragraph(note)
    return section + "".join(page.paragraph(note) for note in notes)


def sections_of_tables(made: dict[str, Table], films: dict[str, Path], left: Table) -> dict[str, str]:
    """What follows the figures."""
    found = {}
    if made["thresholds"].rows:
        found["Time to a threshold"] = section_of_thresholds(made["thresholds"])
    found["All returns"] = made["returns"].html()
    if films:
        found["Films"] = section_of_films(films)
    few = len(made["seeds"].rows) <= 200
    found["Every seed"] = made["seeds"].html() if few else page.paragraph("In seeds.csv.")
    found["Where it comes from"] = made["provenance"].html()
    if left.rows:
        found["Left out"] = left.html()
    return found


def make_report(
    material: Material, wish: Wish, baselines: dict[str, np.ndarray], films: dict[str, Path], output: Path
) -> str:
    """Writes everything into `output`; returns the results and what is to be noted, for the terminal."""
    groups, chosen = material.groups, best_methods(material.groups, wish.baseline)
    made = make_tables(material, baselines, wish)
    shown, captions, missing = draw_all(groups, chosen, baselines, made.get("improvements"))
    notes = [*tables.repeated_seeds(groups), *tables.mixed_versions(groups), *missing]
    output.mkdir(parents=True, exist_ok=True)
    for name, table in made.items():
        table.write(output / name)
    for name, figure in shown.items():
        figures.save(figure, output / name)
    sections = {"Results": section_of_results(made["results"], groups, chosen, notes)}
    sections |= sections_of_figures(shown, captions, groups, output)  # which are in the folder by now
    sections |= sections_of_tables(made, films, tables.left_out(material))
    write_page(groups, wish.title, sections, output)
    return "\n".join([tables.in_short(made["results"]), *(f"note: {note}" for note in notes)])


def write_page(groups: list[Group], title: str, sections: dict[str, str], output: Path) -> None:
    runs = [run for group in groups for run in group.runs]
    last = max(str(run.meta.get("started", "")) for run in runs)[:10]
    told = f"runs: {len(runs)}, methods: {len(methods_of(groups))}, environments: {len(environments_of(groups))}"
    text = page.page(", ".join(part for part in (title, last) if part), told, sections)
    write_atomically(output / "index.html", text)
