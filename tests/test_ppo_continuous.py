"""The flagship: its mathematics against independent computations, and the promises of its run directory."""

import csv
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
import yaml
from threadpoolctl import threadpool_info, threadpool_limits

import ppo_continuous as ppo
from ppo_continuous import Args, RunningMoments, load_policy, make_eval_env, parse, train
from tests.marks import needs_compiler

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


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["agent"]


def same(a: Path, b: Path) -> bool:
    """Equal weights, normaliser and rows, bit for bit; only the wall time may differ."""
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    tensors = all(torch.equal(one["agent"][name], other["agent"][name]) for name in one["agent"])
    moments = all(torch.equal(one["moments"][name], other["moments"][name]) for name in ("mean", "var"))
    return tensors and moments and rows(a, "episodes") == rows(b, "episodes")


def rows(run: Path, table: str) -> list[dict]:
    with (run / f"{table}.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]


def command(args: Args, *more: str) -> list[str]:
    """The command line of `args`."""
    words = [sys.executable, str(SCRIPT)]
    for name, value in vars(args).items():
        if value != getattr(Args, name):
            flag = name.replace("_", "-")
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return [*words, *more]


# ------------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
def test_advantages_equal_the_recursion(steps):
    generator = np.random.default_rng(steps)
    rewards, values, next_values = generator.normal(size=(3, steps, 5))
    terminated, truncated = generator.random((2, steps, 5)) < 0.15
    ended, gamma, lam = terminated | truncated, 0.97, 0.9

    expected, carry = np.zeros((steps, 5)), np.zeros(5)
    for t in reversed(range(steps)):
        delta = rewards[t] + gamma * np.where(terminated[t], 0, next_values[t]) - values[t]
        carry = delta + gamma * lam * np.where(ended[t], 0, carry)
        expected[t] = carry

    tensors = map(torch.from_numpy, (rewards, values, next_values, terminated, ended))
    np.testing.assert_allclose(ppo.generalised_advantages(*tensors, gamma, lam), expected, atol=1e-5)


def test_nothing_follows_a_termination_not_even_nan():
    one, no = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    assert ppo.generalised_advantages(one, one, one * torch.nan, ~no, ~no, 0.9, 0.9).item() == 0


def test_moments_equal_those_of_all_data():
    data = np.random.default_rng(0).normal(5, 3, (1000, 4))
    moments = RunningMoments((4,), enabled=True)
    for part in np.split(data, [1, 10, 500]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, data.mean(0))
    np.testing.assert_allclose(moments.var, data.var(0))
    assert np.abs(moments.normalise(data * 1000)).max() == 10


def test_adam_is_torchs():
    agent = torch.nn.Linear(3, 2).requires_grad_(False)
    learner = ppo.Learner.of(agent)
    learner.learning_rate.fill_(0.01)
    parameter = learner.theta.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(2000):
        parameter.grad = torch.randn(8)
        learner.adam_step(parameter.grad)
        adam.step()
    torch.testing.assert_close(learner.theta, parameter.detach())
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(agent.parameters()), learner.theta)


def test_the_critic_takes_larger_steps():
    args = Args(learning_rate=0.01, critic_lr_ratio=5.0)
    agent = ppo.Agent(args, 3, 2).requires_grad_(False)
    learner = ppo.Learner.of(agent)._replace(learning_rate=ppo.step_sizes(args, agent))
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    learner.adam_step(torch.ones_like(learner.theta))  # of which Adam's first step is the rate
    for name, parameter in agent.named_parameters():
        expected = 0.05 if name.startswith("critic") else 0.01
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 16, 128])
def test_numpy_computes_what_torch_does(rows):
    torch.manual_seed(rows)
    network = ppo.mlp((17, 64, 64, 6), last_scale=1.0).requires_grad_(False)
    forward, observations = ppo.in_numpy(network), torch.randn(rows, 17)
    outputs = forward(observations.numpy())
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, network(observations), atol=1e-5)

    memory = np.empty(4 * 17 * rows + 64, np.uint8)
    for offset in range(0, 64, 4):  # a resumed run has its arrays elsewhere
        moved = memory[offset : offset + 4 * 17 * rows].view(np.float32).reshape(rows, 17)
        moved[:] = observations
        assert np.array_equal(forward(moved), outputs)


