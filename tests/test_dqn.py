"""DQN's mathematics against independent computations, and how its parts are wired."""

import copy
import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

import dqn
from benchmark.evaluate import play
from dqn import Args, ReplayBuffer, Rings, RunningMoments, load_policy, parse, train
from tests.envs import Barred, Fates
from tests.marks import needs_compiler
from tests.test_promises import load, rows
from tests.test_sac_continuous import assert_a_run_without_its_buffer_fills_a_new_one_first

SMALL = Args(
    env_id="tests.envs:Signs-v0",
    num_envs=4,
    total_timesteps=1024,
    learning_starts=128,
    updates_per_step=0.25,
    batch_size=32,
    buffer_size=2000,
    hidden_sizes=(32, 32),
    action_masks=False,
    num_evals=0,
    eval_episodes=2,
    compile=False,
)


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def agent_of(args: Args = SMALL, observation: int = 2, count: int = 4, start: int = 3) -> dqn.Agent:
    return dqn.Agent(args, (observation,), np.array(start), np.array(start + count - 1)).requires_grad_(False)


def learners_of(agent: dqn.Agent, rate: float) -> dqn.Learners:
    learners = dqn.Learners.of(agent, "cpu")
    learners.q.learning_rate.fill_(rate)
    return learners


# ---------------------------------------------------------------------------------------------------- replay buffer

STILL = torch.tensor([[0.0, 0.0], [1.0, 1.0]])


def buffer_of(size: int, num_envs: int, dtype: type = np.float32) -> ReplayBuffer:
    return ReplayBuffer(Rings.of(size, np.zeros((1, 2), dtype), 4, "cpu"), num_envs)


def filled_buffer(
    size: int, num_envs: int, steps: int, args: Args = SMALL, dtype: type = np.float32
) -> tuple[ReplayBuffer, list[tuple]]:
    """After `steps` steps with episodes of random lengths, and what can be drawn from it, in the order of the slots.

    Of every environment the whole history is kept, from which returns are summed step by step.
    """
    random, buffer = np.random.default_rng(size + num_envs), buffer_of(size, num_envs, dtype)
    numbers = iter(range(10**6))
    histories: list[list[dict]] = [[] for _ in range(num_envs)]

    def see(count: int) -> tuple[np.ndarray, np.ndarray]:
        """A new observation for each, unlike all before, and what is allowed there."""
        seen = np.array([divmod(next(numbers), 256) for _ in range(count)], dtype=float).reshape(-1, 2)
        return seen, random.random((count, 4)) < 0.6

    now, masks = see(num_envs)
    buffer.begin(now, masks)
    numbered, written = np.arange(num_envs), num_envs
    for _ in range(steps):
        following, next_masks = see(num_envs)
        actions, rewards = random.integers(4, size=num_envs), random.random(num_envs)
        ended = random.random(num_envs) < 0.2
        terminated = ended & (random.random(num_envs) < 0.5)
        columns = now, numbered, actions, np.float32(rewards), terminated, ended, following, next_masks
        names = "observation", "number", "action", "reward", "terminated", "ended", "following", "mask"
        for history, *row in zip(histories, *columns, strict=True):
            history.append(dict(zip(names, row, strict=True)))
        now, masks = following.copy(), next_masks.copy()
        now[ended], masks[ended] = see(ended.sum())
        both = np.concatenate((following[ended], now)), np.concatenate((next_masks[ended], masks))
        buffer.add(actions, rewards, terminated, ended, *both)
        written += ended.sum()
        numbered, written = np.arange(written, written + num_envs), written + num_envs

    def drawn(history: list[dict], t: int) -> tuple:
        total, factor = 0.0, 1.0
        for last in history[t : t + args.n_step]:
            total, factor = total + factor * last["reward"], factor * args.gamma
            if last["ended"]:
                break
        factor = 0.0 if last["terminated"] else factor
        return *history[t]["observation"], history[t]["action"], total, factor, *last["following"], *last["mask"]

    held = [
        drawn(history, t)
        for t in range(steps)
        for history in histories
        if history[t]["number"] >= written - size  # its first observation has not been overwritten
    ]
    return buffer, held


def flat(batch: dqn.Transitions) -> np.ndarray:
    return torch.cat([column.view(len(column), -1).double() for column in batch], 1).numpy()


