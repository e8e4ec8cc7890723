"""The figures of a report. Colours are Okabe and Ito's, one per method throughout."""

from collections.abc import Callable
from itertools import cycle
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmark.groups import Group
from benchmark.stats import mean, mean_band, with_interval

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
RANDOM = "#8A8A8A"
NORMALISED = "normalised score (0: random policy, 1: best method's mean)"
SHARES = (0.25, 0.5, 1.0)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
    "savefig.dpi": 160,
}

Baselines = dict[str, np.ndarray]  # returns of the random policy, by environment


def colours(methods: list[str]) -> dict[str, str]:
    return dict(zip(methods, cycle(COLOURS), strict=False))


def methods_of(groups: list[Group]) -> list[str]:
    return sorted({group.method for group in groups})


def environments_of(groups: list[Group]) -> list[str]:
    return sorted({group.env_id for group in groups})


def panels(groups: list[Group], draw: Callable[[Axes, str, list[Group]], None], legend: bool = True) -> Figure:
    """A panel per environment, and one legend below them."""
    environments = environments_of(groups)
    columns = min(3, len(environments))
    rows = -(-len(environments) // columns)
    size = (5.6, 3.6) if len(environments) == 1 else (3.3 * columns, 2.6 * rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(environments) :]:
            axis.set_visible(False)
        for axis, env_id in zip(axes.flat, environments, strict=False):
            draw(axis, env_id, [group for group in groups if group.env_id == env_id])
            axis.set_title(fill(env_id, 34))
        handles = {}
        for axis in axes.flat:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if legend and len(handles) > 1:
            legend_below(figure, handles)
    return figure


def legend_below(figure: Figure, handles: dict[str, Artist]) -> None:
    per_row = max(1, int(figure.get_figwidth() * 11 / (max(map(len, handles)) + 6)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(per_row, len(handles)))


def draw_random(axis: Axes, baselines: Baselines, env_id: str) -> None:
    """The random policy's mean, and the middle half of its episodes."""
    if env_id in baselines:
        returns = baselines[env_id]
        axis.axhspan(*np.quantile(returns, [0.25, 0.75]), color=RANDOM, alpha=0.2, lw=0)
        axis.axhline(returns.mean(), color=RANDOM, lw=1, ls=":", label="random policy")


def thousands(value: float, _: object) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def learning_curves(groups: list[Group], baselines: Baselines, over: str) -> Figure:
    """Mean evaluation return over "steps" or "minutes", with the 95% interval of the mean over seeds."""
    colour = colours(methods_of(groups))

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        draw_random(axis, baselines, env_id)
        for group in here:
            steps, curves = group.curves
            x = steps if over == "steps" else group.seconds.mean(0) / 60
            middle, low, high = mean_band(curves)
            axis.plot(x, middle, color=colour[group.method], lw=1.6, label=group.method)
            axis.fill_between(x, low, high, color=colour[group.method], alpha=0.2, lw=0)
        axis.set_xlabel("environment steps" if over == "steps" else "minutes of training")
        axis.set_ylabel("evaluation return")
        if over == "steps":
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))

    return panels(groups, draw)


def checkpoint_bars(groups: list[Group], baselines: Baselines) -> Figure:
    """Mean return at shares of the run, with its 95% interval, and every seed as a dot."""
    colour = colours(methods_of(groups))

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        draw_random(axis, baselines, env_id)
        width = 0.8 / len(here)
        for k, group in enumerate(here):
            steps, curves = group.curves
            for place, share in enumerate(SHARES):
                returns = curves[:, steps == group.step_at(share)]
                middle, low, high = with_interval(returns, mean)
                x = place + (k - (len(here) - 1) / 2) * width
                label = group.method if place == 0 else None
                axis.bar(x, middle, width * 0.9, color=colour[group.method], alpha=0.75, label=label)
                axis.errorbar(x, middle, [[middle - low], [high - middle]], color="0.15", lw=1, capsize=2)
                axis.scatter(np.full(len(returns), x), returns[:, 0], s=6, color="0.15", alpha=0.5, lw=0, zorder=3)
        axis.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        axis.set_xlabel("share of the run")
        axis.set_ylabel("evaluation return")
        axis.grid(axis="x", visible=False)

    return panels(groups, draw)


def boxes(groups: list[Group], baselines: Baselines) -> Figure:
    """All evaluation episodes at shares of the run, beside the random policy's."""
    colour = colours(methods_of(groups))

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        first = [baselines[env_id]] if env_id in baselines else []
        width = 0.8 / len(here)
        whiskers = {"flierprops": {"markersize": 2}, "medianprops": {"color": "black"}, "patch_artist": True}
        for returns in first:
            box = axis.boxplot([returns], positions=[0], widths=min(0.4, width), **whiskers)
            box["boxes"][0].set(facecolor=RANDOM, alpha=0.7)
        for k, group in enumerate(here):
            places = [1 + place + (k - (len(here) - 1) / 2) * width for place in range(len(SHARES))]
            returns = [group.at_share(share) for share in SHARES]
            box = axis.boxplot(returns, positions=places, widths=min(0.4, width * 0.9), **whiskers)
            for patch in box["boxes"]:
                patch.set(facecolor=colour[group.method], alpha=0.7)
            axis.plot([], color=colour[group.method], lw=6, alpha=0.7, label=group.method)
        labels = (["random"] if first else []) + [f"{share:.0%}" for share in SHARES]
        axis.set_xticks(range(1 - len(first), len(SHARES) + 1), labels)
        axis.set_ylabel("return of an episode")
        axis.grid(axis="x", visible=False)

    return panels(groups, draw)


