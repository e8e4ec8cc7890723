"""Plays the policies of run directories in the environments of their evaluations."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from benchmark.errors import refuse
from benchmark.runs import Run, find_runs, replacing, write_table

AT_ONCE = 20  # environments played side by side


@dataclass
class Episode:
    seed: int
    rewards: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # of every observation; where it bootstraps, of the last too
    at_bounds: list[float] = field(default_factory=list)  # share of each action's components
    terminated: bool = False


def share_at_bounds(action: np.ndarray, space: gym.Space) -> float:
    """Of an action's components, those within a hundredth of their range of a bound; NaN where there is no range."""
    if not (isinstance(space, gym.spaces.Box) and space.is_bounded()):
        return float("nan")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    place = (action - low) / (high - low)
    return float(((place < 0.01) | (place > 0.99)).mean())


def choose(policy: Callable, observations: np.ndarray, infos: list[dict], sample: bool) -> np.ndarray:
    """The actions of a policy, which gets the environments' action masks if it was trained with them."""
    asked = {"sample": True} if sample else {}
    if getattr(policy, "masked", False):
        asked["mask"] = [info.get("action_mask") for info in infos]
    return policy(observations, **asked)


def play(policy: Callable, envs: list[gym.Env], seeds: list[int], sample: bool, values: bool) -> list[Episode]:
    """An episode in each environment. Values go on after the ends that the policy bootstraps from.

    Sampled actions, too, are the same each time.
    """
    torch.manual_seed(seeds[0])
    started = [env.reset(seed=seed) for env, seed in zip(envs, seeds, strict=True)]
    observations, infos = (list(column) for column in zip(*started, strict=True))
    episodes = [Episode(seed) for seed in seeds]
    running = list(range(len(envs)))
    while running:
        batch = np.stack([observations[i] for i in running])
        actions = choose(policy, batch, [infos[i] for i in running], sample)
        expected = policy.value(batch) if values else [None] * len(running)
        for i, action, value in zip(tuple(running), actions, expected, strict=True):
            observations[i], reward, terminated, truncated, infos[i] = envs[i].step(action)
            episodes[i].rewards.append(float(reward))
            episodes[i].at_bounds.append(share_at_bounds(action, envs[i].action_space))
            if values:
                episodes[i].values.append(float(value))
                if ("terminated" if terminated else "truncated" if truncated else None) in policy.bootstraps:
                    episodes[i].values.append(float(policy.value(np.asarray(observations[i])[None])[0]))
            if terminated or truncated:
                episodes[i].terminated = bool(terminated)
                running.remove(i)
    return episodes


def render(env: gym.Env) -> list[np.ndarray]:
    """What there is to see since the last time: of most environments one image."""
    images = env.render()
    return images if isinstance(images, list) else [images]


def film(policy: Callable, env: gym.Env, seed: int, sample: bool, path: Path) -> float:
    """Plays an episode into an mp4, as `play` does one by itself; its return."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    torch.manual_seed(seed)
    (observation, info), over, total = env.reset(seed=seed), False, 0.0
    height, width, _ = render(env)[0].shape
    fps = env.metadata.get("render_fps", 30)
    with replacing(path) as unfinished, FFMPEG_VideoWriter(str(unfinished), (width, height), fps) as video:
        while not over:
            action = choose(policy, observation[None], [info], sample)[0]
            observation, reward, terminated, truncated, info = env.step(action)
            total += float(reward)
            for image in render(env):
                video.write_frame(image)
            over = terminated or truncated
    return total


def to_gif(video: Path) -> Path:
    """Small enough to be shown on a page: at most 10 s, 320 pixels wide, 15 frames a second."""
    from moviepy import VideoFileClip

    gif = video.with_suffix(".gif")
    with VideoFileClip(str(video)) as clip, replacing(gif) as unfinished:
        clip.subclipped(0, min(clip.duration, 10)).resized(width=320).with_fps(15).write_gif(unfinished, logger=None)
    return gif


def realised_returns(episode: Episode, gamma: float) -> np.ndarray:
    """The discounted return from every step on; where it bootstraps, with the last value in the rest's place."""
    returns = np.empty(len(episode.rewards))
    following = episode.values[-1] if len(episode.values) > len(returns) else 0.0
    for t in reversed(range(len(returns))):
        returns[t] = following = episode.rewards[t] + gamma * following
    return returns