@pytest.mark.parametrize("n_step", [1, 2, 5])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 10, 15, 16, 17, 18, 19, 100])
def test_returns_are_those_of_the_histories_through_ends_cuts_and_the_newest_step(num_envs, steps, n_step):
    args = replace(SMALL, n_step=n_step, num_envs=num_envs, gamma=0.9)
    for dtype in (np.float32, np.uint8):
        buffer, expected = filled_buffer(60, num_envs, steps, args, dtype)
        assert len(buffer) == len(expected) and 0 < len(expected) <= 60
        slots = torch.arange(buffer.first, buffer.end) % buffer.size
        np.testing.assert_allclose(flat(dqn.gather(args, buffer.rings, STILL, slots)), expected, rtol=1e-6)


def test_a_cut_episode_goes_on_in_the_value_of_its_last_observation_and_an_ended_one_does_not():
    """By hand: two steps, then the time limit; two steps, then the end."""
    args, buffer = replace(SMALL, num_envs=1, n_step=3, gamma=0.5), buffer_of(20, 1)
    masks, run_on = np.ones((1, 4), bool), np.zeros(1, bool)
    buffer.begin(np.array([[10.0, 0]]), masks)
    for t, terminated in ((11, False), (21, True)):
        buffer.add(np.array([0]), np.array([4.0]), run_on, run_on, np.array([[t, 0.0]]), masks)
        seen = np.array([[t + 1, 0.0], [t + 9, 0.0]])  # the last of this episode, and the first of the next
        over = np.array([True])
        buffer.add(np.array([1]), np.array([2.0]), over & terminated, over, seen, masks.repeat(2, 0))
    batch = dqn.gather(args, buffer.rings, STILL, torch.arange(4))
    assert batch.observations[:, 0].tolist() == [10, 11, 20, 21]
    assert batch.returns.tolist() == [5, 2, 5, 2] and batch.actions.tolist() == [0, 1, 0, 1]
    assert batch.discounts.tolist() == [0.25, 0.5, 0, 0]
    assert batch.next_observations[:, 0].tolist() == [12, 12, 22, 22]


def test_the_buffer_is_sampled_evenly():
    torch.manual_seed(0)
    buffer, expected = filled_buffer(60, 3, 100)
    counts = torch.bincount((buffer.draw(400 * len(expected)) - buffer.first) % 60, minlength=60)
    assert (counts[len(expected) :] == 0).all()
    assert ((counts[: len(expected)] - 400) / 20).abs().max() < 5


def test_the_buffer_is_restored_exactly():
    for steps in (3, 100):
        buffer, _ = filled_buffer(60, 3, steps)
        other = buffer_of(60, 3)
        other.before = other.before.copy()  # as where the rings are a GPU's
        other.restore(copy.deepcopy(buffer.state()))
        for one in (buffer, other):
            one.add(np.ones(3), np.ones(3), np.zeros(3, bool), np.arange(3) == 1, np.ones((4, 2)), np.ones((4, 4)))
        assert (buffer.seen, buffer.first, buffer.end) == (other.seen, other.first, other.end)
        assert all(map(torch.equal, buffer.rings, other.rings)) and np.array_equal(buffer.before, other.before)


def test_torch_writes_what_numpy_does():
    numpys, torchs = (filled_buffer(60, 3, 1)[0] for _ in range(2))
    torchs.writable = torchs.rings  # as on a GPU
    torchs.before = torchs.before.copy()
    random = np.random.default_rng(0)
    for _ in range(50):
        ended = random.random(3) < 0.3
        seen, masks = random.random((3 + ended.sum(), 2)), random.random((3 + ended.sum(), 4)) < 0.5
        for buffer in (numpys, torchs):
            buffer.add(np.arange(3), np.arange(3) / 7, ended, ended, seen, masks)
    assert all(map(torch.equal, numpys.rings, torchs.rings)) and np.array_equal(numpys.before, torchs.before)
    assert numpys.first == torchs.first > 0


def test_a_buffer_that_is_not_full_is_kept_without_its_empty_rows():
    buffer, _ = filled_buffer(60, 3, 4)
    assert [len(ring) for ring in buffer.state()["rings"]] == [*[buffer.seen] * 2, *[12] * 4] and buffer.seen < 30
    assert all(ring.untyped_storage().nbytes() == ring.nbytes for ring in buffer.state()["rings"])


