"""What is different about discrete actions: the distribution, the numbers that actions have, and how both are used."""

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import ppo_discrete as ppo
from ppo_discrete import Args, train
from tests.marks import needs_compiler
from tests.test_promises import rows

SMALL = Args(
    env_id="tests.envs:Echo-v0",
    num_envs=4,
    num_steps=32,
    total_timesteps=512,
    num_minibatches=4,
    update_epochs=2,
    num_evals=0,
    eval_episodes=2,
    compile=False,
)
SPACES = {
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 5, 3], start=[-3, 0, 7]),
    "Discrete": gym.spaces.Discrete(4, start=-1),
}


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


@pytest.fixture(params=SPACES)
def space(request) -> gym.Space:
    return SPACES[request.param]


def sizes_of(space: gym.Space) -> np.ndarray:
    return np.ravel(space.n if isinstance(space, gym.spaces.Discrete) else space.nvec)


def agent_of(space: gym.Space, args: Args = SMALL, observation: int = 3) -> ppo.Agent:
    torch.manual_seed(0)
    agent = ppo.Agent(args, (observation,), *ppo.bounds_of(space)).requires_grad_(False)
    agent.actor[-1].weight *= 300  # no longer nearly uniform
    return agent


def learner_of(agent: ppo.Agent, rate: float = 0.0) -> ppo.Learner:
    learner = ppo.Learner.of(agent, "cpu")
    return learner._replace(learning_rate=torch.full_like(learner.theta, rate))


def parts_of(agent: ppo.Agent, space: gym.Space, observations: torch.Tensor) -> list[Categorical]:
    """The distribution of each part, of which the actor's outputs are K logits, some for choices that it lacks."""
    outputs = agent.actor(observations).unflatten(-1, (-1, max(sizes_of(space))))
    return [Categorical(logits=outputs[..., i, :size]) for i, size in enumerate(sizes_of(space))]


def random_batch(agent: ppo.Agent, space: gym.Space, size: int = 64) -> ppo.Batch:
    torch.manual_seed(0)
    observations = torch.randn(size, 3)
    actions = torch.from_numpy(np.random.default_rng(0).integers(0, sizes_of(space), (size, len(sizes_of(space)))))
    logits, values = agent(observations)
    logprobs = ppo.log_prob(logits, actions) + 0.3 * torch.randn(size)
    old_values, advantages, returns = values + 0.3 * torch.randn(size), *torch.randn(2, size)
    return ppo.Batch(observations, actions, logprobs, old_values, advantages, returns)


# -------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (gym.spaces.Discrete(3), 0, 2),
        (gym.spaces.Discrete(256, start=-128, dtype=np.int16), -128, 127),
        (
            gym.spaces.MultiDiscrete([[2, 3], [4, 2]], np.int8, start=[[0, -1], [1, 4]]),
            [[0, -1], [1, 4]],
            [[1, 1], [4, 5]],
        ),
        (gym.spaces.MultiDiscrete([127, 100], np.int8, start=[1, -100]), [1, -100], [127, -1]),
        (gym.spaces.MultiDiscrete([200], np.uint8, start=[50]), [50], [249]),
    ],
)
def test_actions_are_the_numbers_of_their_space(space, low, high):
    agent = ppo.Agent(SMALL, (3,), *ppo.bounds_of(space))
    assert (agent.low.tolist(), agent.high.tolist()) == (low, high)
    sizes = np.ravel(high).astype(int) - np.ravel(low) + 1
    assert agent.shape == (len(sizes), sizes.max())
    actions = agent.for_environment(np.array([0 * sizes, sizes - 1]))
    assert actions.tolist() == [low, high] and actions.dtype == space.dtype and all(map(space.contains, actions))


