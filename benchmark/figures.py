"""The figures of a report, a paper's column or page wide. Colours are Okabe and Ito's, one per method throughout."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmark.groups import Group, by_environment
from benchmark.runs import replacing
from benchmark.stats import mean, mean_band, with_interval
from benchmark.tables import cell

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
RANDOM = "#8A8A8A"
NORMALISED = "normalised score (0: random policy, 1: best mean)"
STEPS = "environment steps"
SHARES = (0.25, 0.5, 1.0)
WIDTH = 3.4  # inches: a column of a paper
PAGE = 5.5  # and its page, for three panels side by side
STYLE = {
    "font.size": 8,
    "axes.titlesize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # the same figure is the same file
    "text.parse_math": False,  # a name may hold dollars
    "savefig.dpi": 200,
}

Baselines = dict[str, np.ndarray]  # returns of the random policy, by environment
Colours = dict[str, str]  # by method, in the order of the legend


def colours(methods: list[str]) -> Colours:
    return dict(zip(methods, COLOURS, strict=False))


def save(figure: Figure, path: Path) -> None:
    """As PNG and SVG, behind the path's name, which may hold dots."""
    with plt.rc_context(STYLE):
        with replacing(path.with_name(f"{path.name}.png")) as unfinished:
            figure.savefig(unfinished)
        figure.set_layout_engine("none")  # it stays as it was laid out, which is most of the time this takes
        with replacing(path.with_name(f"{path.name}.svg")) as unfinished:
            figure.savefig(unfinished, metadata={"Date": None})


def blank(rows: int, columns: int, height: float, **more: object) -> tuple[Figure, np.ndarray]:
    """A figure that pyplot does not hold on to, and its axes (rows, columns)."""
    figure = Figure(figsize=(WIDTH if columns < 3 else PAGE, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 0.965, 1))  # a title may be wider than its panel
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def grid(number: int, height: float = 1.75, **more: object) -> tuple[Figure, list[Axes]]:
    """One panel, two columns of two or four, three of others."""
    columns = 2 if number == 4 else min(3, number)
    rows = -(-number // columns)
    figure, axes = blank(rows, columns, 2.2 if number == 1 else height * rows, **more)
    for axis in axes.flat[number:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:number])


def panels(groups: list[Group], draw: Callable[[Axes, str, list[Group]], None]) -> Figure:
    """A panel per environment, and one legend."""
    environments = by_environment(groups)
    with plt.rc_context(STYLE):
        figure, axes = grid(len(environments))
        for axis, (env_id, here) in zip(axes, environments.items(), strict=True):
            draw(axis, env_id, here)
            axis.set_title(fill(env_id, 48 if len(environments) == 1 else 26))
        label_once(figure, axes)
        legend_below(figure, axes)
    return figure


def label_once(figure: Figure, axes: list[Axes]) -> None:
    """Labels that all panels share stand at the first of each row, and below the last of each column."""
    columns = axes[0].get_gridspec().ncols
    for k, axis in enumerate(axes):
        axis.set_ylabel("" if k % columns else axis.get_ylabel())
        if k + columns < len(axes):
            axis.set_xlabel("")
        else:
            axis.tick_params(labelbottom=True)
            axis.xaxis.set_in_layout(axis.get_subplotspec().is_last_row())  # or it is in a free place
    figure.align_ylabels()


