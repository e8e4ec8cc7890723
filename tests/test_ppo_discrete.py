"""What is different about discrete actions: the distribution, the numbers that actions have, and how both are used."""

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from torch.distributions import Categorical

import ppo_discrete as ppo
from benchmark.evaluate import play
from ppo_discrete import Args, train
from tests.envs import Barred
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


UNMASKED = replace(SMALL, action_masks=False)


def agent_of(space: gym.Space, args: Args = UNMASKED, observation: int = 3) -> ppo.Agent:
    torch.manual_seed(0)
    agent = ppo.Agent(args, (observation,), *ppo.bounds_of(space)).requires_grad_(False)
    agent.actor[-1].weight *= 300  # no longer nearly uniform
    return agent


def learner_of(agent: ppo.Agent, rate: float = 0.0) -> ppo.Learner:
    learner = ppo.Learner.of(agent, "cpu")
    return learner._replace(learning_rate=torch.full_like(learner.theta, rate))


def parts_of(
    agent: ppo.Agent, space: gym.Space, observations: torch.Tensor, masks: torch.Tensor | None = None
) -> list[Categorical]:
    """The distribution of each part, of which the actor's outputs are K logits, some for choices that it lacks."""
    probs = agent.actor(observations).unflatten(-1, (-1, max(sizes_of(space)))).exp()
    probs = probs if masks is None else probs * masks
    return [Categorical(probs=probs[..., i, :size]) for i, size in enumerate(sizes_of(space))]


def random_batch(agent: ppo.Agent, space: gym.Space, size: int = 64) -> ppo.Batch:
    torch.manual_seed(0)
    observations = torch.randn(size, 3)
    actions = torch.from_numpy(np.random.default_rng(0).integers(0, sizes_of(space), (size, len(sizes_of(space)))))
    masks = torch.rand(size, *agent.mask_shape) < 0.6
    if masks.numel():
        masks.scatter_(-1, actions.unsqueeze(-1), True)
    logits, values = agent(observations, masks)
    logprobs = ppo.log_prob(logits, actions) + 0.3 * torch.randn(size)
    old_values, advantages, returns = values + 0.3 * torch.randn(size), *torch.randn(2, size)
    return ppo.Batch(observations, actions, masks, logprobs, old_values, advantages, returns)


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
@pytest.mark.parametrize("masked", [True, False])
def test_loss_equals_the_papers(space, masked, clip_vloss, norm_adv):
    args = Args(
        ent_coef=0.01, vf_coef=0.3, clip_coef=0.1, clip_vloss=clip_vloss, norm_adv=norm_adv, action_masks=masked
    )
    agent = agent_of(space, args)
    batch = random_batch(agent, space)
    loss, (policy_loss, value_loss, entropy, kl, clipped) = ppo.ppo_loss(
        dict(agent.named_parameters()), agent, args, batch
    )

    values = agent.critic(batch.observations).squeeze(-1)
    parts = parts_of(agent, space, batch.observations, batch.masks if masked else None)
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
        ppo.update(agent, replace(UNMASKED, ent_coef=1.0), learner, batch, torch.arange(64))
    for name in ("actor.4.weight", "actor.4.bias"):
        moved = (agent.get_parameter(name) - before[name]).view(3, 5, -1).abs().sum(-1).numpy()
        assert (moved[lacking] == 0).all() and (moved[~lacking] > 0).all()
    assert (agent.logits(batch.observations, batch.masks).exp()[:, lacking] == 0).all()


def test_a_policy_takes_the_likeliest_choice_and_samples_by_the_probabilities(space):
    agent, observation = agent_of(space), np.ones(3)
    policy = ppo.Policy(replace(UNMASKED, norm_obs=False), agent)
    parts = parts_of(agent, space, torch.ones(3))
    expected = np.reshape([part.probs.argmax() for part in parts], space.shape) + space.start
    assert np.array_equal(policy(observation), expected) and policy(observation) in space
    samples = policy(np.tile(observation, (20_000, 1)), sample=True) - space.start
    for part, drawn in zip(parts, samples.reshape(20_000, -1).T, strict=True):
        frequencies = np.bincount(drawn, minlength=len(part.probs)) / 20_000
        np.testing.assert_allclose(frequencies, part.probs, atol=0.015)
        assert 1.2 / len(part.probs) < part.probs.max() < 0.98


