"""GRPO: advantages, distributions and scheduler against independent computations, and exact resume without a critic."""

import csv
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import grpo
from grpo import Args, RunningMoments, load_policy, make_eval_env, parse, train
from tests.envs import Luck
from tests.marks import needs_compiler

SCRIPT = Path(grpo.__file__)
SMALL = Args(
    env_id="tests.envs:Luck-v0",
    num_envs=4,
    num_groups=3,
    group_size=4,
    total_timesteps=1000,
    minibatch_size=32,
    update_epochs=2,
    num_evals=2,
    eval_episodes=2,
    checkpoint_every=250,
    actor_sizes=(16,),
    compile=False,
)
PENDULUM = {"env_id": "Pendulum-v1", "max_episode_steps": 20}


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def same(a: Path, b: Path) -> bool:
    """Equal weights, state of the optimiser, normaliser and rows, bit for bit; only the wall time may differ."""
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    tensors = [[*saved["agent"].values(), *saved["learner"], *saved["moments"].values()] for saved in (one, other)]
    equal = all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(*tensors, strict=True))
    return equal and rows(a, "episodes") == rows(b, "episodes")


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


# --------------------------------------------------------------------------------------------------- distributions

FAMILIES = {
    grpo.Categorical: lambda outputs: torch.distributions.Categorical(logits=outputs),
    grpo.Normal: lambda outputs: torch.distributions.Normal(outputs[:, :2], outputs[:, 2:].exp()),
    grpo.Beta: lambda outputs: torch.distributions.Beta(
        1 + torch.nn.functional.softplus(outputs[:, :2]), 1 + torch.nn.functional.softplus(outputs[:, 2:])
    ),
}


