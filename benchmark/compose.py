"""What a report consists of: tables, figures, and the page that shows them."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmark import figures, page, stats, tables
from benchmark.groups import Group, Material, by_environment, methods_of
from benchmark.runs import file_name, write_atomically
from benchmark.tables import Table

FILMS_LIMIT = 40e6  # bytes of films in the page
MOST_METHODS = 8  # in one figure: there are as many colours

ABOUT = (
    "Final evaluation: the mean over seeds of the deterministic evaluation after the last step. Best evaluation: of"
    " each seed's best, which flatters. Training return: of the last 100 training episodes. IQM: interquartile mean."
    " Minutes: of our scripts with evaluation, which the curves over time leave out, and without compiling."
    f" In brackets the 95% interval of a bootstrap over seeds, where there are at least {stats.FEWEST}."
)
TABLES = "results", "seeds", "provenance", "improvements", "thresholds"
SECTIONS = {  # figures and their captions
    "Learning curves": {
        "curves-steps": "Mean evaluation return over environment steps, with its 95% interval over seeds; of two seeds"
        " each as dots.",
        "curves-time": "The same over training time, evaluation left out.",
        "training": "Mean return of the episodes of training, in which actions are sampled, likewise.",
    },
    "Along the run": {
        "checkpoints": "Mean return of the evaluations nearest to 25, 50 and 100% of the run and its interval; beside"
        " it a dot for each seed.",
        "boxes": "All evaluation episodes at these points.",
    },
    "Over all environments": {
        "aggregates": "Normalised final evaluations: 0 is the random policy, 1 the best mean, on each environment.",
        "profiles": "Share of runs above each normalised score.",
    },
    "Comparisons": {"improvements": "Probability that a seed of the one method ends higher than one of the other."},
}
IN_GREY = (
    "In the figures the random policy is grey: its mean and the middle half of its episodes, or the mean alone,"
    " in words, where that is far from the curves."
)


def normalised_scores(groups: list[Group], baselines: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Final returns (seeds, environments) of the methods that were run on all environments: 0 random, 1 best mean.

    None without a random policy on each, or where fewer than two have such a scale. What had to be left out follows.
    """
    environments = by_environment(groups)
    if baselines.keys() != environments.keys():
        return {}, []
    scales, scores, notes = {}, {}, []
    for env_id, here in environments.items():
        if ends := tables.scale(here, baselines):
            scales[env_id] = ends
        else:
            notes.append(f"normalised scores leave out {env_id}: no mean there is better than a random policy's")
    for method in methods_of(groups) if len(scales) > 1 else ():
        final = {group.env_id: group.final for group in groups if group.method == method}
        if missing := [env_id for env_id in scales if env_id not in final]:
            notes.append(f"normalised scores leave out {method}: it was not run on {', '.join(missing)}")
            continue
        seeds = [len(final[env_id]) for env_id in scales]
        if min(seeds) < max(seeds):  # the aggregates weigh environments equally
            told = f"the first {min(seeds)} seeds on each environment, of {max(seeds)}"
            notes.append(f"normalised scores of {method}: {told}")
        columns = [(final[env_id][: min(seeds)] - bottom) / (top - bottom) for env_id, (bottom, top) in scales.items()]
        scores[method] = np.stack(columns, 1)
    return scores, notes


def draw_runs(groups: list[Group], baselines: dict[str, np.ndarray], colour: figures.Colours) -> dict[str, Figure]:
    """What is drawn of each environment by itself."""
    drawn = groups, baselines, colour
    made = {
        "curves-steps": figures.curves(*drawn, lambda group: group.curves, figures.STEPS, "evaluation return"),
        "curves-time": figures.curves(
            *drawn,
            lambda group: (group.seconds.mean(0) / 60, group.curves[1]),
            "minutes of training",
            "evaluation return",
        ),
        "checkpoints": figures.checkpoints(*drawn),
        "boxes": figures.boxes(*drawn),
    }
    if any(np.isfinite(group.returns_in_training).any() for group in groups):
        made["training"] = figures.curves(
            *drawn, lambda group: (group.spans, group.returns_in_training), figures.STEPS, "training return"
        )
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


def section_of_films(films: dict[str, Path]) -> str:
    """As many as the page may hold."""
    fitting, left = {}, FILMS_LIMIT
    for title, path in films.items():
        if path.stat().st_size <= left:
            fitting[title] = path
            left -= path.stat().st_size
    rest = len(films) - len(fitting)
    note = f"{rest} more would make this page larger than {FILMS_LIMIT / 1e6:.0f} MB." if rest else ""
    return page.films(fitting) + page.paragraph(note)


