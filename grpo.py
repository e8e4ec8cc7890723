# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "threadpoolctl",
#     "tyro", "pyyaml", "tensorboard", "moviepy"
# ]
# ///
"""Group-relative policy optimisation (GRPO): no critic; episodes are judged against the others of their group.

    python grpo.py --env-id CartPole-v1
    python grpo.py --env-id Pendulum-v1 --distribution beta
    python grpo.py --resume runs/CartPole-v1__grpo__1__20260101-120000

Shao et al. 2024, https://arxiv.org/abs/2402.03300 (outcome and process advantages); https://arxiv.org/abs/2503.20783
(what normalising by standard deviations and lengths distorts).

The algorithm ends with `train`; the rest saves, evaluates and checks arguments, and is much the same in every script.

What may surprise those who know the paper (`--config configs/grpo/paper-outcome.yaml` or `paper-process.yaml`):
- By default a step is judged by its rewards to go, less their mean over the group at that time; all steps weigh the
  same, and moving away from a reference policy costs nothing.
- An iteration is `num_groups` x `group_size` whole episodes, however long they are; the run ends with the iteration
  that reaches `total_timesteps`. Only the steps of these episodes are counted.
- The members of a group get one seed (`--identical-start`): they begin alike and meet the same randomness, but each
  acts with its own noise.
- Nothing bootstraps: what would have come after a time limit counts as nothing.
- The normal policy sees finite bounds as -1 and 1; the environment gets clipped actions, the loss uses them as drawn.
- The normaliser of observations changes once per iteration, after the update; the first sees them raw, clipped at ±10.
- All parameters are views of one vector, `theta`, so that Adam and the gradient's norm are a few vector operations.
"""

import copy
import csv
import fcntl
import gc
import hashlib
import importlib
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
from collections.abc import Callable, Iterator, Sequence
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
from gymnasium.wrappers import FlattenObservation, RecordVideo, TimeLimit
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
    env_kwargs: str = "{}"  # arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'
    eval_env_kwargs: str = "{}"  # arguments that evaluation changes or adds, as JSON
    num_envs: int | None = None  # environments stepped together; default: one per episode of an iteration, at most 64
    vec: Literal["sync", "async", "envpool"] = "sync"  # how they are stepped: in turn, in a process each, or by EnvPool
    total_timesteps: int | float = 1_000_000  # steps over all environments; the iteration that reaches them is the last
    seed: int = 1  # seed of everything random
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # where the networks are
    threads: int = 1  # torch threads; small networks are fastest with one
    compile: bool = True  # compile the update (needs a C++ compiler)

    num_groups: int = 2  # groups of episodes per iteration
    group_size: int = 8  # episodes in a group, which are compared with each other
    identical_start: bool = True  # begin the episodes of a group with the same seed; each draws its own actions
    max_episode_steps: int | None = None  # steps after which training cuts an episode; default: the environment's limit
    learning_rate: float = 1e-3  # Adam's step size at the start
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # how the rate falls; linear and cosine end at 0
    lr_warmup: float = 0.0  # share of the run over which the learning rate first rises from 0
    minibatch_size: int = 512  # steps in a minibatch, at most; an iteration's are shared out evenly
    update_epochs: int = 4  # passes over each iteration's steps
    # what a step is judged by: the return, normalised rewards to go, both, or rewards to go
    advantage: Literal["outcome", "process", "hybrid", "rtg"] = "rtg"
    gamma: float = 0.99  # discount of rewards to go; an outcome is not discounted
    process_norm: Literal["timestep", "group"] = "group"  # normalise a group's rewards per step, or over all its steps
    baseline: Literal["mean", "loo"] = "mean"  # subtract the mean of the group, or of all others in it (leave one out)
    advantage_norm: Literal["none", "group", "batch"] = "batch"  # normalise advantages: not, per group, or per batch
    hybrid_alpha: float = 0.5  # exponent of the outcome advantage in a hybrid one
    hybrid_beta: float = 0.5  # exponent of the process advantage in a hybrid one
    hybrid_clip: float = 5.0  # bound of a hybrid advantage before it is normalised
    # each step weighs the same, each episode does, or each step 1 / max_episode_steps of an episode
    loss_weight: Literal["step", "episode", "constant"] = "step"
    clip_coef: float = 0.2  # epsilon of the clipped objective
    clip_coef_high: float | None = None  # epsilon of the upper bound; default: `clip_coef`
    ent_coef: float = 0.0  # weight of the entropy bonus
    kl_coef: float = 0.0  # weight of the KL divergence from the reference policy; with a `target_kl`, only at the start
    kl_estimator: Literal["closed", "k3"] = "closed"  # reference KL in closed form, or estimated from actions taken
    ref_update_every: int = 1  # iterations after which the current policy becomes the reference
    target_kl: float | None = None  # adapt `kl_coef` to end each iteration at about this KL from the reference
    stop_kl: float | None = None  # end an iteration's update once a minibatch's KL from the acting policy exceeds it
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    actor_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the policy
    distribution: Literal["normal", "beta"] = "normal"  # distribution of Box actions; Beta needs finite bounds
    log_std_init: float = -0.5  # log of the normal policy's initial standard deviation
    log_std_min: float = -2.0  # lower bound of the log standard deviation, so that exploration never ends

    num_evals: int = 10  # evaluations during the run, evenly spaced, the last at its end; 0 for none
    eval_episodes: int = 10  # episodes per evaluation: deterministic, with the same seeds each time
    checkpoint_every: int | float = 100_000  # steps between checkpoints
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
    env = make_env(args.env_id, json.loads(args.env_kwargs) | json.loads(args.eval_env_kwargs), render_mode)
    return env if env.spec.max_episode_steps else TimeLimit(env, args.max_episode_steps)


