"""What is different about discrete actions: the distribution, the offsets, and what is done with them."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import ppo_discrete as ppo
from ppo_discrete import Args, RunningMoments, load_policy, make_eval_env, parse, train
from tests.marks import needs_compiler

SCRIPT = Path(ppo.__file__)
SMALL = Args(
    env_id="tests.envs:Echo-v0",
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
SIZES = np.array([2, 5, 3])  # choices of the parts of an action


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def rows(run: Path, table: str) -> list[dict]:
    with (run / f"{table}.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]


def same(a: Path, b: Path) -> bool:
    """Equal weights, normaliser and rows, bit for bit; only the wall time may differ."""
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    tensors = all(torch.equal(one["agent"][name], other["agent"][name]) for name in one["agent"])
    moments = all(torch.equal(one["moments"][name], other["moments"][name]) for name in ("mean", "var"))
    return tensors and moments and rows(a, "episodes") == rows(b, "episodes")


def command(args: Args, *more: str) -> list[str]:
    """The command line of `args`."""
    words = [sys.executable, str(SCRIPT)]
    for name, value in vars(args).items():
        if value != getattr(Args, name):
            flag = name.replace("_", "-")
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return [*words, *more]


# ------------------------------------------------------------------------------------------------------ mathematics


def random_batch(agent: ppo.Agent, sizes: np.ndarray, rows: int = 64) -> ppo.Batch:
    observations, actions = (
        torch.randn(rows, 3),
        torch.from_numpy(np.random.default_rng(0).integers(0, sizes, (rows, sizes.size))),
    )
    logits, values = agent(observations)
    logprobs = ppo.log_prob(logits.log_softmax(-1), actions) + 0.3 * torch.randn(rows)
    old_values, advantages, returns = values + 0.3 * torch.randn(rows), *torch.randn(2, rows)
    return ppo.Batch(observations, actions, logprobs, old_values, advantages, returns)


@pytest.fixture(params=[SIZES, np.array(4)], ids=["MultiDiscrete", "Discrete"])
def agent_and_batch(request):
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), 3, request.param).requires_grad_(False)
    agent.actor[-1].weight *= 100  # no longer nearly uniform
    return agent, random_batch(agent, request.param), request.param


def test_loss_equals_the_papers(agent_and_batch):
    agent, batch, sizes = agent_and_batch
    args = Args(ent_coef=0.01, clip_vloss=True, vf_coef=0.25)
    loss, (policy_loss, value_loss, entropy, kl, _) = ppo.ppo_loss(dict(agent.named_parameters()), agent, args, batch)

    logits, values = agent(batch.observations)
    parts = [Categorical(logits=logits[:, i, :size]) for i, size in enumerate(sizes.flat)]
    logprobs = sum(part.log_prob(batch.actions[:, i]) for i, part in enumerate(parts))
    ratio = (logprobs - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.2), batch.values + 0.2)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * errors.max(0).values.mean())
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts).mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(loss, policy_loss + 0.25 * value_loss - 0.01 * entropy)


def test_choices_that_a_part_lacks_are_never_taken_and_get_no_gradient():
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), 3, SIZES)
    missing = np.arange(5) >= SIZES[:, None]
    batch = random_batch(agent.requires_grad_(False), SIZES)
    loss, _ = ppo.ppo_loss(dict(agent.requires_grad_().named_parameters()), agent, Args(ent_coef=1.0), batch)
    loss.backward()
    gradient = agent.actor[-1].weight.grad.view(3, 5, -1).abs().sum(-1).numpy()
    assert (gradient[missing] == 0).all() and (gradient[~missing] > 0).all()


def test_sampling_follows_the_probabilities():
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), 3, SIZES).requires_grad_(False)
    agent.actor[-1].weight *= 100
    still = RunningMoments((3,), enabled=False)
    policy = ppo.Policy(agent, still, still, np.array([-3, 0, 7]))
    observation, times = np.ones((1, 3)), 40_000
    probabilities = agent.logits(torch.ones(1, 3)).softmax(-1)[0].numpy()
    samples = policy(observation.repeat(times, 0), sample=True) - [-3, 0, 7]
    frequencies = (samples[..., None] == np.arange(5)).mean(0)
    np.testing.assert_allclose(frequencies, probabilities, atol=0.01)
    assert probabilities.max(-1).min() > 0.2 and probabilities.max() < 0.98  # not all alike, nor all certain
    np.testing.assert_array_equal(policy(observation)[0], probabilities.argmax(-1) + [-3, 0, 7])


@needs_compiler
def test_the_compiled_update_is_the_update(agent_and_batch):
    agent, batch, _ = agent_and_batch
    args, learner, said = Args(num_minibatches=2, ent_coef=0.01), ppo.Learner.of(agent), []
    learner.learning_rate.fill_(1e-3)
    fast = ppo.compile_update(args, agent, batch, said.append)
    assert "compiled in" in said[0]
    indices, start = torch.randperm(64)[:32], [tensor.clone() for tensor in learner]
    measures = fast(agent, args, learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    expected = ppo.update(agent, args, learner, batch, indices)
    torch.testing.assert_close(measures, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled, learner.theta, rtol=1e-4, atol=1e-5)
    assert not torch.equal(compiled, start[0])


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("cut", [True, False])
def test_truncation_bootstraps_and_termination_does_not(small, cut):
    args = replace(
        small,
        env_id="tests.envs:Ticks-v0",
        env_kwargs=json.dumps({"cut": cut}),
        total_timesteps=20_000,
        num_evals=0,
        gamma=0.9,
        learning_rate=3e-3,
        vf_coef=1.0,
        update_epochs=5,
        norm_obs=False,
    )
    t = np.arange(20)
    values = load_policy(train(args) / "checkpoint.pt").value(t[:, None] / 20)  # in the rewards' own units
    expected = np.full(20, 10.0) if cut else (1 - 0.9 ** (20 - t)) / 0.1
    np.testing.assert_allclose(values, expected, atol=0.5)


@pytest.mark.parametrize("env_id", ["Echo-v0", "Signs-v0"])
def test_learns_what_to_say_wherever_the_numbers_start(small, env_id):
    run = train(
        replace(
            small, env_id=f"tests.envs:{env_id}", total_timesteps=15_000, learning_rate=3e-3, update_epochs=5, gamma=0.0
        )
    )
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] > 9  # of 10; at random less than 4


def test_learns_to_balance(small):
    run = train(
        replace(
            small,
            env_id="CartPole-v1",
            num_envs=8,
            num_steps=64,
            total_timesteps=25_000,
            num_minibatches=8,
            learning_rate=1e-3,
            update_epochs=10,
        )
    )
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] > 300  # at random 22


# ----------------------------------------------------------------------------------------------------- independence


def test_seed_decides_and_evaluation_does_not(small):
    first = train(small)
    assert same(first, train(replace(small, num_evals=0)))
    assert same(first, train(replace(small, num_evals=8, eval_episodes=3)))
    assert same(first, train(replace(small, vec="async")))
    assert not same(first, train(replace(small, seed=2)))


def test_a_loaded_policy_plays_as_the_evaluation_did(small):
    run = train(small)
    policy, env = load_policy(run / "checkpoint.pt"), make_eval_env(small)
    for row in rows(run, "evaluations")[2:]:
        (observation, _), total, over = env.reset(seed=int(row["seed"])), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, over = total + reward, terminated or truncated
        assert total == pytest.approx(float(row["return"]), abs=1e-5)


def test_episodes_of_several_parts_are_restored(small):
    envs = ppo.Environments(small)
    observations = envs.reset(np.ones(4, bool))
    for _ in range(5):
        observations = envs.step(np.full((4, 2, 2), [[1, 0], [2, 4]], np.int8))[0]
    state = envs.state()
    assert envs.restore(state, observations.copy())
    assert envs.actions[0].dtype == np.int8 and envs.actions[0].shape == (4, 2, 2)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, env_id):
    args = replace(SMALL, env_id=env_id, num_steps=64, total_timesteps=8192, checkpoint_every=1000)
    undisturbed = train(replace(args, runs_dir=str(tmp_path / "undisturbed")))

    runs = tmp_path / "killed"
    words, lines = command(replace(args, runs_dir=str(runs))), 0
    for stop in (3, 14):  # before the first checkpoint, and after some
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while lines < stop and process.poll() is None and time.monotonic() < deadline:
            lines = sum(path.read_text().count("\n") - 1 for path in runs.glob("*/progress.csv"))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
        words = [sys.executable, str(SCRIPT), "--resume", str(run)]
    resumed = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "cannot restore" not in resumed.stdout
    assert same(undisturbed, run)
    assert rows(undisturbed, "evaluations") == rows(run, "evaluations")


def test_a_run_says_nothing_on_stderr(small):
    result = subprocess.run(command(replace(small, env_id="LunarLander-v3")), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert "8 observations, 4 actions" in result.stdout


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_envpool_acts_and_shows_true_last_observations(small):
    pytest.importorskip("envpool")
    envs = ppo.Environments(replace(small, env_id="CartPole-v1", vec="envpool"))
    envs.reset(np.ones(4, bool))
    over = np.zeros(4, bool)
    while not over.any():
        observations, rewards, terminated, truncated = envs.step(np.array([0, 0, 1, 1]))
        over = terminated | truncated
        assert (rewards == 1).all()
    assert (observations[:2, 1] < -0.5).all() and (observations[2:, 1] > 0.5).all()  # the cart's speed
    assert terminated.any() and (np.abs(observations[terminated, 2]) > 0.2).all()  # fallen
    assert np.abs(envs.reset(over)).max() <= 0.05  # stands again
    envs.close()

    args = replace(small, env_id="CartPole-v1", vec="envpool")
    result = subprocess.run(command(args), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


# ----------------------------------------------------------------------------------------------------------- errors

MISTAKES = {
    "--env-id Pendulum-v1": "ppo_continuous.py",
    "--env-id FrozenLake-v1": "needs a Box",
    "--env-id tests.envs:Bits-v0": "MultiBinary",
    "--env-id CartPol-v1": "CartPole",
    "--num-minibatches 7 --num-steps 16": "--num-minibatches 7",
    "--total-timesteps 100": "--total-timesteps 100",
    "--ent-coef -0.1": "--ent-coef",
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