def sections_of_tables(made: dict[str, Table], films: dict[str, Path], left_out: dict[Path, str]) -> dict[str, str]:
    """What follows the figures."""
    found = {}
    if made["thresholds"].rows:
        told = "Until the mean of an evaluation first reached the return."
        if any(name != "asked for" for _, name, *_ in made["thresholds"].rows):
            told += " The way leads from the random policy's mean to the final mean of the best method."
        found["Time to a threshold"] = page.paragraph(told) + made["thresholds"].html()
    if films:
        found["Films"] = section_of_films(films)
    few = len(made["seeds"].rows) <= 200
    found["Every seed"] = made["seeds"].html() if few else page.paragraph("In seeds.csv.")
    found["Where it comes from"] = made["provenance"].html()
    if left_out:
        found["Left out"] = Table(["directory", "why"], [[str(path), why] for path, why in left_out.items()]).html()
    return found


def remove_others(output: Path, names: set[str]) -> None:
    """Tables and figures of an earlier report in the same folder that this one has none in the place of."""
    drawn = ["losses-*", *(name for captions in SECTIONS.values() for name in captions)]
    for known, endings in ((TABLES, ("md", "csv")), (drawn, ("png", "svg"))):
        for name, ending in itertools.product(known, endings):
            for path in output.glob(f"{name}.{ending}"):
                if path.stem not in names:
                    path.unlink()


def make_report(
    material: Material,
    title: str,
    baselines: dict[str, np.ndarray],
    films: dict[str, Path],
    output: Path,
    baseline: str | None = None,
    asked: dict[str, list[float]] | None = None,
) -> str:
    """Writes everything into `output`; returns the results and what is to be noted, for the terminal.

    `baseline` is the method that all others are compared with, `asked` are thresholds by environment.
    """
    groups, methods = material.groups, methods_of(material.groups)
    chosen = methods[:MOST_METHODS]
    drawn, colour = [group for group in groups if group.method in chosen], figures.colours(chosen)
    each = tables.results(groups, baselines), tables.per_seed(groups), tables.provenance(groups)
    compared = tables.improvements(groups, baseline), tables.thresholds(groups, baselines, asked or {})
    made = dict(zip(TABLES, (*each, *compared), strict=True))
    shown, captions = draw_runs(drawn, baselines, colour), {}
    for env_id, here in by_environment(drawn).items():
        if any(group.quantities() for group in here):
            name = file_name(f"losses-{env_id}")
            shown[name], captions[name] = figures.losses(here, colour), f"{env_id}: what was logged of learning."
    scores, missing = normalised_scores(groups, baselines)
    if scores := {method: score for method, score in scores.items() if method in chosen}:
        shown |= draw_scores(scores, colour)
    if 0 < len(made["improvements"].rows) <= MOST_METHODS:
        rows = [(f"{one}\nover {other}", e.middle, e.low, e.high) for one, other, _, e in made["improvements"].rows]
        shown["improvements"] = figures.intervals({"probability of improvement": rows}, {}, "", within=(0, 1))
    notes = [*tables.mixed_versions(groups), *missing]

    output.mkdir(parents=True, exist_ok=True)
    replaces = (output / "index.html").exists()
    for name, table in made.items():
        if table.rows:
            table.write(output / name)
    for name, figure in shown.items():
        figures.save(figure, output / name)
    if replaces:
        remove_others(output, {name for name, table in made.items() if table.rows} | shown.keys())

    told = [IN_GREY, *notes] if baselines else notes
    if len(methods) > len(chosen):
        told = [f"The figures show the first {len(chosen)} of {len(methods)} methods; the tables show all.", *told]
    sections = {"Results": page.paragraph(ABOUT) + made["results"].html() + "".join(map(page.paragraph, told))}
    for heading, told_of in (SECTIONS | {"Losses": captions}).items():
        if here := {output / f"{name}.png": caption for name, caption in told_of.items() if name in shown}:
            sections[heading] = page.pictures(here)
    sections |= sections_of_tables(made, films, material.left_out)
    runs = [run for group in groups for run in group.runs]
    last = max(str(run.meta.get("started", "")) for run in runs)[:10]
    counts = f"runs: {len(runs)}, methods: {len(methods)}, environments: {len(by_environment(groups))}"
    text = page.page(", ".join(part for part in (title, last) if part), counts, sections)
    write_atomically(output / "index.html", text)
    return "\n".join([tables.in_short(made["results"]), *(f"note: {note}" for note in notes)])
