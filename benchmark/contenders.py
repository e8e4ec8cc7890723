"""Trains another library's PPO, with the settings given as JSON, and prints its steps per second as the last line.

Run in a process of its own: `python -m benchmark.contenders sb3 '{"env_id": "HalfCheetah-v4", …}'`.
"""

import json
import os
import sys
import time


def main(library: str, settings: dict) -> None:
    threads = settings["threads"]
    if library == "sbx":
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    if library == "sb3":
        from stable_baselines3 import PPO

        policy = {"activation_fn": torch.nn.Tanh, "net_arch": settings["sizes"], "ortho_init": True}
    else:
        import flax.linen
        from sbx import PPO

        policy = {"activation_fn": flax.linen.tanh, "net_arch": settings["sizes"]}

    class Clock(BaseCallback):
        """Notes when each rollout begins, and when the last has been learnt from."""

        def _on_training_start(self) -> None:
            self.starts: list[float] = []

        def _on_rollout_start(self) -> None:
            self.starts.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.starts.append(time.perf_counter())

    torch.set_num_threads(threads)
    env = VecNormalize(make_vec_env(settings["env_id"], settings["num_envs"], seed=1, vec_env_cls=DummyVecEnv))
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=settings["num_steps"],
        batch_size=settings["num_envs"] * settings["num_steps"] // settings["num_minibatches"],
        n_epochs=settings["update_epochs"],
        policy_kwargs=policy,
        device="cpu",
        seed=1,
    )
    clock = Clock()
    rollout = settings["num_envs"] * settings["num_steps"]
    model.learn(rollout * settings["rollouts"], callback=clock)
    measured = clock.starts[-1] - clock.starts[settings["warmup"]]
    print(rollout * (settings["rollouts"] - settings["warmup"]) / measured)
    env.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
