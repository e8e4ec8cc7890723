"""The Beta policy against independent computations, images from environments to gradients, and how both are wired."""

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from torch.distributions import AffineTransform, Beta, TransformedDistribution, kl_divergence

import ppo_beta as ppo
from ppo_beta import Args, load_policy, make_eval_env, train
from tests.envs import Fates
from tests.test_promises import rows, same

SCRIPT = Path(ppo.__file__)
CONFIGS = SCRIPT.parent / "configs" / "ppo_beta"
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
IMAGES = replace(SMALL, env_id="tests.envs:Filmed-v0", frame_stack=2, grayscale=True, action_repeat=3, resize=16)


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def images(tmp_path):
    return replace(IMAGES, runs_dir=str(tmp_path / "runs"))


def agent_of(args: Args = SMALL, shape: tuple[int, ...] = (3,), action: int = 2, low=-1.0, high=1.0) -> ppo.Agent:
    bounds = (np.broadcast_to(np.float32(bound), action) for bound in (low, high))
    return ppo.Agent(args, shape, *map(np.array, bounds)).requires_grad_(False)


def random_inputs(shape: tuple[int, ...], count: int) -> torch.Tensor:
    if len(shape) == 3:
        return torch.randint(256, (count, int(np.prod(shape))), dtype=torch.uint8)
    return torch.randn(count, *shape)


# ----------------------------------------------------------------------------------------------------- distribution


