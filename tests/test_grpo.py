"""GRPO: distributions, advantages, loss and scheduler against independent computations, and how they are wired."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

import grpo
from grpo import Args, train
from tests.envs import Luck
from tests.test_promises import rows
from tools import family

ROOT = Path(grpo.__file__).parent
CONFIGS = ROOT / "configs" / "grpo"
SMALL = Args(
    env_id="tests.envs:Luck-v0",
    num_envs=4,
    num_groups=3,
    group_size=4,
    max_episode_steps=40,
    total_timesteps=1000,
    minibatch_size=32,
    update_epochs=2,
    num_evals=0,
    eval_episodes=2,
    actor_sizes=(16,),
    compile=False,
)
PENDULUM = {"env_id": "Pendulum-v1", "max_episode_steps": 20}
MIRROR = {"env_id": "tests.envs:Mirror-v0", "max_episode_steps": 10}


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def agent_of(args: Args = SMALL, low: object = 0, high: object = 3, observation: int = 3) -> grpo.Agent:
    """Of whole bounds, and so of Discrete actions, or others."""
    return grpo.Agent(args, (observation,), np.array(low), np.array(high)).requires_grad_(False)


def box(*bounds: float) -> list[np.ndarray]:
    return [np.full(2, bound, np.float32) for bound in bounds]


# --------------------------------------------------------------------------------------------------- distributions

FAMILIES = {
    grpo.Categorical: lambda outputs: torch.distributions.Categorical(logits=outputs),
    grpo.Normal: lambda outputs: torch.distributions.Normal((parts := outputs.chunk(2, -1))[0], parts[1].exp()),
    grpo.Beta: lambda outputs: torch.distributions.Beta(*(1 + torch.nn.functional.softplus(outputs)).chunk(2, -1)),
}


def total(values: torch.Tensor) -> torch.Tensor:
    return values if values.dim() == 1 else values.sum(-1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_distributions_are_torchs(kind):
    torch.manual_seed(0)
    outputs, others = torch.randn(2, 50, 4, dtype=torch.float64)
    policy, torchs, other = kind(outputs), FAMILIES[kind](outputs), FAMILIES[kind](others)
    actions = torch.tensor(kind.sample(outputs.numpy()))
    torch.testing.assert_close(policy.log_prob(actions), total(torchs.log_prob(actions)))
    torch.testing.assert_close(policy.entropy(), total(torchs.entropy()))
    torch.testing.assert_close(policy.kl(kind(others)), total(torch.distributions.kl_divergence(torchs, other)))


def test_what_normalises_a_beta_is_exact_for_large_parameters_too():
    alpha, beta = (torch.logspace(0, 4, 300, dtype=torch.float64)[torch.randperm(300)] for _ in range(2))
    expected = alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
    torch.testing.assert_close(grpo.log_beta(alpha, beta), expected, atol=1e-6, rtol=0)
    found = grpo.log_beta(alpha.float(), beta.float()).double()
    assert ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-5).all()


def test_log_beta_is_that_of_ppo_beta():
    ours, theirs = ((ROOT / name).read_text() for name in ("grpo.py", "ppo_beta.py"))
    for name in ("stirling", "log_beta"):
        assert family.lines(ours, family.blocks(ours, set())[name]) == family.lines(
            theirs, family.blocks(theirs, set())[name]
        )


@pytest.mark.parametrize("kind", FAMILIES)
def test_samples_follow_the_distribution(kind):
    torch.manual_seed(0)
    outputs = torch.randn(1, 4)
    samples = torch.tensor(kind.sample(outputs.expand(40_000, 4).numpy()))
    if kind is grpo.Categorical:
        torch.testing.assert_close(samples.bincount() / 40_000, outputs.softmax(-1)[0], atol=0.01, rtol=0)
        assert kind.best(outputs.numpy()) == outputs.argmax()
    else:
        torchs = FAMILIES[kind](outputs)
        torch.testing.assert_close(torch.tensor(kind.best(outputs.numpy())), torchs.mean)
        torch.testing.assert_close(samples.mean(0), torchs.mean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(samples.std(0), torchs.stddev[0], atol=0.03, rtol=0)


def test_a_sharp_beta_draws_nothing_whose_density_is_no_number():
    torch.manual_seed(0)
    outputs = np.tile(np.float32([[1e6, -20], [-20, 1e6]]), (2000, 1))
    samples = grpo.Beta.sample(outputs)
    assert samples.min() > 0 and samples.max() < 1
    assert grpo.Beta(torch.tensor(outputs)).log_prob(torch.tensor(samples)).isfinite().all()


def test_the_first_policy_is_nearly_the_same_everywhere():
    torch.manual_seed(0)
    agent = agent_of(SMALL, *box(-1, 1), observation=64)
    assert agent.actor(torch.randn(100, 64)).abs().max() < 0.1


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_mean_of_k3_is_the_closed_divergence(kind):
    torch.manual_seed(0)
    outputs, others = 0.1 * torch.randn(2, 1, 4)  # far apart, the estimate's variance is infinite
    agent = torch.nn.Module()
    agent.kind, agent.forward = kind, lambda _: outputs.expand(100_000, 4)
    policy, zeros, losses = kind(agent.forward(None)), torch.zeros(100_000), {}
    actions = torch.tensor(kind.sample(agent.forward(None).numpy()))
    batch = grpo.Batch(zeros, actions, policy.log_prob(actions), zeros, zeros + 1, others.expand(100_000, 4))
    for estimator in ("closed", "k3"):
        args = replace(SMALL, kl_coef=1.0, kl_estimator=estimator)
        losses[estimator] = grpo.grpo_loss({}, agent, args, batch, torch.tensor(1.0))[0].item()
    assert losses["closed"] == pytest.approx(kind(outputs).kl(kind(others)).item(), rel=1e-4)
    assert losses["k3"] == pytest.approx(losses["closed"], rel=0.05)


def test_actions_cover_uneven_bounds_and_choices_begin_where_the_space_does():
    normal = agent_of(SMALL, [-1, 70, -np.inf], [3, 130, 1])
    actions = normal.for_environment(np.float32([[0, 0, 0], [1, -1, 0.5], [2, -9, 9]]))
    assert actions.tolist() == [[1, 100, 0], [3, 70, 0.5], [3, 70, 1]]
    beta = agent_of(replace(SMALL, distribution="beta"), np.float32([[-1, 0]]), np.float32([[3, 0.5]]))
    actions = beta.for_environment(np.float32([[0, 1], [0.5, 0.5]]))
    assert actions.tolist() == [[[-1, 0.5]], [[1, 0.25]]] and actions.dtype == np.float32
    assert agent_of(low=-1, high=1).for_environment(np.array([0, 2])).tolist() == [-1, 1]


@pytest.mark.parametrize("distribution", ["normal", "beta"])
@pytest.mark.parametrize("bounds", [(0, 3), box(-1, 1)])
def test_acting_is_what_the_networks_do_until_they_are_asked_again(distribution, bounds):
    agent, observations = agent_of(replace(SMALL, distribution=distribution), *bounds), torch.randn(5, 3)
    act, before = agent.acting(), agent(observations)
    np.testing.assert_allclose(act(observations.numpy()), before, atol=1e-6)
    for parameter in agent.parameters():
        parameter += 1
    np.testing.assert_allclose(act(observations.numpy()), before, atol=1e-6)
    np.testing.assert_allclose(agent.acting()(observations.numpy()), agent(observations), atol=1e-5)


@pytest.mark.parametrize("distribution", ["normal", "beta"])
@pytest.mark.parametrize("shape", [(), (2,), (1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loaded_policy_acts_in_the_environments_own_space(tmp_path, dtype, shape, distribution):
    """0.3 of 32 bits is more than 0.3 of 64."""
    space = gym.spaces.Box(0.1, 0.3, shape, dtype)
    args = replace(SMALL, distribution=distribution)
    agent = grpo.Agent(args, (3,), space.low, space.high).requires_grad_(False)
    agent.actor[-1].bias[: space.low.size] += 30  # the highest mean, the largest alpha
    torch.save({"script": "grpo", "args": vars(args), "agent": agent.state_dict()}, tmp_path / "policy.pt")
    actions = grpo.load_policy(tmp_path / "policy.pt")(np.zeros((4, 3)))
    assert actions.dtype == dtype and actions.shape == (4, *shape)
    assert all(np.asarray(action) in space for action in actions)
    np.testing.assert_allclose(actions, 0.3, atol=0.02)


# ------------------------------------------------------------------------------------------------------- advantages

P, G, T = 3, 5, 12


def random_rewards(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of episodes of different lengths, and which of the steps were made."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, T + 1, (P, G))
    lengths[0, 0] = T
    alive = np.arange(T) < lengths[..., None]
    return np.where(alive, generator.normal(1, 2, (P, G, T)), 0), alive


def zscore(value: float, own: list, others: list) -> float:
    """The distance from the mean of `others`, in deviations of `own`."""
    deviation = np.std(own)
    return (value - (np.mean(others) if others else 0)) / deviation if deviation > 1e-9 else 0.0


def plain_advantages(args: Args, rewards: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The same, episode by episode and step by step."""
    loo = args.baseline == "loo"
    episodes = [[rewards[p, g, : alive[p, g].sum()].tolist() for g in range(G)] for p in range(P)]
    result = np.zeros((P, G, T))
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            peers = [other for h, other in enumerate(group) if h != g or not loo]

            def discounted(values, t):
                return sum(value * args.gamma**s for s, value in enumerate(values[t:]))

            outcome = sum(episode) - np.mean([sum(peer) for peer in peers])
            process = []
            for t, reward in enumerate(episode):
                if args.process_norm == "group":
                    every, compared = sum(group, []), sum(peers, [])
                else:
                    every, compared = ([one[t] for one in these if len(one) > t] for these in (group, peers))
                process.append(zscore(reward, every, compared))
            for t in range(len(episode)):
                to_come = discounted(episode, t) - np.mean([discounted(peer, t) for peer in peers])
                step = discounted(process, t)
                a = outcome / np.std([sum(one) for one in group])
                both = 1 if a > 0 and step > 0 else -1
                both *= min(abs(a) ** args.hybrid_alpha * abs(step) ** args.hybrid_beta, args.hybrid_clip)
                result[p, g, t] = {"outcome": outcome, "process": step, "hybrid": both, "rtg": to_come}[args.advantage]
    if args.advantage_norm == "none":
        return result
    for part in [slice(None)] if args.advantage_norm == "batch" else range(P):
        made = alive[part].copy()
        if args.advantage == "outcome":
            made[..., 1:] = False  # an outcome counts once, however long it took
        chosen = result[part][made]
        result[part] = np.where(alive[part], (result[part] - chosen.mean()) / chosen.std(), 0)
    return result


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("advantage", ["outcome", "process", "hybrid", "rtg"])
def test_advantages_equal_a_plain_computation(advantage, baseline, norm):
    for process_norm in ("timestep", "group"):
        args = replace(SMALL, advantage=advantage, baseline=baseline, advantage_norm=norm, process_norm=process_norm)
        args = replace(args, gamma=0.9, hybrid_clip=1.0)
        rewards, alive = random_rewards()
        bare, advantages = grpo.group_advantages(args, rewards, alive)
        np.testing.assert_allclose(advantages, plain_advantages(args, rewards, alive), atol=1e-9)
        np.testing.assert_allclose(bare, plain_advantages(replace(args, advantage_norm="none"), rewards, alive))
        again = grpo.group_advantages(args, np.where(alive, rewards, np.nan), alive)
        np.testing.assert_array_equal((bare, advantages), again)


