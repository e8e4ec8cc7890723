"""SAC: its mathematics against independent computations, and the promises of its run directory."""

import copy
import csv
import json
import math
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import sac_continuous as sac
from sac_continuous import Args, ReplayBuffer, RunningMoments, load_policy, make_eval_env, parse, train
from tests.marks import needs_compiler

SCRIPT = Path(sac.__file__)
SMALL = Args(
    env_id="tests.envs:Mirror-v0",
    num_envs=4,
    total_timesteps=1024,
    learning_starts=128,
    updates_per_step=0.25,
    batch_size=32,
    buffer_size=600,
    actor_sizes=(32, 32),
    critic_sizes=(32, 32),
    num_evals=2,
    eval_episodes=2,
    checkpoint_every=256,
    compile=False,
    precision="fp32",
    threads=1,
)


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def float32_products():
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # which training chooses for its process


def load(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(a: Path, b: Path) -> bool:
    """Equal weights, normaliser, replay buffer and rows, bit for bit; only the wall time may differ."""
    one, other = load(a), load(b)
    tensors = [[*saved["agent"].values(), saved["target"], *saved["buffer"]["rings"]] for saved in (one, other)]
    tensors = all(map(torch.equal, *tensors))
    moments = all(torch.equal(one["moments"][name], other["moments"][name]) for name in ("mean", "var"))
    return tensors and moments and rows(a, "episodes") == rows(b, "episodes")


def rows(run: Path, table: str) -> list[dict]:
    with (run / f"{table}.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]


def command(args: Args, *more: str) -> list[str]:
    """The command line of `args`."""
    words = [sys.executable, str(SCRIPT)]
    for name, value in vars(args).items():
        if value != getattr(Args, name):
            flag = name.replace("_", "-")
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", *map(str, values)]
    return [*words, *more]


# ------------------------------------------------------------------------------------------------------ mathematics


def test_squashed_log_probabilities_are_exact():
    torch.manual_seed(0)
    outputs, noise = torch.randn(1, 50, 6, dtype=torch.float64).clamp(max=2), torch.randn(50, 3, dtype=torch.float64)
    actions, logprobs = sac.squash(outputs, noise)
    mean, log_std = outputs[0].chunk(2, -1)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise))
    torch.testing.assert_close(logprobs, squashed.log_prob(actions).sum(-1))


def test_log_probabilities_stay_finite_where_tanh_is_1():
    outputs = torch.tensor([[[200.0, -200.0, 0.0, 50.0]]], requires_grad=True)
    actions, logprobs = sac.squash(outputs, torch.ones(1, 2))
    assert actions.tolist() == [[1, -1]]
    expected = -1 - 2 - math.log(2 * math.pi) + 2 * (200 + 200 + 1 - math.e**2 / 1e9) - 4 * math.log(2)
    assert logprobs.item() == pytest.approx(expected, rel=0.05)
    (gradient,) = torch.autograd.grad(logprobs.sum(), outputs)
    assert gradient.isfinite().all()


def test_actions_cover_uneven_bounds_and_their_density_is_that_of_the_log_probability():
    torch.manual_seed(0)
    low, high = np.array([[-1.0, 0.0]]), np.array([[3.0, 0.5]])
    agent = sac.Agent(Args(), 3, 2).requires_grad_(False)
    policy = sac.Policy(agent, RunningMoments((3,), False), np.stack((low, high)))
    actions = policy(np.zeros((20_000, 3)), sample=True)
    assert actions.shape == (20_000, 1, 2) and policy(np.zeros((2, 3))).shape == (2, 1, 2)
    assert (actions >= low).all() and (actions <= high).all()
    assert (policy.scale(torch.tensor([[-1.0, 1.0]])) == [[[-1, 0.5]]]).all()

    _, logprobs = sac.squash(agent.actor(torch.zeros(20_000, 3)), torch.randn(20_000, 2))
    counts, *_ = np.histogram2d(*actions[:, 0].T, bins=8, range=[[-1, 3], [0, 0.5]], density=True)
    counts = counts[counts > 0]
    entropy = -(counts * np.log(counts)).sum() * (4 / 8) * (0.5 / 8)  # in the environment's units
    assert entropy == pytest.approx(-logprobs.mean().item() + math.log(4 / 2) + math.log(0.5 / 2), abs=0.05)


