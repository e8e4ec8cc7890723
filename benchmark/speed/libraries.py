"""Trains another library's algorithm, with settings given as JSON; prints its steps per second at the end.

Run in a process of its own: `python -m benchmark.speed.libraries sb3 PPO '{"env_id": "HalfCheetah-v4", …}'`.
"""

import json
import os
import sys
import time
from functools import partial
from importlib import import_module
from operator import mul
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from benchmark.speed.cases import PACKAGES


def load(library: str, threads: int) -> ModuleType:
    """A library that computes with so many threads, which JAX reads when it is imported."""
    torch.set_num_threads(threads)
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    return import_module(PACKAGES[library])


def build(library: ModuleType, algorithm: str, env: VecEnv, settings: dict, seed: int) -> BaseAlgorithm:
    """A library's algorithm, with settings as rl-zoo writes them; n_envs is the environment's."""
    given = {name: value for name, value in settings.items() if name not in ("normalize", "noise_std", "n_envs")}
    if settings.get("normalize"):
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
    if "noise_std" in settings:
        deviation = np.full(env.action_space.shape, settings["noise_std"])
        given["action_noise"] = NormalActionNoise(np.zeros_like(deviation), deviation)
    for name, value in given.items():
        if str(value).startswith("lin_"):  # in proportion to what is left of the run
            given[name] = partial(mul, float(value.removeprefix("lin_")))
    policy = given.pop("policy_kwargs", {})
    if "activation_fn" in policy:
        name, flax = policy["activation_fn"], library.__name__ == "sbx"
        function = getattr(import_module("flax.linen"), name.lower()) if flax else getattr(torch.nn, name)
        policy = policy | {"activation_fn": function}
    make, kind = getattr(library, algorithm), given.pop("policy", "MlpPolicy")
    return make(kind, env, **given, policy_kwargs=policy, device="cpu", seed=seed)


def make_envs(env_id: str, num_envs: int, vec: str, seed: int) -> VecEnv:
    vector = {"sync": DummyVecEnv, "async": SubprocVecEnv}[vec]
    if not env_id.startswith("ALE/"):
        return make_vec_env(env_id, num_envs, seed=seed, vec_env_cls=vector)
    import ale_py  # noqa: F401  registers the games

    game = gym.spec(env_id).kwargs["game"]
    name = f"ale_py:{game.title().replace('_', '')}NoFrameskip-v4"  # in every process
    return VecFrameStack(make_atari_env(name, num_envs, seed=seed, vec_env_cls=vector), 4)


class Clock(BaseCallback):
    """Notes when each rollout begins, and when the last has been learnt from; off policy, every so many steps."""

    def __init__(self, rollout: int):
        super().__init__()
        self.rollout, self.starts = rollout, []

    def _on_rollout_start(self) -> None:
        if self.num_timesteps % self.rollout == 0:
            self.starts.append(time.perf_counter())

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.starts.append(time.perf_counter())


def main(library: str, algorithm: str, told: dict) -> None:
    loaded = load(library, told["threads"])
    env = make_envs(told["env_id"], told["num_envs"], told["vec"], seed=1)
    rollout, rollouts, warmup = told["num_envs"] * told["num_steps"], told["rollouts"], told["warmup"]
    clock = Clock(rollout)
    build(loaded, algorithm, env, told["settings"], seed=1).learn(rollout * rollouts, callback=clock)
    print(rollout * (rollouts - warmup) / (clock.starts[-1] - clock.starts[warmup]))
    env.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
