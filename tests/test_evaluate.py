"""Evaluation by the harness, of real runs."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

import benchmark.evaluate
import ppo_continuous as ppo
from benchmark.__main__ import main
from benchmark.evaluate import Episode, explained_variance, realised_returns, rows_of, share_at_bounds, summary
from benchmark.random_policy import baseline_of, play_at_random
from benchmark.runs import Run, find_runs, import_script, names_of

ROOT = Path(__file__).parent.parent
SETTINGS = ["--total-timesteps", "2048", "--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    words = ["--env-id", "Pendulum-v1", "--no-compile", "--num-evals", "2", "--eval-episodes", "3"]
    runs = tmp_path_factory.mktemp("runs")
    return Run(ppo.train(ppo.parse([*words, *SETTINGS, "--runs-dir", str(runs)])))


def evaluate(*arguments: object) -> int:
    try:
        main(["evaluate", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def copy_with(run: Run, path: Path, **settings: object) -> Run:
    shutil.copytree(run.directory, path)
    (path / "config.yaml").write_text(yaml.safe_dump(run.config | settings))
    return Run(path)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_plays_what_the_run_itself_evaluated(run, tmp_path):
    assert evaluate(run.directory, "--episodes", 3, "-o", tmp_path) == 0
    final = run.table("evaluations")["return"][-3:]
    np.testing.assert_allclose([float(row["return"]) for row in rows(tmp_path / "episodes.csv")], final, rtol=1e-4)
    assert evaluate(run.directory, "--episodes", 3, "--policy", 1024, "-o", tmp_path) == 0
    earlier = run.table("evaluations")["return"][:3]
    np.testing.assert_allclose([float(row["return"]) for row in rows(tmp_path / "episodes.csv")], earlier, rtol=1e-4)


def test_the_best_policy_need_not_be_the_last(run, tmp_path):
    copy = tmp_path / run.directory.name
    shutil.copytree(run.directory, copy)
    shutil.copy(run.policies()[1024], copy / "best.pt")
    table = run.table("evaluations")["return"]
    for which, returns in (("best", table[:3]), ("last", table[3:])):
        assert evaluate(copy, "--episodes", 3, "--policy", which, "-o", tmp_path) == 0
        played = rows(tmp_path / "episodes.csv")
        np.testing.assert_allclose([float(row["return"]) for row in played], returns, rtol=1e-4)
        assert {row["policy"] for row in played} == {which}
    assert np.abs(table[:3] - table[3:]).min() > 1e-3 * np.abs(table).max()


def test_the_seeds_are_those_asked_for(run, tmp_path):
    assert evaluate(run.directory, "--seeds", 10_002, 77, 10_001, "-o", tmp_path) == 0
    played = rows(tmp_path / "episodes.csv")
    assert [row["seed"] for row in played] == ["10002", "77", "10001"]
    returns = [float(row["return"]) for row in played]
    expected = run.table("evaluations")["return"]
    assert returns[::2] == pytest.approx([expected[-1], expected[-2]], rel=1e-4)
    assert returns[1] not in returns[::2]


def test_stochastic_episodes_differ_and_repeat(run, tmp_path):
    played = []
    for more in ([], ["--stochastic"], ["--stochastic"]):
        assert evaluate(run.directory, "--seeds", 7, 8, *more, "-o", tmp_path) == 0
        played.append([row["return"] for row in rows(tmp_path / "episodes.csv")])
    assert played[0] != played[1] == played[2]


def test_share_at_bounds(run, tmp_path, capsys):
    space = gym.spaces.Box(np.float32([-1, 0, 0]), np.float32([3, 10, 10]))
    assert share_at_bounds(np.float32([2.97, 0.2, 0.05]), space) == pytest.approx(2 / 3)
    assert np.isnan(share_at_bounds(np.float32([0]), gym.spaces.Box(0, np.inf, (1,))))
    assert np.isnan(share_at_bounds(1, gym.spaces.Discrete(2)))
    half_fixed = gym.spaces.Box(np.float32([-1, 3]), np.float32([1, 3]))  # what has no choice does not count
    assert share_at_bounds(np.float32([0, 3]), half_fixed) == 0 and share_at_bounds(np.float32([1, 3]), half_fixed) == 1

    assert evaluate(run.directory, "--episodes", 1, "-o", tmp_path) == 0
    policy, env = run.module().load_policy(run.last_checkpoint), gym.make("Pendulum-v1")
    observation, at_bounds = env.reset(seed=10_000)[0], []
    for _ in range(200):
        action = policy(observation[None])[0]
        at_bounds.append(abs(action.item()) > 1.96)
        observation = env.step(action)[0]
    assert float(rows(tmp_path / "episodes.csv")[0]["at_bounds"]) == pytest.approx(np.mean(at_bounds))
    assert f"{np.mean(at_bounds):>9.0%}" in capsys.readouterr().out


def test_a_film_its_caption_and_its_row_are_of_one_episode(run, tmp_path, monkeypatch, capsys):
    filmed = []

    def film(*arguments: object) -> float:
        filmed.append((arguments[1], original(*arguments)))
        return filmed[-1][1]

    original = benchmark.evaluate.film
    monkeypatch.setattr("benchmark.evaluate.film", film)
    assert evaluate(run.directory, "--episodes", 3, "--stochastic", "--video", "-o", tmp_path) == 0
    ((seed, earned),) = filmed
    played = rows(tmp_path / "episodes.csv")
    (shown,) = [row for row in played if row["film"]]
    assert shown["film"] == f"{run.directory.name}.mp4" and int(shown["seed"]) == seed
    assert float(shown["return"]) == earned == max(float(row["return"]) for row in played)
    assert f"film of the best, seed {seed}, evaluation return {earned:,.1f}\n" in capsys.readouterr().out
    assert evaluate(run.directory, "--episodes", 3, "--stochastic", "-o", tmp_path) == 0  # not filmed, it is the same
    assert [row["return"] for row in rows(tmp_path / "episodes.csv")] == [row["return"] for row in played]


def test_films_and_animations(run, tmp_path):
    assert evaluate(run.directory, "--episodes", 1, "--gif", "-o", tmp_path) == 0
    from moviepy import VideoFileClip

    with VideoFileClip(str(tmp_path / f"{run.directory.name}.mp4")) as clip:
        assert clip.n_frames in (200, 201) and clip.get_frame(1).std() > 5
        seconds = clip.duration
    with VideoFileClip(str(tmp_path / f"{run.directory.name}.gif")) as clip:
        assert clip.size[0] == 320 and clip.get_frame(1).std() > 5
        assert clip.duration == pytest.approx(min(seconds, 10), abs=0.1)  # no faster than life


def test_what_is_stopped_leaves_no_half_of_a_film(tmp_path):
    words = [sys.executable, "-m", "benchmark", "evaluate", "zoo/HalfCheetah-v4__ppo_continuous", "--video"]
    process = subprocess.Popen([*words, "--episodes", "1", "-o", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.iterdir()):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


def test_a_run_whose_script_is_imported_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    shutil.copy(ROOT / "dqn.py", tmp_path)
    assert import_script(tmp_path / "dqn.py").SCRIPT == "dqn" and [*tmp_path.iterdir()] == [tmp_path / "dqn.py"]


def test_a_reader_that_has_enough_is_no_error():
    words = [sys.executable, "-m", "benchmark", "evaluate", "--help"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_values_are_compared_with_what_followed(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert evaluate(run.directory, "--episodes", 2, "--analyze-value", "-o", tmp_path) == 0
    path = tmp_path / f"{run.directory.name}-value.csv"
    assert path.with_suffix(".png").stat().st_size > 10_000 and path.with_suffix(".svg").exists()
    compared = rows(path)
    predicted, realised = (np.array([float(row[name]) for row in compared]) for name in ("predicted", "realised"))
    assert len(compared) == 400
    assert f"explained variance {explained_variance(predicted, realised):.3f}" in capsys.readouterr().out
    policy, env = ppo.load_policy(run.last_checkpoint), ppo.make_eval_env(ppo.Args(**run.config))
    assert predicted[0] == pytest.approx(policy.value(env.reset(seed=10_000)[0][None])[0], rel=1e-4)


def test_realised_returns():
    ended = Episode(0, rewards=[1.0, 2.0, 4.0], values=[0.0] * 3)
    cut = Episode(0, rewards=[1.0, 2.0, 4.0], values=[0.0, 0.0, 0.0, 8.0])
    np.testing.assert_allclose(realised_returns(ended, 0.5), [3.0, 4.0, 4.0])
    np.testing.assert_allclose(realised_returns(cut, 0.5), [4.0, 6.0, 8.0])


def test_what_is_explained_is_a_share_of_what_was_realised():
    assert explained_variance(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == 0.75


def test_a_summary_is_of_episodes_and_shares_are_of_their_steps():
    episodes = [
        Episode(7, [1.0], [], [1.0], terminated=True),
        Episode(8, [2.0] * 3, [], [0.0] * 3),
        Episode(9, [1.0] * 2, [], [0.0] * 2),
    ]
    assert summary("x", episodes, 1).split() == ["x", "3", "3.0", "±", "2.2", "1.0", "6.0", "2.0", "17%"]
    assert [row[2:6] for row in rows_of("x", "last", episodes, {})] == [[7, 1.0, 1, 1], [8, 6.0, 3, 0], [9, 2.0, 2, 0]]


@pytest.mark.parametrize("ends", [("truncated",), ("terminated", "truncated")])
def test_values_go_on_at_the_policys_discount_after_the_ends_it_bootstraps_from(tmp_path, monkeypatch, ends):
    pytest.importorskip("matplotlib")
    words = ["--env-id", "tests.envs:Clock-v0", "--env-kwargs", '{"cut": false}', "--no-compile", "--num-evals", "0"]
    run = Run(ppo.train(ppo.parse([*words, "--gamma", "0.9", *SETTINGS, "--runs-dir", str(tmp_path)])))
    module = run.module()

    class Policy(module.Policy):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            self.bootstraps = ends

    module.Policy = Policy
    monkeypatch.setattr(Run, "module", lambda self: module)
    assert evaluate(run.directory, "--episodes", 1, "--analyze-value", "-o", tmp_path) == 0
    after = ppo.load_policy(run.last_checkpoint).value(np.ones((1, 1), np.float32))[0]
    last = float(rows(tmp_path / f"{run.directory.name}-value.csv")[-1]["realised"])
    assert abs(after) > 1e-3
    assert last == pytest.approx(1 + (0.9 * after if "terminated" in ends else 0), abs=1e-4)


def test_runs_of_one_name_have_films_and_rows_of_their_own(run, tmp_path, monkeypatch):
    for job in ("gamma=0.9", "gamma=0.99"):
        shutil.copytree(run.directory, tmp_path / "sweep" / job / run.directory.name)
        (tmp_path / "sweep" / job / "job.json").write_text("{}")
    assert evaluate(tmp_path / "sweep", "--episodes", "1", "--analyze-value", "-o", tmp_path / "one") == 0
    assert [row["run"] for row in rows(tmp_path / "one" / "episodes.csv")] == ["gamma=0.9", "gamma=0.99"]
    assert {path.name for path in (tmp_path / "one").glob("*.png")} == {"gamma=0.9-value.png", "gamma=0.99-value.png"}
    shutil.copytree(tmp_path / "sweep", tmp_path / "again")
    assert len({*names_of(find_runs([tmp_path / "sweep", tmp_path / "again"]))}) == 4
    monkeypatch.chdir(run.directory)
    assert names_of([Run(Path("."))]) == [run.directory.name]


def test_another_process_computes_as_training_did(tmp_path):
    """Where the smallest numbers are 0, as they are where it trained."""
    words = ["--env-id", "tests.envs:Halves-v0", "--eval-episodes", "1", "--num-evals", "1", "--no-compile"]
    run = Run(ppo.train(ppo.parse([*words, *SETTINGS, "--runs-dir", str(tmp_path)])))
    command = [sys.executable, "-m", "benchmark", "evaluate", run.directory, "--episodes", "1", "-o", tmp_path / "out"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    (row,) = rows(tmp_path / "out" / "episodes.csv")
    assert float(row["return"]) == run.evaluations["return"][-1] == 126


def test_a_fork_is_evaluated_by_its_own_copy(run, tmp_path):
    fork = tmp_path / run.directory.name
    fork.mkdir()
    for path in run.directory.glob("*.*"):
        (fork / path.name).write_bytes(path.read_bytes())
    with (fork / "ppo_continuous.py").open("a") as source:
        source.write("make = make_eval_env\ndef make_eval_env(*args): ")
        source.write("return gym.wrappers.TransformReward(make(*args), lambda reward: 1.0)\n")
    assert evaluate(fork, "--episodes", 2, "-o", tmp_path) == 0
    assert [float(row["return"]) for row in rows(tmp_path / "episodes.csv")] == [200.0, 200.0]


def test_other_arguments_of_the_environment(run, tmp_path):
    assert evaluate(run.directory, "--episodes", 1, "--env-kwargs", '{"g": 0.1}', "-o", tmp_path) == 0
    light = float(rows(tmp_path / "episodes.csv")[0]["return"])
    assert light != pytest.approx(run.table("evaluations")["return"][-3], rel=1e-3)
    lighter = copy_with(run, tmp_path / "lighter", eval_env_kwargs='{"g": 0.1}')  # which more arguments leave as it is
    for played, kwargs in ((lighter, {}), (run, {"g": 0.1})):
        words = ["--episodes", 1, "--env-kwargs", json.dumps(kwargs | {"max_episode_steps": 50})]
        assert evaluate(played.directory, *words, "-o", tmp_path / "played" / played.directory.name) == 0
    one, other = (rows(path)[0] for path in tmp_path.glob("played/*/episodes.csv"))
    assert one["length"] == other["length"] == "50" and one["return"] == other["return"]


def test_a_run_without_the_policy_is_left_out_and_named(run, tmp_path, capsys):
    for name in ("whole", "without"):
        shutil.copytree(run.directory, tmp_path / "runs" / name)
    (tmp_path / "runs" / "without" / "best.pt").unlink()
    assert evaluate(tmp_path / "runs", "--policy", "best", "--episodes", 1, "-o", tmp_path / "out") == 0
    assert f"left out: {tmp_path}/runs/without has no policy best" in capsys.readouterr().out
    assert [row["run"] for row in rows(tmp_path / "out" / "episodes.csv")] == ["whole"]


@pytest.mark.parametrize("name", ["ppo_continuous.py", "config.yaml", "meta.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_torn_run_is_one_line(run, tmp_path, capsys, name, share):
    torn = tmp_path / "torn"
    shutil.copytree(run.directory, torn)
    text = (torn / name).read_text()
    (torn / name).write_text(text[: text.find("\n", int(share * len(text))) if share else 0])
    assert evaluate(torn, "-o", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert f"{torn}" in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["CartPole-v1", "--episodes", "0"], "--episodes 0: must be at least 1"),
        (["CartPole-v1", "--env-kwargs", '{"render_mode": 5}'], "CartPole-v1 with --env-kwargs {"),
        (["CartPole-v1", "--env-kwargs", '[["g", 1]]'], "must be a JSON object"),
        (["CartPol-v1", "CartPole-v1"], "Environment `CartPol` doesn't exist"),
        ([], "name an environment"),
    ],
)
def test_random_policies_bad_input_is_one_line(capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        main(["random", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and told in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUN", "--seeds", "3", "-1"], "--seeds -1: must be at least 0"),
        (["nowhere"], "no run directory in nowhere"),
        (["RUN", "--policy", "77"], "last, best, or a step of these: 1024, 2048"),
        (["RUN", "--episodes", "0"], "--episodes 0: must be at least 1"),
        (["RUN", "--env-kwargs", "[1]"], "--env-kwargs [1]: must be a JSON object"),
        (["RUN", "--env-kwargs", '{"gg": 1}'], "unexpected keyword argument 'gg'"),
        (["RUN", "-o", "/dev/null/x"], "--output /dev/null/x: Not a directory"),
        (["RUN", "--render"], "--render: there is no display"),
    ],
)
def test_bad_input_is_one_line(run, capsys, monkeypatch, arguments, told):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert evaluate(*(str(run.directory) if word == "RUN" else word for word in arguments)) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_an_environment_that_cannot_be_drawn_is_told_apart_from_one_that_cannot_be_made(run, tmp_path, capsys):
    fork = tmp_path / run.directory.name
    shutil.copytree(run.directory, fork)
    with (fork / "ppo_continuous.py").open("a") as source:
        source.write("\n\ndef make_eval_env(args, render_mode=None):\n")
        source.write("    return gym.make(args.env_id) if render_mode is None else 1 / 0\n")
    assert evaluate(fork, "--episodes", 1, "-o", tmp_path / "played") == 0
    capsys.readouterr()
    assert evaluate(fork, "--video", "-o", tmp_path / "filmed") == 2
    told = capsys.readouterr().err
    assert "must take render_mode='rgb_array' to be seen; division by zero" in told and told.count("\n") == 1
    assert not (tmp_path / "filmed").exists()
    unseen = copy_with(run, tmp_path / "unseen", env_id="tests.envs:Unseen-v0").directory
    assert evaluate(unseen, "--gif", "-o", tmp_path / "filmed") == 2
    told = capsys.readouterr().err
    assert "must take render_mode='rgb_array' to be seen" in told and told.count("\n") == 1


def test_what_the_random_policy_earns_is_told(capsys):
    main(["random", "Pendulum-v1", "--episodes", "2"])
    told = capsys.readouterr().out
    assert "return -" in told and "length 200.0" in told and "2 episodes" in told


def test_the_random_policy_plays_the_same_each_time():
    with closing(gym.make("Pendulum-v1")) as env:
        first, again, other = (play_at_random(env, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_baseline_is_that_of_the_evaluation_environment(run, tmp_path):
    lighter = copy_with(run, tmp_path / "lighter", eval_env_kwargs='{"g": 0.1}')
    assert (baseline_of(run, 2) != baseline_of(lighter, 2)).all()


def test_a_forks_baseline_is_its_own(run, tmp_path):
    fork = tmp_path / "fork"
    shutil.copytree(run.directory, fork)
    with (fork / "ppo_continuous.py").open("a") as source:
        source.write("make = make_eval_env\ndef make_eval_env(*args): ")
        source.write("return gym.wrappers.TransformReward(make(*args), lambda reward: 1.0)\n")
    assert baseline_of(run, 2).max() < 0
    assert baseline_of(Run(fork), 2).tolist() == [200.0, 200.0]