def test_the_buffer_normalises_as_the_policy_does():
    buffer, _ = filled_buffer(60, 3, 10)
    moments = RunningMoments((2,), True)
    moments.update(np.random.default_rng(0).normal(0, 2, (50, 2)))
    scale, slots = torch.tensor(np.stack((moments.mean, moments.deviation()))), buffer.draw(20)
    raw = dqn.gather(SMALL, buffer.rings, scale, slots)
    normal = dqn.gather(replace(SMALL, norm_obs=True), buffer.rings, scale, slots)
    for name in ("observations", "next_observations"):
        expected = moments.normaliser()(getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(normal, name), expected, rtol=1e-5, atol=1e-6)
    assert normal.observations.abs().max() == 10


def test_a_million_steps_fit_into_60_mb():
    rings = Rings.of(1_000_000, np.zeros((1, 8)), 0, "cpu")
    assert sum(ring.nbytes for ring in rings) == 53_000_000


# ------------------------------------------------------------------------------------------------------ mathematics


def plain_network(network: torch.nn.Sequential) -> torch.nn.Sequential:
    return copy.deepcopy(network).requires_grad_(True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize(("tau", "every"), [(0.1, 1), (1.0, 3)])
def test_updates_equal_the_papers(double_q, masked, tau, every):
    """Against a plain implementation, transition by transition, with torch's modules and optimiser."""
    torch.manual_seed(0)
    args = Args(hidden_sizes=(16, 16), n_step=2, num_envs=3, double_q=double_q, action_masks=masked, tau=tau)
    args = replace(args, gamma=0.9, target_network_frequency=every)
    buffer, _ = filled_buffer(60, 3, 100, args)
    buffer.rings.masks[buffer.rings.masks.sum(-1) == 0] = True
    buffer.rings.rewards.mul_(3)  # some errors are above 1, others below
    buffer.rings.observations.div_(100)
    agent = agent_of(args)
    q, target = plain_network(agent.q), plain_network(agent.q)
    learners, adam = learners_of(agent, 1e-2), torch.optim.Adam(q.parameters(), lr=1e-2)
    chosen, steep = set(), 0
    for number in range(1, 8):
        slots, scale = buffer.draw(32), torch.ones(2, 2)
        batch = dqn.gather(args, buffer.rings, scale, slots)
        measured = dqn.update(agent, args, learners, buffer.rings, scale, slots, number % every == 0)
        losses, values = [], []
        for observation, action, total, discount, following, mask in zip(*batch, strict=True):
            open_actions = [a for a in range(4) if mask[a] or not masked]
            chooser = q if double_q else target
            best = max(open_actions, key=lambda a: chooser(following)[a].item())  # noqa: B023
            goal = total + discount * target(following)[best].detach()
            values.append(q(observation)[action])
            error = values[-1] - goal
            steep += int(error.abs() > 1)
            losses.append(0.5 * error**2 if error.abs() < 1 else error.abs() - 0.5)
            chosen.add(best == target(following).argmax().item())
        loss = torch.stack(losses).mean()
        expected = torch.stack((loss, torch.stack(values).mean())).detach()
        torch.testing.assert_close(measured, expected, atol=1e-5, rtol=1e-4)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if number % every == 0:
            for slow, fast in zip(target.parameters(), q.parameters(), strict=True):
                slow.data = (1 - tau) * slow.data + tau * fast.data
    assert chosen == ({True, False} if double_q or masked else {True}) and 10 < steep < 7 * 32 - 10
    inputs, close = torch.randn(20, 2), {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(agent.q(inputs), q(inputs).detach(), **close)
    agent.q.load_state_dict(dqn.parameters_of(agent.q, learners.target))
    torch.testing.assert_close(agent.q(inputs), target(inputs).detach(), **close)


@needs_compiler
def test_every_kind_of_update_is_compiled(monkeypatch):
    kinds = []
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *arguments: kinds.append(arguments[-1]))
    for every, expected in ((1, [True]), (2, [False, True]), (500, [False, True])):
        kinds.clear()
        args, run = replace(SMALL, target_network_frequency=every), SimpleNamespace(say=lambda text: None)
        agent = agent_of(args)
        dqn.compile_update(args, agent, learners_of(agent, 0), buffer_of(60, 4), run)
        assert sorted(kinds) == expected


@pytest.mark.parametrize("sizes", [(32,), (32, 24, 16)])
def test_numpy_computes_what_torch_does_and_learns_with_it(sizes):
    agent, observations = agent_of(replace(SMALL, hidden_sizes=sizes), 17), torch.randn(5, 17)
    learners = learners_of(agent, 0.1)
    forward = dqn.in_numpy(agent.q)
    before = forward(observations.numpy())
    assert before.dtype == np.float32 and before.shape == (5, 4)
    np.testing.assert_allclose(before, agent.q(observations), atol=1e-5)
    learners.q.adam_step(torch.randn_like(learners.q.theta), 1e-8)
    np.testing.assert_allclose(forward(observations.numpy()), agent.q(observations), atol=1e-5, rtol=1e-4)
    assert np.abs(forward(observations.numpy()) - before).max() > 0.1


def test_a_fork_whose_network_numpy_does_not_compute_is_told():
    agent = agent_of()
    agent.q[1] = torch.nn.Tanh()
    with pytest.raises(AssertionError, match="in_numpy must compute what the network does"):
        dqn.in_numpy(agent.q)


# ------------------------------------------------------------------------------------------------------- exploration


def test_exploration_falls_linearly_after_the_random_steps():
    args = replace(SMALL, total_timesteps=1000, learning_starts=100, exploration_fraction=0.5)
    args = replace(args, epsilon_start=0.9, epsilon_end=0.1)
    steps = [0, 99, 100, 250, 375, 499, 500, 501, 1000]
    expected = [1, 1, 0.74, 0.5, 0.3, 0.1016, 0.1, 0.1, 0.1]
    assert [dqn.epsilon_of(args, step) for step in steps] == pytest.approx(expected)
    args = replace(args, exploration_fraction=0.0, learning_starts=0)
    assert [dqn.epsilon_of(args, step) for step in (0, 500)] == [0.1, 0.1]


def test_actions_are_greedy_but_for_the_share_that_is_uniform_among_the_allowed():
    values = np.tile([1.0, 5.0, 2.0, 4.0], (100_000, 1))
    noise = torch.rand((100_000, 5), generator=torch.Generator().manual_seed(0)).numpy()
    for allowed, best in (([1, 1, 1, 1], 1), ([1, 0, 1, 1], 3), ([1, 0, 0, 0], 0)):
        masks = np.tile(np.array(allowed, bool), (100_000, 1))
        for epsilon in (0.0, 0.3, 1.0):
            frequencies = np.bincount(dqn.choose(values, noise, epsilon, masks), minlength=4) / 100_000
            expected = epsilon * np.array(allowed) / sum(allowed) + (1 - epsilon) * (np.arange(4) == best)
            np.testing.assert_allclose(frequencies, expected, atol=0.006 * (epsilon > 0))
            assert not frequencies[np.array(allowed) == 0].any()


# ---------------------------------------------------------------------------------------------- from steps to updates

LOTS = replace(SMALL, env_id="tests.envs:Lots-v0", learning_starts=160, norm_obs=True, n_step=1, epsilon_start=0.0)
LOTS = replace(LOTS, epsilon_end=0.0)


class Played:
    """320 steps of Lots, the first half of them random, of which everything can be told from what was seen."""

    def __init__(self, args: Args = LOTS):
        torch.manual_seed(0)
        self.args, self.agent = args, agent_of(args)
        self.act, watch = dqn.in_numpy(self.agent.q), dqn.Stopwatch(dict.fromkeys(dqn.SECONDS, 0.0))
        with closing(dqn.Environments(args)) as envs:
            rings = Rings.of(args.buffer_size, envs.observations, self.agent.mask_size, "cpu")
            self.buffer = ReplayBuffer(rings, args.num_envs)
            self.buffer.begin(envs.observations, dqn.masks_of(args, self.agent, envs))
            self.episodes, self.scales = [], []
            for step in range(0, 320, 4):
                self.scales.append(self.agent.moments.normaliser())
                self.episodes += dqn.collect(args, self.agent, self.act, self.buffer, envs, step, watch)
        assert len(self.buffer) == 320
        columns = dqn.gather(replace(args, norm_obs=False), self.buffer.rings, STILL, torch.arange(320))
        self.batch = dqn.Transitions(*(column.numpy() for column in columns))
        self.seed, self.t = self.batch.observations.astype(int).T
        self.length, self.terminates, self.cut = np.vectorize(Fates.end_of)(self.seed)
        self.over = self.t + 1 == self.length


@pytest.fixture(scope="module")
def played() -> Played:
    return Played()


def test_what_is_kept_is_what_was_played(played):
    batch, over = played.batch, played.over
    assert np.array_equal(batch.next_observations, np.stack((played.seed, played.t + 1), -1))
    assert np.array_equal(batch.discounts == 0, over & played.terminates)
    assert set(batch.discounts) == {0, np.float32(0.99)}
    kinds = set(zip(played.terminates[over], played.cut[over], strict=True))
    assert len(kinds) == 3 and over.sum() > 20
    running = ~over.reshape(80, 4)[:-1]
    following = batch.observations.reshape(80, 4, 2)[1:]
    assert np.array_equal(following[running], batch.next_observations.reshape(80, 4, 2)[:-1][running])
    assert (following[~running][:, 1] == 0).all()  # a new episode begins where one has ended
    np.testing.assert_allclose(batch.returns, batch.actions + 3 + played.seed / 100 + played.t + 1, rtol=1e-5)


def test_every_finished_episode_has_a_row(played):
    rewards, over = (column.reshape(80, 4) for column in (played.batch.returns, played.over))
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


def test_actions_are_random_until_learning_starts_and_then_greedy(played):
    counts = np.bincount(played.batch.actions[:160], minlength=4)
    assert np.abs(counts - 40).max() < 25
    seen = played.batch.observations.reshape(80, 4, 2)
    inputs = np.concatenate([scale(rows) for scale, rows in zip(played.scales, seen, strict=True)])
    greedy = played.act(inputs).argmax(-1) == played.batch.actions
    assert not greedy[156:160].all() and greedy[160:].all()


def test_what_is_not_finite_is_not_kept():
    args = replace(SMALL, env_kwargs='{"breaks": 3}')
    agent, watch = agent_of(args, 1, 3, -1), dqn.Stopwatch(dict.fromkeys(dqn.SECONDS, 0.0))
    act = dqn.in_numpy(agent.q)
    with closing(dqn.Environments(args)) as envs:
        buffer = ReplayBuffer(Rings.of(100, envs.observations, 0, "cpu"), 4)
        buffer.begin(envs.observations, np.ones((4, 3), bool))
        for step in (0, 4):
            dqn.collect(args, agent, act, buffer, envs, step, watch)
        with pytest.raises(FloatingPointError, match="step 12"):
            dqn.collect(args, agent, act, buffer, envs, 8, watch)
    assert len(buffer) == 8


def improve(played: Played, args: Args, step: int, updates: int = 0, learn_from: int = 160) -> tuple[list, float]:
    calls, progress = [], {"updates": updates, "learn_from": learn_from}
    learners = learners_of(played.agent, 0)

    def update(agent, args, learners, *data):
        calls.append((*data, learners.q.learning_rate.item()))
        return len(calls)

    optimise = partial(update, played.agent, args, learners, played.buffer.rings)
    measured = dqn.improve(args, played.agent, learners, played.buffer, step, progress, optimise)
    assert measured == list(range(1, len(calls) + 1)) and progress["updates"] == updates + len(calls)
    return calls, learners.q.learning_rate.item()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1.0, 1.6])
