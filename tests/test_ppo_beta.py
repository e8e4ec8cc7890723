"""The Beta policy against independent computations, images from the environment to the gradient, exact resume."""

import json
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
from torch.distributions import AffineTransform, Beta, TransformedDistribution, kl_divergence

import ppo_beta as ppo
from ppo_beta import Args, load_policy, make_eval_env, parse, train
from tests.marks import needs_compiler
from tests.test_promises import rows

SCRIPT = Path(ppo.__file__)
SMALL = Args(
    env_id="tests.envs:Mirror-v0",
    num_envs=4,
    num_steps=32,
    total_timesteps=1024,
    num_minibatches=4,
    update_epochs=2,
    num_evals=2,
    eval_episodes=2,
    checkpoint_every=256,
    compile=False,
)
IMAGES = replace(SMALL, env_id="tests.envs:Filmed-v0", frame_stack=2, grayscale=True, action_repeat=3, resize=16)


def same(a: Path, b: Path) -> bool:
    """Equal weights, normaliser and rows, bit for bit; only the wall time may differ."""
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    tensors = all(torch.equal(one["agent"][name], other["agent"][name]) for name in one["agent"])
    moments = all(torch.equal(one["moments"][name], other["moments"][name]) for name in ("mean", "var"))
    return tensors and moments and rows(a, "episodes") == rows(b, "episodes")


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def images(tmp_path):
    return replace(IMAGES, runs_dir=str(tmp_path / "runs"))


def command(args: Args) -> list[str]:
    words = [sys.executable, str(SCRIPT)]
    for name, value in vars(args).items():
        if value != getattr(Args, name):
            flag = name.replace("_", "-")
            words += [f"--no-{flag}" if value is False else f"--{flag}"] + (
                [] if isinstance(value, bool) else [str(value)]
            )
    return words


# ----------------------------------------------------------------------------------------------------- distribution