@pytest.mark.parametrize(("clip_vloss", "norm_adv"), [(True, True), (False, False)])
def test_loss_equals_the_papers(space, clip_vloss, norm_adv):
    args = Args(ent_coef=0.01, vf_coef=0.3, clip_coef=0.1, clip_vloss=clip_vloss, norm_adv=norm_adv)
    agent = agent_of(space, args)
    batch = random_batch(agent, space)
    loss, (policy_loss, value_loss, entropy, kl, clipped) = ppo.ppo_loss(
        dict(agent.named_parameters()), agent, args, batch
    )

    parts, values = parts_of(agent, space, batch.observations), agent.critic(batch.observations).squeeze(-1)
    logprobs = sum(part.log_prob(batch.actions[:, i]) for i, part in enumerate(parts))
    ratio, advantages = (logprobs - batch.logprobs).exp(), batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.1), batch.values + 0.1)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * (errors.max(0).values if clip_vloss else errors[0]).mean())
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts).mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(clipped, ((ratio < 0.9) | (ratio > 1.1)).float().mean())
    torch.testing.assert_close(loss, policy_loss + 0.3 * value_loss - 0.01 * entropy)


def test_choices_that_a_part_lacks_stay_as_they_are():
    space = SPACES["MultiDiscrete"]
    agent, lacking = agent_of(space), np.arange(5) >= sizes_of(space)[:, None]
    batch, learner = random_batch(agent, space), learner_of(agent, rate=0.1)
    before = {name: value.clone() for name, value in agent.named_parameters()}
    for _ in range(20):
        ppo.update(agent, Args(ent_coef=1.0), learner, batch, torch.arange(64))
    for name in ("actor.4.weight", "actor.4.bias"):
        moved = (agent.get_parameter(name) - before[name]).view(3, 5, -1).abs().sum(-1).numpy()
        assert (moved[lacking] == 0).all() and (moved[~lacking] > 0).all()
    assert (agent.logits(batch.observations).exp()[:, lacking] == 0).all()


def test_a_policy_takes_the_likeliest_choice_and_samples_by_the_probabilities(space):
    agent, observation = agent_of(space), np.ones(3)
    policy = ppo.Policy(replace(SMALL, norm_obs=False), agent)
    parts = parts_of(agent, space, torch.ones(3))
    expected = np.reshape([part.probs.argmax() for part in parts], space.shape) + space.start
    assert np.array_equal(policy(observation), expected) and policy(observation) in space
    samples = policy(np.tile(observation, (20_000, 1)), sample=True) - space.start
    for part, drawn in zip(parts, samples.reshape(20_000, -1).T, strict=True):
        frequencies = np.bincount(drawn, minlength=len(part.probs)) / 20_000
        np.testing.assert_allclose(frequencies, part.probs, atol=0.015)
        assert 1.2 / len(part.probs) < part.probs.max() < 0.98


@needs_compiler
def test_the_compiled_update_is_the_update():
    space, args = SPACES["MultiDiscrete"], replace(SMALL, num_envs=4, num_steps=16, num_minibatches=2, ent_coef=0.01)
    agent = agent_of(space, args)
    batch, learner, said = random_batch(agent, space), learner_of(agent, rate=1e-3), []
    fast = ppo.compile_update(args, agent, learner, SimpleNamespace(say=said.append), ())
    assert "compiled in" in said[-1] and not torch.count_nonzero(learner.first_moment)
    indices, start = torch.randperm(64)[:32], [tensor.clone() for tensor in learner]
    measures = fast(agent, args, learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    torch.testing.assert_close(ppo.update(agent, args, learner, batch, indices), measures)
    torch.testing.assert_close(learner.theta, compiled)


# ----------------------------------------------------------------------------------------------- from steps to batches

TURNS = replace(SMALL, env_id="tests.envs:Turns-v0", num_steps=200, norm_obs=False)


@pytest.fixture(scope="module")
def played() -> tuple[ppo.Agent, gym.Space, ppo.Rollout]:
    """A rollout of an environment that pays the sum of an action's parts, the seed / 100 and the time."""
    with closing(ppo.make_eval_env(TURNS)) as env:
        agent = agent_of(env.action_space, TURNS, observation=2)
    agent.actor[0].weight *= 0.001  # seeds are large, and should not make everything certain
    with closing(ppo.Environments(TURNS)) as envs:
        watch = ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0))
        return agent, env.action_space, ppo.collect(TURNS, agent, envs, 0, watch)