def test_updates_count_environment_steps(played, ratio):
    args = replace(LOTS, updates_per_step=ratio)
    counts = [len(improve(played, args, step)[0]) for step in range(4, 404, 4)]
    assert not any(counts[:40]) and sum(counts) == pytest.approx((400 - 160) * ratio, abs=1)
    assert max(counts) - min(counts[40:]) <= 1


def test_an_update_has_slots_of_its_own_and_some_move_the_target(played):
    args = replace(LOTS, updates_per_step=2.0, target_network_frequency=3)
    calls, _ = improve(played, args, 200, updates=10)
    assert [call[3] for call in calls] == [False, True, False, False, True, False, False, True]
    slots = torch.stack([call[2] for call in calls])
    assert slots.shape == (8, 32) and len(slots.unique()) > 100
    mean, deviation = calls[0][1]
    torch.testing.assert_close(mean, played.agent.moments.mean.float())
    np.testing.assert_allclose(deviation, played.agent.moments.deviation(), rtol=1e-6)
    assert calls[0][0] is played.buffer.rings
    assert (improve(played, replace(args, norm_obs=False), 200)[0][0][1] == 1).all()


def test_rates_follow_the_schedule(played):
    args = replace(LOTS, lr_schedule="linear", learning_rate=4e-3, updates_per_step=1.0)
    for step, factor in ((4, 1), (204, 1 - 50 / 256), (1024, 1 / 256)):
        calls, rate = improve(played, args, step)
        assert rate == pytest.approx(4e-3 * factor)
        assert all(call[-1] == rate for call in calls) and (calls or step == 4)


