"""The command that reports what finished runs reached."""

import math
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import numpy as np
import tyro

from benchmark.errors import choices, refuse
from benchmark.groups import Group, by_environment, gather_finished, in_order, methods_of
from benchmark.options import make_folder, need
from benchmark.random_policy import baseline_of
from benchmark.runs import Run

# What evaluation's environment is made from.
ENVIRONMENT = "env_kwargs", "eval_env_kwargs", "max_episode_steps", "action_repeat", "repeat_action_probability"


def find_baselines(groups: list[Group]) -> dict[str, np.ndarray]:
    """Returns of a random policy on each environment, unless it was not the same one for all methods."""
    baselines = {}
    for env_id, here in by_environment(groups).items():
        runs = [group.runs[0] for group in here]
        if any(len({run.config[name] for run in runs if name in run.config}) > 1 for name in ENVIRONMENT):
            print(f"no random baseline on {env_id}: its arguments differ between methods")
            continue
        try:
            baselines[env_id] = baseline_of(runs[0])
        except Exception as error:  # whatever the environment or a fork's code raises
            print(f"no random baseline on {env_id}: {shorten(str(error), 150, placeholder=' …')}")
    return baselines


def best_films(groups: list[Group]) -> dict[str, Path]:
    """The last film of the best run on each environment, under what it shows."""
    films = {}
    for env_id, here in by_environment(groups).items():
        filmed = [(value, g, run) for g in here for value, run in zip(g.final, g.runs, strict=True) if run.videos()]
        if filmed:
            _, group, run = max(filmed, key=lambda one: one[0])
            step, path = list(run.videos().items())[-1]
            films[f"{env_id}, {group.method}, seed {run.config['seed']}, step {step:,}: {film_of(run, step)}"] = path
    return films


def film_of(run: Run, step: int) -> str:
    """The script films the best episode of an evaluation."""
    returns = run.evaluations["return"][run.evaluations["step"] == step]
    return f"an episode of return {returns.max():,.1f}, the best of {len(returns)}" if len(returns) else "an episode"


def asked_for(threshold: tuple[str, ...], groups: list[Group]) -> dict[str, list[float]]:
    asked: dict[str, list[float]] = {}
    environments = by_environment(groups)
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
            refuse(f"--threshold {pair}: no run on {env_id}; there are {', '.join(environments)}")
    return asked


def with_baseline(groups: list[Group], name: str) -> tuple[list[Group], str]:
    """The groups with the baseline before all others, and its label: `name`, or what has `name` as a part."""
    methods = methods_of(groups)
    named = [name] if name in methods else [method for method in methods if name in method.split(", ")]
    if len(named) != 1:
        refuse(f"--baseline {name}: {len(named) or 'no'} methods have this name{choices(name, methods)}")
    return in_order([replace(g, place=-1) if g.method == named[0] else g for g in groups]), named[0]


def report(
    runs: Annotated[list[Path], tyro.conf.Positional],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report"),
    baseline: str | None = None,
    threshold: tuple[str, ...] = (),
    no_random: bool = False,
) -> None:
    """Write what finished runs reached, with intervals: tables, figures, and a page that needs nothing else.

    Runs are grouped by script, environment and the settings in which they differ. Everything is in the output folder:
    index.html, and the tables (Markdown, CSV) and figures (PNG, SVG) by themselves. Methods stand in the order in
    which their sweep names scripts and values, and each is compared with those before it.

        python -m benchmark report sweeps/mujoco-1m -o report
        python -m benchmark report sweeps/rates --baseline "lr 1e-3"
        python -m benchmark report sweeps/mujoco-1m --threshold HalfCheetah-v4=5000

    Args:
        runs: run directories, or folders of them
        output: a folder
        baseline: the method, as the report names it, that comes first and that all others are compared with
        threshold: ENVIRONMENT=RETURN, to tell the steps and seconds until a seed reached it; as many as wanted
        no_random: do not compare with a policy that acts at random, in the environment that the script in the run
            directory makes; only report on runs whose script you trust
    """
    need("matplotlib", "scipy")
    from benchmark.compose import make_report

    material = gather_finished(runs)
    asked = asked_for(threshold, material.groups)
    if baseline is not None:
        groups, baseline = with_baseline(material.groups, baseline)
        material = replace(material, groups=groups)
    if output.exists() and not output.is_dir():
        refuse(f"--output {output}: is a file; name a folder")
    make_folder(output)
    title = ", ".join(dict.fromkeys(path.resolve().name for path in runs[:3]))
    played, films = {} if no_random else find_baselines(material.groups), best_films(material.groups)
    print(make_report(material, title, played, films, output, baseline, asked))
    for path, reason in material.left_out.items():
        print(f"left out: {path}: {reason}")
    print(output / "index.html")
