# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "tyro", "pyyaml", "tensorboard", "moviepy"
# ]
# ///
"""Soft Actor-Critic (SAC) with twin critics and a learnt entropy coefficient, for continuous actions.

    python sac_continuous.py --env-id HalfCheetah-v4
    python sac_continuous.py --resume runs/HalfCheetah-v4__sac_continuous__1__20260101-120000

Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905.

The algorithm ends with `train`; what follows keeps, evaluates and checks, and is much the same in every script.

What may surprise:
- Only termination cuts a target; an episode cut by a time limit goes on in the value of its true last observation.
- Actions are scaled to [-1, 1]: log-probabilities, and the entropy aimed at, do not depend on the environment's units.
- The replay buffer holds each observation once (1M steps of HalfCheetah take 105 MB), and is part of the checkpoint.
- The two critics are one batched computation; all of an update (critics, actor, entropy, targets) is one graph.
"""

import copy
import csv
import difflib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from ctypes.util import find_library
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id of the environment; `module:Id-v0` imports the module first"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'"""
    eval_env_kwargs: str = "{}"
    """arguments of the evaluation environment that differ, as JSON"""
    num_envs: int = 1
    """environments stepped together"""
    vec: Literal["sync", "async", "envpool"] = "sync"
    """how they are stepped: in turn, in a process each, or by EnvPool"""
    total_timesteps: int = 1_000_000
    """environment steps, over all environments"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks and the replay buffer are"""
    threads: int = 2
    """torch threads"""
    compile: bool = True
    """compile the update (needs a C++ compiler; 5 to 40 s at the start)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of the update's products between hidden layers; auto is bf16 on GPUs and x86 processors that multiply in it"""

    learning_rate: float = 1e-3
    """Adam's step size at the start, of everything that has none of its own (Tianshou's in MuJoCo)"""
    policy_lr: float | None = None
    """that of the actor"""
    q_lr: float | None = None
    """that of the critics"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rates fall; linear and cosine end at 0"""
    lr_warmup: float = 0.0
    """share of the run over which the learning rates first rise from 0"""
    buffer_size: int = 1_000_000
    """observations in the replay buffer; the last one of an episode counts too"""
    learning_starts: int = 10_000
    """environment steps with random actions before the first update"""
    updates_per_step: float = 1.0
    """updates per environment step, however many environments there are"""
    batch_size: int = 256
    """transitions per update"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """how far the target critics move towards the critics"""
    policy_frequency: int = 1
    """the actor learns at every so many updates, and then as many times"""
    target_network_frequency: int = 1
    """the target critics move at every so many updates"""
    autotune: bool = True
    """learn the entropy coefficient, from 1 on, so that the entropy comes to minus the number of actions"""
    alpha: float = 0.2
    """the entropy coefficient with --no-autotune"""
    norm_obs: bool = False
    """normalise observations by their running mean and deviation"""
    actor_sizes: tuple[int, ...] = (256, 256)
    """hidden layers of the policy"""
    critic_sizes: tuple[int, ...] = (256, 256)
    """hidden layers of each critic"""

    num_evals: int = 10
    """evaluations during the run, evenly spaced, the last at its end; 0 for none"""
    eval_episodes: int = 10
    """episodes per evaluation: deterministic, with the same seeds each time"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints"""
    checkpoint_buffer: bool = True
    """keep the replay buffer in the checkpoint; otherwise a resumed run learns on after --learning-starts steps"""
    runs_dir: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """continue the run in this directory"""
    config: str | None = None
    """YAML or JSON file of arguments; the command line wins"""
    capture_video: bool = False
    """film the best episode of every evaluation"""
    track: bool = False
    """send everything to Weights & Biases"""
    wandb_project_name: str = "solorl"
    """its project"""


# ---------------------------------------------------------------------------------------------------- environments


def make_env(env_id: str, env_kwargs: dict, render_mode: str | None = None) -> gym.Env:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published
        return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **env_kwargs)


def make_eval_env(args: Args, render_mode: str | None = None) -> gym.Env:
    return make_env(args.env_id, json.loads(args.env_kwargs) | json.loads(args.eval_env_kwargs), render_mode)


class WithoutInfo(gym.Wrapper):
    """Drops what training does not read, and what a vector environment spends a tenth of its time on collecting."""

    def step(self, action: np.ndarray) -> tuple:
        return *self.env.step(action)[:4], {}


def make_train_env(args: Args) -> gym.Env:
    return WithoutInfo(make_env(args.env_id, json.loads(args.env_kwargs)))


def make_envpool(args: Args) -> gym.Env:
    import envpool

    kwargs = json.loads(args.env_kwargs)
    return envpool.make(args.env_id, "gymnasium", num_envs=args.num_envs, seed=args.seed, **kwargs)


