# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.7", "numpy", "threadpoolctl", "tyro", "pyyaml",
#     "tensorboard", "moviepy"
# ]
# ///
"""Proximal Policy Optimisation (PPO-clip) with a Beta policy, for bounded continuous actions, of vectors or images.

    python ppo_beta.py --env-id HalfCheetah-v4 --num-envs 16
    python ppo_beta.py --config configs/ppo_beta/CarRacing-v3.yaml
    python ppo_beta.py --resume runs/HalfCheetah-v4__ppo_beta__1__20260101-120000

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; advantages: https://arxiv.org/abs/1506.02438;
Beta policy: Chou et al. 2017, https://proceedings.mlr.press/v70/chou17a.html.

The algorithm ends with `train`; what follows keeps, evaluates and checks, and is much the same in every script.

What may surprise:
- An episode cut by a time limit bootstraps from the value of its true last observation; only termination ends a return.
- The statistics that normalise observations change once per rollout, after its update; nothing shifts within it.
- All parameters are views of one vector, `theta`, so that Adam and the gradient's norm are a few vector operations.
- Acting on vectors is done in numpy (`in_numpy`), several times as fast as torch for the few observations of one step.
- Advantages are recomputed with the current critic at every epoch (`--no-recompute-advantages` for the usual once).
- The policy acts in the unit cube, which is scaled to the action bounds: nothing is ever clipped. Log-probabilities,
  entropy and KL are those of the unit cube; the scaling adds a constant to the first two, and nothing to a ratio.
- Observations of uint8 (height, width, channels) are images: policy and critic see them through one small CNN.
"""

import copy
import csv
import difflib
import importlib
import io
import json
import math
import multiprocessing
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
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, softplus


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id of the environment; `module:Id-v0` imports the module first"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON: '{"reset_noise_scale": 0.15}'"""
    eval_env_kwargs: str = "{}"
    """arguments of the evaluation environment that differ, as JSON"""
    num_envs: int = 128
    """environments stepped together"""
    vec: Literal["sync", "async", "envpool"] = "sync"
    """how they are stepped: in turn, in a process each, or by EnvPool"""
    total_timesteps: int = 1_000_000
    """environment steps, over all environments; rounded down to whole rollouts"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks are"""
    threads: int = 1
    """torch threads; small networks are fastest with one"""
    compile: bool = True
    """compile the update (needs a C++ compiler; 3 to 20 s at the start)"""

    num_steps: int | None = None
    """steps of each environment per rollout; by default all make 1024 + 512 A for A actions, at most 4096"""
    learning_rate: float = 5e-4
    """Adam's step size at the start"""
    critic_lr_ratio: float = 3.0
    """the critic's step size, as a multiple of that"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls; linear and cosine end at 0"""
    lr_warmup: float = 0.0
    """share of the run over which the learning rate first rises from 0"""
    num_minibatches: int = 64
    """minibatches per epoch"""
    update_epochs: int = 10
    """passes over each rollout"""
    gamma: float = 0.992
    """discount"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    recompute_advantages: bool = True
    """estimate the advantages anew at every epoch, not only at the first"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """epsilon of the clipped objective"""
    clip_vloss: bool = False
    """clip the value loss too"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.25
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    target_kl: float | None = None
    """end the update of a rollout once a minibatch's KL divergence from the rollout's policy exceeds this"""
    norm_obs: bool = True
    """normalise observations by their running mean and deviation; images never are"""
    norm_reward: bool = True
    """divide rewards by the running deviation of the discounted return"""
    actor_sizes: tuple[int, ...] = (64, 64)
    """hidden layers of the policy"""
    critic_sizes: tuple[int, ...] = (64, 64)
    """hidden layers of the value function"""

    grayscale: bool = False
    """images: in shades of grey"""
    resize: int | None = None
    """images: scaled to this height and width"""
    frame_stack: int = 1
    """images: how many of the last ones the policy sees"""
    action_repeat: int = 1
    """images: each action is taken so many times; steps are counted in actions"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """images: number format of the CNN's products; bf16 is faster where the processor has it"""

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


def is_image(space: gym.Space) -> bool:
    return space.dtype == np.uint8 and len(space.shape) == 3


