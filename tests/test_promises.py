"""What every script promises: of its results, of its policies, of what it leaves on disk and of what it refuses."""

import ast
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import importlib
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from tests.marks import needs_compiler
from tests.processes import run_in_process

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Row:
    """What the tests need to know of a script. Settings are fields of its Args."""

    small: dict  # a run of a second in tests.envs: checkpoints, and at least three updates in its first 384 steps
    killed: dict[str, dict]  # environments in which it is killed and resumed
    played: str  # one whose evaluations are played again
    filmed: str  # one that is filmed
    mistakes: dict[str, str]  # its own, and what has to be said of them
    clock: dict | None = None  # a run in which the critic learns what Ends-v0 is worth; None where there is no critic
    compiled: dict = dataclasses.field(default_factory=dict)  # what a compiled run has besides
    kills: int = 2  # in each of those environments; more where what is saved is another
    length: int = 10  # of the episodes of the small run
    breaks: bool = True  # whether its environments can pay what is no number


PPO_CLOCK = {
    "env_id": "tests.envs:Ends-v0",
    "total_timesteps": 2880,
    "num_envs": 8,
    "num_steps": 60,
    "gamma": 0.9,
    "learning_rate": 6e-3,
    "lr_schedule": "constant",
    "vf_coef": 1.0,
    "update_epochs": 10,
    "norm_obs": False,
}
Q_CLOCK = {
    "env_id": "tests.envs:Ends-v0",
    "total_timesteps": 1600,
    "buffer_size": 4000,
    "batch_size": 64,
    "critic_sizes": (64, 64),
    "gamma": 0.9,
    "updates_per_step": 0.25,
    "learning_rate": 1e-2,
    "tau": 0.2,
}


