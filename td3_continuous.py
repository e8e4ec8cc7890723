# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "threadpoolctl", "tyro", "pyyaml",
#     "tensorboard", "moviepy"
# ]
# ///
"""Twin Delayed Deep Deterministic policy gradient (TD3), for continuous actions.

    python td3_continuous.py --env-id HalfCheetah-v4
    python td3_continuous.py --resume runs/HalfCheetah-v4__td3_continuous__1__20260101-120000

Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477.

The algorithm ends with `train`; the rest saves, evaluates and checks arguments, and is much the same in every script.

What may surprise:
- Only termination stops bootstrapping; an episode cut by a time limit bootstraps from its true last observation.
- Actions are scaled to [-1, 1], so that noise means the same whatever the environment's units.
- The replay buffer holds each observation once (1M steps of HalfCheetah take 105 MB), and is part of the checkpoint.
- The two critics are one batched computation; all of an update (critics, and when due actor and targets) is one graph.
- The parameters of actor and critics are each views of one vector, `theta`: Adam is a few operations.
"""

import copy
import csv
import fcntl
import gc
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import current_process
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from gymnasium.wrappers import FlattenObservation, RecordVideo
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published


@dataclass(frozen=True)
class Args:
    env_id: str = "HalfCheetah-v4"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
    env_kwargs: str = "{}"  # arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'
    eval_env_kwargs: str = "{}"  # arguments that evaluation changes or adds, as JSON
    num_envs: int = 1  # environments stepped together
    vec: Literal["sync", "async", "envpool"] = "sync"  # how they are stepped: in turn, in a process each, or by EnvPool
    total_timesteps: int | float = 1_000_000  # steps over all environments; rounded down to a multiple of `num_envs`
    seed: int = 1  # seed of everything random
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # where the networks and the replay buffer are
    threads: int = 2  # torch threads
    compile: bool = True  # compile the update (needs a C++ compiler)
    # of the update's products between hidden layers; auto: bf16 on GPUs and x86 processors that support it
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    learning_rate: float = 1e-3  # Adam's step size at the start (the paper's)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # how the rate falls; linear and cosine end at 0
    lr_warmup: float = 0.0  # share of the run over which the learning rate first rises from 0
    buffer_size: int = 1_000_000  # observations in the replay buffer; the last one of an episode counts too
    learning_starts: int = 10_000  # steps with random actions before the first update
    updates_per_step: float = 1.0  # updates per step, however many environments there are
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the way to the learning networks that the targets move at a time
    policy_frequency: int = 2  # critic updates per update of the actor and move of the targets
    exploration_noise: float = 0.1  # standard deviation of the noise on actions, which are in [-1, 1]
    policy_noise: float = 0.2  # standard deviation of the noise added to the target's actions
    noise_clip: float = 0.5  # bound of the noise added to the target's actions
    norm_obs: bool = False  # normalise observations by their running mean and standard deviation
    actor_sizes: tuple[int, ...] = (256, 256)  # hidden layers of the policy
    critic_sizes: tuple[int, ...] = (256, 256)  # hidden layers of each critic

    num_evals: int = 10  # evaluations during the run, evenly spaced, the last at its end; 0 for none
    eval_episodes: int = 10  # episodes per evaluation: deterministic, with the same seeds each time
    checkpoint_every: int | float = 100_000  # steps between checkpoints
    checkpoint_buffer: bool = True  # keep the buffer in the checkpoint; without it, a resumed run first fills a new one
    runs_dir: str = "runs"  # where run directories are made
    resume: str | None = None  # continue the run in this directory; imports the module of its `env_id`
    config: str | None = None  # YAML or JSON file of arguments; the command line wins
    capture_video: bool = False  # film the best episode of every evaluation
    track: bool = False  # send everything to Weights & Biases
    wandb_project_name: str = "solorl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team

    def __post_init__(self):
        check(self)


# ---------------------------------------------------------------------------------------------------- environments


def make_env(env_id: str, env_kwargs: dict, render_mode: str | None = None) -> gym.Env:
    if env_id.startswith("ALE/"):
        raise ValueError("this is an Atari game; ppo_atari_cnn.py plays it")
    drawn = {"render_mode": render_mode} if render_mode else {}  # not every environment takes a render_mode
    env = gym.make(env_id, disable_env_checker=True, **drawn, **env_kwargs)
    with suppress(AttributeError, KeyError):  # films follow the agent where MuJoCo's model has a camera that does
        env.unwrapped.mujoco_renderer.camera_id = env.unwrapped.model.camera("track").id
    return env if isinstance(env.observation_space, gym.spaces.Box) else FlattenObservation(env)


def make_eval_env(args: Args, render_mode: str | None = None) -> gym.Env:
    return make_env(args.env_id, json.loads(args.env_kwargs) | json.loads(args.eval_env_kwargs), render_mode)


class TrainEnv(gym.Wrapper):
    """Remembers its episode: the seed and the actions since, which are all it takes to play it again."""

    def __init__(self, args: Args):
        if args.vec == "async" and current_process().daemon:  # a worker, which ends when the trainer says so
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            torch.set_flush_denormal(True)  # as in the trainer
        self.make = partial(make_env, args.env_id, json.loads(args.env_kwargs))
        super().__init__(self.make())

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if type(getattr(self.unwrapped, "world", None)).__module__.startswith("Box2D"):  # it keeps traces of its past
            self.env.close()
            self.env = self.make()
        observation, _ = self.env.reset(seed=seed)
        self.episode = [seed]
        return observation, {}

    def step(self, action: np.ndarray) -> tuple:
        self.episode.append(np.array(action))
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation, float(reward), bool(terminated), bool(truncated), {}  # infos would cost a tenth of the time

    def replay(self) -> tuple[np.ndarray, float]:
        """Plays the episode again; its last observation and its return so far."""
        seed, *actions = self.episode
        (observation, _), total = self.reset(seed=seed), 0.0
        for action in actions:
            observation, reward, terminated, truncated, _ = self.step(action)
            total += float(reward)
            if terminated or truncated:
                return observation, math.nan  # equals no return: not restored
        return np.asarray(observation, self.observation_space.dtype), total  # the vector environment's type


