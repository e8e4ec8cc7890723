"""Trains another library's PPO or SAC, with the settings given as JSON, and prints its steps per second, last of all.

Run in a process of its own: `python -m benchmark.contenders sb3 '{"env_id": "HalfCheetah-v4", …}'`.
"""

import json
import os
import sys
import time


def main(library: str, settings: dict) -> None:
    threads, off_policy = settings["threads"], settings["script"] == "sac_continuous"
    if library == "sbx":
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    if library == "sb3":
        from stable_baselines3 import PPO, SAC

        policy = {"activation_fn": torch.nn.Tanh, "net_arch": settings["sizes"], "ortho_init": True}
    else:
        import flax.linen
        from sbx import PPO, SAC

        policy = {"activation_fn": flax.linen.tanh, "net_arch": settings["sizes"]}

    class Clock(BaseCallback):
        """Notes when each rollout begins, and when the last has been learnt from; SAC's are cut from its steps."""

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
    vector = {"sync": DummyVecEnv, "async": SubprocVecEnv}[settings["vec"]]
    env = make_vec_env(settings["env_id"], settings["num_envs"], seed=1, vec_env_cls=vector)
    if off_policy:
        model = SAC(
            "MlpPolicy",
            env,
            batch_size=settings["batch_size"],
            learning_starts=settings["learning_starts"],
            train_freq=1,
            gradient_steps=settings["num_envs"],
            policy_kwargs={"net_arch": settings["sizes"]},
            device="cpu",
            seed=1,
        )
    else:
        model = PPO(
            "MlpPolicy",
            VecNormalize(env),
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
