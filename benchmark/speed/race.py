"""Who learnt what and how soon: the figure and the tables of `versus`."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmark import figures, tables
from benchmark.groups import Group
from benchmark.runs import Run
from benchmark.tables import Table


class Runner(Group):
    """Seeds of one contestant."""

    def seconds_of(self, run: Run, steps: np.ndarray) -> np.ndarray:
        """With those of compiling, which ours books apart and others have among their own."""
        return super().seconds_of(run, steps) + run.compiling


def standings(runners: list[Runner], thresholds: tuple[float, ...]) -> tuple[Table, Table]:
    """Minutes, of the median seed and of every seed, and final returns."""
    columns = [*(f"minutes to {value:,}" for value in thresholds), "minutes", "return"]
    medians, seeds = [], []
    for runner in runners:
        seconds = [*(runner.reached(value)[1] for value in thresholds), runner.seconds[:, -1]]
        minutes, final = np.array(seconds) / 60, tables.estimates(runner.final)[0]
        first = [runner.method, len(runner.runs), int(runner.curves[0][-1])]
        medians.append([*first, *map(float, np.median(minutes, 1)), final])
        for run, own, reached in zip(runner.runs, minutes.T, runner.final, strict=True):
            seeds.append([runner.method, run.config["seed"], *map(float, own), float(reached)])
    return Table(["contestant", "seeds", "steps", *columns], medians), Table(["contestant", "seed", *columns], seeds)


def race(runners: list[Runner], colour: figures.Colours, env_id: str) -> Figure:
    """Evaluation return over minutes, whose scale is logarithmic, and over steps."""
    with plt.rc_context(figures.STYLE):
        figure, (left, right) = figures.grid(2, height=2.0, sharey=True)
        for runner in runners:
            steps, curves = runner.curves
            for axis, x in ((left, runner.seconds.mean(0) / 60), (right, steps)):
                figures.draw_band(axis, x, curves, colour[runner.method], runner.method)
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set(xlabel="minutes of training", ylabel="evaluation return")
        figures.over_steps(right)
        figures.name_ends(right, {runner.method: runner.final.mean() for runner in runners}, colour)
        figure.set_figwidth(figures.PAGE)
        figure.suptitle(env_id, fontsize=figures.STYLE["font.size"])
    return figure


def tell(found: dict[str, list[Run]], env_id: str, thresholds: tuple[float, ...], folder: Path) -> None:
    """Writes and prints what is finished; a contestant has its colour whoever else is."""
    runners = [Runner(label, env_id, runs, k) for k, (label, runs) in enumerate(found.items()) if runs]
    if not runners:
        return
    made, seeds = standings(runners, thresholds)
    for name, table in (("versus", made), ("seeds", seeds), ("provenance", tables.provenance(runners))):
        table.write(folder / name)
    figures.save(race(runners, figures.colours(list(found)), env_id), folder / "versus")
    print(made.text())
    print(folder / "versus.png")
