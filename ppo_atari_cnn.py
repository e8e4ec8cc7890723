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

The algorithm ends with `train`; what follows keeps, evaluates and checks, and is much the same in every script.

What may surprise:
- A step is one action of the agent and four frames of the game: 10M steps are 40M frames.
- The emulator does as it is told, as in the papers of DQN and PPO. ale-py's v5 environments repeat the last action
  with probability 0.25 instead: that is `--repeat-action-probability 0.25`, and whatever `--env-id` says.
- Training clips rewards to [-1, 1] and takes a lost life for an end, though the game goes on; all that is written down
  are scores of whole games, and evaluation plays whole games.
- Where there is FIRE, it is pressed when a game begins and, whatever the agent does, after a lost life: some games wait
  for it, and a deterministic agent that never learnt to press it would wait for ever.
- No environment resets by itself, so no step is spent on a reset, and none is learnt from.
- Frames stay bytes until the network, which divides its first weights by 255 rather than millions of pixels.
"""

import copy
import csv
import difflib
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
from torch.nn.functional import conv2d


@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"
    """Gymnasium id of the game"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON: '{"full_action_space": true}'"""
    eval_env_kwargs: str = "{}"
    """arguments of the evaluation environment that differ, as JSON"""
    repeat_action_probability: float = 0.0
    """chance that a frame repeats the action of the frame before; ale-py's own convention is 0.25"""
    num_envs: int = 8
    """games played together"""
    vec: Literal["ale", "envpool"] = "ale"
    """what plays them: ale-py's own vector environment, or EnvPool, whose games begin a little differently"""
    total_timesteps: int = 10_000_000
    """steps of the agent, 4 frames each, over all games; rounded down to whole rollouts"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network is"""
    threads: int = 2
    """threads of torch, and of the emulators"""
    compile: bool = True
    """compile the update (needs a C++ compiler; 10 to 30 s at the start)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of the convolutions and hidden layer in training; auto is bf16 where the processor multiplies in it, faster"""

    num_steps: int = 128
    """steps of each game per rollout"""
    learning_rate: float = 2.5e-4
    """Adam's step size at the start"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls; linear and cosine end at 0"""
    lr_warmup: float = 0.0
    """share of the run over which the learning rate first rises from 0"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 4
    """passes over each rollout"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.1
    """epsilon of the clipped objective"""
    clip_vloss: bool = False
    """clip the value loss too"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    target_kl: float | None = None
    """end the update of a rollout once a minibatch's KL divergence from the rollout's policy exceeds this"""

    num_evals: int = 10
    """evaluations during the run, evenly spaced, the last at its end; 0 for none"""
    eval_episodes: int = 10
    """whole games per evaluation: deterministic, with the same seeds each time"""
    checkpoint_every: int = 100_000
    """steps of the agent between checkpoints"""
    runs_dir: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """continue the run in this directory"""
    config: str | None = None
    """YAML or JSON file of arguments; the command line wins"""
    capture_video: bool = False
    """film the best game of every evaluation"""
    track: bool = False
    """send everything to Weights & Biases"""
    wandb_project_name: str = "solorl"
    """its project"""


# ---------------------------------------------------------------------------------------------------- environments


def make_env(env_id: str, env_kwargs: dict, render_mode: str | None = None) -> gym.Env:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is asked for: its results are published
        return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **env_kwargs)


def cover(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of a line's inputs each of fewer outputs covers, and with what weight, both (parts, outputs)."""
    edges = np.arange(outputs + 1) * inputs / outputs
    which = np.floor(edges[:-1]).astype(int) + np.arange(math.ceil(inputs / outputs) + 1)[:, None]
    overlap = np.minimum(edges[1:], which + 1) - np.maximum(edges[:-1], which)
    return which.clip(max=inputs - 1), (overlap.clip(min=0) * outputs / inputs).astype(np.float32)