def some_policies(count: int = 200, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    raw = 3 * torch.randn(2, count, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return tuple(torch.nn.functional.softplus(raw) + 1)


def draw(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ppo.draw(alpha.detach().numpy(), beta.detach().numpy()))


def test_densities_and_entropy_are_the_beta_distributions():
    alpha, beta = some_policies()
    reference, actions = Beta(alpha, beta), draw(alpha, beta)
    expected = reference.log_prob(actions).sum(-1)
    torch.testing.assert_close(ppo.log_prob(alpha, beta, actions), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ppo.entropy_of(alpha, beta), reference.entropy().sum(-1), rtol=1e-4, atol=1e-4)


def test_the_normaliser_is_exact_where_float32_is():
    generator = torch.Generator().manual_seed(0)
    for largest, tolerance in ((1, 5e-6), (10, 2e-5), (1e3, 2e-3), (1e5, 0.2)):
        alpha, beta = 1 + largest * torch.rand((2, 10_000), generator=generator)
        a, b = alpha.double(), beta.double()
        exact = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        torch.testing.assert_close(ppo.log_beta(a, b), exact, atol=2e-7, rtol=0)
        torch.testing.assert_close(ppo.log_beta(alpha, beta).double(), exact, atol=tolerance, rtol=0)
        torch.testing.assert_close(ppo.digamma(alpha), torch.digamma(alpha), atol=5e-6, rtol=0)


def test_samples_are_beta_distributed_and_reproducible():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    for alpha, beta in ((1.0, 1.0), (1.7, 1.7), (1.01, 8.0), (400.0, 20.0)):
        actions = draw(torch.full((50_000,), alpha), torch.full((50_000,), beta))
        assert stats.kstest(actions.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3
    state = torch.get_rng_state()
    first = draw(*some_policies())
    torch.set_rng_state(state)
    assert torch.equal(draw(*some_policies()), first)


def test_gradients_are_those_of_differences():
    alpha, beta = (parameter.requires_grad_() for parameter in some_policies(5, torch.float64))
    actions = torch.linspace(0.01, 0.99, 15, dtype=torch.float64).view(5, 3)
    assert torch.autograd.gradcheck(ppo.entropy_of, (alpha, beta))
    assert torch.autograd.gradcheck(ppo.log_prob, (alpha, beta, actions))


@pytest.mark.parametrize("outputs", [(-1e4, 1e6), (1e6, -1e4), (1e6, 1e6), (-1e4, -1e4), (0.0, 30.0)])
def test_nothing_breaks_at_the_edges(outputs):
    torch.manual_seed(0)
    agent = agent_of(action=1)
    agent.actor[-1].weight.zero_()
    agent.actor[-1].bias.copy_(torch.tensor(outputs)).requires_grad_()
    alpha, beta, _ = agent(torch.zeros(1000, 3))
    assert alpha.min() >= 1 and beta.min() >= 1
    actions = draw(alpha, beta)
    assert actions.min() > 0 and actions.max() < 1
    for edge in (actions, torch.full_like(actions, 2**-24), torch.full_like(actions, 1 - 2**-24)):
        logprob = ppo.log_prob(alpha, beta, edge)
        wanted = logprob.sum() + ppo.entropy_of(alpha, beta).sum()
        (gradient,) = torch.autograd.grad(wanted, agent.actor[-1].bias, retain_graph=True)
        assert logprob.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_fill_the_bounds_and_never_leave_them(dtype):
    low = np.array([[-0.1, -1.0], [0.0, -1000.1]], dtype)
    high = np.array([[0.3, 2.0], [1e5, 0.3]], dtype)
    edges = [[[1 - 2**-24] * 4], [[0.0] * 4], [[1.0] * 4]]
    units = np.concatenate((np.random.default_rng(0).random((100_000, 4)), *edges)).astype(np.float32)
    actions = ppo.Agent(SMALL, (3,), low, high).for_environment(units)
    assert actions.dtype == dtype and (actions >= low).all() and (actions <= high).all()
    np.testing.assert_array_equal(actions[-2], low)
    np.testing.assert_array_equal(actions[-1], high)
    np.testing.assert_allclose(actions[:-3].mean(0), (low + high) / 2, rtol=0.02, atol=0.01)


def test_the_density_of_scaled_actions_differs_by_a_constant():
    """Which no ratio of probabilities contains: that of the unit cube is as good."""
    alpha, beta = (parameter[:, :2] for parameter in some_policies())
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0])
    actions = draw(alpha, beta)
    scaled = TransformedDistribution(Beta(alpha, beta), AffineTransform(low, high - low))
    played = torch.from_numpy(agent_of(low=low, high=high).for_environment(actions.numpy()))
    expected = scaled.log_prob(played).sum(-1) + (high - low).log().sum()
    torch.testing.assert_close(ppo.log_prob(alpha, beta, actions), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ networks and loss


@pytest.mark.parametrize("shape", [(17,), (16, 16, 3)])
def test_a_step_is_taken_by_the_policy_that_is_updated(shape):
    torch.manual_seed(0)
    agent = agent_of(SMALL, shape, 6)
    agent.actor[-1].bias.copy_(torch.linspace(-30, 30, 12))
    inputs = random_inputs(shape, 16)
    alpha, beta, values = agent(inputs)
    for acted, updated in zip(agent.acting()(inputs.numpy()), (alpha, beta), strict=True):
        np.testing.assert_allclose(acted, updated, rtol=1e-5)
    assert alpha[:, 0].max() < 1.1 and 20 < beta[:, -1].min() < beta.max() < 40
    torch.testing.assert_close(agent.value(inputs.view(2, 8, -1)), values.view(2, 8))


def test_values_are_computed_in_parts_small_enough_for_images(monkeypatch):
    agent, seen = agent_of(SMALL, (8, 8, 1)), []
    monkeypatch.setattr(agent.encoder, "forward", lambda part: (seen.append(len(part)), torch.zeros(len(part), 256))[1])
    agent.critic = torch.nn.Linear(256, 1)
    assert agent.value(torch.zeros(3, 700, 64, dtype=torch.uint8)).shape == (3, 700) and seen == [1024, 1024, 52]
    assert agent.value(torch.zeros(0, 64, dtype=torch.uint8)).shape == (0,)


def test_bf16_is_nearly_fp32():
    torch.manual_seed(0)
    agent = agent_of(SMALL, (48, 40, 4), 3)
    images = random_inputs((48, 40, 4), 32)
    exact = agent(images)
    agent.encoder.bf16 = True
    for rough, fine in zip(agent(images), exact, strict=True):
        assert rough.dtype == torch.float32 and not torch.equal(rough, fine)
        torch.testing.assert_close(rough, fine, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(8, 8, 1), (24, 16, 3), (84, 84, 4), (96, 96, 3), (210, 160, 3), (64, 500, 1)])
def test_an_encoder_fits_images_of_any_size(shape):
    encoder = ppo.Encoder(shape, bf16=False)
    features = encoder(torch.zeros(2, int(np.prod(shape)), dtype=torch.uint8))
    assert features.shape == (2, encoder.size)
    for layer in (layer for layer in encoder if isinstance(layer, torch.nn.Conv2d)):
        rows = layer.weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
        assert not layer.bias.any()


def test_an_encoder_sees_each_pixel_where_it_is():
    encoder = ppo.Encoder((8, 16, 2), bf16=False)
    image = torch.zeros(1, 8, 16, 2, dtype=torch.uint8)
    image[0, 3, 5, 1] = 255
    planes = torch.zeros(1, 2, 8, 16)
    planes[0, 1, 3, 5] = 1
    expected = torch.nn.Sequential(*encoder)(planes)
    torch.testing.assert_close(encoder(image.flatten(1)), expected)
    with pytest.raises(RuntimeError):
        encoder(torch.zeros((4, 3 * 256), dtype=torch.uint8))  # as many bytes as twelve images have


def random_batch(agent: ppo.Agent, shape: tuple[int, ...], count: int = 64) -> ppo.Batch:
    inputs = random_inputs(shape, count)
    alpha, beta, values = agent(inputs)
    actions = draw(alpha, beta)
    logprobs = ppo.log_prob(alpha, beta, actions) + 0.3 * torch.randn(count)
    return ppo.Batch(inputs, actions, logprobs, values + 0.3 * torch.randn(count), *torch.randn(2, count))


@pytest.mark.parametrize(("clip_vloss", "ent_coef"), [(True, 0.01), (False, 0.0)])
def test_loss_equals_the_papers(clip_vloss, ent_coef):
    torch.manual_seed(0)
    args = Args(ent_coef=ent_coef, vf_coef=0.3, clip_coef=0.1, clip_vloss=clip_vloss)
    agent = agent_of(args)
    batch = random_batch(agent, (3,))
    loss, measures = ppo.ppo_loss(dict(agent.named_parameters()), agent, args, batch)
    policy_loss, value_loss, entropy, kl, clipped = measures

    alpha, beta, values = agent(batch.observations)
    policy = Beta(alpha, beta)
    ratio = (policy.log_prob(batch.actions).sum(-1) - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.1), batch.values + 0.1)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * (errors.max(0).values if clip_vloss else errors[0]).mean())
    torch.testing.assert_close(entropy, policy.entropy().sum(-1).mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(clipped, ((ratio < 0.9) | (ratio > 1.1)).float().mean())
    torch.testing.assert_close(loss, policy_loss + 0.3 * value_loss - ent_coef * entropy)


def test_the_entropy_bonus_has_the_entropys_gradient():
    torch.manual_seed(0)
    agent = agent_of().requires_grad_(True)
    batch, weights, gradients = random_batch(agent, (3,)), list(agent.actor.parameters()), []
    batch = ppo.Batch(*(column.detach() for column in batch))
    for ent_coef in (0.0, 0.5):
        loss, _ = ppo.ppo_loss(dict(agent.named_parameters()), agent, Args(ent_coef=ent_coef), batch)
        gradients.append(torch.autograd.grad(loss, weights))
    alpha, beta, _ = agent(batch.observations)
    expected = torch.autograd.grad(Beta(alpha, beta).entropy().sum(-1).mean(), weights)
    for without, bonus, entropys in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(without - bonus, 0.5 * entropys, rtol=1e-3, atol=1e-5)


def test_the_estimated_divergence_is_the_divergence():
    torch.manual_seed(0)
    agent, count = agent_of(), 20_000
    inputs = torch.randn(1, 3).expand(count, 3)
    alpha, beta, values = agent(inputs)
    old = 1.3 * alpha, 0.9 * beta
    actions, zeros = draw(*old), torch.zeros(count)
    batch = ppo.Batch(inputs, actions, ppo.log_prob(*old, actions), values, zeros, zeros)
    kl = ppo.ppo_loss(dict(agent.named_parameters()), agent, replace(SMALL, norm_adv=False), batch)[1][3]
    exact = kl_divergence(Beta(*(each[:1] for each in old)), Beta(alpha[:1], beta[:1])).sum()
    assert kl.item() == pytest.approx(exact.item(), rel=0.05)


# ----------------------------------------------------------------------------------------------- from steps to batches


def played(args: Args, agent: ppo.Agent) -> ppo.Rollout:
    torch.manual_seed(0)
    with closing(ppo.Environments(args)) as envs:
        return ppo.collect(args, agent, envs, 0, ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0)))


