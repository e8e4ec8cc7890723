"""SAC's mathematics against independent computations, and how its parts are wired."""

import copy
import math
import signal
from collections import deque
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import sac_continuous as sac
import td3_continuous as td3
from sac_continuous import Args, ReplayBuffer, Rings, RunningMoments, load_policy, parse, train
from tests.envs import Fates
from tests.marks import needs_compiler
from tests.test_promises import load, rows

SMALL = Args(
    env_id="tests.envs:Mirror-v0",
    num_envs=4,
    total_timesteps=1024,
    learning_starts=128,
    updates_per_step=0.25,
    batch_size=32,
    buffer_size=2000,
    actor_sizes=(32, 32),
    critic_sizes=(32, 32),
    num_evals=0,
    eval_episodes=2,
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


def agent_of(args: Args = SMALL, observation: int = 3, action: int = 2, low=-1.0, high=1.0) -> sac.Agent:
    bounds = (np.broadcast_to(np.float32(bound), action) for bound in (low, high))
    return sac.Agent(args, (observation,), *map(np.array, bounds)).requires_grad_(False)


def learners_of(agent: sac.Agent, *rates: float) -> sac.Learners:
    learners = sac.Learners.of(agent, "cpu")
    for learner, rate in zip(learners[:3], rates, strict=True):
        learner.learning_rate.fill_(rate)
    return learners


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
    agent = agent_of(low=[-1.0, 0.0], high=[3.0, 0.5])
    policy = sac.Policy(SMALL, agent)
    actions = policy(np.zeros((5000, 3)), sample=True)
    assert actions.shape == (5000, 2) and (actions >= [-1, 0]).all() and (actions <= [3, 0.5]).all()
    np.testing.assert_allclose(agent.for_environment(np.float32([[-1, 1], [0, -0.5]])), [[-1, 0.5], [1, 0.125]])
    plain = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    assert np.array_equal(agent_of().for_environment(plain), plain)  # to the last bit, where the bounds are these

    _, logprobs = sac.squash(agent.actor(torch.zeros(5000, 3)), torch.randn(5000, 2))
    counts, *_ = np.histogram2d(*actions.T, bins=6, range=[[-1, 3], [0, 0.5]], density=True)
    counts = counts[counts > 0]
    entropy = -(counts * np.log(counts)).sum() * (4 / 6) * (0.5 / 6)  # in the environment's units
    assert entropy == pytest.approx(-logprobs.mean().item() + math.log(4 / 2) + math.log(0.5 / 2), abs=0.05)


def test_networks_side_by_side_are_separate_networks():
    networks, inputs = sac.Networks(2, (5, 8, 7, 3)), torch.randn(4, 5)
    for n, outputs in enumerate(networks(inputs)):
        x = inputs
        for weight, bias in zip(networks.weights, networks.biases, strict=True):
            x = x @ weight[n] + bias[n]
            x = x.relu() if weight is not networks.weights[2] else x
        torch.testing.assert_close(outputs, x)


def test_weights_begin_in_the_range_that_is_torchs_for_linear_layers():
    networks = sac.Networks(2, (100, 400, 1))
    for weight, bias in zip(networks.weights, networks.biases, strict=True):
        bound = weight.shape[1] ** -0.5
        assert max(weight.abs().max(), bias.abs().max()) <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("sizes", [(17, 32, 6), (17, 32, 24, 6)])
def test_numpy_computes_what_torch_does(sizes):
    networks, observation = sac.Networks(1, sizes).requires_grad_(False), torch.randn(17)
    outputs = sac.in_numpy(networks)(observation.numpy())
    assert outputs.dtype == np.float32 and outputs.shape == (6,)
    np.testing.assert_allclose(outputs, networks(observation[None])[0, 0], atol=1e-5)


@pytest.mark.parametrize("module", [sac, td3])
def test_a_fork_whose_network_numpy_does_not_compute_is_told(module, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "relu", torch.Tensor.tanh)
    with pytest.raises(AssertionError, match="in_numpy must compute what Networks.forward does"):
        module.in_numpy(module.Networks(1, (17, 64, 6)).requires_grad_(False))


def random_rings(rows: int = 32) -> Rings:
    """Whose transitions share no observations."""
    ends = torch.rand(rows) < 0.3
    between = torch.randperm(2 * rows).view(rows, 2).int()
    return Rings(torch.randn(2 * rows, 3), torch.rand(rows, 2), torch.randn(rows), ends, between)


def wide(rings: Rings) -> Rings:
    """With as many rows in each ring, as in a buffer."""
    return Rings(rings.observations, *(torch.cat((ring, torch.zeros_like(ring))) for ring in rings[1:]))


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
    agent = agent_of(args)
    actor, critics = linear(agent.actor, 0), [linear(agent.critics, n) for n in (0, 1)]
    targets = copy.deepcopy(critics)
    log_alpha = torch.tensor(0.0 if autotune else math.log(0.3), requires_grad=True)
    learners = learners_of(agent, 1e-3, 2e-3, 3e-3)
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
        rings, noise, scale = wide(random_rings()), torch.randn(3, 32, 2), torch.ones(2, 3)
        improves, follows = sac.parts_of(args, number)
        assert (improves, follows) == (number % 2 == 0, number % 3 == 0)
        slots = torch.randint(32, (32,))
        batch = sac.gather(args, rings, scale, slots)
        measured = sac.update(agent, args, learners, rings, scale, slots, noise, improves, follows)
        measures = dict(zip(sac.MEASURES, measured, strict=True))

        with torch.no_grad():
            actions, logprobs = act(batch.next_observations, noise[0])
            following = lower(targets, batch.next_observations, actions) - log_alpha.exp() * logprobs
            goals = batch.rewards + 0.99 * (1 - batch.terminated.float()) * following
        values = [critic(torch.cat((batch.observations, batch.actions), -1)).squeeze(-1) for critic in critics]
        loss = sum(torch.nn.functional.mse_loss(value, goals) for value in values)
        torch.testing.assert_close(measures["qf_loss"], loss.detach() / 2)
        for n in (0, 1):
            torch.testing.assert_close(measures[f"qf{n + 1}_values"], values[n].mean().detach())
        torch.testing.assert_close(measures["entropy"], -logprobs.mean())
        torch.testing.assert_close(measures["alpha"], log_alpha.exp().detach())
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        for sample in noise[1:] if improves else ():
            actions, logprobs = act(batch.observations, sample)
            loss = (log_alpha.exp().detach() * logprobs - lower(critics, batch.observations, actions)).mean()
            actor_adam.zero_grad()
            loss.backward()
            actor_adam.step()
            alpha_adam.zero_grad()
            (-log_alpha * (logprobs.detach() - 2)).mean().backward()
            if autotune:
                alpha_adam.step()
        torch.testing.assert_close(
            measures["actor_loss"], loss.detach() if improves else torch.tensor(torch.nan), equal_nan=True
        )
        for target, critic in zip(targets, critics, strict=True):
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data if follows else slow.data

    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(agent.log_alpha[0], log_alpha.detach().view(1), **close)
    inputs = torch.randn(10, 5)
    torch.testing.assert_close(agent.actor(inputs[:, :3])[0], actor(inputs[:, :3]).detach(), **close)
    for n in (0, 1):
        torch.testing.assert_close(agent.critics(inputs)[n], critics[n](inputs).detach(), **close)
    agent.critics.load_state_dict(sac.parameters_of(agent.critics, learners.target))
    for n in (0, 1):
        torch.testing.assert_close(agent.critics(inputs)[n], targets[n](inputs).detach(), **close)


@pytest.mark.parametrize("rows", [1, 256])
def test_products_of_float32_are_not_rounded(small, rows):
    train(replace(small, total_timesteps=256))  # which decides how this process multiplies
    for inputs, outputs in [(17, 256), (256, 256), (256, 12)]:
        left, right = torch.randn(2, rows, inputs), torch.randn(2, inputs, outputs)
        for product, factors in [((2, rows, outputs), (left, right)), ((2, inputs, outputs), (left.mT, left @ right))]:
            exact = torch.bmm(*(factor.double() for factor in factors))
            error = (torch.bmm(*factors) - exact).abs().max() / exact.abs().max()
            assert exact.shape == product and error < 2e-6  # rounded to bfloat16, it is 2e-3


def test_an_update_in_bfloat16_is_nearly_that_in_float32():
    torch.manual_seed(0)
    agent, results = agent_of(), []
    learners = learners_of(agent, 1e-3, 1e-3, 1e-3)
    data = wide(random_rings()), torch.ones(2, 3), torch.arange(32), torch.randn(2, 32, 2), True, True
    for precision in ("fp32", "bf16"):
        results.append(copy.deepcopy(learners))
        sac.update(agent, replace(SMALL, precision=precision), results[-1], *data)
    for one, other in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one.first_moment, other.first_moment, atol=1e-3, rtol=0.05)
    assert not torch.equal(results[0].critics.first_moment, results[1].critics.first_moment)


