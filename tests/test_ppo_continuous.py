"""The flagship's mathematics against independent computations, and how its parts are wired."""

import copy
import gc
import logging
import os
import signal
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from threadpoolctl import threadpool_info, threadpool_limits

import ppo_continuous as ppo
from ppo_continuous import Args, RunningMoments, load_policy, train
from tests.envs import Fates, Worldly
from tests.marks import needs_compiler
from tests.test_promises import rows

CONFIGS = Path(ppo.__file__).parent / "configs" / "ppo_continuous"
SMALL = Args(
    env_id="tests.envs:Mirror-v0",
    num_envs=4,
    num_steps=32,
    total_timesteps=512,
    num_minibatches=4,
    update_epochs=2,
    num_evals=0,
    eval_episodes=2,
    compile=False,
)


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def agent_of(args: Args = SMALL, observation: int = 3, action: int = 2, low=-1.0, high=1.0) -> ppo.Agent:
    bounds = (np.broadcast_to(np.float32(bound), action) for bound in (low, high))
    return ppo.Agent(args, (observation,), *map(np.array, bounds)).requires_grad_(False)


def learner_of(agent: ppo.Agent, rate: float = 0.0) -> ppo.Learner:
    learner = ppo.Learner.of(agent, "cpu")
    return learner._replace(learning_rate=torch.full_like(learner.theta, rate))


# -------------------------------------------------------------------------------------------------------- advantages


def plain_advantages(rewards, values, next_values, terminated, ended, gamma, lam) -> np.ndarray:
    """The recursion, from the last step to the first."""
    expected, carry = np.zeros(rewards.shape), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * np.where(terminated[t], 0, next_values[t]) - values[t]
        expected[t] = carry = delta + gamma * lam * np.where(ended[t], 0, carry)
    return expected


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
def test_advantages_equal_the_recursion(steps):
    generator = np.random.default_rng(steps)
    columns = [*generator.normal(size=(3, steps, 5)), *(generator.random((2, steps, 5)) < 0.15)]
    columns[4] |= columns[3]
    advantages = ppo.generalised_advantages(*map(torch.from_numpy, columns), 0.97, 0.9)
    np.testing.assert_allclose(advantages, plain_advantages(*columns, 0.97, 0.9), atol=1e-5)


def test_nothing_follows_a_termination_not_even_nan():
    one, no = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    assert ppo.generalised_advantages(one, one, one * torch.nan, ~no, ~no, 0.9, 0.9).item() == 0


# ------------------------------------------------------------------------------------------- normaliser and networks


def test_moments_equal_those_of_all_data():
    data = np.random.default_rng(0).normal(5, 3, (1000, 4))
    moments = RunningMoments((4,), enabled=True)
    for part in np.split(data, [1, 10, 500]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, data.mean(0))
    np.testing.assert_allclose(moments.var, data.var(0))
    assert moments.count == 1000
    normalised = moments.normaliser()(data)
    np.testing.assert_allclose(normalised, (data - data.mean(0)) / data.std(0), atol=1e-5)
    assert normalised.dtype == np.float32 and np.abs(moments.normaliser()(data * 1000)).max() == 10
    np.testing.assert_allclose(moments.scale(data), data / data.std(0))
    scaled = moments.scale(1000 * data)
    assert (scaled.min(), scaled.max()) == (-10, 10)


def test_what_never_varies_is_not_divided_by_nothing():
    moments = RunningMoments((2,), enabled=True)
    moments.update(np.tile([7.0, 0.0], (10, 1)))
    np.testing.assert_allclose(moments.deviation(), [7, 1e-4])


def test_moments_of_half_precision_are_not_computed_in_it():
    large = np.random.default_rng(0).normal(0, 300, (8, 4)).astype(np.float16)  # whose squares it does not have
    moments = RunningMoments((4,), enabled=True)
    moments.update(large)
    np.testing.assert_allclose(moments.var, large.astype(float).var(0))


def test_a_normaliser_stays_as_it_was_made():
    data = np.random.default_rng(0).normal(5, 3, (100, 2))
    moments = RunningMoments((2,), enabled=True)
    moments.update(data)
    normalise = moments.normaliser()
    before = normalise(data)
    moments.update(10 * data)
    assert np.array_equal(normalise(data), before) and not np.array_equal(moments.normaliser()(data), before)


def test_moments_that_are_not_enabled_change_nothing():
    moments = RunningMoments((2,), enabled=False)
    data = np.random.default_rng(0).normal(5, 30, (100, 2))
    moments.update(data)
    assert np.array_equal(moments.normaliser()(data), data.astype(np.float32))
    assert np.array_equal(moments.scale(data), data) and np.array_equal(moments.deviation(), np.ones(2))


NETWORKS = {
    "mlp": lambda: ppo.mlp((17, 64, 64, 6), last_scale=1.0),
    "other layers": lambda: torch.nn.Sequential(
        torch.nn.Linear(17, 8, bias=False),
        torch.nn.LayerNorm(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 8),
        torch.nn.SiLU(),
        torch.nn.Linear(8, 8),
        torch.nn.Softplus(),
        torch.nn.Linear(8, 6),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("rows", [1, 5, 16, 128])
def test_numpy_computes_what_torch_does(kind, rows):
    torch.manual_seed(rows)
    network = NETWORKS[kind]().requires_grad_(False)
    forward, observations = ppo.in_numpy(network), torch.randn(rows, 17)
    outputs = forward(observations.numpy())
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, network(observations), atol=1e-5)

    memory = np.empty(4 * 17 * rows + 64, np.uint8)
    for offset in range(0, 64, 4):  # a resumed run has its arrays elsewhere
        moved = memory[offset : offset + 4 * 17 * rows].view(np.float32).reshape(rows, 17)
        moved[:] = observations
        assert np.array_equal(forward(moved), outputs)


def test_numpy_takes_one_thread(small):
    threadpool_limits(2, "blas")
    train(small)
    assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}