def test_a_rollout_keeps_what_was_drawn_and_from_what():
    args = replace(SMALL, env_id="tests.envs:Fates-v0", num_steps=200)
    agent = agent_of(args, (2,), 2, [-1, 0], [1, 4])
    agent.moments.update(np.random.default_rng(0).normal([500, 5], [300, 4], (1000, 2)))
    agent.actor[-1].bias.copy_(torch.tensor([0.0, 3.0, 2.0, -1.0]))
    rollout = played(args, agent)
    for kept, now in zip((rollout.alpha, rollout.beta), agent(rollout.inputs[:-1])[:2], strict=True):
        torch.testing.assert_close(kept, now, rtol=1e-5, atol=1e-5)
    policy = Beta(rollout.alpha, rollout.beta)
    z = (rollout.actions - policy.mean) / policy.stddev
    np.testing.assert_allclose(z.mean((0, 1)), 0, atol=0.1)
    np.testing.assert_allclose(z.std((0, 1)), 1, atol=0.1)
    assert len(z.unique()) == z.numel()
    seed, t = rollout.observations[..., 0], rollout.observations[..., 1]
    paid = (rollout.actions.numpy() * [2, 4] - [1, 0]).sum(-1) + seed / 100 + t + 1
    np.testing.assert_allclose(rollout.rewards, paid, rtol=1e-5)
    ends = np.vectorize(lambda seed: Fates.end_of(int(seed))[0])(seed)
    assert np.array_equal(rollout.ended, t + 1 == ends)

    advantages, values = torch.randn(2, 200, 4)
    batch = ppo.batch_of(rollout, advantages, values)
    for at, n in ((0, 0), (7, 2), (199, 3)):
        observation, action, logprob, value, advantage, target = (column[4 * at + n] for column in batch)
        assert torch.equal(observation, rollout.inputs[at, n]) and torch.equal(action, rollout.actions[at, n])
        torch.testing.assert_close(logprob, Beta(rollout.alpha[at, n], rollout.beta[at, n]).log_prob(action).sum())
        assert (value, advantage) == (values[at, n], advantages[at, n])
        torch.testing.assert_close(target, advantages[at, n] + values[at, n])