SCRIPTS = {
    "ppo_continuous": Row(
        small={
            "env_id": "tests.envs:Mirror-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "num_steps": 32,
            "num_minibatches": 4,
            "update_epochs": 2,
        },
        killed={
            "HalfCheetah-v4": {"num_envs": 2, "total_timesteps": 1536},
            "LunarLander-v3": {"total_timesteps": 2048, "env_kwargs": '{"continuous": true}'},
            "BipedalWalker-v3": {"num_envs": 2, "eval_episodes": 1, "num_evals": 1},
        },
        played="Hopper-v4",
        filmed="Pendulum-v1",
        kills=3,
        clock=PPO_CLOCK,
        mistakes={
            "--env-id CartPole-v1": "--env-id CartPole-v1: acts in Discrete(2)",
            "--env-id tests.envs:Bits-v0": "MultiBinary(3)",
            "--env-id tests.envs:Whole-v0": "real numbers",
            "--num-steps 0": "--num-steps 0: must be at least 1",
            "--vec async --num-envs 3 --num-steps 100": "3 x 100 = 300 steps",
            "--num-minibatches 7 --num-steps 16": "--num-minibatches 7",
            "--total-timesteps 100": "--total-timesteps 100: must be at least one rollout, 4096 steps",
            "--gamma 1.5": "--gamma 1.5: must be between 0 and 1",
            "--gae-lambda -0.1": "--gae-lambda",
            "--clip-coef 0": "--clip-coef 0",
            "--ent-coef -0.1": "--ent-coef",
            "--target-kl 0": "--target-kl",
            "--log-std-init nan": "--log-std-init",
            "--log-std-init -3": "--log-std-init -3.0: must be at least --log-std-min -1.5",
            "--num-envs 4 --num-steps 16": "into parts of 2 or more",
            '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "the spaces of training",
            "--env-id tests.envs:Forgetful-v0 --capture-video": "draws no images of bytes (height, width, 3)",
            "--env-id tests.envs:Unseen-v0 --capture-video": "--capture-video True: NotImplemented",
            "--actor-sizes 64 0": "--actor-sizes",
        },
    ),
    "ppo_atari_cnn": Row(
        small={
            "env_id": "ALE/Breakout-v5",
            "env_kwargs": '{"max_num_frames_per_episode": 40}',
            "eval_env_kwargs": '{"max_num_frames_per_episode": 200}',
            "total_timesteps": 512,
            "num_envs": 2,
            "num_steps": 32,
            "num_minibatches": 1,
            "update_epochs": 1,
            "precision": "fp32",
            "threads": 1,
        },
        killed={"ALE/Breakout-v5": {"env_kwargs": "{}"}},
        played="ALE/Asteroids-v5",
        filmed="ALE/Pong-v5",
        mistakes={
            "--env-id ALE/Pon-v5": "Pong",
            "--env-id CartPole-v1": "such as ALE/Pong-v5; ppo_discrete.py is for other Discrete actions",
            '--env-kwargs {"noop_max":2}': '--env-kwargs {"noop_max":2}: ',
            '--env-kwargs {"max_num_frames_per_episode":"x"}': "--env-kwargs",
            '--env-kwargs {"frameskip":2}': "leave out frameskip",
            '--eval-env-kwargs {"max_episode_steps":9}': "use max_num_frames_per_episode",
            '--env-kwargs {"continuous":true}': "needs Discrete actions",
            '--eval-env-kwargs {"full_action_space":true}': "does not have the actions of training",
            "--repeat-action-probability 2": "--repeat-action-probability 2.0: must be between 0 and 1",
            "--num-steps 0": "--num-steps 0: must be at least 1",
            "--num-minibatches 1000": "8 x 128 = 1024 steps",
            "--total-timesteps 1000": "--total-timesteps 1000: must be at least one rollout, 1024 steps",
            "--gamma 1.5": "--gamma 1.5: must be between 0 and 1",
            "--gae-lambda -0.1": "--gae-lambda",
            "--clip-coef 0": "--clip-coef 0",
            "--ent-coef -0.1": "--ent-coef",
            "--target-kl 0": "--target-kl",
            "--precision fp16": "--precision",
        },
        breaks=False,
    ),
    "sac_continuous": Row(
        small={
            "env_id": "tests.envs:Mirror-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "threads": 1,
            "learning_starts": 128,
            "updates_per_step": 0.125,
            "batch_size": 32,
            "buffer_size": 600,
            "actor_sizes": (32, 32),
            "critic_sizes": (32, 32),
        },
        killed={
            "HalfCheetah-v4": {"num_envs": 1, "policy_frequency": 2, "precision": "bf16"},
            "Hopper-v4": {"norm_obs": True},
        },
        played="Hopper-v4",
        filmed="Pendulum-v1",
        clock=Q_CLOCK | {"actor_sizes": (1,), "autotune": False, "alpha": 1e-6},
        compiled={"norm_obs": True},
        kills=3,
        mistakes={
            "--env-id CartPole-v1": "--env-id CartPole-v1: acts in Discrete(2)",
            "--env-id tests.envs:Whole-v0": "real numbers",
            "--env-id tests.envs:Endless-v0": "infinite bounds; ppo_continuous.py is for those",
            '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "the spaces of training",
            "--num-envs 8 --buffer-size 31": "--buffer-size 31: must be at least 4 x --num-envs, 32",
            "--policy-lr nan": "--policy-lr nan",
            "--q-lr 0": "--q-lr 0",
            "--precision fp16": "--precision",
            "--gamma 1.5": "--gamma 1.5: must be between 0 and 1",
            "--tau -0.1": "--tau",
            "--alpha 0": "--alpha 0",
            "--batch-size 0": "--batch-size 0",
            "--updates-per-step 0": "--updates-per-step 0",
            "--updates-per-step 1e30": "--updates-per-step 1e+30: must be between 1e-6 and 1000",
            "--updates-per-step nan": "--updates-per-step nan",
            "--policy-frequency 0": "--policy-frequency 0",
            "--policy-frequency 1000": "--policy-frequency 1000: must be between 1 and 100",
            "--target-network-frequency 1000000000": "--target-network-frequency 1000000000: must be",
            "--batch-size 1000000": "--batch-size 1000000: must be between 1 and 65536",
            "--actor-sizes 1000000": "--actor-sizes (1000000,): must be between 1 and 65536",
            "--env-id Humanoid-v4 --buffer-size 1000000000": "--buffer-size 1000000000: takes 1,585,000,000,000 bytes",
            "--buffer-size 3000000000": "--buffer-size 3000000000: must be between 1 and 1e9",
            "--target-network-frequency 0": "--target-network-frequency 0",
            "--learning-starts -1": "--learning-starts -1",
            "--total-timesteps 100": "--total-timesteps 100: must be at least 10001, after --learning-starts",
            "--lr-warmup 0.01": "--lr-warmup 0.01: ends at step 10,000; must end after --learning-starts 10000",
            "--critic-sizes 64 0": "--critic-sizes",
        },
    ),
    "td3_continuous": Row(
        small={
            "env_id": "tests.envs:Mirror-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "threads": 1,
            "learning_starts": 128,
            "updates_per_step": 0.125,
            "batch_size": 32,
            "buffer_size": 600,
            "actor_sizes": (32, 32),
            "critic_sizes": (32, 32),
        },
        killed={"Hopper-v4": {"norm_obs": True}},
        played="Hopper-v4",
        filmed="Pendulum-v1",
        clock=Q_CLOCK | {"actor_sizes": (1,), "policy_frequency": 1},
        compiled={"norm_obs": True, "policy_frequency": 2},
        mistakes={
            "--env-id CartPole-v1": "--env-id CartPole-v1: acts in Discrete(2)",
            "--env-id tests.envs:Whole-v0": "real numbers",
            "--env-id tests.envs:Endless-v0": "infinite bounds; ppo_continuous.py is for those",
            '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "the spaces of training",
            "--num-envs 8 --buffer-size 31": "--buffer-size 31: must be at least 4 x --num-envs, 32",
            "--precision fp16": "--precision",
            "--gamma 1.5": "--gamma 1.5: must be between 0 and 1",
            "--tau -0.1": "--tau",
            "--batch-size 0": "--batch-size 0",
            "--updates-per-step 0": "--updates-per-step 0",
            "--updates-per-step nan": "--updates-per-step nan",
            "--policy-frequency 0": "--policy-frequency 0: must be between 1 and 65536",
            "--exploration-noise -0.1": "--exploration-noise -0.1: must be between 0 and 1e15",
            "--policy-noise nan": "--policy-noise nan",
            "--noise-clip -1": "--noise-clip -1.0: must be at least 0",
            "--batch-size 1000000": "--batch-size 1000000: must be between 1 and 65536",
            "--actor-sizes 1000000": "--actor-sizes (1000000,): must be between 1 and 65536",
            "--env-id Humanoid-v4 --buffer-size 1000000000": "--buffer-size 1000000000: takes 1,585,000,000,000 bytes",
            "--buffer-size 3000000000": "--buffer-size 3000000000: must be between 1 and 1e9",
            "--learning-starts -1": "--learning-starts -1",
            "--total-timesteps 100": "--total-timesteps 100: must be at least 10001, after --learning-starts",
            "--lr-warmup 0.01": "--lr-warmup 0.01: ends at step 10,000; must end after --learning-starts 10000",
            "--critic-sizes 64 0": "--critic-sizes",
        },
    ),
    "ppo_beta": Row(
        small={
            "env_id": "tests.envs:Mirror-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "num_steps": 32,
            "num_minibatches": 4,
            "update_epochs": 2,
        },
        killed={
            "tests.envs:Filmed-v0": {"total_timesteps": 2048, "frame_stack": 3, "resize": 16, "action_repeat": 3},
        },
        played="Hopper-v4",
        filmed="Pendulum-v1",
        clock=PPO_CLOCK,
        compiled={"env_id": "tests.envs:Filmed-v0", "resize": 16, "ent_coef": 0.01},
        mistakes={
            "--env-id CartPole-v1": "--env-id CartPole-v1: acts in Discrete(2)",
            "--env-id tests.envs:Endless-v0": "without bounds",
            "--env-id tests.envs:Whole-v0": "real numbers",
            "--env-id tests.envs:ChannelsFirst-v0": "(height, width, channels)",
            "--env-id tests.envs:ChannelsFirst-v0 --resize 84": "(height, width, channels)",
            "--env-id tests.envs:WithoutChannels-v0": "(height, width, channels)",
            "--env-id tests.envs:Stacked-v0": "(height, width, channels)",
            "--env-id tests.envs:Blocks-v0": "(height, width, channels)",
            "--env-id tests.envs:Transparent-v0 --grayscale": "three channels",
            "--env-id tests.envs:Filmed-v0 --resize 7": "--resize 7: must be at least 8",
            "--env-id tests.envs:Filmed-v0 --action-repeat 0": "--action-repeat 0",
            "--env-id Pendulum-v1 --frame-stack 4": "observes no images, which --frame-stack is for",
            "--env-id Pendulum-v1 --precision bf16": "--precision is for",
            "--num-envs 4 --num-steps 16": "into parts of 2 or more",
            '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "the spaces of training",
            "--num-minibatches 7 --num-steps 16": "--num-minibatches 7",
            "--total-timesteps 100": "--total-timesteps 100: must be at least one rollout, 4096 steps",
            "--log-std-init 0": "--log-std-init",
        },
    ),
    "ppo_discrete": Row(
        small={
            "env_id": "tests.envs:Echo-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "num_steps": 32,
            "num_minibatches": 4,
            "update_epochs": 2,
        },
        killed={
            "LunarLander-v3": {"total_timesteps": 2048},
            "Taxi-v4": {"total_timesteps": 2048},
        },
        played="LunarLander-v3",
        filmed="LunarLander-v3",
        clock=PPO_CLOCK | {"env_id": "tests.envs:TickingEnds-v0"},
        compiled={"ent_coef": 0.01},
        mistakes={
            "--env-id Pendulum-v1": "--env-id Pendulum-v1: acts in Box(-2.0, 2.0, (1,), float32)",
            "--env-id tests.envs:Clock-v0": "ppo_continuous.py is for Box",
            "--env-id ALE/Pong-v5": "--env-id ALE/Pong-v5: this is an Atari game; ppo_atari_cnn.py plays it",
            "--env-id tests.envs:Bits-v0": "MultiBinary(3)",
            "--num-steps 0": "--num-steps 0: must be at least 1",
            "--vec async --num-envs 3 --num-steps 100": "3 x 100 = 300 steps",
            "--num-minibatches 7 --num-steps 16": "--num-minibatches 7",
            "--total-timesteps 100": "--total-timesteps 100: must be at least one rollout, 4096 steps",
            "--log-std-init 0": "--log-std-init",
        },
    ),
    "grpo": Row(
        small={
            "env_id": "tests.envs:Mirror-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "num_groups": 4,
            "group_size": 4,
            "max_episode_steps": 8,
            "minibatch_size": 32,
            "update_epochs": 2,
        },
        killed={
            "LunarLander-v3": {
                "total_timesteps": 5000,
                "max_episode_steps": 200,
                "identical_start": False,
                "kl_coef": 0.1,
                "target_kl": 0.001,
                "ref_update_every": 3,
            },
            "BipedalWalker-v3": {
                "num_groups": 2,
                "total_timesteps": 2048,
                "max_episode_steps": 40,
                "distribution": "beta",
                "eval_episodes": 1,
                "num_evals": 1,
            },
        },
        played="Hopper-v4",
        filmed="Pendulum-v1",
        mistakes={
            "--env-id tests.envs:Whole-v0": "real numbers",
            "--env-id tests.envs:Several-v0": "MultiDiscrete",
            "--env-id tests.envs:Clock-v0": "set --max-episode-steps",
            "--env-id Pendulum-v1 --log-std-init nan": "--log-std-init nan: must be a number",
            "--env-id Pendulum-v1 --log-std-init -3": "at least --log-std-min",
            "--env-id tests.envs:Endless-v0 --max-episode-steps 9 --distribution beta": "use normal",
            "--distribution beta": "Discrete(2)",
            "--num-groups 0": "--num-groups 0",
            "--group-size 1": "at least 2",
            "--num-envs 17": "at most 16",
            "--minibatch-size 0": "--minibatch-size",
            "--clip-coef 1": "below 1",
            "--clip-coef 0": "--clip-coef 0.0: must be above 0",
            "--advantage value": "rtg",
            "--gamma 1.1": "--gamma",
            "--target-kl 0.01": "--kl-coef",
            "--target-kl 0.01 --kl-coef 200": "between 1e-4 and 100",
            "--kl-coef -1": "--kl-coef",
            "--ref-update-every 0": "--ref-update-every",
            "--hybrid-clip 0": "--hybrid-clip",
            "--total-timesteps 0": "--total-timesteps",
        },
        length=8,
    ),
    "dqn": Row(
        small={
            "env_id": "tests.envs:Opposites-v0",
            "total_timesteps": 1024,
            "num_envs": 4,
            "learning_starts": 128,
            "updates_per_step": 0.125,
            "batch_size": 32,
            "buffer_size": 600,
            "epsilon_end": 0.5,
            "hidden_sizes": (32, 32),
        },
        killed={
            "LunarLander-v3": {"norm_obs": True, "total_timesteps": 1536},
            "Taxi-v4": {"total_timesteps": 1536, "eval_episodes": 1},
        },
        played="LunarLander-v3",
        filmed="LunarLander-v3",
        clock={name: value for name, value in Q_CLOCK.items() if name != "critic_sizes"}
        | {"env_id": "tests.envs:TickingEnds-v0", "hidden_sizes": (64, 64), "updates_per_step": 0.5},
        compiled={"norm_obs": True, "n_step": 3, "target_network_frequency": 2, "tau": 0.5},
        kills=3,
        mistakes={
            "--env-id Pendulum-v1": "--env-id Pendulum-v1: acts in Box(-2.0, 2.0, (1,), float32)",
            "--env-id tests.envs:Several-v0": "ppo_discrete.py has MultiDiscrete",
            "--env-id ALE/Pong-v5": "--env-id ALE/Pong-v5: this is an Atari game; ppo_atari_cnn.py plays it",
            "--env-id tests.envs:Bits-v0": "MultiBinary(3)",
            "--num-envs 8 --buffer-size 31": "--buffer-size 31: must be at least 4 x --num-envs, 32",
            "--gamma 1.5": "--gamma 1.5: must be between 0 and 1",
            "--tau -0.1": "--tau",
            "--n-step 0": "--n-step 0: must be between 1 and 100",
            "--epsilon-end 2": "--epsilon-end 2.0: must be between 0 and 1",
            "--epsilon-start -1": "--epsilon-start",
            "--exploration-fraction nan": "--exploration-fraction nan",
            "--batch-size 0": "--batch-size 0",
            "--updates-per-step 0": "--updates-per-step 0",
            "--target-network-frequency 0": "--target-network-frequency 0",
            "--hidden-sizes 64 0": "--hidden-sizes",
            "--env-id Taxi-v4 --buffer-size 1000000000": "--buffer-size 1000000000: takes 2,027,000,000,000 bytes",
            "--buffer-size 3000000000": "--buffer-size 3000000000: must be between 1 and 1e9",
            "--learning-starts -1": "--learning-starts -1",
            "--total-timesteps 100": "--total-timesteps 100: must be at least 1008, after --learning-starts",
            "--total-timesteps 2e9": "--total-timesteps 2000000000.0: must be between 1 and 1e9",
            "--lr-warmup 0.001": "--lr-warmup 0.001: ends at step 300; must end after --learning-starts 1000",
        },
    ),
}
# Of every script: what is wrong, and what has to be said of it.
MISTAKES = {
    "--env-id HalfCheeta-v4": "--env-id HalfCheeta-v4",
    "--env-id HalfCheetah-v9": "`v9`",
    "--env-id nowhere:Thing-v0": "--env-id nowhere:Thing-v0",
    "--env-kwargs [1]": "--env-kwargs [1]: must be a JSON object",
    "--env-kwargs {'a':1}": "--env-kwargs {'a':1}: must be a JSON object",
    '--env-kwargs {"wings":2}': '--env-kwargs {"wings":2}',
    '--eval-env-kwargs {"wings":2}': '--eval-env-kwargs {"wings":2}',
    "--seed 3000000000": "--seed 3000000000: must be between 0 and 2147483647",
    "--seed -1": "--seed -1",
    "--num-envs 0": "--num-envs 0: must be",
    "--total-timesteps nan": "--total-timesteps nan",
    "--checkpoint-every 0": "--checkpoint-every 0",
    "--learning-rate -1": "--learning-rate -1.0: must be above 0",
    "--learning-rate nan": "--learning-rate nan",
    "--learning-rate fast": "Error parsing --learning-rate",
    "--lerning-rate 1": "Perhaps you meant: --learning-rate",
    "--lr-schedule steep": "--lr-schedule",
    "--vec threads": "--vec",
    "--num-evals -1": "--num-evals -1",
    "--eval-episodes 0": "--eval-episodes 0",
    "--threads 0": "--threads 0",
    "--device cuda": "--device cuda: torch finds no CUDA device",
    "--vec envpool": "--vec: envpool is not installed; pip install envpool",
    "--track": "--track: wandb is not installed; pip install wandb",
    "--runs-dir /dev/null/runs": "--runs-dir /dev/null/runs",
    "--resume .": "--resume .: is not a run of",
    "--config nowhere.yaml": "nowhere.yaml",
}


