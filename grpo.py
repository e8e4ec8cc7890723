# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "tyro", "pyyaml",
#     "tensorboard", "moviepy"
# ]
# ///
"""Group-relative policy optimisation (GRPO): no critic; whole episodes are judged by those beside them.

    python grpo.py --env-id CartPole-v1
    python grpo.py --env-id Pendulum-v1 --distribution beta
    python grpo.py --resume runs/CartPole-v1__grpo__1__20260101-120000

Shao et al. 2024, https://arxiv.org/abs/2402.03300 (outcome and process advantages); https://arxiv.org/abs/2503.20783
(what normalising by deviations and lengths distorts).

The algorithm ends with `train`; what follows keeps, evaluates and checks, and is much the same in every script.

What may surprise:
- An iteration is `num_groups` x `group_size` whole episodes, however long they are; the run ends with the iteration
  that reaches `total_timesteps`. Only the steps of these episodes are counted.
- The members of a group get one seed (`--identical-start`): they begin alike and meet the same chance, but act each
  with noise of its own.
- Nothing bootstraps: what would have come after a time limit counts as nothing.
- The statistics that normalise observations change once per iteration, after its update; nothing shifts within it.
- All parameters are views of one vector, `theta`, so that Adam and the gradient's norm are a few vector operations.
"""

import copy
import csv
import difflib
import importlib
import io
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
from collections.abc import Callable, Iterator, Sequence
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


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """Gymnasium id of the environment; `module:Id-v0` imports the module first"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'"""
    eval_env_kwargs: str = "{}"
    """arguments of the evaluation environment that differ, as JSON"""
    num_envs: int | None = None
    """environments stepped together; by default one for each episode of an iteration, at most 64"""
    vec: Literal["sync", "async", "envpool"] = "sync"
    """how they are stepped: in turn, in a process each, or by EnvPool"""
    total_timesteps: int = 1_000_000
    """environment steps, over all environments; the iteration that reaches them is the last"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks are"""
    threads: int = 1
    """torch threads; small networks are fastest with one"""
    compile: bool = True
    """compile the update (needs a C++ compiler; 3 to 20 s at the start)"""

    num_groups: int = 2
    """groups of episodes per iteration"""
    group_size: int = 8
    """episodes in a group, which are compared with each other"""
    identical_start: bool = True
    """the episodes of a group begin with the same seed; what they do is their own"""
    max_episode_steps: int | None = None
    """where training cuts episodes; by default where the environment does, as evaluation does"""
    learning_rate: float = 1e-3
    """Adam's step size at the start"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls; linear and cosine end at 0"""
    lr_warmup: float = 0.0
    """share of the run over which the learning rate first rises from 0"""
    minibatch_size: int = 512
    """most steps in a minibatch; an iteration's are shared out evenly"""
    update_epochs: int = 4
    """passes over each iteration's steps"""

    advantage: Literal["outcome", "process", "hybrid", "rtg"] = "rtg"
    """by the episode's return, normalised rewards to come, both, or the return to come"""
    gamma: float = 0.99
    """discount of rewards to come; an outcome is not discounted"""
    process_norm: Literal["timestep", "group"] = "group"
    """rewards are normalised among the group's at that time, or among all of the group's"""
    baseline: Literal["mean", "loo"] = "mean"
    """what the group's mean is taken over: all of it, or all others (leave one out); under `advantage_norm` the
    advantages of rtg and outcome come out the same"""
    advantage_norm: Literal["none", "group", "batch"] = "batch"
    """what advantages are brought to mean 0 and deviation 1 over"""
    hybrid_alpha: float = 0.5
    """exponent of the outcome's part in a hybrid advantage"""
    hybrid_beta: float = 0.5
    """exponent of the step's part"""
    hybrid_clip: float = 5.0
    """bound of a hybrid advantage before it is normalised"""
    loss_weight: Literal["step", "episode", "constant"] = "step"
    """every step weighs the same, every episode does, or a step counts as one of the longest possible episode's"""

    clip_coef: float = 0.2
    """epsilon of the clipped objective"""
    clip_coef_high: float | None = None
    """epsilon above 1, where it is another"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: float = 0.0
    """weight of the KL divergence from the reference policy; at the start, with a `target_kl`"""
    kl_estimator: Literal["closed", "k3"] = "closed"
    """its closed form, or the estimate from the actions taken"""
    ref_update_every: int = 1
    """iterations between two reference policies, each the policy of its time"""
    target_kl: float | None = None
    """divergence from the reference at the end of an iteration that `kl_coef` is adapted to"""
    stop_kl: float | None = None
    """end an iteration's update once a minibatch's divergence from the policy that played exceeds this"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    norm_obs: bool = True
    """normalise observations by their running mean and deviation"""
    actor_sizes: tuple[int, ...] = (64, 64)
    """hidden layers of the policy"""
    distribution: Literal["normal", "beta"] = "normal"
    """of Box actions; Beta needs finite bounds"""
    log_std_init: float = -0.5
    """logarithm of the normal policy's first standard deviation"""
    log_std_min: float = -2.0
    """the logarithm never falls below this: a policy that no longer varies no longer learns to recover"""

    num_evals: int = 10
    """evaluations during the run, evenly spaced, the last at its end; 0 for none"""
    eval_episodes: int = 10
    """episodes per evaluation: deterministic, with the same seeds each time"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints"""
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
    env = make_env(args.env_id, json.loads(args.env_kwargs) | json.loads(args.eval_env_kwargs), render_mode)
    endless = args.max_episode_steps and not env.spec.max_episode_steps
    return gym.wrappers.TimeLimit(env, args.max_episode_steps) if endless else env


