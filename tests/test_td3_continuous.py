"""TD3's mathematics against independent computations, and how its parts are wired."""

import copy
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import td3_continuous as td3
from td3_continuous import Args, ReplayBuffer, Rings, load_policy, train
from tests.envs import Fates
from tests.marks import needs_compiler
from tests.test_promises import load, rows
from tests.test_sac_continuous import assert_a_run_without_its_buffer_fills_a_new_one_first
from tools import family

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


def agent_of(args: Args = SMALL, observation: int = 3, action: int = 2, low=-1.0, high=1.0) -> td3.Agent:
    bounds = (np.broadcast_to(np.float32(bound), action) for bound in (low, high))
    return td3.Agent(args, (observation,), *map(np.array, bounds)).requires_grad_(False)


def learners_of(agent: td3.Agent, rate: float) -> td3.Learners:
    learners = td3.Learners.of(agent, "cpu")
    for learner in learners[:2]:
        learner.learning_rate.fill_(rate)
    return learners


def random_rings(rows: int = 32) -> Rings:
    """Whose transitions share no observations; half of each ring is empty."""
    between = torch.randperm(2 * rows).view(rows, 2).int()
    done = torch.rand(rows, 2) * 2 - 1, torch.randn(rows), torch.rand(rows) < 0.3, between
    return Rings(torch.randn(2 * rows, 3), *(torch.cat((ring, torch.zeros_like(ring))) for ring in done))


def test_what_is_not_of_the_algorithm_is_sacs():
    """Whose tests hold the replay buffer."""
    sac, own = (Path(td3.__file__).with_name(f"{name}_continuous.py").read_text() for name in ("sac", "td3"))
    different = {"Args", "RANGES", "MEASURES", "Agent", "Learners", "Policy"}
    different |= {"update", "improve", "train", "compile_update", "capture_updates"}
    assert set(family.differences(sac, own, set())) == different
    assert not set(family.differences(sac, own, different - {"Policy"} | {"Policy._choose", "Policy.value"}))


# ------------------------------------------------------------------------------------------------------ mathematics


def test_networks_side_by_side_are_separate_networks_and_the_first_can_be_asked_alone():
    networks, inputs = td3.Networks(2, (5, 8, 7, 1)).requires_grad_(False), torch.randn(4, 5)
    first = {name: both[:1] for name, both in networks.named_parameters()}
    for n, outputs in enumerate(networks(inputs)):
        torch.testing.assert_close(outputs, linear(networks, n)(inputs).detach())
    torch.testing.assert_close(torch.func.functional_call(networks, first, inputs), networks(inputs)[:1])