@needs_compiler
def test_every_kind_of_update_is_compiled(monkeypatch):
    kinds = []
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *arguments: kinds.append(arguments[-2:]))
    for actor, target, expected in ((1, 1, 1), (2, 1, 2), (2, 4, 3), (2, 3, 4), (3, 2, 4), (100, 50_000, 3)):
        args = replace(SMALL, policy_frequency=actor, target_network_frequency=target)
        agent, run = agent_of(args), SimpleNamespace(say=lambda text: None)
        buffer, first = SimpleNamespace(rings=wide(random_rings())), len(kinds)
        sac.compile_update(args, agent, learners_of(agent, 0, 0, 0), buffer, run)
        assert len(kinds) - first == expected
        if actor * target < 100:
            assert set(kinds[first:]) == {sac.parts_of(args, number) for number in range(1, 1 + actor * target)}


# ---------------------------------------------------------------------------------------------------- replay buffer


STILL = torch.tensor([[0.0, 0.0], [1.0, 1.0]])


def buffer_of(size: int, num_envs: int, dtype: type = np.float32) -> ReplayBuffer:
    return ReplayBuffer(Rings.of(size, np.zeros((1, 2), dtype), gym.spaces.Box(-1, 1, (1,)), "cpu"), num_envs)


def filled_buffer(size: int, num_envs: int, steps: int, dtype: type = np.float32) -> tuple[ReplayBuffer, list[tuple]]:
    """After `steps` steps with episodes of random lengths, and a list of the transitions that it should hold."""
    random = np.random.default_rng(size + num_envs)
    buffer = buffer_of(size, num_envs, dtype)
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
        for n in range(num_envs):
            row = (*before[n], *np.float32(actions[n]), np.float32(rewards[n]), terminated[n], *following[n])
            rows.append((numbered[n], row))
        now = following.copy()
        now[ended] = see(ended.sum())
        buffer.add(actions, rewards, terminated, ended, np.concatenate((following[ended], now)))
        written += ended.sum()
        numbered, written = list(range(written, written + num_envs)), written + num_envs
    return buffer, [row for number, row in rows if number >= written - size]


