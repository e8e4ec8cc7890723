"""Plays the policies of run directories in the environments of their evaluations."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from ctypes.util import find_library
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro

from benchmark.errors import refuse
from benchmark.options import at_least, make_folder, need, read_kwargs
from benchmark.runs import Run, find_runs, names_of, replacing, write_table

AT_ONCE = 20  # environments played side by side
HEADER = f"{'episodes':>8} {'evaluation return':>22} {'lowest':>10} {'highest':>10} {'length':>8} {'at bounds':>9}"


@dataclass
class Episode:
    seed: int
    rewards: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # of every observation; where it bootstraps, of the last too
    at_bounds: list[float] = field(default_factory=list)  # share of each action's components
    terminated: bool = False

    @property
    def total(self) -> float:
        """Added up as the scripts do, one after the other; `sum` rounds less from Python 3.12 on."""
        return float(np.cumsum(self.rewards)[-1])


def share_at_bounds(action: np.ndarray, space: gym.Space) -> float:
    """Of an action's components, those within a hundredth of their range of a bound; NaN where there is no range."""
    if not (isinstance(space, gym.spaces.Box) and space.is_bounded()):
        return float("nan")
    low, high, varies = space.low.astype(np.float64), space.high.astype(np.float64), space.high > space.low
    place = (action - low)[varies] / (high - low)[varies]
    return float(((place < 0.01) | (place > 0.99)).mean()) if varies.any() else float("nan")


def choose(policy: Callable, observations: np.ndarray, infos: list[dict], sample: bool) -> np.ndarray:
    """The actions of a policy, which gets the environments' action masks if it was trained with them."""
    asked = {"sample": True} if sample else {}
    if getattr(policy, "masked", False):
        asked["mask"] = [info.get("action_mask") for info in infos]
    return policy(observations, **asked)


def compute_as_in_training() -> None:
    """To the last bit: with one thread for numpy's products, and numbers near 0 rounded to it."""
    import torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
    torch.set_flush_denormal(True)


def play(policy: Callable, envs: list[gym.Env], seeds: list[int], sample: bool, values: bool) -> list[Episode]:
    """An episode in each environment. Values go on after the ends that the policy bootstraps from.

    Sampled actions, too, are the same each time.
    """
    import torch  # takes longer to load than most commands take

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


@dataclass(frozen=True)
class Player:
    """A run's policy, and what makes the environment that it plays."""

    run: Run
    policy: Callable
    make_env: Callable[[str | None], gym.Env]  # of a render mode


def render(env: gym.Env) -> list[np.ndarray]:
    """What there is to see since the last time: of most environments one image."""
    images = env.render()
    return images if isinstance(images, list) else [images]


def film(player: Player, seed: int, sample: bool, path: Path) -> float:
    """Plays an episode into an mp4, as `play` does one by itself; its return."""
    import torch
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    torch.manual_seed(seed)
    with closing(player.make_env("rgb_array")) as env:
        (observation, info), over, total = env.reset(seed=seed), False, 0.0
        height, width, _ = render(env)[0].shape
        fps = env.metadata.get("render_fps", 30)
        with replacing(path) as unfinished, FFMPEG_VideoWriter(str(unfinished), (width, height), fps) as video:
            while not over:
                action = choose(player.policy, observation[None], [info], sample)[0]
                observation, reward, terminated, truncated, info = env.step(action)
                total += float(reward)
                for image in render(env):
                    video.write_frame(image)
                over = terminated or truncated
    return total


def to_gif(video: Path) -> Path:
    """Small enough to be shown on a page: at most 10 s, 320 pixels wide, 0.08 s a frame, as it counts in hundredths."""
    from moviepy import VideoFileClip

    gif = video.with_suffix(".gif")
    with VideoFileClip(str(video)) as clip, replacing(gif) as unfinished:
        clip.subclipped(0, min(clip.duration, 10)).resized(width=320).with_fps(12.5).write_gif(unfinished, logger=None)
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