@pytest.mark.parametrize("size", [1, 6])
def test_the_more_actions_the_smaller_their_first_deviation(size):
    log_std = agent_of(action=size).log_std
    np.testing.assert_allclose(log_std.exp(), size**-0.4, rtol=1e-6)
    assert agent_of(replace(SMALL, log_std_init=-0.25), action=size).log_std.unique() == -0.25


def test_the_first_deviation_is_not_below_the_floor(small):
    wide = np.ones(64, np.float32)
    assert ppo.Agent(small, (3,), -wide, wide).log_std.tolist() == [small.log_std_min] * 64


def test_an_environment_of_ones_own_with_a_world_is_made_once(small):
    Worldly.made = 0
    with closing(ppo.Environments(replace(small, env_id="tests.envs:Worldly-v0"))) as envs:
        made = Worldly.made
        for _ in range(50):
            envs.step(np.zeros((4, 1), np.float32))
        assert Worldly.made == made == 4


def test_the_first_policy_acts_near_the_centre_and_the_first_weights_are_orthogonal():
    agent = agent_of(observation=64)
    gram = agent.actor[2].weight @ agent.actor[2].weight.T
    torch.testing.assert_close(gram, 2 * torch.eye(64), atol=1e-4, rtol=0)
    assert not any(layer.bias.any() for network in (agent.actor, agent.critic) for layer in network[::2])
    torch.testing.assert_close(agent.actor[-1].weight.norm(dim=1), torch.full((2,), 0.01))
    torch.testing.assert_close(agent.critic[-1].weight.norm(dim=1), torch.ones(1))
    assert agent.actor(torch.randn(100, 64)).abs().max() < 0.1 < agent.critic(torch.randn(100, 64)).abs().max()


def test_actions_cover_finite_bounds_and_stay_within_them():
    agent = agent_of(action=3, low=[-1, 70, -np.inf], high=[3, 130, 1])
    actions = agent.for_environment(np.float32([[0, 0, 0], [1, -1, 0.5], [2, -9, 9], [-0.5, 0.5, -70]]))
    assert actions.tolist() == [[1, 100, 0], [3, 70, 0.5], [3, 70, 1], [0, 115, -70]] and actions.dtype == np.float32
    agent = agent_of(action=2, low=[100, -np.inf], high=[np.inf, -5])  # it begins where an action can do something
    assert agent.for_environment(np.float32([[0, 0], [3, -2], [-3, 2]])).tolist() == [[100, -5], [103, -7], [100, -5]]
    assert agent_of(low=-np.inf, high=np.inf).for_environment(np.float32([[5, -70]])).tolist() == [[5, -70]]


# ---------------------------------------------------------------------------------------------------- loss and update


def random_batch(agent: ppo.Agent, rows: int = 64) -> ppo.Batch:
    torch.manual_seed(0)
    observations, actions = torch.randn(rows, 3), torch.randn(rows, 2)
    mean, log_std, values = agent(observations)
    logprobs = ppo.log_prob(mean, log_std, actions) + 0.3 * torch.randn(rows)
    old_values, advantages, returns = values + 0.3 * torch.randn(rows), *torch.randn(2, rows)
    return ppo.Batch(observations, actions, logprobs, old_values, advantages, returns)


@pytest.mark.parametrize(("clip_vloss", "norm_adv"), [(True, True), (False, False)])
def test_loss_equals_the_papers(clip_vloss, norm_adv):
    torch.manual_seed(0)
    args = Args(ent_coef=0.01, vf_coef=0.3, clip_coef=0.1, clip_vloss=clip_vloss, norm_adv=norm_adv)
    agent = agent_of(replace(args, log_std_init=0.3))
    batch = random_batch(agent)
    loss, (policy_loss, value_loss, entropy, kl, clipped) = ppo.ppo_loss(
        dict(agent.named_parameters()), agent, args, batch
    )

    mean, log_std, values = agent(batch.observations)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    ratio = (gaussian.log_prob(batch.actions).sum(-1) - batch.logprobs).exp()
    advantages = batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.1), batch.values + 0.1)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * (errors.max(0).values if clip_vloss else errors[0]).mean())
    torch.testing.assert_close(entropy, gaussian.entropy().sum(-1)[0])
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(clipped, ((ratio < 0.9) | (ratio > 1.1)).float().mean())
    torch.testing.assert_close(loss, policy_loss + 0.3 * value_loss - 0.01 * entropy)


def test_a_minibatch_of_equal_advantages_is_no_reason_to_stop():
    agent = agent_of()
    batch = random_batch(agent)._replace(advantages=torch.ones(64))
    assert ppo.ppo_loss(dict(agent.named_parameters()), agent, SMALL, batch)[0].isfinite()


def test_adam_is_torchs():
    agent = torch.nn.Linear(3, 2).requires_grad_(False)
    learner = ppo.Learner.of(agent, "cpu")
    learner.learning_rate.fill_(0.01)
    parameter = learner.theta.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.01, eps=1e-3)
    for _ in range(2000):
        parameter.grad = torch.randn(8)
        learner.adam_step(parameter.grad, eps=1e-3)
        adam.step()
    torch.testing.assert_close(learner.theta, parameter.detach())
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(agent.parameters()), learner.theta)