def some_policies(rows: int = 200, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    raw = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    return ppo.concentrations(raw)


def draw(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ppo.draw(alpha.detach().numpy(), beta.detach().numpy()))


def log_prob(alpha: torch.Tensor, beta: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return ppo.log_prob(alpha, beta, unit.log(), torch.log1p(-unit))


def divergence(alpha: torch.Tensor, beta: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
    """KL(Beta(alpha, beta) || other), as the loss has it."""
    expected = ppo.expected_logs(alpha, beta)
    return ppo.log_prob(alpha, beta, *expected) - ppo.log_prob(*other, *expected)


def test_densities_entropy_and_divergence_are_the_beta_distributions():
    alpha, beta = some_policies()
    other_alpha, other_beta = (parameter.flip(0) for parameter in (alpha, beta))
    reference, other = Beta(alpha, beta), Beta(other_alpha, other_beta)
    assert alpha.min() > 1 and beta.min() > 1
    unit = draw(alpha, beta)
    torch.testing.assert_close(log_prob(alpha, beta, unit), reference.log_prob(unit).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ppo.entropy_of(alpha, beta), reference.entropy().sum(-1), rtol=1e-4, atol=1e-4)
    kl = divergence(alpha, beta, other_alpha, other_beta)
    torch.testing.assert_close(kl, kl_divergence(reference, other).sum(-1), rtol=1e-4, atol=1e-4)
    assert divergence(alpha, beta, alpha, beta).abs().max() == 0


def test_the_normaliser_is_exact_where_float32_is():
    generator = torch.Generator().manual_seed(0)
    for largest, tolerance in ((1, 5e-6), (10, 2e-5), (1e3, 2e-3), (1e5, 0.2)):
        alpha, beta = 1 + largest * torch.rand((2, 10_000), generator=generator)
        a, b = alpha.double(), beta.double()
        exact = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        torch.testing.assert_close(ppo.log_beta(a, b), exact, atol=2e-7, rtol=0)
        torch.testing.assert_close(ppo.log_beta(alpha, beta).double(), exact, atol=tolerance, rtol=0)
        torch.testing.assert_close(ppo.digamma(alpha), torch.digamma(alpha), atol=5e-6, rtol=0)


def test_entropy_and_divergence_are_what_samples_show():
    torch.manual_seed(0)
    n = 200_000
    (alpha, other_alpha), (beta, other_beta) = (parameter[:2] for parameter in some_policies())
    unit = draw(alpha.expand(n, 3), beta.expand(n, 3))
    surprise = -log_prob(alpha, beta, unit)
    ratio = -surprise - log_prob(other_alpha, other_beta, unit)
    for samples, exact in (
        (surprise, ppo.entropy_of(alpha, beta)),
        (ratio, divergence(alpha, beta, other_alpha, other_beta)),
    ):
        assert abs(samples.mean() - exact) < 4 * samples.std() / n**0.5


def test_samples_are_beta_distributed_and_reproducible():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    for alpha, beta in ((1.0, 1.0), (1.7, 1.7), (1.01, 8.0), (400.0, 20.0)):
        unit = draw(torch.full((50_000,), alpha), torch.full((50_000,), beta))
        assert stats.kstest(unit.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3
    state = torch.get_rng_state()
    first = draw(*some_policies())
    torch.set_rng_state(state)
    assert torch.equal(draw(*some_policies()), first)


def test_gradients_are_those_of_differences():
    raw = (2 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    unit = torch.linspace(0.01, 0.99, 10, dtype=torch.float64).view(5, 2)
    fixed = ppo.concentrations(raw.detach() + 0.3)
    assert torch.autograd.gradcheck(lambda raw: ppo.entropy_of(*ppo.concentrations(raw)), raw)
    assert torch.autograd.gradcheck(lambda raw: log_prob(*ppo.concentrations(raw), unit), raw)
    assert torch.autograd.gradcheck(lambda raw: divergence(*fixed, *ppo.concentrations(raw)), raw)


@pytest.mark.parametrize("raw", [(-1e4, 1e6), (1e6, -1e4), (1e6, 1e6), (-1e4, -1e4), (0.0, 30.0)])
def test_nothing_breaks_at_the_edges(raw):
    torch.manual_seed(0)
    raw = torch.tensor(raw).repeat(1000, 1).requires_grad_()
    alpha, beta = ppo.concentrations(raw)
    unit = draw(alpha, beta).detach()
    assert unit.min() > 0 and unit.max() < 1
    for edge in (unit, torch.full_like(unit, 2**-24), torch.full_like(unit, 1 - 2**-24)):
        logprob = log_prob(alpha, beta, edge)
        (gradient,) = torch.autograd.grad(logprob.sum() + ppo.entropy_of(alpha, beta).sum(), raw, retain_graph=True)
        assert logprob.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_fill_the_bounds_and_never_leave_them(dtype):
    low = np.array([[-0.1, -1.0], [0.0, -1000.1]], dtype)
    high = np.array([[0.3, 2.0], [1e5, 0.3]], dtype)
    edges = [[[1 - 2**-24] * 4], [[0.0] * 4], [[1.0] * 4]]
    units = np.concatenate((np.random.default_rng(0).random((100_000, 4)), *edges)).astype(np.float32)
    actions = ppo.scale(units, low, high)
    assert actions.dtype == dtype and (actions >= low).all() and (actions <= high).all()
    np.testing.assert_array_equal(actions[-2], low)
    np.testing.assert_array_equal(actions[-1], high)
    np.testing.assert_allclose(actions[:-3].mean(0), (low + high) / 2, rtol=0.02, atol=0.01)


def test_the_density_of_scaled_actions_differs_by_a_constant():
    """Which no ratio of probabilities contains: that of the unit cube is as good."""
    alpha, beta = (parameter[:, :2] for parameter in some_policies())
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0])
    unit = draw(alpha, beta)
    scaled = TransformedDistribution(Beta(alpha, beta), AffineTransform(low, high - low))
    actions = torch.from_numpy(ppo.scale(unit.numpy(), low.numpy(), high.numpy()))
    expected = scaled.log_prob(actions).sum(-1) + (high - low).log().sum()
    torch.testing.assert_close(log_prob(alpha, beta, unit), expected, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- update


def random_batch(agent: ppo.Agent, shape: tuple[int, ...], rows: int = 64) -> tuple[ppo.Batch, torch.Tensor, Beta]:
    """Of actions, and of the policy that is said to have taken them."""
    observations = torch.randn(rows, *shape)
    if len(shape) == 3:
        observations = torch.randint(256, (rows, int(np.prod(shape))), dtype=torch.uint8)
    alpha, beta, values = agent(observations)
    actions = draw(alpha, beta)
    old = alpha * torch.rand_like(alpha).exp(), beta * torch.rand_like(beta).exp()
    expected = ppo.expected_logs(*old)
    logprobs = log_prob(alpha, beta, actions) + 0.3 * torch.randn(rows)
    old_values, advantages, returns = values + 0.3 * torch.randn(rows), *torch.randn(2, rows)
    of_actions = actions.log(), torch.log1p(-actions), *expected, ppo.log_prob(*old, *expected), logprobs
    return ppo.Batch(observations, *of_actions, old_values, advantages, returns), actions, Beta(*old)


def test_loss_equals_the_papers():
    torch.manual_seed(0)
    args = Args(ent_coef=0.01, clip_vloss=True)
    agent = ppo.Agent(args, (3,), 2).requires_grad_(False)
    batch, actions, then = random_batch(agent, (3,))
    loss, (policy_loss, value_loss, entropy, kl, _) = ppo.ppo_loss(dict(agent.named_parameters()), agent, args, batch)

    *parameters, values = agent(batch.observations)
    policy = Beta(*parameters)
    ratio = (policy.log_prob(actions).sum(-1) - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.2), batch.values + 0.2)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * errors.max(0).values.mean())
    torch.testing.assert_close(entropy, policy.entropy().sum(-1).mean())
    torch.testing.assert_close(kl, kl_divergence(then, policy).sum(-1).mean())
    torch.testing.assert_close(loss, policy_loss + 0.25 * value_loss - 0.01 * entropy)


@needs_compiler
@pytest.mark.parametrize("shape", [(3,), (16, 16, 2)])
def test_the_compiled_update_is_the_update(shape):
    torch.manual_seed(0)
    args = Args(num_minibatches=2, ent_coef=0.01)
    agent = ppo.Agent(args, shape, 2).requires_grad_(False)
    batch, learner = random_batch(agent, shape)[0], ppo.Learner.of(agent)
    learner = learner._replace(learning_rate=ppo.step_sizes(replace(args, learning_rate=1e-3), agent))
    said = []
    fast = ppo.compile_update(args, agent, learner, batch, said.append)
    assert "compiled in" in said[0]
    indices, start = torch.randperm(64)[:32], [tensor.clone() for tensor in learner]
    measures = fast(agent, args, learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    torch.testing.assert_close(ppo.update(agent, args, learner, batch, indices), measures, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.theta, compiled, rtol=1e-3, atol=1e-5)


def test_bf16_is_nearly_fp32_and_policy_and_critic_are_parts_of_the_agent():
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), (48, 40, 4), 3)
    images = torch.randint(256, (32, 48 * 40 * 4), dtype=torch.uint8)
    exact = agent(images)
    torch.testing.assert_close((*agent.policy(images), agent.value(images)), exact)
    agent.encoder.bf16 = True
    for rough, fine in zip(agent(images), exact, strict=True):
        assert rough.dtype == torch.float32 and not torch.equal(rough, fine)
        torch.testing.assert_close(rough, fine, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(8, 8, 1), (24, 16, 3), (84, 84, 4), (96, 96, 3), (210, 160, 3), (64, 500, 1)])
