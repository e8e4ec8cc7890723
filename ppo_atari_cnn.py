# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy", "tyro", "pyyaml", "tensorboard", "moviepy"
# ]
# ///
"""Proximal Policy Optimisation (PPO-clip) with the Nature network, for Atari games.

    python ppo_atari_cnn.py --env-id ALE/Breakout-v5
    python ppo_atari_cnn.py --resume runs/ALE-Breakout-v5__ppo_atari_cnn__1__20260101-120000

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; network: https://doi.org/10.1038/nature14236.

The algorithm ends with `train`; the rest saves, evaluates and checks arguments, and is much the same in every script.

What may surprise:
- A step is one action of the agent and four frames of the game: 10M steps are 40M frames.
- Actions are not sticky, as in the papers of DQN and PPO. ale-py's v5 environments repeat the last action with
  probability 0.25: that is `--repeat-action-probability 0.25` here, whatever the version in `--env-id`.
- Training clips rewards to [-1, 1] and treats a lost life as an end, though the game goes on; all returns that are
  logged are scores of whole games, and evaluation plays whole games.
- Where there is FIRE, it is pressed when a game begins and, whatever the agent does, after a lost life: some games wait
  for it, and a deterministic agent that never learnt to press it would wait for ever. The action that the agent chose
  is then neither played nor learnt from.
- No environment resets by itself, so no step is spent on a reset, and none is learnt from.
- Frames stay bytes until the network, which divides its first weights by 255 rather than millions of pixels.
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
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from gymnasium.wrappers import RecordVideo
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import conv2d
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published


@dataclass(frozen=True)
class Args:
    env_id: str = "ALE/Pong-v5"  # Gymnasium id of the game
    env_kwargs: str = "{}"  # arguments of the environment, as JSON: '{"full_action_space": true}'
    eval_env_kwargs: str = "{}"  # arguments that evaluation changes or adds, as JSON
    repeat_action_probability: float = 0.0  # chance that a frame repeats the last action (sticky); ale-py's own is 0.25
    num_envs: int = 8  # games played together
    vec: Literal["ale", "envpool"] = "ale"  # ale-py's own vector environment, or EnvPool, whose games begin differently
    total_timesteps: int | float = 10_000_000  # steps over all games, 4 frames each; rounded down to whole rollouts
    seed: int = 1  # seed of everything random
    device: Literal["cpu", "cuda", "auto"] = "auto"  # where the network is
    threads: int = 2  # threads of torch, and of the emulators
    compile: bool = True  # compile the update (needs a C++ compiler)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of training, except the heads; auto: bf16 where it is fast

    num_steps: int = 128  # steps per game and rollout
    learning_rate: float = 2.5e-4  # Adam's step size at the start
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # how the rate falls; linear and cosine end at 0
    lr_warmup: float = 0.0  # share of the run over which the learning rate first rises from 0
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over each rollout
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.1  # epsilon of the clipped objective
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    adam_eps: float = 1e-5  # Adam's epsilon
    target_kl: float | None = None  # end a rollout's update once a minibatch's KL from the rollout's policy exceeds it

    num_evals: int = 10  # evaluations during the run, evenly spaced, the last at its end; 0 for none
    eval_episodes: int = 10  # whole games per evaluation: deterministic, with the same seeds each time
    checkpoint_every: int | float = 100_000  # steps between checkpoints
    runs_dir: str = "runs"  # where run directories are made
    resume: str | None = None  # continue the run in this directory
    config: str | None = None  # YAML or JSON file of arguments; the command line wins
    capture_video: bool = False  # film the best game of every evaluation
    track: bool = False  # send everything to Weights & Biases
    wandb_project_name: str = "solorl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team

    def __post_init__(self):
        check(self)


# ---------------------------------------------------------------------------------------------------- environments


def find_game(env_id: str) -> str:
    """The emulator's name of the game, such as beam_rider."""
    try:
        import ale_py  # which registers the games
    except ImportError:
        raise ValueError("ale-py is not installed; pip install ale-py") from None
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    kwargs = gym.spec(env_id).kwargs
    if "game" not in kwargs:
        raise ValueError("is not an ale-py game, such as ALE/Pong-v5; ppo_discrete.py is for other Discrete actions")
    return kwargs["game"]