def test_the_critic_takes_larger_steps():
    args = Args(learning_rate=0.01, critic_lr_ratio=5.0)
    agent = agent_of(args)
    learner = ppo.Learner.of(agent, "cpu")._replace(learning_rate=ppo.step_sizes(args, agent))
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    learner.adam_step(torch.ones_like(learner.theta), eps=1e-8)  # of which Adam's first step is the rate
    for name, parameter in agent.named_parameters():
        expected = 0.05 if name.startswith("critic") else 0.01
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, expected), rtol=1e-3, atol=1e-6)


def test_an_update_learns_from_its_minibatch_alone():
    agent = agent_of()
    batch = random_batch(agent)
    learner, indices = learner_of(agent, rate=0.01), torch.tensor([5, 3, 60])
    start = [tensor.clone() for tensor in learner]
    results = []
    for part, chosen in ((batch, indices), (ppo.Batch(*(column[indices] for column in batch)), torch.arange(3))):
        for tensor, value in zip(learner, start, strict=True):
            tensor.copy_(value)
        results.append((ppo.update(agent, SMALL, learner, part, chosen), learner.theta.clone()))
    torch.testing.assert_close(*results)
    assert not torch.equal(learner.theta, start[0])
    learner.theta.copy_(start[0])
    ppo.update(agent, replace(SMALL, adam_eps=1e9), learner, batch, indices)
    torch.testing.assert_close(learner.theta, start[0])


def test_an_update_stops_at_the_gradient_norm():
    agent = agent_of()
    batch, learner = random_batch(agent), learner_of(agent)
    measures = ppo.update(agent, Args(max_grad_norm=1e-3), learner, batch, torch.arange(64))
    assert learner.first_moment.norm() == pytest.approx(1e-4, rel=1e-3)  # a tenth of the clipped gradient
    assert measures[-1] > 0.01  # the norm before it was clipped
    learner = learner_of(agent)
    measures = ppo.update(agent, Args(max_grad_norm=1e3), learner, batch, torch.arange(64))
    assert 10 * learner.first_moment.norm() == pytest.approx(measures[-1].item(), rel=1e-3)