def flat(batch: sac.Transitions) -> list[tuple]:
    columns = (column.view(len(column), -1).double() for column in batch)
    return [tuple(row) for row in torch.cat(list(columns), 1).tolist()]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 10, 15, 16, 17, 18, 19, 100])
def test_the_buffer_holds_the_last_transitions_and_samples_them_evenly(num_envs, steps, dtype):
    torch.manual_seed(steps)
    buffer, expected = filled_buffer(60, num_envs, steps, dtype)
    assert len(buffer) == len(expected) and 0 < len(expected) <= 60
    drawn = flat(sac.gather(SMALL, buffer.rings, STILL, buffer.draw(200 * len(expected))))
    counts = {tuple(float(value) for value in row): 0 for row in expected}
    assert len(counts) == len(expected)
    for row in drawn:
        counts[row] += 1
    deviation = (np.array(list(counts.values())) - 200) / np.sqrt(200)
    assert np.abs(deviation).max() < 5


def test_the_buffer_is_restored_exactly():
    for steps in (3, 100):
        buffer, _ = filled_buffer(60, 3, steps)
        other = buffer_of(60, 3)
        other.before = other.before.copy()  # as where the rings are a GPU's
        other.restore(copy.deepcopy(buffer.state()))
        for one in (buffer, other):
            one.add(np.ones((3, 1)), np.ones(3), np.zeros(3, bool), np.arange(3) == 1, np.ones((4, 2)))
        assert (buffer.seen, buffer.first, buffer.end) == (other.seen, other.first, other.end)
        assert all(map(torch.equal, buffer.rings, other.rings)) and np.array_equal(buffer.before, other.before)


def test_a_buffer_that_is_not_full_is_kept_without_its_empty_rows():
    buffer, _ = filled_buffer(60, 3, 4)
    assert [len(ring) for ring in buffer.state()["rings"]] == [buffer.seen, 12, 12, 12, 12] and buffer.seen < 30
    assert all(ring.untyped_storage().nbytes() == ring.nbytes for ring in buffer.state()["rings"])