def has_fire(env: gym.Env) -> bool:
    return env.unwrapped.get_action_meanings()[1] == "FIRE"


def cover(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which inputs of a line each of its fewer outputs covers, and with what weights, both (parts, outputs)."""
    edges = np.arange(outputs + 1) * inputs / outputs
    which = np.floor(edges[:-1]).astype(int) + np.arange(math.ceil(inputs / outputs) + 1)[:, None]
    overlap = np.minimum(edges[1:], which + 1) - np.maximum(edges[:-1], which)
    return which.clip(max=inputs - 1), (overlap.clip(min=0) * outputs / inputs).astype(np.float32)


class Game(gym.Wrapper):
    """Shows a game as ale-py's vector environment does, to the bit: what the agent sees, and how a game begins.

    A step is four frames with the same action. It shows, for each pixel, the brighter of the last two, shrunk to
    84 x 84, after the three steps before. A game begins with up to 29 frames without action, or, where there is FIRE,
    with FIRE and up to 28. (EnvPool presses FIRE last, and its first observation is four times the first frame.)
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.metadata = env.metadata | {"render_fps": 15}  # a quarter of the console's 60
        height, width = env.observation_space.shape
        self.rows, self.columns = cover(height, 84), cover(width, 84)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        screen, info = self.env.reset(seed=seed, options=options)
        opening = [0] * int(self.np_random.integers(30))
        if has_fire(self.env):
            opening[:1] = [1]
        for action in opening:
            screen, _, terminated, _, info = self.env.step(action)
            if terminated:
                screen, info = self.env.reset()
        self.stack, self.lives, self.waits = np.zeros((4, 84, 84), np.uint8), info["lives"], False
        return self._see(screen), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        screens, total = [], 0.0
        if self.waits:
            action = 1
        for _ in range(4):
            screen, reward, terminated, truncated, info = self.env.step(action)
            screens.append(screen)
            total += reward
            if terminated or truncated:
                break
        self.waits = has_fire(self.env) and 0 < info["lives"] < self.lives
        self.lives = info["lives"]
        return self._see(np.max(screens[-2:], axis=0)), total, terminated, truncated, info

    def _see(self, screen: np.ndarray) -> np.ndarray:
        """Shrinks by areas, in float32 and in OpenCV's order of additions, which decides how ties round."""
        screen = screen.astype(np.float32)
        lines = sum(screen[:, column] * weight for column, weight in zip(*self.columns, strict=True))
        frame = sum(lines[row] * weight[:, None] for row, weight in zip(*self.rows, strict=True))
        self.stack = np.concatenate((self.stack[1:], np.rint(frame[None]).astype(np.uint8)))
        return self.stack


def make_eval_env(args: Args, render_mode: str | None = None) -> gym.Env:
    find_game(args.env_id)
    kwargs = {"repeat_action_probability": args.repeat_action_probability} | json.loads(args.env_kwargs)
    kwargs |= json.loads(args.eval_env_kwargs) | {"frameskip": 1, "obs_type": "grayscale"}
    return Game(gym.make(args.env_id, render_mode=render_mode, disable_env_checker=True, **kwargs))


class Environments:
    """N games played together.

    An emulator that is given a seed starts from nothing, which takes as long as hundreds of steps. So a seed lasts for
    some games: with all actions since, it is what restores the running one.
    """

    running = ("observations", "returns", "lengths")  # of the running games
    seed_lasts = 10_000  # steps

    def __init__(self, args: Args):
        self.args, self.random = args, np.random.default_rng(args.seed)
        self.envs = self._make(args)
        with closing(make_eval_env(args)) as env:
            self.fire = has_fire(env)
        N = args.num_envs
        self.returns, self.lengths, self.lives = np.zeros(N), np.zeros(N, int), np.zeros(N, int)
        self.waits = np.zeros(N, bool)  # whose next action is FIRE, whatever the agent does
        self.actions: list[np.ndarray] = []
        self.seeds, self.began = np.zeros(N, int), np.full(N, -self.seed_lasts)  # where in `actions` each was given
        self.observations = self._reset(np.ones(N, bool))

    def _make(self, args: Args) -> gym.vector.VectorEnv:
        game = find_game(args.env_id)
        from ale_py.vector_env import AtariVectorEnv

        return AtariVectorEnv(game, args.num_envs, reward_clipping=False, **self._kwargs(args))

    def _kwargs(self, args: Args) -> dict:
        kwargs = {"repeat_action_probability": args.repeat_action_probability, "num_threads": args.threads}
        return kwargs | json.loads(args.env_kwargs)

    def _reset(self, which: np.ndarray) -> np.ndarray:
        """Begins a game where `which` is true; returns the observations of all."""
        seeded = which & (len(self.actions) - self.began >= self.seed_lasts)
        self.seeds[seeded] = self.random.integers(2**31, size=seeded.sum())
        self.began[seeded] = len(self.actions)
        return self._begin(which, seeded)

    def _begin(self, which: np.ndarray, seeded: np.ndarray) -> np.ndarray:
        seeds = np.where(seeded, self.seeds, -1)[which]  # -1 is none
        observations, info = self.envs.reset(seed=seeds, options={"reset_mask": which})
        self.lives, self.waits = info["lives"].copy(), self.waits & ~which
        self.returns[which], self.lengths[which] = 0, 0
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[tuple]]:
        """The true next observations, rewards, terminated, truncated; returns and lengths of the games that ended.

        A lost life counts as `terminated`, though the game goes on. Where a game ended, the next begins:
        `self.observations` is what to act on.
        """
        actions = np.where(self.waits, 1, actions)
        self.actions.append(actions)
        observations, rewards, terminated, truncated, lost = self._step(actions)
        self.observations, finished, ended = observations, [], terminated | truncated
        if ended.any():
            finished = list(zip(self.returns[ended].tolist(), self.lengths[ended].tolist(), strict=True))
            self.observations = self._reset(ended)
        return observations, rewards, terminated | lost, truncated, finished

    def _step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        observations, rewards, terminated, truncated, info = self.envs.step(actions)
        lost = (info["lives"] < self.lives) & (info["lives"] > 0) & ~terminated
        self.lives, self.waits = info["lives"].copy(), lost & self.fire
        self.returns += rewards
        self.lengths += 1
        return observations, rewards, terminated, truncated, lost

    def state(self) -> dict:
        oldest = self.began.min()
        self.actions, self.began = self.actions[oldest:], self.began - oldest
        names = (*self.running, "seeds", "began", "actions")
        state = {name: torch.from_numpy(np.array(getattr(self, name))) for name in names}
        return state | {"random": self.random.bit_generator.state}

    def restore(self, state: dict) -> bool:
        """Plays again all that followed the seeds; returns whether that led to the same observations and returns."""
        self.random.bit_generator.state = state["random"]
        self.seeds, self.began = state["seeds"].numpy(), state["began"].numpy()
        self.actions = list(state["actions"].numpy())
        everyone = np.ones(len(self.seeds), bool)
        self.observations = self._begin(everyone, everyone)
        for t, actions in enumerate(self.actions, start=1):
            self.observations, _, terminated, truncated, _ = self._step(actions)
            seeded = self.began == t  # a seed is given here; what was played before only passed the time
            again = seeded | terminated | truncated
            if again.any():
                self.observations = self._begin(again, seeded)
        if all(np.array_equal(getattr(self, name), state[name]) for name in self.running):
            return True
        self.began[:] = len(self.actions) - self.seed_lasts  # what follows has another history: all get new seeds
        self.observations = self._reset(everyone)
        return False

    def close(self) -> None:
        self.envs.close()