def total(values: torch.Tensor) -> torch.Tensor:
    return values if values.dim() == 1 else values.sum(-1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_distributions_are_torchs(kind):
    torch.manual_seed(0)
    outputs, others = torch.randn(2, 50, 4, dtype=torch.float64)
    policy, torchs, other = kind(outputs), FAMILIES[kind](outputs), FAMILIES[kind](others)
    actions = policy.sample()
    torch.testing.assert_close(policy.log_prob(actions), total(torchs.log_prob(actions)))
    torch.testing.assert_close(policy.entropy(), total(torchs.entropy()))
    torch.testing.assert_close(policy.kl(kind(others)), total(torch.distributions.kl_divergence(torchs, other)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_samples_follow_the_distribution(kind):
    torch.manual_seed(0)
    outputs = torch.randn(1, 4)
    samples = kind(outputs.expand(40_000, 4)).sample()
    if kind is grpo.Categorical:
        torch.testing.assert_close(samples.bincount() / 40_000, outputs.softmax(-1)[0], atol=0.01, rtol=0)
    else:
        torchs = FAMILIES[kind](outputs)
        torch.testing.assert_close(samples.mean(0), torchs.mean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(samples.std(0), torchs.stddev[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_mean_of_k3_is_the_closed_divergence(kind):
    torch.manual_seed(0)
    outputs, others = 0.1 * torch.randn(2, 1, 4)  # far apart, the estimate's variance is infinite
    agent = torch.nn.Module()
    agent.kind, agent.forward = kind, lambda _: outputs.expand(100_000, 4)
    actions = kind(agent.forward(None)).sample()
    zeros = torch.zeros(100_000)
    batch = grpo.Batch(
        zeros, actions, kind(agent.forward(None)).log_prob(actions), zeros, zeros + 1, others.expand(100_000, 4)
    )
    losses = {}
    for estimator in ("closed", "k3"):
        args = replace(SMALL, kl_estimator=estimator)
        losses[estimator] = grpo.grpo_loss({}, agent, args, batch, torch.tensor(1.0))[0].item()
    assert losses["closed"] == pytest.approx(kind(outputs).kl(kind(others)).item(), rel=1e-4)
    assert losses["k3"] == pytest.approx(losses["closed"], rel=0.05)


def test_actions_cover_uneven_bounds_and_choices_begin_where_the_space_does():
    box = gym.spaces.Box(np.array([[-1, 0]], np.float32), np.array([[3, 0.5]], np.float32))
    np.testing.assert_allclose(grpo.Beta.within(box, np.array([[0, 1], [0.5, 0.5]])), [[[-1, 0.5]], [[1, 0.25]]])
    np.testing.assert_allclose(grpo.Normal.within(box, np.array([[-2, 0.2], [2, 9]])), [[[-1, 0.2]], [[2, 0.5]]])
    assert grpo.Categorical.within(gym.spaces.Discrete(3, start=-1), np.array([0, 2])).tolist() == [-1, 1]


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
    assert grpo.hybrid(args, outcome, step).tolist() == [10, -10, -10, -10, 0, 0]
    assert grpo.hybrid(replace(args, hybrid_clip=100.0), outcome, step).tolist() == [18, -18, -18, -18, 0, 0]


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
    args = replace(small, env_id="CartPole-v1", num_evals=0)
    train(replace(args, advantage="process"))
    assert capsys.readouterr().out.count("every process advantage is 0") == 1
    train(args)
    assert "advantage is 0" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- loss


def example(discrete: bool = True, size: int = 64) -> tuple[grpo.Agent, grpo.Batch]:
    torch.manual_seed(0)
    space = gym.spaces.Discrete(4) if discrete else gym.spaces.Box(-1, 1, (2,))
    agent = grpo.Agent(SMALL, 3, space).requires_grad_(False)
    observations, reference = torch.randn(size, 3), 0.5 * torch.randn(size, 4)
    actions = agent.kind(agent(observations)).sample()
    logprobs = agent.kind(agent(observations)).log_prob(actions) + 0.3 * torch.randn(size)
    return agent, grpo.Batch(observations, actions, logprobs, torch.randn(size), torch.rand(size) + 0.5, reference)


@pytest.mark.parametrize("discrete", [True, False])
def test_loss_equals_the_papers(discrete):
    agent, batch = example(discrete)
    args = replace(SMALL, clip_coef=0.1, clip_coef_high=0.3, ent_coef=0.01)
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


def gradient(agent: grpo.Agent, batch: grpo.Batch) -> torch.Tensor:
    theta = torch.nn.utils.parameters_to_vector(agent.parameters()).requires_grad_()
    args = replace(SMALL, ent_coef=0.1)
    loss, _ = grpo.grpo_loss(grpo.parameters_of(agent, theta), agent, args, batch, torch.tensor(0.3))
    return torch.autograd.grad(loss, theta)[0]


def test_what_fills_a_minibatch_cannot_change_a_gradient():
    agent, batch = example()
    bare = grpo.Batch(*(column[:40] for column in batch))
    full = grpo.filled(batch, torch.arange(40), 64)
    assert len(full.weights) == 64 and not full.weights[40:].any()
    torch.testing.assert_close(gradient(agent, full), gradient(agent, bare))
    before = gradient(agent, full)
    for column in full:
        if column is not full.weights:
            column[40:] = column[40:].flip(0) + 1 if column is not full.actions else 3
    assert torch.equal(gradient(agent, full), before)


def test_minibatches_hold_every_row_once_and_are_alike_in_size():
    agent, batch = example(size=101)
    batch = batch._replace(advantages=torch.arange(101.0))
    parts = list(grpo.minibatches(batch, 32))
    held = [part.advantages[part.weights > 0] for part in parts]
    assert torch.cat(held).sort().values.tolist() == list(range(101)) and torch.cat(held).tolist() != list(range(101))
    assert [len(part.weights) for part in parts] == [32] * 4 and {len(rows) for rows in held} == {25, 26}


def test_weights():
    lengths = np.array([10, 30, 20])
    per_step = {
        kind: grpo.step_weights(replace(SMALL, loss_weight=kind), lengths, 40)
        for kind in ("step", "episode", "constant")
    }
    assert per_step["step"].tolist() == [1, 1, 1]
    assert (per_step["episode"] * lengths).tolist() == [20, 20, 20]  # 60 steps in all
    assert per_step["constant"].tolist() == [0.5, 0.5, 0.5]  # 60 of 120 possible steps were made


@needs_compiler
def test_the_compiled_update_is_the_update():
    agent, batch = example()
    learner, said, kl_coef = grpo.Learner.of(agent), [], torch.tensor(0.1)
    learner.learning_rate.fill_(1e-3)
    fast = grpo.compile_update(SMALL, agent, grpo.filled(batch, torch.arange(1), 32), said.append)
    assert "compiled in" in said[0]
    start, results = [tensor.clone() for tensor in learner], []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for function in (fast, grpo.update):
            for tensor, value in zip(learner, start, strict=True):
                tensor.copy_(value)
            measures = [
                function(agent, SMALL, learner, grpo.filled(batch, torch.arange(size), 32), kl_coef * size)
                for size in (32, 20)
            ]
            results.append((learner.theta.clone(), torch.stack(measures)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_a_run_compiles_once(small):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run = train(replace(small, **PENDULUM, compile=True, num_evals=0))
    assert "compiled in" in (run / "run.log").read_text()


def test_the_penalty_adapts_outside_its_dead_band():
    for kl, factor in ((0.0301, 1.5), (0.0299, 1), (0.0134, 1), (0.0133, 1 / 1.5)):
        assert grpo.adapted(0.3, kl, 0.02) == pytest.approx(0.3 * factor)
    assert grpo.adapted(99.0, 1.0, 0.02) == 100 and grpo.adapted(1.1e-4, 0.0, 0.02) == 1e-4


def test_the_reference_stays_for_some_iterations_and_holds_the_policy_back(small):
    args = replace(small, **PENDULUM, num_evals=0, total_timesteps=1200, learning_rate=0.01, gamma=0.9)
    runs = {coef: train(replace(args, kl_coef=coef, ref_update_every=5)) for coef in (0.0, 10.0)}
    away = {coef: [float(row["reference_kl"]) for row in rows(run, "progress")] for coef, run in runs.items()}
    assert len(away[0.0]) == 5 and away[0.0][4] > 3 * away[0.0][0]
    assert away[10.0][4] < 0.3 * away[0.0][4]
    adapting = rows(train(replace(args, kl_coef=1.0, target_kl=1e-6)), "progress")
    assert [float(row["kl_coef"]) for row in adapting] == pytest.approx([1.5**n for n in range(5)])


def test_the_reference_sees_observations_as_it_did_when_it_played(small):
    """Its parameters are those of the policy here; until the next reference, it is the normaliser that differs."""
    args = replace(small, env_id="tests.envs:Mirror-v0", max_episode_steps=10, num_evals=0, total_timesteps=480)
    progress = rows(train(replace(args, learning_rate=1e-12, ref_update_every=3)), "progress")
    away = [float(row["reference_kl"]) for row in progress]
    assert len(away) == 4 and max(away[0], away[3]) < 1e-8 and min(away[1:3]) > 1e-6


def test_the_policys_deviation_has_a_floor(small):
    args = replace(small, env_id="tests.envs:Mirror-v0", max_episode_steps=10, num_evals=0, total_timesteps=480)
    run = train(replace(args, learning_rate=0.02, log_std_init=-0.5, log_std_min=-0.51))
    log_std = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]["log_std"]
    assert log_std.min() == np.float32(-0.51)


def test_an_update_ends_once_it_went_too_far(small):
    args = replace(small, **PENDULUM, num_evals=0, total_timesteps=240, learning_rate=0.1)
    assert rows(train(args), "progress")[0]["updates"] == "16"  # 2 epochs of 240 steps
    assert rows(train(replace(args, stop_kl=0.01)), "progress")[0]["updates"] == "2"


# -------------------------------------------------------------------------------------------------------- scheduler


def played(args: Args, limit: int = 50, seeds: np.ndarray | None = None) -> tuple[grpo.Rollout, np.ndarray, list]:
    """A rollout, the seeds of its episodes, and how many environments were busy at each time."""
    torch.manual_seed(args.seed)
    probe = grpo.make_train_env(args)
    agent = grpo.Agent(args, probe.observation_space.shape[0], probe.action_space).requires_grad_(False)
    slots, busy = grpo.Slots(args, args.num_envs), []
    step = slots.step
    slots.step = lambda which, actions: (busy.append(len(which)), step(which, actions))[1]
    seeds = np.random.default_rng(0).integers(1000, size=12) if seeds is None else seeds
    still = RunningMoments((agent.actor[0].in_features,), enabled=False)
    rollout = grpo.play(agent, still, slots, probe.action_space, seeds, limit, np.zeros(3))
    slots.close()
    return rollout, seeds, busy


def test_every_episode_is_played_once_and_every_environment_kept_busy():
    before = Luck.made
    rollout, seeds, busy = played(SMALL)
    lengths = [Luck.length_of(int(seed)) for seed in seeds]
    assert rollout.lengths.tolist() == lengths and Luck.made - before == sum(lengths) == len(rollout.rewards)
    for episode, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        own = rollout.episodes == episode
        assert rollout.times[own].tolist() == list(range(length))
        assert rollout.raw[own].tolist() == [[seed, t] for t in range(length)]  # its own observations, in order

    free, starts = [0] * 4, []  # when each slot is free, if each takes the next episode at once
    for length in lengths:
        starts.append(min(free))
        free[free.index(min(free))] += length
    assert len(busy) == max(free)
    assert busy[: min(free)] == [4] * min(free)  # idle only when none waits
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    assert rollout.ended_at.tolist() == [sum(busy[:end]) for end in ends]


def test_episodes_are_cut_where_they_shall_be():
    rollout, seeds, _ = played(SMALL, limit=7)
    assert rollout.lengths.tolist() == [min(7, Luck.length_of(int(seed))) for seed in seeds]


def test_members_begin_alike_and_act_differently(small):
    seeds = np.repeat([5, 6, 7], 4)
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        rollout, *_ = played(replace(SMALL, env_id=env_id), limit=20, seeds=seeds)
        first = rollout.raw[rollout.times == 0][np.argsort(rollout.episodes[rollout.times == 0])].reshape(3, 4, -1)
        assert (first == first[:, :1]).all() and (first[0, 0] != first[1, 0]).any()
        acts = [tuple(rollout.actions[rollout.episodes == m].flatten().tolist()) for m in range(12)]
        assert len(set(acts)) == 12


def test_starts_are_the_groups_own_or_everybodys(small, monkeypatch):
    given = []
    begin = grpo.Slots.begin
    monkeypatch.setattr(
        grpo.Slots, "begin", lambda self, which, seeds: (given.extend(seeds), begin(self, which, seeds))[1]
    )
    train(replace(small, total_timesteps=1, num_evals=0))
    assert len(given) == 12 and [len(set(given[n : n + 4])) for n in (0, 4, 8)] == [1, 1, 1] and len(set(given)) == 3
    given.clear()
    train(replace(small, total_timesteps=1, num_evals=0, identical_start=False))
    assert len(set(given)) == 12


# ------------------------------------------------------------------------------------------------------ whole runs


def test_cartpole_is_learnt(small):
    run = train(replace(Args(), total_timesteps=15_000, num_evals=1, compile=False, runs_dir=small.runs_dir))
    returns = [float(row["return"]) for row in rows(run, "evaluations")]
    assert np.mean(returns) > 150  # at random: 22


@pytest.mark.parametrize("distribution", ["normal", "beta"])
def test_a_continuous_task_is_learnt(small, distribution):
    args = replace(small, env_id="tests.envs:Mirror-v0", max_episode_steps=10, distribution=distribution, num_evals=1)
    args = replace(
        args, num_groups=4, group_size=8, gamma=0.0, learning_rate=0.01, total_timesteps=12_000, minibatch_size=80
    )
    returns = [float(row["return"]) for row in rows(train(replace(args, eval_episodes=10)), "evaluations")]
    assert np.mean(returns) > -1  # the best constant action earns -3.3


def test_seed_decides_and_evaluation_does_not(small):
    first = train(small)
    assert same(first, train(replace(small, num_evals=0)))
    assert same(first, train(replace(small, num_evals=8, eval_episodes=3, checkpoint_every=100)))
    assert not same(first, train(replace(small, seed=2)))


def test_async_plays_like_sync(small):
    assert same(train(small), train(replace(small, vec="async")))


def test_what_a_run_leaves(small):
    run = train(small)
    progress, episodes = rows(run, "progress"), rows(run, "episodes")
    steps = [int(row["step"]) for row in progress]
    assert steps[-2] < 1000 <= steps[-1]  # the iteration that reaches the total is the last, and ends
    assert sum(int(row["length"]) for row in episodes) == steps[-1] and len(episodes) == 12 * len(steps)
    assert [int(row["step"]) for row in episodes] == sorted(int(row["step"]) for row in episodes)
    assert {row["step"] for row in episodes} >= {row["step"] for row in progress}
    lengths = np.array([int(row["length"]) for row in episodes[:12]])
    assert float(progress[0]["alive_at_half"]) == pytest.approx((lengths > 20).mean())
    assert float(progress[0]["degenerate_groups"]) == 0 and 0 < float(progress[0]["advantage_positive"]) < 1
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["moments"]["count"] == steps[-1]

    policy, env = load_policy(run / "checkpoint.pt"), make_eval_env(small)
    for row in rows(run, "evaluations")[2:]:
        (observation, _), paid, over = env.reset(seed=int(row["seed"])), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            paid, over = paid + reward, terminated or truncated
        assert paid == pytest.approx(float(row["return"]), abs=1e-5)


def test_evaluation_of_an_environment_without_a_limit_ends(small):
    """Mirror ends by itself after 10 steps, and has no limit otherwise."""
    run = train(replace(small, env_id="tests.envs:Mirror-v0", max_episode_steps=7, total_timesteps=100, num_evals=1))
    assert {row["length"] for row in rows(run, "evaluations")} == {"7"}


def test_a_group_without_a_difference_is_counted(small):
    run = train(replace(small, env_id="tests.envs:Ticks-v0", max_episode_steps=20, num_evals=0, total_timesteps=240))
    assert float(rows(run, "progress")[0]["degenerate_groups"]) == 1
    assert float(rows(run, "progress")[0]["policy_loss"]) == 0


def test_observations_are_normalised_alike_within_an_iteration(small, monkeypatch):
    def watched(agent, moments, *rest):
        mean, count = moments.mean.copy(), moments.count
        rollout = play(agent, moments, *rest)
        expected = RunningMoments(mean.shape, enabled=True)
        expected.mean, expected.var, expected.count = mean, moments.var, count
        assert np.array_equal(rollout.observations.numpy(), expected.normalise(rollout.raw))
        assert moments.count == count
        counts.append(count)
        return rollout

    play, counts = grpo.play, []
    monkeypatch.setattr(grpo, "play", watched)
    run = train(replace(small, num_evals=0))
    assert counts == [0, *(int(row["step"]) for row in rows(run, "progress")[:-1])]


def test_a_reward_that_is_not_finite_stops_the_run(small, capsys):
    args = replace(small, env_id="tests.envs:Mirror-v0", max_episode_steps=10)
    with pytest.raises(SystemExit) as stop:
        train(replace(args, env_kwargs='{"breaks": 100}', eval_env_kwargs='{"breaks": null}'))
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().out
    (run,) = Path(small.runs_dir).iterdir()
    assert not (run / "result.json").exists()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    assert all(tensor.isfinite().all() for tensor in saved.values())


RESUMED = {
    "LunarLander-v3": {"kl_coef": 0.1, "target_kl": 0.001, "ref_update_every": 3},
    "Pendulum-v1": {"distribution": "beta", "identical_start": False, "max_episode_steps": 30},
}


@pytest.mark.parametrize("env_id", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, env_id):
    args = replace(SMALL, env_id=env_id, total_timesteps=9000, checkpoint_every=500, **RESUMED[env_id])
    undisturbed = train(replace(args, runs_dir=str(tmp_path / "undisturbed")))

    runs = tmp_path / "killed"
    words, lines = command(replace(args, runs_dir=str(runs))), 0
    for stop in (1, 5):
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
    assert len(rows(undisturbed, "progress")) == len(rows(run, "progress"))


def test_envpool_plays_whole_episodes_too(small, capsys, monkeypatch):
    envpool = pytest.importorskip("envpool")
    seeds, make = [], envpool.make
    monkeypatch.setattr(envpool, "make", lambda *a, seed, **kw: seeds.append(seed) or make(*a, seed=seed, **kw))
    args = replace(small, env_id="Hopper-v4", vec="envpool", identical_start=False, max_episode_steps=20)
    run = train(args)
    episodes = rows(run, "episodes")
    assert max(int(row["length"]) for row in episodes) == 20 and len({row["return"] for row in episodes}) == len(
        episodes
    )
    assert sum(int(row["length"]) for row in episodes) == int(rows(run, "progress")[-1]["step"])
    (run / "checkpoint.pt").unlink()
    train(parse(["--resume", str(run)]))
    assert "--vec envpool cannot repeat its episodes" in capsys.readouterr().out
    assert len(set(seeds)) == 2  # and does not repeat the run's first


# ----------------------------------------------------------------------------------------------------------- errors

MISTAKES = {
    "--env-id tests.envs:Pair-v0": "Dict",
    "--env-id tests.envs:Whole-v0": "real numbers",
    "--env-id tests.envs:Several-v0": "MultiDiscrete",
    "--env-id Pendulum-v1 --log-std-init nan": "--log-std-init",
    "--env-id Pendulum-v1 --log-std-init -3": "at least --log-std-min",
    "--env-id tests.envs:Clock-v0": "--max-episode-steps",
    "--env-id tests.envs:Endless-v0 --max-episode-steps 9 --distribution beta": "use normal",
    "--distribution beta": "Discrete(2)",
    "--num-groups 0": "--num-groups 0",
    "--group-size 1": "at least 2",
    "--num-envs 17": "at most 16",
    "--minibatch-size 0": "--minibatch-size",
    "--clip-coef 1": "below 1",
    "--advantage value": "rtg",
    "--gamma 1.1": "--gamma",
    "--target-kl 0.01": "--kl-coef",
    "--kl-coef -1": "--kl-coef",
    "--ref-update-every 0": "--ref-update-every",
    "--vec envpool --env-id Hopper-v4": "--no-identical-start",
    "--hybrid-clip 0": "--hybrid-clip",
    "--total-timesteps 0": "--total-timesteps",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, mistake):
    if "envpool" in mistake:
        pytest.importorskip("envpool")
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        train(parse([*mistake.split(), "--runs-dir", str(runs)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not runs.exists()
    assert error.count("\n") == 1 and MISTAKES[mistake] in error