def test_the_group_relative_outcome_of_the_paper():
    """(R - mean R) / std R of the group, on every step."""
    rewards, alive = random_rewards()
    returns = rewards.sum(-1)
    expected = (returns - returns.mean(1, keepdims=True)) / returns.std(1, keepdims=True)
    args = replace(SMALL, advantage="outcome", advantage_norm="group")
    _, advantages = grpo.group_advantages(args, rewards, alive)
    np.testing.assert_allclose(advantages, np.where(alive, expected[..., None], 0))


def test_an_outcome_does_not_care_when_it_is_paid():
    rewards, alive = random_rewards()
    last = alive & ~np.concatenate((alive[..., 1:], np.zeros((P, G, 1), bool)), -1)
    delayed = np.where(last, rewards.sum(-1, keepdims=True), 0)
    for advantage, changes in (("outcome", False), ("rtg", True), ("process", True)):
        args = replace(SMALL, advantage=advantage)
        dense, late = (grpo.group_advantages(args, paid, alive)[1] for paid in (rewards, delayed))
        assert np.allclose(dense, late) is not changes


def test_the_hybrids_signs():
    outcome, step = np.array([2.0, 2.0, -2.0, -2.0, 0.0, 2.0]), np.array([3.0, -3.0, 3.0, -3.0, 3.0, 0.0])
    args = replace(SMALL, hybrid_alpha=1.0, hybrid_beta=2.0, hybrid_clip=10.0)
    assert grpo.combine(args, outcome, step).tolist() == [10, -10, -10, -10, 0, 0]
    assert grpo.combine(replace(args, hybrid_clip=100.0), outcome, step).tolist() == [18, -18, -18, -18, 0, 0]