# ----------------------------------------------------------------------------------------------- from steps to batches

TURNS = replace(UNMASKED, env_id="tests.envs:Turns-v0", num_steps=200, norm_obs=False)


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
        observation, action, _, logprob, value, advantage, target = (column[4 * t + n] for column in batch)
        assert torch.equal(observation, rollout.inputs[t, n]) and torch.equal(action, rollout.actions[t, n])
        parts = parts_of(agent, space, observation)
        torch.testing.assert_close(logprob, sum(part.log_prob(action[i]) for i, part in enumerate(parts)))
        assert (value, advantage) == (values[t, n], advantages[t, n])
        torch.testing.assert_close(target, advantages[t, n] + values[t, n])


def test_epochs_of_minibatches_end_once_one_has_moved_too_far(played):
    agent, _, rollout = played
    rewards, learner = torch.ones(200, 4), learner_of(agent)
    before = learner.theta.clone()
    for recompute, target_kl, updates in ((True, None, 12), (False, None, 12), (True, 0.45, 5), (True, 0.1, 2)):
        calls = []

        def update(agent: ppo.Agent, _: Args, __: ppo.Learner, batch: ppo.Batch, indices: torch.Tensor) -> torch.Tensor:
            calls.append((indices.tolist(), batch.advantages, batch.values))  # noqa: B023
            agent.critic[-1].bias += 1
            return torch.tensor([1.0, 1.0, 1.0, 0.1, 1.0, 1.0]) * len(calls)  # noqa: B023

        args = replace(TURNS, update_epochs=3, num_minibatches=4, recompute_advantages=recompute, target_kl=target_kl)
        optimise = partial(ppo.run_epoch, args, agent, learner, update)
        measures = ppo.improve(args, agent, learner, rollout, rewards, optimise)
        learner.theta.copy_(before)
        indices, advantages, values = zip(*calls, strict=True)
        assert measures["updates"] == len(calls) == updates
        assert measures["approx_kl"] == pytest.approx(0.1 * np.mean(range(1, updates + 1)))
        assert all(len(each) == 200 for each in indices) and all(each is values[0] for each in values)
        if updates == 12:
            epochs = [sum(indices[i : i + 4], []) for i in (0, 4, 8)]
            assert all(sorted(epoch) == list(range(800)) for epoch in epochs) and epochs[0] != epochs[1]
            assert (
                torch.equal(advantages[0], advantages[3]) and torch.equal(advantages[0], advantages[4]) is not recompute
            )


# ------------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("env_id", ["Echo-v0", "Signs-v0"])
def test_learns_what_to_say_wherever_the_numbers_start(small, env_id):
    args = replace(small, env_id=f"tests.envs:{env_id}", total_timesteps=6400, num_steps=64, num_evals=1)
    run = train(replace(args, learning_rate=0.01, update_epochs=5, gamma=0.0, eval_episodes=10))
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


# ------------------------------------------------------------------------------------------------------ action masks

BARRED = replace(SMALL, env_id="tests.envs:Barred-v0", num_steps=60, norm_obs=False)
FORMS = ["row", "tuple", "single"]


def barred(form: str, args: Args = BARRED, **settings: object) -> Args:
    return replace(args, env_kwargs=json.dumps({"form": form}), **settings)