def linear(networks: td3.Networks, n: int) -> torch.nn.Sequential:
    """One of the networks, of torch's own layers."""
    layers = []
    for weight, bias in zip(networks.weights, networks.biases, strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[2])
        layer.weight.data, layer.bias.data = weight[n].T.clone(), bias[n, 0].clone()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def decisive(agent: td3.Agent) -> td3.Agent:
    """Whose actions are often near the bounds."""
    agent.actor.weights[-1].mul_(8)
    return agent


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_updates_equal_the_papers(frequency):
    """Against a plain implementation with torch's modules and optimisers."""
    torch.manual_seed(0)
    args = Args(actor_sizes=(16,), critic_sizes=(16, 16), tau=0.1, policy_noise=0.5, noise_clip=0.3, precision="fp32")
    agent = decisive(agent_of(args))
    actor, critics = linear(agent.actor, 0), [linear(agent.critics, n) for n in (0, 1)]
    target_actor, targets = copy.deepcopy(actor), copy.deepcopy(critics)
    learners = learners_of(agent, 2e-3)
    actor_adam = torch.optim.Adam(actor.parameters(), lr=2e-3)
    critic_adam = torch.optim.Adam([*critics[0].parameters(), *critics[1].parameters()], lr=2e-3)
    at_the_bounds = 0

    for number in range(1, 7):
        rings, noise, scale = random_rings(), torch.randn(32, 2), torch.ones(2, 3)
        slots, delayed = torch.randint(32, (32,)), number % frequency == 0
        batch = td3.gather(args, rings, scale, slots)
        measured = td3.update(agent, args, learners, rings, scale, slots, noise, delayed)
        measures = dict(zip(td3.MEASURES, measured, strict=True))

        with torch.no_grad():
            smoothing = torch.maximum(torch.minimum(0.5 * noise, torch.tensor(0.3)), torch.tensor(-0.3))
            actions = torch.tanh(target_actor(batch.next_observations)) + smoothing
            at_the_bounds += (actions.abs() > 1).sum()
            inputs = torch.cat((batch.next_observations, actions.clip(-1, 1)), 1)
            following = torch.min(targets[0](inputs), targets[1](inputs))[:, 0]
            goals = torch.where(batch.terminated, batch.rewards, batch.rewards + 0.99 * following)
        values = [critic(torch.cat((batch.observations, batch.actions), 1))[:, 0] for critic in critics]
        loss = sum(torch.nn.functional.mse_loss(value, goals) for value in values)
        torch.testing.assert_close(measures["qf_loss"], loss.detach() / 2)
        for n in (0, 1):
            torch.testing.assert_close(measures[f"qf{n + 1}_values"], values[n].mean().detach())
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        loss = -critics[0](torch.cat((batch.observations, torch.tanh(actor(batch.observations))), 1)).mean()
        if not delayed:
            assert measures["actor_loss"].isnan()
            continue
        torch.testing.assert_close(measures["actor_loss"], loss.detach())
        actor_adam.zero_grad()
        loss.backward()
        actor_adam.step()
        for slow_network, network in zip((target_actor, *targets), (actor, *critics), strict=True):
            for slow, fast in zip(slow_network.parameters(), network.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data

    assert at_the_bounds > 20
    close, observations, inputs = {"atol": 2e-5, "rtol": 1e-4}, torch.randn(10, 3), torch.randn(10, 5)
    for network, plain, these in ((agent.actor, [actor], observations), (agent.critics, critics, inputs)):
        for outputs, other in zip(network(these), plain, strict=True):
            torch.testing.assert_close(outputs, other(these).detach(), **close)
    agent.actor.load_state_dict(td3.parameters_of(agent.actor, learners.target_actor))
    agent.critics.load_state_dict(td3.parameters_of(agent.critics, learners.target_critics))
    for network, plain, these in ((agent.actor, [target_actor], observations), (agent.critics, targets, inputs)):
        for outputs, other in zip(network(these), plain, strict=True):
            torch.testing.assert_close(outputs, other(these).detach(), **close)


def test_actor_and_targets_are_delayed():
    torch.manual_seed(0)
    agent = agent_of()
    learners = learners_of(agent, 1e-3)
    late = [*learners.actor[:5], learners.target_actor, learners.target_critics]
    for delayed in (False, False, True):
        before, critics = [tensor.clone() for tensor in late], learners.critics.theta.clone()
        data = random_rings(), torch.ones(2, 3), torch.arange(32), torch.randn(32, 2)
        td3.update(agent, SMALL, learners, *data, delayed)
        assert not torch.equal(critics, learners.critics.theta)
        assert [not torch.equal(*pair) for pair in zip(before, late, strict=True)] == [delayed] * 7


def test_the_actor_minds_the_first_critic_only():
    torch.manual_seed(0)
    agent, results = agent_of(), []
    data = random_rings(), torch.ones(2, 3), torch.arange(32), torch.randn(32, 2), True
    for n in (None, 0, 1):
        learners = copy.deepcopy(learners_of(agent, 0.0))  # critics stay as they are
        if n is not None:
            td3.parameters_of(agent.critics, learners.critics.theta)["weights.0"][n] *= 2
        td3.update(agent, SMALL, learners, *data)
        results.append(learners.actor.first_moment)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_an_end_is_worth_its_reward_and_a_cut_what_follows():
    """Fates' episodes are ended, cut, or both at once: where they are only cut, the target goes on."""
    torch.manual_seed(0)
    played = Played()
    over = np.flatnonzero(played.over)
    assert {*zip(played.terminates[over], played.cut[over], strict=True)} == {(1, 0), (0, 1), (1, 1)}
    agent, zeros = played.agent, torch.zeros(len(over), 2)
    learners = learners_of(agent, 0.0)
    learners.target_critics.zero_()
    td3.parameters_of(agent.critics, learners.target_critics)["biases.2"].fill_(1000)  # what everything is worth
    learners.critics.theta.zero_()
    for slot in over:
        slots = torch.full((len(over),), slot)
        loss, *_ = td3.update(agent, SMALL, learners, played.buffer.rings, STILL, slots, zeros, False)
        goal = played.batch.rewards[slot] + 0.99 * 1000 * (not played.terminates[slot])
        assert loss.item() == pytest.approx(goal**2, rel=1e-4)


@needs_compiler
@pytest.mark.parametrize(("frequency", "kinds"), [(1, {True}), (2, {False, True}), (65536, {False, True})])
def test_every_kind_of_update_is_compiled(monkeypatch, frequency, kinds):
    calls, args = [], replace(SMALL, policy_frequency=frequency)
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *arguments: calls.append(arguments[-1]))
    agent, run = agent_of(args), SimpleNamespace(say=lambda text: None)
    td3.compile_update(args, agent, learners_of(agent, 0), SimpleNamespace(rings=random_rings()), run)
    assert sorted(calls) == sorted(kinds)