def test_rewards_whose_sum_cancels_leave_nothing_to_go():
    """Two members whose normalised rewards are 1 and -1 by turns: rounding would decide what is positive."""
    random, alive = np.random.default_rng(0), np.ones((500, 2, 4), bool)
    args = replace(SMALL, advantage="process", process_norm="timestep", gamma=1.0, advantage_norm="none")
    advantages, _ = grpo.group_advantages(args, random.normal(size=alive.shape), alive)
    np.testing.assert_array_equal(advantages == 0, np.abs(advantages) < 0.5)  # they are whole numbers
    assert 0.2 < (advantages == 0).mean() < 0.3


@pytest.mark.parametrize("paid", [1.0, -0.3])
def test_a_constant_reward_has_no_process(paid):
    """Nor what rounding makes of one, which normalising would bring to the size of everything else."""
    _, alive = random_rewards()
    rewards = np.where(alive, paid, 0)
    for advantage in ("process", "hybrid"):
        for norm in ("timestep", "group"):
            args = replace(SMALL, advantage=advantage, process_norm=norm)
            assert not np.any(grpo.group_advantages(args, rewards, alive))
    assert np.all([a.any() for a in grpo.group_advantages(SMALL, rewards, alive)])


@pytest.mark.parametrize("paid", [1.0, -0.3])
@pytest.mark.parametrize("members", [4, 5, 8])
def test_what_rounding_makes_of_equal_episodes_is_no_advantage(members, paid):
    """A solved CartPole: normalised, differences of 1e-14 would push the policy about."""
    rewards, alive = np.full((2, members, 300), paid), np.ones((2, members, 300), bool)
    differs = rewards.copy()
    differs[1, 0, 7] += 1
    for advantage in ("outcome", "process", "hybrid", "rtg"):
        for baseline in ("mean", "loo"):
            args = replace(SMALL, advantage=advantage, baseline=baseline)
            assert not np.any(grpo.group_advantages(args, rewards, alive))
            _, advantages = grpo.group_advantages(replace(args, advantage_norm="group"), differs, alive)
            assert advantages[1].any() and not advantages[0].any()


def test_a_mode_that_learns_nothing_is_named(small, capsys):
    args = replace(small, env_id="CartPole-v1")
    train(replace(args, advantage="process"))
    assert capsys.readouterr().out.count("every process advantage is 0") == 1
    train(args)
    assert "advantage is 0" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- loss and update

SPACES = {"discrete": (0, 3), "box": box(-1, 1)}


def example(space: str = "discrete", size: int = 64) -> tuple[grpo.Agent, grpo.Batch]:
    torch.manual_seed(0)
    agent = agent_of(SMALL, *SPACES[space])
    observations, reference = torch.randn(size, 3), 0.5 * torch.randn(size, 4)
    outputs = agent(observations)
    actions = torch.tensor(agent.kind.sample(outputs.numpy()))
    logprobs = agent.kind(outputs).log_prob(actions) + 0.3 * torch.randn(size)
    return agent, grpo.Batch(observations, actions, logprobs, torch.randn(size), torch.rand(size) + 0.5, reference)