def test_an_encoder_fits_images_of_any_size(shape):
    encoder = ppo.Encoder(shape, bf16=False)
    features = encoder(torch.zeros(2, int(np.prod(shape)), dtype=torch.uint8))
    assert features.shape == (2, encoder.size)


# --------------------------------------------------------------------------------------------------------- learning


def test_learns_to_mirror(small):
    run = train(replace(small, total_timesteps=9600, learning_rate=3e-3, update_epochs=5, gamma=0.0))
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] > -0.5  # a random policy's is -11


def test_learns_from_images(images):
    args = replace(images, env_kwargs='{"asks": true}', action_repeat=1, total_timesteps=6400, gamma=0.0)
    run = train(replace(args, learning_rate=3e-3, update_epochs=4))
    assert (
        json.loads((run / "result.json").read_text())["evaluation"]["mean"] > -0.5
    )  # a random policy's is -18, of one that never moves -4


@pytest.mark.parametrize("cut", [True, False])
def test_of_images_too_truncation_bootstraps_and_termination_does_not(images, cut):
    """From the last image, which is worth 2 more, not from the first of the next episode, which is worth nothing."""
    args = replace(images, env_kwargs=json.dumps({"cut": cut}), resize=None, frame_stack=1, action_repeat=1)
    args = replace(args, total_timesteps=9600, num_evals=0, gamma=0.5, vf_coef=1.0, learning_rate=2e-3)
    policy = load_policy(train(args) / "checkpoint.pt")
    env = make_eval_env(args)
    shown = [env.reset()[0], *(env.step(np.float32([0, 0]))[0] for _ in range(19))]
    expected, following = np.zeros(20), 2.0 if cut else 0.0
    for t in reversed(range(20)):
        expected[t] = following = (t >= 10) + 0.5 * following
    np.testing.assert_allclose(policy.value(np.stack(shown)), expected, atol=0.3)