class Environments:
    """N environments stepped together, each episode from a seed drawn here."""

    running = ("observations", "returns", "lengths", "discounted")  # of the running episodes

    def __init__(self, args: Args):
        self.args, self.random, N = args, np.random.default_rng(args.seed), args.num_envs
        self.envs = self._make(args)
        self.returns, self.lengths, self.discounted = np.zeros(N), np.zeros(N, int), np.zeros(N)
        self.observations = self._reset(np.ones(N, bool))

    def _make(self, args: Args) -> gym.vector.VectorEnv:
        vector = gym.vector.AsyncVectorEnv if args.vec == "async" else gym.vector.SyncVectorEnv
        return vector(
            [partial(TrainEnv, args)] * args.num_envs, copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED
        )

    def _reset(self, which: np.ndarray) -> np.ndarray:
        """Begins an episode where `which` is true; returns the observations of all."""
        seeds = np.zeros(len(which), int)
        seeds[which] = self.random.integers(2**31, size=which.sum())
        return self.envs.reset(seed=seeds.tolist(), options={"reset_mask": which})[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[tuple]]:
        """The true next observations, rewards, terminated, truncated; returns and lengths of the episodes that ended.

        Where one ended, the next begins: `self.observations` is what to act on.
        """
        observations, rewards, terminated, truncated, _ = self.envs.step(actions)
        self.observations, finished, ended = observations, [], terminated | truncated
        self.returns += rewards
        self.lengths += 1
        if ended.any():
            observations = observations.copy()
            finished = list(zip(self.returns[ended].tolist(), self.lengths[ended].tolist(), strict=True))
            self.observations = self._reset(ended)
            self.returns[ended], self.lengths[ended] = 0, 0
        return observations, rewards, terminated, truncated, finished

    def state(self) -> dict:
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in self.running}
        episodes = [(seed, torch.from_numpy(np.array(actions))) for seed, *actions in self.envs.get_attr("episode")]
        return state | {"episodes": episodes, "random": self.random.bit_generator.state}

    def restore(self, state: dict) -> bool:
        """Plays the running episodes again; returns whether that led to the same observations and returns."""
        self.random.bit_generator.state = state["random"]
        self.envs.set_attr("episode", [[seed, *actions.numpy()] for seed, actions in state["episodes"]])
        observations, returns = zip(*self.envs.call("replay"), strict=True)
        if np.array_equal(observations, state["observations"]) and np.array_equal(returns, state["returns"]):
            for name in self.running:
                setattr(self, name, state[name].numpy())
            return True
        self.observations = self._reset(np.ones(len(self.returns), bool))
        return False

    def close(self) -> None:
        workers = getattr(self.envs, "processes", [])  # of --vec async; one that hangs would never answer
        time.sleep(0.3 if workers else 0)  # a process that died is not gone at once
        for n, worker in enumerate(workers):
            if worker.exitcode is not None:
                print(f"{SCRIPT}.py: the process of environment {n} ended by itself", file=sys.stderr)
            worker.kill()
            self.envs.closed = True
        self.envs.close()


class RunningMoments(nn.Module):
    """Mean and variance of all that was seen, in float64 (Chan et al.). Unless enabled, batches stay as they are."""

    def __init__(self, shape: tuple[int, ...], enabled: bool):
        super().__init__()
        self.enabled = enabled
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def update(self, batch: np.ndarray) -> None:
        seen, count = self.count.item(), len(batch)
        mean, var = (torch.as_tensor(moment(batch, 0, dtype=np.float64)) for moment in (np.mean, np.var))
        total, delta = seen + count, mean - self.mean
        squares = self.var * seen + var * count + delta**2 * seen * count / total
        self.var.copy_(squares / total)
        self.mean.add_(delta * count / total)
        self.count.fill_(total)

    def deviation(self) -> np.ndarray:
        mean, var = self.mean.numpy(), self.var.numpy()
        var = np.where(var > 1e-12 * mean**2, var, mean**2)  # what never varies must not be divided by almost 0
        return np.sqrt(var + 1e-8) if self.enabled else np.ones(var.shape)

    def scale(self, batch: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(batch / self.deviation(), -10), 10) if self.enabled else batch

    def normaliser(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function that normalises batches, by the moments as they are now."""
        if not self.enabled:
            return lambda batch: np.asarray(batch, np.float32)
        mean, deviation = self.mean.numpy().copy(), self.deviation()
        return lambda batch: np.minimum(np.maximum((batch - mean) / deviation, -10), 10).astype(np.float32)


# --------------------------------------------------------------------------------------------------- replay buffer


class Rings(NamedTuple):
    """What was seen, each observation once, and what was done between one observation and the next."""

    observations: Tensor  # (size, D)
    actions: Tensor  # (size, A), in [-1, 1]
    rewards: Tensor  # (size,)
    terminated: Tensor  # (size,)
    between: Tensor  # (size, 2), the numbers of the observations before and after

    @staticmethod
    def of(size: int, observations: np.ndarray, actions: gym.spaces.Box, device: torch.device | str) -> "Rings":
        zeros = partial(torch.zeros, device=device)
        observed = zeros(size, observations[0].size, dtype=torch.uint8 if observations.dtype == np.uint8 else None)
        columns = zeros(size, math.prod(actions.shape)), zeros(size), zeros(size, dtype=torch.bool)
        return Rings(observed, *columns, zeros(size, 2, dtype=torch.int32))


class Transitions(NamedTuple):
    observations: Tensor  # (B, D)
    actions: Tensor  # (B, A)
    rewards: Tensor  # (B,)
    terminated: Tensor  # (B,)
    next_observations: Tensor  # (B, D), the true ones


class ReplayBuffer:
    """Observations are numbered as they come, and a transition knows the numbers of the two it lies between.

    It is forgotten when the first of them is overwritten. What an ended episode saw last is a row like any other.
    """

    def __init__(self, rings: Rings, num_envs: int):
        self.rings, self.size, self.num_envs = rings, len(rings.rewards), num_envs
        # Numpy writes a few rows in a fraction of torch's time; to a GPU only torch does.
        self.writable = Rings(*(ring.numpy() if ring.is_cpu else ring for ring in rings))
        self.before = rings.between[:, 0].cpu().numpy()  # the same memory, or a copy that need not wait for a GPU
        self.seen, self.first, self.end = 0, 0, 0  # observations so far; transitions from `first` up to `end` are held

    def __len__(self) -> int:
        return self.end - self.first

    def begin(self, observations: np.ndarray) -> None:
        """Adds what the environments see now (N, ...), without a transition that led there."""
        self._put(self.writable.observations, self.seen, observations.reshape(len(observations), -1))
        self.seen += len(observations)
        while self.first < self.end and self.before[self.first % self.size] < self.seen - self.size:
            self.first += 1

    def add(
        self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, ended: np.ndarray, latest: np.ndarray
    ) -> None:
        """Adds a step of every environment, in which K episodes `ended`.

        What those saw last, and what all see now, is `latest` (K + N, ...).
        """
        N, K = self.num_envs, len(latest) - self.num_envs
        before = np.arange(self.seen - N, self.seen)
        after = before + N + K
        after[ended] = self.seen + np.arange(K)
        columns = actions, rewards, terminated, np.array((before, after)).T, before
        for rows, content in zip((*self.writable[1:], self.before), columns, strict=True):
            self._put(rows, self.end, content)
        self.end += N
        self.begin(latest)

    def draw(self, count: int) -> Tensor:
        """Slots of transitions, uniformly and with replacement."""
        return torch.randint(self.first, self.end, (count,), device=self.rings.rewards.device) % self.size

    def state(self) -> dict:
        used = zip(self.rings, (self.seen, *[self.end] * 4), strict=True)
        whole = self.end >= self.size  # a part is copied, as torch saves a view with its whole ring
        kept = [ring if whole else ring[:number].to("cpu", copy=True) for ring, number in used]
        return {"rings": kept, "seen": self.seen, "first": self.first, "end": self.end}

    def restore(self, state: dict) -> None:
        for ring, kept in zip(self.rings, state["rings"], strict=True):
            ring[: len(kept)] = kept
        self.before[:] = self.rings.between[:, 0].cpu()
        self.seen, self.first, self.end = state["seen"], state["first"], state["end"]

    def _put(self, rows: np.ndarray | Tensor, number: int, content: np.ndarray) -> None:
        """Writes rows from this number on; after its last row a ring continues in its first."""
        start = number % self.size
        before_end = self.size - start
        content = content if isinstance(rows, np.ndarray) else torch.as_tensor(content)
        rows[start : start + len(content)] = content[:before_end]
        if len(content) > before_end:
            rows[: len(content) - before_end] = content[before_end:]


def gather(args: Args, rings: Rings, scale: Tensor, slots: Tensor) -> Transitions:
    """The transitions in `slots`; the rows of `scale` are the mean and standard deviation of observations."""
    rows = rings.between[slots].T.flatten() % len(rings.rewards)  # (2 B,)
    observations = rings.observations.index_select(0, rows).float()  # a quarter of the time of [rows]
    if args.norm_obs:
        observations = ((observations - scale[0]) / scale[1]).clamp(-10, 10)
    columns = (ring.index_select(0, slots) for ring in rings[1:4])
    return Transitions(observations[: len(slots)], *columns, observations[len(slots) :])


# ------------------------------------------------------------------------------------------------------- algorithm


class Networks(nn.Module):
    """Fully connected ReLU networks, `count` of them side by side: each layer is one batched product."""

    def __init__(self, count: int, sizes: tuple[int, ...]):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            bound = inputs**-0.5  # as in torch's linear layers
            self.weights.append(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, inputs) to (count, B, outputs); what lies between the first and the last layer is computed in `dtype`."""
        x = inputs.expand(len(self.weights[0]), *inputs.shape)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for n, (hidden_weight, hidden_bias) in enumerate(hidden):
            kind = dtype if n else torch.float32  # observations need all of their digits
            x = (torch.bmm(x.to(kind), hidden_weight.to(kind)) + hidden_bias.to(kind)).relu()
        if weight.shape[-1] == 1:  # for a single column, a sum is faster than a matrix product
            return (x.float() * weight.mT).sum(-1, keepdim=True) + bias
        return torch.bmm(x.float(), weight) + bias


def in_numpy(networks: Networks) -> Callable[[np.ndarray], np.ndarray]:
    """The first of the networks, on the CPU, in numpy: several times as fast for a few observations.

    It reads the parameters where they are, and so learns with them.
    """
    *hidden, (last_weight, last_bias) = (
        (weight[0].numpy(), bias[0, 0].numpy()) for weight, bias in zip(networks.weights, networks.biases, strict=True)
    )

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in hidden:
            x = np.maximum(x @ weight + bias, 0)
        return x @ last_weight + last_bias

    inputs = torch.linspace(-1, 1, networks.weights[0].shape[1])[None]
    same = np.allclose(forward(inputs.numpy()), networks(inputs)[0], atol=1e-3, rtol=1e-3, equal_nan=True)
    assert same, "in_numpy must compute what Networks.forward does"
    return forward


class Agent(nn.Module):
    """A deterministic policy, two critics, and the normaliser of observations."""

    def __init__(self, args: Args, observation_shape: tuple[int, ...], low: np.ndarray, high: np.ndarray):
        super().__init__()
        D, A = math.prod(observation_shape), low.size
        self.actor = Networks(1, (D, *args.actor_sizes, A))
        self.critics = Networks(2, (D + A, *args.critic_sizes, 1))
        self.moments = RunningMoments(observation_shape, args.norm_obs)
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))
        self.centre, self.half_range, self.bounds = low / 2 + high / 2, high / 2 - low / 2, (low, high)
        self.exploration_noise = args.exploration_noise

    def sample(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] from the actor's outputs and standard normal noise."""
        return (np.tanh(outputs) + self.exploration_noise * noise).clip(-1, 1)

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        """The policy's actions (N, A) in the environment's shape and bounds."""
        low, high = self.bounds
        actions = self.centre + self.half_range * actions.reshape(-1, *low.shape)
        return np.minimum(np.maximum(actions, low), high).astype(low.dtype, copy=False)