def test_numpy_refuses_a_network_that_a_fork_has_changed():
    with pytest.raises(AssertionError, match="another in_numpy"):
        ppo.in_numpy(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)))


def test_numpy_takes_one_thread(small):
    threadpool_limits(2, "blas")
    train(small)
    assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}


def random_batch(agent: ppo.Agent, rows: int = 64) -> ppo.Batch:
    observations, actions = torch.randn(rows, 3), torch.randn(rows, 2)
    mean, log_std, values = agent(observations)
    logprobs = ppo.log_prob(mean, log_std, actions) + 0.3 * torch.randn(rows)
    old_values, advantages, returns = values + 0.3 * torch.randn(rows), *torch.randn(2, rows)
    return ppo.Batch(observations, actions, logprobs, old_values, advantages, returns)


def test_loss_equals_the_papers():
    torch.manual_seed(0)
    args = Args(ent_coef=0.01, clip_vloss=True)
    agent = ppo.Agent(args, 3, 2).requires_grad_(False)
    batch = random_batch(agent)
    loss, (policy_loss, value_loss, entropy, kl, _) = ppo.ppo_loss(dict(agent.named_parameters()), agent, args, batch)

    mean, log_std, values = agent(batch.observations)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    ratio = (gaussian.log_prob(batch.actions).sum(-1) - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.2), batch.values + 0.2)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * errors.max(0).values.mean())
    torch.testing.assert_close(entropy, gaussian.entropy().sum(-1)[0])
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(loss, policy_loss + 0.25 * value_loss - 0.01 * entropy)


def test_an_update_stops_at_the_gradient_norm():
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), 3, 2).requires_grad_(False)
    batch, learner = random_batch(agent), ppo.Learner.of(agent)
    ppo.update(agent, Args(max_grad_norm=1e-3), learner, batch, torch.arange(64))
    assert learner.first_moment.norm() == pytest.approx(1e-4, rel=1e-3)  # a tenth of the clipped gradient