class TrainEnv(gym.Wrapper):
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
        return observation, {}

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation, float(reward), bool(terminated), bool(truncated), {}  # infos would cost a tenth of the time


class Environments:
    """N environments, any of which begin an episode or step while the others rest."""

    def __init__(self, args: Args):
        self.args, self.random = args, np.random.default_rng(args.seed)
        self.envs = self._make(args)
        self.witness = {}  # how an episode began
        self.observations = np.zeros((args.num_envs, *self.envs.single_observation_space.shape))  # what to act on

    def _make(self, args: Args) -> gym.vector.VectorEnv:
        vector = gym.vector.AsyncVectorEnv if args.vec == "async" else gym.vector.SyncVectorEnv
        mode = gym.vector.AutoresetMode.NEXT_STEP
        return vector([partial(TrainEnv, args)] * args.num_envs, copy=False, autoreset_mode=mode)

    def begin(self, which: np.ndarray, seeds: np.ndarray) -> None:
        """Begins an episode in the environments `which`, from a seed each."""
        mask, every = np.zeros(self.args.num_envs, bool), np.zeros(self.args.num_envs, int)
        mask[which], every[which] = True, seeds
        self.observations[which] = self.envs.reset(seed=every.tolist(), options={"reset_mask": mask})[0][which]
        self.witness = {"seed": int(seeds[0]), "observation": torch.tensor(self.observations[which[0]])}

    def step(self, which: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps the environments `which`; their rewards, terminated, truncated."""
        if self.args.vec == "sync":
            results = [self.envs.envs[n].step(action)[:4] for n, action in zip(which, actions, strict=True)]
            self.observations[which], *results = map(np.array, zip(*results, strict=True))
            return tuple(results)
        every = np.repeat(actions[:1], self.args.num_envs, 0)  # those that should rest play on, unseen
        every[which] = actions
        self.observations[which], *results = (result[which] for result in self.envs.step(every)[:4])
        return tuple(results)

    def state(self) -> dict:
        """No episode is running when a checkpoint is written."""
        return {"random": self.random.bit_generator.state, "witness": self.witness}

    def restore(self, state: dict) -> bool:
        """Returns whether the same episodes follow, as far as beginning one of them again can tell."""
        self.random.bit_generator.state = state["random"]
        if not (witness := state["witness"]):
            return True
        self.begin(np.arange(self.args.num_envs), np.full(self.args.num_envs, witness["seed"]))
        return np.array_equal(self.observations[0], witness["observation"])

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


IN_NUMPY = {
    nn.Linear: lambda layer, weight, bias=0: lambda x: x @ weight.T + bias,
    nn.LayerNorm: lambda layer, weight=1, bias=0: (
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps) * weight + bias
    ),
    nn.Tanh: lambda layer: np.tanh,
    nn.ReLU: lambda layer: lambda x: np.maximum(x, 0),
    nn.SiLU: lambda layer: lambda x: x * (0.5 + 0.5 * np.tanh(0.5 * x)),
}


def in_numpy(network: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """A copy of the network as it is now, in numpy: several times as fast for the few observations of one step.

    Layers that are not `IN_NUMPY` are computed by torch.
    """
    functions = []
    for layer in copy.deepcopy(network).cpu().eval():
        make = IN_NUMPY.get(type(layer), lambda layer, *_: lambda x: layer(torch.tensor(x)).numpy())
        functions.append(make(layer, *(parameter.numpy() for parameter in layer.parameters())))

    def forward(x: np.ndarray) -> np.ndarray:
        for function in functions:
            x = function(x)
        return x

    return forward


class Categorical:
    """Of Discrete actions; the outputs are logits, (B, K)."""

    def __init__(self, outputs: Tensor):
        self.logprobs = outputs.log_softmax(-1)

    @staticmethod
    def best(outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(-1)

    @staticmethod
    def sample(outputs: np.ndarray) -> np.ndarray:  # where log p + Gumbel noise is largest
        return (outputs - torch.empty(outputs.shape).exponential_().log().numpy()).argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logprobs.exp() * self.logprobs).sum(-1)

    def kl(self, other: "Categorical") -> Tensor:
        return (self.logprobs.exp() * (self.logprobs - other.logprobs)).sum(-1)


class Normal:
    """Of Box actions; the outputs are means and logarithms of standard deviations, (B, 2A)."""

    def __init__(self, outputs: Tensor):
        self.mean, self.log_std = outputs.chunk(2, -1)

    @staticmethod
    def best(outputs: np.ndarray) -> np.ndarray:
        return np.split(outputs, 2, -1)[0]

    @staticmethod
    def sample(outputs: np.ndarray) -> np.ndarray:
        mean, log_std = np.split(outputs, 2, -1)
        return mean + np.exp(log_std) * torch.randn(mean.shape).numpy()

    def log_prob(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Normal") -> Tensor:
        square = (2 * self.log_std).exp() + (self.mean - other.mean) ** 2
        return (other.log_std - self.log_std + 0.5 * square * (-2 * other.log_std).exp() - 0.5).sum(-1)


def stirling(z: Tensor) -> Tensor:
    """The series of ln Γ(z) after its leading terms; exact in float32 from z = 4 on."""
    return (1 / 12 - (1 / 360 - 1 / (1260 * z**2)) / z**2) / z


def log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    """ln B(alpha, beta), what normalises x^(alpha-1) (1-x)^(beta-1), for arguments ≥ 1.

    B(alpha + 3, beta + 3) by Stirling's formula, and back by B(a, b) = B(a + 1, b + 1) (a + b) (a + b + 1) / (a b).
    More exact than three torch.lgamma for large arguments, and faster, as it can be vectorised.
    """
    a, b, total = alpha + 3, beta + 3, alpha + beta
    s = total + 6
    back = [(alpha + i) * (beta + i) / ((total + 2 * i) * (total + 2 * i + 1)) for i in range(3)]
    leading = (0.5 - a) * (b / a).log1p() + (0.5 - b) * (a / b).log1p() + 0.5 * (2 * math.pi / s).log()
    return leading + stirling(a) + stirling(b) - stirling(s) - (back[0] * back[1] * back[2]).log()


class Beta:
    """Of Box actions, from 0 at the lower bound to 1 at the upper; the outputs, (B, 2A), give alpha and beta."""

    def __init__(self, outputs: Tensor):
        self.alpha, self.beta = (nn.functional.softplus(outputs) + 1).chunk(2, -1)

    @staticmethod
    def best(outputs: np.ndarray) -> np.ndarray:
        alpha, beta = np.split(np.logaddexp(outputs, 0) + 1, 2, -1)
        return alpha / (alpha + beta)

    @staticmethod
    def sample(outputs: np.ndarray) -> np.ndarray:
        gamma = torch._standard_gamma(torch.from_numpy(np.logaddexp(outputs, 0) + 1)).numpy()
        first, second = np.split(gamma, 2, -1)
        return (first / (first + second)).clip(2**-24, 1 - 2**-24)  # what rounding would make 0 or 1 stays next to it

    def log_prob(self, actions: Tensor) -> Tensor:
        logs = (self.alpha - 1) * actions.log() + (self.beta - 1) * torch.log1p(-actions)
        return (logs - log_beta(self.alpha, self.beta)).sum(-1)

    def cross_entropy(self, other: "Beta") -> Tensor:
        """-E[ln p_other(x)], of which the parts are E[ln x] and E[ln(1 - x)]."""
        total = torch.digamma(self.alpha + self.beta)
        log_x, log_rest = torch.digamma(self.alpha) - total, torch.digamma(self.beta) - total
        return (log_beta(other.alpha, other.beta) - (other.alpha - 1) * log_x - (other.beta - 1) * log_rest).sum(-1)

    def entropy(self) -> Tensor:
        return self.cross_entropy(self)

    def kl(self, other: "Beta") -> Tensor:
        return self.cross_entropy(other) - self.entropy()


class Agent(nn.Module):
    """From observations to the outputs that `kind` makes a distribution of; their normaliser, the actions' bounds.

    Bounds that are integers are the first and the last of Discrete actions.
    """

    def __init__(self, args: Args, observation_shape: tuple[int, ...], low: np.ndarray, high: np.ndarray):
        super().__init__()
        discrete = np.issubdtype(low.dtype, np.integer)
        self.kind = Categorical if discrete else {"normal": Normal, "beta": Beta}[args.distribution]
        D, A = math.prod(observation_shape), int(high - low) + 1 if discrete else low.size
        self.actor = mlp((D, *args.actor_sizes, 2 * A if self.kind is Beta else A), last_scale=0.01)
        if self.kind is Normal:
            self.log_std = nn.Parameter(torch.full((A,), args.log_std_init))
        self.moments = RunningMoments(observation_shape, args.norm_obs)
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))
        bounded = np.isfinite(low) & np.isfinite(high)  # to the policy, such bounds are -1 and 1
        self.half_range = np.where(bounded, high / 2 - low / 2, 1).astype(low.dtype)
        self.centre = np.where(bounded, high - self.half_range, np.clip(0, low, high)).astype(low.dtype)
        self.bounds = low, high

    def forward(self, observations: Tensor) -> Tensor:
        outputs = self.actor(observations)
        return torch.cat((outputs, self.log_std.expand_as(outputs)), -1) if self.kind is Normal else outputs

    def acting(self) -> Callable[[np.ndarray], np.ndarray]:
        """`forward` in numpy, with the parameters as they are now."""
        act = in_numpy(self.actor)
        if self.kind is not Normal:
            return act
        log_std = self.log_std.cpu().numpy().copy()
        return lambda x: np.concatenate((mean := act(x), np.broadcast_to(log_std, mean.shape)), -1)

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        """The policy's actions (N,) or (N, A) in the environment's shape and bounds."""
        low, high = self.bounds
        if self.kind is Categorical:
            return (low + actions).astype(low.dtype)
        actions = 2 * actions - 1 if self.kind is Beta else actions
        actions = self.centre + self.half_range * actions.reshape(-1, *low.shape)
        return np.minimum(np.maximum(actions, low), high).astype(low.dtype, copy=False)


def rewards_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + γ G_{t+1} along the last axis."""
    sums, following = np.empty_like(rewards), np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        sums[..., t] = following = rewards[..., t] + gamma * following
    return sums


def centre(values: np.ndarray, counted: np.ndarray, axes: tuple[int, ...], loo: bool) -> np.ndarray:
    """Values (P, G, T) minus the mean over `axes` of those `counted`; if `loo`, of the group's other episodes only.

    What is left by rounding is 0: normalised, it would be as large as any advantage.
    """
    values, within = np.where(counted, values, 0.0), tuple(axis for axis in axes if axis != 1)
    total, count = values.sum(axes, keepdims=True), counted.sum(axes, keepdims=True)
    if loo:
        total, count = total - values.sum(within, keepdims=True), count - counted.sum(within, keepdims=True)
    distances = values - total / np.maximum(count, 1)
    rounding = np.abs(distances) <= 1e-9 * np.abs(values).max(axes, keepdims=True)
    return np.where(counted & ~rounding, distances, 0.0)


def standardise(values: np.ndarray, counted: np.ndarray, axes: tuple[int, ...], loo: bool = False) -> np.ndarray:
    """As `centre`, divided by the standard deviation over `axes` of all, even if `loo`; 0 where they do not differ."""
    distances = centre(values, counted, axes, loo=False)
    count = np.maximum(counted.sum(axes, keepdims=True), 1)
    deviation = np.sqrt((distances**2).sum(axes, keepdims=True) / count)
    distances = centre(values, counted, axes, loo)
    return np.divide(distances, deviation, out=np.zeros_like(distances), where=deviation != 0)


def combine(args: Args, outcome: np.ndarray, step: np.ndarray) -> np.ndarray:
    """A hybrid advantage: positive if and only if both are."""
    sign = np.where((outcome > 0) & (step > 0), 1.0, -1.0)
    magnitude = np.abs(outcome) ** args.hybrid_alpha * np.abs(step) ** args.hybrid_beta
    return sign * magnitude.clip(max=args.hybrid_clip)


def group_advantages(args: Args, rewards: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An advantage for every step of every episode, all (P, G, T); 0 for what is not `alive`.

    Returns those before `advantage_norm`, and those after it.
    """
    rewards, loo = np.where(alive, rewards, 0.0), args.baseline == "loo"
    returns, each = rewards.sum(-1, keepdims=True), np.ones_like(alive[..., :1])  # (P, G, 1)
    counted = each if args.advantage == "outcome" else alive
    if args.advantage == "outcome":
        advantages = centre(returns, each, (1,), loo)
    elif args.advantage == "rtg":  # ended episodes have 0 to go, and count in the mean all the same
        advantages = centre(rewards_to_go(rewards, args.gamma), np.ones_like(alive), (1,), loo)
    else:
        over = (1,) if args.process_norm == "timestep" else (1, 2)
        advantages = rewards_to_go(standardise(rewards, alive, over, loo), args.gamma)
        advantages = np.where(np.abs(advantages) > 1e-9 * np.abs(advantages).max(), advantages, 0.0)  # as in `centre`
        if args.advantage == "hybrid":
            advantages = combine(args, standardise(returns, each, (1,), loo), advantages)
    normalised = advantages
    if args.advantage_norm != "none":
        normalised = standardise(advantages, counted, (1, 2) if args.advantage_norm == "group" else (0, 1, 2))
    return np.where(alive, advantages, 0.0), np.where(alive, normalised, 0.0)


def step_weights(args: Args, lengths: np.ndarray) -> np.ndarray:
    """What a step of each episode weighs: on average 1, or less if the steps count that were not made (`constant`)."""
    if args.loss_weight == "episode":
        return lengths.mean() / lengths
    share = lengths.mean() / args.max_episode_steps if args.loss_weight == "constant" else 1.0
    return np.full(len(lengths), share)


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

    entropy = policy.entropy()
    loss = policy_loss - args.ent_coef * mean(entropy)
    if args.kl_coef and args.kl_estimator == "closed":
        loss = loss + kl_coef * mean(policy.kl(reference))
    elif args.kl_coef:  # r - ln r - 1, r = π_ref / π, http://joschu.net/blog/kl-approx.html
        log_r = reference.log_prob(batch.actions) - logprobs
        loss = loss + kl_coef * mean(log_r.exp() - log_r - 1)
    used = (batch.weights > 0).float() / rows
    kl = (used * (ratio - 1 - logratio)).sum()
    clip_fraction = (used * (ratio != clipped)).sum()
    return loss, (policy_loss, (used * entropy).sum(), kl, clip_fraction)


MEASURES = ["policy_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"]
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


def update(agent: Agent, args: Args, learner: Learner, minibatch: Batch, kl_coef: Tensor) -> Tensor:
    """One step of Adam on the minibatch; returns what was measured before it."""

    def loss(theta: Tensor) -> tuple[Tensor, tuple]:
        return grpo_loss(parameters_of(agent, theta), agent, args, minibatch, kl_coef)

    gradient, measures = grad(loss, has_aux=True)(learner.theta)
    norm = gradient.norm()
    learner.adam_step(gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), eps=1e-5)
    return torch.stack((*measures, norm))


def fill(batch: Batch, rows: Tensor, size: int) -> Batch:
    """These rows of the batch, and others without weight that make them `size`."""
    indices = torch.cat((rows, rows[:1].expand(size - len(rows))))
    minibatch = Batch(*(column.index_select(0, indices) for column in batch))
    minibatch.weights[len(rows) :] = 0
    return minibatch


def minibatches(args: Args, batch: Batch) -> Iterator[Batch]:
    """In every epoch all rows once, in random order, shared out evenly over as few minibatches as it takes."""
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(len(batch.weights)).to(batch.weights.device)
        for rows in shuffled.tensor_split(math.ceil(len(shuffled) / args.minibatch_size)):
            yield fill(batch, rows, args.minibatch_size)


def next_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The penalty's weight for the next iteration: larger after too much divergence, smaller after too little."""
    factor = 1.5 if kl > 1.5 * target else 1 / 1.5 if kl < target / 1.5 else 1.0
    return min(max(kl_coef * factor, 1e-4), 100.0)


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Rollout(NamedTuple):
    """The B steps of M = P x G whole episodes, in the order in which they were made."""

    observations: np.ndarray  # (B, ...), as the environments show them
    rewards: np.ndarray  # (M, T), 0 after an episode's end
    episodes: list[dict]  # the M rows of episodes.csv
    lengths: np.ndarray  # (M,)
    places: tuple[np.ndarray, np.ndarray]  # (B,) each: the episode of a step, and which of its steps it is
    inputs: Tensor  # (B, D), what the policy sees of the observations
    actions: Tensor  # (B,) or (B, A)


def collect(args: Args, agent: Agent, envs: Environments, step: int, watch: "Stopwatch") -> Rollout:
    """The groups' episodes from `step` on. An environment whose episode is over takes the next that waits."""
    P, G, N = args.num_groups, args.group_size, args.num_envs
    seeds = envs.random.integers(2**31, size=(P, 1 if args.identical_start else G))
    seeds = np.broadcast_to(seeds, (P, G)).ravel()
    act, normalise, device = agent.acting(), agent.moments.normaliser(), next(agent.parameters()).device
    lengths, playing = np.zeros(P * G, int), np.full(N, -1)  # the episode in each environment, or -1
    begun, steps, parts, ended = 0, 0, [], []
    while begun < P * G or (playing >= 0).any():
        free = np.flatnonzero(playing < 0)[: P * G - begun]
        if len(free):
            playing[free] = np.arange(begun, begun + len(free))
            begun += len(free)
            envs.begin(free, seeds[playing[free]])
            watch.lap("stepping")
        busy = np.flatnonzero(playing >= 0)
        episodes, observations = playing[busy], envs.observations[busy]
        inputs = normalise(observations).reshape(len(busy), -1)
        actions = agent.kind.sample(act(inputs))
        environment_actions = agent.for_environment(actions)
        watch.lap("acting")
        rewards, terminated, truncated = envs.step(busy, environment_actions)
        parts.append((observations, inputs, actions, rewards, episodes, lengths[episodes]))
        lengths[episodes] += 1
        steps += len(busy)
        over = terminated | truncated | (lengths[episodes] == args.max_episode_steps)
        watch.lap("stepping")
        if over.any():
            playing[busy[over]] = -1
            when = {"step": step + steps, "wall_time": round(watch.elapsed(), 3)}
            ended += [(m, when) for m in np.sort(episodes[over])]
    observations, inputs, actions, rewards, *places = (np.concatenate(part) for part in zip(*parts, strict=True))
    table = np.zeros((P * G, lengths.max()))
    table[tuple(places)] = rewards
    returns = table.sum(1)
    rows = [when | {"return": returns[m].item(), "length": lengths[m].item()} for m, when in ended]
    tensors = (torch.tensor(array, device=device) for array in (inputs, actions))
    return Rollout(observations, table, rows, lengths, tuple(places), *tensors)


def estimate(args: Args, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """The advantage of each step before `advantage_norm`, and after it. (B,)"""
    alive = np.arange(rollout.rewards.shape[1]) < rollout.lengths[:, None]
    groups = (each.reshape(args.num_groups, args.group_size, -1) for each in (rollout.rewards, alive))
    bare, advantages = (each.reshape(alive.shape)[rollout.places] for each in group_advantages(args, *groups))
    return bare, advantages


def batch_of(args: Args, agent: Agent, reference: Agent, rollout: Rollout, advantages: np.ndarray) -> Batch:
    """The steps, with log-probabilities by the policy now and outputs of the reference, by its own normaliser."""
    logprobs = agent.kind(agent(rollout.inputs)).log_prob(rollout.actions)
    weights = step_weights(args, rollout.lengths)[rollout.places[0]]
    reference_inputs = reference.moments.normaliser()(rollout.observations).reshape(rollout.inputs.shape)
    arrays = advantages, weights, reference_inputs
    *columns, reference_inputs = (torch.tensor(each, dtype=torch.float32, device=logprobs.device) for each in arrays)
    return Batch(rollout.inputs, rollout.actions, logprobs, *columns, reference(reference_inputs))


def improve(
    args: Args, agent: Agent, learner: Learner, batch: Batch, kl_coef: float, update: Callable
) -> dict[str, float]:
    """Epochs of minibatches, ended early where the policy has moved too far; their mean measures."""
    measured, weight = [], torch.tensor(kl_coef, device=learner.theta.device)
    for minibatch in minibatches(args, batch):
        measured.append(update(agent, args, learner, minibatch, weight))
        if args.stop_kl and measured[-1][MEASURES.index("approx_kl")] > args.stop_kl:
            break
    if agent.kind is Normal:
        agent.log_std.clamp_(min=args.log_std_min)
    measures = dict(zip(MEASURES, torch.stack(measured).mean(0).tolist(), strict=True))
    away = agent.kind(agent(batch.observations)).kl(agent.kind(batch.reference)).mean().item()
    measures |= {"reference_kl": away, "kl_coef": kl_coef, "learning_rate": learner.learning_rate.item()}
    return measures | {"updates": len(measured)}


def compare(args: Args, rollout: Rollout, advantages: np.ndarray) -> dict[str, float]:
    """How much there was to learn from; groups whose returns do not differ are `degenerate`."""
    returns = rollout.rewards.sum(1).reshape(args.num_groups, args.group_size)
    degenerate = np.ptp(returns, axis=1) <= 1e-9 * np.abs(returns).max(1)
    measures = {"advantage_mean": advantages.mean(), "advantage_positive": (advantages > 0).mean()}
    measures |= {"degenerate_groups": degenerate.mean(), "episode_length": rollout.lengths.mean()}
    for name, share in (("quarter", 0.25), ("half", 0.5), ("three_quarters", 0.75)):
        measures[f"alive_at_{name}"] = (rollout.lengths > share * args.max_episode_steps).mean()
    return {name: value.item() for name, value in measures.items()}


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
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    threadpool_limits(1, "blas")  # numpy's products are too small to share, and its threads wait without sleeping
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    agent = Agent(args, envs.observations.shape[1:], actions.low, actions.high).requires_grad_(False)
    learner = Learner.of(agent, device)
    reference, total = copy.deepcopy(agent), args.total_timesteps
    progress = {"iteration": 0, "updates": 0, "kl_coef": args.kl_coef, "reference": {}}
    progress |= {"recent": [], "evaluation": {}, "best": {}, "seconds": dict.fromkeys(SECONDS, 0.0)}
    with closing(envs), Run(args, agent, learner, envs, progress) as run:
        run.begin()
        fast_update = compile_update(args, agent, learner, run) if args.compile else update
        if device.type == "cuda":
            fast_update = capture_update(args, agent, learner, fast_update)
        watch, booked, step = Stopwatch(progress["seconds"]), dict(progress["seconds"]), run.saved

        while step < total:
            if interrupts:
                run.stop(interrupts[0], step)
            if progress["iteration"] % args.ref_update_every == 0:
                progress["reference"] = copy.deepcopy(agent.state_dict())
            reference.load_state_dict(progress["reference"])
            progress["iteration"] += 1
            rollout = collect(args, agent, envs, step, watch)
            B = len(rollout.inputs)
            step += B
            rate = args.learning_rate * lr_factor(args, step / B, total / B)  # as if every iteration had B steps
            learner.learning_rate.fill_(rate)
            bare, advantages = estimate(args, rollout)
            batch = batch_of(args, agent, reference, rollout, advantages)
            measures = improve(args, agent, learner, batch, progress["kl_coef"], fast_update)
            measures |= compare(args, rollout, bare)
            agent.moments.update(rollout.observations)
            watch.lap("updating")
            squares = np.square(rollout.rewards).sum()  # whose overflow would make every advantage 0
            sums = squares, advantages.sum(), agent.moments.var.sum(), learner.theta.sum().cpu()
            if not np.isfinite([*(measures[name] for name in (*MEASURES, "reference_kl")), *sums]).all():
                raise FloatingPointError(f"not finite in the iteration that ended at step {step:,}: {measures}")

            if progress["iteration"] == 1 and measures["degenerate_groups"] < 1 and not advantages.any():
                run.say(f"every {args.advantage} advantage is 0, though returns differ: try --advantage rtg or outcome")
            progress["updates"] += measures["updates"]
            progress["recent"] = [*progress["recent"], *(e["return"] for e in rollout.episodes)][-100:]
            if min(step, total) * args.num_evals // total > (step - B) * args.num_evals // total:
                evaluate(args, run, agent, step, progress)
                watch.lap("evaluating")
            seconds = {name: spent - booked[name] for name, spent in watch.seconds.items()}
            pace = B / sum(seconds[name] for name in ("stepping", "acting", "updating"))
            row = {"step": step, "wall_time": round(watch.elapsed(), 3), "sps": round(pace, 3)}
            row |= measures | {"updates": progress["updates"]}
            row |= {f"seconds_{name}": round(spent, 4) for name, spent in seconds.items()}
            booked = dict(watch.seconds)
            run.write("episodes", rollout.episodes)
            run.write("progress", [row])
            watch.lap("saving")

            if args.target_kl:
                progress["kl_coef"] = next_kl_coef(progress["kl_coef"], row["reference_kl"], args.target_kl)
            if step // args.checkpoint_every > (step - B) // args.checkpoint_every or step >= total:
                run.save(step)
                watch.lap("saving")
            run.show(row, max(step, total), f"KL {row['approx_kl']:.4f}  length {row['episode_length']:.0f}")
        run.finish(step, watch.elapsed())
    return run.directory


# ------------------------------------------------------------------------------------------ evaluation, run directory


class Policy:
    """The policy to deploy, as it is now: it maps one observation to an action, a batch of them to a batch of actions.

    Every row is computed alone, so that an action does not depend on what else is in the batch, to the last bit.
    Deterministic, unless asked for a `sample` of the actions as in training.
    """

    def __init__(self, args: Args, agent: Agent):
        self.agent, self.shape = agent, tuple(agent.moments.mean.shape)
        self.discount, self.bootstraps = args.gamma, ()
        self._act, self._normalise = agent.acting(), agent.moments.normaliser()

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        if np.shape(observations) == self.shape:
            return self._choose(observations, sample)
        if np.shape(observations)[1:] != self.shape:
            raise ValueError(f"observations of shape {np.shape(observations)}: must be {self.shape}, or a batch")
        actions = [self._choose(observation, sample) for observation in observations]
        return np.array(actions).reshape(-1, *self.agent.low.shape)

    def _choose(self, observation: np.ndarray, sample: bool) -> np.ndarray:
        outputs, kind = self._act(self._normalise(observation).reshape(1, -1)), self.agent.kind
        return self.agent.for_environment(kind.sample(outputs) if sample else kind.best(outputs))[0]


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args, state = Args(**checkpoint["args"]), checkpoint["agent"]
    agent = Agent(args, state["moments.mean"].shape, state["low"].numpy(), state["high"].numpy())
    agent.load_state_dict(state)
    Learner.of(agent.requires_grad_(False), device)  # the weights lie in memory as in the run, which products depend on
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


def compile_update(args: Args, agent: Agent, learner: Learner, run: "Run") -> Callable:
    device, size, D = learner.theta.device, args.minibatch_size, agent.moments.mean.numel()
    observations, *columns = (torch.zeros(shape, device=device) for shape in ((size, D), size, size, size))
    outputs = agent(observations)
    actions = torch.tensor(agent.kind.best(outputs.cpu().numpy()), device=device)
    batch, kl_coef = Batch(observations, actions, *columns, outputs), torch.zeros((), device=device)
    return compile_by([(copy.deepcopy(agent), args, copy.deepcopy(learner), batch, kl_coef)], update, device, run)


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


def capture_update(args: Args, agent: Agent, learner: Learner, update: Callable) -> Callable:
    graph = Captured(lambda kl_coef, *batch: update(agent, args, learner, Batch(*batch), kl_coef), learner)
    return lambda agent, args, learner, batch, kl_coef: graph(kl_coef, *batch)


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

    def __init__(self, args: Args, agent: Agent, learner: Learner, envs: Environments, progress: dict):
        super().__init__()
        self.args, self.agent, self.learner, self.envs, self.progress = args, agent, learner, envs, progress
        self.directory = Path(args.resume) if args.resume else create_run(args, self.state(0))
        words, called = ["--resume", str(self.directory)], Path(sys.argv[0]).name == Path(__file__).name
        self.resume_command = shlex.join(["python", sys.argv[0], *words]) if called else f"train(parse({words}))"
        self.live, self.said, self.tracker, self.saved = sys.stdout.isatty(), time.monotonic(), None, 0

    def state(self, step: int) -> dict:
        """All that training depends on from here."""
        state = {"script": SCRIPT, "args": asdict(self.args), "step": step, "agent": self.agent.state_dict()}
        state |= {"learner": list(self.learner[1:]), "environments": self.envs.state(), "progress": self.progress}
        return state | {"random": torch.get_rng_state()}

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
        for tensor, value in zip(self.learner[1:], saved["learner"], strict=True):
            tensor.copy_(value)
        self.progress |= saved["progress"]
        exact = not self.args.resume or self.envs.restore(saved["environments"])
        torch.set_rng_state(saved["random"])
        self.saved = saved["step"]

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
        args, agent, theta = self.args, self.agent, self.learner.theta
        self.say(
            f"{SCRIPT}  {args.env_id}  {agent.moments.mean.numel()} observations,"
            f" actions from {agent.bounds[0].min():g} to {agent.bounds[1].max():g}\n"
            f"{args.num_groups} groups of {args.group_size} episodes of at most {args.max_episode_steps} steps,"
            f" in {args.num_envs} environments ({args.vec})\n"
            f"{args.update_epochs} epochs of minibatches of {args.minibatch_size} at most,"
            f" {theta.numel():,} parameters, {theta.device}\n{self.directory}"
        )
        if slow := {type(layer).__name__ for layer in agent.actor if type(layer) not in IN_NUMPY}:
            self.say(f"acting is slower for {', '.join(sorted(slow))}, which in_numpy does not know")
        if not exact:
            self.say("the environments cannot be restored exactly; other episodes follow, all else continues")

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
        left = timedelta(seconds=round((total - step) / row["sps"]))
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
    "at least 1": (1, 1e15, "num_groups max_episode_steps minibatch_size update_epochs ref_update_every actor_sizes"),
    "at least 2, as episodes are compared within their group": (2, 1e15, "group_size"),
    "between 1 and 1e15": (1, 1e15, "total_timesteps checkpoint_every num_envs eval_episodes"),
    "at least 0": (0, 1e15, "ent_coef kl_coef num_evals"),
    "above 0": (1e-300, 1e300, "learning_rate clip_coef clip_coef_high target_kl stop_kl max_grad_norm"),
    "positive": (1e-300, 1e300, "hybrid_alpha hybrid_beta hybrid_clip"),
    "below 1; only --clip-coef-high may be above": (0, 1 - 1e-9, "clip_coef"),
    "a number": (-1e300, 1e300, "log_std_init log_std_min"),
    "between 0 and 1": (0, 1, "gamma lr_warmup"),
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

    def begin(self, which: np.ndarray, seeds: np.ndarray) -> None:
        self.observations[which] = self.envs.reset(which)[0]

    def state(self) -> dict:
        return {"seed": self.random.integers(2**31).item()}  # from which other episodes follow

    def restore(self, state: dict) -> bool:
        self.__init__(replace(self.args, seed=state["seed"]))
        return False


def check_observation(observation: np.ndarray, space: gym.spaces.Box) -> None:
    """Raises a TypeError unless it is what the space says; some ways of stepping would repeat or cut it to fit."""
    array = np.asarray(observation)
    if not array.size or array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise TypeError(f"observes {array.dtype} {array.shape}, where its space says {space.dtype} {space.shape}")


def prepare(args: Args) -> tuple[Args, Environments, gym.spaces.Box]:
    """The arguments with `num_envs` and `max_episode_steps`, the environments, the action space (of Discrete, a Box).

    Refuses what cannot work, before anything is written.
    """
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
    M, spaces, limits = args.num_groups * args.group_size, [], [args.max_episode_steps]
    if args.num_envs and args.num_envs > M:
        refuse(f"--num-envs {args.num_envs}: must be at most {M}, the episodes of an iteration")
    if args.log_std_init < args.log_std_min:
        refuse(f"--log-std-init {args.log_std_init}: must be at least --log-std-min {args.log_std_min}")
    if args.target_kl and not 1e-4 <= args.kl_coef <= 100:
        refuse("--target-kl: adapts --kl-coef, which must begin between 1e-4 and 100")
    if args.vec == "envpool" and args.identical_start:
        refuse("--vec envpool: it cannot begin episodes alike; use sync, or --no-identical-start")
    try:
        for make in (TrainEnv, partial(make_eval_env, render_mode="rgb_array" if args.capture_video else None)):
            with closing(make(args)) as env:
                actions = env.action_space
                if isinstance(actions, gym.spaces.Discrete):
                    actions = gym.spaces.Box(actions.start, actions.start + actions.n - 1, (), actions.dtype)
                elif not isinstance(actions, gym.spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
                    raise TypeError(f"acts in {actions}, neither Discrete nor a Box of real numbers")
                if args.distribution == "beta" and not (actions.dtype.kind == "f" and actions.is_bounded()):
                    raise TypeError(f"acts in {env.action_space}; --distribution beta is for a bounded Box, use normal")
                spaces.append((env.observation_space.shape, actions))
                limits.append(env.spec.max_episode_steps)
                if not any(limits):
                    raise TypeError("has no time limit, and whole episodes are played; set --max-episode-steps")
                env.reset(seed=0)
                observation, *_ = env.step(env.action_space.sample())  # some mistakes show only in a step
                check_observation(observation, env.observation_space)
                if args.capture_video and make is not TrainEnv:
                    image = np.asarray(env.render() if env.render_mode else None)
                    if image.ndim != 3 or image.dtype != np.uint8:
                        raise TypeError("draws no images of bytes (height, width, 3), which --capture-video needs")
        limit = min(steps for steps in limits[:2] if steps)
        args = replace(args, num_envs=args.num_envs or min(M, 64), max_episode_steps=limit)
        envs = (EnvPool if args.vec == "envpool" else Environments)(args)
        if spaces != [(envs.observations.shape[1:], actions)] * 2:
            envs.close()
            raise TypeError("evaluation does not have the spaces of training")
    except Exception as error:
        names = ("env_kwargs", "eval_env_kwargs", "vec", "capture_video")
        given = ["env_id", *(name for name in names if getattr(args, name) != getattr(Args, name))]
        told = error if " " in str(error) else repr(error)
        refuse(f"{' '.join(f'{flag(name)} {getattr(args, name)}' for name in given)}: {told}")
    return args, envs, actions


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
