"""The figures of a search: what each trial reached, and which arguments decided it."""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from benchmark.figures import COLOURS, STYLE, plt, save

SEARCH_STYLE = STYLE | {"text.parse_math": True}  # which labels of logarithmic axes are


def plain(choice: object) -> str:
    return str(choice).replace("$", r"\$")  # or two of them would begin mathematics


def positions(values: list, log: bool) -> tuple[np.ndarray, list[str]]:
    """Places of the values between 0 and 1, and the labels of both ends, or of every choice."""
    if all(isinstance(value, int | float) for value in values):
        scaled = np.log(values) if log else np.array(values, float)
        low, high = scaled.min(), scaled.max()
        return (scaled - low) / (high - low if high > low else 1), [f"{min(values):.3g}", f"{max(values):.3g}"]
    choices = sorted({plain(value) for value in values})
    places = np.array([choices.index(plain(value)) for value in values]) / max(1, len(choices) - 1)
    return places, choices


def history(complete: list, pruned: list) -> Figure:
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    numbers, values = [trial.number for trial in complete], [trial.value for trial in complete]
    axis.scatter(numbers, values, s=18, color=COLOURS[0], label="trial")
    axis.step(numbers, np.maximum.accumulate(values), where="post", color=COLOURS[1], lw=1.5, label="best so far")
    if pruned:
        ended = [max(trial.intermediate_values.values(), default=min(values)) for trial in pruned]
        axis.scatter([t.number for t in pruned], ended, s=18, color="#8A8A8A", marker="x", label="ended early")
    axis.set(xlabel="trial", ylabel="mean return")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def importances(found: dict[str, float]) -> Figure:
    figure, axis = plt.subplots(figsize=(5.6, 0.35 * len(found) + 1), layout="constrained")
    names = list(found)[::-1]
    bars = axis.barh(names, [found[name] for name in names], color=COLOURS[0], alpha=0.8)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel="importance (fANOVA)", xlim=(0, 1.1 * max(found.values())))
    axis.grid(axis="y", visible=False)
    return figure


def parallel(complete: list, names: list[str], logs: set[str]) -> Figure:
    """A line per trial through its arguments, the better the darker."""
    figure, axis = plt.subplots(figsize=(1.5 * len(names) + 2, 3.6), layout="constrained")
    values = np.array([trial.value for trial in complete])
    shades = ScalarMappable(Normalize(values.min(), values.max()), "viridis_r")
    columns = [positions([trial.params[name] for trial in complete], name in logs) for name in names]
    for k in values.argsort():
        axis.plot([places[k] for places, _ in columns], color=shades.to_rgba(values[k]), lw=1.3, alpha=0.8)
    for x, (_, labels) in enumerate(columns):
        axis.axvline(x, color="0.6", lw=0.8, zorder=0)
        for place, label in zip(np.linspace(0, 1, max(2, len(labels))), labels, strict=False):
            axis.text(x + 0.03, place, label, fontsize=8, va="center", bbox={"color": "white", "alpha": 0.7, "pad": 1})
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    figure.colorbar(shades, ax=axis, label="mean return")
    return figure


def slices(complete: list, names: list[str], logs: set[str]) -> Figure:
    """Each argument against the return, later trials darker."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    size = (2.5 * columns + 1, 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    numbers = [trial.number for trial in complete]
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        chosen = [trial.params[name] for trial in complete]
        chosen = (
            chosen if all(isinstance(value, int | float) for value in chosen) else [plain(value) for value in chosen]
        )
        dots = axis.scatter(chosen, [trial.value for trial in complete], c=numbers, cmap="viridis_r", s=20)
        axis.set_xlabel(name)
        if name in logs:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
    for row in axes:
        row[0].set_ylabel("mean return")
    figure.colorbar(dots, ax=axes, label="trial", shrink=0.8)
    return figure


def plot_search(study, logs: set[str], folder: Path) -> None:
    """Writes history, importances, parallel coordinates and slices; `logs` are the arguments on a logarithmic scale."""
    from optuna.importance import get_param_importances

    trials = [trial for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get("interrupted")]
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(complete) < 2:
        return
    names = list(complete[0].params)
    with plt.rc_context(SEARCH_STYLE):
        made = {"history": history(complete, [trial for trial in trials if trial.state.name == "PRUNED"])}
        made["slices"] = slices(complete, names, logs)
        if len(names) > 1:
            made["parallel"] = parallel(complete, names, logs)
        if len(complete) > 3 and np.ptp([trial.value for trial in complete]) > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some of its evaluators are called experimental
                made["importances"] = importances(get_param_importances(study))
    for name, figure in made.items():
        save(figure, folder / name, SEARCH_STYLE)
        plt.close(figure)