def plot_values(player: Player, episodes: list[Episode], path: Path) -> float:
    """Scatter of predicted against realised returns, and both along the first episodes; the explained variance."""
    from benchmark import figures

    realised = [realised_returns(episode, player.policy.discount) for episode in episodes]
    predicted = [np.array(episode.values[: len(episode.rewards)]) for episode in episodes]
    explained, config = explained_variance(np.concatenate(predicted), np.concatenate(realised)), player.run.config
    with figures.plt.rc_context(figures.STYLE):
        figure, (left, right) = figures.grid(2, height=2.2)
        left.scatter(
            np.concatenate(realised), np.concatenate(predicted), s=2, alpha=0.3, color=figures.COLOURS[0], lw=0
        )
        left.axline((0, 0), slope=1, color="0.4", lw=1, ls="--")
        left.set(xlabel="realised return", ylabel="predicted value", title=f"explained variance {explained:.3f}")
        for k, (values, returns) in enumerate(zip(predicted[:3], realised[:3], strict=True)):
            right.plot(values, color=figures.COLOURS[k], label=None if k else "predicted")
            right.plot(returns, color=figures.COLOURS[k], ls=":", label=None if k else "realised")
        right.set(xlabel="step of the episode", title=f"along {min(3, len(episodes))} episodes")
        figures.legend_below(figure, [right])
        figure.suptitle(f"{player.run.script} on {config['env_id']}, seed {config['seed']}", fontsize=8)
    figures.save(figure, path)
    rows = [["seed", "step", "predicted", "realised"]]
    for episode, values, returns in zip(episodes, predicted, realised, strict=True):
        rows += zip([episode.seed] * len(returns), range(len(returns)), values, returns, strict=True)
    write_table(path.with_name(f"{path.name}.csv"), rows)
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
    kept = run.policies()
    last = run.last_checkpoint if run.last_checkpoint.exists() or not kept else kept[max(kept)]  # in a zoo it is this
    paths = {"last": last, "best": run.best_policy} | {str(step): path for step, path in kept.items()}
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
        refuse(f"{run.source}: {type(error).__name__}: {error}")


def find_policies(paths: list[Path], which: str) -> dict[Run, Path | None]:
    """Of each run in the folders; refuses if there is none at all."""
    found = find_runs(paths)
    if not found:
        refuse(f"no run directory in {', '.join(map(str, paths))}")
    policies = {run: find_policy(run, which) for run in found}
    if not any(policies.values()):
        steps = ", ".join(map(str, found[0].policies())) or "none"
        refuse(f"--policy {which}: {found[0].directory} has no such policy; last, best, or a step of these: {steps}")
    return policies


def load_player(run: Run, path: Path, kwargs: dict, mode: str | None) -> Player:
    """Refuses what cannot be loaded, or whose environment cannot be made in this mode."""
    compute_as_in_training()
    module, args = load(run)
    if kwargs:
        args = replace(args, eval_env_kwargs=json.dumps(json.loads(args.eval_env_kwargs) | kwargs))
    try:
        player = Player(run, module.load_policy(path, "cpu"), partial(module.make_eval_env, args))
        player.make_env(None).close()
    except Exception as error:
        refuse(f"{run.directory}: {error}")
    try:
        with closing(player.make_env(mode)) as env:
            if mode == "rgb_array":
                env.reset(seed=0)
                env.render()
    except Exception as error:
        need = f"its environment must take render_mode={mode!r} to be seen"
        refuse(f"{run.directory}: {need}; {error}")
    return player


def check_abilities(player: Player, values: bool, sample: bool) -> None:
    if values and not hasattr(player.policy, "value"):
        refuse(f"--analyze-value: the policy of {player.run.script} has no value(observations)")
    if sample and "sample" not in inspect.signature(player.policy).parameters:
        refuse(f"--stochastic: the policy of {player.run.script} takes no sample=True")