def test_what_is_kept_of_an_action_is_what_was_done(played):
    agent, space, rollout = played
    seed, t = rollout.observations[..., 0], rollout.observations[..., 1]
    assert rollout.actions.dtype == torch.int64 and rollout.actions.amin() == 0
    numbers = rollout.actions.numpy() + space.start
    np.testing.assert_allclose(rollout.rewards, numbers.sum(-1) + seed / 100 + t + 1)


def test_actions_are_drawn_by_the_policys_probabilities(played):
    agent, space, rollout = played
    for i, part in enumerate(parts_of(agent, space, rollout.inputs[:-1])):
        drawn = torch.nn.functional.one_hot(rollout.actions[..., i], len(part.probs[0, 0])).float()
        surprise = (drawn - part.probs).mean((0, 1)) / (part.probs * (1 - part.probs)).mean((0, 1)).sqrt()
        assert surprise.abs().max() < 4 / np.sqrt(800)
    assert len({tuple(actions.flatten().tolist()) for actions in rollout.actions}) > 20  # nor alike in all of them


def test_a_batch_has_each_steps_own(played):
    agent, space, rollout = played
    advantages, values = torch.randn(2, 200, 4)
    batch = ppo.batch_of(agent, rollout, advantages, values)
    for t, n in ((0, 0), (0, 3), (7, 2), (199, 3)):
        observation, action, logprob, value, advantage, target = (column[4 * t + n] for column in batch)
        assert torch.equal(observation, rollout.inputs[t, n]) and torch.equal(action, rollout.actions[t, n])
        parts = parts_of(agent, space, observation)
        torch.testing.assert_close(logprob, sum(part.log_prob(action[i]) for i, part in enumerate(parts)))
        assert (value, advantage) == (values[t, n], advantages[t, n])
        torch.testing.assert_close(target, advantages[t, n] + values[t, n])


# ------------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("env_id", ["Echo-v0", "Signs-v0"])
def test_learns_what_to_say_wherever_the_numbers_start(small, env_id):
    args = replace(small, env_id=f"tests.envs:{env_id}", total_timesteps=12_800, num_steps=64, num_evals=1)
    run = train(replace(args, learning_rate=5e-3, update_epochs=5, gamma=0.0, eval_episodes=10))
    assert np.mean([float(row["return"]) for row in rows(run, "evaluations")]) > 9  # of 10; at random less than 4


@pytest.mark.parametrize("num_envs", [1, 3, 16, 24, 64, 100, 128])
def test_default_rollouts_divide(num_envs):
    args, envs, _ = ppo.prepare(replace(Args(), num_envs=num_envs))
    envs.close()
    assert num_envs * args.num_steps % 64 == 0 and 3200 <= num_envs * args.num_steps <= 6400


def test_numbers_of_observations_are_seen_one_by_one(small):
    """FrozenLake's observation is one of 16 numbers, and no larger for being a later one."""
    args, envs, _ = ppo.prepare(replace(small, env_id="FrozenLake-v1"))
    with closing(envs):
        assert envs.observations.shape == (4, 16) and (envs.observations.sum(-1) == 1).all()


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_envpool_takes_the_actions(small):
    pytest.importorskip("envpool")
    with closing(ppo.EnvPool(replace(small, env_id="CartPole-v1", vec="envpool"))) as envs:
        for _ in range(5):
            observations, *_ = envs.step(np.array([0, 0, 1, 1]))
    assert (observations[:2, 1] < -0.5).all() and (observations[2:, 1] > 0.5).all()  # the cart's speed

    code = "import ppo_discrete as ppo; ppo.EnvPool(ppo.Args(vec='envpool')).close()"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