class Frames(gym.Wrapper):
    """Shows a game as ale-py's vector environment does, to the bit: what the agent sees, and how a game begins.

    A step is four frames with the same action. Of the last two it shows the brighter pixels, shrunk to 84 x 84, and
    under them the three steps before. A game begins with up to 29 frames without action, or, where there is FIRE, with
    that and up to 28. (EnvPool presses FIRE last, and its first observation is four times the first frame.)
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
        """By areas, in float32 and in OpenCV's order of additions, which decides where a pixel lies between two."""
        screen = screen.astype(np.float32)
        lines = sum(screen[:, column] * weight for column, weight in zip(*self.columns, strict=True))
        frame = sum(lines[row] * weight[:, None] for row, weight in zip(*self.rows, strict=True))
        self.stack = np.concatenate((self.stack[1:], np.rint(frame[None]).astype(np.uint8)))
        return self.stack


def find_game(env_id: str) -> str:
    """The emulator's name of it, such as beam_rider."""
    import ale_py  # which registers the games

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    kwargs = gym.spec(env_id).kwargs
    if "game" not in kwargs:
        raise ValueError("not a game of ale-py's, such as ALE/Pong-v5")
    return kwargs["game"]


def has_fire(env: gym.Env) -> bool:
    return env.unwrapped.get_action_meanings()[1] == "FIRE"


def make_eval_env(args: Args, render_mode: str | None = None) -> gym.Env:
    find_game(args.env_id)
    kwargs = {"repeat_action_probability": args.repeat_action_probability} | json.loads(args.env_kwargs)
    kwargs |= json.loads(args.eval_env_kwargs) | {"frameskip": 1, "obs_type": "grayscale"}
    return Frames(make_env(args.env_id, kwargs, render_mode))


