# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "threadpoolctl", "tyro", "pyyaml",
#     "tensorboard", "moviepy"
# ]
# ///
"""Proximal Policy Optimisation (PPO-clip) with a Gaussian policy, for continuous actions.

    python ppo_continuous.py --env-id HalfCheetah-v4
    python ppo_continuous.py --resume runs/HalfCheetah-v4__ppo_continuous__1__20260101-120000

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; advantages: https://arxiv.org/abs/1506.02438.

The algorithm ends with `train`; the rest saves, evaluates and checks arguments, and is much the same in every script.

What may surprise those who know the usual PPO (`--config configs/ppo_continuous/textbook.yaml`):
- Many environments, few steps of each, 64 minibatches; gamma is 0.992, lambda 0.9, Adam's epsilon 1e-8.
- The critic's rate is three times the policy's, and the policy's standard deviation does not fall below exp(-1.5).
- Adam counts its steps anew in every rollout, as the objective is new (https://arxiv.org/abs/2412.17113).
- Advantages are recomputed with the current critic at every epoch.
- An episode cut by a time limit bootstraps from the value of its true last observation; only termination ends a return.
- The normaliser of observations changes once per rollout, after the update; the first sees them raw, clipped at ±10.
- The policy sees finite bounds as -1 and 1; the environment gets clipped actions, the loss uses them as drawn.
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
from torch.func import functional_call, grad
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published


@dataclass(frozen=True)
class Args:
    env_id: str = "HalfCheetah-v4"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
    env_kwargs: str = "{}"  # arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'
    eval_env_kwargs: str = "{}"  # arguments that evaluation changes or adds, as JSON
    num_envs: int = 128  # environments stepped together
    vec: Literal["sync", "async", "envpool"] = "sync"  # how they are stepped: in turn, in a process each, or by EnvPool
    total_timesteps: int | float = 1_000_000  # steps over all environments; rounded down to whole rollouts
    seed: int = 1  # seed of everything random
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # where the networks are
    threads: int = 1  # torch threads; small networks are fastest with one
    compile: bool = True  # compile the update (needs a C++ compiler)

    num_steps: int | None = None  # steps per environment and rollout; default: 1024 + 512 A in all (A actions), ≤ 4096
    learning_rate: float = 5e-4  # Adam's step size at the start
    critic_lr_ratio: float = 3.0  # the critic's step size, as a multiple of `learning_rate`
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # how the rate falls; linear and cosine end at 0
    lr_warmup: float = 0.0  # share of the run over which the learning rate first rises from 0
    num_minibatches: int = 64  # minibatches per epoch
    update_epochs: int = 10  # passes over each rollout
    gamma: float = 0.992  # discount
    gae_lambda: float = 0.9  # lambda of generalised advantage estimation
    recompute_advantages: bool = True  # estimate the advantages anew at every epoch, not only at the first
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # epsilon of the clipped objective
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.25  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    adam_eps: float = 1e-8  # Adam's epsilon; with PPO's usual 1e-5 most of the critic's scaled gradients lie below it
    adam_local_time: bool = True  # reset Adam's count of steps at every rollout, so that its first steps are small
    target_kl: float | None = None  # end a rollout's update once a minibatch's KL from the rollout's policy exceeds it
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    norm_reward: bool = True  # divide rewards by the discounted return's running standard deviation; clip at ±10
    actor_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the policy
    critic_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the value function
    log_std_init: float | None = None  # log of the initial standard deviation; default: -0.4 log(A) for A actions
    log_std_min: float = -1.5  # lower bound of the log standard deviation, so that exploration never ends

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


class Agent(nn.Module):
    """A Gaussian policy with a standard deviation that no state changes, a separate critic, and the normalisers."""

    def __init__(self, args: Args, observation_shape: tuple[int, ...], low: np.ndarray, high: np.ndarray):
        super().__init__()
        D, A = math.prod(observation_shape), low.size
        self.actor = mlp((D, *args.actor_sizes, A), last_scale=0.01)
        self.critic = mlp((D, *args.critic_sizes, 1), last_scale=1.0)
        log_std = max(-0.4 * math.log(A), args.log_std_min) if args.log_std_init is None else args.log_std_init
        self.log_std = nn.Parameter(torch.full((A,), log_std))
        self.moments = RunningMoments(observation_shape, args.norm_obs)
        self.return_moments = RunningMoments((), args.norm_reward)
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))
        bounded = np.isfinite(low) & np.isfinite(high)  # to the policy, such bounds are -1 and 1
        self.half_range = np.where(bounded, high / 2 - low / 2, 1).astype(low.dtype)
        self.centre = np.where(bounded, high - self.half_range, np.clip(0, low, high)).astype(low.dtype)
        self.bounds = low, high

    def distribution(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., A) and log of the standard deviation (A,) of the policy's actions."""
        return self.actor(observations), self.log_std

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.distribution(observations), self.critic(observations).squeeze(-1)

    def acting(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The policy as it is now, in numpy: actions from inputs (N, D) and normal noise (N, A); 0 gives the means."""
        mean, deviation = in_numpy(self.actor), self.log_std.cpu().exp().numpy()
        return lambda inputs, noise: mean(inputs) + deviation * noise

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        """The policy's actions (N, A) in the environment's shape and bounds."""
        low, high = self.bounds
        actions = self.centre + self.half_range * actions.reshape(-1, *low.shape)
        return np.minimum(np.maximum(actions, low), high).astype(low.dtype, copy=False)


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def generalised_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """A_t = δ_t + γλ A_{t+1}, where the sum stops at the end of an episode and δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    All (T, N). Solved for every t at once by doubling: after k rounds, A_t spans 2^k steps.
    """
    advantages = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    carry = gamma * lam * ~ended
    span = 1
    while span < len(rewards):
        advantages = torch.cat((advantages[:-span] + carry[:-span] * advantages[span:], advantages[-span:]))
        carry = torch.cat((carry[:-span] * carry[span:], carry[-span:]))
        span *= 2
    return advantages


class Batch(NamedTuple):
    observations: Tensor  # (B, D)
    actions: Tensor  # (B, A)
    logprobs: Tensor  # (B,)
    values: Tensor  # (B,), those of the rollout's critic
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(parameters: dict[str, Tensor], agent: Agent, args: Args, batch: Batch) -> tuple[Tensor, tuple]:
    mean, log_std, values = functional_call(agent, parameters, (batch.observations,))
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logratio = log_prob(mean, log_std, batch.actions) - batch.logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    value_error = (values - batch.returns) ** 2
    if args.clip_vloss:
        near = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (near - batch.returns) ** 2)
    value_loss = 0.5 * value_error.mean()

    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
    kl = (ratio - 1 - logratio).mean()  # k3, http://joschu.net/blog/kl-approx.html
    clip_fraction = (ratio != clipped).float().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, (policy_loss, value_loss, entropy, kl, clip_fraction)


MEASURES = ["policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"]
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


def update(agent: Agent, args: Args, learner: Learner, batch: Batch, indices: Tensor) -> Tensor:
    """One step of Adam on the minibatch `indices`; returns what was measured before it."""
    minibatch = Batch(*(column[indices] for column in batch))

    def loss(theta: Tensor) -> tuple[Tensor, tuple]:
        return ppo_loss(parameters_of(agent, theta), agent, args, minibatch)

    gradient, measures = grad(loss, has_aux=True)(learner.theta)
    norm = gradient.norm()
    learner.adam_step(gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), args.adam_eps)
    return torch.stack((*measures, norm))


def step_sizes(args: Args, agent: Agent) -> Tensor:
    """Adam's step size for each parameter at the start: larger for the critic, which has to keep up with the policy."""
    ratios = {parameter: args.critic_lr_ratio for parameter in agent.critic.parameters()}
    rates = [torch.full_like(p, args.learning_rate * ratios.get(p, 1.0)).flatten() for p in agent.parameters()]
    return torch.cat(rates)


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Rollout(NamedTuple):
    """T steps of N environments."""

    observations: np.ndarray  # (T, N, ...), as the environments show them
    rewards: np.ndarray  # (T, N)
    episodes: list[dict]  # the K rows of episodes.csv
    inputs: Tensor  # (T + 1, N, D), what the networks see of the observations
    last_inputs: Tensor  # (K, D), of what the K episodes that ended saw last, in the order of `ended`
    actions: Tensor  # (T, N, A)
    terminated: Tensor  # (T, N)
    ended: Tensor  # (T, N), terminated or truncated


def collect(args: Args, agent: Agent, envs: Environments, step: int, watch: "Stopwatch") -> Rollout:
    """A rollout from `step` on, with the policy and the normaliser as they are."""
    T, N, D, A = args.num_steps, args.num_envs, agent.moments.mean.numel(), agent.low.numel()
    act, normalise, device = agent.acting(), agent.moments.normaliser(), next(agent.parameters()).device
    noise = torch.randn((T, N, A)).numpy()
    observations = np.empty((T, *envs.observations.shape))
    inputs, actions = np.empty((T + 1, N, D), np.float32), np.empty((T, N, A), np.float32)
    rewards, terminated, truncated = np.empty((T, N)), np.empty((T, N), bool), np.empty((T, N), bool)
    last_inputs, episodes = [np.empty((0, D), np.float32)], []
    for t in range(T):
        observations[t] = envs.observations
        inputs[t] = normalise(envs.observations).reshape(N, D)
        actions[t] = act(inputs[t], noise[t])
        environment_actions = agent.for_environment(actions[t])
        watch.lap("acting")
        true_next, rewards[t], terminated[t], truncated[t], finished = envs.step(environment_actions)
        watch.lap("stepping")
        if finished:
            last_inputs.append(normalise(true_next[terminated[t] | truncated[t]]).reshape(-1, D))
            when = {"step": step + (t + 1) * N, "wall_time": round(watch.elapsed(), 3)}
            episodes += [when | {"return": total, "length": length} for total, length in finished]
    inputs[T] = normalise(envs.observations).reshape(N, D)
    arrays = inputs, np.concatenate(last_inputs), actions, terminated, terminated | truncated
    return Rollout(observations, rewards, episodes, *(torch.tensor(array, device=device) for array in arrays))


def scale_rewards(args: Args, agent: Agent, envs: Environments, rollout: Rollout) -> Tensor:
    """Rewards over the standard deviation of the discounted return, which starts anew with every episode. (T, N)"""
    returns, ended = np.empty_like(rollout.rewards), rollout.ended.cpu().numpy()
    for t, rewards in enumerate(rollout.rewards):
        returns[t] = envs.discounted * args.gamma + rewards
        envs.discounted = np.where(ended[t], 0.0, returns[t])
    agent.return_moments.update(returns.ravel())
    return torch.tensor(agent.return_moments.scale(rollout.rewards).astype(np.float32), device=rollout.inputs.device)


def estimate(args: Args, agent: Agent, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and values, (T, N)."""
    values = agent.critic(rollout.inputs).squeeze(-1)  # (T + 1, N)
    # What an ended episode saw last, instead of what the next one saw first.
    next_values = values[1:].masked_scatter(rollout.ended, agent.critic(rollout.last_inputs).squeeze(-1))
    values = values[:-1]
    ends = rollout.terminated, rollout.ended
    return generalised_advantages(rewards, values, next_values, *ends, args.gamma, args.gae_lambda), values


def batch_of(agent: Agent, rollout: Rollout, advantages: Tensor, values: Tensor) -> Batch:
    """The rollout's steps in one row, with log-probabilities and values by policy and critic as they are now."""
    observations, actions = rollout.inputs[:-1].flatten(0, 1), rollout.actions.flatten(0, 1)
    logprobs = log_prob(*agent.distribution(observations), actions)
    columns = (column.flatten() for column in (values, advantages, advantages + values))
    return Batch(observations, actions, logprobs, *columns)


def run_epoch(args: Args, agent: Agent, learner: Learner, update: Callable, batch: Batch, rows: Tensor) -> Tensor:
    """An update for each row of indices, ended early where the policy has moved too far; their measures, a row each."""
    measured = []
    for indices in rows:
        measured.append(update(agent, args, learner, batch, indices))
        if args.target_kl and measured[-1][MEASURES.index("approx_kl")] > args.target_kl:
            break
    return torch.stack(measured)


def improve(
    args: Args, agent: Agent, learner: Learner, rollout: Rollout, rewards: Tensor, optimise: Callable
) -> dict[str, float]:
    """Epochs of minibatches, ended early where the policy has moved too far; their mean measures."""
    measured, M = [], args.num_minibatches
    if args.adam_local_time:  # the t of its corrections: √(1 − β₂ᵗ) / (1 − β₁ᵗ) is 0.3 at t = 100, 0.8 at t = 1000
        learner.first_decay.fill_(1.0)
        learner.second_decay.fill_(1.0)
    for epoch in range(args.update_epochs):
        if epoch == 0:
            batch = batch_of(agent, rollout, *estimate(args, agent, rollout, rewards))
            explained_variance = 1 - (batch.returns - batch.values).var() / batch.returns.var()
        elif args.recompute_advantages:
            advantages, values = estimate(args, agent, rollout, rewards)
            batch = batch._replace(advantages=advantages.flatten(), returns=(advantages + values).flatten())
        shuffled = torch.randperm(len(batch.returns)).to(batch.returns.device, non_blocking=True)
        measured.append(optimise(batch, shuffled.view(M, -1)))
        if args.target_kl and measured[-1][-1, MEASURES.index("approx_kl")] > args.target_kl:
            break
    agent.log_std.clamp_(min=args.log_std_min)
    measured = torch.cat(measured)
    measures = dict(zip(MEASURES, measured.mean(0).tolist(), strict=True))
    measures |= {"explained_variance": explained_variance.item(), "learning_rate": learner.learning_rate[0].item()}
    return measures | {"updates": len(measured), "std": agent.log_std.exp().mean().item()}


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
    B = args.num_envs * args.num_steps
    iterations = args.total_timesteps // B
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    threadpool_limits(1, "blas")  # numpy's products are too small to share, and its threads wait without sleeping
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    agent = Agent(args, envs.observations.shape[1:], actions.low, actions.high).requires_grad_(False)
    rates = step_sizes(args, agent).to(device)
    learner = Learner.of(agent, device)._replace(learning_rate=rates.clone())
    progress = {"updates": 0, "recent": [], "evaluation": {}, "best": {}, "seconds": dict.fromkeys(SECONDS, 0.0)}
    with closing(envs), Run(args, agent, learner, envs, progress) as run:
        run.begin()
        fast_update = compile_update(args, agent, learner, run) if args.compile else update
        parts = args, agent, learner, fast_update
        optimise = capture_epoch(*parts) if device.type == "cuda" else partial(run_epoch, *parts)
        watch, booked = Stopwatch(progress["seconds"]), dict(progress["seconds"])

        for iteration in range(run.saved // B + 1, iterations + 1):
            step = iteration * B
            if interrupts:
                run.stop(interrupts[0], step - B)
            learner.learning_rate.copy_(rates * lr_factor(args, iteration, iterations))
            rollout = collect(args, agent, envs, step - B, watch)
            rewards = scale_rewards(args, agent, envs, rollout)
            measures = improve(args, agent, learner, rollout, rewards, optimise)
            agent.moments.update(rollout.observations.reshape(B, *agent.moments.mean.shape))
            watch.lap("updating")
            sums = agent.moments.var.sum(), agent.return_moments.var, learner.theta.sum().cpu()
            if not np.isfinite([*(measures[name] for name in MEASURES), *sums]).all():
                raise FloatingPointError(f"not finite in the rollout that ended at step {step:,}: {measures}")

            progress["updates"] += measures["updates"]
            progress["recent"] = [*progress["recent"], *(e["return"] for e in rollout.episodes)][-100:]
            if iteration * args.num_evals // iterations > (iteration - 1) * args.num_evals // iterations:
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

            if step // args.checkpoint_every > (step - B) // args.checkpoint_every or iteration == iterations:
                run.save(step)
                watch.lap("saving")
            run.show(row, iterations * B, f"KL {row['approx_kl']:.4f}  std {row['std']:.2f}")
        run.finish(iterations * B, watch.elapsed())
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
        self._act, self._normalise = agent.acting(), agent.moments.normaliser()

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        if np.shape(observations) == self.shape:
            return self._choose(observations, sample)
        if np.shape(observations)[1:] != self.shape:
            raise ValueError(f"observations of shape {np.shape(observations)}: must be {self.shape}, or a batch")
        actions = [self._choose(observation, sample) for observation in observations]
        return np.array(actions).reshape(-1, *self.agent.low.shape)

    def _choose(self, observation: np.ndarray, sample: bool) -> np.ndarray:
        noise = torch.randn(self.agent.low.numel()).numpy() if sample else np.float32(0)
        return self.agent.for_environment(self._act(self._normalise(observation).reshape(-1), noise))[0]

    def value(self, observations: np.ndarray) -> np.ndarray:
        """The discounted returns that the critic expects of a batch, in the environment's own rewards."""
        rows = self._normalise(observations).reshape(len(observations), -1)
        inputs = torch.tensor(rows, device=next(self.agent.parameters()).device)
        return self.agent.critic(inputs).squeeze(-1).cpu().numpy() * self.agent.return_moments.deviation()


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
    device, B = learner.theta.device, args.num_envs * args.num_steps
    D, A = agent.moments.mean.numel(), agent.low.numel()
    batch = Batch(*(torch.zeros(shape, device=device) for shape in ((B, D), (B, A), B, B, B, B)))
    indices = torch.arange(B // args.num_minibatches, device=device)
    return compile_by([(copy.deepcopy(agent), args, copy.deepcopy(learner), batch, indices)], update, device, run)


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


def capture_epoch(args: Args, agent: Agent, learner: Learner, update: Callable) -> Callable[[Batch, Tensor], Tensor]:
    """`run_epoch` as a graph. Where the policy moves too far, which is rare, the epoch is run again without it."""
    free = replace(args, target_kl=None)
    whole = Captured(lambda rows, *batch: run_epoch(free, agent, learner, update, Batch(*batch), rows), learner)

    def optimise(batch: Batch, rows: Tensor) -> Tensor:
        before = [tensor.clone() for tensor in learner]
        measures = whole(rows, *batch)
        if args.target_kl and (measures[:, MEASURES.index("approx_kl")] > args.target_kl).any():
            for tensor, value in zip(learner, before, strict=True):
                tensor.copy_(value)
            return run_epoch(args, agent, learner, update, batch, rows)
        return measures

    return optimise


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
        args, agent, N, T = self.args, self.agent, self.args.num_envs, self.args.num_steps
        B = N * T
        D, A, size = agent.moments.mean.numel(), agent.low.numel(), sum(p.numel() for p in agent.parameters())
        self.say(
            f"{SCRIPT}  {args.env_id}  {D} observations, {A} actions from {agent.low.min():g} to {agent.high.max():g}\n"
            f"{args.total_timesteps // B * B:,} steps: rollouts of {N} environments ({args.vec}) x {T} steps\n"
            f"{args.update_epochs} epochs of {args.num_minibatches} minibatches of {B // args.num_minibatches},"
            f" {size:,} parameters, {self.learner.theta.device}\n{self.directory}"
        )
        if slow := {type(layer).__name__ for layer in agent.actor if type(layer) not in IN_NUMPY}:
            self.say(f"acting is slower for {', '.join(sorted(slow))}, which in_numpy does not know")
        if not exact:
            self.say("the running episodes could not be restored exactly; they begin anew, all else continues")

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
    "at least 1": (1, 1e15, "num_steps num_minibatches update_epochs actor_sizes critic_sizes"),
    "between 1 and 1e15": (1, 1e15, "total_timesteps checkpoint_every num_envs eval_episodes"),
    "at least 0": (0, 1e15, "ent_coef vf_coef num_evals"),
    "above 0": (1e-300, 1e300, "learning_rate critic_lr_ratio clip_coef max_grad_norm target_kl adam_eps"),
    "a number": (-1e300, 1e300, "log_std_init log_std_min"),
    "between 0 and 1": (0, 1, "gamma gae_lambda lr_warmup"),
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


def check_observation(observation: np.ndarray, space: gym.spaces.Box) -> None:
    """Raises a TypeError unless it is what the space says; some ways of stepping would repeat or cut it to fit."""
    array = np.asarray(observation)
    if not array.size or array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise TypeError(f"observes {array.dtype} {array.shape}, where its space says {space.dtype} {space.shape}")


def prepare(args: Args) -> tuple[Args, Environments, gym.spaces.Box]:
    """The arguments with `num_steps`, environments and action space; refuses what cannot work, and writes nothing."""
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
    if args.log_std_init is not None and args.log_std_init < args.log_std_min:
        refuse(f"--log-std-init {args.log_std_init}: must be at least --log-std-min {args.log_std_min}")
    N, M, spaces = args.num_envs, args.num_minibatches, []
    try:
        for make in (TrainEnv, partial(make_eval_env, render_mode="rgb_array" if args.capture_video else None)):
            with closing(make(args)) as env:
                actions = env.action_space
                if not isinstance(actions, gym.spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
                    raise TypeError(f"acts in {actions}, not a Box of real numbers; ppo_discrete.py is for Discrete")
                spaces.append((env.observation_space.shape, actions))
                env.reset(seed=0)
                observation, *_ = env.step(actions.sample())  # some mistakes show only in a step
                check_observation(observation, env.observation_space)
                if args.capture_video and make is not TrainEnv:
                    image = np.asarray(env.render() if env.render_mode else None)
                    if image.ndim != 3 or image.dtype != np.uint8:
                        raise TypeError("draws no images of bytes (height, width, 3), which --capture-video needs")
        if args.num_steps is None:  # the more actions, the more samples it takes to tell which of them were good
            rollout, unit = min(1024 + 512 * math.prod(actions.shape), 4096), M // math.gcd(N, M)
            args = replace(args, num_steps=max(1, round(rollout / N / unit)) * unit)
        size = N * args.num_steps
        if size % M or size == M:
            refuse(f"--num-minibatches {M}: must divide {N} x {args.num_steps} = {size} steps into parts of 2 or more")
        if args.total_timesteps < size:
            refuse(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {size} steps")
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
