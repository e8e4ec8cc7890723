"""Trains another library's PPO, SAC, TD3 or DQN, with settings given as JSON; prints its steps per second at the end.

Run in a process of its own: `python -m benchmark.contenders sb3 '{"env_id": "HalfCheetah-v4", …}'`.
"""

import json
import os
import sys
import time
from functools import partial


def game_of(settings: dict) -> str:
    import ale_py  # noqa: F401  registers the games
    import gymnasium as gym

    return gym.spec(settings["env_id"]).kwargs["game"]


def make_game(env_id: str):
    import ale_py  # noqa: F401  registers the games, in every process
    import gymnasium as gym

    return gym.make(env_id)


def games(settings: dict):
    """ale-py's vector environment, as Stable-Baselines3 wants its environments; it does not offer that itself."""
    import numpy as np
    from ale_py.vector_env import AtariVectorEnv
    from stable_baselines3.common.vec_env import VecEnv

    class Games(VecEnv):
        def __init__(self, envs: AtariVectorEnv):
            self.envs = envs
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

        def reset(self) -> np.ndarray:
            return self.envs.reset(seed=1)[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.envs.send(actions)

        def step_wait(self) -> tuple:
            observations, rewards, terminated, truncated, _ = self.envs.recv()
            over, infos = terminated | truncated, [{} for _ in range(self.num_envs)]
            if over.any():
                for n in np.flatnonzero(over):
                    infos[n] = {"terminal_observation": observations[n], "TimeLimit.truncated": bool(truncated[n])}
                observations = self.envs.reset(options={"reset_mask": over})[0]
            return observations, rewards.astype(np.float32), over, infos

        def close(self) -> None:
            self.envs.close()

        def get_attr(self, name: str, indices: object = None) -> list:
            return [getattr(self.envs, name, None)] * self.num_envs

        def env_is_wrapped(self, wrapper: type, indices: object = None) -> list:
            return [False] * self.num_envs

        def set_attr(self, *_: object) -> None: ...
        def env_method(self, *_: object) -> None: ...

    return Games(AtariVectorEnv(game_of(settings), settings["num_envs"], num_threads=settings["threads"]))


def main(library: str, settings: dict) -> None:
    threads, off_policy = settings["threads"], "learning_starts" in settings
    atari = settings["script"] == "ppo_atari_cnn"
    if library == "sbx":
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    import numpy as np
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

    if library == "sb3":
        from stable_baselines3 import DQN, PPO, SAC, TD3

        policy = {"ortho_init": True}
        policy |= {} if atari else {"activation_fn": torch.nn.Tanh, "net_arch": settings["sizes"]}
    else:
        import flax.linen
        from sbx import DQN, PPO, SAC, TD3

        policy = {"activation_fn": flax.linen.tanh, "net_arch": settings["sizes"]}

    class Clock(BaseCallback):
        """Notes when each rollout begins, and when the last has been learnt from; off policy, every so many steps."""

        def _on_training_start(self) -> None:
            self.starts: list[float] = [time.perf_counter()] if off_policy else []

        def _on_rollout_start(self) -> None:
            if not off_policy:
                self.starts.append(time.perf_counter())

        def _on_step(self) -> bool:
            if off_policy and self.num_timesteps % rollout == 0 and self.num_timesteps < rollout * settings["rollouts"]:
                self.starts.append(time.perf_counter())
            return True

        def _on_training_end(self) -> None:
            self.starts.append(time.perf_counter())

    torch.set_num_threads(threads)
    rollout = settings["num_envs"] * settings["num_steps"]
    vector = {"sync": DummyVecEnv, "async": SubprocVecEnv}.get(settings["vec"])
    if settings["vec"] == "ale":
        env = games(settings)
    elif atari:
        make = partial(make_game, game_of(settings).title().replace("_", "") + "NoFrameskip-v4")
        env = VecFrameStack(make_atari_env(make, settings["num_envs"], seed=1, vec_env_cls=vector), 4)
    else:
        env = make_vec_env(settings["env_id"], settings["num_envs"], seed=1, vec_env_cls=vector)
    if off_policy:
        algorithm, own = SAC, {}
        if settings["script"] == "td3_continuous":
            deviation = np.full(env.action_space.shape, 0.1)
            algorithm, own = TD3, {"action_noise": NormalActionNoise(np.zeros_like(deviation), deviation)}
        elif settings["script"] == "dqn":  # whose target is copied at every 500th step
            algorithm, own = DQN, {"buffer_size": 100_000, "tau": 1.0, "target_update_interval": 500}
        model = algorithm(
            "MlpPolicy",
            env,
            batch_size=settings["batch_size"],
            learning_starts=settings["learning_starts"],
            train_freq=1,
            gradient_steps=settings["num_envs"],
            policy_kwargs={"net_arch": settings["sizes"]},
            device="cpu",
            seed=1,
            **own,
        )
    else:
        model = PPO(
            "CnnPolicy" if atari else "MlpPolicy",
            env if atari else VecNormalize(env),
            n_steps=settings["num_steps"],
            batch_size=rollout // settings["num_minibatches"],
            n_epochs=settings["update_epochs"],
            policy_kwargs=policy,
            device="cpu",
            seed=1,
        )
    clock = Clock()
    model.learn(rollout * settings["rollouts"], callback=clock)
    measured = clock.starts[-1] - clock.starts[settings["warmup"]]
    print(rollout * (settings["rollouts"] - settings["warmup"]) / measured)
    env.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