def histograms(groups: list[Group], baselines: Baselines) -> Figure:
    """A row per environment, a column per share of the run: returns of all evaluation episodes."""
    colour, environments = colours(methods_of(groups)), environments_of(groups)
    with plt.rc_context(STYLE):
        size = (3.2 * len(SHARES), 2.3 * len(environments) + 0.5)
        figure, axes = plt.subplots(len(environments), len(SHARES), figsize=size, squeeze=False, layout="constrained")
        handles = {}
        for row, env_id in zip(axes, environments, strict=True):
            here = [group for group in groups if group.env_id == env_id]
            returns = [group.at_share(share) for group in here for share in SHARES]
            edges = np.histogram_bin_edges(np.concatenate([*returns, baselines.get(env_id, returns[0])]), 24)
            for axis, share in zip(row, SHARES, strict=True):
                if env_id in baselines:
                    random = baselines[env_id]
                    axis.hist(
                        random,
                        edges,
                        weights=np.full(len(random), 1 / len(random)),
                        color=RANDOM,
                        alpha=0.6,
                        label="random policy",
                    )
                for group in here:
                    values = group.at_share(share)
                    weights = np.full(len(values), 1 / len(values))
                    shown = {"color": colour[group.method], "label": group.method}
                    axis.hist(values, edges, weights=weights, alpha=0.25, **shown)
                    axis.hist(values, edges, weights=weights, histtype="step", lw=1.2, color=shown["color"])
                axis.set_title(fill(f"{env_id}, {share:.0%}", 34))
                axis.set_xlabel("return of an episode")
                handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
            row[0].set_ylabel("share of episodes")
            top = max(axis.get_ylim()[1] for axis in row)
            for axis in row:
                axis.set_ylim(0, top)
        legend_below(figure, handles)
    return figure


def one_checkpoint(returns: np.ndarray, random: np.ndarray | None, title: str) -> Figure:
    """Box and histogram of some episodes' returns, beside the random policy's."""
    shown = {"policy": (returns, COLOURS[0])} | ({} if random is None else {"random policy": (random, RANDOM)})
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        edges = np.histogram_bin_edges(np.concatenate([values for values, _ in shown.values()]), 24)
        for place, (name, (values, shade)) in enumerate(shown.items()):
            box = left.boxplot(
                [values], positions=[place], widths=0.5, patch_artist=True, medianprops={"color": "black"}
            )
            box["boxes"][0].set(facecolor=shade, alpha=0.7)
            right.hist(values, edges, color=shade, alpha=0.7, label=name)
        left.set_xticks(range(len(shown)), shown)
        left.set_ylabel("return of an episode")
        left.grid(axis="x", visible=False)
        right.set(xlabel="return of an episode", ylabel="episodes")
        right.legend()
        figure.suptitle(title)
    return figure


def profiles(
    levels: np.ndarray, found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colour: dict[str, str]
) -> Figure:
    """Share of runs above each normalised score, with its interval."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        for method, (shares, low, high) in sorted(found.items()):
            axis.plot(levels, shares, color=colour[method], lw=1.6, label=method)
            axis.fill_between(levels, low, high, color=colour[method], alpha=0.2, lw=0)
        axis.set(xlabel=NORMALISED, ylabel="share of runs above", ylim=(0, 1.03))
        legend_below(figure, dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    return figure


def intervals(
    rows: dict[str, list[tuple[str, float, float, float]]],
    colour: dict[str, str],
    unit: str,
    within: tuple[float, float] | None = None,
) -> Figure:
    """Named estimates with their intervals, a panel for each title."""
    with plt.rc_context(STYLE):
        names = [name for estimates in rows.values() for name, *_ in estimates]
        lines = sum(name.count("\n") + 1 for name in names) / len(rows)
        longest = max(len(line) for name in names for line in name.split("\n"))
        size = ((2.6 + 0.075 * longest) * len(rows), 0.28 * lines + 1.1)
        figure, axes = plt.subplots(1, len(rows), figsize=size, squeeze=False, layout="constrained")
        for axis, (title, estimates) in zip(axes[0], rows.items(), strict=True):
            axis.use_sticky_edges = False  # an interval that ends at the axis would look cut
            for place, (name, middle, low, high) in enumerate(reversed(estimates)):
                shade = colour.get(name, "#444444")
                if np.isfinite([low, high]).all():
                    axis.barh(place, high - low, left=low, height=0.5, color=shade, alpha=0.35)
                axis.plot([middle, middle], [place - 0.25, place + 0.25], color=shade, lw=2)
            axis.set_yticks(range(len(estimates)), [name for name, *_ in reversed(estimates)])
            axis.set_title(title)
            if within:
                axis.set_xlim(*within)
                axis.axvline(sum(within) / 2, color="0.4", lw=1, ls="--")
            axis.grid(axis="y", visible=False)
        figure.supxlabel(unit, fontsize=STYLE["font.size"])
    return figure