# ------------------------------------------------------------------------------------------------------------- train


def test_a_row_is_of_the_updates_since_the_last(small, monkeypatch):
    """And of none, where nothing was learnt."""
    numbers = iter(range(10**6))
    monkeypatch.setattr(dqn, "update", lambda *_: torch.full((2,), float(next(numbers))))
    args = replace(small, exploration_fraction=1.0, epsilon_end=0.05)
    run = train(replace(args, learning_starts=256, checkpoint_every=256, total_timesteps=768))
    table = rows(run, "progress")
    assert [row["td_loss"] for row in table] == ["nan", "31.5", "95.5"]
    assert [row["updates"] for row in table] == ["0", "64", "128"]
    assert [row["buffer"] for row in table] == ["256", "512", "768"]
    assert [float(row["epsilon"]) for row in table] == pytest.approx([0.05 + 0.95 * left / 3 for left in (2, 1, 0)])
    rates = [small.learning_rate * (1 - (step - 4) / 768) for step in (256, 512, 768)]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(rates)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_learns_to_name_signs(small, norm_obs):
    run = train(
        replace(
            small, learning_rate=3e-3, num_evals=1, eval_episodes=5, gamma=0.0, updates_per_step=0.5, norm_obs=norm_obs
        )
    )
    assert [float(row["return"]) for row in rows(run, "evaluations")] == [10] * 5