@pytest.mark.parametrize("vec", ["sync", "async"])
@pytest.mark.parametrize("form", FORMS)
def test_masks_are_those_of_the_states_acted_in(form, vec):
    """The environment itself fails where a forbidden action is done, and forbids all of them once it has ended."""
    args, envs, space = ppo.prepare(barred(form, vec=vec))
    agent = agent_of(space, args, observation=2)
    with closing(envs):
        rollout = ppo.collect(args, agent, envs, 0, ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0)))
    assert args.action_masks and rollout.ended.sum() > 10
    batch = ppo.batch_of(agent, rollout, *torch.zeros(2, 60, 4))
    assert torch.equal(batch.masks, rollout.masks.flatten(0, 1))
    parts = parts_of(agent, space, batch.observations, batch.masks)
    torch.testing.assert_close(batch.logprobs, sum(part.log_prob(batch.actions[:, i]) for i, part in enumerate(parts)))
    for seed_and_t, masks, actions in zip(
        rollout.observations.reshape(-1, 2), rollout.masks.flatten(0, 1), rollout.actions.flatten(0, 1), strict=True
    ):
        parts = Barred.allowed(*seed_and_t.astype(int))[-len(masks) :]
        for mask, part, action in zip(masks, parts, actions, strict=True):
            assert mask.tolist() == [*part.tolist(), *[0] * (len(mask) - len(part))] and mask[action]


def test_a_million_actions_are_allowed_and_drawn_by_the_probabilities_that_are_left():
    space, args = SPACES["MultiDiscrete"], replace(SMALL, num_envs=20_000, num_steps=50, norm_obs=False)
    agent = agent_of(space, args)
    masks = np.array([[1, 0, 1, 0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0, 1, 1]] * 10_000, np.int8)
    observations, nothing = np.ones((20_000, 3)), np.zeros(20_000, bool)
    envs = SimpleNamespace(observations=observations, envs=SimpleNamespace(get_attr=lambda _: list(masks)))
    envs.step = lambda actions: (observations, nothing, nothing, nothing, [])
    rollout = ppo.collect(args, agent, envs, 0, ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0)))
    assert rollout.masks.gather(-1, rollout.actions.unsqueeze(-1)).all() and rollout.actions.numel() == 3_000_000
    for kind in (0, 1):
        actions, masks = rollout.actions[:, kind::2].flatten(0, 1), rollout.masks[0, kind]
        for i, part in enumerate(parts_of(agent, space, torch.ones(3), masks)):
            frequencies = np.bincount(actions[:, i], minlength=len(part.probs)) / 500_000
            np.testing.assert_allclose(frequencies, part.probs, atol=0.003)
            assert not frequencies[~masks[i, : len(frequencies)]].any()


def test_what_is_masked_has_no_gradient_and_the_rest_has(space):
    class Table(torch.nn.Module):
        """An actor whose outputs are its parameters, a row for each sample."""

        def __init__(self, outputs: torch.Tensor):
            super().__init__()
            self.outputs = torch.nn.Parameter(outputs)

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return self.outputs

    args = replace(SMALL, ent_coef=0.1)
    agent = agent_of(space, args)
    batch = random_batch(agent, space)
    agent.actor = Table(agent.actor(batch.observations))
    loss, _ = ppo.ppo_loss(dict(agent.named_parameters()), agent, args, batch)
    assert loss.isfinite()
    loss.backward()
    gradient = agent.actor.outputs.grad.view(64, *agent.shape)
    allowed = batch.masks & torch.from_numpy(agent.exist)
    several = allowed & (allowed.sum(-1, keepdim=True) > 1)
    assert (gradient[~allowed] == 0).all() and (gradient[several] != 0).all() and (~allowed).any() and several.any()