def test_networks_side_by_side_are_separate_networks():
    networks, inputs = sac.Networks(2, (5, 8, 7, 3)), torch.randn(4, 5)
    for n, outputs in enumerate(networks(inputs)):
        x = inputs
        for weight, bias in zip(networks.weights, networks.biases, strict=True):
            x = x @ weight[n] + bias[n]
            x = x.relu() if weight is not networks.weights[2] else x
        torch.testing.assert_close(outputs, x)


def random_batch(rows: int = 32) -> sac.Transitions:
    ends = torch.rand(rows) < 0.3
    return sac.Transitions(torch.randn(rows, 3), torch.rand(rows, 2), torch.randn(rows), ends, torch.randn(rows, 3))


def linear(networks: sac.Networks, n: int) -> torch.nn.Sequential:
    """One of the networks, of torch's own layers."""
    layers = []
    for weight, bias in zip(networks.weights, networks.biases, strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[2])
        layer.weight.data, layer.bias.data = weight[n].T.clone(), bias[n, 0].clone()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("autotune", [True, False])
def test_updates_equal_the_papers(autotune):
    """Against a plain implementation with torch's modules, distributions and optimisers."""
    torch.manual_seed(0)
    args = Args(actor_sizes=(16,), critic_sizes=(16, 16), autotune=autotune, alpha=0.3, tau=0.1)
    args = replace(args, precision="fp32", policy_frequency=2, target_network_frequency=3)
    agent = sac.Agent(args, 3, 2).requires_grad_(False)
    actor, critics = linear(agent.actor, 0), [linear(agent.critics, n) for n in (0, 1)]
    targets = copy.deepcopy(critics)
    log_alpha = torch.tensor(0.0 if autotune else math.log(0.3), requires_grad=True)
    learners = sac.Learners.of(agent)
    for learner, rate in zip(learners[:3], (1e-3, 2e-3, 3e-3), strict=True):
        learner.learning_rate.fill_(rate)
    actor_adam = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_adam = torch.optim.Adam([*critics[0].parameters(), *critics[1].parameters()], lr=2e-3)
    alpha_adam = torch.optim.Adam([log_alpha], lr=3e-3)

    def act(observations, noise):
        mean, log_std = actor(observations).chunk(2, -1)
        squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        actions = torch.tanh(mean + log_std.exp() * noise)
        return actions, squashed.log_prob(actions).sum(-1)

    def lower(networks, *inputs):
        return torch.min(*(network(torch.cat(inputs, -1)).squeeze(-1) for network in networks))

    for number in range(1, 7):
        batch, noise = random_batch(), torch.randn(3, 32, 2)
        improve, follow = sac.parts_of_update(args, number)
        assert (improve, follow) == (number % 2 == 0, number % 3 == 0)
        measures = dict(
            zip(sac.MEASURES, sac.update(agent, args, learners, batch, noise, improve, follow), strict=True)
        )

        with torch.no_grad():
            actions, logprobs = act(batch.next_observations, noise[0])
            following = lower(targets, batch.next_observations, actions) - log_alpha.exp() * logprobs
            goals = batch.rewards + 0.99 * (1 - batch.terminated.float()) * following
        values = [critic(torch.cat((batch.observations, batch.actions), -1)).squeeze(-1) for critic in critics]
        loss = sum(torch.nn.functional.mse_loss(value, goals) for value in values)
        torch.testing.assert_close(measures["q_loss"], loss.detach())
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        for sample in noise[1:] if improve else ():
            actions, logprobs = act(batch.observations, sample)
            loss = (log_alpha.exp().detach() * logprobs - lower(critics, batch.observations, actions)).mean()
            actor_adam.zero_grad()
            loss.backward()
            actor_adam.step()
            alpha_adam.zero_grad()
            (-log_alpha * (logprobs.detach() - 2)).mean().backward()
            if autotune:
                alpha_adam.step()
        assert measures["policy_loss"].isfinite() == improve
        for target, critic in zip(targets, critics, strict=True):
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data if follow else slow.data

    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(agent.log_alpha[0], log_alpha.detach().view(1), **close)
    inputs = torch.randn(10, 5)
    torch.testing.assert_close(agent.actor(inputs[:, :3])[0], actor(inputs[:, :3]).detach(), **close)
    for n in (0, 1):
        torch.testing.assert_close(agent.critics(inputs)[n], critics[n](inputs).detach(), **close)
        moved = sac.call(agent.critics, learners.target, inputs, torch.float32)[n]
        torch.testing.assert_close(moved, targets[n](inputs).detach(), **close)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_products_of_float32_are_not_rounded(small, rows):
    train(replace(small, num_evals=0, total_timesteps=256))  # which decides how this process multiplies
    for inputs, outputs in [(17, 256), (256, 256), (256, 12), (1024, 1024)]:
        left, right = torch.randn(2, rows, inputs), torch.randn(2, inputs, outputs)
        for product, factors in [((2, rows, outputs), (left, right)), ((2, inputs, outputs), (left.mT, left @ right))]:
            exact = torch.bmm(*(factor.double() for factor in factors))
            error = (torch.bmm(*factors) - exact).abs().max() / exact.abs().max()
            assert exact.shape == product and error < 2e-6  # rounded to bfloat16, it is 2e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@needs_compiler