def test_a_rollout_of_images_keeps_bytes_and_the_true_last_images():
    args = replace(IMAGES, frame_stack=3, num_steps=16, env_kwargs='{"steps": 9}', gae_lambda=0.0)
    agent = agent_of(args, (16, 16, 3), 2, [0, -1], [1, 3])
    rollout = played(args, agent)
    with closing(make_eval_env(args)) as env:
        shown = np.stack([env.reset(seed=0)[0], *(env.step(np.float32([0, 0]))[0] for _ in range(3))]).reshape(4, -1)
    t = np.arange(17)[:, None] % 3  # each episode takes three actions
    assert rollout.inputs.dtype == torch.uint8 and rollout.observations.dtype == np.uint8
    assert np.array_equal(rollout.inputs, np.tile(shown[t], (1, 4, 1)))
    assert np.array_equal(rollout.last_inputs, np.tile(shown[3], (4 * 5, 1)))
    assert [episode["length"] for episode in rollout.episodes] == [3] * 20

    values = agent.value(torch.tensor(shown))
    advantages, same_values = ppo.estimate(args, agent, rollout, torch.ones(16, 4))
    torch.testing.assert_close(same_values, values[t[:-1]].expand(16, 4))
    torch.testing.assert_close(advantages, 1 + args.gamma * values[t[:-1] + 1] - same_values)