def test_a_policy_takes_the_likeliest_of_what_is_allowed(space):
    args = replace(SMALL, norm_obs=False, env_id="Maze-v0")
    agent = agent_of(space, args)
    policy, observations, sizes = (
        ppo.Policy(args, agent),
        np.random.default_rng(0).normal(size=(50, 3)),
        sizes_of(space),
    )
    masks = np.random.default_rng(1).random((50, sum(sizes))) < 0.5
    masks[:, np.cumsum(sizes) - 1] = True  # the last choice of every part
    ends = np.cumsum(sizes)[:-1]
    alone = [policy(*pair, mask=mask) for *pair, mask in zip(observations, masks, strict=True)]
    for observation, mask, action in zip(observations, masks, alone, strict=True):
        parts = parts_of(agent, space, torch.tensor(observation, dtype=torch.float32))
        split = np.split(mask, ends)
        best = [np.where(its, part.probs, 0).argmax() for its, part in zip(split, parts, strict=True)]
        assert np.array_equal(np.ravel(action - space.start), best)
        assert np.array_equal(policy(observation, mask=tuple(map(np.int8, split))), action)
        assert all(
            its[c] for its, c in zip(split, np.ravel(policy(observation, True, mask) - space.start), strict=True)
        )
    assert np.array_equal(policy(observations, mask=masks), alone)

    nothing = np.arange(sum(sizes)) >= sizes[0]  # of the first part
    for wrong, told in ((None, "is None"), (masks[0, 1:], "values"), (nothing, "allows no action")):
        with pytest.raises(ValueError, match=f"Maze-v0: an info's action_mask .*{told}"):
            policy(observations[0], mask=wrong)
    with pytest.raises(ValueError):
        policy(observations, mask=masks[1:])


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_policy_is_evaluated_as_it_was_in_the_run(small, form):
    run = train(barred(form, replace(small, env_id=BARRED.env_id, num_evals=1, eval_episodes=5)))
    args = Args(**yaml.safe_load((run / "config.yaml").read_text()))
    policy, seeds = ppo.load_policy(run / "checkpoint.pt"), list(range(10_000, 10_005))
    envs = [ppo.make_eval_env(args) for _ in seeds]
    episodes = play(policy, envs, seeds, sample=False, values=True)
    assert [str(episode.total) for episode in episodes] == [row["return"] for row in rows(run, "evaluations")]
    assert play(policy, envs, seeds, sample=True, values=False)


@pytest.mark.parametrize(
    ("env_id", "masks", "heeded"), [("Taxi-v4", True, True), ("Taxi-v4", False, False), ("CartPole-v1", True, False)]
)
def test_masks_are_heeded_where_there_are_any_unless_they_are_ignored(small, env_id, masks, heeded, monkeypatch):
    given, call = set(), ppo.Policy.__call__

    def watched(policy: ppo.Policy, observations: np.ndarray, sample: bool = False, mask=None) -> np.ndarray:
        given.add(mask is not None)
        return call(policy, observations, sample, mask)

    monkeypatch.setattr(ppo.Policy, "__call__", watched)
    run = train(replace(small, env_id=env_id, action_masks=masks, total_timesteps=128, num_evals=1, eval_episodes=1))
    assert yaml.safe_load((run / "config.yaml").read_text())["action_masks"] is heeded
    assert ppo.load_policy(run / "checkpoint.pt").masked is heeded
    assert (", masked" in (run / "run.log").read_text()) is heeded and given == {heeded}


def test_an_environment_that_allows_nothing_is_named(small, capsys):
    args = replace(small, env_id=BARRED.env_id)
    with pytest.raises(SystemExit, match="2"):
        train(replace(args, env_kwargs='{"stuck": 0}'))
    assert "tests.envs:Barred-v0: an info's action_mask allows no action" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ppo.prepare(replace(BARRED, env_id="tests.envs:Once-v0", env_kwargs="{}"))
    assert "action_mask must have 2 values" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tests.envs:Barred-v0: an info's action_mask allows no action"):
        train(replace(args, env_kwargs='{"stuck": 2}'))


def test_masks_that_evaluation_lacks_or_envpool_does_not_give_are_refused(small, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "find_spec", lambda name: True)
    with pytest.raises(SystemExit, match="2"):
        train(replace(small, env_id="Taxi-v4", vec="envpool"))
    assert "--env-id Taxi-v4 --vec envpool: EnvPool gives no action masks" in capsys.readouterr().err
    make = ppo.make_eval_env
    monkeypatch.setattr(
        ppo, "make_eval_env", lambda args, **kw: make(replace(args, env_id="tests.envs:Turns-v0"), **kw)
    )
    with pytest.raises(SystemExit, match="2"):
        train(replace(small, env_id="tests.envs:Barred-v0"))
    assert "evaluation does not have the spaces and masks of training" in capsys.readouterr().err