def test_the_compiled_update_is_the_update(precision):
    torch.manual_seed(0)
    args = Args(batch_size=32, precision=precision)
    agent = sac.Agent(args, 3, 2).requires_grad_(False)
    learners, said = sac.Learners.of(agent), []
    for learner in learners[:3]:
        learner.learning_rate.fill_(1e-3)
    fast = sac.compile_update(args, agent, 3, 2, said.append)
    assert "compiled in" in said[0]
    batch, noise, start = random_batch(), torch.randn(2, 32, 2), copy.deepcopy(learners)
    measures = fast(agent, args, learners, batch, noise, True, True)
    compiled = copy.deepcopy(learners)
    for learner, before in zip(learners[:3], start[:3], strict=True):
        for tensor, value in zip(learner, before, strict=True):
            tensor.copy_(value)
    learners.target.copy_(start.target)
    close = {"atol": 1e-5, "rtol": 1e-4} if precision == "fp32" else {"atol": 0.02, "rtol": 0.02}
    eager = sac.update(agent, args, learners, batch, noise, True, True)
    torch.testing.assert_close(eager, measures, **close)
    for learner, other in zip(learners[:3], compiled[:3], strict=True):
        torch.testing.assert_close(learner.theta, other.theta, atol=3e-5 if precision == "fp32" else 5e-3, rtol=1e-3)
    torch.testing.assert_close(learners.target, compiled.target, atol=1e-5, rtol=1e-4)
    exact = sac.update(agent, replace(args, precision="fp32"), start, batch, noise, True, True)
    assert torch.equal(exact, eager) == (precision == "fp32")


def test_moments_equal_those_of_all_data():
    data = np.random.default_rng(0).normal(5, 3, (1000, 4))
    moments = RunningMoments((4,), enabled=True)
    for part in np.split(data, [1, 10, 500]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, data.mean(0))
    np.testing.assert_allclose(moments.var, data.var(0))
    assert np.abs(moments.normalise(data * 1000)).max() == 10


# ---------------------------------------------------------------------------------------------------- replay buffer


def filled_buffer(size: int, num_envs: int, steps: int, dtype=torch.float32) -> tuple[ReplayBuffer, list[tuple]]:
    """After `steps` steps with episodes of random lengths, and a list of the transitions that it should hold."""
    random = np.random.default_rng(size + num_envs)
    buffer = ReplayBuffer(size, num_envs, 2, 1, dtype, torch.device("cpu"))
    numbers = iter(range(10**6))

    def see(count: int) -> np.ndarray:
        """A new observation for each, unlike all before."""
        return np.array([divmod(next(numbers), 256) for _ in range(count)], dtype=float).reshape(-1, 2)

    rows, written = deque(maxlen=size), 0  # every transition, and the number of rows written when its first was
    now = see(num_envs)
    buffer.begin(now)
    numbered, written = list(range(num_envs)), num_envs
    for _ in range(steps):
        before, following = now.copy(), see(num_envs)
        actions, rewards = random.random((num_envs, 1)), random.random(num_envs)
        ended = random.random(num_envs) < 0.2
        terminated = ended & (random.random(num_envs) < 0.5)
        last = {n: following[n].copy() for n in np.flatnonzero(ended)}
        for n in range(num_envs):
            row = (*before[n], *np.float32(actions[n]), np.float32(rewards[n]), terminated[n], *following[n])
            rows.append((numbered[n], row))
        now = following.copy()
        now[ended] = see(ended.sum())
        buffer.add(torch.tensor(actions).float(), rewards, terminated, last, now)
        written += len(last)
        numbered, written = list(range(written, written + num_envs)), written + num_envs
    return buffer, [row for number, row in rows if number >= written - size]