class WithoutInfo(gym.Wrapper):
    """Drops what training does not read, and what a vector environment spends a tenth of its time on collecting."""

    def step(self, action: np.ndarray) -> tuple:
        return *self.env.step(action)[:4], {}


def make_train_env(args: Args) -> gym.Env:
    return WithoutInfo(make_env(args.env_id, json.loads(args.env_kwargs)))


class Slots:
    """Environments side by side, any of which begin an episode or step while the others rest."""

    def __init__(self, args: Args, num_envs: int):
        one = partial(make_train_env, args)
        if args.vec == "sync":
            self.envs = [one() for _ in range(num_envs)]
        elif args.vec == "async":  # those that rest play on, unseen, and so they do in EnvPool
            mode = gym.vector.AutoresetMode.NEXT_STEP
            self.envs = gym.vector.AsyncVectorEnv([one] * num_envs, copy=False, autoreset_mode=mode)
        else:
            import envpool

            kwargs = json.loads(args.env_kwargs)
            self.envs = envpool.make(args.env_id, "gymnasium", num_envs=num_envs, seed=args.seed, **kwargs)
        self.num_envs, self.kind = num_envs, args.vec
        self.last: np.ndarray | None = None  # each environment's last action

    def begin(self, slots: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """An episode from each seed; their first observations, (n, D)."""
        if self.kind == "sync":
            observations = [self.envs[n].reset(seed=seed)[0] for n, seed in zip(slots, seeds.tolist(), strict=True)]
            return np.array(observations).reshape(len(slots), -1)
        if self.kind == "envpool":
            return self.envs.reset(slots)[0].reshape(len(slots), -1)
        every, which = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        every[slots], which[slots] = seeds, True
        observations, _ = self.envs.reset(seed=every.tolist(), options={"reset_mask": which})
        return observations.reshape(self.num_envs, -1)[slots]

    def step(self, slots: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The true next observations (n, D), rewards, terminated, truncated."""
        if self.kind == "sync":
            results = [self.envs[n].step(action) for n, action in zip(slots, actions, strict=True)]
            observations, rewards, terminated, truncated, _ = map(np.array, zip(*results, strict=True))
            return observations.reshape(len(slots), -1), rewards, terminated, truncated
        if self.last is None:
            self.last = np.repeat(actions[:1], self.num_envs, 0)
        self.last[slots] = actions
        observations, *results, _ = self.envs.step(self.last)
        return observations.reshape(self.num_envs, -1)[slots], *(result[slots] for result in results)

    def close(self) -> None:
        for env in self.envs if self.kind == "sync" else [self.envs]:
            env.close()


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


def mlp(sizes: tuple[int, ...], last_scale: float) -> nn.Sequential:
    """Linear and tanh layers with orthogonal weights, scaled by √2 and, in the last layer, by `last_scale`."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        layer = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(layer.weight, last_scale if last else math.sqrt(2))
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


class Categorical:
    """Of Discrete actions; the outputs are logits, (B, K)."""

    def __init__(self, outputs: Tensor):
        self.logprobs = outputs.log_softmax(-1)

    def sample(self) -> Tensor:  # where log p + Gumbel noise is largest
        return (self.logprobs - torch.empty_like(self.logprobs).exponential_().log()).argmax(-1)

    def best(self) -> Tensor:
        return self.logprobs.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logprobs.exp() * self.logprobs).sum(-1)

    def kl(self, other: "Categorical") -> Tensor:
        return (self.logprobs.exp() * (self.logprobs - other.logprobs)).sum(-1)

    @staticmethod
    def within(space: gym.spaces.Discrete, actions: np.ndarray) -> np.ndarray:
        return actions + space.start


class Normal:
    """Of Box actions; the outputs are means and logarithms of deviations, (B, 2A)."""

    def __init__(self, outputs: Tensor):
        self.mean, self.log_std = outputs.chunk(2, -1)

    def sample(self) -> Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def best(self) -> Tensor:
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Normal") -> Tensor:
        square = (2 * self.log_std).exp() + (self.mean - other.mean) ** 2
        return (other.log_std - self.log_std + 0.5 * square * (-2 * other.log_std).exp() - 0.5).sum(-1)

    @staticmethod
    def within(space: gym.spaces.Box, actions: np.ndarray) -> np.ndarray:
        return actions.reshape(-1, *space.shape).clip(space.low, space.high)


class Beta:
    """Of Box actions, from 0 at the lower bound to 1 at the upper; the outputs, (B, 2A), give alpha and beta."""

    def __init__(self, outputs: Tensor):
        self.alpha, self.beta = (nn.functional.softplus(outputs) + 1).chunk(2, -1)

    def sample(self) -> Tensor:
        gamma = torch._standard_gamma(torch.stack((self.alpha, self.beta)))
        return (gamma[0] / gamma.sum(0)).clamp(2**-24, 1 - 2**-24)  # what rounding would make 0 or 1 stays next to it

    def best(self) -> Tensor:
        return self.alpha / (self.alpha + self.beta)

    def log_norm(self) -> Tensor:
        """ln B(alpha, beta), what normalises the density x^(alpha-1) (1-x)^(beta-1)."""
        return torch.lgamma(self.alpha) + torch.lgamma(self.beta) - torch.lgamma(self.alpha + self.beta)

    def log_prob(self, actions: Tensor) -> Tensor:
        logs = (self.alpha - 1) * actions.log() + (self.beta - 1) * torch.log1p(-actions)
        return (logs - self.log_norm()).sum(-1)

    def cross_entropy(self, other: "Beta") -> Tensor:
        """-E[ln p_other(x)], of which the parts are E[ln x] and E[ln(1 - x)]."""
        total = torch.digamma(self.alpha + self.beta)
        log_x, log_rest = torch.digamma(self.alpha) - total, torch.digamma(self.beta) - total
        return (other.log_norm() - (other.alpha - 1) * log_x - (other.beta - 1) * log_rest).sum(-1)

    def entropy(self) -> Tensor:
        return self.cross_entropy(self)

    def kl(self, other: "Beta") -> Tensor:
        return self.cross_entropy(other) - self.entropy()

    @staticmethod
    def within(space: gym.spaces.Box, actions: np.ndarray) -> np.ndarray:
        unit = actions.astype(np.float64).reshape(-1, *space.shape)
        return (space.low * (1 - unit) + space.high * unit).astype(space.dtype)


class Agent(nn.Module):
    """A policy: from observations to the outputs that `kind` makes a distribution of."""

    def __init__(self, args: Args, observation_size: int, space: gym.Space):
        super().__init__()
        discrete = isinstance(space, gym.spaces.Discrete)
        self.kind = Categorical if discrete else {"normal": Normal, "beta": Beta}[args.distribution]
        size = int(space.n) if discrete else math.prod(space.shape)
        outputs = 2 * size if self.kind is Beta else size
        self.actor = mlp((observation_size, *args.actor_sizes, outputs), last_scale=0.01)
        if self.kind is Normal:
            self.log_std = nn.Parameter(torch.full((size,), args.log_std_init))

    def forward(self, observations: Tensor) -> Tensor:
        outputs = self.actor(observations)
        return torch.cat((outputs, self.log_std.expand_as(outputs)), -1) if self.kind is Normal else outputs


class Rollout(NamedTuple):
    """The steps of M episodes, in the order in which they were made, and what became of the episodes."""

    raw: np.ndarray  # (B, D), observations as the environment shows them
    observations: Tensor  # (B, D), as the policy sees them
    actions: Tensor  # (B,) or (B, A)
    rewards: np.ndarray  # (B,)
    episodes: np.ndarray  # (B,), whose step it is
    times: np.ndarray  # (B,), which of its steps
    lengths: np.ndarray  # (M,)
    ended_at: np.ndarray  # (M,), steps of all episodes by then


def play(
    agent: Agent,
    moments: RunningMoments,
    slots: Slots,
    space: gym.Space,
    seeds: np.ndarray,
    limit: int,
    seconds: np.ndarray,
) -> Rollout:
    """An episode from each seed, cut at `limit` steps. A slot whose episode is over takes the next that waits."""
    M, N, device = len(seeds), slots.num_envs, next(agent.parameters()).device
    lengths, ended_at = np.zeros(M, int), np.zeros(M, int)
    played = np.full(N, -1)  # the episode in each slot, or -1
    current: np.ndarray | None = None  # (N, D)
    begun, steps, parts = 0, 0, []
    while begun < M or (played >= 0).any():
        clock = time.perf_counter()
        if begun < M and (played < 0).any():
            free = np.flatnonzero(played < 0)[: M - begun]
            played[free] = np.arange(begun, begun + len(free))
            begun += len(free)
            first = slots.begin(free, seeds[played[free]])
            current = np.zeros((N, first.shape[1]), first.dtype) if current is None else current
            current[free] = first
        seconds[0] += time.perf_counter() - clock

        clock = time.perf_counter()
        busy = np.flatnonzero(played >= 0)
        episodes, observations = played[busy], current[busy]
        normalised = torch.tensor(moments.normalise(observations), device=device)
        actions = agent.kind(agent(normalised)).sample()
        chosen = agent.kind.within(space, actions.cpu().numpy())
        seconds[1] += time.perf_counter() - clock

        clock = time.perf_counter()
        current[busy], rewards, terminated, truncated = slots.step(busy, chosen)
        parts.append((observations, normalised, actions, rewards, episodes, lengths[episodes]))
        lengths[episodes] += 1
        steps += len(busy)
        over = terminated | truncated | (lengths[episodes] == limit)
        ended_at[episodes[over]] = steps
        played[busy[over]] = -1
        seconds[0] += time.perf_counter() - clock
    raw, observations, actions, rewards, episodes, times = zip(*parts, strict=True)
    flat = map(np.concatenate, (rewards, episodes, times))
    return Rollout(np.concatenate(raw), torch.cat(observations), torch.cat(actions), *flat, lengths, ended_at)


def to_come(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + γ G_{t+1} along the last axis."""
    sums, following = np.empty_like(rewards), np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        sums[..., t] = following = rewards[..., t] + gamma * following
    return sums


def centred(values: np.ndarray, counted: np.ndarray, axes: tuple[int, ...], loo: bool) -> np.ndarray:
    """Values (P, G, T) minus the mean of those `counted` over `axes`; of those of the group's others if `loo`.

    What is left by rounding is 0: normalised, it would be as large as any advantage.
    """
    values, within = np.where(counted, values, 0.0), tuple(axis for axis in axes if axis != 1)
    total, count = values.sum(axes, keepdims=True), counted.sum(axes, keepdims=True)
    if loo:
        total, count = total - values.sum(within, keepdims=True), count - counted.sum(within, keepdims=True)
    distances = values - total / np.maximum(count, 1)
    rounding = np.abs(distances) <= 1e-9 * np.abs(values).max(axes, keepdims=True)
    return np.where(counted & ~rounding, distances, 0.0)


def standardised(values: np.ndarray, counted: np.ndarray, axes: tuple[int, ...], loo: bool = False) -> np.ndarray:
    """The same, divided by their deviation over all of the group; 0 where they do not differ."""
    distances = centred(values, counted, axes, loo=False)
    count = np.maximum(counted.sum(axes, keepdims=True), 1)
    deviation = np.sqrt((distances**2).sum(axes, keepdims=True) / count)
    distances = centred(values, counted, axes, loo)
    return np.divide(distances, deviation, out=np.zeros_like(distances), where=deviation != 0)


def group_advantages(args: Args, rewards: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An advantage for every step of every episode, all (P, G, T); what is not `alive` plays no part and gets 0.

    Before `advantage_norm`, and after it.
    """
    rewards, loo = np.where(alive, rewards, 0.0), args.baseline == "loo"
    returns, each = rewards.sum(-1, keepdims=True), np.ones_like(alive[..., :1])  # (P, G, 1)
    counted = each if args.advantage == "outcome" else alive
    if args.advantage == "outcome":
        advantages = centred(returns, each, (1,), loo)
    elif args.advantage == "rtg":  # ended episodes have nothing to come, and are compared with all the same
        advantages = centred(to_come(rewards, args.gamma), np.ones_like(alive), (1,), loo)
    else:
        over = (1,) if args.process_norm == "timestep" else (1, 2)
        advantages = to_come(standardised(rewards, alive, over, loo), args.gamma)
        if args.advantage == "hybrid":
            advantages = hybrid(args, standardised(returns, each, (1,), loo), advantages)
    normalised = advantages
    if args.advantage_norm != "none":
        normalised = standardised(advantages, counted, (1, 2) if args.advantage_norm == "group" else (0, 1, 2))
    return np.where(alive, advantages, 0.0), np.where(alive, normalised, 0.0)


def hybrid(args: Args, outcome: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Positive if and only if both are."""
    sign = np.where((outcome > 0) & (step > 0), 1.0, -1.0)
    magnitude = np.abs(outcome) ** args.hybrid_alpha * np.abs(step) ** args.hybrid_beta
    return sign * magnitude.clip(max=args.hybrid_clip)


def step_weights(args: Args, lengths: np.ndarray, limit: int) -> np.ndarray:
    """What a step of each episode weighs: on average 1, or less if the steps count that were not made (`constant`)."""
    if args.loss_weight == "episode":
        return lengths.mean() / lengths
    return np.full(len(lengths), lengths.mean() / limit if args.loss_weight == "constant" else 1.0)


class Batch(NamedTuple):
    observations: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    logprobs: Tensor  # (B,), by the policy that played
    advantages: Tensor  # (B,)
    weights: Tensor  # (B,), 0 for a row that only fills a minibatch
    reference: Tensor  # (B, K), the reference policy's outputs


def grpo_loss(
    parameters: dict[str, Tensor], agent: Agent, args: Args, batch: Batch, kl_coef: Tensor
) -> tuple[Tensor, tuple]:
    policy = agent.kind(functional_call(agent, parameters, (batch.observations,)))
    reference = agent.kind(batch.reference)
    rows = (batch.weights > 0).sum()

    def mean(values: Tensor) -> Tensor:
        return (batch.weights * values).sum() / rows

    logprobs = policy.log_prob(batch.actions)
    logratio = logprobs - batch.logprobs
    ratio = logratio.exp()
    high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
    clipped = ratio.clamp(1 - args.clip_coef, 1 + high)
    policy_loss = -mean(torch.min(ratio * batch.advantages, clipped * batch.advantages))

    if args.kl_estimator == "closed":
        penalty = policy.kl(reference)
    else:  # r - ln r - 1, r = π_ref / π, http://joschu.net/blog/kl-approx.html
        log_r = reference.log_prob(batch.actions) - logprobs
        penalty = log_r.exp() - log_r - 1
    entropy = policy.entropy()
    loss = policy_loss + kl_coef * mean(penalty) - args.ent_coef * mean(entropy)
    used = (batch.weights > 0).float() / rows
    kl = (used * (ratio - 1 - logratio)).sum()
    clip_fraction = (used * (ratio != clipped)).sum()
    return loss, (policy_loss, (used * entropy).sum(), kl, clip_fraction)


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


def parameters_of(agent: Agent, theta: Tensor) -> dict[str, Tensor]:
    """The vector `theta` as the agent's parameters."""
    names, shapes = zip(*((name, parameter.shape) for name, parameter in agent.named_parameters()), strict=True)
    pieces = theta.split([shape.numel() for shape in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}


def update(agent: Agent, args: Args, learner: Learner, minibatch: Batch, kl_coef: Tensor) -> Tensor:
    """One step of Adam; returns what was measured before it."""
    theta = learner.theta.detach().requires_grad_()
    loss, measures = grpo_loss(parameters_of(agent, theta), agent, args, minibatch, kl_coef)
    (gradient,) = torch.autograd.grad(loss, theta)
    norm = gradient.norm()
    learner.adam_step(gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), eps=1e-5)
    return torch.stack((*measures, norm)).detach()


def filled(batch: Batch, rows: Tensor, size: int) -> Batch:
    """These rows of the batch, and others without weight that make them `size`."""
    indices = torch.cat((rows, rows[:1].expand(size - len(rows))))
    minibatch = Batch(*(column.index_select(0, indices) for column in batch))
    minibatch.weights[len(rows) :] = 0
    return minibatch


def minibatches(batch: Batch, size: int) -> Iterator[Batch]:
    """All rows once, in random order, shared out evenly over as few minibatches as it takes."""
    B, device = len(batch.weights), batch.weights.device
    for rows in torch.randperm(B, device=device).tensor_split(math.ceil(B / size)):
        yield filled(batch, rows, size)


def compile_update(args: Args, agent: Agent, batch: Batch, say: Callable[[str], None]) -> Callable:
    """Compiles by a call on copies of everything. Where that is impossible, says so and returns what there is."""
    started = time.perf_counter()
    try:
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward become one graph
        on_cpu = next(agent.parameters()).device.type == "cpu"  # there, calling many small kernels from Python costs
        fast = torch.compile(update, fullgraph=True, dynamic=False, options={"cpp_wrapper": on_cpu})
        fast(agent, args, Learner.of(copy.deepcopy(agent)), batch, torch.zeros((), device=batch.weights.device))
    except Exception as error:
        say(f"compiling is impossible here, so the run is slower: {' '.join(str(error).split())[:100]}")
        return update
    say(f"the update compiled in {time.perf_counter() - started:.1f} s")
    return fast


def adapted(kl_coef: float, kl: float, target: float) -> float:
    """The penalty's weight for the next iteration: larger after too much divergence, smaller after too little."""
    factor = 1.5 if kl > 1.5 * target else 1 / 1.5 if kl < target / 1.5 else 1.0
    return min(max(kl_coef * factor, 1e-4), 100.0)


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Policy:
    """What is deployed: a batch of observations to actions, with the normaliser frozen inside.

    Deterministic, unless asked for a `sample` of the actions as in training.
    """

    def __init__(self, agent: Agent, moments: RunningMoments, space: gym.Space):
        self.agent, self.moments, self.space = agent, moments, space

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        # Torch's own memory: a matrix product's last bits depend on the alignment, which numpy's memory lacks.
        flat = self.moments.normalise(observations.reshape(len(observations), -1))
        with torch.no_grad():
            outputs = self.agent(torch.tensor(flat, device=next(self.agent.parameters()).device))
            policy = self.agent.kind(outputs)
            actions = policy.sample() if sample else policy.best()
        return self.agent.kind.within(self.space, actions.cpu().numpy())


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args = Args(**checkpoint["args"])
    if "choices" in checkpoint:
        space = gym.spaces.Discrete(checkpoint["choices"], start=checkpoint["first_choice"])
    else:
        space = gym.spaces.Box(*checkpoint["action_bounds"].numpy())
    moments = RunningMoments(checkpoint["moments"]["mean"].shape, args.norm_obs)
    moments.restore(checkpoint["moments"])
    agent = Agent(args, moments.mean.size, space)
    agent.load_state_dict(checkpoint["agent"])
    return Policy(agent.to(device), moments, space)


# -------------------------------------------------------------------------------------------------------- training

MEASURES = ["policy_loss", "entropy", "kl", "clip_fraction", "grad_norm"]
STATE = ["reference_kl", "kl_coef", "advantage_mean", "advantage_positive", "degenerate_groups"]
STATE += ["episode_length", "alive_at_quarter", "alive_at_half", "alive_at_three_quarters", "learning_rate", "updates"]
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
    directory, saved = find_run(args) if args.resume else (create_run(args, device), {})
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    eval_envs = [make_eval_env(args) for _ in range(args.eval_episodes)]
    probe = make_train_env(args)
    space, D = probe.action_space, math.prod(probe.observation_space.shape)
    limit = min(filter(None, (args.max_episode_steps, probe.spec.max_episode_steps)))
    probe.close()
    P, G = args.num_groups, args.group_size
    N = args.num_envs or min(P * G, 64)

    agent = Agent(args, D, space).requires_grad_(False).to(device)
    learner = Learner.of(agent)
    reference, reference_moments = learner.theta.clone(), RunningMoments((D,), args.norm_obs)
    kl_coef = torch.tensor(args.kl_coef, device=device)
    moments = RunningMoments((D,), args.norm_obs)
    policy = Policy(agent, moments, space)
    slots = Slots(replace(args, seed=(args.seed + saved.get("step", 0)) % 2**31), N)  # else EnvPool repeats itself
    starts = np.random.default_rng(args.seed)
    recent: deque[float] = deque(maxlen=100)  # returns of the last finished episodes
    seconds = np.zeros(3)  # stepping, acting, updating
    done = {"iteration": 0, "step": 0, "elapsed": 0.0, "updates": 0, "evaluation": {}, "best": {}}
    done |= {"saved": False, "warned": False}
    run = Run(args, directory, saved.get("sizes", {}), saved.get("step", 0))
    if saved:
        (directory / "result.json").unlink(missing_ok=True)
        agent.load_state_dict(saved["agent"])
        for tensor, value in zip((*learner[1:], reference, kl_coef), saved["learner"], strict=True):
            tensor.copy_(value)
        moments.restore(saved["moments"])
        reference_moments.restore(saved["reference_moments"])
        starts.bit_generator.state = saved["starts"]
        recent.extend(saved["recent"])
        seconds, done = saved["seconds"].numpy(), saved["done"]
        torch.set_rng_state(saved["random"])
        if device.type == "cuda" and "cuda_random" in saved:
            torch.cuda.set_rng_state(saved["cuda_random"], device)
        if args.vec == "envpool":
            run.say("--vec envpool cannot repeat its episodes; other ones follow, all else continues")

    run.say(
        f"{Path(__file__).stem}  {args.env_id}  {D} observations, actions in {space}\n"
        f"{P} groups of {G} episodes of at most {limit} steps, in {N} environments ({args.vec}),"
        f" {args.update_epochs} epochs of minibatches of {args.minibatch_size},"
        f" {learner.theta.numel():,} parameters, {device}\n{directory}"
    )

    fast_update = update
    if args.compile:
        observations, *columns = (torch.zeros(args.minibatch_size, *size, device=device) for size in ((D,), (), (), ()))
        outputs = agent(observations)
        example = Batch(observations, agent.kind(outputs).best().contiguous(), *columns, outputs)
        fast_update = compile_update(args, agent, example, run.say)
    started = time.perf_counter() - done["elapsed"]

    while done["step"] < args.total_timesteps:
        before, seconds_before = time.perf_counter(), seconds.copy()
        iteration, step_before = done["iteration"] + 1, done["step"]
        learner.learning_rate.fill_(args.learning_rate * lr_factor(args, step_before + 1, args.total_timesteps))
        if (iteration - 1) % args.ref_update_every == 0:
            reference.copy_(learner.theta)
            reference_moments.restore(moments.state())

        # Play the groups' episodes.
        seeds = np.broadcast_to(starts.integers(2**31, size=(P, 1 if args.identical_start else G)), (P, G)).ravel()
        rollout = play(agent, moments, slots, space, seeds, limit, seconds)
        B = len(rollout.rewards)
        step = step_before + B

        # Compare the members of each group at each time.
        clock = time.perf_counter()
        rewards = np.zeros((P * G, rollout.lengths.max()))
        rewards[rollout.episodes, rollout.times] = rollout.rewards
        returns, alive = rewards.sum(1), np.arange(rewards.shape[1]) < rollout.lengths[:, None]
        of_all = group_advantages(args, rewards.reshape(P, G, -1), alive.reshape(P, G, -1))
        bare, advantages = (a.reshape(P * G, -1)[rollout.episodes, rollout.times] for a in of_all)
        degenerate = np.ptp(returns.reshape(P, G), axis=1) <= 1e-9 * np.abs(returns).reshape(P, G).max(1)
        if not (advantages.any() or degenerate.all() or done["warned"]):
            done["warned"] = True
            run.say(
                f"warning: every {args.advantage} advantage is 0, though returns differ, so nothing is learnt;"
                " rewards that never vary have no process: use --advantage rtg or outcome"
            )

        # Improve the policy.
        weights = step_weights(args, rollout.lengths, limit)[rollout.episodes]
        seen = torch.tensor(reference_moments.normalise(rollout.raw), device=device)  # as the reference sees it
        batch = Batch(
            rollout.observations,
            rollout.actions,
            agent.kind(agent(rollout.observations)).log_prob(rollout.actions),
            *torch.tensor(np.stack((advantages, weights)), dtype=torch.float32, device=device),
            functional_call(agent, parameters_of(agent, reference), (seen,)),
        )
        measured, kl = [], 0.0
        for _ in range(args.update_epochs):
            for minibatch in minibatches(batch, args.minibatch_size):
                measured.append(fast_update(agent, args, learner, minibatch, kl_coef))
                if args.stop_kl and (kl := measured[-1][MEASURES.index("kl")]) > args.stop_kl:
                    break
            if args.stop_kl and kl > args.stop_kl:
                break
        if agent.kind is Normal:
            agent.log_std.clamp_(min=args.log_std_min)
        reference_kl = agent.kind(agent(batch.observations)).kl(agent.kind(batch.reference)).mean().item()
        moments.update(rollout.raw.astype(np.float64))
        measures = dict(zip(MEASURES, torch.stack(measured).mean(0).tolist(), strict=True))
        seconds[2] += time.perf_counter() - clock
        if not all(map(math.isfinite, (*measures.values(), reference_kl, moments.var.sum(), advantages.sum()))):
            run.say(f"stopped: not finite in the iteration that ended at step {step:,}: {measures}")
            run.say("the last checkpoint is from before that" if done["saved"] else "there is no checkpoint yet")
            run.close()
            slots.close()
            raise SystemExit(1)

        # Log.
        elapsed = time.perf_counter() - started
        done |= {"iteration": iteration, "step": step, "elapsed": elapsed, "updates": done["updates"] + len(measured)}
        now = round(elapsed, 3)
        order = np.argsort(rollout.ended_at, kind="stable")
        episodes = [
            {"step": int(step_before + rollout.ended_at[m]), "wall_time": now, "return": returns[m].item()}
            | {"length": int(rollout.lengths[m])}
            for m in order
        ]
        recent.extend(episode["return"] for episode in episodes)
        row = {"step": step, "wall_time": now, "sps": round(B / (time.perf_counter() - before))}
        row |= measures | {"reference_kl": reference_kl, "kl_coef": kl_coef.item()}
        row |= {"advantage_mean": bare.mean().item(), "advantage_positive": (bare > 0).mean().item()}
        row |= {"degenerate_groups": degenerate.mean().item(), "episode_length": rollout.lengths.mean().item()}
        for name, share in (("quarter", 0.25), ("half", 0.5), ("three_quarters", 0.75)):
            row[f"alive_at_{name}"] = (rollout.lengths > share * limit).mean().item()
        row |= {"learning_rate": learner.learning_rate.item(), "updates": done["updates"]}
        row |= dict(zip(SECONDS, (seconds - seconds_before).round(4).tolist(), strict=True))
        run.record(row, episodes)
        if args.target_kl:
            kl_coef.fill_(adapted(kl_coef.item(), reference_kl, args.target_kl))

        # Evaluate.
        policy_state = {"script": Path(__file__).stem, "args": asdict(args), "step": step, "agent": agent.state_dict()}
        policy_state |= {"moments": moments.state()}
        if isinstance(space, gym.spaces.Discrete):
            policy_state |= {"choices": int(space.n), "first_choice": int(space.start)}
        else:
            policy_state |= {"action_bounds": torch.from_numpy(np.stack((space.low, space.high)))}
        reached, total = min(step, args.total_timesteps), args.total_timesteps
        if reached * args.num_evals // total > step_before * args.num_evals // total:
            evaluate_and_keep(args, run, directory, policy, policy_state, eval_envs, done)

        # Checkpoint. No episode is running.
        due = step // args.checkpoint_every > step_before // args.checkpoint_every
        stop = list(interrupts)  # looked at once: what stops the run has been saved
        if due or stop or step >= total:
            done["saved"] = True
            checkpoint = policy_state | {"learner": [*learner[1:], reference, kl_coef], "done": done}
            checkpoint |= {"reference_moments": reference_moments.state()}
            checkpoint |= {"starts": starts.bit_generator.state, "recent": list(recent)}
            checkpoint |= {"seconds": torch.from_numpy(seconds), "random": torch.get_rng_state(), "sizes": run.sizes()}
            if device.type == "cuda":
                checkpoint["cuda_random"] = torch.cuda.get_rng_state(device)
            save_checkpoint(directory / "checkpoint.pt", checkpoint)

        run.progress(row, max(step, total), done, recent, f"KL {row['kl']:.4f}  length {row['episode_length']:.0f}")
        if stop:
            command = shlex.join(["python", sys.argv[0], "--resume", str(directory)])
            run.say(f"stopped at step {step:,}; continue with\n  {command}")
            run.close()
            slots.close()
            raise SystemExit(128 + stop[0])

    finish(args, run, directory, done["step"], done, recent, seconds)
    run.close()
    slots.close()
    return directory


# ------------------------------------------------------------------------------------------------- what is refused


def check(args: Args) -> None:
    """Refuses what cannot work, before anything is written."""
    check_numbers(
        args,
        at_least_1="num_envs num_groups max_episode_steps minibatch_size update_epochs total_timesteps threads"
        " eval_episodes checkpoint_every actor_sizes",
        at_least_0="seed ent_coef kl_coef hybrid_alpha hybrid_beta num_evals",
        above_0="learning_rate clip_coef clip_coef_high hybrid_clip ref_update_every target_kl stop_kl max_grad_norm",
        shares="gamma lr_warmup",
    )
    if args.group_size < 2:
        refuse(f"--group-size {args.group_size}: must be at least 2, as episodes are compared within their group")
    if args.clip_coef >= 1:
        refuse(f"--clip-coef {args.clip_coef}: must be below 1; above 1 there is --clip-coef-high")
    if not args.log_std_min <= args.log_std_init < math.inf:
        refuse(f"--log-std-init {args.log_std_init}: must be at least --log-std-min {args.log_std_min}, and finite")
    if args.target_kl and not args.kl_coef:
        refuse("--target-kl: there is no penalty to adapt; set --kl-coef to what it begins with")
    episodes = args.num_groups * args.group_size
    if args.num_envs and args.num_envs > episodes:
        refuse(f"--num-envs {args.num_envs}: must be at most {episodes}, the episodes of an iteration")
    check_setup(args)
    check_environments(args)
    if args.vec == "envpool" and args.identical_start:
        refuse("--vec envpool: it cannot begin episodes alike; use sync, or --no-identical-start")
    env = make_train_env(args)
    if args.distribution == "beta":
        if isinstance(env.action_space, gym.spaces.Discrete):
            refuse(f"--distribution beta: {args.env_id} acts in {env.action_space}; beta is for a Box")
        if not env.action_space.is_bounded():
            refuse(f"--distribution beta: {args.env_id} acts in {env.action_space}; use normal, which needs no bounds")
    if not (args.max_episode_steps or env.spec.max_episode_steps):
        refuse(f"--max-episode-steps: {args.env_id} has no limit of its own; set one, as whole episodes are played")
    env.close()


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
    if not isinstance(actions, gym.spaces.Box | gym.spaces.Discrete):
        refuse(f"{problem}: acts in {actions}; this script needs a Box or Discrete")
    if not (isinstance(actions, gym.spaces.Discrete) or np.issubdtype(actions.dtype, np.floating)):
        refuse(f"{problem}: acts in {actions}; this script needs real numbers or Discrete")


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
