"""Searches over a stand-in script whose best learning rate is 0.3, and a short one of the flagship."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from benchmark.__main__ import main
from benchmark.tune import suggest
from benchmark.tune_figures import plot_search

ROOT = Path(__file__).parent.parent
STANDIN = str(ROOT / "tests" / "scripts.py")
CHOICES = ["$x^$", "$yy^$"]
WRONG = "learning_rate: must be float, log_float, int or log_int with two numbers, the lower first, or categorical"
RATE = {"learning_rate": {"float": [0.0, 1.0]}}


def command(tmp_path: Path, space: dict, *more: object) -> list[str]:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    words = [
        "tune",
        STANDIN,
        "Nowhere-v0",
        "--space",
        path,
        "--seeds",
        2,
        "--workers",
        2,
        "-o",
        tmp_path / "out",
        *more,
    ]
    return [str(word) for word in words]


def tune(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


def trials(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out" / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_best_argument_is_found(tmp_path, capsys):
    assert tune(command(tmp_path, RATE, "--trials", 14, "--no-prune", "--", "--total-timesteps", "100")) == 0
    best = json.loads((tmp_path / "out" / "results.json").read_text())["best"]
    assert best["parameters"]["learning_rate"] == pytest.approx(0.3, abs=0.1)
    assert best["value"] == pytest.approx(-((best["parameters"]["learning_rate"] - 0.3) ** 2) + 0.0015)  # of 2 seeds
    assert [row["state"] for row in trials(tmp_path)] == ["COMPLETE"] * 14
    config = yaml.safe_load((tmp_path / "out" / "scripts__Nowhere-v0.yaml").read_text())
    assert config == {"env_id": "Nowhere-v0"} | best["parameters"]
    for name in ("history", "slices", "importances"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    told = capsys.readouterr().out
    assert told.startswith("14 of 14 trials to go, of seeds 1 to 2, in ") and told.count("\ntrial ") == 14


class Screen:
    """A terminal that remembers what it was to show."""

    def __init__(self):
        self.console, self.seen = self, []

    def update(self, text) -> None:
        self.seen.append(text.plain.splitlines())

    def print(self, text) -> None:
        self.seen.append([text.plain])


def test_arguments_are_drawn_as_their_ranges_say():
    draw = lambda kind: lambda name, low, high, log: (kind, low, high, log)  # noqa: E731
    trial = SimpleNamespace(suggest_int=draw("int"), suggest_float=draw("float"))
    for kind in ("float", "log_float", "int", "log_int"):
        assert suggest(trial, "x", {kind: [1, 8]}) == (kind.split("_")[-1], 1, 8, "log" in kind)


def test_a_terminal_shows_how_far_the_trials_are(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    screen = Screen()
    monkeypatch.setattr("benchmark.tune.live_view", lambda: nullcontext(screen))
    space = {"learning_rate": {"float": [0.6, 1.0]}}  # with which it rests for 3 s at its half
    words = "--trials", 2, "--workers", 4, "--no-prune", "--", "--mood", "slow-if-bad"
    assert tune(command(tmp_path, space, *words)) == 0
    both = [rows for rows in screen.seen if len(rows) == 2]
    assert any("trial   0" in first and "trial   1" in second for first, second in both)
    assert any("50%" in row and re.search(r"now +-1\.\d+ +learning_rate 0\.\d+$", row) for row in sum(both, []))
    assert len([row for rows in screen.seen for row in rows if "best" in row]) == 2
    assert screen.seen[-1] == []


def test_an_edited_file_of_settings_is_another_search(tmp_path, capsys):
    settings = tmp_path / "mine.yaml"
    settings.write_text("total_timesteps: 100")
    words = command(tmp_path, RATE, "--trials", 1, "--", "--config", settings)
    assert tune(words) == 0
    settings.write_text("total_timesteps: 200")
    assert tune(words) == 2 and "holds a study with other config" in capsys.readouterr().err
    assert len(trials(tmp_path)) == 1


def test_a_trial_that_lags_behind_is_ended(tmp_path):
    space = RATE | {"total_timesteps": {"int": [100, 140]}}  # so that hardly two are evaluated at the same steps
    assert tune(command(tmp_path, space, "--trials", 10, "--", "--mood", "slow-if-bad")) == 0  # 3 s from its half on
    pruned = [row for row in trials(tmp_path) if row["state"] == "PRUNED"]
    assert pruned and all(float(row["seconds"]) < 3 for row in pruned)
    for row in pruned:
        assert float(row["learning_rate"]) > 0.5 and not list(Path(row["folder"]).glob("*/*/result.json"))


def test_a_failing_trial_is_told_and_stops_no_other(tmp_path, capsys):
    space = RATE | {"mood": {"categorical": ["well", "crash"]}}
    assert tune(command(tmp_path, space, "--trials", 8)) == 1
    failed = [row for row in trials(tmp_path) if row["state"] == "FAIL"]
    assert 0 < len(failed) < 8 and all(row["mood"] == '"crash"' for row in failed)
    told = capsys.readouterr().out
    assert told.count("__1: exit status 1") == len(failed) and "the critic is a divergent one" in told


def test_a_trial_that_is_not_evaluated_has_failed(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text(Path(STANDIN).read_text().replace('"evaluation": evaluation', '"evaluation": {}'))
    words = [str(script) if word == STANDIN else word for word in command(tmp_path, RATE, "--trials", 1)]
    assert tune(words) == 1 and "was not evaluated" in capsys.readouterr().out
    assert [row["state"] for row in trials(tmp_path)] == ["FAIL"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_search_goes_on(tmp_path, number):
    space = RATE | {"mood": {"categorical": ["slow"]}}
    words = [sys.executable, "-m", "benchmark", *command(tmp_path, space, "--trials", 2)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("out/trial-0000/*/*/progress.csv"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    for path in tmp_path.glob("out/trial-0000/*/*/config.yaml"):  # which what resumes reads
        path.write_text(path.read_text().replace("slow", "well"))
    time.sleep(0.5)
    assert tune([word if word != "slow" else "well" for word in command(tmp_path, space, "--trials", 1)]) == 0
    (row,) = trials(tmp_path)
    assert (row["state"], row["folder"]) == ("COMPLETE", str(tmp_path / "out" / "trial-0000"))
    logs = [path.read_text() for path in tmp_path.glob("out/trial-0000/*/log.txt")]
    assert len(logs) == 2 and all(log.count("began") == 2 for log in logs)


def test_trials_at_once_go_on_in_their_folders(tmp_path):
    """Those that wait are each taken once, by however many ask."""
    space = RATE | {"mood": {"categorical": ["slow"]}}
    words = command(tmp_path, space, "--trials", 4, "--workers", 4, "--seeds", 1)
    process = subprocess.Popen([sys.executable, "-m", "benchmark", *words], cwd=ROOT)
    while len(list(tmp_path.glob("out/trial-*/*/*/progress.csv"))) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    for path in tmp_path.glob("out/trial-*/*/*/config.yaml"):  # which what resumes reads
        path.write_text(path.read_text().replace("slow", "well"))
    assert tune(words) == 0
    assert [row["state"] for row in trials(tmp_path)] == ["COMPLETE"] * 4
    assert sorted(Path(row["folder"]).name for row in trials(tmp_path)) == [f"trial-{k:04d}" for k in range(4)]
    logs = [path.read_text() for path in tmp_path.glob("out/trial-*/*/log.txt")]
    assert len(logs) == 4 and all(log.count("began") == 2 for log in logs)


def test_two_processes_share_a_study_each_with_its_own_folder(tmp_path, capsys):
    words = command(tmp_path, RATE, "--trials", 8, "--no-prune", "--storage", tmp_path / "journal.log")
    other = [sys.executable, "-m", "benchmark", *words]
    other[other.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    with subprocess.Popen(other, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("other/trial-*")):
            time.sleep(0.05)
        assert tune([word.replace("out", "other") for word in words]) == 2
        assert f"--output {tmp_path / 'other'}: another search works there" in capsys.readouterr().err
        assert tune(words) == 0
        assert process.wait(90) == 0
    made = [path.parent.name for path in tmp_path.glob("*/trial-*")]
    assert {*made} == {"out", "other"} and 8 <= len(made) <= 9  # one may be under way when there are enough
    assert {row["state"] for row in trials(tmp_path)} <= {"COMPLETE", "RUNNING"}
    assert tune([word if word != "8" else "10" for word in words]) == 0
    assert [row["state"] for row in trials(tmp_path)] == ["COMPLETE"] * 10
    assert len({row["learning_rate"] for row in trials(tmp_path)}) == 10  # nothing is tried twice


def test_the_flagship_is_tuned_and_its_file_trains(tmp_path):
    space = {"learning-rate": {"log_float": [1e-4, 1e-2]}, "actor_sizes": {"categorical": [[8], [8, 8]]}}
    words = command(tmp_path, space, "--trials", 2)
    words[1:3] = ["ppo_continuous", "tests.envs:Mirror-v0"]
    words[words.index("--seeds") + 1] = "1"
    words += ["--", "--total-timesteps", "512", "--num-envs", "4", "--num-steps", "32", "--num-minibatches", "4"]
    base = tmp_path / "base.yaml"
    base.write_text("{gamma: 0.9, gae_lambda: 0.8, num_evals: 5, norm_reward: false}")
    words += ["--config", str(base), "--gamma", "0.97", "--no-norm-obs", "--num-evals", "2", "--eval-episodes", "2"]
    assert tune([*words, "--no-compile"]) == 0
    config = tmp_path / "out" / "ppo_continuous__tests.envs-Mirror-v0.yaml"
    told = yaml.safe_load(config.read_text())
    assert told.pop("actor_sizes") in ([8], [8, 8]) and 1e-4 <= told.pop("learning_rate") <= 1e-2
    own = {"env_id": "tests.envs:Mirror-v0", "num_envs": 4, "num_steps": 32, "num_minibatches": 4}
    assert told == own | {"gamma": 0.97, "gae_lambda": 0.8, "norm_obs": False, "norm_reward": False}
    trained = [sys.executable, "ppo_continuous.py", "--config", str(config), "--runs-dir", str(tmp_path / "runs")]
    trained += ["--total-timesteps", "512", "--num-evals", "0", "--no-compile"]
    result = subprocess.run(trained, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "512 steps" in result.stdout


def test_another_source_is_not_mixed_into_a_search(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text(Path(STANDIN).read_text())
    words = [str(script) if word == STANDIN else word for word in command(tmp_path, RATE, "--trials", 1)]
    assert tune(words) == 0
    script.write_text(script.read_text() + "\n")
    assert tune(words) == 2
    assert "holds a study with other version; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"learning_rate": {"float": [0.0, float("inf")]}}, WRONG),
        ({"learning_rate": {"float": [float("nan"), 1.0]}}, WRONG),
        ({"learning_rate": {"int": [True, 3]}}, WRONG),
        ({"learning_rate": {"log_float": ["1e-4", 1]}}, "YAML reads 1e-4 as text and 1.0e-4 as a number"),
        ({"seed": {"int": [1, 5]}}, "seed: each run is given its own"),
        ({"learning_rat": {"float": [0, 1]}}, "scripts has no argument learning_rat; did you mean learning_rate?"),
        ({"learning_rate": {"float": [1, 0]}}, WRONG),
        ({"learning_rate": {"log_float": [0, 1]}}, WRONG),
        ({"learning_rate": [0, 1]}, WRONG),
        ({"total_timesteps": {"int": [1.5, 3]}}, "total_timesteps: must be float, log_float, int or log_int"),
        ({"mood": {"choice": ["a"]}}, "mood: must be float, log_float, int or log_int with two numbers"),
        ({"mood": {"categorical": []}}, "mood: must be"),
        ({}, "must map arguments to ranges"),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path, capsys, space, told):
    assert tune(command(tmp_path, space)) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_choices_with_dollars_are_no_mathematics_but_powers_of_ten_are(tmp_path):
    import optuna

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(
        lambda trial: trial.suggest_float("rate", 1e-5, 1e-1, log=True) + len(trial.suggest_categorical("m", CHOICES)),
        n_trials=8,
    )
    plot_search(study, tmp_path)
    text = (tmp_path / "slices.svg").read_text()
    assert all(choice in text for choice in CHOICES) and "{10^{-3}}" not in re.sub("<!--.*?-->", "", text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--storage", "sqlite:///study.db"], "name a journal file, or the URL of a database server"),
        (["--", "--mod", "well"], "--mod: scripts has no such argument; did you mean --mood?"),
        (["--", "--resume", "x"], "--resume: each run is given its own"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, words, told):
    assert tune(command(tmp_path, RATE, *words)) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_advice_is_what_yaml_reads_as_numbers(tmp_path, capsys):
    assert tune(command(tmp_path, {})) == 2
    ends = re.search(r"log_float: (\[.*?\])", capsys.readouterr().err)[1]
    assert yaml.safe_load(ends) == [1e-4, 1e-3]


def test_another_search_is_not_mixed_in(tmp_path, capsys):
    assert tune(command(tmp_path, RATE, "--trials", 1)) == 0
    other = command(tmp_path, {"learning_rate": {"float": [0.8, 0.9]}}, "--trials", 1)
    assert tune(other) == 2
    assert "holds a study with other space" in capsys.readouterr().err
    before = (tmp_path / "out" / "results.json").read_bytes()
    elsewhere = [word.replace("Nowhere-v0", "Elsewhere-v0") for word in other]
    for arguments in ([*other, "--storage", str(tmp_path / "other.log")], elsewhere):
        assert tune(arguments) == 2
        assert "holds trial-0000 of another search; choose another" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