# ------------------------------------------------------------------------------------------------------- algorithm


class Agent(nn.Module):
    """The network of the DQN paper in Nature, with two heads: the policy's logits and the value."""

    def __init__(self, actions: int):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 32, 8, stride=4)
        self.conv2 = nn.Conv2d(32, 64, 4, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.hidden = nn.Linear(64 * 7 * 7, 512)
        self.actor, self.critic = nn.Linear(512, actions), nn.Linear(512, 1)
        for layer in self.children():
            nn.init.orthogonal_(layer.weight, {self.actor: 0.01, self.critic: 1.0}.get(layer, math.sqrt(2)))
            nn.init.zeros_(layer.bias)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, 84, 84) bytes to logits (B, A) and values (B,); all but the heads in the precision of its weights."""
        x = frames.to(self.conv1.weight.dtype)  # whole numbers to 255 are exact in bfloat16 too
        x = conv2d(x, self.conv1.weight / 255, self.conv1.bias, stride=4).relu()
        x = self.conv3(self.conv2(x).relu()).relu()
        x = self.hidden(x.movedim(1, -1).flatten(1)).relu().float()  # as it lies in memory, channels last
        return self.actor(x), self.critic(x).squeeze(-1)


def lower_precision(parameters: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The parameters, those of the heads as they are, the others in the precision of training."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {name: p if name.startswith(("actor", "critic")) else p.to(dtype) for name, p in parameters.items()}


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


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
    observations: Tensor  # (B, 4, 84, 84) bytes, the four pixels of a place side by side in memory
    actions: Tensor  # (B,)
    logprobs: Tensor  # (B,)
    values: Tensor  # (B,), those of the rollout's network
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(parameters: dict[str, Tensor], agent: Agent, args: Args, batch: Batch) -> tuple[Tensor, tuple]:
    logits, values = functional_call(agent, lower_precision(parameters, args.precision), (batch.observations,))
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logratio = log_prob(logits, batch.actions) - batch.logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    value_error = (values - batch.returns) ** 2
    if args.clip_vloss:
        near = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (near - batch.returns) ** 2)
    value_loss = 0.5 * value_error.mean()

    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
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


def resolve_precision(args: Args) -> Args:
    """The arguments with bf16 or fp32 instead of `auto`."""
    if args.device != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return replace(args, precision="bf16" if fast else "fp32") if args.precision == "auto" else args


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Rollout(NamedTuple):
    """T steps of N games."""

    observations: Tensor  # (T + 1, N, 4, 84, 84) bytes, the four pixels of a place side by side in memory
    episodes: list[dict]  # rows of episodes.csv
    actions: Tensor  # (T, N)
    logprobs: Tensor  # (T, N)
    values: Tensor  # (T + 1, N)
    last_values: Tensor  # (K,), of what the K games that were cut showed last, in the order of `truncated`
    rewards: Tensor  # (T, N), as the games pay them
    terminated: Tensor  # (T, N), where a game or a life ended
    truncated: Tensor  # (T, N), where a game was cut
    chosen: Tensor  # (T, N), where the agent's action was played; after a lost life FIRE is, whatever it was


def see(agent: Agent, parameters: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Logits and value of each game, (N, A + 1)."""
    logits, values = functional_call(agent, parameters, (frames,))
    return torch.cat((logits, values[:, None]), -1)