class Environments:
    """N games played together. None resets by itself, so `step` always returns the true next observation.

    An emulator that is given a seed starts from nothing, which takes as long as hundreds of steps. So a seed lasts for
    some games: with all actions since, it is what restores the running one.
    """

    seed_lasts = 10_000  # steps

    def __init__(self, args: Args):
        game = find_game(args.env_id)
        kwargs = {"repeat_action_probability": args.repeat_action_probability, "num_threads": args.threads}
        kwargs |= json.loads(args.env_kwargs)
        if args.vec == "envpool":
            import envpool

            name = game.title().replace("_", "") + "-v5"
            self.envs = envpool.make(name, "gymnasium", num_envs=args.num_envs, seed=args.seed, **kwargs)
        else:
            from ale_py.vector_env import AtariVectorEnv

            self.envs = AtariVectorEnv(game, args.num_envs, reward_clipping=False, **kwargs)
        self.num_envs, self.kind = args.num_envs, args.vec
        self.random = np.random.default_rng(args.seed)
        self.seeds = np.zeros(self.num_envs, int)
        self.began = np.full(self.num_envs, -self.seed_lasts)  # where in `actions` each seed was given
        self.lives = np.zeros(self.num_envs, int)
        with make_eval_env(args) as env:
            self.fire = has_fire(env)
        self.waits = np.zeros(self.num_envs, bool)  # whose next action is FIRE, whatever the agent does
        self.actions: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The true next observations (N, 4, 84, 84), rewards, terminated, truncated; and where a life was lost."""
        pressed = np.where(self.waits, 1, actions)
        if self.kind != "envpool":
            self.actions.append(pressed)
        return self._step(pressed)

    def _step(self, pressed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        observations, rewards, terminated, truncated, info = self.envs.step(pressed)
        lost = (info["lives"] < self.lives) & (info["lives"] > 0) & ~terminated
        self.lives, self.waits = info["lives"].copy(), lost & self.fire
        return observations, rewards, terminated, truncated, lost

    def reset(self, which: np.ndarray) -> np.ndarray:
        """New games where `which` is true; their first observations."""
        seeded = which & (len(self.actions) - self.began >= self.seed_lasts)
        self.seeds[seeded] = self.random.integers(2**31, size=seeded.sum())
        self.began[seeded] = len(self.actions)
        return self._reset(which, seeded)

    def _reset(self, which: np.ndarray, seeded: np.ndarray) -> np.ndarray:
        self.waits[which] = False
        if self.kind == "envpool":
            observations, info = self.envs.reset(np.flatnonzero(which))
            self.lives[which] = info["lives"]
            return observations
        seeds = np.where(seeded, self.seeds, -1)[which]  # -1 is none
        observations, info = self.envs.reset(seed=seeds, options={"reset_mask": which})
        self.lives[which] = info["lives"][which]
        return observations[which]

    def close(self) -> None:
        self.envs.close()

    def state(self) -> dict:
        oldest = self.began.min()
        self.actions, self.began = self.actions[oldest:], self.began - oldest
        actions = torch.from_numpy(np.array(self.actions))
        random = self.random.bit_generator.state
        return {"seeds": self.seeds.tolist(), "began": self.began.tolist(), "actions": actions, "random": random}

    def restore(self, state: dict, observations: np.ndarray) -> bool:
        """Plays again all that followed the seeds; true if that led to the same observations."""
        self.random.bit_generator.state = state["random"]
        if self.kind == "envpool":
            return False
        self.seeds, self.began = np.array(state["seeds"]), np.array(state["began"])
        self.actions = list(state["actions"].numpy())
        everyone = np.ones(self.num_envs, bool)
        restored = self._reset(everyone, everyone)
        for t, pressed in enumerate(self.actions, start=1):
            restored, _, terminated, truncated, _ = self._step(pressed)
            seeded = self.began == t  # a seed is given here; what was played before only passed the time
            again = seeded | terminated | truncated
            if again.any():
                restored[again] = self._reset(again, seeded)
        if not (same := np.array_equal(restored, observations)):
            self.began[:] = len(self.actions) - self.seed_lasts  # what follows has another history: all get new seeds
        return same


# ------------------------------------------------------------------------------------------------------- algorithm


class Agent(nn.Module):
    """The network of DQN's second paper, with two heads: the policy's logits and the value."""

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


def lowered(parameters: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """All but the heads' in the precision that training computes in."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {name: p if name.startswith(("actor", "critic")) else p.to(dtype) for name, p in parameters.items()}


def log_probs(logits: Tensor, actions: Tensor) -> Tensor:
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
    logits, values = functional_call(agent, lowered(parameters, args.precision), (batch.observations,))
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logratio = log_probs(logits, batch.actions) - batch.logprobs
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
    learner.adam_step(gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), eps=1e-5)
    return torch.stack((*measures, norm)).detach()