class Script:
    """A script with its row of the table. What is not said of a run's arguments is as in its `small` one."""

    def __init__(self, name: str, folder: Path):
        self.name, self.row, self.runs = name, SCRIPTS[name], folder / "runs"
        self.module: ModuleType = importlib.import_module(name)
        self.path = Path(self.module.__file__)

    def args(self, **settings: object) -> object:
        usual = {"num_evals": 2, "eval_episodes": 2, "checkpoint_every": 256, "compile": False}
        return self.module.Args(**usual | self.row.small | {"runs_dir": str(self.runs)} | settings)

    def skip_without(self, vec: str | None) -> None:
        if vec and vec not in typing.get_args(self.module.Args.__annotations__["vec"]):
            pytest.skip(f"has no --vec {vec}")

    def words(self, **settings: object) -> list[str]:
        """The same as a command line."""
        words = []
        for name, value in vars(self.args(**settings)).items():
            if value != getattr(self.module.Args, name):
                flag = name.replace("_", "-")
                values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
                words += [f"--no-{flag}" if value is False else f"--{flag}", *map(str, values)]
        return words

    def train(self, *words: str, interrupts: Iterable[int] = (), **settings: object) -> Path:
        args = self.module.parse(list(words)) if words else self.args(**settings)
        return self.module.train(args, interrupts=interrupts)

    def stop_after_a_rollout(self, *words: str, **settings: object) -> Path:
        interrupts, write = [], self.module.Run.write

        def write_and_interrupt(run: object, table: str, rows: list[dict]) -> None:
            write(run, table, rows)
            if table == "progress":
                interrupts.append(signal.SIGINT)

        with mock.patch.object(self.module.Run, "write", write_and_interrupt), pytest.raises(SystemExit, match="130"):
            self.train(*words, interrupts=interrupts, **settings)
        return only(self.runs)

    def refuse(self, capsys: pytest.CaptureFixture, *words: str) -> str:
        """What is said of a mistake: a box by tyro, or a line by the script."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            self.train(*words)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        line = error.startswith(f"{self.name}.py: ") and error.count("\n") == 1
        assert line or "For full helptext" in error, error
        return " ".join(error.replace("│", " ").split())


@pytest.fixture(params=SCRIPTS)
def script(request, tmp_path) -> Script:
    return Script(request.param, tmp_path)


@pytest.fixture
def original(script, finished_run) -> Path:
    """A finished run, which many tests look at: none changes it."""
    return finished_run(script.name)


@pytest.fixture
def finished(script, original) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(original, script.runs / "copy"))


def those_with(holds: Callable[[Row], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", [name for name, row in SCRIPTS.items() if holds(row)], indirect=True)


def about(*blocks: str) -> pytest.MarkDecorator:
    """Runs a test of these blocks once with each form that they have in the scripts."""
    return pytest.mark.parametrize("script", forms_of(*blocks), indirect=True)


def forms_of(*blocks: str) -> list[str]:
    """A script for each form of these blocks."""
    forms: dict[tuple, str] = {}
    for name in SCRIPTS:
        forms.setdefault(tuple(text_of(name, block) for block in blocks), name)
    return list(forms.values())


def text_of(script: str, block: str) -> str | None:
    """The source of a top-level function or class, or of a class's method."""
    nodes, found = tree_of(script).body, None
    for name in block.split("."):
        found = next((node for node in nodes if getattr(node, "name", None) == name), None)
        nodes = getattr(found, "body", [])
    return found and ast.unparse(found)


@functools.cache
def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / f"{script}.py").read_text())


def with_each(field: str) -> pytest.MarkDecorator:
    """Runs a test with each script and each key in that field of its row."""
    cases = [(name, key) for name, row in SCRIPTS.items() for key in getattr(row, field) or ()]
    return pytest.mark.parametrize(("script", field), cases, indirect=["script"])


def only(runs: Path) -> Path | None:
    """The run directory, if there is one."""
    found = [path for path in runs.glob("*") if not path.name.startswith(".")]
    assert len(found) <= 1
    return found[0] if found else None


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def rows(run: Path, table: str) -> list[dict[str, str]]:
    """Without what the clock has measured."""
    with (run / f"{table}.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name not in ("wall_time", "sps") and "seconds" not in name}
            for row in csv.DictReader(file)
        ]