def test_torch_writes_what_numpy_does():
    numpys, torchs = (filled_buffer(60, 3, 1)[0] for _ in range(2))
    torchs.writable = torchs.rings  # as on a GPU
    torchs.before = torchs.before.copy()
    random = np.random.default_rng(0)
    for _ in range(50):
        ended = random.random(3) < 0.3
        seen, actions = random.random((3 + ended.sum(), 2)), random.random((3, 1))
        for buffer in (numpys, torchs):
            buffer.add(actions, np.arange(3) / 7, ended, ended, seen)
    assert all(map(torch.equal, numpys.rings, torchs.rings)) and np.array_equal(numpys.before, torchs.before)
    assert numpys.first == torchs.first > 0


def test_the_buffer_normalises_as_the_policy_does():
    buffer, _ = filled_buffer(60, 3, 10)
    moments = RunningMoments((2,), True)
    moments.update(np.random.default_rng(0).normal(0, 2, (50, 2)))
    scale, slots = torch.tensor(np.stack((moments.mean, moments.deviation()))), buffer.draw(20)
    raw = sac.gather(SMALL, buffer.rings, scale, slots)
    normal = sac.gather(replace(SMALL, norm_obs=True), buffer.rings, scale, slots)
    for name in ("observations", "next_observations"):
        expected = moments.normaliser()(getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(normal, name), expected, rtol=1e-5, atol=1e-6)
    assert normal.observations.abs().max() == 10


def test_indices_are_drawn_where_the_buffer_is():
    buffer, _ = filled_buffer(60, 3, 10)
    before = torch.get_rng_state()
    buffer.draw(5)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    buffer.rings = buffer.rings._replace(rewards=buffer.rings.rewards.to("meta"))
    assert buffer.draw(5).device.type == "meta" and torch.equal(torch.get_rng_state(), before)


def test_a_million_steps_fit_into_120_mb():
    rings = Rings.of(1_000_000, np.zeros((1, 17)), gym.spaces.Box(-1, 1, (6,)), "cpu")
    assert sum(ring.nbytes for ring in rings) == 105_000_000


# ---------------------------------------------------------------------------------------------- from steps to updates

FATES = replace(SMALL, env_id="tests.envs:Fates-v0", learning_starts=160, norm_obs=True)


class Played:
    """320 steps of Fates, the first half of them random, of which everything can be told from what was seen."""

    def __init__(self, args: Args = FATES):
        torch.manual_seed(0)
        self.args, self.agent = args, agent_of(args, 2, 2, [-1, 0], [1, 4])
        watch, act = sac.Stopwatch(dict.fromkeys(sac.SECONDS, 0.0)), sac.in_numpy(self.agent.actor)
        with closing(sac.Environments(args)) as envs:
            space = gym.spaces.Box(-1, 1, (2,))
            self.buffer = ReplayBuffer(Rings.of(args.buffer_size, envs.observations, space, "cpu"), args.num_envs)
            self.buffer.begin(envs.observations)
            self.episodes, self.scales = [], []
            for step in range(0, 320, 4):
                self.scales.append(self.agent.moments.normaliser())
                self.episodes += sac.collect(args, self.agent, act, self.buffer, envs, step, watch)
        assert len(self.buffer) == 320
        columns = sac.gather(replace(args, norm_obs=False), self.buffer.rings, STILL, torch.arange(320))
        self.batch = sac.Transitions(*(column.numpy() for column in columns))
        self.seed, self.t = self.batch.observations.astype(int).T
        self.length, self.terminates, self.cut = np.vectorize(Fates.end_of)(self.seed)
        self.over = self.t + 1 == self.length


@pytest.fixture(scope="module")
def played() -> Played:
    return Played()


def test_what_is_kept_is_what_was_played(played):
    batch, over = played.batch, played.over
    assert np.array_equal(batch.next_observations, np.stack((played.seed, played.t + 1), -1))
    assert np.array_equal(batch.terminated, over & played.terminates)
    kinds = set(zip(played.terminates[over], played.cut[over], strict=True))
    assert len(kinds) == 3 and over.sum() > 20
    running = ~over.reshape(80, 4)[:-1]
    following = batch.observations.reshape(80, 4, 2)[1:]
    assert np.array_equal(following[running], batch.next_observations.reshape(80, 4, 2)[:-1][running])
    assert (following[~running][:, 1] == 0).all()  # a new episode begins where one has ended
    actions = played.agent.for_environment(batch.actions)
    np.testing.assert_allclose(batch.rewards, actions.sum(-1) + played.seed / 100 + played.t + 1, rtol=1e-5)