def legend_below(figure: Figure, axes: list[Axes]) -> None:
    """Of more than one, in a free place or below; it takes no room from the panels."""
    handles: dict[str, Artist] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) < 2:
        return
    free = [axis for axis in figure.axes if not axis.axison]
    names = [fill(name, 18 if len(free) == 1 else 48) for name in handles]
    if free and 0.2 * len("\n".join(names).splitlines()) < figure.get_figheight() / axes[0].get_gridspec().nrows:
        free[0].legend(handles.values(), names, loc="center left").set_in_layout(False)
        return
    per_row = max(1, int(figure.get_figwidth() / (0.06 * max(map(len, handles)) + 0.33)))
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.17 * -(-len(handles) // per_row))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(per_row, len(handles)))


def name_ends(axis: Axes, ends: dict[str, float], colour: Colours) -> None:
    """Names beside the ends of their lines, the highest first, each a tenth of the axis below the one before."""
    low, high = axis.get_ylim()
    tenth, place = (high - low) / 10, np.inf
    for k, (name, end) in enumerate(sorted(ends.items(), key=lambda item: -item[1])):
        place = min(place - tenth, max(end, low + tenth * (len(ends) - 1 - k)))
        axis.text(1.03, place, name, va="center", size=7, color=colour[name], transform=axis.get_yaxis_transform())


def draw_random(axis: Axes, baselines: Baselines, env_id: str) -> None:
    """The random policy's mean, and the middle half of its episodes; its mean in words if far from what is drawn."""
    if env_id not in baselines:
        return
    returns, (low, high) = baselines[env_id], axis.get_ylim()
    middle, tenth = returns.mean(), (high - low) / 10
    if low - 3 * tenth < middle < high + 3 * tenth:
        axis.axhline(middle, color=RANDOM, lw=1, ls=":", label="random policy", zorder=1)
        axis.set_ylim(axis.get_ylim())  # the span takes no room
        axis.axhspan(*np.quantile(returns, [0.25, 0.75]), color=RANDOM, alpha=0.2, lw=0)
    else:
        axis.set_ylim(low - tenth * (middle < low), high + tenth * (middle > high))
        y, side = (0.02, "bottom") if middle < low else (0.98, "top")
        axis.text(0.98, y, f"random {cell(middle)}", ha="right", va=side, size=7, color="0.4", transform=axis.transAxes)


def draw_band(axis: Axes, x: np.ndarray, curves: np.ndarray, colour: str, label: str) -> None:
    """The mean of the seeds and its interval; where they are too few to have one, each of them in dots."""
    middle, low, high = mean_band(curves)
    alone = np.isfinite(middle).sum() == 1
    axis.plot(x, middle, color=colour, lw=1.4, marker="o" if alone else None, ms=3, label=label)
    if np.isnan(low).all():
        if len(curves) > 1:
            axis.plot(x, curves.T, color=colour, ls="", marker=".", ms=4, alpha=0.6, mew=0)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def thousands(value: float, _: object) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def over_steps(axis: Axes) -> None:
    """With a tick at the end of the run: at the roundest number near it, as rollouts end a bit before."""
    last = max(1, *(each.dataLim.x1 for each in axis.get_shared_x_axes().get_siblings(axis)))
    end = next(end for end in (float(f"{last:.{n}e}") for n in range(9)) if abs(end - last) < 0.02 * last)
    axis.set(xlabel=STEPS, xlim=(0, 1.03 * end), xticks=np.linspace(0, end, 5 if len(axis.figure.axes) == 1 else 3))
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))


def curves(
    groups: list[Group], baselines: Baselines, colour: Colours, of: Callable[[Group], tuple], x: str, y: str
) -> Figure:
    """A band per method: `of` gives its points (K,) and the seeds' curves (seeds, K)."""

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        for group in here:
            draw_band(axis, *of(group), colour[group.method], group.method)
        draw_random(axis, baselines, env_id)
        over_steps(axis) if x == STEPS else axis.set_xlabel(x)
        axis.set_ylabel(y)

    return panels(groups, draw)


def losses(here: list[Group], colour: Colours) -> Figure:
    """On one environment, a panel for each quantity that a method logged of its learning."""
    names = list(dict.fromkeys(name for group in here for name in group.quantities()))
    with plt.rc_context(STYLE):
        figure, axes = grid(len(names), height=1.1, sharex=True)
        for axis, name in zip(axes, names, strict=True):
            for group in here:
                if name in group.quantities():
                    draw_band(axis, group.spans, group.quantity(name), colour[group.method], group.method)
            axis.set_title(name.replace("_", " "))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            over_steps(axis)
        label_once(figure, axes)
        legend_below(figure, axes)
    return figure


def over_shares(axis: Axes, here: list[Group], y: str) -> None:
    """Names where in the run the evaluations nearest to each share of it are, in each method's order if they differ."""
    places = [dict.fromkeys(f"{group.share_near(share):.0%}" for group in here) for share in SHARES]
    axis.set_xticks(range(len(SHARES)), map(" / ".join, places))
    axis.set(xlabel="share of the run", ylabel=y, xlim=(-0.5, len(SHARES) - 0.5))
    axis.grid(axis="x", visible=False)


