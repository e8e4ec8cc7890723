"""Returns of finished runs: a table with intervals, and learning curves."""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmark.runs import Run, find_runs


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95% bootstrap interval of the mean over seeds."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(draws.mean(1), [0.025, 0.975])
    return float(low), float(high)


def summarise(runs: list[Run]) -> dict:
    """One row: the runs of one script, environment and number of environments."""
    runs = sorted(runs, key=lambda run: run.config["seed"])
    results = [run.result for run in runs]
    final = np.array([result["evaluation"]["mean"] for result in results])
    low, high = interval(final)
    commits = {f"{(run.meta['git_commit'] or 'none')[:7]}{'+' if run.meta['git_dirty'] else ''}" for run in runs}
    return {
        "script": runs[0].meta["script"],
        "environment": runs[0].config["env_id"],
        "num_envs": runs[0].config["num_envs"],
        "steps": results[0]["steps"],
        "seeds": len(runs),
        "final": final.mean(),
        "low": low,
        "high": high,
        "best": np.mean([result["best"]["mean"] for result in results]),
        "training": np.mean([result["training_return"] for result in results]),
        "minutes": np.mean([result["wall_time"] for result in results]) / 60,
        "per_seed": " ".join(f"{run.config['seed']}:{value:.1f}" for run, value in zip(runs, final, strict=True)),
        "commit": " ".join(sorted(commits)),
    }


def plot(groups: dict[tuple, list[Run]], path: Path) -> None:
    """Evaluation return over steps, a panel per environment: mean, and the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    environments = sorted({key[1] for key in groups})
    columns = min(3, len(environments))
    rows = -(-len(environments) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(environments) :]:
        axis.set_visible(False)
    for (script, environment, num_envs), runs in sorted(groups.items()):
        axis = axes.flat[environments.index(environment)]
        curves = []
        for run in runs:
            evaluations = run.table("evaluations")
            steps = np.unique(evaluations["step"])
            curves.append([evaluations["return"][evaluations["step"] == step].mean() for step in steps])
        label = f"{script}, {num_envs} environments, {len(runs)} seeds"
        (line,) = axis.plot(steps / 1e6, np.mean(curves, 0), label=label)
        axis.fill_between(steps / 1e6, np.min(curves, 0), np.max(curves, 0), color=line.get_color(), alpha=0.2, lw=0)
        axis.set_title(environment)
        axis.set_xlabel("million environment steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0, 0].set_ylabel("evaluation return")
    figure.savefig(path, dpi=150)


def returns(
    paths: Annotated[list[Path], tyro.conf.Positional],
    /,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Print a Markdown table of the finished runs' returns; with `-o`, also write it, a CSV and the learning curves.

    Final: the mean over seeds of the deterministic evaluation after the last step, with a 95% bootstrap interval over
    the seeds. Best: the same for each seed's best evaluation. Training: the last 100 episodes of training.

    Args:
        paths: run directories, or folders of them
        output: a folder for table.md, table.csv and curves.png
    """
    runs = find_runs(paths)
    finished = [run for run in runs if run.result and run.result["evaluation"]]
    if not finished:
        print(f"no finished run with an evaluation in {', '.join(map(str, paths))}", file=sys.stderr)
        sys.exit(2)
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in finished:
        groups[run.meta["script"], run.config["env_id"], run.config["num_envs"]].append(run)
    summaries = [summarise(group) for _, group in sorted(groups.items())]
    lines = [
        "| environment | envs | steps | seeds | final, 95% interval | best | training | minutes |",
        "|---|" + "--:|" * 7,
    ]
    for row in summaries:
        spread = f"**{row['final']:,.1f}** [{row['low']:,.1f}, {row['high']:,.1f}]"
        numbers = f"{row['best']:,.1f} | {row['training']:,.1f} | {row['minutes']:.1f}"
        lines.append(
            f"| {row['environment']} | {row['num_envs']} | {row['steps']:,} | {row['seeds']} | {spread} | {numbers} |"
        )
    table = "\n".join(lines)
    print(table)
    if unfinished := [run.directory.name for run in runs if not run.result]:
        print(f"\nunfinished, left out: {', '.join(unfinished)}")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(table + "\n")
        with (output / "table.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(summaries[0]))
            writer.writeheader()
            writer.writerows(summaries)
        plot(groups, output / "curves.png")