def test_images_stay_as_they_are_while_the_next_take_their_place():
    moments = ppo.observation_moments(Args(), (8, 8, 3))
    images = np.full((2, 192), 255, np.uint8)
    kept = moments.normalise(images)
    images[:] = 0
    assert kept.dtype == np.uint8 and (kept == 255).all()


@pytest.mark.parametrize("shape", [(17,), (16, 16, 3)])
def test_a_step_is_taken_by_the_policy_that_is_updated(shape):
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), shape, 6).requires_grad_(False)
    agent.actor[-1].bias.copy_(torch.linspace(-30, 30, 12))
    kind = torch.uint8 if len(shape) == 3 else torch.float32
    observations = (100 * torch.rand(16, int(np.prod(shape)))).to(kind)
    for acted, updated in zip(ppo.acting(agent)(observations.numpy()), agent.policy(observations), strict=True):
        np.testing.assert_allclose(acted, updated, rtol=1e-5)


@pytest.mark.parametrize("settings", [SMALL, IMAGES])
def test_a_policy_that_stays_has_the_probabilities_it_acted_with(settings, tmp_path):
    run = train(replace(settings, runs_dir=str(tmp_path), learning_rate=1e-20, num_evals=0))
    for row in rows(run, "progress"):
        assert abs(float(row["kl"])) < 1e-5 and abs(float(row["policy_loss"])) < 1e-4
        assert float(row["clip_fraction"]) == 0


# ----------------------------------------------------------------------------------------------------------- images


def test_frames_are_stacked_the_oldest_first():
    frames = ppo.Frames(Args(frame_stack=3))
    shown = [np.full((8, 8, 1), value, np.uint8) for value in range(4)]
    assert frames.begin(shown[0]).shape == (8, 8, 3)
    for image in shown[1:]:
        seen = frames.add(image)
    assert seen[0, 0].tolist() == [1, 2, 3]
    assert frames.begin(shown[0])[0, 0].tolist() == [0, 0, 0]


def test_grey_and_resizing():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255, 0, 0
    image[4:] = 0, 200, 100
    grey = ppo.Frames(Args(grayscale=True)).begin(image)
    assert grey.shape == (8, 8, 1) and grey.dtype == np.uint8
    assert grey[0, 0, 0] == round(0.299 * 255) and grey[7, 7, 0] == round(0.587 * 200 + 0.114 * 100)
    half = ppo.Frames(Args(resize=4)).begin(image)
    np.testing.assert_array_equal(half, image[::2, ::2])
    one = ppo.Frames(Args(resize=1)).begin(image)
    assert one.tolist() == [[[128, 100, 50]]]  # the mean, rounded to even


def test_frames_outlive_the_memory_they_were_drawn_into():
    frames, drawing = ppo.Frames(Args(frame_stack=2, resize=4)), np.zeros((8, 8, 1), np.uint8)
    frames.begin(drawing[::-1])  # upside down, as OpenGL draws: the rows' stride is negative
    drawing[:] = 5
    assert frames.add(drawing)[0, 0].tolist() == [0, 5]
    frames = ppo.Frames(Args(frame_stack=2))
    frames.begin(drawing)
    drawing[:] = 7
    assert frames.add(drawing)[0, 0].tolist() == [5, 7]


def test_images_of_another_shape_are_not_regrouped():
    encoder = ppo.Encoder((16, 16, 2), bf16=False)
    assert len(encoder(torch.zeros((4, 16, 16, 2), dtype=torch.uint8))) == 4
    with pytest.raises(RuntimeError):
        encoder(torch.zeros((4, 16, 16, 3), dtype=torch.uint8))  # as many bytes as six images have