@needs_compiler
@pytest.mark.parametrize("vf_coef", [0.25, 2.0])  # the second is not taken for the first, which this process compiled
def test_the_compiled_update_is_the_update(vf_coef):
    args = replace(SMALL, num_envs=4, num_steps=16, num_minibatches=2, vf_coef=vf_coef)
    agent = agent_of(args)
    batch, learner = random_batch(agent), learner_of(agent, rate=1e-3)
    said, random = [], torch.get_rng_state()
    fast = ppo.compile_update(args, agent, learner, SimpleNamespace(say=said.append))
    assert "compiled in" in said[-1] and not torch.count_nonzero(learner.first_moment)
    assert torch.equal(torch.get_rng_state(), random)
    indices, start = torch.randperm(64)[:32], [tensor.clone() for tensor in learner]
    measures = fast(agent, args, learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    torch.testing.assert_close(ppo.update(agent, args, learner, batch, indices), measures)
    torch.testing.assert_close(learner.theta, compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        fast(agent, args, learner, batch, indices)
        with pytest.raises(RuntimeError):  # an array of another size is not read by code for this one
            fast(agent, args, learner, ppo.Batch(*(column[:60] for column in batch)), indices)
        with pytest.raises(RuntimeError, match="vf_coef"):  # nor a number that a fork lets change
            fast(agent, replace(args, vf_coef=1.0), learner, batch, indices)


def test_compiling_leaves_the_agent_as_it_is(monkeypatch):
    """A fork's update may change a buffer."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ppo, "update", lambda agent, *_: agent.return_moments.mean.add_(1))
    agent = agent_of()
    ppo.compile_update(SMALL, agent, learner_of(agent), SimpleNamespace(say=print))
    assert agent.return_moments.mean == 0


def test_what_no_gradient_reaches_is_named(tmp_path, monkeypatch):
    """As where a fork's loss calls a network of the agent's instead of functional_call."""

    class Forked(ppo.Agent):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.model = torch.nn.Linear(2, 2)

    monkeypatch.setattr(ppo, "Agent", Forked)
    run = train(replace(SMALL, runs_dir=str(tmp_path), num_evals=0))
    assert "learning has not changed model.weight, model.bias" in (run / "run.log").read_text()


def test_acting_has_no_dropout():
    network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Dropout(0.5)).requires_grad_(False)
    x = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(ppo.in_numpy(network)(x), network[0](torch.tensor(x)), atol=1e-6)


def test_learning_rate_schedules():
    def factors(**settings):
        return [ppo.lr_factor(Args(**settings), i, 4) for i in (1, 2, 3, 4)]

    assert factors(lr_schedule="constant") == [1, 1, 1, 1]
    assert factors(lr_schedule="linear") == [1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(factors(lr_schedule="cosine"), [1, 0.853553, 0.5, 0.146447], rtol=1e-5)
    assert factors(lr_schedule="constant", lr_warmup=0.5) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("works", [True, False])
def test_what_cannot_be_compiled_runs_as_it_is(works, monkeypatch, caplog):
    compiler = logging.getLogger("torch._inductor.scheduler")  # where g++ is missing it prints dozens of lines
    monkeypatch.setattr(compiler, "disabled", False)
    monkeypatch.setattr(compiler, "handlers", [caplog.handler])

    def compile_it(function, **_):
        if not works:
            compiler.critical("all that it has read")
            raise RuntimeError("no\ncompiler")
        return lambda *_: torch.rand(1)  # as a fork's may

    monkeypatch.setattr(torch, "compile", compile_it)
    agent, said, random = agent_of(), [], torch.get_rng_state()
    fast = ppo.compile_update(SMALL, agent, learner_of(agent), SimpleNamespace(say=said.append))
    assert (fast is ppo.update) == ("is not compiled, so the run is slower: no compiler" in said[-1]) == (not works)
    assert gc.isenabled() and torch.equal(torch.get_rng_state(), random) and not caplog.records


def test_the_compiler_gets_only_options_that_its_version_has(monkeypatch):
    given, known = {}, ["cpp_wrapper", "cpp.vec_isa_ok"]
    monkeypatch.setattr(torch._inductor, "list_options", lambda: known)
    monkeypatch.setattr(torch, "compile", lambda function, options, **_: given.update(options) or (lambda *_: None))
    agent = agent_of()
    ppo.compile_update(SMALL, agent, learner_of(agent), SimpleNamespace(say=lambda _: None))
    assert given.keys() == {"guard_filter_fn", *known}


# ----------------------------------------------------------------------------------------------- from steps to batches

FATES = replace(SMALL, env_id="tests.envs:Fates-v0", num_steps=40, gamma=0.9, gae_lambda=0.8, log_std_init=0.5)


class Played:
    """Two rollouts of Fates, of which everything can be told from what was seen."""

    def __init__(self, args: Args = FATES):
        torch.manual_seed(0)
        self.args, self.agent = args, agent_of(args, 2, 2, [-1, 0], [1, 4])
        self.agent.moments.update(np.random.default_rng(0).normal([500, 5], [300, 4], (1000, 2)))
        self.agent.log_std[1] -= 1
        self.watch = ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0))
        with closing(ppo.Environments(args)) as envs:
            self.first = ppo.collect(args, self.agent, envs, 0, self.watch)
            self.first_rewards = ppo.scale_rewards(args, self.agent, envs, self.first)
            self.rollout = ppo.collect(args, self.agent, envs, 160, self.watch)
            self.rewards = ppo.scale_rewards(args, self.agent, envs, self.rollout)
        self.seed, self.t = (self.rollout.observations[..., i].astype(int) for i in (0, 1))
        self.length, self.terminates, self.cut = np.vectorize(Fates.end_of)(self.seed)
        self.over = self.t + 1 == self.length
        self.next = np.stack((self.seed, self.t + 1), -1)  # the true next observations


@pytest.fixture(scope="module")
def played() -> Played:
    return Played()


def test_a_rollout_is_what_was_played(played):
    rollout = played.rollout
    assert np.array_equal(rollout.terminated, played.over & played.terminates)
    assert np.array_equal(rollout.ended, played.over)
    kinds = {(a, b) for a, b in zip(played.terminates[played.over], played.cut[played.over], strict=True)}
    assert len(kinds) == 3 and played.over.sum() > 10
    running = ~played.over[:-1]
    assert np.array_equal(rollout.observations[1:][running], played.next[:-1][running])
    assert (played.t[1:][~running] == 0).all()  # and a new episode begins where one has ended


def test_networks_see_what_the_normaliser_of_the_rollouts_start_makes_of_it(played):
    moments, rollout = played.agent.moments, played.rollout
    normalise = moments.normaliser()
    assert moments.count == 1000  # the rollout leaves it alone
    for t in range(40):
        assert np.array_equal(rollout.inputs[t], normalise(rollout.observations[t]))
    running = ~played.over[-1]
    assert np.array_equal(rollout.inputs[40][running], normalise(played.next[-1][running]))
    assert np.array_equal(rollout.last_inputs, normalise(played.next[played.over]))


def test_what_is_kept_of_an_action_is_what_was_drawn(played):
    agent, actions = played.agent, played.rollout.actions
    deviations = (actions - agent.actor(played.rollout.inputs[:-1])) / agent.log_std.exp()
    assert deviations.std((0, 1)).numpy() == pytest.approx([1, 1], abs=0.15)
    assert deviations.mean((0, 1)).numpy() == pytest.approx([0, 0], abs=0.2)
    assert len(deviations.unique()) == deviations.numel() and actions.abs().max() > 1.5

    played_actions = agent.for_environment(actions.flatten(0, 1).numpy()).reshape(40, 4, 2)
    expected = played_actions.sum(-1) + played.seed / 100 + played.t + 1
    np.testing.assert_allclose(played.rollout.rewards, expected, rtol=1e-5)


def test_every_finished_episode_has_a_row(played):
    rewards = np.concatenate((played.first.rewards, played.rollout.rewards))
    ended = np.concatenate((played.first.ended, played.rollout.ended))
    expected, total, length = [], np.zeros(4), np.zeros(4, int)
    for t in range(80):
        total, length = total + rewards[t], length + 1
        expected += [((t + 1) * 4, total[n], length[n]) for n in np.flatnonzero(ended[t])]
        total, length = np.where(ended[t], 0, total), np.where(ended[t], 0, length)
    found = [*played.first.episodes, *played.rollout.episodes]
    assert [(row["step"], row["length"]) for row in found] == [(step, length) for step, _, length in expected]
    assert [row["return"] for row in found] == pytest.approx([total for _, total, _ in expected])


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(played):
    """Of all returns so far, this rollout's among them; a return begins anew after every end."""
    returns, discounted = [], np.zeros(4)
    for rollout, scaled in ((played.first, played.first_rewards), (played.rollout, played.rewards)):
        for rewards, ended in zip(rollout.rewards, rollout.ended.numpy(), strict=True):
            discounted = 0.9 * discounted + rewards
            returns.append(discounted)
            discounted = np.where(ended, 0, discounted)
        np.testing.assert_allclose(scaled, np.clip(rollout.rewards / np.std(returns), -10, 10), rtol=1e-5)
    assert scaled.dtype == torch.float32 and 0.1 < scaled.std() < 10
    assert played.agent.return_moments.count == 320


def test_advantages_continue_from_what_was_truly_seen_next(played):
    agent, rollout = played.agent, played.rollout
    normalise = agent.moments.normaliser()
    values, next_values = (
        agent.critic(torch.tensor(normalise(observations))).squeeze(-1).numpy()
        for observations in (rollout.observations, played.next)
    )
    ends = played.over & played.terminates, played.over
    expected = plain_advantages(played.rewards.numpy(), values, next_values, *ends, 0.9, 0.8)
    advantages, same_values = ppo.estimate(played.args, agent, rollout, played.rewards)
    np.testing.assert_allclose(same_values, values, atol=1e-5)
    np.testing.assert_allclose(advantages, expected, atol=1e-4)


def test_a_batch_has_each_steps_own(played):
    agent, rollout = played.agent, played.rollout
    advantages, values = torch.randn(2, 40, 4)
    batch = ppo.batch_of(agent, rollout, advantages, values)
    assert all(len(column) == 160 for column in batch)
    for t, n in ((0, 0), (0, 3), (7, 2), (39, 3)):
        observation, action, logprob, value, advantage, target = (column[4 * t + n] for column in batch)
        assert torch.equal(observation, rollout.inputs[t, n]) and torch.equal(action, rollout.actions[t, n])
        gaussian = torch.distributions.Normal(agent.actor(observation), agent.log_std.exp())
        torch.testing.assert_close(logprob, gaussian.log_prob(action).sum())
        assert (value, advantage) == (values[t, n], advantages[t, n])
        torch.testing.assert_close(target, advantages[t, n] + values[t, n])


def improve(played: Played, args: Args, move=lambda agent, call: None, kl=lambda call: 0.0) -> tuple[dict, list]:
    """With updates that `move` the agent; what each was called with."""
    calls = []

    def update(agent: ppo.Agent, args: Args, learner: ppo.Learner, batch: ppo.Batch, indices: torch.Tensor):
        calls.append((batch, indices, ppo.estimate(args, agent, played.rollout, played.rewards)))
        move(agent, len(calls))
        measures = torch.arange(float(len(ppo.MEASURES))) + len(calls)
        measures[3] = kl(len(calls))
        return measures

    learner = learner_of(played.agent)
    before = learner.theta.clone()
    optimise = partial(ppo.run_epoch, args, played.agent, learner, update)
    measures = ppo.improve(args, played.agent, learner, played.rollout, played.rewards, optimise)
    learner.theta.copy_(before)
    return measures, calls


def shift_values(agent: ppo.Agent, call: int) -> None:
    agent.critic[-1].bias += 1.0


@pytest.mark.parametrize("recompute", [True, False])
def test_epochs_of_minibatches(played, recompute):
    args = replace(FATES, update_epochs=3, num_minibatches=4, recompute_advantages=recompute)
    measures, calls = improve(played, args, shift_values)
    epochs = [calls[:4], calls[4:8], calls[8:]]
    orders = [torch.cat([indices for _, indices, _ in epoch]).tolist() for epoch in epochs]
    assert len(calls) == 12 and all(len(indices) == 40 for _, indices, _ in calls)
    assert all(sorted(order) == list(range(160)) for order in orders) and len(set(map(tuple, orders))) == 3
    assert orders[0] != sorted(orders[0])

    rollouts_batch = calls[0][0]
    for epoch in epochs:
        advantages, values = (epoch if recompute else calls)[0][2]  # by the critic of the epoch's start
        for batch, _, _ in epoch:
            assert torch.equal(batch.advantages, advantages.flatten())
            torch.testing.assert_close(batch.returns, (advantages + values).flatten())
            for name in ("observations", "actions", "logprobs", "values"):
                assert getattr(batch, name) is getattr(rollouts_batch, name)
    torch.testing.assert_close(rollouts_batch.values, calls[0][2][1].flatten())
    names = ("policy_loss", "value_loss", "entropy", "clipfrac", "grad_norm")
    assert [measures[name] for name in names] == [6.5, 7.5, 8.5, 10.5, 11.5] and measures["updates"] == 12
    errors = rollouts_batch.returns - rollouts_batch.values
    expected = 1 - errors.var() / rollouts_batch.returns.var()
    assert measures["explained_variance"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("local", [True, False])
def test_adam_counts_its_steps_anew_in_every_rollout(local):
    played, seen = Played(), []
    args, learner = replace(FATES, update_epochs=3, num_minibatches=4, adam_local_time=local), learner_of(played.agent)

    def update(agent: ppo.Agent, args: Args, learner: ppo.Learner, *rest: object) -> torch.Tensor:
        seen.append([tensor.clone() for tensor in learner])
        return ppo.update(agent, args, learner, *rest)

    optimise = partial(ppo.run_epoch, args, played.agent, learner, update)
    for _ in range(2):
        ends = [tensor.clone() for tensor in learner]
        ppo.improve(args, played.agent, learner, played.rollout, played.rewards, optimise)
    _, first, second, *decays, _ = seen[12]
    assert torch.equal(first, ends[1]) and torch.equal(second, ends[2]) and second.any()  # which stay
    assert decays == pytest.approx([1, 1] if local else [0.9**12, 0.999**12])


def test_an_update_ends_once_a_minibatch_has_moved_too_far(played):
    args = replace(FATES, update_epochs=3, num_minibatches=4)
    for target, updates in ((0.45, 5), (0.1, 2), (9.0, 12), (None, 12)):
        measures, calls = improve(played, replace(args, target_kl=target), kl=lambda call: 0.1 * call)
        assert measures["updates"] == len(calls) == updates


def test_the_policys_deviation_has_a_floor(played):
    def narrow(agent: ppo.Agent, call: int) -> None:
        agent.log_std -= 3

    before = played.agent.log_std.clone()
    measures, _ = improve(played, replace(FATES, update_epochs=1, num_minibatches=1, log_std_min=-2.0), narrow)
    assert measures["std"] == pytest.approx(np.exp(-2))
    assert torch.equal(played.agent.log_std, before)


# ------------------------------------------------------------------------------------------------------- environments


def test_environments_never_pay_for_a_reset():
    with closing(ppo.Environments(replace(SMALL, env_id="Pendulum-v1"))) as envs:
        assert isinstance(envs.envs, gym.vector.SyncVectorEnv)
        for t in range(1, 401):
            before = envs.observations.copy()
            seen, _, terminated, truncated, finished = envs.step(np.zeros((4, 1), np.float32))
            assert truncated.all() == (t % 200 == 0) and not terminated.any()
            assert [length for _, length in finished] == [200] * (4 * truncated.all())
            assert np.abs(seen - before).max() < 2 and np.array_equal(seen, envs.observations) != truncated.all()


def test_every_episode_has_a_seed_of_its_own():
    seeds = []
    for seed in (1, 2):
        with closing(ppo.Environments(replace(FATES, seed=seed))) as envs:
            for _ in range(30):
                seeds += [episode[0] for episode in envs.envs.get_attr("episode")]
                envs.step(np.zeros((4, 2), np.float32))
    assert len(set(seeds)) > 20 and len(set(seeds[:120]) & set(seeds[120:])) == 0


@pytest.mark.parametrize("vec", ["sync", "async"])
def test_running_episodes_are_restored_with_all_that_belongs_to_them(vec):
    with closing(ppo.Environments(replace(FATES, vec=vec))) as envs:
        for t in range(25):
            envs.step(np.full((4, 2), t / 25, np.float32))
            envs.discounted = envs.discounted + 1.0
        state = envs.state()
        expected = [copy.deepcopy(envs.step(np.ones((4, 2), np.float32))) for _ in range(20)]
    with closing(ppo.Environments(replace(FATES, vec=vec))) as envs:
        assert envs.restore(state)
        for name in ("observations", "returns", "lengths", "discounted"):
            assert np.array_equal(getattr(envs, name), state[name])
        for then in expected:
            now = envs.step(np.ones((4, 2), np.float32))
            assert all(np.array_equal(a, b) for a, b in zip(then[:4], now[:4], strict=True)) and then[4] == now[4]


def test_processes_end_when_the_trainer_does_whoever_is_interrupted():
    """Ctrl-C reaches all of them."""
    with closing(ppo.Environments(replace(FATES, vec="async"))) as envs:
        for number in (signal.SIGINT, signal.SIGTERM):
            for worker in envs.envs.processes:
                os.kill(worker.pid, number)
        envs.step(np.zeros((4, 2), np.float32))


def test_a_process_that_ended_by_itself_is_named(capsys):
    envs = ppo.Environments(replace(FATES, vec="async"))
    envs.envs.processes[1].kill()
    envs.close()
    assert capsys.readouterr().err == "ppo_continuous.py: the process of environment 1 ended by itself\n"


def test_an_episode_is_of_the_actions_that_were_taken():
    with closing(ppo.TrainEnv(FATES)) as env:
        env.reset(seed=0)
        action = np.ones(2, np.float32)
        env.step(action)
        action *= 0
        assert env.episode[1].tolist() == [1, 1]


def test_processes_compute_as_the_trainer_does():
    for vec in ("sync", "async"):
        with closing(ppo.Environments(replace(SMALL, env_id="tests.envs:Halves-v0", vec=vec))) as envs:
            torch.set_flush_denormal(True)  # as training does, once it has its environments
            paid = [envs.step(np.zeros((4, 1), np.float32))[1].copy() for _ in range(200)]
            torch.set_flush_denormal(False)
        assert np.sum(paid, 0).tolist() == [126.0] * 4


def test_episodes_that_do_not_replay_begin_anew():
    args = replace(SMALL, env_id="Pendulum-v1")
    with closing(ppo.Environments(args)) as envs:
        for _ in range(5):
            envs.step(np.ones((4, 1), np.float32))
        state = envs.state()
    other = [(seed, -actions) for seed, actions in state["episodes"]]
    with closing(ppo.Environments(args)) as envs:
        for changed in (
            {"episodes": other},
            {"observations": state["observations"] + 1},
            {"returns": state["returns"] + 1},
        ):
            assert not envs.restore(state | changed)
            assert not envs.lengths.any() and not envs.returns.any() and not envs.discounted.any()
            assert not np.array_equal(envs.observations, state["observations"])
        assert envs.restore(state)


def test_an_episode_that_ends_while_it_is_replayed_begins_anew():
    with closing(ppo.Environments(FATES)) as envs:
        state = envs.state()
        longer = [(seed, torch.ones(20, 2)) for seed, _ in state["episodes"]]
        assert not envs.restore(state | {"episodes": longer})
        assert not envs.lengths.any() and not envs.observations[:, 1].any()


# ------------------------------------------------------------------------------------------------------------- train


def test_what_changes_when(small, monkeypatch):
    """The normaliser after the update and only then, the learning rate before it, all from the rollout's own steps."""
    seen = []

    def spy(name: str, look) -> None:
        function = getattr(ppo, name)

        def wrapped(*arguments):
            result = function(*arguments)
            seen.append((name, look(arguments, result)))
            return result

        monkeypatch.setattr(ppo, name, wrapped)

    def moments(agent: ppo.Agent) -> tuple:
        return agent.moments.count.item(), agent.moments.mean.clone(), agent.return_moments.count.item()

    spy("collect", lambda arguments, rollout: (arguments[3], moments(arguments[1]), rollout))
    spy("update", lambda arguments, _: (moments(arguments[0]), arguments[2].learning_rate.clone()))
    spy("generalised_advantages", lambda arguments, _: arguments)
    args = replace(small, learning_rate=0.01, critic_lr_ratio=2.0, gamma=0.93, gae_lambda=0.6)
    run = train(args)

    rollouts = [look for name, look in seen if name == "collect"]
    assert [step for step, _, _ in rollouts] == [0, 128, 256, 384]
    assert [counts[0] for _, counts, _ in rollouts] == [0, 128, 256, 384]
    everything = np.concatenate([rollout.observations for _, _, rollout in rollouts[:3]]).reshape(-1, 2, 2)
    np.testing.assert_allclose(rollouts[3][1][1], everything.mean(0))

    updates = [look for name, look in seen if name == "update"]
    assert len(updates) == 4 * 2 * 4
    for number, ((count, mean, paid), rates) in enumerate(updates):
        iteration = number // 8
        assert count == 128 * iteration and paid == 128 * (iteration + 1)
        assert torch.equal(mean, rollouts[iteration][1][1])
        rate = 0.01 * (1 - iteration / 4)
        assert sorted(rates.unique().tolist()) == pytest.approx([rate, 2 * rate])
    for row in rows(run, "progress"):
        assert float(row["learning_rate"]) == pytest.approx(0.01 * (1 - (int(row["step"]) - 128) / 512))
    assert [int(row["updates"]) for row in rows(run, "progress")] == [8, 16, 24, 32]

    advantages = [look for name, look in seen if name == "generalised_advantages"]
    assert len(advantages) == 4 * 2 and {look[5:] for look in advantages} == {(0.93, 0.6)}
    for number, (_, _, _, terminated, ended, *_) in enumerate(advantages):
        rollout = rollouts[number // 2][2]
        assert terminated is rollout.terminated and ended is rollout.ended


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of such numbers
def test_rewards_that_cannot_be_squared_stop_the_run(small, capsys):
    with pytest.raises(SystemExit, match="1"):
        train(replace(small, env_id="tests.envs:Kinds-v0", env_kwargs='{"pays": "much"}'))
    assert "not finite" in capsys.readouterr().err


def test_returns_that_never_vary_are_no_reason_to_stop(small):
    run = train(replace(small, env_id="tests.envs:Clock-v0", gamma=0.0))
    assert len(rows(run, "progress")) == 4


def test_without_compiling_it_runs_the_update_and_with_it_what_was_compiled(small, monkeypatch):
    calls, update = [], ppo.update
    compiled = lambda *arguments: (calls.append(1), update(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(ppo, "compile_update", lambda *_: compiled)
    train(small)
    assert not calls
    train(replace(small, compile=True))
    assert len(calls) == 32


def test_evaluation_plays_fresh_environments_with_fixed_seeds(small, monkeypatch):
    played, play = [], ppo.play

    def watched(policy: ppo.Policy, env: gym.Env, seed: int) -> tuple[float, int]:
        played.append((env, seed, policy))
        return play(policy, env, seed)

    monkeypatch.setattr(ppo, "play", watched)
    run = train(replace(small, num_evals=2, eval_episodes=3))
    envs, seeds, policies = zip(*played, strict=True)
    assert seeds == (10_000, 10_001, 10_002) * 2 and len(set(map(id, envs))) == 6 and len(set(policies)) == 2
    assert [int(row["step"]) for row in rows(run, "evaluations")] == [256] * 3 + [512] * 3


def test_training_moves_the_critic_at_a_rate_of_its_own(small):
    args = replace(small, critic_lr_ratio=1e-12)
    short, long = (
        torch.load(train(replace(args, total_timesteps=steps)) / "checkpoint.pt", weights_only=True)["agent"]
        for steps in (128, 512)
    )
    for name in (name for name in short if name.startswith(("actor", "critic", "log_std"))):
        moved = (short[name] - long[name]).abs().max()
        assert moved < 1e-9 if name.startswith("critic") else moved > 1e-6, name


def test_learns_to_mirror(small):
    args = replace(small, total_timesteps=6400, learning_rate=0.01, update_epochs=5, gamma=0.0, num_evals=1)
    run = train(replace(args, num_steps=64, eval_episodes=10))
    returns = [float(row["return"]) for row in rows(run, "evaluations")]
    assert np.mean(returns) > -0.7  # the best constant action has -3.3


@pytest.mark.parametrize("num_envs", [1, 3, 16, 24, 64, 100, 128])
def test_default_rollouts_divide(num_envs):
    args, envs, _ = ppo.prepare(replace(Args(), env_id="Pendulum-v1", num_envs=num_envs))
    envs.close()
    assert num_envs * args.num_steps % 64 == 0 and 1000 < num_envs * args.num_steps <= 3200


@pytest.mark.parametrize(("env_id", "steps"), [("Pendulum-v1", 384), ("HalfCheetah-v4", 1024), ("Ant-v4", 1024)])
def test_the_more_actions_the_longer_a_rollout(small, env_id, steps):
    args, envs, _ = ppo.prepare(replace(small, env_id=env_id, num_steps=None, total_timesteps=4096))
    envs.close()
    assert args.num_steps == steps  # 1536 and, at most, 4096 over 4


def test_the_config_holds_the_rollouts_length(small):
    run = train(replace(small, num_steps=None, total_timesteps=3072, update_epochs=1))
    assert yaml.safe_load((run / "config.yaml").read_text())["num_steps"] == 768


# ------------------------------------------------------------------------------------------------------------ policy


def test_a_value_is_in_the_environments_own_rewards():
    agent = agent_of()
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 3)))
    agent.return_moments.update(np.random.default_rng(1).normal(0, 7, 50))
    policy = ppo.Policy(SMALL, agent)
    observations = np.random.default_rng(2).normal(size=(5, 3))
    inputs = torch.tensor(agent.moments.normaliser()(observations))
    expected = agent.critic(inputs).squeeze(-1) * agent.return_moments.deviation()
    np.testing.assert_allclose(policy.value(observations), expected, rtol=1e-5)
    assert policy.discount == SMALL.gamma and policy.bootstraps == ("truncated",)


def test_a_policy_acts_as_the_mean_does_and_samples_around_it():
    torch.manual_seed(0)
    agent = agent_of(low=[-2, 0], high=[2, 1])
    agent.moments.update(np.random.default_rng(0).normal(2, 3, (50, 3)))
    agent.log_std.copy_(torch.tensor([-2.0, -3.0]))
    policy, observation = ppo.Policy(SMALL, agent), np.array([1.0, 2.0, -3.0])
    mean = agent.actor(torch.tensor(agent.moments.normaliser()(observation[None])))[0].numpy()
    np.testing.assert_allclose(policy(observation), mean * [2, 0.5] + [0, 0.5], rtol=1e-4)
    samples = policy(np.tile(observation, (4000, 1)), sample=True)
    np.testing.assert_allclose(samples.mean(0), policy(observation), atol=0.02)
    np.testing.assert_allclose(samples.std(0), np.exp([-2, -3]) * [2, 0.5], rtol=0.05)


def test_a_policy_does_not_depend_on_where_its_observations_lie():
    policy = ppo.Policy(replace(SMALL, norm_obs=False), agent_of(replace(SMALL, norm_obs=False), 17))
    data, answers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32), set()
    for offset in range(0, 64, 4):
        memory = np.empty(data.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        observations = memory[start : start + data.nbytes].view(np.float32).reshape(2, 17)
        observations[:] = data
        answers.add(policy(observations).tobytes())
    assert len(answers) == 1


def test_a_loaded_policy_is_the_one_that_was_trained(small, monkeypatch):
    kept, evaluate = [], ppo.evaluate

    def keep(args, run, agent, step, progress):
        observations = np.random.default_rng(step).normal(size=(50, 2, 2))
        kept.append((step, observations, ppo.Policy(args, agent)(observations)))
        evaluate(args, run, agent, step, progress)

    monkeypatch.setattr(ppo, "evaluate", keep)
    run = train(replace(small, num_evals=2, learning_rate=0.01))
    for step, observations, actions in kept:
        assert np.array_equal(load_policy(run / "policies" / f"step-{step:09d}.pt")(observations), actions)
    assert np.array_equal(load_policy(str(run / "checkpoint.pt"))(observations), actions)


# ----------------------------------------------------------------------------------------------------------- EnvPool


def test_envpool_learns_from_true_last_observations_and_says_what_it_cannot_restore(small, capsys, monkeypatch):
    envpool = pytest.importorskip("envpool")
    args = replace(small, env_id="Hopper-v4", vec="envpool")
    with closing(ppo.EnvPool(args)) as envs:
        for _ in range(100):
            observations, _, terminated, truncated, finished = envs.step(np.ones((4, 3), np.float32))
            over = terminated | truncated
            assert len(finished) == over.sum()
            if over.any():
                fallen = (observations[over, 0] < 0.8) | (np.abs(observations[over, 1]) > 0.15)
                assert fallen.any() and np.abs(envs.observations[over] - [1.25, *np.zeros(10)]).max() < 0.01

    seeds, make = [], envpool.make
    monkeypatch.setattr(envpool, "make", lambda *a, seed, **kw: seeds.append(seed) or make(*a, seed=seed, **kw))
    run: Path = train(replace(args, seed=2**31 - 1))
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    train(ppo.parse(["--resume", str(run)]))
    assert "could not be restored exactly" in capsys.readouterr().out
    assert len({seed for each in seeds for seed in each}) == 8  # those that begin anew are not the run's first again
    for seed in (1, 2):
        ppo.EnvPool(replace(args, seed=seed)).close()
    assert len({*seeds[-2], *seeds[-1]}) == 8  # nor is seed 2 most of seed 1


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_settings_are_read(path):
    settings = yaml.safe_load(path.read_text())
    args = ppo.parse(["--config", str(path)])
    assert {name: getattr(args, name) for name in settings} == settings


def test_networks_and_normalisers_are_as_they_are_set():
    args = replace(SMALL, actor_sizes=(8,), critic_sizes=(32, 16), norm_obs=False)
    agent = agent_of(args)
    assert [layer.out_features for layer in agent.actor[::2]] == [8, 2]
    assert [layer.out_features for layer in agent.critic[::2]] == [32, 16, 1]
    assert (agent.moments.enabled, agent.return_moments.enabled) == (False, True)


def test_what_is_left_is_told_by_the_present_pace():
    said = []
    run = SimpleNamespace(progress={"recent": [1.0, 3.0]}, said=-np.inf, say=said.append)
    ppo.Run.show(run, {"step": 250_000, "sps": 4999.7}, 1_000_000, "KL")
    assert "250,000  25%  5,000 steps/s  ETA 0:02:30  return 2.0  KL" in said[0]