def flat(state: object, path: str = "") -> Iterable[tuple[str, object]]:
    """Everything in a nested state, by its place."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{path}/{key}")
    else:
        yield path, state.numpy().tobytes() if isinstance(state, torch.Tensor) else state


def same(a: Path, b: Path) -> bool:
    """The whole state of training and the episodes, bit for bit; how the run was watched and timed may differ."""
    states = []
    for run in (a, b):
        state = load(run / "checkpoint.pt")
        del state["args"]
        for name in ("seconds", "evaluation", "best"):
            del state["progress"][name]
        states.append(dict(flat(state)))
    return states[0] == states[1] and rows(a, "episodes") == rows(b, "episodes")


def tensors_of(state: tuple | torch.Tensor) -> list[torch.Tensor]:
    return [state] if isinstance(state, torch.Tensor) else [tensor for part in state for tensor in tensors_of(part)]


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- results


def test_the_seed_decides_and_watching_changes_nothing(script, original):
    """The other run keeps its state after every rollout, and never evaluates."""
    assert same(original, script.train(num_evals=0, checkpoint_every=1))
    other = script.train(num_evals=0, seed=2, total_timesteps=256)
    weights = [load(run / "checkpoint.pt")["agent"] for run in (original, other)]
    names = [name for name in weights[0] if "weight" in name]
    assert names and all(not torch.equal(weights[0][name], weights[1][name]) for name in names)


def test_async_steps_like_sync(script, original):
    script.skip_without("async")
    assert same(original, script.train(vec="async"))


@about("evaluate", "make_eval_env", "make_env", "play")
def test_filming_changes_nothing_and_shows_the_best_episode(script, monkeypatch):
    from moviepy import VideoFileClip

    seeds, play = [], script.module.play
    settings = {"env_id": script.row.filmed, "num_evals": 1, "total_timesteps": 256}
    plain = script.train(**settings)
    monkeypatch.setattr(script.module, "play", lambda *arguments: (seeds.append(arguments[-1]), play(*arguments))[1])
    run = script.train(**settings, capture_video=True)
    assert same(run, plain) and rows(run, "evaluations") == rows(plain, "evaluations")
    (film,) = (run / "videos").iterdir()
    assert film.name == "step-000000256.mp4"
    best = max(rows(run, "evaluations"), key=lambda row: float(row["return"]))
    assert len(seeds) == 3 and seeds[-1] == int(best["seed"])
    with VideoFileClip(str(film)) as clip:
        assert abs(clip.n_frames - int(best["length"])) <= 1 and clip.get_frame(1).std() > 5


def values_of(agent: torch.nn.Module, observations: np.ndarray) -> torch.Tensor:
    """What the critics expect of the agent's own actions, in the environment's rewards."""
    inputs = torch.tensor(agent.moments.normaliser()(observations))
    if hasattr(agent, "q"):
        return agent.q(inputs).amax(-1)
    if hasattr(agent, "critics"):
        actions = agent.actor(inputs).squeeze(0)[:, : agent.low.numel()].tanh()
        return agent.critics(torch.cat((inputs, actions), -1)).amin(0).squeeze(-1)
    return agent.critic(inputs).squeeze(-1) * agent.return_moments.deviation()


@those_with(lambda row: row.clock)
def test_truncation_bootstraps_and_termination_does_not(script):
    run = script.train(**{"num_evals": 0} | script.row.clock)
    policy = script.module.load_policy(run / "checkpoint.pt")
    assert policy.bootstraps == ("truncated",)
    t = np.arange(20)
    observations = np.append(t / 20, -1)[:, None]
    expected = 10 * np.append(1 - 0.9 ** (20 - t), 1)  # with the other's, the last of these would be 6 and 10
    np.testing.assert_allclose(values_of(policy.agent, observations), expected, atol=1.5)


@needs_compiler
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "ppo_continuous"], indirect=True)
def test_what_is_compiled_is_the_update(script, monkeypatch):
    """In a run: it is compiled once, which changes nothing, and then computes what the update does, of every kind.

    The flagship has such a test of its own.
    """
    module, compile_update, calls = script.module, script.module.compile_update, Counter()

    def compile_and_compare(args: object, agent: torch.nn.Module, learner: tuple, *others: object) -> Callable:
        before, random = copy.deepcopy(learner), torch.get_rng_state()
        fast = compile_update(args, agent, learner, *others)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(map(torch.equal, tensors_of(learner), tensors_of(before)))

        def compared(agent: torch.nn.Module, args: object, learner: tuple, *data: object) -> torch.Tensor:
            kind = tuple(each for each in data if isinstance(each, bool))
            calls[kind] += 1
            before, eager = copy.deepcopy(learner), copy.deepcopy(learner)
            with torch.compiler.set_stance("fail_on_recompile"):
                measures = fast(agent, args, learner, *data)
            if calls[kind] <= 3:
                expected = module.update(agent, args, eager, *data)
                torch.testing.assert_close(measures, expected, atol=1e-4, rtol=1e-3, equal_nan=True)
                for new, other, old in zip(*map(tensors_of, (learner, eager, before)), strict=True):
                    assert (new - other).norm() <= 0.05 * (new - old).norm()
            return measures

        return compared

    monkeypatch.setattr(module, "compile_update", compile_and_compare)
    exact = {"precision": "fp32"} if hasattr(module.Args, "precision") else {}
    run = script.train(**exact | {"compile": True, "num_evals": 0, "total_timesteps": 384} | script.row.compiled)
    assert "compiled in" in (run / "run.log").read_text() and calls and min(calls.values()) >= 3


@those_with(lambda row: row.breaks)
def test_what_is_not_finite_stops_the_run(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.train(env_kwargs='{"breaks": 150}', eval_env_kwargs='{"breaks": null}')
    assert stop.value.code == 1
    output = capsys.readouterr()
    run = only(script.runs)
    saved = load(run / "checkpoint.pt")
    said = output.out + output.err
    assert "not finite" in said and f"the last checkpoint is of step {saved['step']}" in said
    assert not (run / "result.json").exists() and 0 < saved["step"] < 640
    assert all(value.isfinite().all() for value in saved["agent"].values())


REPLAYING = ["sac_continuous", "td3_continuous", "dqn"]
DISCRETE = ["ppo_discrete", "dqn"]  # of vectors
BOXED = ["ppo_continuous", "ppo_beta", "sac_continuous", "td3_continuous"]
SPOILS = [(name, "shown") for name in SCRIPTS if name not in ("grpo", "ppo_atari_cnn")]
SPOILS += [(name, what) for name in REPLAYING for what in ("last", "paid")]  # other scripts scale what is paid


@pytest.mark.parametrize(("script", "spoilt"), SPOILS, indirect=["script"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_what_an_environment_spoils_is_in_no_checkpoint(script, spoilt, monkeypatch, capsys):
    """A first observation of NaN, a last one, or a reward that float32 has no number for."""
    step, calls = script.module.Environments.step, iter(range(10**6))

    def spoil(envs: object, actions: np.ndarray) -> tuple:
        true_next, rewards, terminated, truncated, finished = step(envs, np.nan_to_num(actions))  # of what is shown
        due, ended = next(calls), terminated | truncated
        if due == 100 and spoilt == "shown":
            true_next, envs.observations = true_next.copy(), envs.observations * np.nan
        elif due >= 100 and spoilt == "last":
            true_next = np.where(ended.reshape(-1, *[1] * (true_next.ndim - 1)), np.nan, true_next)
        elif due == 100 and spoilt == "paid":
            rewards = rewards + 1e39
        return true_next, rewards, terminated, truncated, finished

    monkeypatch.setattr(script.module.Environments, "step", spoil)
    late = {"learning_starts": 512, "checkpoint_every": 64} if script.name in REPLAYING else {"checkpoint_every": 128}
    with pytest.raises(SystemExit) as stop:
        script.train(norm_obs=True, num_evals=0, **late)
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err
    saved = load(only(script.runs) / "checkpoint.pt")
    rings = saved["buffer"]["rings"] if script.name in REPLAYING else []
    assert saved["step"] > 0 and all(tensor.isfinite().all() for tensor in [*saved["agent"].values(), *rings])


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "ppo_atari_cnn"], indirect=True)
def test_a_reward_that_is_no_number_is_refused(script, capsys):
    kwargs = json.dumps({"pays": "row", "discrete": script.name in DISCRETE})
    words = ["--max-episode-steps", "20"] if script.name == "grpo" else []
    told = script.refuse(capsys, "--env-id", "tests.envs:Kinds-v0", "--env-kwargs", kwargs, *words)
    assert "Python scalars" in told and not list(script.runs.glob("*"))
    told = script.refuse(
        capsys, "--env-id", "tests.envs:Kinds-v0", "--env-kwargs", kwargs.replace("row", "odd"), *words
    )
    assert "KeyError('odd')" in told  # of which 'odd' alone would say nothing


@pytest.mark.parametrize(
    "script", [name for name in SCRIPTS if name not in ("ppo_discrete", "ppo_atari_cnn", "dqn")], indirect=True
)
def test_actions_have_the_boxs_type(script):
    bound = np.ones(2, np.float16)
    agent = script.module.Agent(script.args(), (3,), -bound, bound)
    assert agent.for_environment(np.full((1, 2), 0.3, np.float32)).dtype == np.float16


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_networks_that_diverge_stop_the_run_and_are_not_kept(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.train(learning_rate=1e30, num_evals=0, checkpoint_every=10**6)
    told = capsys.readouterr().err
    step = int(re.search(r"not finite .*?step ([\d,]+)", told)[1].replace(",", ""))
    assert stop.value.code == 1 and step < script.args().total_timesteps and "the environment" not in told
    assert "the last checkpoint is of step 0" in told and not list(script.runs.glob("*/result.json"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in REPLAYING], indirect=True)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_networks_that_the_last_update_of_a_rollout_spoils_do_not_act(script, monkeypatch, capsys):
    """Measures are of before an update, and so don't show it."""
    acted, improve, collect = [], script.module.improve, script.module.collect

    def improve_and_spoil(args: object, *parts: object) -> dict:
        learner = next(part for part in parts if isinstance(part, script.module.Learner))
        measures = improve(args, *parts)
        learner.theta[0] = math.inf
        return measures

    def collect_and_count(*parts: object) -> object:
        acted.append(1)
        return collect(*parts)

    monkeypatch.setattr(script.module, "improve", improve_and_spoil)
    monkeypatch.setattr(script.module, "collect", collect_and_count)
    with pytest.raises(SystemExit) as stop:
        script.train(num_evals=0)
    assert stop.value.code == 1 and len(acted) == 1 and "not finite in the" in capsys.readouterr().err


@about("Run.save", "Run.stop")
def test_a_run_that_is_stopped_as_its_networks_diverge_keeps_the_last_good_ones(script, capsys):
    interrupts, write = [], script.module.Run.write

    def write_and_spoil(run: object, table: str, rows: list[dict]) -> None:
        write(run, table, rows)
        if table == "progress":
            next(run.agent.parameters()).fill_(math.nan)
            interrupts.append(signal.SIGINT)

    with mock.patch.object(script.module.Run, "write", write_and_spoil), pytest.raises(SystemExit) as stop:
        script.train(interrupts=interrupts, num_evals=0, checkpoint_every=10**6)
    assert stop.value.code == 1 and "the last checkpoint is of step 0" in capsys.readouterr().err
    saved = load(only(script.runs) / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in saved["agent"].values())


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "torch.utils.tensorboard", "gymnasium", "tyro", "mujoco"]  # imported by the first update
    context.set_forkserver_preload([*slow, *SCRIPTS])
    multiprocessing.forkserver.ensure_running()
    return context.Process