def flat(batch: sac.Transitions) -> list[tuple]:
    columns = (column.view(len(column), -1).double() for column in batch)
    return [tuple(row) for row in torch.cat(list(columns), 1).tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 10, 15, 16, 17, 18, 19, 100, 501])
def test_the_buffer_holds_the_last_transitions_and_samples_them_evenly(num_envs, steps, dtype):
    torch.manual_seed(steps)
    buffer, expected = filled_buffer(60, num_envs, steps, dtype)
    assert len(buffer) == len(expected) and 0 < len(expected) <= 60
    drawn = flat(buffer.sample(200 * len(expected), RunningMoments((2,), False)))
    counts = {tuple(float(value) for value in row): 0 for row in expected}
    assert len(counts) == len(expected)
    for row in drawn:
        counts[row] += 1
    deviation = (np.array(list(counts.values())) - 200) / np.sqrt(200)
    assert np.abs(deviation).max() < 5


def test_the_buffer_is_restored_exactly():
    buffer, _ = filled_buffer(60, 3, 100)
    other = ReplayBuffer(60, 3, 2, 1, torch.float32, torch.device("cpu"))
    other.restore(buffer.state())
    for one in (buffer, other):
        one.add(torch.ones(3, 1), np.ones(3), np.zeros(3, bool), {1: np.ones(2)}, np.ones((3, 2)))
    still = RunningMoments((2,), False)
    for one in (buffer, other):
        torch.manual_seed(0)
        one.drawn = flat(one.sample(1000, still))
    assert buffer.drawn == other.drawn


def test_the_buffer_normalises_as_the_policy_does():
    buffer, _ = filled_buffer(60, 3, 10)
    moments = RunningMoments((2,), True)
    moments.update(np.random.default_rng(0).normal(0, 2, (50, 2)))
    torch.manual_seed(0)
    raw = buffer.sample(20, RunningMoments((2,), False))
    torch.manual_seed(0)
    normal = buffer.sample(20, moments)
    for name in ("observations", "next_observations"):
        expected = moments.normalise(getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(normal, name), expected, rtol=1e-5, atol=1e-6)


def test_a_million_steps_fit_into_120_mb():
    buffer = ReplayBuffer(1_000_000, 1, 17, 6, torch.float32, torch.device("cpu"))
    rings = buffer.observations, buffer.actions, buffer.rewards, buffer.terminated, buffer.between
    assert sum(ring.nbytes for ring in rings) == 105_000_000