class Frames:
    """What the policy sees of an episode's images (H, W, C): the last few, in grey or smaller, along the last axis."""

    def __init__(self, args: Args):
        self.grayscale, self.size = args.grayscale, args.resize
        self.frames: deque[np.ndarray] = deque(maxlen=args.frame_stack)

    def begin(self, image: np.ndarray) -> np.ndarray:
        self.frames.extend([self._prepare(image)] * self.frames.maxlen)
        return np.concatenate(self.frames, axis=-1)

    def add(self, image: np.ndarray) -> np.ndarray:
        self.frames.append(self._prepare(image))
        return np.concatenate(self.frames, axis=-1)

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        image = image.copy()  # it may be a flipped view, or memory that the environment draws into again
        if self.grayscale and image.shape[-1] == 3:
            image = (image @ np.float32([[0.299], [0.587], [0.114]])).round().astype(np.uint8)  # ITU-R BT.601
        if self.size and image.shape[:2] != (self.size, self.size):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
            pixels = interpolate(pixels, (self.size, self.size), mode="area").round().byte()
            image = pixels[0].permute(1, 2, 0).numpy()
        return image


class Pixels(gym.Wrapper):
    """Shows `Frames`, and takes each action several times. Of a filmed one, `render` is all since it was last asked."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__(env)
        self.frames, self.action_repeat = Frames(args), args.action_repeat
        self.filmed, self.rendered = env.render_mode == "rgb_array", []
        shape = self.frames.begin(np.zeros(env.observation_space.shape, np.uint8)).shape
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, **how: object) -> tuple:
        observation, info = self.env.reset(**how)
        self.rendered = []
        self._render()
        return self.frames.begin(observation), info

    def step(self, action: np.ndarray) -> tuple:
        total = 0.0
        for _ in range(self.action_repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            self._render()
            if terminated or truncated:
                break
        return self.frames.add(observation), total, terminated, truncated, info

    def _render(self) -> None:
        if self.filmed:
            self.rendered.append(self.env.render())

    def render(self) -> object:
        if not self.filmed:
            return self.env.render()
        rendered, self.rendered = self.rendered, []
        return rendered


def as_pixels(env: gym.Env, args: Args) -> gym.Env:
    if is_image(env.observation_space):
        shape = env.observation_space.shape
        if shape[0] < min(shape[1:]):  # also where --resize would hide it
            raise ValueError(f"observes images of {shape}; this script needs (height, width, channels)")
        if args.grayscale and shape[2] not in (1, 3):
            raise ValueError(f"observes images of {shape}; --grayscale is for one or three channels")
        return Pixels(env, args)
    for name in ("grayscale", "resize", "frame_stack", "action_repeat", "precision"):
        if getattr(args, name) != getattr(Args, name):
            raise ValueError(f"observes no images, and {flag(name)} is for images")
    return env


class PixelsOfMany:
    """The same of an EnvPool. Where an episode ends, its action is not repeated further."""

    def __init__(self, envs: gym.Env, args: Args, num_envs: int):
        self.envs, self.action_repeat = envs, args.action_repeat
        self.frames = [Frames(args) for _ in range(num_envs)]

    def reset(self, which: np.ndarray) -> tuple:
        images, info = self.envs.reset(which)
        return np.stack([self.frames[n].begin(image) for n, image in zip(which, images, strict=True)]), info

    def step(self, actions: np.ndarray) -> tuple:
        images, totals, terminated, truncated, info = self.envs.step(actions)
        for _ in range(self.action_repeat - 1):
            running = np.flatnonzero(~(terminated | truncated))
            if not running.size:
                break
            again = self.envs.step(actions[running], running)
            images[running], rewards, terminated[running], truncated[running], _ = again
            totals[running] += rewards
        observations = np.stack([frames.add(image) for frames, image in zip(self.frames, images, strict=True)])
        return observations, totals, terminated, truncated, info

    def close(self) -> None:
        self.envs.close()


def make_eval_env(args: Args, render_mode: str | None = None) -> gym.Env:
    kwargs = json.loads(args.env_kwargs) | json.loads(args.eval_env_kwargs)
    return as_pixels(make_env(args.env_id, kwargs, render_mode), args)


class WithoutInfo(gym.Wrapper):
    """Drops what training does not read, and what a vector environment spends a tenth of its time on collecting."""

    def step(self, action: np.ndarray) -> tuple:
        return *self.env.step(action)[:4], {}


def make_train_env(args: Args) -> gym.Env:
    if multiprocessing.parent_process():
        torch.set_num_threads(1)  # in a fork, OpenMP would wait for threads that only the parent has
    return as_pixels(WithoutInfo(make_env(args.env_id, json.loads(args.env_kwargs))), args)


def make_envpool(args: Args) -> gym.Env | PixelsOfMany:
    import envpool

    kwargs = json.loads(args.env_kwargs)
    envs = envpool.make(args.env_id, "gymnasium", num_envs=args.num_envs, seed=args.seed, **kwargs)
    return PixelsOfMany(envs, args, args.num_envs) if is_image(envs.observation_space) else envs


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


class ImageMoments(RunningMoments):
    """Images are not normalised: they stay bytes until the encoder has them."""

    def update(self, batch: np.ndarray) -> None:
        pass

    def normalise(self, batch: np.ndarray) -> np.ndarray:
        return batch.copy()


def observation_moments(args: Args, shape: tuple[int, ...]) -> RunningMoments:
    return ImageMoments((), enabled=False) if len(shape) == 3 else RunningMoments(shape, args.norm_obs)


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


def in_numpy(network: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """An `mlp` until its next update, in numpy: several times as fast for the few observations of one step."""
    assert {type(layer) for layer in network[1::2]} <= {nn.Tanh}, "another network needs another in_numpy"
    *hidden, (weight, bias) = [(layer.weight.cpu().numpy().T, layer.bias.cpu().numpy()) for layer in network[::2]]

    def forward(x: np.ndarray) -> np.ndarray:
        for w, b in hidden:
            x = np.tanh(x @ w + b)
        return x @ weight + bias

    return forward


class Encoder(nn.Sequential):
    """Flat uint8 images (N, H*W*C) to features: convolutions until a side is at most four pixels."""

    def __init__(self, shape: tuple[int, ...], bf16: bool):
        *sides, channels = shape
        layers: list[nn.Module] = []
        while not layers or min(sides) > 4:
            outputs, kernel = ((16, 8), (32, 4), (64, 4))[min(len(layers) // 2, 2)]
            convolution = nn.Conv2d(channels, outputs, kernel, stride=kernel // 2, padding=kernel // 4)
            nn.init.orthogonal_(convolution.weight, math.sqrt(2))
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU()]
            channels, sides = outputs, [side // (kernel // 2) for side in sides]
        super().__init__(*layers, nn.Flatten())
        self.shape, self.bf16, self.size = shape, bf16, channels * math.prod(sides)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.view(len(images), *self.shape).permute(0, 3, 1, 2) / 255  # channels last in memory: fastest
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(pixels).float()


class Agent(nn.Module):
    """A Beta policy and a critic, which see images through one encoder, and vectors as they are."""

    def __init__(self, args: Args, observation_shape: tuple[int, ...], action_size: int):
        super().__init__()
        images = len(observation_shape) == 3
        self.encoder = Encoder(observation_shape, args.precision == "bf16") if images else nn.Identity()
        size = self.encoder.size if images else math.prod(observation_shape)
        self.actor = mlp((size, *args.actor_sizes, 2 * action_size), last_scale=0.01)
        self.critic = mlp((size, *args.critic_sizes, 1), last_scale=1.0)

    def policy(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return concentrations(self.actor(self.encoder(observations)))

    def value(self, observations: Tensor) -> Tensor:
        return self.critic(self.encoder(observations)).squeeze(-1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoder(observations)
        return *concentrations(self.actor(features)), self.critic(features).squeeze(-1)


def values_of(agent: Agent, observations: Tensor) -> Tensor:
    """In parts, as the encoder's features of a whole rollout of images would fill the memory."""
    return torch.cat([agent.value(part) for part in observations.split(1024)])