class Environments:
    """N environments stepped together. None resets by itself, so `step` always returns the true next observation.

    Every episode begins with a seed drawn here: its seed and the actions since are all it takes to restore it.
    """

    def __init__(self, args: Args):
        if args.vec == "envpool":
            self.envs = make_envpool(args)
        else:
            vector = {"sync": gym.vector.SyncVectorEnv, "async": gym.vector.AsyncVectorEnv}[args.vec]
            one = partial(make_train_env, args)
            self.envs = vector([one] * args.num_envs, copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
        self.num_envs, self.kind = args.num_envs, args.vec
        self.random = np.random.default_rng(args.seed)
        self.seeds = np.zeros(self.num_envs, int)  # of each running episode
        self.began = np.zeros(self.num_envs, int)  # and where in `actions` it began
        self.actions: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The true next observations (N, D), rewards, terminated, truncated."""
        if self.kind != "envpool":
            self.actions.append(actions.copy())
        observations, rewards, terminated, truncated, _ = self.envs.step(actions)
        return observations.reshape(self.num_envs, -1), rewards, terminated, truncated

    def reset(self, which: np.ndarray) -> np.ndarray:
        """New episodes where `which` is true; their first observations."""
        self.seeds[which] = self.random.integers(2**31, size=which.sum())
        self.began[which] = len(self.actions)
        return self._reset(which)

    def _reset(self, which: np.ndarray) -> np.ndarray:
        if self.kind == "envpool":
            return self.envs.reset(np.flatnonzero(which))[0].reshape(which.sum(), -1)
        observations, _ = self.envs.reset(seed=self.seeds.tolist(), options={"reset_mask": which})
        return observations.reshape(self.num_envs, -1)[which]

    def close(self) -> None:
        self.envs.close()

    def state(self) -> dict:
        oldest = self.began.min()
        self.actions, self.began = self.actions[oldest:], self.began - oldest
        actions = torch.from_numpy(np.array(self.actions))
        random = self.random.bit_generator.state
        return {"seeds": self.seeds.tolist(), "began": self.began.tolist(), "actions": actions, "random": random}

    def restore(self, state: dict, observations: np.ndarray) -> bool:
        """Plays the running episodes again; true if that led to the same observations."""
        self.random.bit_generator.state = state["random"]
        if self.kind == "envpool":
            return False
        self.seeds, self.began = np.array(state["seeds"]), np.array(state["began"])
        self.actions = list(state["actions"].numpy())
        restored = self._reset(np.ones(self.num_envs, bool)).copy()
        for t, actions in enumerate(self.actions, start=1):
            restored, _, terminated, truncated, _ = self.envs.step(actions)
            restored, over = restored.reshape(self.num_envs, -1).copy(), terminated | truncated
            if (over & (self.began < t)).any():
                return False
            again = (self.began == t) | over  # begins here, or only passes the time until it does
            if again.any():
                restored[again] = self._reset(again)
        return np.array_equal(restored, observations)


class RunningMoments:
    """Mean and variance of all that was seen, in float64 (Chan et al.). When not enabled, it changes nothing."""

    def __init__(self, shape: tuple[int, ...], enabled: bool):
        self.mean, self.var, self.count, self.enabled = np.zeros(shape), np.ones(shape), 0, enabled

    def update(self, batch: np.ndarray) -> None:
        mean, var, count = batch.mean(0), batch.var(0), len(batch)
        total, delta = self.count + count, mean - self.mean
        self.var = (self.var * self.count + var * count + delta**2 * self.count * count / total) / total
        self.mean = self.mean + delta * count / total
        self.count = total

    def deviation(self) -> np.ndarray:
        return np.sqrt(self.var + 1e-8) if self.enabled else np.ones_like(self.var)

    def scale(self, batch: np.ndarray) -> np.ndarray:
        return (batch / self.deviation()).clip(-10, 10) if self.enabled else batch

    def normalise(self, batch: np.ndarray) -> np.ndarray:
        return self.scale(batch - self.mean if self.enabled else batch).astype(np.float32)

    def state(self) -> dict:
        return {"mean": torch.tensor(self.mean), "var": torch.tensor(self.var), "count": self.count}

    def restore(self, state: dict) -> None:
        self.mean, self.var, self.count = state["mean"].numpy(), state["var"].numpy(), state["count"]


# ------------------------------------------------------------------------------------------------------- algorithm


class Transitions(NamedTuple):
    observations: Tensor  # (B, D)
    actions: Tensor  # (B, A), in [-1, 1]
    rewards: Tensor  # (B,)
    terminated: Tensor  # (B,)
    next_observations: Tensor  # (B, D), the true ones


class ReplayBuffer:
    """Two rings: what was seen, each observation once, and what was done between one observation and the next.

    Observations are numbered as they come. A transition knows the numbers of the two it lies between, and is forgotten
    when the first of them is overwritten. What an ended episode saw last is a row like any other.
    """

    def __init__(self, size: int, envs: int, observation: int, action: int, dtype: torch.dtype, device: torch.device):
        self.size, self.envs = size, envs
        self.observations = torch.zeros((size, observation), dtype=dtype, device=device)
        self.actions = torch.zeros((size, action), device=device)
        self.rewards = torch.zeros(size, device=device)
        self.terminated = torch.zeros(size, dtype=torch.bool, device=device)
        self.between = torch.zeros((2, size), dtype=torch.int32)
        self.seen, self.first, self.end = 0, 0, 0  # observations so far; transitions from `first` up to `end` are held

    def __len__(self) -> int:
        return self.end - self.first

    def begin(self, observations: np.ndarray) -> None:
        """What the environments see now (N, D), without a transition that led there."""
        rows = torch.arange(self.seen, self.seen + len(observations), device=self.observations.device) % self.size
        self.observations[rows] = torch.tensor(observations).to(self.observations)
        self.seen += len(observations)
        while self.first < self.end and self.between[0, self.first % self.size] < self.seen - self.size:
            self.first += 1

    def add(
        self, actions: Tensor, rewards: np.ndarray, terminated: np.ndarray, last: dict[int, np.ndarray], now: np.ndarray
    ) -> None:
        """A step of every environment: what ended episodes saw `last`, and what all see `now`, (N, D), after resets."""
        before = torch.arange(self.seen - self.envs, self.seen)
        after = before + self.envs + len(last)
        for number, n in enumerate(last, start=self.seen):
            after[n] = number
        slots = torch.arange(self.end, self.end + self.envs) % self.size
        self.between[:, slots] = torch.stack((before, after)).int()
        slots = slots.to(self.actions.device)
        self.actions[slots] = actions
        self.rewards[slots] = torch.tensor(rewards).to(self.rewards)
        self.terminated[slots] = torch.tensor(terminated).to(self.terminated)
        self.end += self.envs
        self.begin(np.stack((*last.values(), *now)))

    def sample(self, count: int, moments: RunningMoments) -> Transitions:
        """Drawn uniformly, with replacement; the observations as the moments normalise them now."""
        slots = torch.randint(self.first, self.end, (count,)) % self.size
        rows = (self.between.index_select(1, slots) % self.size).flatten().to(self.actions.device)
        slots = slots.to(self.actions.device)
        observations = self.observations.index_select(0, rows).float()  # a quarter of the time of [rows]
        if moments.enabled:
            mean, deviation = torch.tensor(np.stack((moments.mean, moments.deviation()))).to(observations)
            observations = ((observations - mean) / deviation).clamp(-10, 10)
        done = (ring.index_select(0, slots) for ring in (self.actions, self.rewards, self.terminated))
        return Transitions(observations[:count], *done, observations[count:])

    def rings(self) -> tuple[Tensor, ...]:
        return self.observations, self.actions, self.rewards, self.terminated, self.between.T

    def state(self) -> dict:
        used = zip(self.rings(), (self.seen, *[self.end] * 4), strict=True)
        whole = self.end >= self.size  # a part is copied, as it would be saved with all of its ring
        kept = [ring if whole else ring[:number].to("cpu", copy=True) for ring, number in used]
        return {"rings": kept, "seen": self.seen, "first": self.first, "end": self.end}

    def restore(self, state: dict) -> None:
        for ring, kept in zip(self.rings(), state["rings"], strict=True):
            ring[: len(kept)] = kept
        self.seen, self.first, self.end = state["seen"], state["first"], state["end"]


class Networks(nn.Module):
    """Fully connected ReLU networks, `count` of them side by side: each layer is one batched product."""

    def __init__(self, count: int, sizes: tuple[int, ...]):
        super().__init__()
        self.count = count
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            bound = inputs**-0.5  # as in torch's linear layers
            self.weights.append(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, inputs) to (count, B, outputs); what lies between the first and the last layer is computed in `dtype`."""
        x = inputs.expand(self.count, *inputs.shape)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for n, (hidden_weight, hidden_bias) in enumerate(hidden):
            kind = dtype if n else torch.float32  # observations need all of their digits
            x = (torch.bmm(x.to(kind), hidden_weight.to(kind)) + hidden_bias.to(kind)).relu()
        if weight.shape[-1] == 1:  # for a single column, a sum is faster than a matrix product
            return (x.float() * weight.mT).sum(-1, keepdim=True) + bias
        return torch.bmm(x.float(), weight) + bias


class Agent(nn.Module):
    """A Gaussian policy, squashed by tanh, two critics, and the logarithm of the entropy coefficient."""

    def __init__(self, args: Args, observation_size: int, action_size: int):
        super().__init__()
        self.actor = Networks(1, (observation_size, *args.actor_sizes, 2 * action_size))
        self.critics = Networks(2, (observation_size + action_size, *args.critic_sizes, 1))
        self.log_alpha = nn.ParameterList([torch.tensor([0.0 if args.autotune else math.log(args.alpha)])])


def gaussian(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's μ and log σ before squashing, (B, A) each."""
    mean, log_std = outputs.squeeze(0).chunk(2, -1)
    return mean, log_std.clamp(-20, 2)


def squash(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The actions a = tanh(u), where u = μ + σ ε, and log π(a) = log N(u; μ, σ) − Σ log(1 − tanh² u).

    log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)), which stays exact where tanh u rounds to 1.
    """
    mean, log_std = gaussian(outputs)
    u = mean + log_std.exp() * noise
    log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_density - 2 * (math.log(2) - u - softplus(-2 * u))).sum(-1)


class Learner(NamedTuple):
    """The parameters as one vector, of which the agent's are views, and the state of Adam."""

    theta: Tensor
    first_moment: Tensor
    second_moment: Tensor
    first_decay: Tensor  # β₁ᵗ after t steps
    second_decay: Tensor  # β₂ᵗ
    learning_rate: Tensor

    @staticmethod
    def of(agent: nn.Module) -> "Learner":
        theta = nn.utils.parameters_to_vector(agent.parameters()).detach()
        sizes = [parameter.numel() for parameter in agent.parameters()]
        for parameter, piece in zip(agent.parameters(), theta.split(sizes), strict=True):
            parameter.data = piece.view_as(parameter)
        scalars = torch.tensor((1.0, 1.0, 0.0), device=theta.device)
        return Learner(theta, torch.zeros_like(theta), torch.zeros_like(theta), *scalars)

    @torch.no_grad()
    def adam_step(self, gradient: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.first_decay.mul_(beta1)  # a power would be taken anew for every 16 parameters in compiled code
        self.second_decay.mul_(beta2)
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.lerp_(gradient**2, 1 - beta2)
        mean = self.first_moment / (1 - self.first_decay)
        deviation = (self.second_moment / (1 - self.second_decay)).sqrt()
        self.theta.sub_(self.learning_rate * mean / (deviation + eps))


class Learners(NamedTuple):
    actor: Learner
    critics: Learner
    log_alpha: Learner
    target: Tensor  # the parameters of the target critics

    @staticmethod
    def of(agent: Agent) -> "Learners":
        actor, critics, log_alpha = map(Learner.of, (agent.actor, agent.critics, agent.log_alpha))
        return Learners(actor, critics, log_alpha, critics.theta.clone())


def call(networks: Networks, theta: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """The networks' outputs with the parameters in `theta`."""
    names, shapes = zip(*((name, parameter.shape) for name, parameter in networks.named_parameters()), strict=True)
    pieces = theta.split([shape.numel() for shape in shapes])
    parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
    return functional_call(networks, parameters, (inputs, dtype))


def update(
    agent: Agent, args: Args, learners: Learners, batch: Transitions, noise: Tensor, improve: bool, follow: bool
) -> Tensor:
    """The critics learn, the actor if it is to `improve`, and the targets `follow`; returns what was measured."""
    actor, critics, log_alpha, target = learners
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    alpha = log_alpha.theta.exp()

    # The critics' target: y = r + γ (1 − terminated) (min_i Q̄_i(s', a') − α log π(a'|s')), with a' ~ π(·|s').
    next_actions, next_logprobs = squash(call(agent.actor, actor.theta, batch.next_observations, dtype), noise[0])
    next_inputs = torch.cat((batch.next_observations, next_actions), -1)
    next_values = call(agent.critics, target, next_inputs, dtype).amin(0).squeeze(-1) - alpha * next_logprobs
    goals = batch.rewards + args.gamma * next_values.masked_fill(batch.terminated, 0)

    # The critics' loss: Σ_i mean (Q_i(s, a) − y)².
    theta = critics.theta.detach().requires_grad_()
    values = call(agent.critics, theta, torch.cat((batch.observations, batch.actions), -1), dtype).squeeze(-1)  # (2, B)
    q_loss = ((values - goals) ** 2).mean(-1).sum()
    (gradient,) = torch.autograd.grad(q_loss, theta)
    critics.adam_step(gradient)

    # The actor's: mean (α log π(a|s) − min_i Q_i(s, a)), with a ~ π(·|s); α's gradient: mean (−log π(a|s)) + A.
    policy_loss = torch.full((), torch.nan, device=theta.device)
    for sample in noise[1:] if improve else ():
        theta = actor.theta.detach().requires_grad_()
        actions, logprobs = squash(call(agent.actor, theta, batch.observations, dtype), sample)
        inputs = torch.cat((batch.observations, actions), -1)
        expected = call(agent.critics, critics.theta, inputs, dtype).amin(0).squeeze(-1)
        policy_loss = (log_alpha.theta.exp() * logprobs - expected).mean()
        (gradient,) = torch.autograd.grad(policy_loss, theta)
        actor.adam_step(gradient)
        if args.autotune:
            excess = -logprobs.detach().mean() + actions.shape[-1]  # of the entropy over −A
            log_alpha.adam_step(excess.view(1))

    if follow:
        target.lerp_(critics.theta, args.tau)
    return torch.stack((q_loss, values.mean(), policy_loss, -next_logprobs.mean(), alpha.squeeze())).detach()


def decided(args: Args, device: torch.device) -> Args:
    """With a precision instead of `auto`."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return replace(args, precision="bf16" if fast else "fp32") if args.precision == "auto" else args


def compile_update(args: Args, agent: Agent, D: int, A: int, say: Callable[[str], None]) -> Callable:
    """Compiles by calls on copies of everything. Where that is impossible, says so and returns what there is."""
    started, B = time.perf_counter(), args.batch_size
    device = agent.log_alpha[0].device
    zeros = partial(torch.zeros, device=device)
    batch = Transitions(zeros(B, D), zeros(B, A), zeros(B), zeros(B, dtype=torch.bool), zeros(B, D))
    noise = zeros(1 + args.policy_frequency, B, A)
    period = math.lcm(args.policy_frequency, args.target_network_frequency)
    try:
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward become one graph
        on_cpu = device.type == "cpu"  # there, calling many small kernels from Python costs
        fast = torch.compile(update, fullgraph=True, dynamic=False, options={"cpp_wrapper": on_cpu})
        for parts in {parts_of_update(args, number) for number in range(period)}:
            fast(agent, args, Learners.of(copy.deepcopy(agent)), batch, noise, *parts)
    except Exception as error:
        say(f"compiling is impossible here, so the run is slower: {' '.join(str(error).split())[:100]}")
        return update
    say(f"the update compiled in {time.perf_counter() - started:.1f} s")
    return fast


def parts_of_update(args: Args, number: int) -> tuple[bool, bool]:
    """Whether the actor improves in the update of this number, and whether the targets follow."""
    return number % args.policy_frequency == 0, number % args.target_network_frequency == 0


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Policy:
    """What is deployed: a batch of observations to actions, with the normaliser frozen inside.

    Deterministic, unless asked for a `sample` of the actions as in training.
    """

    def __init__(self, agent: Agent, moments: RunningMoments, bounds: np.ndarray):
        self.agent, self.moments = agent, moments
        self.low, self.high = bounds

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        return self.scale(self.act(self.input(observations), sample))

    def value(self, observations: np.ndarray) -> np.ndarray:
        """The lower of the critics' values of the deterministic action; entropy, times alpha, counts as a reward."""
        inputs = self.input(observations)
        with torch.no_grad():
            values = self.agent.critics(torch.cat((inputs, self.act(inputs)), -1))
        return values.amin(0).squeeze(-1).cpu().numpy()

    def act(self, inputs: Tensor, sample: bool = False) -> Tensor:
        """Actions in [-1, 1]."""
        with torch.no_grad():
            mean, log_std = gaussian(self.agent.actor(inputs))
            u = mean + log_std.exp() * torch.randn_like(mean) if sample else mean
            return u.tanh()

    def scale(self, actions: Tensor) -> np.ndarray:
        """From [-1, 1] to the environment's bounds."""
        share = 0.5 * actions.cpu().numpy().reshape(-1, *self.low.shape) + 0.5
        return (self.low * (1 - share) + self.high * share).clip(self.low, self.high)

    def input(self, observations: np.ndarray) -> Tensor:
        # Torch's own memory: a matrix product's last bits depend on the alignment, which numpy's memory lacks.
        flat = self.moments.normalise(observations.reshape(len(observations), -1))
        return torch.tensor(flat, device=self.agent.log_alpha[0].device)


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args = Args(**checkpoint["args"])
    bounds = checkpoint["action_bounds"].numpy()
    moments = RunningMoments(checkpoint["moments"]["mean"].shape, args.norm_obs)
    moments.restore(checkpoint["moments"])
    agent = Agent(args, moments.mean.size, bounds[0].size)
    agent.load_state_dict(checkpoint["agent"])
    return Policy(agent.to(device), moments, bounds)


# -------------------------------------------------------------------------------------------------------- training

MEASURES = ["q_loss", "q_value", "policy_loss", "entropy", "alpha"]
STATE = ["learning_rate", "updates", "buffer"]
SECONDS = ["seconds_stepping", "seconds_acting", "seconds_updating"]
TABLES = {
    "episodes": ["step", "wall_time", "return", "length"],
    "progress": ["step", "wall_time", "sps", *MEASURES, *STATE, *SECONDS],
    "evaluations": ["step", "episode", "seed", "return", "length"],
}


def train(args: Args, interrupts: Sequence[int] = ()) -> Path:
    """Returns the run directory. Once `interrupts` holds a signal's number, it stops where it can be resumed."""
    check(args)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args = decided(args, device)
    if device.type == "cpu":
        # Allowed to round, oneDNN is twice as fast in float32 as MKL on AMD's processors. Only AMX and ARM do round.
        exact = args.precision == "fp32" and not torch.cpu.get_capabilities().get("amx_bf16", True)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "none"
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    eval_envs = [make_eval_env(args) for _ in range(args.eval_episodes)]
    space = eval_envs[0].observation_space
    low, high = eval_envs[0].action_space.low, eval_envs[0].action_space.high
    N, D, A, B = args.num_envs, math.prod(space.shape), low.size, args.batch_size
    total = args.total_timesteps // N * N
    interval = max(1, min(1000, args.checkpoint_every) // N) * N  # from one row of progress to the next

    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
    try:
        buffer = ReplayBuffer(args.buffer_size, N, D, A, dtype, device)
    except RuntimeError:
        refuse(f"--buffer-size {args.buffer_size}: that many observations do not fit into the memory of {device}")
    directory, saved = find_run(args) if args.resume else (create_run(args, device), {})

    agent = Agent(args, D, A).requires_grad_(False).to(device)
    learners = Learners.of(agent)
    moments = RunningMoments((D,), args.norm_obs)
    policy = Policy(agent, moments, np.stack((low, high)))
    envs = Environments(replace(args, seed=(args.seed + saved.get("step", 0)) % 2**31))  # else EnvPool repeats itself
    observations, restored = envs.reset(np.ones(N, bool)), False
    returns, lengths = np.zeros(N), np.zeros(N, int)  # of the running episodes
    recent: deque[float] = deque(maxlen=100)  # returns of the last finished episodes
    seconds = np.zeros(3)  # stepping, acting, updating
    done = {"step": 0, "elapsed": 0.0, "updates": 0, "evaluation": {}, "best": {}, "saved": False}
    learn_from = args.learning_starts
    run = Run(args, directory, saved.get("sizes", {}), saved.get("step", 0))
    if saved:
        (directory / "result.json").unlink(missing_ok=True)
        agent.load_state_dict(saved["agent"])
        for learner, values in zip(learners[:3], saved["learners"], strict=True):
            for tensor, value in zip(learner[1:], values, strict=True):
                tensor.copy_(value)
        learners.target.copy_(saved["target"])
        moments.restore(saved["moments"])
        restored = envs.restore(saved["environments"], saved["observations"].numpy())
        if restored:
            observations = saved["observations"].numpy()
            returns, lengths = (saved[name].numpy() for name in ("returns", "lengths"))
        else:
            run.say(f"--vec {args.vec} cannot restore the running episodes; they begin anew, all else continues")
            observations = envs.reset(np.ones(N, bool))
        recent.extend(saved["recent"])
        seconds, done = saved["seconds"].numpy(), saved["done"]
        if saved["buffer"]:
            learn_from = saved["learn_from"]
            buffer.restore(saved["buffer"])
        else:
            learn_from = done["step"] + max(args.learning_starts, B)
            run.say(f"the checkpoint holds no replay buffer; a new one is filled until step {learn_from:,}")
        torch.set_rng_state(saved["random"])
        if device.type == "cuda" and "cuda_random" in saved:
            torch.cuda.set_rng_state(saved["cuda_random"], device)
    if not (restored and saved["buffer"]):
        buffer.begin(observations)
    saved.clear()  # the replay buffer in it has been copied

    run.say(
        f"{Path(__file__).stem}  {args.env_id}  {D} observations, {A} actions in {low.min():g} to {high.max():g}\n"
        f"{N} environments ({args.vec}), {args.updates_per_step:g} updates of {B} per step from step {learn_from:,} on,"
        f" {sum(learner.theta.numel() for learner in learners[:3]):,} parameters, {args.precision}, {device}"
        f"\n{directory}"
    )

    fast_update = compile_update(args, agent, D, A, run.say) if args.compile else update
    started = time.perf_counter() - done["elapsed"]

    while done["step"] < total:
        step, before, seconds_before = done["step"], time.perf_counter(), seconds.copy()
        measured, episodes, finite = [], [], True
        until = min((step // interval + 1) * interval, total)
        if args.num_evals:  # each at its own step: the first of which this share of the total is done
            following = step * args.num_evals // total + 1
            until = min(until, math.ceil(following * total / (args.num_evals * N)) * N)
        while finite and step < until and not (interrupts and step > done["step"]):
            # Step every environment once.
            clock = time.perf_counter()
            if step < args.learning_starts:
                actions = 2 * torch.rand((N, A), device=device) - 1
            else:
                actions = policy.act(policy.input(observations), sample=True)
            scaled = policy.scale(actions)
            seconds[1] += time.perf_counter() - clock

            clock = time.perf_counter()
            observations, rewards, terminated, truncated = envs.step(scaled)
            step += N
            finite = bool(np.isfinite(rewards).all() and np.isfinite(observations).all())
            ended, last = terminated | truncated, {}
            returns += rewards
            lengths += 1
            if ended.any():
                for n in np.flatnonzero(ended):
                    last[n] = observations[n].copy()
                    now = {"step": step, "wall_time": round(clock - started, 3)}
                    episodes.append(now | {"return": returns[n].item(), "length": lengths[n].item()})
                observations[ended] = envs.reset(ended)
                returns[ended], lengths[ended] = 0, 0
            buffer.add(actions, rewards, terminated, last, observations)
            if args.norm_obs:
                moments.update(np.stack((*last.values(), *observations)))
            seconds[0] += time.perf_counter() - clock

            # Learn: so many updates for each of these N steps.
            clock = time.perf_counter()
            factor = lr_factor(args, step // N, total // N)
            for learner, rate in zip(learners[:3], (args.policy_lr, args.q_lr, None), strict=True):
                learner.learning_rate.fill_(factor * (rate or args.learning_rate))
            updates = int(step * args.updates_per_step) - int((step - N) * args.updates_per_step)
            for _ in range(updates if step > learn_from else 0):
                batch = buffer.sample(B, moments)
                noise = torch.randn((1 + args.policy_frequency, B, A), device=device)
                done["updates"] += 1
                parts = parts_of_update(args, done["updates"])
                measured.append(fast_update(agent, args, learners, batch, noise, *parts))
            seconds[2] += time.perf_counter() - clock
        clock = time.perf_counter()
        means = torch.stack(measured).nanmean(0).tolist() if measured else [math.nan] * len(MEASURES)
        measures = dict(zip(MEASURES, means, strict=True))
        finite &= all(learner.theta.isfinite().all().item() for learner in learners[:3])
        seconds[2] += time.perf_counter() - clock
        if not finite:
            run.say(f"stopped: not finite at step {step:,}: {measures}")
            run.say("the last checkpoint is from before that" if done["saved"] else "there is no checkpoint yet")
            run.close()
            envs.close()
            raise SystemExit(1)

        # Log.
        new, done["step"], done["elapsed"] = step - done["step"], step, time.perf_counter() - started
        recent.extend(episode["return"] for episode in episodes)
        row = {"step": step, "wall_time": round(done["elapsed"], 3), "sps": round(new / (time.perf_counter() - before))}
        row |= measures | {"learning_rate": learners.log_alpha.learning_rate.item()}
        row |= {"updates": done["updates"], "buffer": len(buffer)}
        row |= dict(zip(SECONDS, (seconds - seconds_before).round(4).tolist(), strict=True))
        run.record(row, episodes)

        # Evaluate.
        policy_state = {"script": Path(__file__).stem, "args": asdict(args), "step": step, "agent": agent.state_dict()}
        policy_state |= {"moments": moments.state(), "action_bounds": torch.from_numpy(np.stack((low, high)))}
        if step * args.num_evals // total > (step - new) * args.num_evals // total:
            evaluate_and_keep(args, run, directory, policy, policy_state, eval_envs, done)

        # Checkpoint.
        due = step // args.checkpoint_every > (step - new) // args.checkpoint_every
        stop = list(interrupts)  # looked at once: what stops the run has been saved
        if due or stop or step == total:
            arrays = {"observations": observations, "returns": returns, "lengths": lengths}
            done["saved"] = True
            checkpoint = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | policy_state
            checkpoint |= {"learners": [list(learner[1:]) for learner in learners[:3]], "target": learners.target}
            checkpoint |= {"buffer": buffer.state() if args.checkpoint_buffer else {}, "learn_from": learn_from}
            checkpoint |= {"environments": envs.state(), "recent": list(recent), "seconds": torch.from_numpy(seconds)}
            checkpoint |= {"random": torch.get_rng_state(), "sizes": run.sizes(), "done": done}
            if device.type == "cuda":
                checkpoint["cuda_random"] = torch.cuda.get_rng_state(device)
            save_checkpoint(directory / "checkpoint.pt", checkpoint)

        learnt = f"Q {row['q_value']:.1f}  alpha {row['alpha']:.3f}" if measured else ""
        run.progress(row, total, done, recent, learnt)
        if stop:
            command = shlex.join(["python", sys.argv[0], "--resume", str(directory)])
            run.say(f"stopped at step {step:,}; continue with\n  {command}")
            run.close()
            envs.close()
            raise SystemExit(128 + stop[0])

    finish(args, run, directory, total, done, recent, seconds)
    run.close()
    envs.close()
    return directory


# ------------------------------------------------------------------------------------------------- what is refused


def check(args: Args) -> None:
    """Refuses what cannot work, before anything is written."""
    check_numbers(
        args,
        at_least_1="num_envs threads eval_episodes checkpoint_every actor_sizes critic_sizes batch_size"
        " policy_frequency target_network_frequency",
        at_least_0="seed num_evals learning_starts",
        above_0="learning_rate policy_lr q_lr alpha updates_per_step",
        shares="gamma tau lr_warmup",
    )
    if args.buffer_size < 4 * args.num_envs:
        refuse(f"--buffer-size {args.buffer_size}: must be at least 4 x --num-envs, {4 * args.num_envs}")
    if args.total_timesteps < args.learning_starts + args.num_envs:
        starts = f"--learning-starts {args.learning_starts}, which is when learning begins"
        refuse(f"--total-timesteps {args.total_timesteps}: must be above {starts}")
    if 0 < (risen := args.lr_warmup * args.total_timesteps) <= args.learning_starts:
        end = f"ends at step {risen:,.0f}, before learning begins"
        refuse(f"--lr-warmup {args.lr_warmup:g}: {end}; must end after --learning-starts, {args.learning_starts}")
    check_setup(args)
    check_environments(args)


def check_environments(args: Args) -> None:
    """Makes one of each kind; refuses what cannot be made, drawn or acted in."""
    problem = f"--env-id {args.env_id}"
    try:
        env, eval_env = make_train_env(args), make_eval_env(args, "rgb_array" if args.capture_video else None)
        check_spaces(problem, env.observation_space, env.action_space)
        if env.observation_space.shape != eval_env.observation_space.shape or env.action_space != eval_env.action_space:
            refuse("--eval-env-kwargs: the evaluation environment must have the training environment's spaces")
        for name, each in (("env_kwargs", env), ("eval_env_kwargs", eval_env)):
            if getattr(args, name) != "{}":  # some values are no problem before they are used
                problem = f"{flag(name)} {getattr(args, name)}"
                each.reset(seed=0)
                each.step(each.action_space.sample())
        if args.capture_video:
            problem = f"--capture-video: {args.env_id} cannot be rendered here"
            eval_env.reset(seed=0)
            eval_env.render()
        if args.vec == "envpool":
            problem = f"--vec envpool: EnvPool cannot make {args.env_id}; use sync"
            spec = importlib.import_module("envpool").make_spec(args.env_id, **json.loads(args.env_kwargs))
            if spec.observation_space.shape != env.unwrapped.observation_space.shape:
                refuse(f"--vec envpool: its {args.env_id} does not observe what Gymnasium's does; use sync")
    except TypeError as error:  # an argument that the environment does not have
        refuse(f"--env-kwargs {args.env_kwargs}, --eval-env-kwargs {args.eval_env_kwargs}: {error}")
    except Exception as error:
        refuse(f"{problem}: {error}")
    env.close()
    eval_env.close()


def check_spaces(problem: str, observations: gym.Space, actions: gym.Space) -> None:
    if not isinstance(observations, gym.spaces.Box):
        refuse(f"{problem}: observes a {type(observations).__name__}; this script needs a Box")
    if not isinstance(actions, gym.spaces.Box):
        refuse(f"{problem}: acts in {actions}; this script needs a Box, ppo_discrete.py is for Discrete")
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        refuse(f"{problem}: acts in {actions}; this script needs finite bounds, ppo_continuous.py does not")
    if not np.issubdtype(actions.dtype, np.floating):
        refuse(f"{problem}: acts in {actions}; this script needs real numbers")


# From here on every script is the same.
# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(policy: Policy, envs: list[gym.Env], seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return and length of an episode in each of the environments, played side by side."""
    observations = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    returns, lengths = np.zeros(len(envs)), np.zeros(len(envs), int)
    running = list(range(len(envs)))
    while running:
        actions = policy(np.stack([observations[i] for i in running]))
        for i, action in zip(tuple(running), actions, strict=True):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                running.remove(i)
    return returns, lengths


def render(env: gym.Env) -> list[np.ndarray]:
    """What there is to see since the last time: of most environments one image."""
    images = env.render()
    return images if isinstance(images, list) else [images]


def film(policy: Policy, env: gym.Env, seed: int, path: Path) -> None:
    """Plays one episode into an mp4."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    path.parent.mkdir(exist_ok=True)
    (observation, _), ended = env.reset(seed=seed), False
    height, width, _ = render(env)[0].shape
    unfinished = path.with_name(f"unfinished-{path.name}")
    with FFMPEG_VideoWriter(str(unfinished), (width, height), env.metadata.get("render_fps", 30)) as video:
        while not ended:
            observation, _, terminated, truncated, _ = env.step(policy(observation[None])[0])
            for image in render(env):
                video.write_frame(image)
            ended = terminated or truncated
    unfinished.replace(path)


# --------------------------------------------------------------------------------------------------- run directory


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """The one before stays as `checkpoint.previous.pt`."""
    following = path.with_name(f"{path.stem}.next.pt")
    write_atomically(following, lambda file: torch.save(checkpoint, file))
    previous = path.with_name(f"{path.stem}.previous.pt")
    if path.exists():
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    following.replace(path)


def load_checkpoint(path: Path) -> dict:
    """On the CPU; a ValueError says in one line what is wrong with a torn or foreign file."""
    try:
        with zipfile.ZipFile(path) as records:
            if records.testzip():  # torch reads on over damaged numbers
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["args"]["env_id"], checkpoint["script"], checkpoint["agent"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is torn or not a checkpoint ({type(error).__name__})") from None
    return checkpoint


def git(*words: str) -> str | None:
    try:
        here = Path(__file__).resolve().parent
        result = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def create_run(args: Args, device: torch.device) -> Path:
    """Filled under another name and then renamed: a run directory is never half there."""
    source, runs = Path(__file__).resolve(), Path(args.runs_dir)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=runs))
    except OSError as error:
        refuse(f"--runs-dir {runs}: {error.strerror}; name a folder that can be written to")
    new.chmod(0o755)
    packages = ["torch", "gymnasium", "mujoco", "ale_py", "numpy", *(["envpool"] if args.vec == "envpool" else [])]
    shutil.copy(source, new)
    (new / "config.yaml").write_text(yaml.safe_dump(asdict(args), sort_keys=False))
    meta = {
        "script": source.stem,
        "command": shlex.join([sys.executable, *sys.argv]),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages if find_spec(name)},
        "host": platform.node(),
        "device": str(device),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    name = f"{re.sub('[/:]', '-', args.env_id)}__{source.stem}__{args.seed}"
    while (directory := runs / f"{name}__{datetime.now():%Y%m%d-%H%M%S}").exists():
        time.sleep(0.1)
    return new.rename(directory)


def find_run(args: Args) -> tuple[Path, dict]:
    """The run to resume and its last good checkpoint, which is empty if the run was killed before its first."""
    directory, problems = Path(args.resume), []
    checkpoint_path = directory / "checkpoint.pt"
    for path in (checkpoint_path, directory / "checkpoint.previous.pt"):
        try:
            checkpoint = load_checkpoint(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        script, env_id = checkpoint["script"], checkpoint["args"]["env_id"]
        if (script, env_id) != (Path(__file__).stem, args.env_id):
            refuse(f"--resume {directory}: {path.name} is of {script} on {env_id}, not of this run")
        if path != checkpoint_path:
            print(f"--resume: {problems[0] if problems else 'no checkpoint.pt'}; using {path.name}", file=sys.stderr)
            path.replace(checkpoint_path)
        return directory, checkpoint
    if problems:
        refuse(f"--resume {directory}: {problems[0]}, and there is no good one before it; start a new run")
    return directory, {}


class Run:
    """What a run directory collects while the run goes on; after a resume, from where the checkpoint left it."""

    def __init__(self, args: Args, directory: Path, sizes: dict[str, int], step: int):
        self.tracker = None
        if args.track:
            import wandb

            settings = {"project": args.wandb_project_name, "name": directory.name, "id": directory.name}
            self.tracker = wandb.init(**settings, resume="allow", config=asdict(args), sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        self.live, self.said = sys.stdout.isatty(), time.monotonic()
        self.log = (directory / "run.log").open("a")
        self.tensorboard = SummaryWriter(str(directory), purge_step=step + 1)
        self.tables = {}
        for name, columns in TABLES.items():
            file = (directory / f"{name}.csv").open("a", newline="")
            file.truncate(sizes.get(name, 0))  # rows after the checkpoint will be written again
            file.seek(0, os.SEEK_END)
            self.tables[name] = csv.DictWriter(file, columns), file
            if not sizes.get(name):
                self.tables[name][0].writeheader()

    def add(self, table: str, rows: list[dict]) -> None:
        writer, file = self.tables[table]
        writer.writerows(rows)
        file.flush()

    def record(self, row: dict, episodes: list[dict]) -> None:
        """A row of progress and the episodes that ended meanwhile, in the tables and in TensorBoard."""
        self.add("progress", [row])
        self.add("episodes", episodes)
        self.plot("charts/episodic_", episodes)
        measured = {name: row[name] for name in MEASURES if not math.isnan(row[name])}
        self.plot("losses/", [{"step": row["step"]} | measured])
        self.plot("charts/", [{name: value for name, value in row.items() if name not in MEASURES}])

    def plot(self, prefix: str, rows: list[dict]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.tensorboard.add_scalar(prefix + name, value, row["step"])

    def sizes(self) -> dict[str, int]:
        for _, file in self.tables.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, (_, file) in self.tables.items()}

    def say(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, flush=True)
        self.log.writelines(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n" for line in text.splitlines())
        self.log.flush()

    def progress(self, row: dict, total: int, done: dict, recent: Sequence[float], learnt: str) -> None:
        """A live line on a terminal; elsewhere, and in the log, a line every half minute."""
        step = row["step"]
        left = timedelta(seconds=round(done["elapsed"] / step * (total - step)))
        text = f"{step:>11,} {step / total:4.0%}  {row['sps']:,} steps/s  ETA {left}"
        text += f"  return {statistics.fmean(recent):.1f}" if recent else "  return -"
        text += f"  evaluation {done['evaluation']['mean']:.1f}" if done["evaluation"] else ""
        text += f"  {learnt}"
        if time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            self.say(text)
        elif self.live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def close(self) -> None:
        self.tensorboard.close()
        if self.tracker:
            self.tracker.finish()
        for file in (self.log, *(file for _, file in self.tables.values())):
            file.close()


def evaluate_and_keep(
    args: Args, run: Run, directory: Path, policy: Policy, state: dict, envs: list[gym.Env], done: dict
) -> None:
    """Evaluates the policy whose `state` this is, and keeps it: among the others, and as the best if it is that."""
    seeds = range(10_000, 10_000 + len(envs))
    returns, lengths = (result.tolist() for result in evaluate(policy, envs, seeds))
    rows = zip([state["step"]] * len(envs), range(len(envs)), seeds, returns, lengths, strict=True)
    run.add("evaluations", [dict(zip(TABLES["evaluations"], row, strict=True)) for row in rows])
    done["evaluation"] = {"step": state["step"], "mean": statistics.fmean(returns), "std": statistics.pstdev(returns)}
    run.plot("charts/evaluation_", [done["evaluation"]])
    name = f"step-{state['step']:09d}"
    write_atomically(directory / "policies" / f"{name}.pt", partial(torch.save, state))
    if not done["best"] or done["evaluation"]["mean"] > done["best"]["mean"]:
        done["best"] = done["evaluation"]
        write_atomically(directory / "best.pt", partial(torch.save, state))
    if args.capture_video:
        try:
            env = make_eval_env(args, "rgb_array")
            film(policy, env, seeds[np.argmax(returns)], directory / "videos" / f"{name}.mp4")
            env.close()
        except OSError as error:
            run.say(f"no video of step {state['step']:,}: {str(error).splitlines()[0]}")


def finish(
    args: Args, run: Run, directory: Path, steps: int, done: dict, recent: Sequence[float], seconds: np.ndarray
) -> None:
    """Writes and says what the run came to."""
    elapsed, evaluation, best = done["elapsed"], done["evaluation"], done["best"]
    summary = {"script": Path(__file__).stem, "env_id": args.env_id, "seed": args.seed, "steps": steps}
    summary |= {"wall_time": elapsed, "sps": steps / elapsed, "evaluation": evaluation, "best": best}
    summary |= {"training_return": statistics.fmean(recent) if recent else None}
    summary |= dict(zip(SECONDS, seconds.tolist(), strict=True))
    write_atomically(directory / "result.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    stepping, acting, updating = seconds / elapsed
    run.say(
        f"{steps:,} steps in {timedelta(seconds=round(elapsed))}, {summary['sps']:,.0f} steps/s:"
        f" stepping {stepping:.0%}, acting {acting:.0%}, updating {updating:.0%}"
    )
    if evaluation:
        final = f"evaluation {evaluation['mean']:.1f} ± {evaluation['std']:.1f}"
        run.say(f"{final}, best {best['mean']:.1f} at step {best['step']:,}")


def catch_interrupts() -> list[int]:
    """Collects SIGINT and SIGTERM, for a run to stop where it can be resumed; a second one stops it at once."""
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


# ------------------------------------------------------------------------------------------------------- arguments


def refuse(problem: str) -> NoReturn:
    """A user's mistake: one line, whatever lines a library's error has, and exit status 2."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_flags(words: list[str] | None, origin: str = "", **default: Args) -> Args:
    """By tyro; what it writes about a mistake into a box of several parts becomes one line."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(Args, args=words, description=__doc__, **default)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"\033\[[\d;]*m|[│╭╮╰╯]", " ", printed.getvalue())
        _, *parts = (" ".join(part.split()) for part in re.split("─{5,}|-{5,}", text))
        refuse(origin + "; ".join(part for part in parts if part and not part.startswith("For full helptext")))


def read_config(path: Path) -> list[str]:
    """A file of arguments as a command line."""
    try:
        settings = dict(yaml.safe_load(path.read_text()) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        refuse(f"--config {path}: {error}")
    names = [field.name for field in fields(Args)]
    command = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            refuse(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if isinstance(value, bool):
            command.append(flag(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            command += [flag(name), *map(str, values)]
    return command


def parse(argv: list[str] | None = None) -> Args:
    """The defaults, or the file of `--config`, or the run of `--resume`; the command line wins."""
    args = read_flags(argv)
    if args.resume:
        run = Path(args.resume)
        if not (run / "meta.json").is_file():
            refuse(f"--resume {run}: not a run directory (it has no meta.json)")
        script = json.loads((run / "meta.json").read_text())["script"]
        if script != Path(__file__).stem:
            refuse(f"--resume {run}: this is a run of {script}; resume it with {script}.py")
        started = read_flags(read_config(run / "config.yaml"), f"--resume {run}: ")
        args = read_flags(argv, default=started)
        free = "resume device threads compile num_evals eval_episodes checkpoint_every capture_video track runs_dir"
        for name, value in asdict(started).items():
            if getattr(args, name) != value and name not in free.split():
                refuse(f"--resume {run}: {flag(name)} is {value} in that run and cannot become {getattr(args, name)}")
    elif args.config:
        args = read_flags(argv, default=read_flags(read_config(Path(args.config)), f"--config {args.config}: "))
    return args


def check_numbers(args: Args, at_least_1: str, at_least_0: str, above_0: str, shares: str) -> None:
    """Refuses what is out of range. Of a tuple every value counts, and None is a setting that is off."""
    rules = {"must be at least 1": (at_least_1, lambda value: 1 <= value < math.inf)}
    rules["must be at least 0"] = at_least_0, lambda value: 0 <= value < math.inf
    rules["must be above 0"] = above_0, lambda value: 0 < value < math.inf
    rules["must be between 0 and 1"] = shares, lambda value: 0 <= value <= 1
    for rule, (names, holds) in rules.items():
        for name in names.split():
            value = getattr(args, name)
            if not all(map(holds, value if isinstance(value, tuple) else () if value is None else (value,))):
                refuse(f"{flag(name)} {value}: {rule}")
    if args.seed >= 2**31:  # EnvPool's have 32 bits
        refuse(f"--seed {args.seed}: must be below {2**31}")


def check_setup(args: Args) -> None:
    """Refuses what this machine lacks, and what is not JSON."""
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here; use auto or cpu")
    needs = [("vec", "envpool", args.vec == "envpool"), ("track", "wandb", args.track)]
    needs += [("capture_video", "moviepy", args.capture_video)]
    for name, package, wanted in needs:
        if wanted and not find_spec(package):
            refuse(f"{flag(name)} {getattr(args, name)}: {package} is not installed; pip install {package}")
    if args.vec == "envpool":
        warnings.filterwarnings("ignore", message=".*precision lowered by casting")  # of CartPole's infinite bounds
    for name in ("env_kwargs", "eval_env_kwargs"):
        try:
            dict(**json.loads(getattr(args, name)))
        except (ValueError, TypeError):
            refuse(f"{flag(name)} {getattr(args, name)}: must be a JSON object such as '{{\"frame_skip\": 4}}'")
    if args.capture_video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        if find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # which Gymnasium's pygame environments draw with


if __name__ == "__main__":
    train(interrupts=catch_interrupts(), args=parse())