def test_without_compiling_it_runs_the_update_and_with_it_what_was_compiled(small, monkeypatch):
    calls, update = [], dqn.update
    compiled = lambda *arguments: (calls.append(1), update(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(dqn, "compile_update", lambda *_: compiled)
    args = replace(small, total_timesteps=256)
    train(args)
    assert not calls
    train(replace(args, compile=True))
    assert len(calls) == (256 - 128) // 4


def test_a_run_without_its_buffer_fills_a_new_one_first(small, monkeypatch, capsys):
    assert_a_run_without_its_buffer_fills_a_new_one_first(dqn, small, monkeypatch, capsys)


def test_bytes_stay_bytes_until_they_are_used(small):
    class Bytes(gym.ObservationWrapper):
        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.observation_space = gym.spaces.Box(0, 2, (1,), np.uint8)

        def observation(self, observation: np.ndarray) -> np.ndarray:
            return (observation + 1).astype(np.uint8)

    gym.register("Bytes-v0", lambda **_: Bytes(gym.make("tests.envs:Signs-v0", disable_env_checker=True).unwrapped))
    run = train(replace(small, env_id="Bytes-v0", total_timesteps=256))
    assert load(run / "checkpoint.pt")["buffer"]["rings"][0].dtype == torch.uint8


# ------------------------------------------------------------------------------------------------------ action masks

BARRED = replace(SMALL, env_id="tests.envs:Barred-v0", env_kwargs='{"form": "single"}', action_masks=True)


@pytest.mark.parametrize("vec", ["sync", "async"])
def test_masks_are_those_of_the_states_acted_in(vec):
    """The environment itself fails where a forbidden action is done, and forbids all of them once it has ended."""
    args, envs, space = dqn.prepare(replace(BARRED, vec=vec, epsilon_end=0.5, learning_starts=80, n_step=1))
    envs.close()
    assert args.action_masks and (space.n, space.start) == (4, 3)
    batch, over = (game := Played(args)).batch, game.over
    assert batch.next_masks[over].all() and over.sum() > 20
    for (seed, t), mask in zip(batch.next_observations[~over].astype(int), batch.next_masks[~over], strict=True):
        assert np.array_equal(mask, Barred.allowed(seed, t)[1])
    for (seed, t), action in zip(batch.observations.astype(int), batch.actions, strict=True):
        assert Barred.allowed(seed, t)[1][action]


def test_the_last_observation_of_an_episode_has_the_mask_that_was_shown_with_it():
    """Where all count, if it showed none or forbade all."""
    masks = {"mask": [np.int8([1, 0, 0, 0])] * 4, "last_mask": [None, None, np.int8([0, 0, 1, 1]), np.int8([0] * 4)]}
    envs, agent = SimpleNamespace(envs=SimpleNamespace(get_attr=masks.get)), agent_of(BARRED)
    found = dqn.masks_of(BARRED, agent, envs, np.array([False, True, True, True]))
    assert found.astype(int).tolist() == [[1] * 4, [0, 0, 1, 1], [1] * 4, *[[1, 0, 0, 0]] * 4]
    assert dqn.masks_of(BARRED, agent, envs).astype(int).tolist() == [[1, 0, 0, 0]] * 4


def test_a_time_limits_last_mask_outlives_the_reset():
    """Taxi shows masks to the end; those of a new episode are other ones."""
    args = replace(SMALL, env_id="Taxi-v4", env_kwargs='{"max_episode_steps": 3}', num_envs=2, action_masks=True)
    with closing(dqn.Environments(args)) as envs:
        taxis, truncated = [env.unwrapped for env in envs.envs.envs], np.zeros(2, bool)
        while not truncated.any():
            first = np.array([np.flatnonzero(mask)[0] for mask in envs.envs.get_attr("mask")])
            true_next, _, _, truncated, _ = envs.step(first)
        states, now = true_next.argmax(-1), envs.observations.argmax(-1)
        assert truncated.all() and (states != now).any()
        for name, seen in (("last_mask", states), ("mask", now)):
            shown = zip(taxis, seen, strict=True)
            assert np.array_equal(envs.envs.get_attr(name), [taxi.action_mask(state) for taxi, state in shown])


def test_a_policy_takes_the_best_of_what_is_allowed():
    torch.manual_seed(0)
    args = replace(BARRED, env_id="Maze-v0", epsilon_end=0.4)
    agent, random = agent_of(args), np.random.default_rng(0)
    policy, observations, masks = dqn.Policy(args, agent), random.normal(size=(50, 2)), random.random((50, 4)) < 0.5
    masks[:, 2] = True
    values = agent.q(torch.tensor(observations).float()).numpy()
    best = np.where(masks, values, -np.inf).argmax(-1) + 3
    assert policy.masked and np.array_equal(policy(observations, mask=masks), best)
    alone = [policy(*pair, mask=mask) for *pair, mask in zip(observations, masks, strict=True)]
    assert np.array_equal(alone, best) and len(set(best)) > 1
    samples = np.array([policy(observations[0], sample=True, mask=[1, 0, 1, 1]) for _ in range(3000)])
    frequencies, likeliest = (
        np.bincount(samples - 3, minlength=4) / 3000,
        np.where([1, 0, 1, 1], values[0], -9).argmax(),
    )
    expected = 0.4 * np.array([1, 0, 1, 1]) / 3 + 0.6 * (np.arange(4) == likeliest)
    np.testing.assert_allclose(frequencies, expected, atol=0.04)
    assert frequencies[1] == 0
    for wrong, told in ((None, "is None"), (masks[0, 1:], "values"), (np.zeros(4), "allows no action")):
        with pytest.raises(ValueError, match=f"Maze-v0: an info's action_mask .*{told}"):
            policy(observations[0], mask=wrong)
    with pytest.raises(ValueError):
        policy(observations, mask=masks[1:])


def test_a_masked_policy_is_evaluated_as_it_was_in_the_run(small):
    run = train(replace(BARRED, runs_dir=small.runs_dir, num_evals=1, eval_episodes=5))
    args = Args(**yaml.safe_load((run / "config.yaml").read_text()))
    policy, seeds = load_policy(run / "checkpoint.pt"), list(range(10_000, 10_005))
    envs = [dqn.make_eval_env(args) for _ in seeds]
    episodes = play(policy, envs, seeds, sample=False, values=True)
    assert [str(episode.total) for episode in episodes] == [row["return"] for row in rows(run, "evaluations")]
    assert play(policy, envs, seeds, sample=True, values=False)


@pytest.mark.parametrize(
    ("env_id", "masks", "heeded"), [("Taxi-v4", True, True), ("Taxi-v4", False, False), ("CartPole-v1", True, False)]
)
def test_masks_are_heeded_where_there_are_any_unless_they_are_ignored(small, env_id, masks, heeded):
    run = train(replace(small, env_id=env_id, action_masks=masks, total_timesteps=256, num_evals=1, eval_episodes=1))
    assert yaml.safe_load((run / "config.yaml").read_text())["action_masks"] is heeded
    assert load_policy(run / "checkpoint.pt").masked is heeded
    assert (", masked" in (run / "run.log").read_text()) is heeded
    assert load(run / "checkpoint.pt")["buffer"]["rings"][1].shape[1] == 6 * heeded


def test_an_environment_that_allows_nothing_is_named(small, capsys):
    args = replace(BARRED, runs_dir=small.runs_dir)
    with pytest.raises(SystemExit, match="2"):
        train(replace(args, env_kwargs=json.dumps({"form": "single", "stuck": 0})))
    assert "tests.envs:Barred-v0: an info's action_mask allows no action" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dqn.prepare(replace(BARRED, env_id="tests.envs:Once-v0", env_kwargs="{}"))
    assert "action_mask must have 2 values" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tests.envs:Barred-v0: an info's action_mask allows no action"):
        train(replace(args, env_kwargs=json.dumps({"form": "single", "stuck": 2})))


def test_masks_that_evaluation_lacks_or_envpool_does_not_give_are_refused(small, capsys, monkeypatch):
    monkeypatch.setattr(dqn, "find_spec", lambda name: True)
    args = replace(BARRED, runs_dir=small.runs_dir)
    with pytest.raises(SystemExit, match="2"):
        train(replace(args, vec="envpool"))
    assert "--vec envpool: EnvPool gives no action masks" in capsys.readouterr().err
    make = dqn.make_eval_env
    lots = lambda args, **kw: make(replace(args, env_id="tests.envs:Lots-v0", env_kwargs="{}"), **kw)  # noqa: E731
    monkeypatch.setattr(dqn, "make_eval_env", lots)
    with pytest.raises(SystemExit, match="2"):
        train(args)
    assert "evaluation does not have the spaces and masks of training" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ policy


def test_a_policy_does_what_is_worth_most():
    torch.manual_seed(0)
    agent = agent_of(replace(SMALL, norm_obs=True))
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 2)))
    policy, observations = dqn.Policy(SMALL, agent), np.random.default_rng(1).normal(size=(20, 2))
    values = agent.q(torch.tensor(agent.moments.normaliser()(observations)))
    np.testing.assert_allclose(policy.value(observations), values.amax(-1), rtol=1e-4)
    assert np.array_equal(policy(observations), values.argmax(-1) + 3)
    assert policy.discount == SMALL.gamma and policy.bootstraps == ("truncated",)