MEASURES = ["qf_loss", "qf1_values", "qf2_values", "actor_loss"]
SECONDS = ["stepping", "acting", "updating", "evaluating", "saving"]


def parameters_of(module: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """The module's parameters, by name, as views of one vector."""
    pieces = theta.split([parameter.numel() for parameter in module.parameters()])
    named = zip(module.named_parameters(), pieces, strict=True)
    return {name: piece.view(parameter.shape) for (name, parameter), piece in named}


class Learner(NamedTuple):
    """The parameters as one vector, of which the agent's are views, and the state of Adam.

    All of them learn, whatever their `requires_grad`: what must not is a buffer, or is detached in the loss.
    """

    theta: Tensor
    first_moment: Tensor
    second_moment: Tensor
    first_decay: Tensor  # β₁ᵗ after t steps
    second_decay: Tensor  # β₂ᵗ
    learning_rate: Tensor

    @staticmethod
    def of(agent: nn.Module, device: torch.device | str) -> "Learner":
        theta = nn.utils.parameters_to_vector(agent.parameters()).detach().to(device)
        for name, view in parameters_of(agent, theta).items():
            agent.get_parameter(name).data = view
        scalars = torch.tensor((1.0, 1.0, 0.0), device=device)
        return Learner(theta, torch.zeros_like(theta), torch.zeros_like(theta), *scalars)

    @torch.no_grad()
    def adam_step(self, gradient: Tensor, eps: float, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.first_decay.mul_(beta1)  # compiled code would compute a power again for every 16 parameters
        self.second_decay.mul_(beta2)
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.lerp_(gradient**2, 1 - beta2)
        mean = self.first_moment / (1 - self.first_decay)
        deviation = (self.second_moment / (1 - self.second_decay)).sqrt()
        self.theta.sub_(self.learning_rate * mean / (deviation + eps))


class Learners(NamedTuple):
    actor: Learner
    critics: Learner
    target_actor: Tensor  # the parameters of the targets
    target_critics: Tensor

    @staticmethod
    def of(agent: Agent, device: torch.device | str) -> "Learners":
        actor, critics = (Learner.of(part, device) for part in (agent.actor, agent.critics))
        return Learners(actor, critics, actor.theta.clone(), critics.theta.clone())

    def tensors(self) -> list[Tensor]:
        """All that is not the agent's."""
        return [*self.actor[1:], *self.critics[1:], self.target_actor, self.target_critics]


def update(
    agent: Agent,
    args: Args,
    learners: Learners,
    rings: Rings,
    scale: Tensor,
    slots: Tensor,
    noise: Tensor,
    improves: bool,
) -> Tensor:
    """The critics learn from the transitions in `slots`; if it `improves`, so does the actor, and the targets move.

    Returns what was measured.
    """
    actor, critics, target_actor, target_critics = learners
    batch = gather(args, rings, scale, slots)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]

    def act(theta: Tensor, observations: Tensor) -> Tensor:  # (B, A)
        outputs = functional_call(agent.actor, parameters_of(agent.actor, theta), (observations, dtype))
        return outputs.squeeze(0).tanh()

    def judge(theta: Tensor, observations: Tensor, actions: Tensor, count: int = 2) -> Tensor:  # (count, B)
        parameters = {name: both[:count] for name, both in parameters_of(agent.critics, theta).items()}
        inputs = torch.cat((observations, actions), -1), dtype
        return functional_call(agent.critics, parameters, inputs).squeeze(-1)

    # The critics' target: y = r + γ (1 − terminated) min_i Q'_i(s', clip(μ'(s') + clip(σ ε, −c, c), −1, 1)).
    smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
    next_actions = (act(target_actor, batch.next_observations) + smoothing).clamp(-1, 1)
    next_values = judge(target_critics, batch.next_observations, next_actions).amin(0)
    goals = batch.rewards + args.gamma * next_values.masked_fill(batch.terminated, 0)

    # The critics' loss: Σ_i mean (Q_i(s, a) − y)².
    def critics_loss(theta: Tensor) -> tuple[Tensor, tuple]:
        values = judge(theta, batch.observations, batch.actions)
        losses = ((values - goals) ** 2).mean(-1)
        return losses.sum(), (losses, values)

    gradient, (losses, values) = grad(critics_loss, has_aux=True)(critics.theta)
    critics.adam_step(gradient, eps=1e-8)

    # The actor's: −mean Q_1(s, μ(s)).
    def actor_loss(theta: Tensor) -> Tensor:
        return -judge(critics.theta, batch.observations, act(theta, batch.observations), count=1).mean()

    policy_loss = torch.full((), torch.nan, device=noise.device)
    if improves:
        gradient, policy_loss = grad_and_value(actor_loss)(actor.theta)
        actor.adam_step(gradient, eps=1e-8)
        target_actor.lerp_(actor.theta, args.tau)
        target_critics.lerp_(critics.theta, args.tau)
    return torch.stack((losses.mean(), *values.mean(-1), policy_loss))


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


def collect(
    args: Args, agent: Agent, act: Callable, buffer: ReplayBuffer, envs: Environments, step: int, watch: "Stopwatch"
) -> list[dict]:
    """A step of every environment from `step` on, into the buffer; the rows of episodes.csv."""
    N, A = args.num_envs, agent.low.numel()
    if step < args.learning_starts:
        actions = 2 * torch.rand((N, A)).numpy() - 1
    else:
        outputs = act(agent.moments.normaliser()(envs.observations).reshape(N, -1))
        actions = agent.sample(outputs, torch.randn((N, A)).numpy())
    environment_actions = agent.for_environment(actions)
    watch.lap("acting")
    if not np.isfinite(environment_actions).all():
        raise FloatingPointError(f"the policy's actions are not finite at step {step + N:,}")
    true_next, rewards, terminated, truncated, finished = envs.step(environment_actions)
    if not all(float(np.abs(x).max()) < 3e38 for x in (rewards, true_next, envs.observations)):  # as float32
        raise FloatingPointError(f"the environment's rewards or observations are not finite at step {step + N:,}")
    ended = terminated | truncated
    latest = np.concatenate((true_next[ended], envs.observations)) if finished else envs.observations
    buffer.add(actions, rewards, terminated, ended, latest)
    if args.norm_obs:
        agent.moments.update(latest)
    watch.lap("stepping")
    when = {"step": step + N, "wall_time": round(watch.elapsed(), 3)}
    return [when | {"return": total, "length": length} for total, length in finished]


def improve(
    args: Args,
    agent: Agent,
    learners: Learners,
    buffer: ReplayBuffer,
    step: int,
    progress: dict,
    optimise: Callable,
) -> list[Tensor]:
    """The updates that follow the N steps up to `step`; what each has measured."""
    N, B, A, device = args.num_envs, args.batch_size, agent.low.numel(), buffer.rings.rewards.device
    factor = lr_factor(args, step // N, args.total_timesteps // N)
    for learner in learners[:2]:
        learner.learning_rate.fill_(factor * args.learning_rate)
    if step <= progress["learn_from"]:
        return []
    scale, measured = torch.ones((2, agent.moments.mean.numel()), device=device), []
    if args.norm_obs:
        scale.copy_(torch.tensor(np.stack((agent.moments.mean.flatten(), agent.moments.deviation().ravel()))))
    for _ in range(int(step * args.updates_per_step) - int((step - N) * args.updates_per_step)):
        slots, noise = buffer.draw(B), torch.randn((B, A), device=device)
        progress["updates"] += 1
        measured.append(optimise(scale, slots, noise, progress["updates"] % args.policy_frequency == 0))
    return measured


class Stopwatch:
    """Books the time since the last lap under a name."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.last = seconds, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now

    def elapsed(self) -> float:
        return sum(self.seconds.values())


def train(args: Args, interrupts: Sequence[int] = ()) -> Path:
    """Trains; returns the run directory. Once `interrupts` holds a signal's number, stops where it can be resumed."""
    args, envs, actions = prepare(args)
    N = args.num_envs
    total, interval = args.total_timesteps // N * N, max(1, 1000 // N) * N
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Allowed to round, oneDNN is twice as fast in float32 as MKL on AMD's processors. Only AMX and ARM do round.
        exact = args.precision == "fp32" and not torch.cpu.get_capabilities().get("amx_bf16", True)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "none"
    torch.set_num_threads(args.threads)
    threadpool_limits(1, "blas")  # numpy's products are too small to share, and its threads wait without sleeping
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    agent = Agent(args, envs.observations.shape[1:], actions.low, actions.high).requires_grad_(False)
    learners = Learners.of(agent, device)
    buffer = ReplayBuffer(Rings.of(args.buffer_size, envs.observations, actions, device), N)
    progress = {"updates": 0, "recent": [], "evaluation": {}, "best": {}, "seconds": dict.fromkeys(SECONDS, 0.0)}
    progress["learn_from"] = args.learning_starts
    with closing(envs), Run(args, agent, learners, buffer, envs, progress) as run:
        run.begin()
        fast_update = compile_update(args, agent, learners, buffer, run) if args.compile else update
        optimise = partial(fast_update, agent, args, learners, buffer.rings)
        if device.type == "cuda":
            act, optimise = capture_networks(agent.actor, device), capture_updates(optimise, learners)
        else:
            act = in_numpy(agent.actor)
        watch, booked, measured, logged = Stopwatch(progress["seconds"]), dict(progress["seconds"]), [], run.saved

        for step in range(run.saved + N, total + 1, N):
            if interrupts:
                run.stop(interrupts[0], step - N)
            episodes = collect(args, agent, act, buffer, envs, step - N, watch)
            measured += improve(args, agent, learners, buffer, step, progress, optimise)
            watch.lap("updating")
            run.write("episodes", episodes)
            progress["recent"] = [*progress["recent"], *(episode["return"] for episode in episodes)][-100:]

            evaluates = step * args.num_evals // total > (step - N) * args.num_evals // total
            saves = step // args.checkpoint_every > (step - N) // args.checkpoint_every or step == total
            saves = saves or len(interrupts) > 0  # so that a row says what was measured until then
            if not (evaluates or saves or step % interval == 0):
                continue
            means = torch.stack(measured).nanmean(0).tolist() if measured else [math.nan] * len(MEASURES)
            measures, measured = dict(zip(MEASURES, means, strict=True)), []
            if math.inf in map(abs, means) or not all(learner.theta.isfinite().all() for learner in learners[:2]):
                raise FloatingPointError(f"not finite at step {step:,}: {measures}")
            watch.lap("updating")
            if evaluates:
                evaluate(args, run, agent, step, progress)
                watch.lap("evaluating")
            seconds = {name: spent - booked[name] for name, spent in watch.seconds.items()}
            pace = (step - logged) / sum(seconds[name] for name in ("stepping", "acting", "updating"))
            row = {"step": step, "wall_time": round(watch.elapsed(), 3), "sps": round(pace, 3)}
            row |= measures | {"learning_rate": learners.critics.learning_rate.item()}
            row |= {"updates": progress["updates"], "buffer": len(buffer)}
            row |= {f"seconds_{name}": round(spent, 4) for name, spent in seconds.items()}
            booked, logged = dict(watch.seconds), step
            run.write("progress", [row])
            watch.lap("saving")

            if saves:
                run.save(step)
                watch.lap("saving")
            learnt = "" if math.isnan(row["qf1_values"]) else f"Q {row['qf1_values']:.1f}"
            run.show(row, total, learnt)
        run.finish(total, watch.elapsed())
    return run.directory


# ------------------------------------------------------------------------------------------ evaluation, run directory


class Policy:
    """The policy to deploy, as it is now: it maps one observation to an action, a batch of them to a batch of actions.

    Every row is computed alone, so that an action does not depend on what else is in the batch, to the last bit.
    Deterministic, unless asked for a `sample` of the actions as in training.
    """

    def __init__(self, args: Args, agent: Agent):
        self.agent, self.shape = agent, tuple(agent.moments.mean.shape)
        self.discount, self.bootstraps = args.gamma, ("truncated",)
        self._act, self._normalise = in_numpy(copy.deepcopy(agent.actor).cpu()), agent.moments.normaliser()

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        if np.shape(observations) == self.shape:
            return self._choose(observations, sample)
        if np.shape(observations)[1:] != self.shape:
            raise ValueError(f"observations of shape {np.shape(observations)}: must be {self.shape}, or a batch")
        actions = [self._choose(observation, sample) for observation in observations]
        return np.array(actions).reshape(-1, *self.agent.low.shape)

    def _choose(self, observation: np.ndarray, sample: bool) -> np.ndarray:
        noise = torch.randn(self.agent.low.numel()).numpy() if sample else np.float32(0)
        action = self.agent.sample(self._act(self._normalise(observation).reshape(-1)), noise)
        return self.agent.for_environment(action)[0]

    def value(self, observations: np.ndarray) -> np.ndarray:
        """The lower of the critics' values of the policy's actions."""
        rows = self._normalise(observations).reshape(len(observations), -1)
        inputs = torch.tensor(rows, device=self.agent.actor.weights[0].device)
        actions = self.agent.actor(inputs).squeeze(0).tanh()
        return self.agent.critics(torch.cat((inputs, actions), -1)).amin(0).squeeze(-1).cpu().numpy()


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args, state = Args(**checkpoint["args"]), checkpoint["agent"]
    agent = Agent(args, state["moments.mean"].shape, state["low"].numpy(), state["high"].numpy())
    agent.load_state_dict(state)
    Learners.of(agent.requires_grad_(False), device)  # the weights lie in memory as in the run: products depend on it
    return Policy(args, agent)


def play(policy: Policy, env: gym.Env, seed: int) -> tuple[float, int]:
    """Return and length of an episode."""
    (observation, _), total, length, over = env.reset(seed=seed), 0.0, 0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total, length, over = total + float(reward), length + 1, terminated or truncated
    return total, length


def evaluate(args: Args, run: "Run", agent: Agent, step: int, progress: dict) -> None:
    """Plays the policy in fresh environments, and saves it: in `policies/`, and as `best.pt` if the best so far."""
    policy, rows = Policy(args, agent), []
    for episode, seed in enumerate(range(10_000, 10_000 + args.eval_episodes)):
        with closing(make_eval_env(args)) as env:
            total, length = play(policy, env, seed)
        rows.append({"step": step, "episode": episode, "seed": seed, "return": total, "length": length})
    run.write("evaluations", rows)
    returns = [row["return"] for row in rows]
    progress["evaluation"] = evaluation = {"step": step, "mean": np.mean(returns).item(), "std": np.std(returns).item()}
    run.tensorboard.add_scalar("charts/evaluation_return", evaluation["mean"], step)
    state = {"script": SCRIPT, "args": asdict(args), "step": step, "agent": agent.state_dict()}
    write_atomically(run.directory / "policies" / f"step-{step:09d}.pt", state)
    if evaluation["mean"] > progress["best"].get("mean", -math.inf):
        progress["best"] = evaluation
        write_atomically(run.directory / "best.pt", state)
    run.say(f"{step:>11,}  evaluation {evaluation['mean']:.1f} ± {evaluation['std']:.1f}")
    if args.capture_video:
        path = run.directory / "videos" / f"step-{step:09d}.mp4"
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            with closing(RecordVideo(make_eval_env(args, "rgb_array"), f"{folder}/new")) as env:
                play(policy, env, rows[np.argmax(returns)]["seed"])
            next(Path(folder).glob("new/*.mp4")).replace(path)
        if run.tracker:
            run.tracker.log({"videos": importlib.import_module("wandb").Video(str(path))})


def compile_update(args: Args, agent: Agent, learners: Learners, buffer: ReplayBuffer, run: "Run") -> Callable:
    device, D, A, B = buffer.rings.rewards.device, agent.moments.mean.numel(), agent.low.numel(), args.batch_size
    scale, noise = (torch.ones(size, device=device) for size in ((2, D), (B, A)))
    slots = torch.zeros(B, dtype=torch.int64, device=device)
    calls = [
        (copy.deepcopy(agent), args, copy.deepcopy(learners), buffer.rings, scale, slots, noise, improves)
        for improves in {True, args.policy_frequency == 1}
    ]
    return compile_by(calls, update, device, run)


def compile_by(calls: Sequence[tuple], function: Callable, device: torch.device, run: "Run") -> Callable:
    """The function, compiled by `calls` on copies of what it changes; the function itself where that fails."""
    started, random = time.perf_counter(), torch.get_rng_state()
    torch.compiler.reset()  # what another run compiled in this process would be taken for this one's

    # What a call compares: shapes and numbers. All else that the agent is made of would cost a fifth of its time.
    kept = {"TENSOR_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH"}
    config = {"guard_filter_fn": lambda guards: [g.guard_type in kept and "__" not in g.name for g in guards]}
    if device.type == "cpu":
        # Compiling is quicker without testing vector instructions, precompiling a header and writing debug lines.
        options = {"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}
        options |= {"aot_inductor.enable_line_tables": False, "cpp_wrapper": True}  # no kernel is called from Python
        config |= {name: options[name] for name in torch._inductor.list_options() if name in options}  # versions differ
    logging.getLogger("torch._inductor.scheduler").disabled = True  # where it fails it prints all that it has read
    run.say("compiling the update …")
    gc.disable()  # the compiler makes many objects, and keeps them
    try:
        fast = torch.compile(function, fullgraph=True, dynamic=False, options=config)
        for call in calls:
            fast(*call)
    except Exception as error:
        run.say(f"the update is not compiled, so the run is slower: {' '.join(str(error).split())[:100]}")
        return function
    finally:
        gc.enable()
        torch.set_rng_state(random)  # compiling draws nothing, even if a fork's function does
    run.say(f"compiled in {time.perf_counter() - started:.1f} s")
    return fast


class Captured:
    """A function as one CUDA graph: the same kernels in the same order, by one call instead of thousands.

    It changes `state` in place and nothing else; its inputs are copied to where the graph reads them.
    """

    def __init__(self, function: Callable[..., Tensor], state: Sequence[Tensor]):
        self.function, self.state, self.graph = function, state, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            self.capture([tensor.clone() for tensor in inputs])
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output.clone()

    def capture(self, inputs: list[Tensor]) -> None:
        self.inputs, before, stream = inputs, [tensor.clone() for tensor in self.state], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first call takes memory and chooses kernels, which a graph cannot
            self.function(*inputs)
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.output = self.function(*inputs)


def capture_networks(networks: Networks, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """The first of the networks as a CUDA graph, from array to array as `in_numpy`."""
    captured = Captured(networks, ())
    return lambda inputs: captured(torch.tensor(inputs, device=device))[0].cpu().numpy()


def capture_updates(optimise: Callable, learners: Learners) -> Callable:
    """A graph for each kind of update."""
    state, graphs = [*learners.actor, *learners.critics, learners.target_actor, learners.target_critics], {}

    def captured(scale: Tensor, slots: Tensor, noise: Tensor, improves: bool) -> Tensor:
        if improves not in graphs:
            graphs[improves] = Captured(lambda *inputs: optimise(*inputs, improves), state)
        return graphs[improves](scale, slots, noise)

    return captured


def write_atomically(path: Path, content: dict | str) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        try:
            torch.save(content, file) if isinstance(content, dict) else file.write(content.encode())
        except RuntimeError:  # as torch's writer calls a full disk
            raise OSError(f"{path} could not be written") from None
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_checkpoint(path: Path) -> dict:
    """The checkpoint, on the CPU; a ValueError says in one line what is wrong with a damaged or foreign file."""
    try:
        with zipfile.ZipFile(path) as records:
            if records.testzip():  # torch reads on over damaged numbers
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["args"]["env_id"], checkpoint["script"], checkpoint["agent"]
    except Exception as error:
        raise ValueError(f"{path.name} is missing, damaged or not a checkpoint ({type(error).__name__})") from None
    return checkpoint


def create_run(args: Args, state: dict) -> Path:
    """Makes a run directory under another name, then renames it: it is never half there, nor without a checkpoint."""
    runs, source = Path(args.runs_dir), Path(__file__).resolve()
    command = "git rev-parse HEAD && git status --short"
    git = subprocess.run(command, shell=True, cwd=source.parent, capture_output=True, text=True)
    commit, *changes = git.stdout.splitlines() or [None]
    packages = [name for name in ("torch", "gymnasium", "mujoco", "ale_py", "envpool", "numpy") if find_spec(name)]
    meta = {"script": SCRIPT, "command": shlex.join([sys.executable, *sys.argv]), "python": sys.version.split()[0]}
    meta |= {"git_commit": commit, "git_dirty": bool(changes), "packages": {name: version(name) for name in packages}}
    meta |= {"host": os.uname().nodename, "device": str(state["learner"][0].device)}
    meta |= {"started": datetime.now().astimezone().isoformat(timespec="seconds")}
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=runs, ignore_cleanup_errors=True) as folder:
            new = Path(folder)
            shutil.copy(source, new)
            (new / "config.yaml").write_text(yaml.safe_dump(asdict(args), sort_keys=False))
            (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            (new / "episodes.csv").write_text("step,wall_time,return,length\n")  # an episode may never end
            torch.save(state, new / "checkpoint.pt")
            new.chmod(0o755)
            name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}"
            while (directory := runs / f"{name}__{datetime.now():%Y%m%d-%H%M%S}").exists():
                time.sleep(0.1)
            return new.rename(directory)
    except (OSError, RuntimeError) as error:  # the latter of torch's writer
        refuse(f"--runs-dir {runs}: {error}; name a folder that can be written to")


class Run(ExitStack):
    """A run's directory, and all that goes there. One process at a time holds it."""

    def __init__(
        self, args: Args, agent: Agent, learners: Learners, buffer: ReplayBuffer, envs: Environments, progress: dict
    ):
        super().__init__()
        self.args, self.agent, self.learners, self.buffer = args, agent, learners, buffer
        self.envs, self.progress = envs, progress
        self.wait = max(args.learning_starts, args.batch_size)  # steps that fill a new buffer
        self.directory = Path(args.resume) if args.resume else create_run(args, self.state(0))
        words, called = ["--resume", str(self.directory)], Path(sys.argv[0]).name == Path(__file__).name
        self.resume_command = shlex.join(["python", sys.argv[0], *words]) if called else f"train(parse({words}))"
        self.live, self.said, self.tracker, self.saved = sys.stdout.isatty(), time.monotonic(), None, 0

    def state(self, step: int) -> dict:
        """All that training depends on from here."""
        state = {"script": SCRIPT, "args": asdict(self.args), "step": step, "agent": self.agent.state_dict()}
        state |= {"learner": self.learners.tensors(), "environments": self.envs.state(), "progress": self.progress}
        # Even with --no-checkpoint-buffer it is kept where too few steps are left to fill a new one.
        needed = self.args.checkpoint_buffer or self.args.num_envs <= self.args.total_timesteps - step <= self.wait
        state |= {"buffer": self.buffer.state() if needed else {}}
        device = self.buffer.rings.rewards.device
        random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return state | {"random": torch.get_rng_state(), "cuda_random": random}

    def begin(self) -> None:
        """Continues from the last good checkpoint; nothing is touched until that is known to be this run's."""
        try:
            self.log = self.enter_context((self.directory / "run.log").open("a"))
            fcntl.lockf(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            saved = self.load()
            self.agent.load_state_dict(saved["agent"])
        except BlockingIOError:
            refuse(f"--resume {self.directory}: another process is training this run")
        except (OSError, ValueError, RuntimeError) as error:  # the last where the networks differ
            refuse(f"--resume {self.directory}: {error}")
        for tensor, value in zip(self.learners.tensors(), saved["learner"], strict=True):
            tensor.copy_(value)
        self.progress |= saved["progress"]
        exact = not self.args.resume or self.envs.restore(saved["environments"])
        self.saved = saved["step"]
        if saved["buffer"]:
            self.buffer.restore(saved["buffer"])
        elif self.args.resume:
            self.progress["learn_from"] = self.saved + self.wait
        if not exact or not self.buffer.seen:
            self.buffer.begin(self.envs.observations)
        torch.set_rng_state(saved["random"])
        if self.buffer.rings.rewards.device.type == "cuda" and saved["cuda_random"] is not None:
            torch.cuda.set_rng_state(saved["cuda_random"], self.buffer.rings.rewards.device)

        self.cut_back()
        args, name = self.args, self.directory.name
        if args.track:
            import wandb

            own = hashlib.sha256((self.directory / "meta.json").read_bytes()).hexdigest()[:8]  # names may repeat
            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name}
            names["id"] = f"{name}-{own}"
            self.tracker = wandb.init(**names, resume="allow", config=asdict(args), sync_tensorboard=True)
            self.tracker.log_code(str(self.directory))
            self.callback(self.tracker.finish)
        self.tensorboard = SummaryWriter(str(self.directory), purge_step=self.saved + 1)
        self.callback(self.tensorboard.close)
        table = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        self.tensorboard.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.announce(exact)

    def cut_back(self) -> None:
        """Cuts the files back to the checkpoint: what came after it is made again, perhaps differently."""
        (self.directory / "result.json").unlink(missing_ok=True)
        for path in (self.directory / f"{table}.csv" for table in ("episodes", "progress", "evaluations")):
            if path.exists():
                *rows, _ = path.read_text().split("\n")  # the last is empty, or torn
                kept = [row for row in rows if row.startswith("step,") or int(row.split(",")[0]) <= self.saved]
                write_atomically(path, "\n".join([*kept, ""]))
        best = self.directory / "policies" / f"step-{self.progress['best'].get('step', 0):09d}.pt"
        if best.exists():  # best.pt may be of an evaluation that is not made again
            shutil.copy(best, self.directory / "best.pt.unfinished")
            (self.directory / "best.pt.unfinished").replace(self.directory / "best.pt")

    def load(self) -> dict:
        for path in (self.directory / "checkpoint.pt", self.directory / "checkpoint.previous.pt"):
            with suppress(ValueError):
                saved = load_checkpoint(path)
                break
        else:
            raise ValueError("its checkpoints are damaged or missing; start a new run")
        if "environments" not in saved:
            raise ValueError(f"{path.name} is a policy without the state of training; it cannot be resumed")
        was = saved["args"] | {"script": saved["script"]}
        for name, value in (asdict(self.args) | {"script": SCRIPT}).items():
            if name not in FREE and value != was.get(name):
                raise ValueError(f"{flag(name)} is {was.get(name)} in {path.name} and cannot become {value}")
        if (self.directory / f"{SCRIPT}.py").read_bytes() != Path(__file__).read_bytes():
            print(f"{self.directory}: goes on with another {SCRIPT}.py than it began with", file=sys.stderr)
        if path.name != "checkpoint.pt":
            print(f"{self.directory}: checkpoint.pt is damaged or missing; using {path.name}", file=sys.stderr)
            path.replace(self.directory / "checkpoint.pt")
        return saved

    def announce(self, exact: bool) -> None:
        """Says what is trained, and what not to expect of it."""
        args, agent, N, starts = self.args, self.agent, self.args.num_envs, self.progress["learn_from"]
        D, A, size = agent.moments.mean.numel(), agent.low.numel(), sum(p.numel() for p in agent.parameters())
        self.say(
            f"{SCRIPT}  {args.env_id}  {D} observations, {A} actions from {agent.low.min():g} to {agent.high.max():g}\n"
            f"{args.total_timesteps // N * N:,} steps of {N} environments ({args.vec}); after step {starts:,},"
            f" {args.updates_per_step:g} updates of {args.batch_size} per step\n"
            f"{size:,} parameters, {args.precision}, {self.buffer.rings.rewards.device}\n{self.directory}"
        )
        if not exact:
            self.say("the running episodes could not be restored exactly; they begin anew, all else continues")
        if args.resume and self.saved and not len(self.buffer):
            self.say(f"the checkpoint holds no replay buffer; a new one is filled until step {starts:,}")

    def write(self, table: str, rows: list[dict]) -> None:
        """Adds rows to the CSV file, and to TensorBoard under CleanRL's names."""
        if rows:
            with (self.directory / f"{table}.csv").open("a+") as file:
                file.seek(0)
                header, own = file.readline().strip(), ",".join(rows[0])
                if header not in ("", own):
                    refuse(f"{file.name}: has the columns {header}, not {own}; resume with the {SCRIPT}.py beside it")
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                if not header:
                    writer.writeheader()
                writer.writerows(rows)
        losses = {*MEASURES, "explained_variance"}
        for row in rows if table != "evaluations" else ():
            for name in (name for name in row.keys() - {"step", "wall_time"} if not math.isnan(row[name])):
                kind = "charts/episodic_" if table == "episodes" else "losses/" if name in losses else "charts/"
                self.tensorboard.add_scalar(kind + name.replace("sps", "SPS"), row[name], row["step"])

    def save(self, step: int) -> None:
        """Writes a checkpoint, unless the networks diverged; the one before stays as `checkpoint.previous.pt`."""
        if not all(parameter.isfinite().all() for parameter in self.agent.parameters()):
            raise FloatingPointError(f"parameters are not finite at step {step:,}")
        for path in self.directory.glob("*.csv"):  # a checkpoint that outlives a power cut has its rows
            with path.open("a") as file:
                os.fsync(file.fileno())
        last, previous = self.directory / "checkpoint.pt", self.directory / "checkpoint.previous.pt"
        if not self.saved and last.exists():  # it is of the start
            start, named = load_checkpoint(last)["agent"], dict(self.agent.named_parameters())
            still = [name for name, parameter in named.items() if torch.equal(parameter.cpu(), start[name])]
            if 0 < len(still) < len(named):
                self.say(f"learning has not changed {', '.join(still)}")
        previous.unlink(missing_ok=True)
        try:
            os.link(last, previous)
        except OSError:  # not every file system has links
            shutil.copy(last, previous)
        write_atomically(last, self.state(step))
        self.saved = step

    def say(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, flush=True)
        self.log.writelines(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n" for line in text.splitlines())
        self.log.flush()

    def show(self, row: dict, total: int, learnt: str) -> None:
        """A live line on a terminal; elsewhere, and in the log, a line every half minute."""
        step, recent = row["step"], self.progress["recent"]
        # Steps from which nothing is learnt yet are quick, and tell nothing of those to come.
        left = timedelta(seconds=round((total - step) / row["sps"])) if learnt else "unknown"
        text = f"{step:>11,} {step / total:4.0%}  {row['sps']:,.0f} steps/s  ETA {left}"
        text += f"  return {np.mean(recent):.1f}  {learnt}" if recent else f"  {learnt}"
        if time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            self.say(text)
        elif self.live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def finish(self, steps: int, elapsed: float) -> None:
        progress, seconds, best = self.progress, self.progress["seconds"], self.progress["best"]
        summary = {"script": SCRIPT, "env_id": self.args.env_id, "seed": self.args.seed, "steps": steps}
        summary |= {"wall_time": elapsed, "sps": steps / elapsed, "evaluation": progress["evaluation"], "best": best}
        summary |= {"training_return": np.mean(progress["recent"]).item() if progress["recent"] else None}
        summary |= {f"seconds_{name}": spent for name, spent in seconds.items()}
        write_atomically(self.directory / "result.json", json.dumps(summary, indent=2))
        shares = ", ".join(f"{name} {spent / elapsed:.0%}" for name, spent in seconds.items())
        self.say(f"{steps:,} steps in {timedelta(seconds=round(elapsed))}, {steps / elapsed:,.0f} steps/s: {shares}")
        if best:
            final = f"evaluation {progress['evaluation']['mean']:.1f} ± {progress['evaluation']['std']:.1f}"
            self.say(f"{final}, best {best['mean']:.1f} at step {best['step']:,}")

    def stop(self, number: int, step: int) -> NoReturn:
        if step > self.saved:
            self.save(step)
        self.say(f"stopped at step {self.saved:,}; continue with\n  {self.resume_command}")
        raise SystemExit(128 + number)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with suppress(OSError):  # a full disk has been noticed before
            super().__exit__(None, None, None)
        if isinstance(error, OSError | EOFError | FloatingPointError | KeyboardInterrupt):
            problem = f"{type(error).__name__} {error}; the last checkpoint is of step {self.saved:,}; resume with"
            print(f"{SCRIPT}.py: {problem}\n  {self.resume_command}", file=sys.stderr)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1)


# ----------------------------------------------------------------------------------------- arguments and refusals

# What may differ when a run is resumed.
FREE = ["resume", "config", "device", "threads", "compile", "num_evals", "eval_episodes", "checkpoint_every"]
FREE += ["runs_dir", "capture_video", "track", "wandb_project_name", "wandb_entity"]


def flag(name: str) -> str:
    return f"--{name}".replace("_", "-")


def refuse(problem: str) -> NoReturn:
    """Reports a user's mistake in one line, however many a library's error has; exit status 2."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


RANGES = {
    "between 1 and 1e9": (1, 1e9, "total_timesteps buffer_size"),  # observations are numbered in 32 bits
    "between 1 and 1e15": (1, 1e15, "checkpoint_every num_envs eval_episodes"),
    "between 1 and 65536": (1, 65536, "batch_size policy_frequency actor_sizes critic_sizes"),
    "between 1e-6 and 1000": (1e-6, 1000, "updates_per_step"),
    "at least 0": (0, math.inf, "noise_clip"),
    "between 0 and 1e15": (0, 1e15, "num_evals learning_starts exploration_noise policy_noise"),
    "above 0": (1e-300, 1e300, "learning_rate"),
    "between 0 and 1": (0, 1, "gamma tau lr_warmup"),
    "between 1 and 1024": (1, 1024, "threads"),
    "between 0 and 2147483647": (0, 2**31 - 1, "seed"),  # EnvPool's have 32 bits
}


def check(args: Args) -> None:
    """Raises a ValueError for a value out of its range, alone or in a tuple; None, a setting left open, passes."""
    for rule, (low, high, names) in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not all(low <= each <= high for each in np.atleast_1d(value)):
                raise ValueError(f"{flag(name)} {value}: must be {rule}")
    for name in ("total_timesteps", "checkpoint_every"):  # which may be 1e6
        object.__setattr__(args, name, int(getattr(args, name)))  # settings never change after this
    for name in ("env_id", "runs_dir", "resume", "config"):
        if getattr(args, name) == "":
            raise ValueError(f"{flag(name)}: is empty")
    for name in ("env_kwargs", "eval_env_kwargs"):
        try:
            dict(**json.loads(getattr(args, name)))
        except (ValueError, TypeError):
            raise ValueError(f"{flag(name)} {getattr(args, name)}: must be a JSON object like '{{\"g\":9}}'") from None


class EnvPool(Environments):
    """EnvPool seeds its episodes itself, so they cannot be played again; an end at the time limit counts as a cut."""

    def _make(self, args: Args) -> gym.Env:
        import envpool

        seeds = self.random.integers(2**31, size=args.num_envs).tolist()  # from one seed it counts on into other runs'
        kwargs = json.loads(args.env_kwargs)
        return envpool.make(args.env_id, "gymnasium", num_envs=args.num_envs, seed=seeds, **kwargs)

    def _reset(self, which: np.ndarray) -> np.ndarray:
        first = self.envs.reset(np.flatnonzero(which))[0]
        observations = first if which.all() else self.observations.copy()
        observations[which] = first
        return observations

    def state(self) -> dict:
        return {"seed": self.random.integers(2**31).item()}  # from which other episodes follow

    def restore(self, state: dict) -> bool:
        self.__init__(replace(self.args, seed=state["seed"]))
        return False


def resolve_precision(args: Args) -> Args:
    """The arguments with a precision instead of `auto`."""
    if args.device != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return replace(args, precision="bf16" if fast else "fp32") if args.precision == "auto" else args


def memory_of(args: Args) -> int:
    """Bytes of memory in all, where the replay buffer is."""
    if args.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_observation(observation: np.ndarray, space: gym.spaces.Box) -> None:
    """Raises a TypeError unless it is what the space says; some ways of stepping would repeat or cut it to fit."""
    array = np.asarray(observation)
    if not array.size or array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise TypeError(f"observes {array.dtype} {array.shape}, where its space says {space.dtype} {space.shape}")


def prepare(args: Args) -> tuple[Args, Environments, gym.spaces.Box]:
    """The arguments with a precision, environments and action space; refuses what cannot work, and writes nothing."""
    for name, package in (("vec", "envpool"), ("track", "wandb")):
        if getattr(args, name) in (package, True) and not find_spec(package):
            refuse(f"{flag(name)}: {package} is not installed; pip install {package}")
    online = args.track and os.environ.get("WANDB_MODE", "online") == "online"
    if online and not importlib.import_module("wandb").login(prompt=False):
        refuse("--track: not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here; use cpu")
    if args.capture_video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # which Gymnasium's pygame environments draw with
    N, starts, spaces = args.num_envs, args.learning_starts, []
    if args.total_timesteps < starts + N:
        refuse(f"--total-timesteps {args.total_timesteps}: must be at least {starts + N}, after --learning-starts")
    if 0 < (risen := args.lr_warmup * args.total_timesteps) <= starts:
        refuse(f"--lr-warmup {args.lr_warmup:g}: ends at step {risen:,.0f}; must end after --learning-starts {starts}")
    if args.buffer_size < 4 * N:
        refuse(f"--buffer-size {args.buffer_size}: must be at least 4 x --num-envs, {4 * N}")
    try:
        for make in (TrainEnv, partial(make_eval_env, render_mode="rgb_array" if args.capture_video else None)):
            with closing(make(args)) as env:
                actions = env.action_space
                if not isinstance(actions, gym.spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
                    raise TypeError(f"acts in {actions}, not a Box of real numbers; ppo_discrete.py is for Discrete")
                if not actions.is_bounded():
                    raise TypeError(f"acts in {actions}, which has infinite bounds; ppo_continuous.py is for those")
                spaces.append((env.observation_space.shape, actions))
                env.reset(seed=0)
                observation, *_ = env.step(actions.sample())  # some mistakes show only in a step
                check_observation(observation, env.observation_space)
                if args.capture_video and make is not TrainEnv:
                    image = np.asarray(env.render() if env.render_mode else None)
                    if image.ndim != 3 or image.dtype != np.uint8:
                        raise TypeError("draws no images of bytes (height, width, 3), which --capture-video needs")
        observed = np.empty((1, *env.observation_space.shape), env.observation_space.dtype)
        taken = sum(ring.nbytes for ring in Rings.of(args.buffer_size, observed, actions, "meta"))
        if taken > (memory := memory_of(args)):
            refuse(f"--buffer-size {args.buffer_size}: takes {taken:,} bytes, of {memory:,} in all; make it smaller")
        envs = (EnvPool if args.vec == "envpool" else Environments)(args)
        if spaces != [(envs.observations.shape[1:], actions)] * 2:
            envs.close()
            raise TypeError("evaluation does not have the spaces of training")
    except Exception as error:
        names = ("env_kwargs", "eval_env_kwargs", "vec", "capture_video")
        given = ["env_id", *(name for name in names if getattr(args, name) != getattr(Args, name))]
        told = error if " " in str(error) else repr(error)
        refuse(f"{' '.join(f'{flag(name)} {getattr(args, name)}' for name in given)}: {told}")
    return resolve_precision(args), envs, actions


def parse(argv: list[str]) -> Args:
    """The defaults, then the file of `--config` or the run of `--resume`, then the command line: the last one wins."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.resume and not all(any(Path(args.resume).glob(name)) for name in (f"{SCRIPT}.py", "checkpoint*.pt")):
        refuse(f"--resume {args.resume}: is not a run of {SCRIPT}.py, or has no checkpoint")
    if args.resume and args.config:
        refuse(f"--config {args.config}: a run that is resumed has its own arguments; leave it out")
    path = f"{args.resume}/config.yaml" if args.resume else args.config
    try:
        settings = yaml.safe_load(Path(path).read_text()).items() if path else ()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        refuse(f"{path}: is not a file of arguments: {error}")
    words = []
    for name, value in settings:
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [flag(name), *map(str, values)]
    settled = tyro.cli(tyro.conf.FlagConversionOff[Args], args=words, description=__doc__)  # --compile False
    return tyro.cli(Args, args=argv, default=settled, description=__doc__)


def catch_interrupts() -> list[int]:
    """Collects SIGINT and SIGTERM, for a run to stop where it can be resumed; a second one stops it at once."""
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where a `module:Id-v0` of the user's may lie
    train(interrupts=catch_interrupts(), args=parse(sys.argv[1:]))