def concentrations(raw: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, beta = softplus(raw) + 1, above 1 so that the density has one peak, and that inside: each (N, A)."""
    alpha, beta = (softplus(raw) + 1).chunk(2, -1)
    return alpha, beta


def acting(agent: Agent) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The policy until its next update, for the observations of one step: vectors in numpy, images in torch."""
    if isinstance(agent.encoder, Encoder):
        device = next(agent.parameters()).device
        return lambda images: tuple(each.cpu().numpy() for each in agent.policy(torch.tensor(images, device=device)))

    actor = in_numpy(agent.actor)
    return lambda observations: np.split(np.logaddexp(actor(observations), 0) + 1, 2, -1)  # as `concentrations`


def draw(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """G_alpha / (G_alpha + G_beta) of two Gamma variables; what rounding would make 0 or 1 stays next to it."""
    gamma = torch._standard_gamma(torch.from_numpy(np.stack((alpha, beta)))).numpy()
    return (gamma[0] / gamma.sum(0)).clip(2**-24, 1 - 2**-24)


def scale(unit: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """From the unit cube (N, A) to the bounds, exactly to both."""
    unit = unit.astype(np.float64).reshape(-1, *low.shape)
    return (low * (1 - unit) + high * unit).astype(low.dtype)


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


def digamma(z: Tensor) -> Tensor:
    """The derivative of ln Γ(z), for z ≥ 1: likewise at z + 3."""
    y = z + 3
    series = (1 / 12 - (1 / 120 - 1 / (252 * y**2)) / y**2) / y**2
    return y.log() - 0.5 / y - series - (1 / z + 1 / (z + 1) + 1 / (z + 2))


def log_prob(alpha: Tensor, beta: Tensor, log_x: Tensor, log_rest: Tensor) -> Tensor:
    """Of x, by ln x and ln(1 - x). By what some policy expects of these two, it is what that policy expects."""
    return ((alpha - 1) * log_x + (beta - 1) * log_rest - log_beta(alpha, beta)).sum(-1)


def expected_logs(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """E[ln x] and E[ln(1 - x)]."""
    total = digamma(alpha + beta)
    return digamma(alpha) - total, digamma(beta) - total


def entropy_of(alpha: Tensor, beta: Tensor) -> Tensor:
    return -log_prob(alpha, beta, *expected_logs(alpha, beta))


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
    log_x: Tensor  # (B, A), of the actions x in the unit cube
    log_rest: Tensor  # (B, A), ln(1 - x)
    expected_log_x: Tensor  # (B, A), what the rollout's policy expected of them
    expected_log_rest: Tensor  # (B, A)
    expected_logprobs: Tensor  # (B,), and of its own log-probability
    logprobs: Tensor  # (B,)
    values: Tensor  # (B,), those of the rollout's critic
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(parameters: dict[str, Tensor], agent: Agent, args: Args, batch: Batch) -> tuple[Tensor, tuple]:
    alpha, beta, values = functional_call(agent, parameters, (batch.observations,))
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logratio = log_prob(alpha, beta, batch.log_x, batch.log_rest) - batch.logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    value_error = (values - batch.returns) ** 2
    if args.clip_vloss:
        near = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (near - batch.returns) ** 2)
    value_loss = 0.5 * value_error.mean()

    entropy = entropy_of(alpha, beta).mean()
    # KL(old || new), exact: ln B and the logarithms' means under the old policy are all that it takes.
    kl = (batch.expected_logprobs - log_prob(alpha, beta, batch.expected_log_x, batch.expected_log_rest)).mean()
    clip_fraction = (ratio != clipped).float().mean()
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:  # a gradient through digamma is not taken for nothing
        loss = loss - args.ent_coef * entropy
    return loss, (policy_loss, value_loss, entropy, kl, clip_fraction)


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


def update(agent: Agent, args: Args, learner: Learner, batch: Batch, indices: Tensor) -> Tensor:
    """One step of Adam on the minibatch `indices`; returns what was measured before it."""
    minibatch = Batch(*(column[indices] for column in batch))
    theta = learner.theta.detach().requires_grad_()
    names, shapes = zip(*((name, parameter.shape) for name, parameter in agent.named_parameters()), strict=True)
    pieces = theta.split([shape.numel() for shape in shapes])
    parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
    loss, measures = ppo_loss(parameters, agent, args, minibatch)
    (gradient,) = torch.autograd.grad(loss, theta)
    norm = gradient.norm()
    # Not with PPO's usual ε of 1e-5: scaled down with the policy's, most of the critic's gradients lie below it.
    learner.adam_step(gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
    return torch.stack((*measures, norm)).detach()


def compile_update(args: Args, agent: Agent, learner: Learner, columns: Batch, say: Callable[[str], None]) -> Callable:
    """Compiles by a call on copies of everything. Where that is impossible, says so and returns what there is."""
    started = time.perf_counter()
    indices = torch.arange(len(columns.returns) // args.num_minibatches, device=columns.returns.device)
    try:
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward become one graph
        on_cpu = next(agent.parameters()).device.type == "cpu"  # there, calling many small kernels from Python costs
        fast = torch.compile(update, fullgraph=True, dynamic=False, options={"cpp_wrapper": on_cpu})
        fast(agent, args, copy.deepcopy(learner), columns, indices)
    except Exception as error:
        say(f"compiling is impossible here, so the run is slower: {' '.join(str(error).split())[:100]}")
        return update
    say(f"the update compiled in {time.perf_counter() - started:.1f} s")
    return fast


def step_sizes(args: Args, agent: Agent) -> Tensor:
    """Adam's step size for each parameter at the start: larger for the critic, which has to keep up with the policy."""
    sizes = []
    for name, parameter in agent.named_parameters():
        ratio = args.critic_lr_ratio if name.startswith("critic.") else 1.0
        sizes.append(torch.full_like(parameter, args.learning_rate * ratio).flatten())
    return torch.cat(sizes)


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Policy:
    """What is deployed: a batch of observations to actions, with the normaliser frozen inside.

    Deterministic, the mean, unless asked for a `sample` of the actions as in training.
    """

    def __init__(self, agent: Agent, moments: RunningMoments, return_moments: RunningMoments, bounds: np.ndarray):
        self.agent, self.moments, self.return_moments = agent, moments, return_moments
        self.low, self.high = bounds

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        with torch.no_grad():
            alpha, beta = (each.cpu().numpy() for each in self.agent.policy(self._input(observations)))
        unit = draw(alpha, beta) if sample else alpha / (alpha + beta)
        return scale(unit, self.low, self.high)

    def value(self, observations: np.ndarray) -> np.ndarray:
        """The discounted return that the critic expects, in the environment's own rewards."""
        with torch.no_grad():
            values = self.agent.value(self._input(observations)).cpu().numpy()
        return values * self.return_moments.deviation()

    def _input(self, observations: np.ndarray) -> Tensor:
        # Torch's own memory: a matrix product's last bits depend on the alignment, which numpy's memory lacks.
        flat = self.moments.normalise(observations.reshape(len(observations), -1))
        return torch.tensor(flat, device=next(self.agent.parameters()).device)


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args = Args(**checkpoint["args"])
    bounds = checkpoint["action_bounds"].numpy()
    moments = observation_moments(args, tuple(checkpoint["observation_shape"]))
    moments.restore(checkpoint["moments"])
    return_moments = RunningMoments((), args.norm_reward)
    return_moments.restore(checkpoint["return_moments"])
    agent = Agent(args, tuple(checkpoint["observation_shape"]), bounds[0].size)
    agent.load_state_dict(checkpoint["agent"])
    return Policy(agent.to(device), moments, return_moments, bounds)


# -------------------------------------------------------------------------------------------------------- training

MEASURES = ["policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "grad_norm"]
STATE = ["explained_variance", "learning_rate", "updates", "concentration", "saturation"]
SECONDS = ["seconds_stepping", "seconds_acting", "seconds_updating"]
TABLES = {
    "episodes": ["step", "wall_time", "return", "length"],
    "progress": ["step", "wall_time", "sps", *MEASURES, *STATE, *SECONDS],
    "evaluations": ["step", "episode", "seed", "return", "length"],
}


def default_steps(rollout: int, num_envs: int, num_minibatches: int) -> int:
    """Steps of each environment for rollouts of this length, or as near as the minibatches divide them."""
    unit = num_minibatches // math.gcd(num_envs, num_minibatches)
    return max(1, round(rollout / num_envs / unit)) * unit


def train(args: Args, interrupts: Sequence[int] = ()) -> Path:
    """Returns the run directory. Once `interrupts` holds a signal's number, it stops where it can be resumed."""
    check(args)
    eval_envs = [make_eval_env(args) for _ in range(args.eval_episodes)]
    low, high = eval_envs[0].action_space.low, eval_envs[0].action_space.high
    space, images = eval_envs[0].observation_space, is_image(eval_envs[0].observation_space)
    N, D, A = args.num_envs, math.prod(space.shape), low.size
    shape = space.shape if images else (D,)
    if args.num_steps is None:  # the more actions, the more samples it takes to tell which of them were good
        args = replace(args, num_steps=default_steps(min(1024 + 512 * A, 4096), N, args.num_minibatches))
    check_rollout(args)
    T, B = args.num_steps, N * args.num_steps
    iterations = args.total_timesteps // B

    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    directory, saved = find_run(args) if args.resume else (create_run(args, device), {})
    torch.set_num_threads(args.threads)
    threadpool_limits(1, "blas")  # numpy's products are too small to share, and its threads wait without sleeping
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    agent = Agent(args, shape, A).requires_grad_(False).to(device)
    rates = step_sizes(args, agent)
    learner = Learner.of(agent)._replace(learning_rate=rates.clone())
    moments, return_moments = observation_moments(args, shape), RunningMoments((), args.norm_reward)
    policy = Policy(agent, moments, return_moments, np.stack((low, high)))
    envs = Environments(replace(args, seed=(args.seed + saved.get("step", 0)) % 2**31))  # else EnvPool repeats itself
    torch.set_num_threads(args.threads)  # again, as `make_train_env` changes it in a child process
    observations = envs.reset(np.ones(N, bool))
    returns, lengths, discounted = np.zeros(N), np.zeros(N, int), np.zeros(N)  # of the running episodes
    recent: deque[float] = deque(maxlen=100)  # returns of the last finished episodes
    seconds = np.zeros(3)  # stepping, acting, updating
    done = {"iteration": 0, "elapsed": 0.0, "updates": 0, "evaluation": {}, "best": {}, "saved": False}
    run = Run(args, directory, saved.get("sizes", {}), saved.get("step", 0))
    if saved:
        (directory / "result.json").unlink(missing_ok=True)
        agent.load_state_dict(saved["agent"])
        for tensor, value in zip(learner[1:], saved["learner"], strict=True):
            tensor.copy_(value)
        moments.restore(saved["moments"])
        return_moments.restore(saved["return_moments"])
        if envs.restore(saved["environments"], saved["observations"].numpy()):
            observations = saved["observations"].numpy()
            returns, lengths, discounted = (saved[name].numpy() for name in ("returns", "lengths", "discounted"))
        else:
            run.say(f"--vec {args.vec} cannot restore the running episodes; they begin anew, all else continues")
            observations = envs.reset(np.ones(N, bool))
        recent.extend(saved["recent"])
        seconds, done = saved["seconds"].numpy(), saved["done"]
        torch.set_rng_state(saved["random"])
        if device.type == "cuda" and "cuda_random" in saved:
            torch.cuda.set_rng_state(saved["cuda_random"], device)

    run.say(
        f"{Path(__file__).stem}  {args.env_id}  {D} observations, {A} actions in {low.min():g} to {high.max():g}\n"
        f"{N} environments ({args.vec}) x {T} steps, {args.update_epochs} epochs of {args.num_minibatches} minibatches"
        f" of {B // args.num_minibatches}, {learner.theta.numel():,} parameters, {device}\n{directory}"
    )

    seen = np.empty((T + 1, N, D), np.uint8 if images else np.float32)
    raw = seen[:T] if images else np.empty((T, N, D))  # images are seen as they are
    taken, alpha, beta = np.empty((3, T, N, A), np.float32)  # in the unit cube
    normalised = torch.empty((T + 1, N, D), dtype=torch.uint8 if images else torch.float32, device=device)
    rewards, terminated, ended = np.empty((T, N)), np.empty((T, N), bool), np.empty((T, N), bool)
    logs, scalars = torch.zeros((4, B, A), device=device), torch.zeros((5, B), device=device)
    batch = Batch(normalised[:T].view(B, D), *logs, *scalars)
    fast_update = compile_update(args, agent, learner, batch, run.say) if args.compile else update
    started = time.perf_counter() - done["elapsed"]

    for iteration in range(done["iteration"] + 1, iterations + 1):
        step, before, seconds_before = iteration * B, time.perf_counter(), seconds.copy()
        learner.learning_rate.copy_(rates * lr_factor(args, iteration, iterations))

        # Collect T steps of every environment.
        act = acting(agent)
        last_at, last_observations, episodes = [], [], []
        for t in range(T):
            clock = time.perf_counter()
            raw[t] = observations
            seen[t] = moments.normalise(observations)
            alpha[t], beta[t] = act(seen[t])
            taken[t] = draw(alpha[t], beta[t])
            scaled_actions = scale(taken[t], low, high)
            seconds[1] += time.perf_counter() - clock

            clock = time.perf_counter()
            observations, rewards[t], terminated[t], truncated = envs.step(scaled_actions)
            ended[t] = terminated[t] | truncated
            returns += rewards[t]
            lengths += 1
            if ended[t].any():
                for n in np.flatnonzero(ended[t]):
                    last_at.append((t, n))
                    last_observations.append(moments.normalise(observations[n]))
                    now = {"step": step - B + (t + 1) * N, "wall_time": round(clock - started, 3)}
                    episodes.append(now | {"return": returns[n].item(), "length": lengths[n].item()})
                observations[ended[t]] = envs.reset(ended[t])
                returns[ended[t]], lengths[ended[t]] = 0, 0
            seconds[0] += time.perf_counter() - clock
        seen[T] = moments.normalise(observations)
        normalised.copy_(torch.from_numpy(seen))

        # Scale the rewards by the deviation of the discounted return, which starts anew with every episode.
        clock = time.perf_counter()
        discounted_returns = np.empty((T, N))
        for t in range(T):
            discounted_returns[t] = discounted = discounted * args.gamma + rewards[t]
            discounted = np.where(ended[t], 0.0, discounted)
        return_moments.update(discounted_returns.ravel())
        scaled = torch.from_numpy(return_moments.scale(rewards).astype(np.float32)).to(device)
        stops = torch.from_numpy(terminated).to(device), torch.from_numpy(ended).to(device)

        # Improve the policy, and the critic with it.
        if last_at:
            where, last = tuple(np.array(last_at).T), torch.tensor(np.stack(last_observations), device=device)
        x, *policy_then = (torch.tensor(array.reshape(B, A), device=device) for array in (taken, alpha, beta))
        batch.log_x[:], batch.log_rest[:] = x.log(), torch.log1p(-x)
        batch.expected_log_x[:], batch.expected_log_rest[:] = expected = expected_logs(*policy_then)
        batch.expected_logprobs[:] = log_prob(*policy_then, *expected)
        batch.logprobs[:] = log_prob(*policy_then, batch.log_x, batch.log_rest)
        measured, kl = [], 0.0
        for epoch in range(args.update_epochs):
            if epoch == 0 or args.recompute_advantages:
                values = values_of(agent, normalised.view(-1, D)).view(T + 1, N)
                next_values, values = values[1:].clone(), values[:-1]
                if last_at:  # what an ended episode saw last, instead of what the next one saw first
                    next_values[where] = values_of(agent, last)
                advantages = generalised_advantages(scaled, values, next_values, *stops, args.gamma, args.gae_lambda)
                batch.advantages[:] = advantages.flatten()
                batch.returns[:] = (advantages + values).flatten()
            if epoch == 0:
                batch.values[:] = values.flatten()
                explained_variance = 1 - (batch.returns - batch.values).var() / batch.returns.var()
            for indices in torch.randperm(B, device=device).split(B // args.num_minibatches):
                measured.append(fast_update(agent, args, learner, batch, indices))
                if args.target_kl and (kl := measured[-1][MEASURES.index("kl")]) > args.target_kl:
                    break
            if args.target_kl and kl > args.target_kl:
                break
        moments.update(raw.reshape(B, D))
        measures = dict(zip(MEASURES, torch.stack(measured).mean(0).tolist(), strict=True))
        seconds[2] += time.perf_counter() - clock
        if not all(map(math.isfinite, (*measures.values(), moments.var.sum(), return_moments.var))):
            run.say(f"stopped: not finite in the rollout that ended at step {step:,}: {measures}")
            run.say("the last checkpoint is from before that" if done["saved"] else "there is no checkpoint yet")
            run.close()
            envs.close()
            raise SystemExit(1)

        # Log.
        done |= {"iteration": iteration, "elapsed": time.perf_counter() - started}
        done["updates"] += len(measured)
        recent.extend(episode["return"] for episode in episodes)
        row = {"step": step, "wall_time": round(done["elapsed"], 3), "sps": round(B / (time.perf_counter() - before))}
        row |= measures | {"explained_variance": explained_variance.item(), "updates": done["updates"]}
        row |= {"learning_rate": learner.learning_rate[0].item(), "concentration": (alpha + beta).mean().item()}
        row |= {"saturation": (abs(taken - 0.5) > 0.49).mean().item()}  # actions next to a bound
        row |= dict(zip(SECONDS, (seconds - seconds_before).round(4).tolist(), strict=True))
        run.record(row, episodes)

        # Evaluate.
        policy_state = {"script": Path(__file__).stem, "args": asdict(args), "step": step, "agent": agent.state_dict()}
        policy_state |= {"moments": moments.state(), "return_moments": return_moments.state()}
        policy_state |= {"action_bounds": torch.from_numpy(np.stack((low, high))), "observation_shape": list(shape)}
        if iteration * args.num_evals // iterations > (iteration - 1) * args.num_evals // iterations:
            evaluate_and_keep(args, run, directory, policy, policy_state, eval_envs, done)

        # Checkpoint.
        due = step // args.checkpoint_every > (step - B) // args.checkpoint_every
        stop = list(interrupts)  # looked at once: what stops the run has been saved
        if due or stop or iteration == iterations:
            arrays = {"observations": observations, "returns": returns, "lengths": lengths, "discounted": discounted}
            done["saved"] = True
            checkpoint = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | policy_state
            checkpoint |= {"learner": list(learner[1:]), "done": done}
            checkpoint |= {"environments": envs.state(), "recent": list(recent), "seconds": torch.from_numpy(seconds)}
            checkpoint |= {"random": torch.get_rng_state(), "sizes": run.sizes()}
            if device.type == "cuda":
                checkpoint["cuda_random"] = torch.cuda.get_rng_state(device)
            save_checkpoint(directory / "checkpoint.pt", checkpoint)

        run.progress(row, iterations * B, done, recent, f"KL {row['kl']:.4f}  concentration {row['concentration']:.1f}")
        if stop:
            command = shlex.join(["python", sys.argv[0], "--resume", str(directory)])
            run.say(f"stopped at step {step:,}; continue with\n  {command}")
            run.close()
            envs.close()
            raise SystemExit(128 + stop[0])

    finish(args, run, directory, iterations * B, done, recent, seconds)
    run.close()
    envs.close()
    return directory


# ------------------------------------------------------------------------------------------------- what is refused


def check(args: Args) -> None:
    """Refuses what cannot work, before anything is written."""
    check_numbers(
        args,
        at_least_1="num_envs num_steps num_minibatches update_epochs threads eval_episodes checkpoint_every"
        " actor_sizes critic_sizes frame_stack action_repeat",
        at_least_0="seed ent_coef vf_coef num_evals",
        above_0="learning_rate critic_lr_ratio clip_coef max_grad_norm target_kl",
        shares="gamma gae_lambda lr_warmup",
    )
    if args.resize is not None and args.resize < 8:
        refuse(f"--resize {args.resize}: must be at least 8")
    check_setup(args)
    check_environments(args)


def check_rollout(args: Args) -> None:
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size == args.num_minibatches:
        rollout = f"a rollout of {args.num_envs} x {args.num_steps} = {batch_size} steps"
        refuse(f"--num-minibatches {args.num_minibatches}: must divide {rollout} into parts of two or more")
    if args.total_timesteps < batch_size:
        refuse(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {batch_size} steps")


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
    if observations.dtype == np.uint8 and len(observations.shape) in (2, 4) and math.prod(observations.shape) >= 32**2:
        needs = "(height, width, channels), and stacks images itself (--frame-stack)"
        refuse(f"{problem}: observes images of {observations.shape}; this script needs {needs}")
    if is_image(observations) and min(observations.shape[:2]) < 8:
        refuse(f"{problem}: observes images of {observations.shape}; this script needs them 8 wide and high or more")
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