def test_every_finished_episode_has_a_row(played):
    rewards, over = (column.reshape(80, 4) for column in (played.batch.rewards, played.over))
    expected, total, length = [], np.zeros(4), np.zeros(4, int)
    for t in range(80):
        total, length = total + rewards[t], length + 1
        expected += [((t + 1) * 4, total[n], length[n]) for n in np.flatnonzero(over[t])]
        total, length = np.where(over[t], 0, total), np.where(over[t], 0, length)
    assert [(row["step"], row["length"]) for row in played.episodes] == [(step, length) for step, _, length in expected]
    assert [row["return"] for row in played.episodes] == pytest.approx([total for _, total, _ in expected], rel=1e-5)


def test_the_moments_are_of_all_that_was_seen_but_the_first(played):
    observations = played.buffer.rings.observations[4 : played.buffer.seen].double()
    torch.testing.assert_close(played.agent.moments.mean, observations.mean(0))
    torch.testing.assert_close(played.agent.moments.var, observations.var(0, correction=0))


def test_actions_are_random_until_learning_starts_and_then_drawn_from_the_policy(played):
    random, drawn = played.batch.actions[:160], played.batch.actions[160:]
    counts, _ = np.histogram(random, bins=4, range=(-1, 1))
    assert np.abs(counts - 80).max() < 30
    seen = played.batch.observations[160:].reshape(40, 4, 2)
    inputs = np.concatenate([scale(rows) for scale, rows in zip(played.scales[40:], seen, strict=True)])
    mean, log_std = sac.gaussian(played.agent.actor(torch.tensor(inputs)))
    deviations = ((torch.tensor(drawn).atanh() - mean) / log_std.exp()).numpy()
    assert np.std(deviations, 0) == pytest.approx(np.ones(2), abs=0.15)
    assert np.mean(deviations, 0) == pytest.approx(np.zeros(2), abs=0.2)


def test_the_policy_acts_from_the_step_on_at_which_learning_starts():
    args, watch = replace(FATES, learning_starts=8), sac.Stopwatch(dict.fromkeys(sac.SECONDS, 0.0))
    with closing(sac.Environments(args)) as envs:
        buffer = ReplayBuffer(Rings.of(100, envs.observations, gym.spaces.Box(-1, 1, (2,)), "cpu"), 4)
        buffer.begin(envs.observations)
        agent = agent_of(args, 2, 2, [-1, 0], [1, 4])
        for step in (0, 4, 8, 12):
            # A mean of 0 and, for exp(-20), no deviation.
            sac.collect(
                args, agent, lambda inputs: np.tile(np.float32([0, 0, -20, -20]), (4, 1)), buffer, envs, step, watch
            )
    assert (buffer.rings.actions[:8].abs() > 1e-6).all() and (buffer.rings.actions[8:16].abs() < 1e-6).all()


def test_what_is_not_finite_is_not_kept():
    args = replace(SMALL, env_kwargs='{"breaks": 3}')
    bound, watch = np.ones((2, 2), np.float32), sac.Stopwatch(dict.fromkeys(sac.SECONDS, 0.0))
    agent = sac.Agent(args, (2, 2), -bound, 2 * bound).requires_grad_(False)
    with closing(sac.Environments(args)) as envs:
        buffer = ReplayBuffer(Rings.of(100, envs.observations, gym.spaces.Box(-1, 1, (4,)), "cpu"), 4)
        buffer.begin(envs.observations)
        for step in (0, 4):
            sac.collect(args, agent, sac.in_numpy(agent.actor), buffer, envs, step, watch)
        with pytest.raises(FloatingPointError, match="step 12"):
            sac.collect(args, agent, sac.in_numpy(agent.actor), buffer, envs, 8, watch)
    assert len(buffer) == 8


def improve(played: Played, args: Args, step: int, updates: int = 0, learn_from: int = 160) -> tuple[list, list]:
    calls, progress = [], {"updates": updates, "learn_from": learn_from}
    learners = learners_of(played.agent, 0, 0, 0)

    def update(agent, args, learners, *data):
        calls.append((*data, [learner.learning_rate.item() for learner in learners[:3]]))
        return len(calls)

    optimise = partial(update, played.agent, args, learners, played.buffer.rings)
    measured = sac.improve(args, played.agent, learners, played.buffer, step, progress, optimise)
    assert measured == list(range(1, len(calls) + 1)) and progress["updates"] == updates + len(calls)
    return calls, [learner.learning_rate.item() for learner in learners[:3]]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1.0, 1.6])