def decided(args: Args, device: torch.device) -> Args:
    """With a precision instead of `auto`."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return replace(args, precision="bf16" if fast else "fp32") if args.precision == "auto" else args


def compile_update(args: Args, agent: Agent, columns: Batch, say: Callable[[str], None]) -> Callable:
    """Compiles by a call on copies of everything. Where that is impossible, says so and returns what there is."""
    started = time.perf_counter()
    indices = torch.arange(len(columns.returns) // args.num_minibatches, device=columns.returns.device)
    try:
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward become one graph
        on_cpu = next(agent.parameters()).device.type == "cpu"  # there, calling many small kernels from Python costs
        fast = torch.compile(update, fullgraph=True, dynamic=False, options={"cpp_wrapper": on_cpu})
        fast(agent, args, Learner.of(copy.deepcopy(agent)), columns, indices)
    except Exception as error:
        say(f"compiling is impossible here, so the run is slower: {' '.join(str(error).split())[:100]}")
        return update
    say(f"the update compiled in {time.perf_counter() - started:.1f} s")
    return fast


def lr_factor(args: Args, iteration: int, iterations: int) -> float:
    progress = (iteration - 1) / iterations
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    rise = iteration / (args.lr_warmup * iterations) if args.lr_warmup else 1.0
    return decay[args.lr_schedule] * min(1.0, rise)


class Policy:
    """What is deployed: a batch of observations to actions. It computes in float32, whatever the training did.

    Deterministic, unless asked for a `sample` of the actions as in training. It has no `value`: what the critic expects
    are clipped rewards until the next lost life.
    """

    def __init__(self, agent: Agent):
        self.agent = agent

    def __call__(self, observations: np.ndarray, sample: bool = False) -> np.ndarray:
        with torch.no_grad():
            logits, _ = self.agent(torch.tensor(observations, device=self.agent.actor.bias.device))
            if sample:
                logits -= torch.empty_like(logits).exponential_().log()  # the largest is then a draw
        return logits.argmax(-1).cpu().numpy()


def load_policy(checkpoint_path: str | Path, device: str = "cpu") -> Policy:
    """The policy of a checkpoint, of `best.pt`, or of one in `policies/`."""
    weights = load_checkpoint(Path(checkpoint_path))["agent"]
    agent = Agent(len(weights["actor.bias"]))
    agent.load_state_dict(weights)
    return Policy(agent.to(device))


# -------------------------------------------------------------------------------------------------------- training

MEASURES = ["policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "grad_norm"]
STATE = ["explained_variance", "learning_rate", "updates"]
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
    directory, saved = find_run(args) if args.resume else (create_run(args, device), {})
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # Adam's moments of silent units fade to denormals, which stall Intel's processors
    torch.manual_seed(args.seed)

    eval_envs = [make_eval_env(args) for _ in range(args.eval_episodes)]
    N, T, A = args.num_envs, args.num_steps, int(eval_envs[0].action_space.n)
    B = N * T
    iterations = args.total_timesteps // B

    agent = Agent(A).requires_grad_(False).to(device)
    learner = Learner.of(agent)
    policy = Policy(agent)
    envs = Environments(replace(args, seed=(args.seed + saved.get("step", 0)) % 2**31))  # else EnvPool repeats itself
    observations = envs.reset(np.ones(N, bool))
    returns, lengths = np.zeros(N), np.zeros(N, int)  # of the running games
    recent: deque[float] = deque(maxlen=100)  # returns of the last finished games
    seconds = np.zeros(3)  # stepping, acting, updating
    done = {"iteration": 0, "elapsed": 0.0, "updates": 0, "evaluation": {}, "best": {}, "saved": False}
    run = Run(args, directory, saved.get("sizes", {}), saved.get("step", 0))
    if saved:
        (directory / "result.json").unlink(missing_ok=True)
        agent.load_state_dict(saved["agent"])
        for tensor, value in zip(learner[1:], saved["learner"], strict=True):
            tensor.copy_(value)
        if envs.restore(saved["environments"], saved["observations"].numpy()):
            observations = saved["observations"].numpy()
            returns, lengths = (saved[name].numpy() for name in ("returns", "lengths"))
        else:
            run.say(f"--vec {args.vec} cannot restore the running games; they begin anew, all else continues")
            observations = envs.reset(np.ones(N, bool))
        recent.extend(saved["recent"])
        seconds, done = saved["seconds"].numpy(), saved["done"]
        torch.set_rng_state(saved["random"])
        if device.type == "cuda" and "cuda_random" in saved:
            torch.cuda.set_rng_state(saved["cuda_random"], device)

    run.say(
        f"{Path(__file__).stem}  {args.env_id}  {A} actions, repeated with chance {args.repeat_action_probability:g}\n"
        f"{N} games ({args.vec}) x {T} steps, {args.update_epochs} epochs of {args.num_minibatches} minibatches"
        f" of {B // args.num_minibatches}, {learner.theta.numel():,} parameters, {args.precision}, {device}"
        f"\n{directory}"
    )

    frames = torch.empty((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device).movedim(-1, 2)
    actions = torch.zeros((T, N), dtype=torch.long, device=device)
    logits, values = torch.empty((T, N, A), device=device), torch.empty((T + 1, N), device=device)
    rewards, terminated, ended = np.empty((T, N), np.float32), np.empty((T, N), bool), np.empty((T, N), bool)
    batch = Batch(frames[:T].view(B, 4, 84, 84), actions.view(B), *(torch.zeros(B, device=device) for _ in range(4)))
    actor = copy.deepcopy(agent)  # plays with the weights in the precision that the update computes in
    fast_update = compile_update(args, agent, batch, run.say) if args.compile else update
    started = time.perf_counter() - done["elapsed"]

    for iteration in range(done["iteration"] + 1, iterations + 1):
        step, before, seconds_before = iteration * B, time.perf_counter(), seconds.copy()
        learner.learning_rate.fill_(args.learning_rate * lr_factor(args, iteration, iterations))

        # Collect T steps of every game.
        weights = lowered(dict(agent.named_parameters()), args.precision)
        for parameter, weight in zip(actor.parameters(), weights.values(), strict=True):
            parameter.data = weight
        noise = -torch.empty((T, N, A), device=device).exponential_().log()  # with it, the largest logit is a draw
        cut_at, cut_observations, episodes = [], [], []
        for t in range(T):
            clock = time.perf_counter()
            frames[t] = torch.from_numpy(observations)
            logits[t], values[t] = actor(frames[t])
            actions[t] = (logits[t] + noise[t]).argmax(-1)
            seconds[1] += time.perf_counter() - clock

            clock = time.perf_counter()
            observations, scores, over, truncated, lost = envs.step(actions[t].cpu().numpy())
            rewards[t] = scores.clip(-1, 1)
            terminated[t] = over | lost  # a lost life ends the return, but not the game
            ended[t] = terminated[t] | truncated
            returns += scores
            lengths += 1
            for n in np.flatnonzero(truncated & ~terminated[t]):
                cut_at.append((t, n))
                cut_observations.append(observations[n].copy())
            if (over := over | truncated).any():
                for n in np.flatnonzero(over):
                    now = {"step": step - B + (t + 1) * N, "wall_time": round(clock - started, 3)}
                    episodes.append(now | {"return": returns[n].item(), "length": lengths[n].item()})
                observations[over] = envs.reset(over)
                returns[over], lengths[over] = 0, 0
            seconds[0] += time.perf_counter() - clock

        # Estimate the advantages.
        clock = time.perf_counter()
        frames[T] = torch.from_numpy(observations)
        values[T] = actor(frames[T])[1]
        next_values = values[1:].clone()
        if cut_at:  # what a game that was cut showed last, instead of what the next one showed first
            next_values[tuple(np.array(cut_at).T)] = actor(torch.tensor(np.stack(cut_observations), device=device))[1]
        signals = (torch.from_numpy(signal).to(device) for signal in (terminated, ended))
        advantages = generalised_advantages(
            torch.from_numpy(rewards).to(device), values[:T], next_values, *signals, args.gamma, args.gae_lambda
        )
        batch.logprobs[:] = log_probs(logits, actions).flatten()
        batch.values[:] = values[:T].flatten()
        batch.advantages[:] = advantages.flatten()
        batch.returns[:] = batch.advantages + batch.values
        explained_variance = 1 - batch.advantages.var() / batch.returns.var()

        # Improve the policy, and the critic with it.
        measured, kl = [], 0.0
        for _ in range(args.update_epochs):
            for indices in torch.randperm(B, device=device).split(B // args.num_minibatches):
                measured.append(fast_update(agent, args, learner, batch, indices))
                if args.target_kl and (kl := measured[-1][MEASURES.index("kl")]) > args.target_kl:
                    break
            if args.target_kl and kl > args.target_kl:
                break
        measures = dict(zip(MEASURES, torch.stack(measured).mean(0).tolist(), strict=True))
        seconds[2] += time.perf_counter() - clock
        if not all(map(math.isfinite, measures.values())):
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
        row |= {"learning_rate": learner.learning_rate.item()}
        row |= dict(zip(SECONDS, (seconds - seconds_before).round(4).tolist(), strict=True))
        run.record(row, episodes)

        # Evaluate.
        policy_state = {"script": Path(__file__).stem, "args": asdict(args), "step": step, "agent": agent.state_dict()}
        if iteration * args.num_evals // iterations > (iteration - 1) * args.num_evals // iterations:
            evaluate_and_keep(args, run, directory, policy, policy_state, eval_envs, done)

        # Checkpoint.
        due = step // args.checkpoint_every > (step - B) // args.checkpoint_every
        stop = list(interrupts)  # looked at once: what stops the run has been saved
        if due or stop or iteration == iterations:
            arrays = {"observations": observations, "returns": returns, "lengths": lengths}
            done["saved"] = True
            checkpoint = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | policy_state
            checkpoint |= {"learner": list(learner[1:]), "done": done}
            checkpoint |= {"environments": envs.state(), "recent": list(recent), "seconds": torch.from_numpy(seconds)}
            checkpoint |= {"random": torch.get_rng_state(), "sizes": run.sizes()}
            if device.type == "cuda":
                checkpoint["cuda_random"] = torch.cuda.get_rng_state(device)
            save_checkpoint(directory / "checkpoint.pt", checkpoint)

        run.progress(row, iterations * B, done, recent, f"KL {row['kl']:.4f}  entropy {row['entropy']:.2f}")
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
        at_least_1="num_envs num_steps num_minibatches update_epochs threads eval_episodes checkpoint_every",
        at_least_0="seed ent_coef vf_coef num_evals",
        above_0="learning_rate clip_coef max_grad_norm target_kl",
        shares="gamma gae_lambda lr_warmup repeat_action_probability",
    )
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size == args.num_minibatches:
        rollout = f"a rollout of {args.num_envs} x {args.num_steps} = {batch_size} steps"
        refuse(f"--num-minibatches {args.num_minibatches}: must divide {rollout} into parts of two or more")
    if args.total_timesteps < batch_size:
        refuse(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {batch_size} steps")
    check_setup(args)
    check_environments(args)


def check_environments(args: Args) -> None:
    """Makes one of each kind; refuses what cannot be made, drawn or acted in."""
    problem = f"--env-id {args.env_id}"
    if not find_spec("ale_py"):
        refuse(f"{problem}: ale-py is not installed; pip install ale-py")
    for name in ("env_kwargs", "eval_env_kwargs"):
        fixed = {"frameskip", "obs_type", "repeat_action_probability"} & json.loads(getattr(args, name)).keys()
        if fixed:
            refuse(f"{flag(name)}: leave out {min(fixed)}, which the script sets")
    try:
        eval_env = make_eval_env(args, "rgb_array" if args.capture_video else None)
        check_spaces(problem, eval_env.observation_space, eval_env.action_space)
        if args.capture_video:
            problem = f"--capture-video: {args.env_id} cannot be rendered here"
            eval_env.reset(seed=0)
            eval_env.render()
        problem = f"--vec {args.vec}: cannot make {args.env_id}"
        envs = Environments(replace(args, num_envs=1))
        if getattr(envs.envs, "single_action_space", envs.envs.action_space) != eval_env.action_space:
            refuse("--eval-env-kwargs: the evaluation environment must have the training environment's actions")
    except TypeError as error:  # an argument that the environment does not have
        refuse(f"--env-kwargs {args.env_kwargs}, --eval-env-kwargs {args.eval_env_kwargs}: {error}")
    except Exception as error:
        refuse(f"{problem}: {error}")
    envs.close()
    eval_env.close()


def check_spaces(problem: str, observations: gym.Space, actions: gym.Space) -> None:
    if not isinstance(actions, gym.spaces.Discrete):
        refuse(f"{problem}: acts in {actions}; this script needs Discrete actions")


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