def test_an_update_in_bfloat16_is_nearly_that_in_float32():
    torch.manual_seed(0)
    agent, results = agent_of(), []
    learners = learners_of(agent, 1e-3)
    data = random_rings(), torch.ones(2, 3), torch.arange(32), torch.randn(32, 2), True
    for precision in ("fp32", "bf16"):
        results.append(copy.deepcopy(learners))
        td3.update(agent, replace(SMALL, precision=precision), results[-1], *data)
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(one.first_moment, other.first_moment, atol=1e-3, rtol=0.05)
        assert not torch.equal(one.first_moment, other.first_moment)


# ---------------------------------------------------------------------------------------------- from steps to updates

FATES = replace(SMALL, env_id="tests.envs:Fates-v0", learning_starts=160, norm_obs=True)
STILL = torch.tensor([[0.0, 0.0], [1.0, 1.0]])


class Played:
    """320 steps of Fates, the first half of them random, of which everything can be told from what was seen."""

    def __init__(self, args: Args = FATES):
        torch.manual_seed(0)
        self.args, self.agent = args, agent_of(args, 2, 2, [-1, 0], [1, 4])
        watch, act = td3.Stopwatch(dict.fromkeys(td3.SECONDS, 0.0)), td3.in_numpy(self.agent.actor)
        with closing(td3.Environments(args)) as envs:
            space = gym.spaces.Box(-1, 1, (2,))
            self.buffer = ReplayBuffer(Rings.of(args.buffer_size, envs.observations, space, "cpu"), args.num_envs)
            self.buffer.begin(envs.observations)
            self.episodes, self.scales = [], []
            for step in range(0, 320, 4):
                self.scales.append(self.agent.moments.normaliser())
                self.episodes += td3.collect(args, self.agent, act, self.buffer, envs, step, watch)
        assert len(self.buffer) == 320
        columns = td3.gather(replace(args, norm_obs=False), self.buffer.rings, STILL, torch.arange(320))
        self.batch = td3.Transitions(*(column.numpy() for column in columns))
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
    running = ~over.reshape(80, 4)[:-1]
    following = batch.observations.reshape(80, 4, 2)[1:]
    assert np.array_equal(following[running], batch.next_observations.reshape(80, 4, 2)[:-1][running])
    assert (following[~running][:, 1] == 0).all()  # a new episode begins where one has ended
    actions = played.agent.for_environment(batch.actions)
    np.testing.assert_allclose(batch.rewards, actions.sum(-1) + played.seed / 100 + played.t + 1, rtol=1e-5)