@pytest.mark.parametrize("space", SPACES)
def test_loss_equals_the_papers(space):
    agent, batch = example(space)
    args = replace(SMALL, clip_coef=0.1, clip_coef_high=0.3, kl_coef=0.2, ent_coef=0.01)
    loss, (policy_loss, entropy, kl, clipped) = grpo.grpo_loss(
        dict(agent.named_parameters()), agent, args, batch, torch.tensor(0.2)
    )
    policy, reference = FAMILIES[agent.kind](agent(batch.observations)), FAMILIES[agent.kind](batch.reference)
    ratio = (total(policy.log_prob(batch.actions)) - batch.logprobs).exp()
    surrogate = torch.minimum(ratio * batch.advantages, ratio.clamp(0.9, 1.3) * batch.advantages)
    penalty = total(torch.distributions.kl_divergence(policy, reference))
    torch.testing.assert_close(policy_loss, -(batch.weights * surrogate).mean())
    torch.testing.assert_close(entropy, total(policy.entropy()).mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(clipped, ((ratio < 0.9) | (ratio > 1.3)).float().mean())
    rest = batch.weights * (0.2 * penalty - 0.01 * total(policy.entropy()))
    torch.testing.assert_close(loss, policy_loss + rest.mean())


def gradient(agent: grpo.Agent, batch: grpo.Batch, kl_coef: float = 0.3) -> torch.Tensor:
    theta = torch.nn.utils.parameters_to_vector(agent.parameters()).requires_grad_()
    args = replace(SMALL, kl_coef=kl_coef, ent_coef=0.1)
    loss, _ = grpo.grpo_loss(grpo.parameters_of(agent, theta), agent, args, batch, torch.tensor(kl_coef))
    return torch.autograd.grad(loss, theta)[0]


def test_without_a_penalty_a_distant_reference_spoils_no_gradient(monkeypatch):
    """The exponential of its log-ratio is infinite, and 0 times the gradient of that no number."""
    monkeypatch.setitem(globals(), "SMALL", replace(SMALL, kl_estimator="k3"))
    agent, batch = example()
    agent.actor[-1].bias += 200 * torch.arange(len(agent.actor[-1].bias))
    batch = batch._replace(logprobs=agent.kind(agent(batch.observations)).log_prob(batch.actions))
    assert not gradient(agent, batch).isfinite().all()
    assert gradient(agent, batch, kl_coef=0.0).isfinite().all()


def test_what_fills_a_minibatch_cannot_change_a_gradient():
    agent, batch = example()
    bare = grpo.Batch(*(column[:40] for column in batch))
    full = grpo.fill(batch, torch.arange(40), 64)
    assert len(full.weights) == 64 and not full.weights[40:].any()
    torch.testing.assert_close(gradient(agent, full), gradient(agent, bare))
    agent.actor[-1].weight *= 100  # a policy whose entropy varies
    parameters, none = dict(agent.named_parameters()), torch.tensor(0.0)
    measures = [grpo.grpo_loss(parameters, agent, SMALL, each, none)[1] for each in (full, bare)]
    torch.testing.assert_close(*measures)
    before = gradient(agent, full)
    for column in full:
        if column is not full.weights:
            column[40:] = column[40:].flip(0) + 1 if column is not full.actions else 3
    assert torch.equal(gradient(agent, full), before)


def test_minibatches_hold_every_row_once_and_are_alike_in_size():
    agent, batch = example(size=101)
    batch = batch._replace(advantages=torch.arange(101.0))
    parts = list(grpo.minibatches(replace(SMALL, update_epochs=1), batch))
    held = [part.advantages[part.weights > 0] for part in parts]
    assert torch.cat(held).sort().values.tolist() == list(range(101)) and torch.cat(held).tolist() != list(range(101))
    assert [len(part.weights) for part in parts] == [32] * 4 and {len(rows) for rows in held} == {25, 26}


def test_weights():
    lengths = np.array([10, 30, 20])
    per_step = {
        kind: grpo.step_weights(replace(SMALL, loss_weight=kind), lengths) for kind in ("step", "episode", "constant")
    }
    assert per_step["step"].tolist() == [1, 1, 1]
    assert (per_step["episode"] * lengths).tolist() == [20, 20, 20]  # 60 steps in all
    assert per_step["constant"].tolist() == [0.5, 0.5, 0.5]  # 60 of 120 possible steps were made


def test_an_update_stops_at_the_gradient_norm():
    agent, batch = example()
    for limit in (1e-3, 1e3):
        learner = grpo.Learner.of(agent, "cpu")
        measures = grpo.update(agent, replace(SMALL, max_grad_norm=limit), learner, batch, torch.tensor(0.0))
        norm = min(limit, measures[-1].item())
        assert 10 * learner.first_moment.norm() == pytest.approx(norm, rel=1e-3)


def test_the_penalty_adapts_outside_its_dead_band():
    for kl, factor in ((0.0301, 1.5), (0.0299, 1), (0.0134, 1), (0.0133, 1 / 1.5)):
        assert grpo.next_kl_coef(0.3, kl, 0.02) == pytest.approx(0.3 * factor)
    assert grpo.next_kl_coef(99.0, 1.0, 0.02) == 100 and grpo.next_kl_coef(1.1e-4, 0.0, 0.02) == 1e-4


# ----------------------------------------------------------------------------------------- from episodes to batches


class Played:
    """The episodes of an iteration that begins at step 100, their seeds, and how many environments were busy when."""

    def __init__(self, **settings: object):
        self.args, envs, actions = grpo.prepare(replace(SMALL, **settings))
        shape = envs.observations.shape[1:]
        torch.manual_seed(0)
        self.agent = grpo.Agent(self.args, shape, actions.low, actions.high).requires_grad_(False)
        scale = 300 if "Luck" in self.args.env_id else 2
        self.agent.moments.update(np.random.default_rng(0).normal(scale / 2, scale, (50, *shape)))
        small = np.random.default_rng(0).integers(1000, size=(3, 4))  # seeds that an observation can show
        envs.random = SimpleNamespace(integers=lambda _, size: small[:, : size[1]])
        self.seeds = np.broadcast_to(small[:, :1] if self.args.identical_start else small, (3, 4)).ravel()
        self.busy, step = [], envs.step
        envs.step = lambda which, actions: (self.busy.append(len(which)), step(which, actions))[1]
        with closing(envs):
            self.watch = grpo.Stopwatch(dict.fromkeys(grpo.SECONDS, 0.0))
            self.rollout = grpo.collect(self.args, self.agent, envs, 100, self.watch)
        self.episodes, self.times = self.rollout.places


def test_every_episode_is_played_once_and_every_environment_kept_busy():
    before = Luck.made
    played = Played(identical_start=False)
    rollout, busy = played.rollout, played.busy
    lengths = [Luck.length_of(int(seed)) for seed in played.seeds]
    assert rollout.lengths.tolist() == lengths and Luck.made - before == 2 + sum(lengths)  # two to see that it works
    assert len(rollout.observations) == len(rollout.inputs) == len(rollout.actions) == sum(lengths)
    for episode, (length, seed) in enumerate(zip(lengths, played.seeds, strict=True)):
        own = played.episodes == episode
        assert played.times[own].tolist() == list(range(length))
        assert rollout.observations[own].tolist() == [[seed, t] for t in range(length)]  # its own, in order
        assert rollout.rewards[episode, :length].tolist() == rollout.actions[own].tolist()  # what Luck pays
        assert not rollout.rewards[episode, length:].any()

    free, ends = [0] * 4, []  # when each environment is free, if each takes the next episode at once
    for length in lengths:
        ends.append(min(free) + length)
        free[free.index(min(free))] = ends[-1]
    assert len(busy) == max(free)
    assert busy[: min(free)] == [4] * min(free)  # idle only when none waits
    order = sorted(range(12), key=lambda episode: (ends[episode], episode))
    rows = [(row["step"], row["return"], row["length"]) for row in rollout.episodes]
    assert rows == [(100 + sum(busy[: ends[m]]), rollout.rewards[m].sum(), lengths[m]) for m in order]


def test_episodes_are_cut_where_they_shall_be():
    played = Played(max_episode_steps=7)
    assert played.rollout.lengths.tolist() == [min(7, Luck.length_of(int(seed))) for seed in played.seeds]


def test_the_policy_sees_what_the_normaliser_makes_of_observations_and_acts_with_its_own_noise():
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        played = Played(env_id=env_id, max_episode_steps=20)
        agent, rollout = played.agent, played.rollout
        assert agent.moments.count == 50
        assert np.array_equal(rollout.inputs, agent.moments.normaliser()(rollout.observations))
        first = played.times == 0
        starts = rollout.observations[first][np.argsort(played.episodes[first])].reshape(3, 4, -1)
        assert (starts == starts[:, :1]).all() and (starts[0, 0] != starts[1, 0]).any()  # members begin alike
        acts = [tuple(rollout.actions[played.episodes == m].flatten().tolist()) for m in range(12)]
        assert len(set(acts)) == 12  # and go on differently
    noise = (rollout.actions - agent.actor(rollout.inputs)) / agent.log_std.exp()
    assert noise.mean().item() == pytest.approx(0, abs=0.2) and noise.std().item() == pytest.approx(1, abs=0.15)


def test_starts_are_the_groups_own_or_everybodys(small, monkeypatch):
    given, begin = [], grpo.Environments.begin

    def spy(envs: grpo.Environments, which: np.ndarray, seeds: np.ndarray) -> None:
        given.extend(seeds.tolist())
        begin(envs, which, seeds)

    monkeypatch.setattr(grpo.Environments, "begin", spy)
    train(replace(small, total_timesteps=1))
    assert len(given) == 12 and [len(set(given[n : n + 4])) for n in (0, 4, 8)] == [1, 1, 1] and len(set(given)) == 3
    given.clear()
    train(replace(small, total_timesteps=1, identical_start=False))
    assert len(given) == len(set(given)) == 12


@pytest.mark.parametrize("vec", ["sync", "async"])
def test_environments_go_on_with_the_same_starts(vec):
    args = grpo.prepare(replace(SMALL, vec=vec))
    envs = args[1]
    with closing(envs):
        envs.random.integers(9, size=5)
        state = envs.state()
        expected = envs.random.integers(2**31, size=9)
        assert envs.restore(state) and np.array_equal(envs.random.integers(2**31, size=9), expected)


@pytest.mark.parametrize(("env_id", "exact"), [("Luck-v0", True), ("Counts-v0", False)])
def test_an_environment_that_remembers_is_not_said_to_be_restored(env_id, exact):
    args = replace(SMALL, env_id=f"tests.envs:{env_id}")
    with closing(grpo.Environments(args)) as envs:
        for seed in (1, 2):
            envs.begin(np.arange(4), np.full(4, seed))
        state = envs.state()
    with closing(grpo.Environments(args)) as others:
        assert others.restore(state) == exact


def test_ends_may_be_told_in_whole_numbers(small):
    run = train(replace(small, env_id="tests.envs:Kinds-v0", env_kwargs='{"discrete": true}', total_timesteps=1))
    assert {row["length"] for row in rows(run, "episodes")} == {"20"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_rewards_that_cannot_be_squared_stop_the_run(small, capsys):
    with pytest.raises(SystemExit, match="1"):
        train(replace(small, env_id="tests.envs:Kinds-v0", env_kwargs='{"discrete": true, "pays": "much"}'))
    assert "not finite in the iteration" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_observations_that_are_not_finite_are_in_no_checkpoint(small, monkeypatch, capsys):
    """Infinite ones are clipped to ±10 before the network."""
    collect = grpo.collect

    def spoil(*parts):
        rollout = collect(*parts)
        rollout.observations[0] = np.inf
        return rollout

    monkeypatch.setattr(grpo, "collect", spoil)
    with pytest.raises(SystemExit, match="1"):
        train(replace(small, checkpoint_every=1))
    assert "the last checkpoint is of step 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def played() -> Played:
    return Played(identical_start=False)


def test_each_step_gets_the_advantage_of_its_place(played):
    rewards = played.rollout.rewards.reshape(3, 4, -1)
    alive = (np.arange(rewards.shape[-1]) < played.rollout.lengths[:, None]).reshape(rewards.shape)
    for ours, expected in zip(
        grpo.estimate(played.args, played.rollout), grpo.group_advantages(played.args, rewards, alive), strict=True
    ):
        assert len(ours) == len(played.times) and ours.any()
        for advantage, m, t in zip(ours, played.episodes, played.times, strict=True):
            assert advantage == expected[m // 4, m % 4, t]


def test_a_batch_has_each_steps_own(played):
    torch.manual_seed(1)
    rollout, advantages = played.rollout, np.random.default_rng(0).normal(size=len(played.times))
    reference = grpo.copy.deepcopy(played.agent)
    reference.actor[-1].weight += 1
    reference.moments.update(np.full((50, 2), 7.0))  # it sees observations as it did when it played
    args = replace(played.args, loss_weight="episode")
    batch = grpo.batch_of(args, played.agent, reference, rollout, advantages)
    assert batch.observations is rollout.inputs and batch.actions is rollout.actions
    logprobs = FAMILIES[grpo.Categorical](played.agent(rollout.inputs)).log_prob(rollout.actions)
    torch.testing.assert_close(batch.logprobs, logprobs)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-6)
    weights = (rollout.lengths.mean() / rollout.lengths)[played.episodes]
    np.testing.assert_allclose(batch.weights, weights, rtol=1e-6)
    seen = torch.tensor(reference.moments.normaliser()(rollout.observations))
    torch.testing.assert_close(batch.reference, reference(seen))
    assert (reference(seen) - reference(rollout.inputs)).abs().max() > 1e-3


def paper_loss(theta: torch.Tensor, played: Played, agent: grpo.Agent, reference: grpo.Agent, process: bool):
    """DeepSeekMath's equations 3 and 4 with epsilon 0.2 and beta 0.04, a question, an output and a token at a time.

    J = 1/G sum_i 1/|o_i| sum_t min(r A, clip(r, 1 - eps, 1 + eps) A) - beta (pi_ref / pi - ln(pi_ref / pi) - 1), where
    r = pi / pi_old, and A is by outcome (R_i - mean R) / std R, by process the sum from t on of rewards so normalised.
    """
    rollout, pieces = played.rollout, []

    def log_prob(parameters: dict | None, module: grpo.Agent, row: torch.Tensor) -> torch.Tensor:
        inputs = torch.tensor(module.moments.normaliser()(rollout.observations[row])).flatten()
        outputs = torch.func.functional_call(module, parameters or dict(module.named_parameters()), (inputs[None],))
        return total(FAMILIES[agent.kind](outputs).log_prob(rollout.actions[row][None]))[0]

    parameters = grpo.parameters_of(agent, theta)
    for question in range(3):
        outputs = range(4 * question, 4 * question + 4)
        paid = {i: rollout.rewards[i, : rollout.lengths[i]] for i in outputs}
        every = np.concatenate(list(paid.values())) if process else np.array([paid[i].sum() for i in outputs])
        for i in outputs:
            for t in range(rollout.lengths[i]):
                (row,) = np.flatnonzero((played.episodes == i) & (played.times == t))
                normalised = ((paid[i][t:] if process else paid[i].sum()) - every.mean()) / every.std()
                advantage = torch.tensor(normalised.sum())
                new, old = log_prob(parameters, agent, row), log_prob(None, played.agent, row)
                ratio = (new - old).exp()
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                r = (log_prob(None, reference, row) - new).exp()
                pieces.append((surrogate - 0.04 * (r - r.log() - 1)) / len(paid[i]) / 4 / 3)
    return -torch.stack(pieces).sum()


@pytest.mark.parametrize("env_id", ["tests.envs:Luck-v0", "tests.envs:Mirror-v0"])
@pytest.mark.parametrize("config", ["paper-outcome", "paper-process"])
def test_the_papers_algorithm_is_the_papers(config, env_id):
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    played = Played(env_id=env_id, max_episode_steps=7, log_std_init=0.5, **settings)
    args, rollout = played.args, played.rollout
    agent, reference = (grpo.copy.deepcopy(played.agent) for _ in range(2))
    for module, size in ((agent, 0.1), (reference, 0.2)):  # updates since it played, and since the reference did
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)
    _, advantages = grpo.estimate(args, rollout)
    batch = grpo.batch_of(args, played.agent, reference, rollout, advantages)
    theta = torch.nn.utils.parameters_to_vector(agent.parameters()).requires_grad_()
    loss, (*_, clipped) = grpo.grpo_loss(
        grpo.parameters_of(agent, theta), agent, args, batch, torch.tensor(args.kl_coef)
    )
    expected = paper_loss(theta, played, agent, reference, config == "paper-process")
    assert 0.05 < clipped < 0.95 and args.clip_coef == 0.2
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(value, theta)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_the_papers_reference_stays(small):
    args = grpo.parse(["--config", str(CONFIGS / "paper-outcome.yaml")])
    args = replace(args, **PENDULUM, total_timesteps=900, compile=False, num_evals=0, runs_dir=small.runs_dir)
    run = train(replace(args, learning_rate=0.01))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.manual_seed(args.seed)
    first = grpo.Agent(args, (3,), *(np.full(1, bound, np.float32) for bound in (-2, 2)))
    for name, parameter in first.named_parameters():
        assert torch.equal(saved["progress"]["reference"][name], parameter)
        assert not torch.equal(saved["agent"][name], parameter)


def improve(agent: grpo.Agent, args: Args, move=lambda agent: None, kl=lambda call: 0.0) -> tuple[dict, list]:
    """With updates that `move` the agent; what each was called with."""
    calls, batch = [], example("box", size=100)[1]

    def update(agent: grpo.Agent, args: Args, learner: grpo.Learner, minibatch: grpo.Batch, kl_coef: torch.Tensor):
        calls.append((minibatch, kl_coef))
        move(agent)
        measures = torch.arange(float(len(grpo.MEASURES))) + len(calls)
        measures[grpo.MEASURES.index("approx_kl")] = kl(len(calls))
        return measures

    learner = grpo.Learner.of(agent, "cpu")
    learner.learning_rate.fill_(0.25)
    return grpo.improve(args, agent, learner, batch, 0.5, update), calls


def test_epochs_of_minibatches():
    agent, batch = example("box", size=100)
    measures, calls = improve(agent, replace(SMALL, update_epochs=3))
    for epoch in (calls[:4], calls[4:8], calls[8:]):
        held = torch.cat([minibatch.advantages[minibatch.weights > 0] for minibatch, _ in epoch])
        assert torch.equal(held.sort().values, batch.advantages.sort().values)
    orders = [torch.cat([minibatch.advantages for minibatch, _ in calls[n : n + 4]]) for n in (0, 4, 8)]
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert len(calls) == 12 and all(kl_coef == 0.5 for _, kl_coef in calls)
    assert measures["policy_loss"] == 6.5 and measures["grad_norm"] == 10.5 and measures["updates"] == 12
    assert (measures["kl_coef"], measures["learning_rate"]) == (0.5, 0.25)
    policy, reference = FAMILIES[grpo.Normal](agent(batch.observations)), FAMILIES[grpo.Normal](batch.reference)
    away = total(torch.distributions.kl_divergence(policy, reference)).mean()
    assert measures["reference_kl"] == pytest.approx(away.item(), rel=1e-5)


def test_an_update_ends_once_a_minibatch_has_moved_too_far():
    args = replace(SMALL, update_epochs=3)
    for limit, updates in ((0.45, 5), (0.1, 2), (9.0, 12), (None, 12)):
        measures, calls = improve(
            agent_of(SMALL, *box(-1, 1)), replace(args, stop_kl=limit), kl=lambda call: 0.1 * call
        )
        assert measures["updates"] == len(calls) == updates


def test_the_policys_deviation_has_a_floor():
    agent = agent_of(SMALL, *box(-1, 1))
    improve(agent, replace(SMALL, log_std_min=-2.5), lambda agent: agent.log_std.sub_(1))
    assert agent.log_std.tolist() == [-2.5, -2.5]


def test_how_much_there_was_to_learn_from():
    rewards = np.array([[1.0, 1, 0, 0], [2, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    rollout = SimpleNamespace(rewards=rewards, lengths=np.array([2, 1, 4, 4]))
    args = replace(SMALL, num_groups=2, group_size=2, max_episode_steps=4)
    measures = grpo.compare(args, rollout, np.array([1.0, -2, 3, 4]))
    assert measures == {
        "advantage_mean": 1.5,
        "advantage_positive": 0.75,
        "degenerate_groups": 0.5,
        "episode_length": 2.75,
        "alive_at_quarter": 0.75,
        "alive_at_half": 0.5,
        "alive_at_three_quarters": 0.5,
    }


# ------------------------------------------------------------------------------------------------------------- train


def test_what_changes_when(small, monkeypatch):
    """The normaliser after the update and only then, the learning rate before it, from the steps of the iteration."""
    seen = []

    def spy(name: str, look) -> None:
        function = getattr(grpo, name)

        def wrapped(*arguments):
            result = function(*arguments)
            seen.append((name, look(arguments, result)))
            return result

        monkeypatch.setattr(grpo, name, wrapped)

    spy("collect", lambda arguments, rollout: (arguments[3], arguments[1].moments.count.item(), rollout))
    spy("update", lambda arguments, _: (arguments[0].moments.count.item(), arguments[2].learning_rate.item()))
    run = train(replace(small, learning_rate=0.01, lr_warmup=0.5))
    table = rows(run, "progress")
    steps = [0, *(int(row["step"]) for row in table)]
    assert steps[-2] < 1000 <= steps[-1]  # the iteration that reaches the total is the last, and whole
    assert sum(int(row["length"]) for row in rows(run, "episodes")) == steps[-1]
    rollouts = [look for name, look in seen if name == "collect"]
    assert [(step, count) for step, count, _ in rollouts] == [(step, step) for step in steps[:-1]]
    assert [len(rollout.inputs) for *_, rollout in rollouts] == np.diff(steps).tolist()

    updates = [look for name, look in seen if name == "update"]
    assert {count for count, _ in updates} == set(steps[:-1]) and len(updates) == int(table[-1]["updates"])
    # Falls from where an iteration begins and rises to where it ends: the first is 1 / (warm-up * iterations) of it.
    rates = {a: 0.01 * (1 - a / 1000) * min(1, b / 500) for a, b in zip(steps[:-1], steps[1:], strict=True)}
    assert rates[0] == pytest.approx(0.01 * steps[1] / 500) and rates[0] > 1e-3
    assert [rate for _, rate in updates] == pytest.approx([rates[count] for count, _ in updates])
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(list(rates.values()))


def test_the_reference_stays_for_some_iterations_and_holds_the_policy_back(small):
    args = replace(small, **PENDULUM, total_timesteps=1200, learning_rate=0.01, gamma=0.9)
    runs = {coef: train(replace(args, kl_coef=coef, ref_update_every=5)) for coef in (0.0, 10.0)}
    away = {coef: [float(row["reference_kl"]) for row in rows(run, "progress")] for coef, run in runs.items()}
    assert len(away[0.0]) == 5 and away[0.0][4] > 3 * away[0.0][0]
    assert away[10.0][4] < 0.3 * away[0.0][4]
    adapting = rows(train(replace(args, kl_coef=1.0, target_kl=1e-6)), "progress")
    assert [float(row["kl_coef"]) for row in adapting] == pytest.approx([1.5**n for n in range(5)])


def test_the_reference_sees_observations_as_it_did_when_it_played(small):
    """Its parameters are those of the policy here; until the next reference, it is the normaliser that differs."""
    args = replace(small, **MIRROR, total_timesteps=480)
    progress = rows(train(replace(args, learning_rate=1e-12, ref_update_every=3)), "progress")
    away = [float(row["reference_kl"]) for row in progress]
    assert len(away) == 4 and max(away[0], away[3]) < 1e-8 and min(away[1:3]) > 1e-6


def test_evaluation_of_an_environment_without_a_limit_ends(small):
    """Mirror ends by itself after 10 steps, and has no limit otherwise."""
    args = replace(small, **MIRROR | {"max_episode_steps": 7}, total_timesteps=100, num_evals=1)
    assert {row["length"] for row in rows(train(args), "evaluations")} == {"7"}


def test_a_group_without_a_difference_is_counted(small):
    run = train(replace(small, env_id="tests.envs:Ticks-v0", max_episode_steps=20, total_timesteps=240))
    assert float(rows(run, "progress")[0]["degenerate_groups"]) == 1
    assert float(rows(run, "progress")[0]["policy_loss"]) == 0


def test_cartpole_is_learnt(small):
    run = train(replace(Args(), total_timesteps=15_000, num_evals=1, compile=False, runs_dir=small.runs_dir))
    returns = [float(row["return"]) for row in rows(run, "evaluations")]
    assert np.mean(returns) > 150  # at random: 22


@pytest.mark.parametrize("distribution", ["normal", "beta"])
def test_a_continuous_task_is_learnt(small, distribution):
    args = replace(small, **MIRROR, distribution=distribution, num_evals=1, num_groups=4, group_size=8, gamma=0.0)
    args = replace(args, learning_rate=0.01, total_timesteps=12_000, minibatch_size=80, eval_episodes=10)
    returns = [float(row["return"]) for row in rows(train(args), "evaluations")]
    assert np.mean(returns) > -1  # the best constant action earns -3.3


def test_the_config_holds_what_was_left_open(small):
    run = train(replace(small, env_id="CartPole-v1", num_envs=None, max_episode_steps=None))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["num_envs"], config["max_episode_steps"]) == (12, 500)


def test_training_is_cut_at_the_lower_of_its_own_limits_whatever_evaluation_does():
    for asked, evaluated, limit in ((None, 100, 500), (600, 100, 500), (300, 100, 300), (300, 900, 300)):
        kwargs = f'{{"max_episode_steps": {evaluated}}}'
        args = replace(SMALL, env_id="CartPole-v1", max_episode_steps=asked, eval_env_kwargs=kwargs)
        args, envs, _ = grpo.prepare(args)
        envs.close()
        assert args.max_episode_steps == limit


# ----------------------------------------------------------------------------------------------------------- EnvPool


def test_envpool_plays_whole_episodes_too(small, capsys, monkeypatch):
    envpool = pytest.importorskip("envpool")
    seeds, make = [], envpool.make
    monkeypatch.setattr(envpool, "make", lambda *a, seed, **kw: seeds.append(seed) or make(*a, seed=seed, **kw))
    args = replace(small, env_id="Hopper-v4", vec="envpool", max_episode_steps=20)
    with pytest.raises(SystemExit):
        train(args)
    assert "--no-identical-start" in capsys.readouterr().err
    run = train(replace(args, identical_start=False))
    episodes = rows(run, "episodes")
    assert max(int(row["length"]) for row in episodes) == 20
    assert len({row["return"] for row in episodes}) == len(episodes)
    assert sum(int(row["length"]) for row in episodes) == int(rows(run, "progress")[-1]["step"])
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    train(grpo.parse(["--resume", str(run)]))
    assert "the environments cannot be restored exactly" in capsys.readouterr().out
    assert {*seeds[-2]}.isdisjoint(seeds[-1])  # and does not repeat the run's first


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_settings_are_read(path):
    settings = yaml.safe_load(path.read_text())
    args = grpo.parse(["--config", str(path)])
    assert {name: getattr(args, name) for name in settings} == settings


def test_the_penalty_follows_the_divergence_from_the_reference(small, monkeypatch):
    given, follow = [], grpo.next_kl_coef
    monkeypatch.setattr(grpo, "next_kl_coef", lambda *by: (given.append(by), follow(*by))[1])
    args = replace(small, **PENDULUM, total_timesteps=1200, learning_rate=0.01, kl_coef=1.0, target_kl=0.02)
    table = rows(train(args), "progress")
    assert given == [(float(row["kl_coef"]), float(row["reference_kl"]), 0.02) for row in table]