def test_updates_count_environment_steps(played, ratio):
    args = replace(FATES, updates_per_step=ratio)
    counts = [len(improve(played, args, step)[0]) for step in range(4, 404, 4)]
    assert not any(counts[:40]) and sum(counts) == pytest.approx((400 - 160) * ratio, abs=1)
    assert max(counts) - min(counts[40:]) <= 1


def test_an_update_has_indices_noise_and_parts_of_its_own(played):
    args = replace(FATES, updates_per_step=2.0, policy_frequency=2, target_network_frequency=3)
    calls, _ = improve(played, args, 200, updates=10)
    assert [call[4:6] for call in calls] == [sac.parts_of(args, number) for number in range(11, 19)]
    slots, noise = (torch.stack([call[i] for call in calls]) for i in (2, 3))
    assert slots.shape == (8, 32) and noise.shape == (8, 3, 32, 2) and noise.std() == pytest.approx(1, abs=0.05)
    assert len(slots.unique()) > 100 and len(noise.unique()) > 0.99 * noise.numel()
    mean, deviation = calls[0][1]
    torch.testing.assert_close(mean, played.agent.moments.mean.float())
    np.testing.assert_allclose(deviation, played.agent.moments.deviation(), rtol=1e-6)
    assert calls[0][0] is played.buffer.rings


def test_rates_follow_the_schedule(played):
    args = replace(FATES, lr_schedule="linear", policy_lr=1e-3, q_lr=2e-3, learning_rate=4e-3)
    for step, factor in ((4, 1), (204, 1 - 50 / 256), (1024, 1 / 256)):
        calls, rates = improve(played, args, step)
        np.testing.assert_allclose(rates, np.array([1e-3, 2e-3, 4e-3]) * factor, rtol=1e-5)
        assert all(call[-1] == rates for call in calls) and (calls or step == 4)


# ------------------------------------------------------------------------------------------------------------- train


def test_rows_come_every_thousand_steps_and_at_evaluations_and_checkpoints(small):
    run = train(replace(small, num_evals=3, total_timesteps=4400, checkpoint_every=1300, updates_per_step=0.01))
    steps = [int(row["step"]) for row in rows(run, "progress")]
    assert steps == [1000, 1300, 1468, 2000, 2600, 2936, 3000, 3900, 4000, 4400]
    assert sorted({int(row["step"]) for row in rows(run, "evaluations")}) == [1468, 2936, 4400]


def test_evaluations_come_at_their_own_steps(small):
    run = train(replace(small, total_timesteps=700, num_evals=7, checkpoint_every=256))
    assert [row["step"] for row in rows(run, "evaluations")][::2] == [str(step) for step in range(100, 701, 100)]


def test_a_row_is_of_the_updates_since_the_last(small, monkeypatch):
    """And of none, where nothing was learnt."""
    numbers = iter(range(10**6))

    def update(*arguments):
        number, improves = float(next(numbers)), arguments[-2]
        return torch.tensor([number] * 3 + [number if improves else torch.nan] + [number] * 2)

    monkeypatch.setattr(sac, "update", update)
    args = replace(small, policy_frequency=2, learning_starts=256, checkpoint_every=256, total_timesteps=768)
    table = rows(train(args), "progress")
    assert [row["qf_loss"] for row in table] == ["nan", "31.5", "95.5"]
    assert [row["actor_loss"] for row in table] == ["nan", "32.0", "96.0"]
    rates = [small.learning_rate * (1 - (step - 4) / 768) for step in (256, 512, 768)]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(rates)
    assert [row["updates"] for row in table] == ["0", "64", "128"]
    assert [row["buffer"] for row in table] == ["256", "512", "768"]


def test_what_is_left_is_told_by_the_pace_of_learning():
    said = []
    run = SimpleNamespace(progress={"recent": [1.0]}, said=-math.inf, say=said.append)
    sac.Run.show(run, {"step": 10_000, "sps": 20_000.0, "wall_time": 0.5}, 1_000_000, "")
    run.said = -math.inf
    sac.Run.show(run, {"step": 20_000, "sps": 98.0, "wall_time": 102.5}, 1_000_000, "Q 1.0")
    assert "ETA unknown" in said[0] and "ETA 2:46:40" in said[1] and "98 steps/s" in said[1]