def test_nothing_is_rendered_that_nobody_films():
    for mode, images in ((None, 0), ("rgb_array", 1 + IMAGES.action_repeat)):
        pixels = ppo.Pixels(ppo.make_env("tests.envs:Filmed-v0", {}, mode), IMAGES)
        for seed in range(2):  # another episode forgets the pictures of the one before
            pixels.reset(seed=seed)
        pixels.step(np.float32([0, 0]))
        assert len(pixels.rendered) == images


def test_workers_need_no_threads_that_only_their_parent_has(images):
    args = replace(images, env_id="tests.envs:Large-v0", vec="async", threads=2, num_evals=0)
    subprocess.run(command(args), check=True, timeout=120)


def test_an_action_is_repeated_until_the_episode_ends():
    env = make_eval_env(IMAGES)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and observation.shape == (16, 16, 2)
    rewards = []
    for _ in range(7):
        observation, reward, terminated, truncated, _ = env.step(np.float32([0, 0]))
        rewards.append(reward)
    assert rewards == [0, 0, 0, 2, 3, 3, 2] and truncated and not terminated


class Pool:
    """EnvPool's side of what `PixelsOfMany` uses, on environments of Gymnasium's, of which one ends early."""

    def __init__(self, args: Args):
        self.envs = [ppo.make_env(args.env_id, {"asks": True, "steps": steps}) for steps in (20, 10, 20)]
        self.over = np.zeros(3, bool)

    def reset(self, which):
        self.over[which] = False
        return np.stack([self.envs[n].reset(seed=int(n))[0] for n in which]), {}

    def step(self, actions, which=(0, 1, 2)):
        assert not self.over[list(which)].any()
        answers = [self.envs[n].step(action) for n, action in zip(which, actions, strict=True)]
        images, rewards, terminated, truncated, _ = (np.array(part) for part in zip(*answers, strict=True))
        self.over[list(which)] = terminated | truncated
        return images, rewards, terminated, truncated, {}


def test_one_and_many_environments_show_the_same():
    many = ppo.PixelsOfMany(Pool(IMAGES), IMAGES, 3)
    single = [ppo.Pixels(env, IMAGES) for env in Pool(IMAGES).envs]
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
    pool, env = ppo.Environments(args), make_eval_env(args)
    pool.reset(np.ones(4, bool))
    gym_return, pool_returns, seen = 0.0, np.zeros(4), []
    env.reset(seed=0)
    for t in range(12):
        action = np.float32([0, 0.4 if t < 10 else 0, 0])
        image, reward, *_ = env.step(action)
        images, rewards, *_ = pool.step(np.stack([action] * 4))
        gym_return, pool_returns = gym_return + reward, pool_returns + rewards
    images = images.reshape(4, 96, 96, 2)
    road = image[70:80, 46:50]  # under and in front of the car
    for seen in images:
        assert np.abs(seen[60:64, 46:50].astype(int) - image[60:64, 46:50]).mean() < 5
        assert np.abs(np.median(seen, (0, 1)) - np.median(image, (0, 1))).max() < 5
    assert road.mean() < 120
    assert np.abs(pool_returns - gym_return).max() < 12
    pool.close()
    env.close()


def test_a_video_shows_every_repetition(images):
    from moviepy import VideoFileClip

    args = replace(images, num_evals=1, capture_video=True)
    run = train(args)
    (video,) = (run / "videos").iterdir()
    with VideoFileClip(str(video)) as clip:
        assert clip.n_frames in (20, 21) and clip.fps == 30
    assert same(run, train(replace(args, capture_video=False)))


# --------------------------------------------------------------------------------------------------- run directory


def test_what_is_logged_of_the_policy(small):
    last = rows(train(small), "progress")[-1]
    assert 2 < float(last["concentration"]) < 10 and 0 <= float(last["saturation"]) < 0.1
    assert "std" not in last


def test_a_loaded_policy_plays_as_the_evaluation_did(images):
    args = replace(images, env_kwargs='{"asks": true}', precision="bf16")
    run = train(args)
    policy, env = load_policy(run / "best.pt"), make_eval_env(args)
    best = json.loads((run / "result.json").read_text())["best"]
    (observation, _), total, over = env.reset(seed=10_000), 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
        total, over = total + reward, terminated or truncated
    assert total == pytest.approx(best["mean"], abs=1e-5)
    samples = [policy(observation[None], sample=True) for _ in range(2)]
    assert (samples[0] != samples[1]).all() and env.action_space.contains(samples[0][0])


