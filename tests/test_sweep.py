"""Sweeps of well-behaved and other scripts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark import jobs
from benchmark.__main__ import main
from benchmark.runs import Run, find_runs
from benchmark.suites import selection_of

ROOT = Path(__file__).parent.parent
STANDIN = str(ROOT / "tests" / "scripts.py")
REAL = ["--total-timesteps", "1024", "--num-envs", "4", "--num-steps", "32", "--num-minibatches", "4", "--no-compile"]


def suite(tmp_path: Path, **content: object) -> str:
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps({"scripts": [STANDIN], "env_ids": ["Nowhere-v0"], "seeds": 1} | content))
    return str(path)


def sweep(*arguments: object) -> int:
    """The exit status."""
    try:
        main(["sweep", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_real_runs_and_their_repetition(tmp_path, capsys):
    command = ["--scripts", "ppo_continuous", "--env-ids", "tests.envs:Mirror-v0", "Pendulum-v1", "--seeds", 2]
    command += ["--workers", 2, "-o", tmp_path / "out", "--", *REAL]
    assert sweep(*command) == 0
    runs = find_runs([tmp_path / "out"])
    assert {(run.config["env_id"], run.config["seed"]) for run in runs} == {
        (env_id, seed) for env_id in ("tests.envs:Mirror-v0", "Pendulum-v1") for seed in (1, 2)
    }
    assert all(run.result and run.config["num_envs"] == 4 for run in runs)
    made = {run.directory: run.last_checkpoint.stat().st_mtime_ns for run in runs}
    assert sweep(*command) == 0
    assert "4 of them settled before" in capsys.readouterr().out
    assert made == {run.directory: run.last_checkpoint.stat().st_mtime_ns for run in find_runs([tmp_path / "out"])}


def test_it_keeps_what_it_was_to_run_and_says_whose_return_it_shows(tmp_path, capsys):
    grid = {"learning-rate": [0.2, 0.1]}
    assert sweep(suite(tmp_path, grid=grid), "-o", tmp_path / "out") == 0
    kept = selection_of(tmp_path / "out")
    assert (kept.scripts, kept.seeds, kept.grid) == ([STANDIN], [1], grid)
    assert re.search(
        r"done: Nowhere-v0__scripts__learning-rate=0.2__1  evaluation return -?\d", capsys.readouterr().out
    )


@pytest.mark.parametrize("command", ["", "run", "sweep", "tune", "evaluate", "report", "random", "speed"])
def test_help_is_80_columns_wide_and_keeps_examples_on_their_lines(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    examples = [k for k, line in enumerate(lines) if line.startswith("    python -m benchmark")]
    assert len(examples) == {"sweep": 2, "tune": 1, "report": 3}.get(command, 0)
    assert sum("python -m benchmark" in line for line in lines) == len(examples) + (2 if not command else 1)
    if command == "sweep":
        assert lines[examples[1] :][1] == "        --env-ids Hopper-v4 --seeds 5 -- --total-timesteps 1_000_000"


def test_a_grid_runs_every_combination(tmp_path):
    grid = {"learning-rate": [0.1, 0.2, 0.3], "total_timesteps": [100, 200]}
    assert sweep(suite(tmp_path, seeds=[3, 5], grid=grid), "-o", tmp_path / "out", "--workers", 2) == 0
    found = {tuple(run.config[key] for key in ("learning_rate", "total_timesteps", "seed")) for run in runs(tmp_path)}
    assert found == {(rate, total, seed) for rate in (0.1, 0.2, 0.3) for total in (100, 200) for seed in (3, 5)}


def runs(tmp_path: Path) -> list[Run]:
    return find_runs([tmp_path / "out"])


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("crash", "exit status 1"),
        ("full-disk", "exit status 1"),
        ("killed", "ended by SIGKILL"),
        ("leave", "exit status 0"),  # without a result
    ],
)
def test_a_failing_job_stops_no_other_and_is_not_hidden(tmp_path, capsys, mood, reason):
    command = [suite(tmp_path, grid={"mood": [mood, "well"]}), "-o", tmp_path / "out"]
    assert sweep(*command) == 1
    told = capsys.readouterr().out
    assert "1 of 2 failed" in told and f"Nowhere-v0__scripts__mood={mood}__1: {reason}" in told
    assert {"crash": "a divergent one", "full-disk": "No space left"}.get(mood, "began") in told
    assert sum(run.result is not None for run in runs(tmp_path)) == 1

    assert sweep(*command) == 1  # not retried
    assert next((tmp_path / "out").glob(f"*{mood}*/log.txt")).read_text().count("began") == 1
    assert sweep(*command, "--retry-failed") == (0 if mood == "killed" else 1)  # whose run is resumed, and ends well


@pytest.mark.parametrize("mood", ["hang", "stubborn"])
def test_a_job_that_hangs_is_ended(tmp_path, capsys, monkeypatch, mood):
    monkeypatch.setattr(jobs, "PATIENCE", 1)
    assert sweep(suite(tmp_path, args={"mood": mood}), "-o", tmp_path / "out", "--silence", 0.02) == 1
    told = capsys.readouterr().out
    assert "wrote nothing for 1 s, and was ended" in told
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.split("began ")[1].split()[0]), 0)


def test_a_stopped_sweep_stops_its_jobs_and_goes_on_later(tmp_path):
    words = [sys.executable, "-m", "benchmark", "sweep", "--scripts", "ppo_continuous", "--env-ids", "Pendulum-v1"]
    words += ["--seeds", "2", "--workers", "2", "-o", str(tmp_path / "out"), "--", *REAL, "--num-evals", "0"]
    words[words.index("1024")] = "20480"
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while sum(len(run.last_rows("progress", 5)) == 5 for run in runs(tmp_path)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "stopped; the same command goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 130
    stopped = [run.last_rows("progress", 1)[0]["step"] for run in runs(tmp_path)]
    assert all(run.result is None and run.last_checkpoint.exists() for run in runs(tmp_path)) and max(stopped) < 20480

    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    finished = runs(tmp_path)
    assert len(finished) == 2 and all(run.result["steps"] == 20480 for run in finished)
    assert [len(run.table("progress")["step"]) for run in finished] == [160, 160]


def test_a_killed_sweep_takes_its_jobs_along(tmp_path):
    words = [sys.executable, "-m", "benchmark", "sweep", suite(tmp_path, args={"mood": "slow"})]
    process = subprocess.Popen([*words, "-o", str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (found := runs(tmp_path)) or not found[0].last_rows("progress", 1):
        time.sleep(0.05)
    job = int((found[0].directory.parent / "log.txt").read_text().split("began ")[1])
    process.kill()
    process.wait()
    for _ in range(100):
        time.sleep(0.05)
        if not Path(f"/proc/{job}").exists():
            return
    pytest.fail("the job lives on")


def test_nobody_runs_a_job_that_runs_already(tmp_path):
    (job,) = jobs_in(tmp_path)
    Path(job.directory).mkdir(parents=True)
    with jobs.lock(job) as held:
        words = [sys.executable, "-m", "benchmark", "sweep", suite(tmp_path), "-o", str(tmp_path / "out")]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        assert not runs(tmp_path)
        held.close()
        assert process.wait(20) == 0


def test_who_waits_for_a_job_can_be_stopped(tmp_path):
    (job,) = jobs_in(tmp_path)
    Path(job.directory).mkdir(parents=True)
    with jobs.lock(job):
        words = [sys.executable, "-m", "benchmark", "sweep", suite(tmp_path), "-o", str(tmp_path / "out")]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert "jobs in" in process.stdout.readline() or "job in" in process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert "stopped" in process.communicate(timeout=20)[0]
        assert not runs(tmp_path)


def jobs_in(tmp_path: Path) -> list[jobs.Job]:
    from benchmark.suites import jobs_of, read_suite

    return jobs_of(read_suite(Path(suite(tmp_path))), tmp_path / "out", 1)


def test_half_a_run_directory_is_not_taken_for_a_run(tmp_path):
    (job,) = jobs_in(tmp_path)
    (Path(job.directory) / ".new-abc").mkdir(parents=True)
    (Path(job.directory) / ".new-abc" / "meta.json").write_text("{")
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    assert len(runs(tmp_path)) == 1


def test_a_job_that_cannot_be_written_fails_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Nowhere-v0__scripts__1").touch()
    assert sweep(suite(tmp_path, seeds=2), "-o", tmp_path / "out") == 1
    assert "Nowhere-v0__scripts__1: its files cannot be written" in capsys.readouterr().out
    assert len(runs(tmp_path)) == 1


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path, capsys):
    assert sweep(suite(tmp_path, seeds=3), "-o", tmp_path / "out", "--dry-run", "--", "--mood", "well") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 3 and all("--mood well" in line for line in commands)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no scripts selected"),
        (["--scripts", "ppo_continuos", "--env-ids", "A-v0"], "did you mean ppo_continuous?"),
        (["--scripts", STANDIN], "no env ids selected"),
        (["--scripts", STANDIN, "--env-ids", "A-v0", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--scripts", STANDIN, "--env-ids", "A-v0", "A-v0"], "same name"),
        (["--scripts", STANDIN, "--env-ids", "A-v0", "-o", "/dev/null/x"], "--output /dev/null/x: Not a directory"),
        (["--sedes", "3"], "--sedes"),
        (["nowhere.yaml"], "nowhere.yaml: [Errno 2]"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, told):
    assert sweep(*arguments) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"script": ["x"]}, "unknown key script; did you mean scripts?"),
        ({"seeds": "many"}, "seeds must be a list"),
        ({"grid": {"mood": "crash"}}, "mood must be a list of values"),
        ({"args": ["--mood"]}, "args must be a mapping"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, capsys, content, told):
    assert sweep(suite(tmp_path, **content)) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1


def test_another_sweep_is_not_mixed_in(tmp_path, capsys):
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    assert sweep(suite(tmp_path, args={"total_timesteps": 300}), "-o", tmp_path / "out") == 2
    assert "holds a job with other words" in capsys.readouterr().err