def explained_variance(predicted: np.ndarray, realised: np.ndarray) -> float:
    return float(1 - (realised - predicted).var() / realised.var()) if realised.var() else float("nan")


def plot_values(run: Run, episodes: list[Episode], gamma: float, path: Path) -> float:
    """Scatter of predicted against realised returns, and both along the first episodes; the explained variance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    realised = [realised_returns(episode, gamma) for episode in episodes]
    predicted = [np.array(episode.values[: len(episode.rewards)]) for episode in episodes]
    explained = explained_variance(np.concatenate(predicted), np.concatenate(realised))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.scatter(np.concatenate(realised), np.concatenate(predicted), s=4, alpha=0.3, color="#0072B2", lw=0)
    ends = [min(left.get_xlim()[0], left.get_ylim()[0]), max(left.get_xlim()[1], left.get_ylim()[1])]
    left.plot(ends, ends, color="0.4", lw=1, ls="--")
    left.set(xlabel="realised discounted return", ylabel="predicted value", title=f"explained variance {explained:.3f}")
    for color, values, returns in zip(("#0072B2", "#D55E00", "#009E73"), predicted, realised, strict=False):
        right.plot(values, color=color, lw=1.2)
        right.plot(returns, color=color, lw=1.2, ls=":")
    right.plot([], color="0.3", label="predicted")
    right.plot([], color="0.3", ls=":", label="realised")
    right.legend(frameon=False)
    right.set(xlabel="step of the episode", title=f"along {min(3, len(episodes))} episodes")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run.script} on {run.config['env_id']}, seed {run.config['seed']}", parse_math=False)
    for suffix in (".png", ".svg"):
        with replacing(path.with_suffix(suffix)) as unfinished:
            figure.savefig(unfinished, dpi=200)
    plt.close(figure)
    rows = [["seed", "step", "predicted", "realised"]]
    for episode, values, returns in zip(episodes, predicted, realised, strict=True):
        rows += zip([episode.seed] * len(returns), range(len(returns)), values, returns, strict=True)
    write_table(path.with_suffix(".csv"), rows)
    return explained


def draw_without_display() -> bool:
    """Where there is no display, lets environments draw into memory; whether that is so."""
    lacking = sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    if lacking:
        if find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    return lacking


def find_policy(run: Run, which: str) -> Path | None:
    """The file of the policy, if there is one: "last", "best", or the step of an evaluation."""
    paths = {"last": run.last_checkpoint, "best": run.best_policy} | {str(s): p for s, p in run.policies().items()}
    return paths[which] if which in paths and paths[which].exists() else None


def load(run: Run) -> tuple[ModuleType, object]:
    """The run's script and arguments."""
    if run.damage:
        refuse(f"{run.directory}: {run.damage}")
    try:
        module = run.module()
        if lacking := {field.name for field in fields(module.Args)} - run.config.keys():
            refuse(f"{run.directory}: config.yaml is torn, and lacks {', '.join(sorted(lacking))}")
        return module, module.Args(**run.config)
    except Exception as error:
        refuse(f"{run.source}: {type(error).__name__}: {' '.join(str(error).split())}")