@pytest.mark.parametrize("norm_obs", [False, True])
def test_learns_to_mirror(small, norm_obs):
    settings = {"total_timesteps": 3000, "learning_rate": 3e-3, "gamma": 0.0, "buffer_size": 4000, "num_evals": 1}
    run = train(replace(small, **settings, norm_obs=norm_obs, eval_episodes=5))
    assert np.mean([float(row["return"]) for row in rows(run, "evaluations")]) > -0.5  # a random policy's is -11


def test_tiny_numbers_count_as_zero(small):
    torch.set_flush_denormal(False)
    tiny = torch.full((64,), 1e-39)
    assert (tiny / 2 != 0).all()
    train(replace(small, total_timesteps=256))
    assert (tiny / 2 == 0).all()


def test_bytes_stay_bytes_until_they_are_used(small):
    run = train(replace(small, env_id="tests.envs:Filmed-v0", buffer_size=300, total_timesteps=256))
    assert load(run / "checkpoint.pt")["buffer"]["rings"][0].dtype == torch.uint8


def test_a_run_says_which_precision_it_chose(small):
    run = train(replace(small, precision="auto", total_timesteps=256))
    chosen = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    assert yaml.safe_load((run / "config.yaml").read_text())["precision"] == chosen


def test_without_compiling_it_runs_the_update_and_with_it_what_was_compiled(small, monkeypatch):
    calls, update = [], sac.update
    compiled = lambda *arguments: (calls.append(1), update(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(sac, "compile_update", lambda *_: compiled)
    args = replace(small, total_timesteps=256)
    train(args)
    assert not calls
    train(replace(args, compile=True))
    assert len(calls) == (256 - 128) // 4


def longer(run, steps: int) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"total_timesteps": steps}))
    for path in run.glob("checkpoint*.pt"):
        state = load(path)
        state["args"]["total_timesteps"] = steps
        torch.save(state, path)


def assert_a_run_without_its_buffer_fills_a_new_one_first(module, small, monkeypatch, capsys):
    """And holds a batch before it learns from it; the first transition of each environment begins at what it sees."""
    buffers, init = [], module.ReplayBuffer.__init__
    monkeypatch.setattr(module.ReplayBuffer, "__init__", lambda own, *rest: (buffers.append(own), init(own, *rest))[1])
    for starts, first in ((small.learning_starts, 640), (0, 544)):
        settings = {"total_timesteps": 512, "learning_starts": starts, "checkpoint_buffer": False}
        run = module.train(replace(small, **settings, runs_dir=f"{small.runs_dir}/{starts}"))
        saved, updates = load(run / "checkpoint.pt"), int(rows(run, "progress")[-1]["updates"])
        assert not saved["buffer"]
        longer(run, 1024)
        module.train(module.parse(["--resume", str(run), "--checkpoint-every", "32"]))
        assert f"holds no replay buffer; a new one is filled until step {first}" in capsys.readouterr().out
        since = {int(row["step"]): int(row["updates"]) - updates for row in rows(run, "progress")}
        assert since[first] == 0 and since[1024] == (1024 - first) // 4
        assert len(buffers[-1]) == 512 and buffers[-1].rings.between[:8].tolist() == [[n, n + 4] for n in range(8)]
        undisturbed = module.train(replace(small, **settings, runs_dir=f"{small.runs_dir}/{starts}/undisturbed"))
        run = stop_at(module, replace(small, **settings, runs_dir=f"{small.runs_dir}/{starts}/stopped"), 496)
        assert load(run / "checkpoint.pt")["buffer"]  # the 16 steps left would not fill a new one
        module.train(module.parse(["--resume", str(run)]))
        ends = load(undisturbed / "checkpoint.pt"), load(run / "checkpoint.pt")
        assert all(torch.equal(value, ends[1]["agent"][name]) for name, value in ends[0]["agent"].items())
        assert not ends[1]["buffer"]