def play_all(player: Player, seeds: list[int], sample: bool, values: bool, mode: str | None = None) -> list[Episode]:
    """An episode for each seed. Actions that are sampled depend on those beside them, so those play by themselves."""
    played: list[Episode] = []
    side_by_side = 1 if mode or sample else AT_ONCE
    for first in range(0, len(seeds), side_by_side):
        some = seeds[first : first + side_by_side]
        envs = [player.make_env(mode) for _ in some]
        played += play(player.policy, envs, some, sample, values)
        for env in envs:
            env.close()
    return played


def summary(name: str, episodes: list[Episode], width: int) -> str:
    """A line under `HEADER`."""
    returns = np.array([episode.total for episode in episodes])
    lengths = np.array([len(episode.rewards) for episode in episodes])
    at_bounds = [np.mean(episode.at_bounds) for episode in episodes]
    share = "-" if np.isnan(at_bounds).any() else f"{np.average(at_bounds, weights=lengths):.0%}"
    return (
        f"{name:<{width}} {len(episodes):>8} {f'{returns.mean():,.1f} ± {returns.std():,.1f}':>22}"
        f" {returns.min():>10,.1f} {returns.max():>10,.1f} {lengths.mean():>8,.1f} {share:>9}"
    )


def film_best(player: Player, episodes: list[Episode], sample: bool, gif: bool, path: Path) -> dict[int, float]:
    """Plays the best of the episodes again, into a film: its seed, and the return in the film."""
    best = max(episodes, key=lambda episode: episode.total)
    print("  filming the best …", flush=True)
    earned = film(player, best.seed, sample, path)
    print(f"  film of the best, seed {best.seed}, evaluation return {earned:,.1f}")
    print(f"  {path}" + (f"  {to_gif(path)}" if gif else ""))
    return {best.seed: earned}


def rows_of(name: str, policy: str, episodes: list[Episode], filmed: dict[int, float]) -> list[list]:
    rows = []
    for episode in episodes:
        earned, shown = filmed.get(episode.seed, episode.total), f"{name}.mp4" if episode.seed in filmed else ""
        ended, at_bounds = int(episode.terminated), np.mean(episode.at_bounds)
        rows.append([name, policy, episode.seed, earned, len(episode.rewards), ended, at_bounds, shown])
    return rows


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

        python -m benchmark evaluate zoo/HalfCheetah-v4__ppo_continuous --gif

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
    at_least(1, episodes=episodes)
    at_least(0, seeds=min(seeds, default=0))
    if analyze_value:
        need("matplotlib", "scipy")
    kwargs = read_kwargs(env_kwargs)
    if draw_without_display() and render:
        refuse("--render: there is no display here; --gif and --video make a film")
    chosen = list(seeds or range(10_000, 10_000 + episodes))
    paths = find_policies(runs, policy)
    mode = "rgb_array" if video or gif else "human" if render else None
    players = [load_player(run, path, kwargs, mode) for run, path in paths.items() if path]
    for player in players:
        check_abilities(player, analyze_value, stochastic)
    make_folder(output)

    rows = [["run", "policy", "seed", "return", "length", "terminated", "at_bounds", "film"]]
    names = names_of([player.run for player in players])
    width = max(map(len, names))
    print(f"{'run':<{width}} {HEADER}")
    for name, player in zip(names, players, strict=True):
        played = play_all(player, chosen, stochastic, analyze_value, "human" if render else None)
        print(summary(name, played, width))
        film_path = output / f"{name}.mp4"
        filmed = film_best(player, played, stochastic, gif, film_path) if video or gif else {}
        rows += rows_of(name, policy, played, filmed)
        if analyze_value:
            path = output / f"{name}-value"
            print(f"  explained variance {plot_values(player, played, path):.3f}  {path}.png")
    write_table(output / "episodes.csv", rows)
    for run, path in paths.items():
        if path is None:
            print(f"left out: {run.directory} has no policy {policy}")
    print(output / "episodes.csv")