@pytest.mark.parametrize(("recompute", "target", "epochs"), [(True, None, 3), (False, None, 3), (True, 0.15, 2)])
def test_epochs_of_minibatches(recompute, target, epochs):
    args = replace(
        SMALL, env_id="tests.envs:Fates-v0", update_epochs=3, recompute_advantages=recompute, target_kl=target
    )
    agent, seen = agent_of(args, (2,), 2, [-1, 0], [1, 4]), []
    rollout, rewards = played(args, agent), torch.randn(32, 4)

    def optimise(batch: ppo.Batch, indices: torch.Tensor) -> torch.Tensor:
        seen.append((batch, indices, ppo.estimate(args, agent, rollout, rewards)))
        agent.critic[-1].bias.add_(1.0)
        measures = torch.zeros(4, len(ppo.MEASURES))
        measures[-1, ppo.MEASURES.index("approx_kl")] = 0.1 * len(seen)
        return measures

    learner = ppo.Learner.of(agent, "cpu")._replace(learning_rate=ppo.step_sizes(args, agent))
    measures = ppo.improve(args, agent, learner, rollout, rewards, optimise)
    assert len(seen) == epochs and measures["updates"] == 4 * epochs
    for _, indices, _ in seen:
        assert indices.shape == (4, 32) and sorted(indices.flatten().tolist()) == list(range(128))
    for epoch, (batch, _, own) in enumerate(seen):
        advantages, values = own if recompute else seen[0][2]  # by the critic of the epoch's start
        assert torch.equal(batch.advantages, advantages.flatten())
        torch.testing.assert_close(batch.returns, (advantages + values).flatten())
        assert torch.equal(batch.values, seen[0][2][1].flatten()) and batch.logprobs is seen[0][0].logprobs, epoch


@pytest.mark.parametrize("settings", [SMALL, IMAGES])
def test_a_policy_that_stays_has_the_probabilities_it_acted_with(settings, tmp_path):
    run = train(replace(settings, runs_dir=str(tmp_path), learning_rate=1e-20))
    for row in rows(run, "progress"):
        assert abs(float(row["approx_kl"])) < 1e-6 and abs(float(row["policy_loss"])) < 1e-4
        assert float(row["clipfrac"]) == 0


def test_what_is_logged_of_the_policy(small):
    args = replace(small, learning_rate=1e-20, num_steps=128)
    agent_bias = {}

    class Agent(ppo.Agent):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            self.actor[-1].bias.data.fill_(agent_bias["is"])

    for bias, concentration, saturation in ((0.0, 2 * (1 + np.log(2)), 0.002), (-20.0, 2.0, 0.02)):
        agent_bias["is"] = bias
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "Agent", Agent)
            last = rows(train(args), "progress")[-1]
        assert float(last["concentration"]) == pytest.approx(concentration, rel=0.02)
        assert float(last["saturation"]) == pytest.approx(saturation, abs=0.01)


# --------------------------------------------------------------------------------------------------------- learning


def test_learns_to_mirror(small):
    args = replace(small, total_timesteps=6400, learning_rate=3e-3, update_epochs=5, gamma=0.0, num_evals=1)
    returns = [float(row["return"]) for row in rows(train(replace(args, eval_episodes=10)), "evaluations")]
    assert np.mean(returns) > -0.5  # a random policy's is -11


def test_learns_from_images(images):
    args = replace(images, env_kwargs='{"asks": true}', action_repeat=1, total_timesteps=6400, gamma=0.0, num_evals=1)
    run = train(replace(args, learning_rate=3e-3, update_epochs=4))
    assert all(float(row["return"]) > -0.5 for row in rows(run, "evaluations"))  # one that never moves has -4


# ------------------------------------------------------------------------------------------------------------ policy


@pytest.mark.parametrize("shape", [(3,), (16, 16, 2)])
def test_a_policy_acts_as_the_mean_does_and_samples_around_it(shape):
    torch.manual_seed(0)
    agent = agent_of(SMALL, shape, 2, [-2, 0], [2, 1])
    agent.actor[-1].bias.copy_(torch.tensor([3.0, 0.0, 8.0, 2.0]))
    policy, (inputs,) = ppo.Policy(SMALL, agent), random_inputs(shape, 1)
    alpha, beta, _ = agent(inputs[None])
    observation = inputs.numpy().reshape(shape)
    beta_policy = Beta(alpha[0], beta[0])
    np.testing.assert_allclose(
        policy(observation), beta_policy.mean * torch.tensor([4, 1]) - torch.tensor([2, 0]), atol=1e-4
    )
    samples = policy(np.stack([observation] * 2000), sample=True)
    np.testing.assert_allclose(samples.mean(0), policy(observation), atol=0.06)
    np.testing.assert_allclose(samples.std(0), beta_policy.stddev * torch.tensor([4, 1]), rtol=0.06)
    assert policy.discount == SMALL.gamma and policy.bootstraps == ("truncated",)