def test_every_finished_episode_has_a_row(played):
    rewards, over = (column.reshape(80, 4) for column in (played.batch.rewards, played.over))
    total, expected = np.zeros(4), []
    for t in range(80):
        total += rewards[t]
        expected += [((t + 1) * 4, played.length.reshape(80, 4)[t, n], total[n]) for n in np.flatnonzero(over[t])]
        total[over[t]] = 0
    assert [(row["step"], row["length"]) for row in played.episodes] == [row[:2] for row in expected]
    assert [row["return"] for row in played.episodes] == pytest.approx([row[2] for row in expected], rel=1e-5)


def test_the_moments_are_of_all_that_was_seen_but_the_first(played):
    observations = played.buffer.rings.observations[4 : played.buffer.seen].double()
    torch.testing.assert_close(played.agent.moments.mean, observations.mean(0))
    torch.testing.assert_close(played.agent.moments.var, observations.var(0, correction=0))


def means_of(played: Played) -> np.ndarray:
    """The policy's own actions in the second half."""
    observations = played.batch.observations[160:].reshape(40, 4, 2)
    inputs = [scale(rows) for scale, rows in zip(played.scales[40:], observations, strict=True)]
    return played.agent.actor(torch.tensor(np.concatenate(inputs)))[0].tanh().numpy()


def test_actions_are_random_until_learning_starts_and_then_the_policys_with_noise(played):
    random, done = played.batch.actions[:160], played.batch.actions[160:]
    counts, _ = np.histogram(random, bins=4, range=(-1, 1))
    assert np.abs(counts - 80).max() < 30
    noise = done - means_of(played)
    assert noise.std(0) == pytest.approx(0.1 * np.ones(2), rel=0.15) and np.abs(noise.mean(0)).max() < 0.03
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.25


def test_exploration_noise_is_clipped_to_the_box():
    """Both in the environment, which refuses what is outside, and in the buffer."""
    played = Played(replace(FATES, exploration_noise=2.0))
    actions, means = played.batch.actions[160:], means_of(played)
    assert np.abs(actions).max() == 1 and 0.5 < (np.abs(actions) == 1).mean() < 0.8
    assert (np.abs(actions - means) > 0.3).mean() > 0.5
    quiet = Played(replace(FATES, exploration_noise=0.0))
    np.testing.assert_allclose(quiet.batch.actions[160:], means_of(quiet), atol=1e-6)


def test_the_policy_acts_from_the_step_on_at_which_learning_starts():
    args = replace(FATES, learning_starts=8, exploration_noise=0.0)
    watch = td3.Stopwatch(dict.fromkeys(td3.SECONDS, 0.0))
    with closing(td3.Environments(args)) as envs:
        buffer = ReplayBuffer(Rings.of(100, envs.observations, gym.spaces.Box(-1, 1, (2,)), "cpu"), 4)
        buffer.begin(envs.observations)
        agent = agent_of(args, 2, 2, [-1, 0], [1, 4])
        for step in (0, 4, 8, 12):
            td3.collect(args, agent, lambda inputs: np.zeros((4, 2), np.float32), buffer, envs, step, watch)
    assert (buffer.rings.actions[:8] != 0).all() and (buffer.rings.actions[8:16] == 0).all()


def test_what_is_not_finite_is_not_kept():
    args = replace(SMALL, env_kwargs='{"breaks": 3}')
    bound, watch = np.ones((2, 2), np.float32), td3.Stopwatch(dict.fromkeys(td3.SECONDS, 0.0))
    agent = td3.Agent(args, (2, 2), -bound, 2 * bound).requires_grad_(False)
    with closing(td3.Environments(args)) as envs:
        buffer = ReplayBuffer(Rings.of(100, envs.observations, gym.spaces.Box(-1, 1, (4,)), "cpu"), 4)
        buffer.begin(envs.observations)
        for step in (0, 4):
            td3.collect(args, agent, td3.in_numpy(agent.actor), buffer, envs, step, watch)
        with pytest.raises(FloatingPointError, match="step 12"):
            td3.collect(args, agent, td3.in_numpy(agent.actor), buffer, envs, 8, watch)
    assert len(buffer) == 8


