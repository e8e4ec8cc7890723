"""What a policy earns that acts at random: the lower end of every scale."""

import warnings
from contextlib import closing
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro

from benchmark.errors import refuse
from benchmark.options import at_least, read_kwargs
from benchmark.runs import Run


def play_at_random(env: gym.Env, seed: int) -> tuple[float, int]:
    """Return and length of an episode."""
    env.action_space.seed(seed)
    env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total, length, over = total + float(reward), length + 1, terminated or truncated
    return total, length


def baseline_of(run: Run, episodes: int = 10) -> np.ndarray:
    """Returns in the environment that the run's evaluation plays, on as many of its seeds."""
    module = run.module()
    with closing(module.make_eval_env(module.Args(**run.config))) as env:
        return np.array([play_at_random(env, seed)[0] for seed in range(10_000, 10_000 + episodes)])


def random(
    env_ids: Annotated[list[str], tyro.conf.Positional],
    /,
    env_kwargs: str = "{}",
    episodes: int = 10,
) -> None:
    """Print the returns of a policy that acts at random.

    Args:
        env_ids: Gymnasium ids
        env_kwargs: arguments of the environments, as JSON
        episodes: how many, with the seeds of the scripts' evaluations and those after them
    """
    kwargs = read_kwargs(env_kwargs)
    at_least(1, episodes=episodes)
    if not env_ids:
        refuse("nothing to play: name an environment, such as Hopper-v4")
    warnings.filterwarnings("ignore", message=".*is out of date")
    for env_id in env_ids:
        try:
            with closing(gym.make(env_id, disable_env_checker=True, **kwargs)) as env:
                played = [play_at_random(env, seed) for seed in range(10_000, 10_000 + episodes)]
        except Exception as error:
            refuse(f"{env_id}{f' with --env-kwargs {env_kwargs}' if kwargs else ''}: {error}")
        returns, lengths = np.array(played).T
        print(
            f"{env_id}: return {returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f}),"
            f" length {lengths.mean():.1f}, {episodes} episodes"
        )