def test_a_loaded_policy_of_images_has_exactly_the_returns_of_its_evaluation(images):
    args = replace(images, env_kwargs='{"asks": true}', precision="bf16", num_evals=2, learning_rate=0.01)
    run = train(args)
    policy, table = load_policy(run / "checkpoint.pt"), rows(run, "evaluations")[2:]
    for row in table:
        with closing(make_eval_env(args)) as env:
            assert str(ppo.play(policy, env, int(row["seed"]))[0]) == row["return"]
    observation = make_eval_env(args).reset(seed=0)[0]
    samples = np.array([policy(observation, sample=True) for _ in range(2)])
    assert (samples[0] != samples[1]).all() and samples[0] in make_eval_env(args).action_space
    with pytest.raises(ValueError, match="must be"):
        policy(observation.ravel())


# ----------------------------------------------------------------------------------------------------------- images


def test_frames_are_stacked_the_oldest_first():
    args = Args(frame_stack=3)
    shown = [np.full((8, 8, 1), value, np.uint8) for value in range(1, 5)]
    frames = ppo.stack(args, shown[0])
    assert frames.shape == (8, 8, 3) and (frames == 1).all()  # the first, three times
    for image in shown[1:]:
        frames = ppo.stack(args, image, frames)
    assert frames[0, 0].tolist() == [2, 3, 4]


def test_grey_and_resizing():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255, 0, 0
    image[8:] = 0, 200, 100
    grey = ppo.stack(Args(grayscale=True), image)
    assert grey.shape == (16, 16, 1) and grey.dtype == np.uint8
    assert grey[0, 0, 0] == round(0.299 * 255) and grey[15, 15, 0] == round(0.587 * 200 + 0.114 * 100)
    half = ppo.stack(Args(resize=8), image)
    np.testing.assert_array_equal(half, image[::2, ::2])
    tall = np.zeros((24, 16, 1), np.uint8)
    tall[0, 0], tall[1, 1] = 18, 12
    assert ppo.stack(Args(resize=8), tall)[0, 0].item() == 5  # the mean of six pixels
    many = np.stack((image, 255 - image))
    for settings in ({"grayscale": True}, {"resize": 9}, {"frame_stack": 2}):
        each = [ppo.stack(Args(**settings), one) for one in many]
        np.testing.assert_array_equal(ppo.stack(Args(**settings), many), each)


def test_frames_outlive_the_memory_they_were_drawn_into():
    for args in (Args(frame_stack=2, resize=8), Args(frame_stack=2), Args()):
        drawing = np.zeros((16, 16, 1), np.uint8)
        frames = ppo.stack(args, drawing[::-1])  # upside down, as OpenGL draws: the rows' stride is negative
        drawing[:] = 5
        assert not frames.any()
        frames = ppo.stack(args, drawing, frames)
        drawing[:] = 7
        assert frames[0, 0].tolist() == [0, 5][-args.frame_stack :]


def test_an_action_is_repeated_until_the_episode_ends():
    env = make_eval_env(IMAGES)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and observation.shape == (16, 16, 2)
    rewards = []
    for _ in range(7):
        observation, reward, terminated, truncated, _ = env.step(np.float32([0, 0]))
        rewards.append(reward)
    assert rewards == [0, 0, 0, 2, 3, 3, 2] and truncated and not terminated


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), True),
        (gym.spaces.Box(0, 255, (8, 8, 12), np.uint8), True),
        (gym.spaces.Box(0, 255, (128,), np.uint8), False),
        (gym.spaces.Box(0, 1, (8, 8, 3), np.float32), False),
        (gym.spaces.Box(0, 10, (7, 7, 3), np.uint8), False),
        (gym.spaces.Dict({"a": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)}), False),
    ],
)
def test_what_is_an_image(space, image, monkeypatch):
    class Shows(gym.Env):
        observation_space, action_space, metadata = space, gym.spaces.Box(-1, 1, (1,)), {}

    monkeypatch.setattr(gym, "make", lambda *_, **__: Shows())
    env = make_eval_env(Args())
    assert isinstance(env, ppo.Frames) == image
    assert len(env.observation_space.shape) == (3 if image else 1)