def checkpoints(groups: list[Group], baselines: Baselines, colour: Colours) -> Figure:
    """Mean return at shares of the run with its interval, and beside it every seed as a dot."""

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        width = 0.8 / len(here)
        for k, group in enumerate(here):
            shade, (steps, curves) = colour[group.method], group.curves
            for place, share in enumerate(SHARES):
                returns = curves[:, steps == group.step_at(share)]
                middle, low, high = with_interval(returns, mean)
                x = place + (k - (len(here) - 1) / 2) * width
                axis.plot([x, x], [low, high], color=shade, lw=1.4)
                axis.plot(x, middle, "o", color=shade, ms=4.5, label=None if place else group.method)
                if len(returns) > 1:
                    beside = np.full(len(returns), x + min(0.12, width / 3))
                    axis.plot(beside, returns[:, 0], ".", color=shade, ms=4, alpha=0.55, mew=0)
        draw_random(axis, baselines, env_id)
        over_shares(axis, here, "evaluation return")

    return panels(groups, draw)


def boxes(groups: list[Group], baselines: Baselines, colour: Colours) -> Figure:
    """All evaluation episodes at shares of the run, beside the random policy's."""

    def draw(axis: Axes, env_id: str, here: list[Group]) -> None:
        width, look = 0.8 / len(here), {"flierprops": {"markersize": 2}, "medianprops": {"color": "black"}}
        for k, group in enumerate(here):
            places = [place + (k - (len(here) - 1) / 2) * width for place in range(len(SHARES))]
            returns = [group.at_share(share) for share in SHARES]
            look["boxprops"] = {"facecolor": colour[group.method], "alpha": 0.7}
            axis.boxplot(returns, positions=places, widths=min(0.4, 0.9 * width), patch_artist=True, **look)
            axis.plot([], color=colour[group.method], lw=6, alpha=0.7, label=group.method)
        draw_random(axis, baselines, env_id)
        over_shares(axis, here, "episode return")

    return panels(groups, draw)


def profiles(
    levels: np.ndarray, found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colour: Colours
) -> Figure:
    """Share of runs above each normalised score, with its interval."""
    with plt.rc_context(STYLE):
        figure, (axis,) = grid(1)
        for method, (shares, low, high) in found.items():
            axis.plot(levels, shares, color=colour[method], lw=1.4, label=method)
            axis.fill_between(levels, low, high, color=colour[method], alpha=0.2, lw=0)
        axis.set(xlabel=NORMALISED, ylabel="share of runs above", ylim=(0, 1.03))
        legend_below(figure, [axis])
    return figure


def intervals(
    rows: dict[str, list[tuple[str, float, float, float]]],
    colour: Colours,
    unit: str,
    within: tuple[float, float] | None = None,
) -> Figure:
    """Named estimates as dots on their intervals, a panel below the other for each title."""
    with plt.rc_context(STYLE):
        lines = [sum(name.count("\n") + 1 for name, *_ in estimates) for estimates in rows.values()]
        figure, axes = blank(len(rows), 1, 0.6 + sum(0.19 * n + 0.35 for n in lines), height_ratios=lines)
        for axis, (title, estimates) in zip(axes[:, 0], rows.items(), strict=True):
            for place, (name, middle, low, high) in enumerate(reversed(estimates)):
                shade = colour.get(name, "#444444")
                axis.plot([low, high], [place, place], color=shade, lw=5, alpha=0.35, solid_capstyle="butt")
                axis.plot(middle, place, "o", color=shade, ms=4.5, clip_on=False, zorder=3)
            axis.set_yticks(range(len(estimates)), [name for name, *_ in reversed(estimates)])
            axis.set_ylim(-0.6, len(estimates) - 0.4)
            axis.set_title(title)
            if within:
                margin = 0.03 * (within[1] - within[0])
                axis.set_xlim(within[0] - margin, within[1] + margin)
                axis.axvline(sum(within) / 2, color="0.4", lw=1, ls="--")
            axis.grid(axis="y", visible=False)
        figure.supxlabel(unit, fontsize=STYLE["font.size"])
    return figure