def test_a_policy_does_not_depend_on_where_its_observations_lie():
    policy = dqn.Policy(SMALL, agent_of(SMALL, 17))
    data, answers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32), set()
    for offset in range(0, 64, 4):
        memory = np.empty(data.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        observations = memory[start : start + data.nbytes].view(np.float32).reshape(2, 17)
        observations[:] = data
        answers.add(policy._judge(observations).tobytes())
    assert len(answers) == 1


def test_a_loaded_policy_is_the_one_that_was_trained(small, monkeypatch):
    kept, evaluate = [], dqn.evaluate

    def keep(args, run, agent, step, progress):
        observations = np.random.default_rng(step).normal(size=(50, 1))
        kept.append((step, observations, dqn.Policy(args, agent)(observations)))
        evaluate(args, run, agent, step, progress)

    monkeypatch.setattr(dqn, "evaluate", keep)
    run = train(replace(small, num_evals=2, learning_rate=0.01))
    for step, observations, actions in kept:
        assert np.array_equal(load_policy(run / "policies" / f"step-{step:09d}.pt")(observations), actions)
    assert np.array_equal(load_policy(str(run / "checkpoint.pt"))(observations), actions)


# ----------------------------------------------------------------------------------------------------------- EnvPool


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_envpool_cannot_restore_and_says_so(small, capsys):
    pytest.importorskip("envpool")
    run = train(replace(small, env_id="CartPole-v1", vec="envpool", checkpoint_every=512))
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    train(parse(["--resume", str(run)]))
    assert "could not be restored exactly" in capsys.readouterr().out
    state = load(run / "checkpoint.pt")["buffer"]
    *_, terminated, between = state["rings"]
    held = between.long()
    assert len(terminated) == 1024
    assert (held[512:516, 0] == held[508:512, 1].max() + 1 + torch.arange(4)).all()  # no return goes on across it