def evaluate(
    runs: Annotated[list[Path], tyro.conf.Positional],
    /,
    policy: str = "last",
    episodes: int = 10,
    seeds: tuple[int, ...] = (),
    stochastic: bool = False,
    env_kwargs: str = "{}",
    video: bool = False,
    gif: bool = False,
    render: bool = False,
    analyze_value: bool = False,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("evaluation"),
) -> None:
    """Play the policies of runs, each in the environment of its own evaluation, and print and keep the returns.

    The script's copy in the run directory is what loads the policy, so forks are evaluated just as well. It is run for
    that, so evaluate only runs whose script you trust. "At bounds" is
    the share of the actions' components that lie within a hundredth of their range of a bound.

    Args:
        runs: run directories, or folders of them
        policy: the last, the best, or that of the evaluation at a step
        episodes: how many, with the seeds of the run's own evaluations and those after them
        seeds: the episodes' seeds, instead
        stochastic: sample the actions, as in training
        env_kwargs: arguments of the environment that differ, as JSON
        video: film the best episode of each run
        gif: and make a small animation of it
        render: show the episodes in a window, one after the other
        analyze_value: compare the critic's values with the discounted returns that followed
        output: a folder for episodes.csv and what the other options ask for
    """
    found = find_runs(runs)
    if not found:
        refuse(f"no run directory in {', '.join(map(str, runs))}")
    if episodes < 1:
        refuse(f"--episodes {episodes}: must be at least 1")
    try:
        kwargs = dict(**json.loads(env_kwargs))
    except (ValueError, TypeError):
        refuse(f"--env-kwargs {env_kwargs}: must be a JSON object")
    if draw_without_display() and render:
        refuse("--render: there is no display here; --video makes a film")
    if seeds and min(seeds) < 0:
        refuse(f"--seeds {min(seeds)}: must be at least 0")
    seeds = list(seeds or range(10_000, 10_000 + episodes))
    paths = {run: find_policy(run, policy) for run in found}
    if not any(paths.values()):
        steps = ", ".join(map(str, found[0].policies())) or "none"
        refuse(f"--policy {policy}: {found[0].directory} has no such policy; last, best, or a step of these: {steps}")
    loaded = []
    for run, path in paths.items():
        module, args = load(run)
        if path is None:
            continue
        if kwargs:
            args = replace(args, eval_env_kwargs=json.dumps(json.loads(args.eval_env_kwargs) | kwargs))
        try:
            chosen = module.load_policy(path, "cpu")
            module.make_eval_env(args, "rgb_array" if video or gif else "human" if render else None).close()
        except Exception as error:
            refuse(f"{run.directory}: {' '.join(str(error).split())}")
        if analyze_value and not hasattr(chosen, "value"):
            refuse(f"--analyze-value: the policy of {run.script} has no value(observations)")
        if stochastic and "sample" not in inspect.signature(chosen).parameters:
            refuse(f"--stochastic: the policy of {run.script} takes no sample=True")
        loaded.append((run, module, args, chosen))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {output}: {error.strerror}")

    rows = [["run", "policy", "seed", "return", "length", "terminated", "at_bounds", "film"]]
    width = max(len(run.directory.name) for run, *_ in loaded)
    print(
        f"{'run':<{width}} {'episodes':>8} {'evaluation return':>22} {'lowest':>10} {'highest':>10}"
        f" {'length':>8} {'at bounds':>9}"
    )
    for run, module, args, chosen in loaded:
        played: list[Episode] = []
        # Actions that are sampled depend on those beside them; a film plays its episode by itself.
        side_by_side = 1 if render or stochastic else AT_ONCE
        for first in range(0, len(seeds), side_by_side):
            some = seeds[first : first + side_by_side]
            envs = [module.make_eval_env(args, "human" if render else None) for _ in some]
            played += play(chosen, envs, some, stochastic, analyze_value)
            for env in envs:
                env.close()
        returns = np.array([sum(episode.rewards) for episode in played])
        lengths = np.array([len(episode.rewards) for episode in played])
        at_bounds = np.array([np.mean(episode.at_bounds) for episode in played])
        share = "-" if np.isnan(at_bounds).any() else f"{np.average(at_bounds, weights=lengths):.0%}"
        print(
            f"{run.directory.name:<{width}} {len(played):>8} {f'{returns.mean():,.1f} ± {returns.std():,.1f}':>22}"
            f" {returns.min():>10,.1f} {returns.max():>10,.1f} {lengths.mean():>8,.1f} {share:>9}"
        )
        films = [""] * len(played)
        if video or gif:
            path, best = output / f"{run.directory.name}.mp4", int(returns.argmax())
            env = module.make_eval_env(args, "rgb_array")
            returns[best], films[best] = film(chosen, env, seeds[best], stochastic, path), path.name
            env.close()
            print(f"  film of the best, seed {seeds[best]}, evaluation return {returns[best]:,.1f}")
            print(f"  {path}" + (f"  {to_gif(path)}" if gif else ""))
        for episode, *told in zip(played, returns, lengths, at_bounds, films, strict=True):
            value, length, bounds, name = told
            ended = int(episode.terminated)
            rows.append([run.directory.name, policy, episode.seed, value, length, ended, bounds, name])
        if analyze_value:
            path = output / f"{run.directory.name}-value.png"
            print(f"  explained variance {plot_values(run, played, chosen.discount, path):.3f}  {path}")
    write_table(output / "episodes.csv", rows)
    for run, path in paths.items():
        if path is None:
            print(f"left out: {run.directory} has no policy {policy}")
    print(f"{output / 'episodes.csv'}")