@needs_compiler
def test_the_compiled_update_is_the_update():
    torch.manual_seed(0)
    agent = ppo.Agent(Args(), 3, 2).requires_grad_(False)
    batch, learner = random_batch(agent), ppo.Learner.of(agent)
    learner = learner._replace(learning_rate=ppo.step_sizes(Args(learning_rate=1e-3), agent))
    said = []
    fast = ppo.compile_update(Args(num_minibatches=2), agent, learner, batch, said.append)
    assert "compiled in" in said[0]
    indices, start = torch.randperm(64)[:32], [tensor.clone() for tensor in learner]
    measures = fast(agent, Args(num_minibatches=2), learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    torch.testing.assert_close(ppo.update(agent, Args(num_minibatches=2), learner, batch, indices), measures)
    torch.testing.assert_close(learner.theta, compiled)


def test_learning_rate_schedules():
    def factors(**settings):
        return [ppo.lr_factor(Args(**settings), i, 4) for i in (1, 2, 3, 4)]

    assert factors(lr_schedule="constant") == [1, 1, 1, 1]
    assert factors(lr_schedule="linear") == [1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(factors(lr_schedule="cosine"), [1, 0.853553, 0.5, 0.146447], rtol=1e-5)
    assert factors(lr_schedule="constant", lr_warmup=0.5) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("num_envs", [1, 3, 16, 24, 64, 100, 128, 5000])
def test_default_rollouts_divide(num_envs):
    steps = ppo.default_steps(4096, num_envs, 64)
    assert num_envs * steps % 64 == 0 and (num_envs > 128 or 3000 < num_envs * steps < 5500)


@pytest.mark.parametrize(("env_id", "steps"), [("Pendulum-v1", 384), ("HalfCheetah-v4", 1024), ("Ant-v4", 1024)])
def test_the_more_actions_the_longer_a_rollout(small, env_id, steps):
    run = train(replace(small, env_id=env_id, num_steps=None, total_timesteps=4096, update_epochs=1, num_evals=0))
    assert yaml.safe_load((run / "config.yaml").read_text())["num_steps"] == steps  # 1536 and, at most, 4096 over 4


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("cut", [True, False])
def test_truncation_bootstraps_and_termination_does_not(small, cut):
    args = replace(
        small,
        env_id="tests.envs:Clock-v0",
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


def test_learns_to_mirror(small):
    run = train(replace(small, total_timesteps=25_000, learning_rate=3e-3, update_epochs=5, gamma=0.0))
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] > -0.5  # a random policy's is -11


def test_target_kl_ends_the_update_of_a_rollout(small):
    run = train(replace(small, target_kl=1e-12))
    updates = [int(row["updates"]) for row in rows(run, "progress")]
    assert updates[:3] == [2, 4, 6]  # the first minibatch's KL is 0, the second's is not


# ----------------------------------------------------------------------------------------------------- independence


def test_seed_decides_and_evaluation_does_not(small):
    first = train(small)
    assert same(first, train(small))
    assert same(first, train(replace(small, num_evals=0)))
    assert same(first, train(replace(small, num_evals=8, eval_episodes=3)))
    assert not same(first, train(replace(small, seed=2)))


def test_video_changes_nothing_and_shows_the_episode(small):
    args = replace(small, env_id="Pendulum-v1")
    run = train(replace(args, capture_video=True))
    assert same(run, train(args))
    from moviepy import VideoFileClip

    videos = sorted((run / "videos").iterdir())
    assert [video.name for video in videos] == ["step-000000512.mp4", "step-000001024.mp4"]
    with VideoFileClip(str(videos[1])) as clip:
        assert clip.n_frames in (200, 201)
        assert clip.get_frame(1).std() > 5


def test_training_moves_the_critic_at_a_rate_of_its_own(small):
    args = replace(small, num_evals=0, critic_lr_ratio=1e-12)
    short, long = weights(train(replace(args, total_timesteps=128))), weights(train(args))
    for name in short:
        moved = (short[name] - long[name]).abs().max()
        assert moved < 1e-9 if name.startswith("critic") else moved > 1e-6, name


@pytest.mark.parametrize("size", [1, 6])
def test_the_more_actions_the_smaller_their_first_deviation(size):
    log_std = ppo.Agent(Args(), observation_size=3, action_size=size).log_std
    np.testing.assert_allclose(log_std.exp().detach(), size**-0.4, rtol=1e-6)
    assert ppo.Agent(Args(log_std_init=-0.25), 3, size).log_std.unique() == -0.25


def test_async_steps_like_sync(small):
    assert same(train(small), train(replace(small, vec="async")))


def test_a_policy_does_not_depend_on_where_its_observations_lie():
    """Products of two or three rows differ in the last bits with their alignment in memory."""
    torch.manual_seed(0)
    bounds = np.ones(2, np.float32)
    still = RunningMoments((17,), enabled=False)
    policy = ppo.Policy(ppo.Agent(Args(), 17, 2), still, still, np.stack((-bounds, bounds)))
    data, answers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32), set()
    for offset in range(0, 64, 4):
        memory = np.empty(data.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        observations = memory[start : start + data.nbytes].view(np.float32).reshape(2, 17)
        observations[:] = data
        answers.add(policy(observations).tobytes())
    assert len(answers) == 1


def test_statistics_are_frozen_within_a_rollout(small):
    once = train(replace(small, total_timesteps=128, num_evals=0, checkpoint_every=128))
    assert torch.load(once / "checkpoint.pt", weights_only=True)["moments"]["count"] == 128


# ------------------------------------------------------------------------------------------------------ run directory


def test_what_a_run_leaves(small):
    run = train(small)
    assert run.name.startswith("tests.envs-Mirror-v0__ppo_continuous__1__")
    assert (run / "ppo_continuous.py").read_text() == SCRIPT.read_text()
    episodes, evaluations = rows(run, "episodes"), rows(run, "evaluations")
    assert len(episodes) == 100 and all(row["length"] == "10" for row in episodes)
    assert episodes[0]["step"] == "40" and {row["step"] for row in evaluations} == {"512", "1024"}
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 1024 and result["evaluation"]["step"] == 1024
    assert {"command", "git_commit", "packages", "host", "device", "started"} <= json.loads(
        (run / "meta.json").read_text()
    ).keys()
    assert list(run.glob("events.out.tfevents*")) and not list(run.rglob("*unfinished*"))
    policies = [load_policy(path) for path in sorted((run / "policies").iterdir())]
    observations = np.random.default_rng(0).normal(size=(5, 2, 2))
    np.testing.assert_array_equal(policies[1](observations), load_policy(run / "checkpoint.pt")(observations))
    assert len(policies) == 2 and (policies[0](observations) != policies[1](observations)).any()

    again = train(parse(["--config", str(run / "config.yaml"), "--runs-dir", small.runs_dir]))
    assert same(run, again)


def test_a_loaded_policy_plays_as_the_evaluation_did(small):
    run = train(small)
    policy, env = load_policy(run / "checkpoint.pt"), make_eval_env(small)
    for row in rows(run, "evaluations")[2:]:
        (observation, _), total, over = env.reset(seed=int(row["seed"])), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, over = total + reward, terminated or truncated
        assert total == pytest.approx(float(row["return"]), abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(small, capsys):
    with pytest.raises(SystemExit) as stop:
        train(replace(small, env_kwargs='{"breaks": 150}', eval_env_kwargs='{"breaks": null}'))
    assert stop.value.code == 1
    (run,) = Path(small.runs_dir).iterdir()
    assert "ended at step 640" in capsys.readouterr().out and not (run / "result.json").exists()
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


RESUMED = {
    "HalfCheetah-v4": {"num_envs": 2, "total_timesteps": 8192},
    "Hopper-v4": {"num_envs": 4, "total_timesteps": 8192},
    "LunarLander-v3": {"num_envs": 4, "total_timesteps": 8192, "env_kwargs": '{"continuous": true}'},
}


@pytest.mark.parametrize("env_id", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, env_id):
    args = replace(SMALL, env_id=env_id, num_steps=64, checkpoint_every=1000, **RESUMED[env_id])
    undisturbed = train(replace(args, runs_dir=str(tmp_path / "undisturbed")))

    runs = tmp_path / "killed"
    words, lines = command(replace(args, runs_dir=str(runs))), 0
    for stop in (3, 14, 29):  # before the first checkpoint, and after some
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(small, number):
    args = replace(small, total_timesteps=1_000_000, checkpoint_every=1_000_000)
    process = subprocess.Popen(command(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(Path(args.runs_dir).glob("*/progress.csv")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    (run,) = Path(args.runs_dir).iterdir()
    assert process.returncode == 128 + number and not errors
    assert f"--resume {run}" in output and (run / "checkpoint.pt").exists()


@needs_compiler
def test_a_compiled_run_resumes_to_the_same_weights(small):
    args = replace(small, compile=True, num_evals=0)
    undisturbed, words = train(args), command(args)[2:]
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            train(parse(words), interrupts=[signal.SIGINT])
        words = ["--resume", str(max(Path(args.runs_dir).iterdir()))]
    assert same(undisturbed, train(parse(words)))


def test_a_torn_checkpoint_gives_way_to_the_one_before(small, capsys):
    args = replace(small, total_timesteps=512)
    run = train(args)
    checkpoint, previous = run / "checkpoint.pt", run / "checkpoint.previous.pt"
    for damage in (
        lambda good: good[: len(good) // 2],
        lambda good: good[:3000] + bytes(200) + good[3200:],
        lambda good: good[:20_000] + bytes(255 - byte for byte in good[20_000:20_200]) + good[20_200:],
        lambda _: b"",
    ):
        good = checkpoint.read_bytes()
        checkpoint.write_bytes(damage(good))
        train(parse(["--resume", str(run)]))
        assert "checkpoint.pt is torn" in capsys.readouterr().err
        assert json.loads((run / "result.json").read_text())["steps"] == 512
        previous.write_bytes(checkpoint.read_bytes())  # a resumed run may have saved only once
    assert same(train(args), run)

    for path in run.glob("checkpoint*.pt"):
        path.write_bytes(b"nothing")
    before = (run / "episodes.csv").read_text()
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            train(parse(["--resume", str(run)]))
        assert stop.value.code == 2 and "no good one before it" in capsys.readouterr().err
    assert (run / "episodes.csv").read_text() == before


def test_rows_that_were_cut_off_leave_no_hole(small):
    """A checkpoint straight after a resume must not count rows that the resume dropped."""
    run = train(replace(small, num_evals=1))
    with (run / "evaluations.csv").open("a") as file:
        file.write("a row from after the checkpoint\n" * 5)
    sizes = torch.load(run / "checkpoint.pt", weights_only=True)["sizes"]
    resumed = ppo.Run(small, run, sizes, 1024)
    assert resumed.sizes() == sizes
    resumed.close()


def test_an_episode_that_does_not_replay_begins_anew(small):
    envs = ppo.Environments(replace(small, env_id="Pendulum-v1"))
    observations = envs.reset(np.ones(4, bool))
    for _ in range(5):
        observations = envs.step(np.ones((4, 1), np.float32))[0]
    state = envs.state()
    assert envs.restore(state, observations.copy())
    assert not envs.restore(state | {"actions": -state["actions"]}, observations.copy())
    over = {"actions": torch.ones(300, 4, 1)}  # an episode that would have ended on the way
    assert not envs.restore(state | over, observations.copy())


def test_a_runs_dir_that_cannot_be(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train(replace(small, runs_dir=str(tmp_path / "file")))
    assert stop.value.code == 2 and "--runs-dir" in capsys.readouterr().err


def test_config_and_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning-rate: 1e-3\nnum_envs: 8\nactor_sizes: [32, 16]\nnorm_obs: false\nenv_kwargs: {a: 1}\n")
    args = parse(["--config", str(config), "--num-envs", "2"])
    assert (args.learning_rate, args.num_envs, args.actor_sizes, args.norm_obs) == (1e-3, 2, (32, 16), False)
    assert json.loads(args.env_kwargs) == {"a": 1}


def test_a_run_says_nothing_on_stderr(small):
    result = subprocess.run(command(replace(small, env_id="HalfCheetah-v4")), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert "\r" not in result.stdout and "\033" not in result.stdout and "evaluation" in result.stdout


# ----------------------------------------------------------------------------------------------------------- errors

MISTAKES = {
    "--env-id HalfCheeta-v4": "HalfCheetah",
    "--env-id HalfCheetah-v9": "v9",
    "--env-id nowhere:Thing-v0": "nowhere",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id tests.envs:Pair-v0": "Dict",
    "--env-id tests.envs:Whole-v0": "real numbers",
    "--env-kwargs [1]": "--env-kwargs",
    "--env-kwargs {'a':1}": "JSON",
    '--env-kwargs {"wings":2}': "--env-kwargs",
    '--env-kwargs {"reset_noise_scale":-1}': '--env-kwargs {"reset_noise_scale":-1}: ',
    '--env-id Pendulum-v1 --eval-env-kwargs {"g":"x"}': "--eval-env-kwargs",
    "--seed 3000000000": "--seed 3000000000: must be below",
    "--num-envs 0": "--num-envs 0",
    "--num-steps 0": "--num-steps 0",
    "--num-envs 3 --num-steps 100": "300",
    '--env-id Ant-v4 --eval-env-kwargs {"use_contact_forces":true}': "--eval-env-kwargs",
    "--num-minibatches 7 --num-steps 16": "--num-minibatches 7",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate nan": "--learning-rate",
    "--learning-rate fast": "Error parsing --learning-rate",
    "--lerning-rate 1": "Perhaps you meant: --learning-rate",
    "--vec threads": "sync",
    "--gamma 1.5": "--gamma",
    "--ent-coef -0.1": "--ent-coef",
    "--total-timesteps 100": "4096",
    "--num-evals -1": "--num-evals",
    "--actor-sizes 64 0": "--actor-sizes",
    "--device cuda": "--device cuda",
    "--vec envpool": "pip install envpool",
    "--track": "pip install wandb",
    "--resume .": "--resume",
    "--config nowhere.yaml": "--config",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ppo, "find_spec", lambda name: None)
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        train(parse([*mistake.split(), "--runs-dir", str(runs)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not runs.exists()
    assert error.count("\n") == 1 and MISTAKES[mistake] in error


def test_mistakes_about_other_runs(small, tmp_path, capsys):
    run = train(small)

    def error(*words):
        with pytest.raises(SystemExit) as stop:
            train(parse(list(words)))
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--env-id" in error("--resume", str(run), "--env-id", "Hopper-v4")
    own, foreign = (run / "checkpoint.pt").read_bytes(), train(replace(small, env_id="Pendulum-v1")) / "checkpoint.pt"
    (run / "checkpoint.pt").write_bytes(foreign.read_bytes())
    assert "Pendulum-v1" in error("--resume", str(run))
    (run / "checkpoint.pt").write_bytes(own)
    assert "--learning-rate" in error("--resume", str(run), "--learning-rate", "1")
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps(meta | {"script": "sac_continuous"}))
    assert "sac_continuous.py" in error("--resume", str(run))
    config = tmp_path / "typo.yaml"
    config.write_text("learning_rat: 1")
    assert "learning_rate" in error("--config", str(config))
    config.write_text("learning_rate: quick")
    assert f"--config {config}: Error parsing --learning-rate" in error("--config", str(config))


def test_episodes_are_restored_exactly_in_processes_too(small):
    args = replace(small, env_id="Hopper-v4", vec="async", num_evals=0)
    half = train(replace(args, total_timesteps=512, lr_schedule="constant"))
    whole = train(replace(args, lr_schedule="constant"))
    envs = ppo.Environments(args)
    saved = torch.load(half / "checkpoint.pt", weights_only=True)
    assert envs.restore(saved["environments"], saved["observations"].numpy())
    assert len(rows(half, "episodes")) < len(rows(whole, "episodes"))
    envs.close()


def test_environments_never_pay_for_a_reset():
    envs = ppo.Environments(replace(SMALL, env_id="Pendulum-v1"))
    envs.reset(np.ones(4, bool))
    for t in range(1, 401):
        _, _, terminated, truncated = envs.step(np.zeros((4, 1), np.float32))
        assert truncated.all() == (t % 200 == 0) and not terminated.any()
        if truncated.all():
            assert envs.reset(truncated).shape == (4, 3)
    assert isinstance(envs.envs, gym.vector.SyncVectorEnv)


def test_envpool_learns_from_true_last_observations_and_says_what_it_cannot_restore(small, capsys, monkeypatch):
    pytest.importorskip("envpool")
    args = replace(small, env_id="Hopper-v4", vec="envpool", total_timesteps=2048)
    envs = ppo.Environments(args)
    observations = envs.reset(np.ones(4, bool))
    for _ in range(100):
        observations, _, terminated, truncated = envs.step(np.ones((4, 3), np.float32))
        over = terminated | truncated
        if over.any():
            assert (observations[over, 0] < 0.8).any() or (np.abs(observations[over, 1]) > 0.15).any()  # has fallen
            assert np.abs(envs.reset(over) - [1.25, *np.zeros(10)]).max() < 0.01  # stands again
    envs.close()

    seeds, make = [], ppo.make_envpool
    monkeypatch.setattr(ppo, "make_envpool", lambda args: seeds.append(args.seed) or make(args))
    run = train(replace(args, total_timesteps=1024, lr_schedule="constant", seed=2**31 - 1))
    (run / "checkpoint.pt").unlink()
    train(parse(["--resume", str(run)]))
    assert "--vec envpool cannot restore the running episodes" in capsys.readouterr().out
    assert len(set(seeds)) == 2  # those that begin anew are not the run's first episodes again