def test_workers_need_no_threads_that_only_their_parent_has(images):
    words = ["--env-id", "tests.envs:Large-v0", "--vec", "async", "--threads", "2", "--resize", "16", "--no-compile"]
    words += ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "4", "--total-timesteps", "16"]
    command = [sys.executable, str(SCRIPT), *words, "--num-evals", "0", "--runs-dir", images.runs_dir]
    subprocess.run(command, check=True, timeout=120, cwd=SCRIPT.parent)


def test_async_shows_the_images_that_sync_does(images):
    assert same(train(images), train(replace(images, vec="async")))


def test_a_film_of_repeated_actions_is_as_fast_as_what_it_shows(images):
    from moviepy import VideoFileClip

    run = train(replace(images, num_evals=1, capture_video=True))
    (video,) = (run / "videos").iterdir()
    with VideoFileClip(str(video)) as clip:
        assert clip.fps == 10 and abs(clip.n_frames - 7) <= 1  # of 20 steps in seven actions, 30 steps a second


# ---------------------------------------------------------------------------------------------------------- EnvPool


class Pool:
    """EnvPool's side of what `FramesOfMany` uses, on environments of Gymnasium's, of which one ends early."""

    observation_space = gym.spaces.Box(0, 255, (24, 24, 3), np.uint8)

    def __init__(self):
        self.envs = [gym.make("tests.envs:Filmed-v0", asks=True, steps=steps).unwrapped for steps in (20, 10, 20)]
        self.over = np.zeros(3, bool)

    def close(self):
        pass

    def reset(self, which):
        self.over[which] = False
        return np.stack([self.envs[n].reset(seed=int(n))[0] for n in which]), {}

    def step(self, actions, which=(0, 1, 2)):
        assert len(which) and not self.over[list(which)].any()
        answers = [self.envs[n].step(action) for n, action in zip(which, actions, strict=True)]
        images, rewards, terminated, truncated, _ = (np.array(part) for part in zip(*answers, strict=True))
        self.over[list(which)] = terminated | truncated
        return images, rewards, terminated, truncated, {}


def test_one_and_many_environments_show_the_same():
    many = ppo.FramesOfMany(Pool(), replace(IMAGES, num_envs=3))
    single = [ppo.Frames(env, IMAGES) for env in Pool().envs]
    np.testing.assert_array_equal(many.reset(np.arange(3))[0], [env.reset(seed=n)[0] for n, env in enumerate(single)])
    random = np.random.default_rng(0)
    for t in range(7):
        actions = random.uniform((0, -1), (1, 3), (3, 2)).astype(np.float32)
        observations, rewards, terminated, truncated, _ = many.step(actions)
        for n, env in enumerate(single):
            image, *expected, _ = env.step(actions[n])
            np.testing.assert_array_equal(observations[n], image)
            assert [rewards[n], terminated[n], truncated[n]] == pytest.approx(expected)
        assert truncated.tolist() == [t == 6, t == 3, t == 6]
        if t == 3:
            np.testing.assert_array_equal(many.reset(np.array([1]))[0][0], single[1].reset(seed=1)[0])


def test_envpool_drives_the_car_that_gymnasium_drives():
    """The tracks differ and so do single pixels; what the road looks like, and what a way along it earns, do not."""
    pytest.importorskip("envpool")
    args = Args(env_id="CarRacing-v3", num_envs=4, vec="envpool", grayscale=True, frame_stack=2, action_repeat=4)
    gym_return, pool_returns = 0.0, np.zeros(4)
    with closing(ppo.EnvPool(args)) as pool, closing(make_eval_env(args)) as env:
        env.reset(seed=0)
        for t in range(12):
            action = np.float32([0, 0.4 if t < 10 else 0, 0])
            image, reward, *_ = env.step(action)
            images, rewards, *_ = pool.step(np.stack([action] * 4))
            gym_return, pool_returns = gym_return + reward, pool_returns + rewards
    assert images.shape == (4, 96, 96, 2)
    for seen in images:
        assert np.abs(seen[60:64, 46:50].astype(int) - image[60:64, 46:50]).mean() < 5
        assert np.abs(np.median(seen, (0, 1)) - np.median(image, (0, 1))).max() < 5
    assert image[70:80, 46:50].mean() < 120  # the road under and in front of the car
    assert np.abs(pool_returns - gym_return).max() < 12


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_settings_are_read(path):
    args = ppo.parse(["--config", str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, name) == (tuple(value) if isinstance(value, list) else value)