def collect(
    args: Args, agent: Agent, envs: Environments, look: Callable[[Tensor], Tensor], step: int, watch: "Stopwatch"
) -> Rollout:
    """A rollout from `step` on; `look` gives logits and values of the network as it is."""
    T, N, A, device = args.num_steps, args.num_envs, agent.actor.out_features, agent.actor.bias.device
    noise = -torch.empty((T, N, A)).exponential_().log()  # with it, the largest logit is a draw
    observations = torch.empty((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device).movedim(-1, 2)
    actions, outputs = torch.empty((T, N), dtype=torch.long), torch.empty((T + 1, N, A + 1))
    rewards, (terminated, truncated, chosen) = np.empty((T, N), np.float32), np.empty((3, T, N), bool)
    last_values, episodes = [torch.empty(0)], []
    for t in range(T):
        observations[t] = torch.from_numpy(envs.observations)
        outputs[t] = look(observations[t])
        actions[t] = (outputs[t, :, :A] + noise[t]).argmax(-1)
        environment_actions, chosen[t] = actions[t].numpy(), ~envs.waits
        watch.lap("acting")
        true_next, rewards[t], terminated[t], truncated[t], finished = envs.step(environment_actions)
        watch.lap("stepping")
        if truncated[t].any():
            last_values.append(look(torch.tensor(true_next, device=device)).cpu()[truncated[t], A])
        if finished:
            when = {"step": step + (t + 1) * N, "wall_time": round(watch.elapsed(), 3)}
            episodes += [when | {"return": total, "length": length} for total, length in finished]
    observations[T] = torch.from_numpy(envs.observations)
    outputs[T] = look(observations[T])
    values = outputs[..., A].contiguous()  # for other strides the update would be compiled again
    tensors = actions, log_prob(outputs[:T, :, :A], actions), values, torch.cat(last_values)
    tensors += tuple(map(torch.from_numpy, (rewards, terminated, truncated, chosen)))
    return Rollout(observations, episodes, *(tensor.to(device) for tensor in tensors))


def estimate(args: Args, rollout: Rollout) -> Tensor:
    """Advantages, (T, N), of clipped rewards."""
    # What a game that was cut showed last, instead of what the next one showed first.
    next_values = rollout.values[1:].masked_scatter(rollout.truncated, rollout.last_values)
    ends = rollout.terminated, rollout.terminated | rollout.truncated
    rewards, values = rollout.rewards.clamp(-1, 1), rollout.values[:-1]
    return generalised_advantages(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)


def batch_of(rollout: Rollout, advantages: Tensor) -> Batch:
    """The rollout's steps in one row."""
    values = rollout.values[:-1]
    columns = rollout.actions, rollout.logprobs, values, advantages, advantages + values
    return Batch(rollout.observations[:-1].flatten(0, 1), *(column.flatten() for column in columns))


def run_epoch(args: Args, agent: Agent, learner: Learner, update: Callable, batch: Batch, rows: Tensor) -> Tensor:
    """An update for each row of indices, ended early where the policy has moved too far; their measures, a row each."""
    measured = []
    for indices in rows:
        measured.append(update(agent, args, learner, batch, indices))
        if args.target_kl and measured[-1][MEASURES.index("approx_kl")] > args.target_kl:
            break
    return torch.stack(measured)


def improve(args: Args, learner: Learner, rollout: Rollout, optimise: Callable) -> dict[str, float]:
    """Epochs of minibatches, ended early where the policy has moved too far; their mean measures.

    Only of steps that the agent chose; some come more than once in an epoch, so that minibatches keep their size.
    """
    batch, measured = batch_of(rollout, estimate(args, rollout)), []
    explained_variance = 1 - (batch.returns - batch.values).var() / batch.returns.var()
    chosen = rollout.chosen.flatten().nonzero().squeeze(-1)
    for _ in range(args.update_epochs):
        shuffled = chosen[torch.randperm(len(chosen)).to(chosen.device, non_blocking=True)]
        shuffled = shuffled.repeat(math.ceil(len(batch.returns) / max(1, len(chosen))))[: len(batch.returns)]
        measured.append(optimise(batch, shuffled.view(args.num_minibatches, -1)))
        if args.target_kl and measured[-1][-1, MEASURES.index("approx_kl")] > args.target_kl:
            break
    measured = torch.cat(measured)
    measures = dict(zip(MEASURES, measured.mean(0).tolist(), strict=True))
    measures |= {"explained_variance": explained_variance.item(), "learning_rate": learner.learning_rate.item()}
    return measures | {"updates": len(measured)}


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
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.backends.cudnn.deterministic = True  # else a resumed run learns something else
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: a policy earns on a CPU what it does on a GPU
    torch.manual_seed(args.seed)

    agent = Agent(int(actions.n)).requires_grad_(False)
    learner = Learner.of(agent, device)
    progress = {"updates": 0, "recent": [], "evaluation": {}, "best": {}, "seconds": dict.fromkeys(SECONDS, 0.0)}
    with closing(envs), Run(args, agent, learner, envs, progress) as run:
        run.begin()
        fast_update = compile_update(args, agent, learner, run) if args.compile else update
        parts = args, agent, learner, fast_update
        optimise = capture_epoch(*parts) if device.type == "cuda" else partial(run_epoch, *parts)
        lowered = lower_precision(dict(agent.named_parameters()), args.precision)
        look = partial(see, agent, lowered)
        look = Captured(look, ()) if device.type == "cuda" else look
        watch, booked = Stopwatch(progress["seconds"]), dict(progress["seconds"])

        for iteration in range(run.saved // B + 1, iterations + 1):
            step = iteration * B
            if interrupts:
                run.stop(interrupts[0], step - B)
            learner.learning_rate.fill_(args.learning_rate * lr_factor(args, iteration, iterations))
            for name, learnt in lower_precision(dict(agent.named_parameters()), args.precision).items():
                lowered[name].copy_(learnt)
            rollout = collect(args, agent, envs, look, step - B, watch)
            measures = improve(args, learner, rollout, optimise)
            watch.lap("updating")
            if not np.isfinite([*(measures[name] for name in MEASURES), learner.theta.sum().cpu()]).all():
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
            run.show(row, iterations * B, f"KL {row['approx_kl']:.4f}  entropy {row['entropy']:.2f}")
        run.finish(iterations * B, watch.elapsed())
    return run.directory


# ------------------------------------------------------------------------------------------ evaluation, run directory


class Policy:
    """The policy to deploy: it maps one observation to an action, a batch of them to a batch of actions.

    Every row is computed alone, so that an action does not depend on what else is in the batch, to the last bit, and in
    float32, whatever the training did. Deterministic, unless asked for a `sample` of the actions as in training. It has
    no `value`: what the critic expects are clipped rewards until the next lost life.
    """

    def __init__(self, args: Args, agent: Agent):
        self.agent, self.shape = agent, (4, 84, 84)
        self.discount, self.bootstraps = args.gamma, ("truncated",)

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        if np.shape(observations) == self.shape:
            return self._choose(observations, sample)
        if np.shape(observations)[1:] != self.shape:
            raise ValueError(f"observations of shape {np.shape(observations)}: must be {self.shape}, or a batch")
        actions = [self._choose(observation, sample) for observation in observations]
        return np.array(actions, int)

    def _choose(self, observation: np.ndarray, sample: bool) -> np.ndarray:
        logits, _ = self.agent(torch.tensor(observation[None], device=self.agent.actor.bias.device))
        if sample:
            logits -= torch.empty_like(logits).exponential_().log()  # the largest is then a draw
        return logits.argmax(-1).cpu().numpy()[0]


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    checkpoint = load_checkpoint(Path(checkpoint_path))
    args, state = Args(**checkpoint["args"]), checkpoint["agent"]
    agent = Agent(len(state["actor.bias"]))
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
    frames = torch.zeros((B, 84, 84, 4), dtype=torch.uint8, device=device).movedim(-1, 1)
    actions = torch.zeros(B, dtype=torch.long, device=device)
    batch = Batch(frames, actions, *(torch.zeros(B, device=device) for _ in range(4)))
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
        B, A, size = N * T, agent.actor.out_features, sum(p.numel() for p in agent.parameters())
        self.say(
            f"{SCRIPT}  {args.env_id}  {A} actions, repeated with chance {args.repeat_action_probability:g}\n"
            f"{args.total_timesteps // B * B:,} steps: rollouts of {N} games ({args.vec}) x {T} steps\n"
            f"{args.update_epochs} epochs of {args.num_minibatches} minibatches of {B // args.num_minibatches},"
            f" {size:,} parameters, {args.precision}, {agent.actor.bias.device}\n{self.directory}"
        )
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
    "at least 1": (1, 1e15, "num_steps num_minibatches update_epochs"),
    "between 1 and 1e15": (1, 1e15, "total_timesteps checkpoint_every num_envs eval_episodes"),
    "at least 0": (0, 1e15, "ent_coef vf_coef num_evals"),
    "above 0": (1e-300, 1e300, "learning_rate clip_coef max_grad_norm target_kl adam_eps"),
    "between 0 and 1": (0, 1, "gamma gae_lambda lr_warmup repeat_action_probability"),
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
    """EnvPool seeds its games itself, so they cannot be played again; an end at the time limit counts as a cut."""

    def _make(self, args: Args) -> gym.Env:
        import envpool

        seeds = self.random.integers(2**31, size=args.num_envs).tolist()  # from one seed it counts on into other runs'
        name = "".join(map(str.capitalize, find_game(args.env_id).split("_"))) + "-v5"
        return envpool.make(name, "gymnasium", num_envs=args.num_envs, seed=seeds, **self._kwargs(args))

    def _begin(self, which: np.ndarray, seeded: np.ndarray) -> np.ndarray:
        first, info = self.envs.reset(np.flatnonzero(which))
        observations = first if which.all() else self.observations.copy()
        observations[which] = first
        self.lives[which], self.waits = info["lives"], self.waits & ~which
        self.returns[which], self.lengths[which] = 0, 0
        return observations

    def state(self) -> dict:
        self.actions.clear()
        return {"seed": self.random.integers(2**31).item()}  # from which other games follow

    def restore(self, state: dict) -> bool:
        self.__init__(replace(self.args, seed=state["seed"]))
        return False


def prepare(args: Args) -> tuple[Args, Environments, gym.spaces.Discrete]:
    """The arguments with a precision, environments and action space; refuses what cannot work, and writes nothing."""
    for name, package in (("vec", "envpool"), ("track", "wandb")):
        if getattr(args, name) in (package, True) and not find_spec(package):
            refuse(f"{flag(name)}: {package} is not installed; pip install {package}")
    online = args.track and os.environ.get("WANDB_MODE", "online") == "online"
    if online and not importlib.import_module("wandb").login(prompt=False):
        refuse("--track: not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here; use cpu")
    N, M = args.num_envs, args.num_minibatches
    size = N * args.num_steps
    if size % M or size == M:
        refuse(f"--num-minibatches {M}: must divide {N} x {args.num_steps} = {size} steps into parts of 2 or more")
    if args.total_timesteps < size:
        refuse(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {size} steps")
    try:
        for name in ("env_kwargs", "eval_env_kwargs"):
            if fixed := {"frameskip", "obs_type", "repeat_action_probability"} & json.loads(getattr(args, name)).keys():
                raise ValueError(f"leave out {min(fixed)}, which the script sets")
            if "max_episode_steps" in json.loads(getattr(args, name)):
                raise ValueError("max_episode_steps would count frames; use max_num_frames_per_episode")
        with closing(make_eval_env(args, "rgb_array" if args.capture_video else None)) as env:
            actions = env.action_space
            if not isinstance(actions, gym.spaces.Discrete):
                raise TypeError(f"acts in {actions}; this script needs Discrete actions")
            env.reset(seed=0)
            env.step(actions.sample())  # some mistakes show only in a step
            if env.render_mode:
                env.render()
        envs = (EnvPool if args.vec == "envpool" else Environments)(args)
        if getattr(envs.envs, "single_action_space", envs.envs.action_space) != actions:
            envs.close()
            raise TypeError("evaluation does not have the actions of training")
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
    train(interrupts=catch_interrupts(), args=parse(sys.argv[1:]))