@pytest.mark.parametrize("vec", ["sync", "async"])
def test_every_next_observation_is_the_true_one(small, vec):
    """The clock shows how long an episode has run: each transition, the last of an episode too, is one tick."""
    run = train(replace(small, env_id="tests.envs:Clock-v0", vec=vec, num_evals=0, learning_starts=512))
    buffer = load(run)["buffer"]
    (observations, *_, between), held = buffer["rings"], torch.arange(buffer["first"], buffer["end"]) % 600
    before, after = (observations[between[held, i].long() % 600] for i in (0, 1))
    torch.testing.assert_close(after - before, torch.full_like(after, 1 / 20))


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("cut", [True, False])
def test_truncation_bootstraps_and_termination_does_not(small, cut):
    settings = {"total_timesteps": 6000, "num_evals": 0, "gamma": 0.9, "learning_rate": 3e-3, "tau": 0.02}
    settings |= {"autotune": False, "alpha": 1e-6, "buffer_size": 10_000, "env_id": "tests.envs:Clock-v0"}
    run = train(replace(small, **settings, env_kwargs=json.dumps({"cut": cut})))
    t = np.arange(20)
    values = load_policy(run / "checkpoint.pt").value(t[:, None] / 20)
    expected = np.full(20, 10.0) if cut else (1 - 0.9 ** (20 - t)) / 0.1
    np.testing.assert_allclose(values, expected, atol=0.6)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_learns_to_mirror(small, norm_obs):
    settings = {"total_timesteps": 6000, "learning_rate": 3e-3, "gamma": 0.0, "buffer_size": 10_000}
    run = train(replace(small, **settings, norm_obs=norm_obs))
    if norm_obs:  # all that was seen but for the first observations of all
        saved = load(run)
        seen = saved["buffer"]["rings"][0][small.num_envs :].double()
        torch.testing.assert_close(saved["moments"]["mean"].flatten(), seen.mean(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(saved["moments"]["var"].flatten(), seen.var(0, correction=0), atol=1e-6, rtol=1e-5)
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] > -0.5  # a random policy's is -11


def test_tiny_numbers_count_as_zero(small):
    torch.set_flush_denormal(False)
    tiny = torch.full((64,), 1e-39)
    assert (tiny / 2 != 0).all()
    train(small)
    assert (tiny / 2 == 0).all()


@pytest.mark.parametrize("num_envs", [1, 4, 7])
def test_updates_count_environment_steps(small, num_envs):
    args = replace(small, num_envs=num_envs, updates_per_step=0.5, total_timesteps=512, checkpoint_every=100)
    last = rows(train(args), "progress")[-1]
    assert int(last["step"]) == 512 // num_envs * num_envs
    assert abs(int(last["updates"]) - (512 - 128) * 0.5) <= 4
    assert int(last["buffer"]) == int(last["step"])  # all that was done is still held


def test_actions_are_random_until_learning_starts(small):
    run = train(replace(small, total_timesteps=1200, learning_starts=1000, num_evals=0, buffer_size=2000))
    actions = load(run)["buffer"]["rings"][1].numpy()
    assert [row["q_loss"] for row in rows(run, "progress")][:3] == ["nan"] * 3
    counts, _ = np.histogram(actions[:1000], bins=4, range=(-1, 1))
    assert np.abs(counts - actions.shape[1] * 250).max() < 90


def test_actions_are_then_drawn_from_the_policy(small):
    """As it is all along, with steps that are too small to change it."""
    run = train(replace(small, learning_rate=1e-12, total_timesteps=1000, num_evals=0, buffer_size=2000))
    observations, actions, *_, between = load(run)["buffer"]["rings"]
    policy = load_policy(run / "checkpoint.pt")
    before = observations[between[128:, 0].long()].numpy().reshape(-1, 2, 2)
    mean, log_std = sac.gaussian(policy.agent.actor(policy.input(before)))
    deviations = ((actions[128:].atanh() - mean) / log_std.exp()).detach()
    assert len(deviations) == 872 and deviations.std(0).numpy() == pytest.approx(np.ones(4), abs=0.1)
    assert deviations.mean(0).numpy() == pytest.approx(np.zeros(4), abs=0.15)


def test_evaluations_come_at_their_own_steps(small):
    run = train(replace(small, total_timesteps=700, num_evals=7, checkpoint_every=256))
    assert [row["step"] for row in rows(run, "evaluations")][:: small.eval_episodes] == [
        str(step) for step in range(100, 701, 100)
    ]


def test_bytes_stay_bytes_until_they_are_used(small):
    run = train(replace(small, env_id="tests.envs:Filmed-v0", num_evals=1, buffer_size=300, total_timesteps=256))
    assert load(run)["buffer"]["rings"][0].dtype == torch.uint8


def test_a_run_says_which_precision_it_chose(small):
    run = train(replace(small, precision="auto", total_timesteps=256, num_evals=0))
    chosen = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    assert f"precision: {chosen}" in (run / "config.yaml").read_text()
    assert same(run, train(replace(small, precision=chosen, total_timesteps=256, num_evals=0)))


def test_rates_follow_the_schedule(small):
    run = train(replace(small, lr_schedule="linear", policy_lr=1e-3, q_lr=2e-3, learning_rate=4e-3))
    rates = [learner[-1].item() for learner in load(run)["learners"]]
    np.testing.assert_allclose(rates, np.array([1e-3, 2e-3, 4e-3]) / 256, rtol=1e-5)  # of the last of 256 steps


# ----------------------------------------------------------------------------------------------------- independence


def test_seed_decides_and_evaluation_does_not(small):
    first = train(small)
    assert same(first, train(small))
    assert same(first, train(replace(small, num_evals=0)))
    assert same(first, train(replace(small, num_evals=8, eval_episodes=3)))
    assert not same(first, train(replace(small, seed=2)))


def test_video_changes_nothing_and_shows_the_episode(small):
    args = replace(small, env_id="Pendulum-v1")
    run = train(replace(args, capture_video=True))
    assert same(run, train(args))
    from moviepy import VideoFileClip

    videos = sorted((run / "videos").iterdir())
    assert [video.name for video in videos] == ["step-000000512.mp4", "step-000001024.mp4"]
    with VideoFileClip(str(videos[1])) as clip:
        assert clip.n_frames in (200, 201)
        assert clip.get_frame(1).std() > 5


def test_async_steps_like_sync(small):
    assert same(train(small), train(replace(small, vec="async")))


def test_a_policy_does_not_depend_on_where_its_observations_lie():
    """Products of two or three rows differ in the last bits with their alignment in memory."""
    torch.manual_seed(0)
    bounds = np.ones(2, np.float32)
    policy = sac.Policy(sac.Agent(Args(), 17, 2), RunningMoments((17,), False), np.stack((-bounds, bounds)))
    data, answers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32), set()
    for offset in range(0, 64, 4):
        memory = np.empty(data.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        observations = memory[start : start + data.nbytes].view(np.float32).reshape(2, 17)
        observations[:] = data
        answers.add(policy(observations).tobytes())
    assert len(answers) == 1


# ------------------------------------------------------------------------------------------------------ run directory


def test_what_a_run_leaves(small):
    run = train(small)
    assert run.name.startswith("tests.envs-Mirror-v0__sac_continuous__1__")
    assert (run / "sac_continuous.py").read_text() == SCRIPT.read_text()
    episodes, evaluations = rows(run, "episodes"), rows(run, "evaluations")
    assert len(episodes) == 100 and all(row["length"] == "10" for row in episodes)
    assert episodes[0]["step"] == "40" and {row["step"] for row in evaluations} == {"512", "1024"}
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 1024 and result["evaluation"]["step"] == 1024
    assert list(run.glob("events.out.tfevents*")) and not list(run.rglob("*unfinished*"))
    policies = [load_policy(path) for path in sorted((run / "policies").iterdir())]
    observations = np.random.default_rng(0).normal(size=(5, 2, 2))
    np.testing.assert_array_equal(policies[1](observations), load_policy(run / "checkpoint.pt")(observations))
    assert len(policies) == 2 and (policies[0](observations) != policies[1](observations)).any()

    again = train(parse(["--config", str(run / "config.yaml"), "--runs-dir", small.runs_dir]))
    assert same(run, again)


def test_a_loaded_policy_plays_as_the_evaluation_did(small):
    run = train(replace(small, norm_obs=True))
    policy, env = load_policy(run / "checkpoint.pt"), make_eval_env(small)
    for row in rows(run, "evaluations")[2:]:
        (observation, _), total, over = env.reset(seed=int(row["seed"])), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, over = total + reward, terminated or truncated
        assert total == pytest.approx(float(row["return"]), abs=1e-5)


def test_what_is_not_finite_stops_the_run(small, capsys):
    with pytest.raises(SystemExit) as stop:
        train(replace(small, env_kwargs='{"breaks": 150}', eval_env_kwargs='{"breaks": null}'))
    assert stop.value.code == 1
    (run,) = Path(small.runs_dir).iterdir()
    said = capsys.readouterr().out
    assert "not finite at step 600" in said and "the last checkpoint is from before" in said
    assert not (run / "result.json").exists()
    assert all(tensor.isfinite().all() for tensor in (*load(run)["agent"].values(), *load(run)["buffer"]["rings"]))


RESUMED = {
    "HalfCheetah-v4": {
        "num_envs": 1,
        "total_timesteps": 6144,
        "policy_frequency": 2,
        "lr_schedule": "linear",
        "precision": "bf16",
    },
    "Hopper-v4": {"num_envs": 4, "total_timesteps": 6144, "norm_obs": True},
    "LunarLander-v3": {"num_envs": 4, "total_timesteps": 6144, "env_kwargs": '{"continuous": true}'},
}


@pytest.mark.parametrize("env_id", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, env_id):
    args = replace(SMALL, env_id=env_id, buffer_size=2000, updates_per_step=0.1, **RESUMED[env_id])
    undisturbed = train(replace(args, runs_dir=str(tmp_path / "undisturbed")))

    runs = tmp_path / "killed"
    words, lines = command(replace(args, runs_dir=str(runs), checkpoint_every=512)), 0
    for stop in (1, 4, 6):  # before the first checkpoint, and after some
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while lines < stop and process.poll() is None and time.monotonic() < deadline:
            lines = sum(path.read_text().count("\n") - 1 for path in runs.glob("*/progress.csv"))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
        words = [sys.executable, str(SCRIPT), "--resume", str(run)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert same(undisturbed, run)
    assert rows(undisturbed, "evaluations") == rows(run, "evaluations")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on_exactly(small, number):
    args = replace(small, total_timesteps=4096, checkpoint_every=4000, num_evals=0)
    process = subprocess.Popen(command(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(Path(args.runs_dir).glob("*/progress.csv")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    (run,) = Path(args.runs_dir).iterdir()
    assert process.returncode == 128 + number and not errors
    assert f"--resume {run}" in output and (run / "checkpoint.pt").exists()
    assert same(train(args), train(parse(["--resume", str(run)])))


def test_a_run_without_its_buffer_fills_a_new_one_first(small, capsys):
    run = train(replace(small, total_timesteps=512, checkpoint_buffer=False))
    saved, updates = load(run), int(rows(run, "progress")[-1]["updates"])
    assert not saved["buffer"]
    config = (run / "config.yaml").read_text().replace("total_timesteps: 512", "total_timesteps: 1024")
    (run / "config.yaml").write_text(config)
    train(parse(["--resume", str(run), "--checkpoint-every", "64"]))
    assert "holds no replay buffer; a new one is filled until step 640" in capsys.readouterr().out
    progress = rows(run, "progress")
    since = [int(row["updates"]) - updates for row in progress if int(row["step"]) > 512]
    assert since[:2] == [0, 0] and since[-1] == (1024 - 640) // 4
    assert int(progress[-1]["buffer"]) == 512


def test_a_new_buffer_holds_a_batch_before_it_is_learnt_from(small, capsys):
    run = train(replace(small, total_timesteps=512, checkpoint_buffer=False, learning_starts=0))
    train(parse(["--resume", str(run)]))
    assert "a new one is filled until step 544" in capsys.readouterr().out


@needs_compiler
def test_a_compiled_run_resumes_to_the_same_weights(small):
    args = replace(small, compile=True, precision="bf16", lr_schedule="constant", num_evals=0)
    run = train(replace(args, total_timesteps=512))
    config = (run / "config.yaml").read_text().replace("total_timesteps: 512", "total_timesteps: 1024")
    (run / "config.yaml").write_text(config)
    assert same(train(args), train(parse(["--resume", str(run)])))


def test_a_torn_checkpoint_gives_way_to_the_one_before(small, capsys):
    args = replace(small, total_timesteps=512)
    run = train(args)
    checkpoint, previous = run / "checkpoint.pt", run / "checkpoint.previous.pt"
    for damage in (
        lambda good: good[: len(good) // 2],
        lambda good: good[:3000] + bytes(200) + good[3200:],
        lambda good: good[:20_000] + bytes(255 - byte for byte in good[20_000:20_200]) + good[20_200:],
        lambda _: b"",
    ):
        good = checkpoint.read_bytes()
        checkpoint.write_bytes(damage(good))
        train(parse(["--resume", str(run)]))
        assert "checkpoint.pt is torn" in capsys.readouterr().err
        assert json.loads((run / "result.json").read_text())["steps"] == 512
        previous.write_bytes(checkpoint.read_bytes())  # a resumed run may have saved only once
    assert same(train(args), run)

    for path in run.glob("checkpoint*.pt"):
        path.write_bytes(b"nothing")
    before = (run / "episodes.csv").read_text()
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            train(parse(["--resume", str(run)]))
        assert stop.value.code == 2 and "no good one before it" in capsys.readouterr().err
    assert (run / "episodes.csv").read_text() == before


def test_rows_that_were_cut_off_leave_no_hole(small):
    """A checkpoint straight after a resume must not count rows that the resume dropped."""
    run = train(replace(small, num_evals=1))
    with (run / "evaluations.csv").open("a") as file:
        file.write("a row from after the checkpoint\n" * 5)
    sizes = torch.load(run / "checkpoint.pt", weights_only=True)["sizes"]
    resumed = sac.Run(small, run, sizes, 1024)
    assert resumed.sizes() == sizes
    resumed.close()


def test_a_runs_dir_that_cannot_be(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train(replace(small, runs_dir=str(tmp_path / "file")))
    assert stop.value.code == 2 and "--runs-dir" in capsys.readouterr().err


def test_config_and_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("policy-lr: 1e-3\nnum_envs: 8\nactor_sizes: [32, 16]\nautotune: false\nenv_kwargs: {a: 1}\n")
    args = parse(["--config", str(config), "--num-envs", "2"])
    assert (args.policy_lr, args.num_envs, args.actor_sizes, args.autotune) == (1e-3, 2, (32, 16), False)
    assert json.loads(args.env_kwargs) == {"a": 1}


def test_a_run_says_nothing_on_stderr(small):
    result = subprocess.run(command(replace(small, env_id="HalfCheetah-v4")), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert "\r" not in result.stdout and "\033" not in result.stdout and "evaluation" in result.stdout


# ----------------------------------------------------------------------------------------------------------- errors

MISTAKES = {
    "--env-id HalfCheeta-v4": "HalfCheetah",
    "--env-id nowhere:Thing-v0": "nowhere",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id tests.envs:Pair-v0": "Dict",
    "--env-id tests.envs:Whole-v0": "real numbers",
    "--env-id tests.envs:Endless-v0": "finite bounds",
    '--env-kwargs {"wings":2}': "--env-kwargs",
    "--num-envs 0": "--num-envs 0",
    "--num-envs 8 --buffer-size 31": "--buffer-size 31",
    '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "--eval-env-kwargs",
    "--learning-rate -1": "--learning-rate",
    "--policy-lr nan": "--policy-lr",
    "--q-lr 0": "--q-lr",
    "--lerning-rate 1": "Perhaps you meant: --learning-rate",
    "--precision fp16": "bf16",
    "--gamma 1.5": "--gamma",
    "--tau -0.1": "--tau",
    "--alpha 0": "--alpha",
    "--batch-size 0": "--batch-size",
    "--updates-per-step 0": "--updates-per-step",
    "--policy-frequency 0": "--policy-frequency",
    "--target-network-frequency 0": "--target-network-frequency",
    "--learning-starts -1": "--learning-starts",
    "--total-timesteps 100": "--learning-starts",
    "--lr-warmup 0.01": "ends at step 10,000, before learning begins",
    "--critic-sizes 64 0": "--critic-sizes",
    "--device cuda": "--device cuda",
    "--vec envpool": "pip install envpool",
    "--resume .": "--resume",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sac, "find_spec", lambda name: None)
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        train(parse([*mistake.split(), "--runs-dir", str(runs)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not runs.exists()
    assert error.count("\n") == 1 and MISTAKES[mistake] in error


def test_mistakes_about_other_runs(small, tmp_path, capsys):
    run = train(small)

    def error(*words):
        with pytest.raises(SystemExit) as stop:
            train(parse(list(words)))
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--env-id" in error("--resume", str(run), "--env-id", "Hopper-v4")
    own, foreign = (run / "checkpoint.pt").read_bytes(), train(replace(small, env_id="Pendulum-v1")) / "checkpoint.pt"
    (run / "checkpoint.pt").write_bytes(foreign.read_bytes())
    assert "Pendulum-v1" in error("--resume", str(run))
    (run / "checkpoint.pt").write_bytes(own)
    assert "--learning-rate" in error("--resume", str(run), "--learning-rate", "1")
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps(meta | {"script": "ppo_continuous"}))
    assert "ppo_continuous.py" in error("--resume", str(run))
    config = tmp_path / "typo.yaml"
    config.write_text("learning_rat: 1")
    assert "learning_rate" in error("--config", str(config))
    config.write_text("learning_rate: quick")
    assert f"--config {config}: Error parsing --learning-rate" in error("--config", str(config))


def test_envpool_cannot_restore_and_says_so(small, capsys):
    pytest.importorskip("envpool")
    run = train(replace(small, env_id="Hopper-v4", vec="envpool"))
    (run / "checkpoint.pt").unlink()
    train(parse(["--resume", str(run)]))
    assert "--vec envpool cannot restore the running episodes" in capsys.readouterr().out
    assert len(load(run)["buffer"]["rings"][0]) == 600