def stop_at(module, args, step: int):
    """The run's directory."""
    interrupts, write = [], module.Run.write

    def write_and_interrupt(run, table: str, rows: list[dict]) -> None:
        write(run, table, rows)
        if table == "progress" and rows[0]["step"] >= step:
            interrupts.append(signal.SIGINT)

    with mock.patch.object(module.Run, "write", write_and_interrupt), pytest.raises(SystemExit, match="130"):
        module.train(replace(args, checkpoint_every=16), interrupts=interrupts)
    return next(Path(args.runs_dir).iterdir())


def test_a_run_without_its_buffer_fills_a_new_one_first(small, monkeypatch, capsys):
    assert_a_run_without_its_buffer_fills_a_new_one_first(sac, small, monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------------------ policy


def test_a_policy_acts_as_the_mean_does_and_samples_around_it():
    torch.manual_seed(0)
    agent = agent_of(replace(SMALL, norm_obs=True), low=[-2, 0], high=[2, 1])
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 3)))
    policy, observation = sac.Policy(SMALL, agent), np.array([1.0, 2.0, -3.0])
    mean, log_std = sac.gaussian(agent.actor(torch.tensor(agent.moments.normaliser()(observation[None]))))
    mean, deviation = mean[0].numpy(), log_std[0].exp().numpy()
    np.testing.assert_allclose(policy(observation), np.tanh(mean) * [2, 0.5] + [0, 0.5], rtol=1e-4)
    samples = policy(np.tile(observation, (4000, 1)), sample=True)
    u = np.arctanh((samples - [0, 0.5]) / [2, 0.5])
    np.testing.assert_allclose(u.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(u.std(0), deviation, rtol=0.05)
    drawn = agent.sample(np.float32([0, 0, 9, -99]), np.float32([0.01, 1]))  # as where the loss has the same bounds
    np.testing.assert_allclose(drawn, np.tanh([0.01 * math.e**2, 0]), rtol=1e-4, atol=1e-6)


def test_a_value_is_the_lower_of_the_critics_of_the_policys_own_action():
    torch.manual_seed(0)
    agent = agent_of(replace(SMALL, norm_obs=True))
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 3)))
    policy, observations = sac.Policy(SMALL, agent), np.random.default_rng(1).normal(size=(20, 3))
    inputs = torch.tensor(agent.moments.normaliser()(observations))
    actions = torch.tensor(policy(observations), dtype=torch.float32)
    both = agent.critics(torch.cat((inputs, actions), -1)).squeeze(-1)
    assert set(both.argmin(0).tolist()) == {0, 1}
    np.testing.assert_allclose(policy.value(observations), both.amin(0), rtol=1e-4)
    assert policy.discount == SMALL.gamma and policy.bootstraps == ("truncated",)


def test_a_policy_does_not_depend_on_where_its_observations_lie():
    policy = sac.Policy(SMALL, agent_of(SMALL, 17))
    data, answers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32), set()
    for offset in range(0, 64, 4):
        memory = np.empty(data.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        observations = memory[start : start + data.nbytes].view(np.float32).reshape(2, 17)
        observations[:] = data
        answers.add(policy(observations).tobytes())
    assert len(answers) == 1


def test_a_loaded_policy_is_the_one_that_was_trained(small, monkeypatch):
    kept, evaluate = [], sac.evaluate

    def keep(args, run, agent, step, progress):
        observations = np.random.default_rng(step).normal(size=(50, 2, 2))
        kept.append((step, observations, sac.Policy(args, agent)(observations)))
        evaluate(args, run, agent, step, progress)

    monkeypatch.setattr(sac, "evaluate", keep)
    run = train(replace(small, num_evals=2, learning_rate=0.01))
    for step, observations, actions in kept:
        assert np.array_equal(load_policy(run / "policies" / f"step-{step:09d}.pt")(observations), actions)
    assert np.array_equal(load_policy(str(run / "checkpoint.pt"))(observations), actions)


# ----------------------------------------------------------------------------------------------------------- EnvPool


def test_envpool_cannot_restore_and_says_so(small, capsys):
    pytest.importorskip("envpool")
    run = train(replace(small, env_id="Hopper-v4", vec="envpool", checkpoint_every=512))
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    train(parse(["--resume", str(run)]))
    assert "could not be restored exactly" in capsys.readouterr().out
    state = load(run / "checkpoint.pt")["buffer"]
    observations, _, _, terminated, between = state["rings"]
    assert len(terminated) == 1024 and len(observations) >= 1028 + 4  # those of the new episodes among them
    held = between.long()
    assert (held[512:516, 0] == held[508:512, 1].max() + 1 + torch.arange(4)).all()