@with_each("killed")
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_were_not(script, killed, processes):
    settings = {"env_id": killed, "checkpoint_every": 384} | script.row.killed[killed]
    undisturbed = script.train(**settings | {"runs_dir": str(script.runs / "undisturbed")})
    total, random = len(rows(undisturbed, "progress")), np.random.default_rng(zlib.crc32(killed.encode()))

    def share_done() -> float:
        return len(rows(run, "progress")) / total if (run := only(runs)) and (run / "progress.csv").exists() else 0.0

    runs = script.runs / "killed"
    words, kills = script.words(**settings | {"runs_dir": str(runs)}), 0
    for share in np.sort(random.uniform(0, 0.6, script.row.kills)):
        process = processes(target=run_in_process, args=(script.name, words))
        process.start()
        while process.is_alive() and share_done() < share:
            time.sleep(0.002)
        process.join(random.uniform(0, 0.05))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if run := only(runs):
            words = ["--resume", str(run)]
    assert kills and script.train(*words) == only(runs)  # there may be none before
    run = only(runs)
    assert same(undisturbed, run)
    for table in ("evaluations", "progress"):
        assert rows(undisturbed, table) == rows(run, table)


@pytest.mark.parametrize(
    ("script", "evaluations"), [("ppo_continuous", 2), ("dqn", 1)], indirect=["script"]
)  # without a replay buffer, and with one
def test_a_run_may_be_killed_at_any_operation_on_its_files(script, evaluations, processes):
    settings = {"num_evals": evaluations, "checkpoint_every": 512}
    undisturbed = script.train(**settings, runs_dir=str(script.runs / "undisturbed"))
    runs = script.runs / "killed"
    words, number, died, policies = script.words(**settings, runs_dir=str(runs)), 0, True, set()
    while died:
        number += 1
        process = processes(target=run_in_process, args=(script.name, words, number))
        process.start()
        process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0
        if run := only(runs):
            assert (run / "result.json").exists() is not died
            before, policies = policies, {path for path in run.rglob("*.pt") if "checkpoint" not in path.name}
            assert before <= policies and all(load(path)["step"] for path in policies)
            words = ["--resume", str(run)]
    assert number > 10 and same(undisturbed, run) and rows(undisturbed, "evaluations") == rows(run, "evaluations")
    assert not list(run.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("script", "way"),
    [(name, "async") for name in forms_of("Environments", "Run.state") if name != "ppo_atari_cnn"]
    + [pytest.param(name, "compiled", marks=needs_compiler) for name in ("ppo_continuous", "sac_continuous")],
    indirect=["script"],
)
def test_a_run_that_is_stopped_twice_ends_as_if_it_were_not(script, way, capsys):
    settings = {"compile": True} if way == "compiled" else {"env_id": script.row.played, "vec": "async"}
    undisturbed = script.train(**settings | {"num_evals": 0, "runs_dir": str(script.runs / "undisturbed")})
    script.runs /= "stopped"
    run = script.stop_after_a_rollout(**settings)
    script.stop_after_a_rollout("--resume", str(run))
    assert "cannot restore" not in capsys.readouterr().out
    assert same(undisturbed, script.train("--resume", str(run)))


@pytest.mark.parametrize("script", ["ppo_continuous", "td3_continuous", "dqn"], indirect=True)
def test_an_environment_that_shows_other_numbers_than_its_space_has_resumes_exactly(script, capsys):
    kwargs = json.dumps({"discrete": script.name in DISCRETE})
    settings = {"env_id": "tests.envs:Loose-v0", "env_kwargs": kwargs, "norm_obs": False}
    undisturbed = script.train(**settings | {"runs_dir": str(script.runs / "undisturbed")})
    script.runs /= "stopped"
    run = script.stop_after_a_rollout(**settings)
    assert same(undisturbed, script.train("--resume", str(run)))
    assert "could not be restored" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "ppo_atari_cnn"], indirect=True)
def test_observations_of_another_shape_or_kind_than_the_space_are_refused(script, capsys):
    for later, told in (
        ({"shape": [3, 1]}, "observes int64 (3, 1), where its space says int64 (3,)"),
        ({"shape": [1]}, "observes int64 (1,), where its space says int64 (3,)"),  # would be repeated to fit
        ({"shape": [3], "kind": "float64"}, "observes float64 (3,), where its space says int64 (3,)"),  # would be cut
    ):
        kwargs = json.dumps(later | {"discrete": script.name in DISCRETE})
        assert told in script.refuse(capsys, "--env-id", "tests.envs:Misshapen-v0", "--env-kwargs", kwargs)
    assert not list(script.runs.glob("*"))


KINDS = [(name, {"done": kind}) for name in (*BOXED, "grpo") for kind in ("float16", "float64")]
KINDS += [(name, {"done": kind}) for name in (*DISCRETE, "grpo") for kind in ("int8", "uint16", "uint64")]
KINDS += [(name, {"done": "int32", "masked": True}) for name in DISCRETE]
KINDS += [(name, {"seen": "float16", "done": "int64" if name == "dqn" else "float32"}) for name in REPLAYING]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("script", "kinds"), KINDS, indirect=["script"])
def test_actions_are_in_the_environments_space_whatever_its_numbers(script, kinds):
    script.train(env_id="tests.envs:Strict-v0", env_kwargs=json.dumps(kinds))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "ppo_atari_cnn"], indirect=True)
@pytest.mark.parametrize("frames", [{"shape": [8, 8], "kind": "uint8"}, {"shape": [8, 8, 3], "kind": "float64"}])
def test_what_cannot_be_filmed_is_refused(script, frames, capsys):
    kwargs = json.dumps(frames | {"discrete": script.name in DISCRETE})
    words = ["--env-id", "tests.envs:Painted-v0", "--env-kwargs", kwargs, "--capture-video"]
    assert "draws no images of bytes (height, width, 3)" in script.refuse(capsys, *words)


@about("write_atomically")
def test_a_disk_that_fills_while_torch_writes_is_told_as_any_other(script, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("unexpected pos 3328 vs 3224")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="best.pt could not be written"):
        script.module.write_atomically(tmp_path / "best.pt", {})


@pytest.mark.parametrize("script", ["ppo_continuous", "grpo", "sac_continuous"], indirect=True)
def test_an_observation_may_be_a_number(script):
    run = script.train(env_id="tests.envs:Scalar-v0", runs_dir=str(script.runs / "undisturbed"))
    script.runs /= "stopped"
    stopped = script.stop_after_a_rollout(env_id="tests.envs:Scalar-v0")
    assert same(run, script.train("--resume", str(stopped)))


@about("Run.cut_back", "Run.save")
def test_what_is_not_the_runs_own_stays_in_its_directory(script, finished):
    (finished / "notes.csv").write_text("mine")
    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    script.train("--resume", str(finished))
    assert (finished / "notes.csv").read_text() == "mine"
    (finished / "notes.csv").unlink()
    script.train("--resume", str(finished))


@about("Run.save")
def test_a_file_system_need_not_have_links(script, original, monkeypatch):
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(script.module.os, "link", link)
    run = script.train()
    assert same(run, original)
    previous, last = (load(run / f"{name}.pt")["step"] for name in ("checkpoint.previous", "checkpoint"))
    assert 0 < previous < last


@pytest.mark.parametrize("script", ["ppo_continuous"], indirect=True)
def test_a_run_in_a_process_of_ones_own_hears_that_it_is_to_end(script, processes):
    words = script.words(vec="async", total_timesteps=10**6, checkpoint_every=10**6, num_evals=0)
    process = processes(target=run_in_process, args=(script.name, words))
    process.start()
    wait_for(lambda: list(script.runs.glob("[!.]*/progress.csv")))
    process.terminate()
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive


def test_an_evaluation_is_booked_in_the_row_of_its_step(original):
    """So that a checkpoint after it leaves no time that no row tells of."""
    evaluated = {row["step"] for row in rows(original, "evaluations")}
    with (original / "progress.csv").open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file) if float(row["seconds_evaluating"])} == evaluated


@about("Run.cut_back")
def test_the_best_policy_is_one_that_the_run_has_had(script, finished):
    """Where evaluations after the checkpoint are not made again."""
    earlier, later = sorted((finished / "policies").glob("*.pt"))
    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    assert load(finished / "checkpoint.pt")["step"] < load(later)["step"]
    shutil.copy(later, finished / "best.pt")
    script.train("--resume", str(finished), "--num-evals", "0")
    assert json.loads((finished / "result.json").read_text())["best"]["step"] == load(earlier)["step"]
    assert load(finished / "best.pt")["step"] == load(earlier)["step"]