def improve(played: Played, args: Args, step: int, updates: int = 0, learn_from: int = 160) -> tuple[list, list]:
    calls, progress = [], {"updates": updates, "learn_from": learn_from}
    learners = learners_of(played.agent, 0)

    def update(agent, args, learners, *data):
        calls.append((*data, [learner.learning_rate.item() for learner in learners[:2]]))
        return len(calls)

    optimise = partial(update, played.agent, args, learners, played.buffer.rings)
    measured = td3.improve(args, played.agent, learners, played.buffer, step, progress, optimise)
    assert measured == list(range(1, len(calls) + 1)) and progress["updates"] == updates + len(calls)
    return calls, [learner.learning_rate.item() for learner in learners[:2]]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1.0, 1.6])
def test_updates_count_environment_steps(played, ratio):
    args = replace(FATES, updates_per_step=ratio)
    counts = [len(improve(played, args, step)[0]) for step in range(4, 404, 4)]
    assert not any(counts[:40]) and sum(counts) == pytest.approx((400 - 160) * ratio, abs=1)
    assert max(counts) - min(counts[40:]) <= 1


def test_an_update_has_indices_and_noise_of_its_own_and_every_so_manieth_is_whole(played):
    args = replace(FATES, updates_per_step=2.0, policy_frequency=3)
    calls, _ = improve(played, args, 200, updates=10)
    assert [call[4] for call in calls] == [number in (12, 15, 18) for number in range(11, 19)]
    slots, noise = (torch.stack([call[i] for call in calls]) for i in (2, 3))
    assert slots.shape == (8, 32) and noise.shape == (8, 32, 2) and noise.std() == pytest.approx(1, abs=0.1)
    assert len(slots.unique()) > 100 and len(noise.unique()) > 0.99 * noise.numel()
    mean, deviation = calls[0][1]
    torch.testing.assert_close(mean, played.agent.moments.mean.float())
    np.testing.assert_allclose(deviation, played.agent.moments.deviation(), rtol=1e-6)
    assert calls[0][0] is played.buffer.rings


def test_the_rate_follows_the_schedule(played):
    args = replace(FATES, lr_schedule="linear", learning_rate=4e-3)
    for step, factor in ((4, 1), (204, 1 - 50 / 256), (1024, 1 / 256)):
        calls, rates = improve(played, args, step)
        np.testing.assert_allclose(rates, [4e-3 * factor] * 2, rtol=1e-5)
        assert all(call[-1] == rates for call in calls) and (calls or step == 4)


# ------------------------------------------------------------------------------------------------------------- train


def test_rows_come_every_thousand_steps_and_at_evaluations_and_checkpoints(small):
    run = train(replace(small, num_evals=3, total_timesteps=4400, checkpoint_every=1300, updates_per_step=0.01))
    steps = [int(row["step"]) for row in rows(run, "progress")]
    assert steps == [1000, 1300, 1468, 2000, 2600, 2936, 3000, 3900, 4000, 4400]
    assert sorted({int(row["step"]) for row in rows(run, "evaluations")}) == [1468, 2936, 4400]


def test_a_row_is_of_the_updates_since_the_last(small, monkeypatch):
    """And of none, where nothing was learnt; what only some updates measure is their mean."""
    numbers = iter(range(10**6))

    def update(*arguments):
        number = float(next(numbers))
        return torch.tensor([number, number, number, number if arguments[-1] else torch.nan])

    monkeypatch.setattr(td3, "update", update)
    args = replace(small, lr_schedule="linear", learning_starts=256, checkpoint_every=256, total_timesteps=768)
    table = rows(train(args), "progress")
    rates = [small.learning_rate * (1 - (step - 4) / 768) for step in (256, 512, 768)]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(rates)
    assert [row["qf_loss"] for row in table] == ["nan", "31.5", "95.5"]
    assert [row["actor_loss"] for row in table] == ["nan", "32.0", "96.0"]
    assert [row["updates"] for row in table] == ["0", "64", "128"]
    assert [row["buffer"] for row in table] == ["256", "512", "768"]