@pytest.mark.parametrize("settings", [SMALL, replace(IMAGES, vec="async")])
def test_seed_decides_and_evaluation_does_not(settings, tmp_path):
    args = replace(settings, runs_dir=str(tmp_path))
    first = train(args)
    assert same(first, train(replace(args, num_evals=0, vec="sync")))
    assert not same(first, train(replace(args, seed=2)))


RESUMED = {
    "HalfCheetah-v4": {"num_envs": 2},
    "tests.envs:Filmed-v0": {"frame_stack": 3, "resize": 16, "action_repeat": 3},
}


@pytest.mark.parametrize("env_id", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, env_id):
    args = replace(SMALL, env_id=env_id, num_steps=64, total_timesteps=6144, checkpoint_every=1000)
    args = replace(args, **RESUMED[env_id])
    undisturbed = train(replace(args, runs_dir=str(tmp_path / "undisturbed")))

    runs = tmp_path / "killed"
    process = subprocess.Popen(command(replace(args, runs_dir=str(runs))), stdout=subprocess.DEVNULL)
    lines, deadline = 0, time.monotonic() + 60
    while lines < 13 and process.poll() is None and time.monotonic() < deadline:
        lines = sum(path.read_text().count("\n") - 1 for path in runs.glob("*/progress.csv"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
    words = [sys.executable, str(SCRIPT), "--resume", str(run)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert same(undisturbed, run)
    assert rows(undisturbed, "evaluations") == rows(run, "evaluations")
    assert len(rows(undisturbed, "progress")) == len(rows(run, "progress"))


# --------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "--env-id tests.envs:Endless-v0": "finite bounds",
    "--env-id CartPole-v1": "ppo_discrete.py",
    "--env-id tests.envs:ChannelsFirst-v0": "(height, width, channels)",
    "--env-id tests.envs:ChannelsFirst-v0 --resize 84": "(height, width, channels)",
    "--env-id tests.envs:WithoutChannels-v0": "(height, width, channels)",
    "--env-id tests.envs:Stacked-v0": "--frame-stack",
    "--env-id tests.envs:Filmed-v0 --resize 7": "--resize 7: must be at least 8",
    "--env-id tests.envs:Transparent-v0 --grayscale": "one or three channels",
    "--env-id tests.envs:Whole-v0": "real numbers",
    "--env-id Pendulum-v1 --frame-stack 4": "--frame-stack is for images",
    "--env-id Pendulum-v1 --precision bf16": "--precision is for images",
    "--env-id tests.envs:Filmed-v0 --action-repeat 0": "--action-repeat",
    "--env-id tests.envs:Filmed-v0 --resize 0": "--resize",
    "--log-std-init 0": "--log-std-init",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, mistake):
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        train(parse([*mistake.split(), "--runs-dir", str(runs)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not runs.exists()
    assert error.count("\n") == 1 and MISTAKES[mistake] in error


def test_another_scripts_run_is_not_resumed(small, capsys):
    run = train(small)
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps(meta | {"script": "ppo_continuous"}))
    with pytest.raises(SystemExit) as stop:
        parse(["--resume", str(run)])
    assert stop.value.code == 2 and "ppo_continuous.py" in capsys.readouterr().err


def test_vectors_are_as_in_the_flagship():
    """A uint8 space of one dimension and a float one of three are vectors."""
    assert not ppo.is_image(gym.spaces.Box(0, 255, (128,), np.uint8))
    assert not ppo.is_image(gym.spaces.Box(0, 1, (8, 8, 3), np.float32))
    assert ppo.is_image(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8))


def test_small_images_may_have_more_channels_than_rows():
    args = replace(IMAGES, env_id="tests.envs:Deep-v0", grayscale=False, resize=None, frame_stack=1)
    ppo.check_environments(args)
    assert make_eval_env(args).observation_space.shape == (8, 8, 12)


def test_threads_hold_in_a_child_process(small, monkeypatch):
    """There, making an environment sets them to one."""
    before = torch.get_num_threads()
    monkeypatch.setattr(ppo.multiprocessing, "parent_process", lambda: "another")
    train(replace(small, threads=2, total_timesteps=128))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2