@about("Run.save")
def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(script, monkeypatch):
    fsync, synced = os.fsync, []

    def watched(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    script.train(total_timesteps=256, num_evals=1)
    before = synced[: synced.index("checkpoint.pt.unfinished")]
    assert {"episodes.csv", "progress.csv", "evaluations.csv"} <= {*before}


@about("Run.cut_back", "create_run")
def test_rows_after_the_checkpoint_and_a_torn_one_are_cut_off(script, finished):
    before = contents(finished)
    last = max(int(row["step"]) for row in rows(finished, "episodes"))
    for name in ("episodes", "progress", "evaluations"):
        with (finished / f"{name}.csv").open("a") as file:
            file.write(f"{last + 10**6},1,2,3\n{last // 10}")
    script.train("--resume", str(finished))
    for name in ("episodes.csv", "progress.csv", "evaluations.csv"):
        assert (finished / name).read_bytes() == before[finished / name]


@about("Run.begin", "Run.load", "Run.state", "Run.save")
def test_a_finished_run_that_is_resumed_is_finished_again(script, finished):
    before = contents(finished)
    assert script.train("--resume", str(finished)) == finished
    after = contents(finished)
    for name in ("checkpoint.pt", "episodes.csv", "progress.csv", "evaluations.csv", "best.pt"):
        assert after[finished / name] == before[finished / name]
    old, new = (json.loads(files[finished / "result.json"]) for files in (before, after))
    assert all(new[name] == old[name] for name in ("steps", "evaluation", "best", "training_return"))


@about("Run.write")
def test_a_run_that_goes_on_with_an_edited_script_mixes_no_columns(script, finished, monkeypatch, capsys):
    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    write = script.module.Run.write

    def write_more(run: object, table: str, rows: list[dict]) -> None:
        write(run, table, [row | {"more": 1} for row in rows] if table == "progress" else rows)

    monkeypatch.setattr(script.module.Run, "write", write_more)
    told = script.refuse(capsys, "--resume", str(finished))
    assert "progress.csv: has the columns step,wall_time,sps," in told and ",more; resume with the" in told
    assert not any("more" in row for row in rows(finished, "progress"))


@about("Run.load")
def test_a_run_that_goes_on_with_an_edited_script_says_so(script, finished, capsys):
    began_with = finished / script.path.name
    began_with.write_text(began_with.read_text() + "# as it was\n")
    script.train("--resume", str(finished))
    error = capsys.readouterr().err
    assert f"another {script.path.name} than it began with" in error and error.count("\n") == 1


@about("Run.begin", "Run.load", "Run.state", "Run.save")
def test_a_finished_run_that_has_lost_its_end_is_unfinished_until_it_is_there_again(script, finished):
    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    script.stop_after_a_rollout("--resume", str(finished))
    assert not (finished / "result.json").exists()


def wait_for(condition, seconds: float = 60) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("script", "number"),  # a `Run` each of its own
    [("ppo_continuous", signal.SIGINT), ("sac_continuous", signal.SIGTERM), ("dqn", signal.SIGINT)],
    indirect=["script"],
)
def test_an_interrupted_run_says_how_to_go_on_and_is_nobody_elses_until_then(script, number, capsys):
    words = [sys.executable, str(script.path), *script.words(total_timesteps=1e6, checkpoint_every=1e6, num_evals=0)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            wait_for(lambda: list(script.runs.glob("[!.]*/progress.csv")))
            run = only(script.runs)
            process.send_signal(signal.SIGSTOP)
            wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
            before = contents(run)
            assert "another process" in script.refuse(capsys, "--resume", str(run))
            assert contents(run) == before
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number and not errors and not (run / "result.json").exists()
    _, said, command = output.partition("continue with\n")
    assert said and shlex.split(command) == ["python", str(script.path), "--resume", str(run)]
    steps = [int(row["step"]) for row in rows(run, "progress")]
    assert load(run / "checkpoint.pt")["step"] == steps[-1]  # nothing that was measured is lost
    script.stop_after_a_rollout("--resume", str(run))
    assert [int(row["step"]) for row in rows(run, "progress")] == [*steps, (steps[-1] // steps[0] + 1) * steps[0]]


@about("Run.__exit__")
@pytest.mark.parametrize(
    ("error", "status"), [(OSError(errno.ENOSPC, "full"), 1), (EOFError(), 1), (KeyboardInterrupt(), 130)]
)
def test_a_run_that_fails_says_from_which_step_it_can_go_on(script, error, status, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(script.module, "improve", fail)
    with pytest.raises(SystemExit) as stop:
        script.train()
    told = capsys.readouterr().err
    assert stop.value.code == status and "the last checkpoint is of step 0" in told
    monkeypatch.undo()
    command = told.splitlines()[-1].strip()  # of who has imported the script
    assert command.startswith("train(parse(") and eval(command, vars(script.module)) == only(script.runs)
    assert (only(script.runs) / "result.json").exists()


@about("catch_interrupts")
def test_a_second_interrupt_stops_a_run_at_once(script):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        caught = script.module.catch_interrupts()
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@about("Run.say")
def test_what_is_said_is_in_the_log_at_once(script, monkeypatch):
    seen, write = [], script.module.Run.write

    def look(run: object, table: str, rows: list[dict]) -> None:
        write(run, table, rows)
        seen.append((run.directory / "run.log").read_text())

    monkeypatch.setattr(script.module.Run, "write", look)
    script.train(num_evals=0)
    assert script.name in seen[0]


DAMAGES = {
    "cut": lambda good: good[: len(good) // 2],
    "zeros": lambda good: good[:3000] + bytes(200) + good[3200:],
    "flipped": lambda good: good[:20_000] + bytes(255 - byte for byte in good[20_000:20_200]) + good[20_200:],
    "empty": lambda _: b"",
    "gone": None,
}


@about("Run.begin", "Run.load", "Run.state", "Run.save")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(script, finished, damage, capsys):
    undisturbed = Path(shutil.copytree(finished, script.runs / "undisturbed"))
    checkpoint = finished / "checkpoint.pt"
    good = checkpoint.read_bytes()
    checkpoint.unlink()
    if DAMAGES[damage]:
        checkpoint.write_bytes(DAMAGES[damage](good))
    script.train("--resume", str(finished))
    error = capsys.readouterr().err
    assert "checkpoint.pt is damaged or missing" in error and error.count("\n") == 1
    assert same(undisturbed, finished) and (finished / "result.json").exists()
    assert rows(undisturbed, "evaluations") == rows(finished, "evaluations")


def edit_config(**changes: object):
    def edit(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | changes))

    return edit


def edit_checkpoint(change):
    def edit(run: Path) -> None:
        state = load(run / "checkpoint.pt")
        change(state)
        torch.save(state, run / "checkpoint.pt")

    return edit


def each(pattern: str, change):
    def edit(run: Path) -> None:
        for path in run.glob(pattern):
            change(path)

    return edit


# What makes a run one that cannot be resumed, and what has to be said of it.
SPOILT = {
    "both checkpoints torn": (each("checkpoint*.pt", lambda path: path.write_bytes(b"PK")), "damaged or missing"),
    "both checkpoints gone": (each("checkpoint*.pt", Path.unlink), "has no checkpoint"),
    "neither checkpoint nor log": (each("*[tg]", Path.unlink), "has no checkpoint"),
    "a policy in its place": (lambda run: shutil.copy(run / "best.pt", run / "checkpoint.pt"), "is a policy"),
    "another seed": (edit_config(seed=7), "--seed is 1 in checkpoint.pt and cannot become 7"),
    "another rate": (edit_config(learning_rate=0.5), "cannot become 0.5"),
    "no arguments": (each("config.yaml", lambda path: path.write_text("")), "is not a file of arguments"),
    "no YAML": (each("config.yaml", lambda path: path.write_text("{")), "is not a file of arguments"),
    "an unknown argument": (edit_config(wings=2), "--wings"),
    "a wrong value": (edit_config(learning_rate="quick"), "--learning-rate"),
    "no script": (each("*.py", Path.unlink), "is not a run of"),
    "other networks": (
        edit_checkpoint(lambda state: state["agent"].update({min(state["agent"]): torch.zeros(9, 9, 9)})),
        "size mismatch",
    ),
    "another script's checkpoint": (edit_checkpoint(lambda state: state.update(script="other")), "--script is other"),
    "another environment's": (edit_checkpoint(lambda state: state["args"].update(env_id="A-v0")), "--env-id is A-v0"),
}


@about("Run.begin", "Run.load", "Run.state", "Run.save")
@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_run_is_refused_and_left_alone(script, finished, case, capsys):
    spoil, told = SPOILT[case]
    spoil(finished)
    before = contents(finished)
    for _ in range(2):
        assert told in script.refuse(capsys, "--resume", str(finished))
    assert contents(finished) == before


def test_what_may_not_differ_from_the_run_is_refused(script, finished, capsys):
    before = contents(finished)
    for flag, value in (("--learning-rate", "1.0"), ("--env-id", script.row.filmed), ("--seed", "2")):
        assert f"{flag} is" in script.refuse(capsys, "--resume", str(finished), flag, value)
    assert contents(finished) == before


@about("Run.load")
def test_only_what_leaves_the_training_as_it_is_may_differ_from_the_run(script, finished, monkeypatch):
    module = script.module
    saved = module.load_checkpoint(finished / "checkpoint.pt")
    run, free = types.SimpleNamespace(directory=finished, args=module.Args(**saved["args"])), set()
    for name in saved["args"]:
        other = saved | {"args": saved["args"] | {name: "another"}}
        monkeypatch.setattr(module, "load_checkpoint", lambda path, other=other: other)
        with contextlib.suppress(ValueError):
            module.Run.load(run)
            free.add(name)
    watched = {"num_evals", "eval_episodes", "capture_video", "track", "wandb_project_name", "wandb_entity"}
    assert free == watched | {"resume", "config", "runs_dir", "device", "threads", "compile", "checkpoint_every"}


@about("parse")
def test_a_run_that_is_resumed_takes_no_file_of_arguments(script, finished, capsys):
    told = script.refuse(capsys, "--resume", str(finished), "--config", str(finished / "config.yaml"))
    assert "has its own arguments" in told


# ---------------------------------------------------------------------------------------------------------- policies


def returns_again(module: ModuleType, run: Path, checkpoint: str, seeds: list[int]) -> list[str]:
    """Those of a loaded policy, as the table writes them."""
    args = module.Args(**yaml.safe_load((run / "config.yaml").read_text()))
    policy, returns = module.load_policy(run / checkpoint), []
    for seed in seeds:
        with contextlib.closing(module.make_eval_env(args)) as env:
            (observation, _), total, over = env.reset(seed=seed), 0.0, False
            while not over:
                observation, reward, terminated, truncated, _ = env.step(policy(observation))
                total, over = total + float(reward), terminated or truncated
        returns.append(str(total))
    return returns


def evaluated_again(module: ModuleType, run: Path) -> dict[str, int]:
    """All policies of a run and the steps that they are of, once each has had the returns of its evaluation."""
    table = rows(run, "evaluations")
    steps = {f"policies/step-{step:09d}.pt": step for step in {int(row["step"]) for row in table}}
    steps |= {name: load(run / name)["step"] for name in ("best.pt", "checkpoint.pt")}
    for name, step in steps.items():
        chosen = [row for row in table if int(row["step"]) == step]
        again = returns_again(module, run, name, [int(row["seed"]) for row in chosen])
        assert chosen and again == [row["return"] for row in chosen], name
    return steps


def test_a_loaded_policy_has_exactly_the_returns_of_its_evaluation(tmp_path):
    """Of every script in short episodes: those of a lone copy, below. Here in long ones, and by the copy in the run."""
    script = Script("ppo_continuous", tmp_path)
    run = script.train(env_id="HalfCheetah-v4", num_evals=3)
    table, steps = rows(run, "evaluations"), evaluated_again(script.module, run)
    assert len(steps) == 5 and len({row["return"] for row in table}) > 2

    code = f"import sys; sys.path.insert(0, {str(run)!r}); import {script.name} as module; from pathlib import Path\n"
    code += "from tests.test_promises import returns_again\n"
    code += f"print(module.__file__, *returns_again(module, Path({str(run)!r}), 'best.pt', [10_000, 10_001]))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    best = [row["return"] for row in table if int(row["step"]) == steps["best.pt"]]
    assert said.split() == [str(run / f"{script.name}.py"), *best]


def test_a_policy_takes_an_observation_or_a_batch_and_nothing_else(script, finished):
    with contextlib.closing(script.module.make_eval_env(script.args())) as env:
        space, actions = env.observation_space, env.action_space
    space.seed(0)
    observations = np.array([space.sample() for _ in range(17)])
    policy = script.module.load_policy(finished / "best.pt")
    alone = [policy(observation) for observation in observations]
    assert all(action in actions for action in alone)
    for size in (1, 2, 3, 4, 5, 8, 16, 17):
        assert np.array_equal(policy(observations[:size]), alone[:size])
        assert np.array_equal(policy(observations[-size:]), alone[-size:])
    for wrong in (0.0, observations[0].ravel()[:1], observations[None], observations[..., None], observations[..., :1]):
        with pytest.raises(ValueError, match="must be"):
            policy(wrong)


# ppo_atari_cnn acts by its network itself.
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "ppo_atari_cnn"], indirect=True)
def test_a_policy_stays_what_it_was_when_the_network_learns_on(script, finished):
    args = script.module.Args(**load(finished / "checkpoint.pt")["args"])
    policy = script.module.load_policy(finished / "checkpoint.pt")
    with contextlib.closing(script.module.make_eval_env(args)) as env:
        observations = np.array([env.reset(seed=seed)[0] for seed in range(100)])
    before = policy(observations)
    torch.manual_seed(0)
    for parameter in policy.agent.parameters():
        parameter += torch.randn_like(parameter)
    assert np.array_equal(policy(observations), before)
    assert not np.array_equal(script.module.Policy(args, policy.agent)(observations), before)


def test_a_sample_varies_and_the_policy_does_not(script, finished):
    with contextlib.closing(script.module.make_eval_env(script.args())) as env:
        observation = env.reset(seed=0)[0]
    policy = script.module.load_policy(finished / "checkpoint.pt")
    assert np.array_equal(policy(observation), policy(observation))
    samples = np.array([policy(observation, sample=True) for _ in range(20)])
    assert len(np.unique(samples, axis=0)) > 1


@about("evaluate")
@pytest.mark.parametrize(
    ("means", "best"), [([1, 5, 2, 3], 1), ([1, np.nan, 5, np.nan], 2), ([np.nan, 5, 2, 3], 1), ([3, 3, 2, 1], 0)]
)
def test_the_best_policy_is_that_of_the_best_evaluation(script, monkeypatch, means, best):
    returns = iter(means)
    monkeypatch.setattr(script.module, "play", lambda policy, env, seed: (float(next(returns)), 1))
    run = script.train(num_evals=4, eval_episodes=1)
    policies = [load(path) for path in sorted((run / "policies").iterdir())]
    kept = load(run / "best.pt")
    assert [dict(flat(kept)) == dict(flat(policy)) for policy in policies] == [n == best for n in range(4)]
    result = json.loads((run / "result.json").read_text())
    assert result["best"]["mean"] == means[best] and result["best"]["step"] == kept["step"]


@about("evaluate")
def test_a_policy_that_was_never_a_number_is_no_best_one(script, monkeypatch):
    monkeypatch.setattr(script.module, "play", lambda policy, env, seed: (float("nan"), 1))
    run = script.train()
    assert (run / "result.json").exists() and not (run / "best.pt").exists()


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_what_a_run_leaves(script, original):
    run, args = original, script.args()
    env_id = args.env_id.replace("/", "-").replace(":", "-")
    assert run.name.startswith(f"{env_id}__{script.name}__1__")
    assert {path.name for path in run.parent.iterdir()} == {run.name}
    assert (run / script.path.name).read_bytes() == script.path.read_bytes()
    assert script.module.Args(**yaml.safe_load((run / "config.yaml").read_text())).env_id == args.env_id
    told = {"command", "git_commit", "git_dirty", "packages", "host", "device", "started"}
    assert told <= json.loads((run / "meta.json").read_text()).keys()

    episodes, evaluations, progress = (rows(run, table) for table in ("episodes", "evaluations", "progress"))
    assert list(episodes[0]) == ["step", "return", "length"]
    assert {row["length"] for row in episodes} == {str(script.row.length)}
    steps = args.num_envs * script.row.length  # until the first of each environment ends
    total = args.total_timesteps
    assert len(episodes) == total // steps * args.num_envs and episodes[0]["step"] == str(steps)
    assert list(evaluations[0]) == ["step", "episode", "seed", "return", "length"]
    assert [(row["step"], row["episode"], row["seed"]) for row in evaluations] == [
        (step, episode, seed)
        for step in (str(total // 2), str(total))
        for episode, seed in (("0", "10000"), ("1", "10001"))
    ]
    assert progress[-1]["step"] == str(total) and len(progress) > 2
    assert {"wall_time", "sps", "seconds_stepping", "seconds_acting", "seconds_updating"} <= set(
        (run / "progress.csv").read_text().split("\n")[0].split(",")
    )
    result = json.loads((run / "result.json").read_text())
    last = [float(row["return"]) for row in evaluations[2:]]
    assert result["steps"] == total and result["evaluation"] == {
        "step": total,
        "mean": np.mean(last),
        "std": np.std(last),
    }
    assert result["training_return"] == pytest.approx(np.mean([float(row["return"]) for row in episodes[-100:]]))
    kept = [f"step-{step:09d}.pt" for step in (total // 2, total)]
    assert sorted(path.name for path in (run / "policies").iterdir()) == kept
    assert str(run) in (run / "run.log").read_text() and list(run.glob("events.out.tfevents*"))
    assert {"checkpoint.pt", "checkpoint.previous.pt", "best.pt"} <= {path.name for path in run.iterdir()}
    assert not list(run.rglob("*.unfinished")) and not list(run.rglob("*.next*"))


def numbers(run: Path, table: str) -> list[dict[str, float]]:
    with (run / f"{table}.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@those_with(lambda row: row.small["env_id"].startswith("tests."))  # cut games of Atari earn nothing
def test_what_a_run_says_of_times_and_of_its_last_hundred_episodes(script, monkeypatch):
    step, threads = script.module.Environments.step, []
    monkeypatch.setattr(script.module.Environments, "step", lambda *given: (time.sleep(0.001), step(*given))[1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    started = time.perf_counter()
    run = script.train(num_evals=0, total_timesteps=3 * script.row.small["total_timesteps"] // 2, threads=3)
    spent, result = time.perf_counter() - started, json.loads((run / "result.json").read_text())
    progress, episodes = numbers(run, "progress"), numbers(run, "episodes")

    parts = {name: seconds for name, seconds in result.items() if name.startswith("seconds_")}
    assert sum(parts.values()) == pytest.approx(result["wall_time"]) and result["wall_time"] < spent
    assert result["sps"] == pytest.approx(result["steps"] / result["wall_time"])
    assert parts["seconds_stepping"] > 0.001 * result["steps"] / script.args().num_envs
    for name in ("seconds_stepping", "seconds_acting", "seconds_updating"):
        assert 0 < sum(row[name] for row in progress) == pytest.approx(parts[name], abs=0.01)
    times = [row["wall_time"] for row in episodes]
    assert 0 < times[0] < times[-1] < result["wall_time"] and times == sorted(times)
    assert {*threads} == {3}

    returns = [row["return"] for row in episodes]
    assert result["training_return"] == pytest.approx(np.mean(returns[-100:])) != pytest.approx(np.mean(returns))


def test_all_that_is_random_comes_from_the_seed(script):
    """What a run begins with: the networks, torch's random numbers, and the environments'."""
    states = []
    for seed in (1, 2):
        runs = script.runs / str(seed)
        with pytest.raises(SystemExit, match="130"):
            script.train(seed=seed, runs_dir=str(runs), interrupts=[signal.SIGINT])
        states.append(load(only(runs) / "checkpoint.pt"))
    first, second = states
    names = [name for name in first["agent"] if "weight" in name]
    assert names and not any(torch.equal(first["agent"][name], second["agent"][name]) for name in names)
    assert not torch.equal(first["random"], second["random"])
    assert first["environments"]["random"] != second["environments"]["random"]


def test_the_times_of_all_rows_add_up_after_a_resume_too(script, finished):
    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    script.train("--resume", str(finished))
    progress = numbers(finished, "progress")
    spent = [sum(seconds for name, seconds in row.items() if name.startswith("seconds_")) for row in progress]
    np.testing.assert_allclose([row["wall_time"] for row in progress], np.cumsum(spent), rtol=0.2)
    steps = np.diff([row["step"] for row in progress], prepend=0)
    working = [row["seconds_stepping"] + row["seconds_acting"] + row["seconds_updating"] for row in progress]
    np.testing.assert_allclose([row["sps"] for row in progress], steps / working, rtol=0.02)


def test_checkpoints_come_with_the_first_row_after_every_so_many_steps_and_at_the_end(script, monkeypatch):
    saved, save = [], script.module.Run.save
    monkeypatch.setattr(script.module.Run, "save", lambda run, step: (saved.append(step), save(run, step))[1])
    run = script.train(num_evals=0, checkpoint_every=250)
    steps = [int(row["step"]) for row in rows(run, "progress")]
    every = script.args().num_envs if script.name in REPLAYING else steps[0]
    assert saved == sorted({-(-n // every) * every for n in range(250, steps[-1] + 1, 250)} | {steps[-1]})


def test_a_run_ends_with_its_last_whole_rollout_and_an_evaluation(script):
    total = script.row.small["total_timesteps"] + 3 * script.args().num_envs - 1
    run = script.train(total_timesteps=total, num_evals=3, eval_episodes=1)
    last = int(rows(run, "progress")[-1]["step"])
    assert json.loads((run / "result.json").read_text())["steps"] == last
    assert (last > total) == (script.name == "grpo")  # whose last iteration reaches the total
    steps = [int(row["step"]) for row in rows(run, "evaluations")]
    assert len(steps) == 3 and steps[-1] == last


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("ppo")], indirect=True)
def test_rows_tell_rates_and_all_updates_and_the_normaliser_has_seen_every_step(script, original):
    args, agent = script.args(), load(original / "checkpoint.pt")["agent"]
    B, total = args.num_envs * args.num_steps, args.total_timesteps
    for number, row in enumerate(numbers(original, "progress")):
        assert row["learning_rate"] == pytest.approx(args.learning_rate * (1 - number * B / total))
        assert row["updates"] == (number + 1) * args.update_epochs * args.num_minibatches
    assert agent.get("moments.count", total) == total  # ppo_atari_cnn has none


@about("Run.begin", "Run.write", "evaluate")
def test_tensorboard_has_what_the_files_have(script, finished):
    """By CleanRL's names, and after a resume nothing twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (finished / "checkpoint.previous.pt").replace(finished / "checkpoint.pt")
    script.train("--resume", str(finished))
    board, progress = EventAccumulator(str(finished)).Reload(), numbers(finished, "progress")
    for name in progress[0].keys() - {"step", "wall_time"}:
        kind = "losses" if name in {*script.module.MEASURES, "explained_variance"} else "charts"
        events = board.Scalars(f"{kind}/{name.replace('sps', 'SPS')}")
        assert [event.step for event in events] == [row["step"] for row in progress]
        np.testing.assert_allclose([event.value for event in events], [row[name] for row in progress], rtol=1e-5)
    assert len(board.Scalars("charts/episodic_return")) == len(rows(finished, "episodes"))
    steps = sorted({row["step"] for row in numbers(finished, "evaluations")})
    assert [event.step for event in board.Scalars("charts/evaluation_return")] == steps


@about("create_run")
def test_a_run_knows_its_commit_wherever_it_is_begun_and_others_may_read_it(script, tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout  # noqa: E731
    monkeypatch.chdir(tmp_path)
    run = script.module.create_run(script.args(), {"learner": [torch.zeros(1)], "learners": [torch.zeros(1)]})
    meta = json.loads((run / "meta.json").read_text())
    assert meta["git_commit"] == (git("rev-parse", "HEAD").strip() or None)
    assert meta["git_dirty"] == bool(git("status", "--short"))
    assert run.stat().st_mode & 0o777 == 0o755


@about("Run.begin")
def test_weights_and_biases_goes_on_with_the_run_that_is_resumed(script, monkeypatch):
    begun, trackers = [], []

    def init(**names: object) -> mock.Mock:
        begun.append(names)
        trackers.append(mock.Mock())
        return trackers[-1]

    wandb = types.SimpleNamespace(login=lambda prompt: not trackers[1:], init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(script.module, "find_spec", lambda name: name == "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = script.train(track=True, wandb_entity="us", num_evals=0)
    script.train("--resume", str(run))
    first, second = begun
    assert first["id"] == second["id"] and first["id"].startswith(run.name) and first["resume"] == "allow"
    assert first["sync_tensorboard"] and (first["project"], first["entity"]) == ("solorl", "us")
    assert all(tracker.finish.called for tracker in trackers)
    with pytest.raises(SystemExit, match="2"):  # where W&B knows no key
        script.train(track=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    script.module.prepare(script.args(track=True))[1].close()


def test_a_lone_copy_trains_evaluates_and_resumes_and_says_nothing_on_stderr(script, tmp_path):
    """And what it has learnt plays here, in another process, exactly as it did there."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(script.path, alone)

    def call(*words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, script.path.name, *words]
        result = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert not set(result.stdout) & {"\r", "\033"} and "evaluation" in result.stdout
        return result.stdout

    call(*script.words(env_id=script.row.played, runs_dir="runs"))
    run = only(alone / "runs")
    table, meta = rows(run, "evaluations"), json.loads((run / "meta.json").read_text())
    assert len(table) == 4 and len({row["return"] for row in table}) > 1 and meta["git_commit"] is None
    if script.name in forms_of("Run.begin", "Run.load", "create_run", "parse"):
        (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
        (run / "result.json").unlink()
        call("--resume", str(run.relative_to(alone)))
        assert rows(run, "evaluations") == table and (run / "result.json").exists()
    assert len(evaluated_again(script.module, run)) == 4


# --------------------------------------------------------------------------------------------- arguments, refusals


@about("parse")
def test_a_runs_config_starts_it_again_and_the_command_line_wins(script, finished):
    config = ["--config", str(finished / "config.yaml"), "--runs-dir", str(script.runs)]
    assert same(finished, script.train(*config))
    run = script.train(*config, "--num-evals", "0", "--learning-rate", "0.01")
    old, new = (yaml.safe_load((path / "config.yaml").read_text()) for path in (finished, run))
    assert {name for name in old if old[name] != new[name]} <= {"runs_dir", "config", "num_evals", "learning_rate"}
    assert (new["num_evals"], new["learning_rate"]) == (0, 0.01) and not same(finished, run)


@about("parse", "check")
def test_files_of_arguments(script, tmp_path):
    settings = {"learning-rate": 1e-3, "num_envs": 8, "compile": False, "env_kwargs": {"a": 1}, "total_timesteps": 2e6}
    lists = [name for name, value in vars(script.module.Args()).items() if isinstance(value, tuple)]
    settings |= {name: [32, 16] for name in lists}
    for text in (yaml.safe_dump(settings), json.dumps(settings)):
        (tmp_path / "file").write_text(text)
        args = script.module.parse(["--config", str(tmp_path / "file"), "--num-envs", "2"])
        assert (args.learning_rate, args.num_envs, args.compile, args.total_timesteps) == (1e-3, 2, False, 2_000_000)
        assert json.loads(args.env_kwargs) == {"a": 1} and all(getattr(args, name) == (32, 16) for name in lists)


def test_settings_never_change(script):
    """What is compiled has them built in, and a checkpoint is compared with them."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        script.module.Args().learning_rate = 1.0


def test_every_number_among_the_arguments_has_a_range(script):
    for field in dataclasses.fields(script.module.Args):
        kinds = {*typing.get_args(field.type), field.type}
        if not isinstance(field.default, bool) and kinds & {int, float, tuple[int, ...]}:
            for value in (math.nan, (math.nan,))[isinstance(field.default, tuple) :]:
                with pytest.raises(ValueError, match=field.name.replace("_", "-")):
                    script.module.Args(**{field.name: value})


MISTAKEN = [(name, mistake) for name, row in SCRIPTS.items() for mistake in MISTAKES | row.mistakes]


@pytest.mark.parametrize(("script", "mistake"), MISTAKEN, indirect=["script"])
def test_a_mistake_is_named_and_nothing_is_written(script, mistake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script.module, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert (MISTAKES | script.row.mistakes)[mistake] in script.refuse(capsys, *mistake.split())
    left = multiprocessing.active_children()
    for worker in left:
        worker.kill()
    assert not left and not list(tmp_path.iterdir())


@about("parse", "check")
def test_mistakes_in_a_file_of_arguments(script, tmp_path, capsys):
    path = tmp_path / "file.yaml"
    for text, told in {
        "learning_rat: 1": "--learning-rat",
        "learning_rate: quick": "--learning-rate",
        "[1]": "is not a file of arguments",
        "env_id: --seed": "Missing value for argument '--env-id'",
        "env_id: ''": "--env-id: is empty",
    }.items():
        path.write_text(text)
        assert told in script.refuse(capsys, "--config", str(path), "--runs-dir", str(script.runs))
    assert not script.runs.exists()