@pytest.mark.parametrize("norm_obs", [False, True])
def test_learns_to_mirror(small, norm_obs):
    settings = {"total_timesteps": 3000, "learning_rate": 3e-3, "gamma": 0.0, "buffer_size": 4000, "num_evals": 1}
    run = train(replace(small, **settings, norm_obs=norm_obs, eval_episodes=5))
    assert np.mean([float(row["return"]) for row in rows(run, "evaluations")]) > -1  # a random policy's is -11


def test_bytes_stay_bytes_until_they_are_used(small):
    run = train(replace(small, env_id="tests.envs:Filmed-v0", buffer_size=300, total_timesteps=256))
    assert load(run / "checkpoint.pt")["buffer"]["rings"][0].dtype == torch.uint8


def test_without_compiling_it_runs_the_update_and_with_it_what_was_compiled(small, monkeypatch):
    calls, update = [], td3.update
    compiled = lambda *arguments: (calls.append(1), update(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(td3, "compile_update", lambda *_: compiled)
    args = replace(small, total_timesteps=256)
    train(args)
    assert not calls
    train(replace(args, compile=True))
    assert len(calls) == (256 - 128) // 4


def test_a_run_without_its_buffer_fills_a_new_one_first(small, monkeypatch, capsys):
    assert_a_run_without_its_buffer_fills_a_new_one_first(td3, small, monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------------------ policy


def agent_with_moments() -> td3.Agent:
    torch.manual_seed(0)
    agent = agent_of(replace(SMALL, norm_obs=True), low=[-2, 0], high=[2, 1])
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 3)))
    return agent


def test_a_policy_acts_without_noise_and_samples_with_that_of_training():
    agent, observation = agent_with_moments(), np.array([1.0, 2.0, -3.0])
    policy = td3.Policy(SMALL, agent)
    mean = agent.actor(torch.tensor(agent.moments.normaliser()(observation[None])))[0, 0].tanh().numpy()
    np.testing.assert_allclose(policy(observation), mean * [2, 0.5] + [0, 0.5], rtol=1e-4)
    samples = (policy(np.tile(observation, (4000, 1)), sample=True) - [0, 0.5]) / [2, 0.5]
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.01)
    np.testing.assert_allclose(samples.std(0), 0.1, rtol=0.05)
    agent.exploration_noise = 5.0
    wild = policy(np.tile(observation, (100, 1)), sample=True)
    assert wild.min(0).tolist() == [-2, 0] and wild.max(0).tolist() == [2, 1]


def test_a_value_is_the_lower_of_the_critics_of_the_policys_action():
    agent = agent_with_moments()
    policy, observations = td3.Policy(SMALL, agent), np.random.default_rng(1).normal(size=(20, 3))
    inputs = torch.tensor(agent.moments.normaliser()(observations))
    actions = torch.tensor((policy(observations) - [0, 0.5]) / [2, 0.5], dtype=torch.float32)
    both = agent.critics(torch.cat((inputs, actions), -1)).squeeze(-1)
    agent.critics.biases[-1][0] -= (both[0] - both[1]).median()  # so that each is the lower of some
    both = agent.critics(torch.cat((inputs, actions), -1)).squeeze(-1)
    assert set(both.argmin(0).tolist()) == {0, 1}
    np.testing.assert_allclose(policy.value(observations), both.amin(0), rtol=1e-4, atol=1e-6)
    assert policy.discount == SMALL.gamma and policy.bootstraps == ("truncated",)


def test_a_loaded_policy_is_the_one_that_was_trained(small, monkeypatch):
    kept, evaluate = [], td3.evaluate

    def keep(args, run, agent, step, progress):
        observations = np.random.default_rng(step).normal(size=(50, 2, 2))
        kept.append((step, observations, td3.Policy(args, agent)(observations)))
        evaluate(args, run, agent, step, progress)

    monkeypatch.setattr(td3, "evaluate", keep)
    run = train(replace(small, num_evals=2, learning_rate=0.01))
    for step, observations, actions in kept:
        assert np.array_equal(load_policy(run / "policies" / f"step-{step:09d}.pt")(observations), actions)
    assert np.array_equal(load_policy(str(run / "checkpoint.pt"))(observations), actions)
