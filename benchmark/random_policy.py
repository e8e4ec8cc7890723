"""What a policy earns that acts at random: the lower end of every scale."""

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro

from benchmark.errors import refuse
from benchmark.options import at_least, read_kwargs
from benchmark.runs import Run, fingerprint, read_json, write_atomically


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "solorl" / "random"


def play_at_random(env: gym.Env, seed: int) -> tuple[float, int]:
    """Return and length of an episode."""
    env.action_space.seed(seed)
    env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total, length, over = total + float(reward), length + 1, terminated or truncated
    return total, length


def source_of(env: gym.Env) -> str:
    """Fingerprint of the file that the environment's class is in; another one once that is edited."""
    try:
        return fingerprint(Path(inspect.getsourcefile(type(env.unwrapped)) or ""))
    except TypeError:  # it is in none
        return "unknown"


def random_baseline(make_env: Callable[[], gym.Env], key: dict, seeds: list[int]) -> dict[str, np.ndarray]:
    """Returns and lengths of random episodes; played once for each `key`, list of seeds and text of the environment."""
    packages = {name: version(name) for name in ("gymnasium", "mujoco", "ale_py") if find_spec(name)}
    with closing(make_env()) as env:
        key = key | {"seeds": seeds, "packages": packages, "environment": source_of(env)}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_folder() / f"{name}.json"
        remembered = read_json(path)
        if not remembered:
            returns, lengths = zip(*(play_at_random(env, seed) for seed in seeds), strict=True)
            remembered = {"key": key, "return": returns, "length": lengths}
            with suppress(OSError):  # else it is played again next time
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(remembered, indent=2) + "\n")
    return {name: np.array(remembered[name], float) for name in ("return", "length")}


def arguments_of(run: Run) -> dict[str, object]:
    """The run's arguments that its evaluation environment reads while it is made, begins an episode and steps."""
    module, read = run.module(), set()

    class Watched(module.Args):
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    args = Watched(**run.config)
    read.clear()  # what the arguments' own checks read
    with closing(module.make_eval_env(args)) as env:
        env.reset(seed=0)
        env.step(env.action_space.sample())
    return {name: run.config[name] for name in read & run.config.keys()}


def baseline_of(run: Run, episodes: int = 10) -> dict[str, np.ndarray]:
    """The baseline in the environment that the run's evaluation plays, on as many of its seeds."""
    module = run.module()
    args = module.Args(**run.config)
    key = {"script": run.script, "version": run.version, "args": arguments_of(run)}
    return random_baseline(lambda: module.make_eval_env(args), key, list(range(10_000, 10_000 + episodes)))


def random(
    env_ids: Annotated[list[str], tyro.conf.Positional],
    /,
    env_kwargs: str = "{}",
    episodes: int = 10,
    first_seed: int = 10_000,
) -> None:
    """Print the returns of a policy that acts at random. Played once per environment and seeds, then remembered.

    Args:
        env_ids: Gymnasium ids
        env_kwargs: arguments of the environments, as JSON
        episodes: how many episodes, each with its own seed
        first_seed: seed of the first; the scripts evaluate with 10000 and those after it
    """
    kwargs = read_kwargs(env_kwargs)
    at_least(1, episodes=episodes)
    at_least(0, first_seed=first_seed)
    if not env_ids:
        refuse("nothing to play: name an environment, such as Hopper-v4")
    warnings.filterwarnings("ignore", message=".*is out of date")
    differing = f" with --env-kwargs {env_kwargs}" if kwargs else ""
    makers = {env_id: partial(gym.make, env_id, disable_env_checker=True, **kwargs) for env_id in env_ids}
    for env_id, make in makers.items():
        try:
            with closing(make()) as env:
                env.reset(seed=first_seed)
                env.step(env.action_space.sample())  # some values are no problem before
        except Exception as error:
            refuse(f"{env_id}{differing}: {error}")
    for env_id, make in makers.items():
        seeds = list(range(first_seed, first_seed + episodes))
        played = random_baseline(make, {"env_id": env_id, "kwargs": kwargs}, seeds)
        returns = played["return"]
        print(
            f"{env_id}: return {returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f}),"
            f" length {played['length'].mean():.1f}, {episodes} episodes"
        )
