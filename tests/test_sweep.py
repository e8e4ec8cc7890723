"""Sweeps of well-behaved and other scripts."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark import jobs, suites
from benchmark.__main__ import COMMANDS, main
from benchmark.jobs import tail
from benchmark.runs import Run, find_runs, fingerprint, write_table
from benchmark.sweep import Watch, run_sweep

ROOT = Path(__file__).parent.parent
STANDIN = str(ROOT / "tests" / "scripts.py")
ONE = ["--scripts", STANDIN, "--env-ids", "A-v0"]
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
    command = ["--scripts", "ppo_continuous", "--env-ids", "tests.envs:Mirror-v0", "Pendulum-v1"]
    command += ["--workers", 2, "-o", tmp_path / "out", "--", *REAL]
    assert sweep(*command) == 0
    runs = find_runs([tmp_path / "out"])
    assert {run.config["env_id"] for run in runs} == {"tests.envs:Mirror-v0", "Pendulum-v1"}
    assert {run.config["seed"] for run in runs} == {1}
    assert all(run.result and run.config["num_envs"] == 4 for run in runs)
    made = {run.directory: run.last_checkpoint.stat().st_mtime_ns for run in runs}
    assert sweep(*command) == 0
    assert "2 of them settled before" in capsys.readouterr().out
    assert made == {run.directory: run.last_checkpoint.stat().st_mtime_ns for run in find_runs([tmp_path / "out"])}


def test_it_keeps_what_it_was_to_run_and_says_whose_return_it_shows(tmp_path, capsys):
    grid = {"learning-rate": [0.2, 0.1]}
    assert sweep(suite(tmp_path, grid=grid), "-o", tmp_path / "out") == 0
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (kept["scripts"], kept["seeds"], kept["grid"]) == ([STANDIN], [1], grid)
    assert kept["jobs"] == [f"Nowhere-v0__scripts__learning-rate={rate}__1" for rate in (0.2, 0.1)]
    told = f"evaluation return {-(0.1**2) + 0.001:,.1f}"
    assert f"done: Nowhere-v0__scripts__learning-rate=0.2__1  {told}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_80_columns_wide_and_keeps_examples_on_their_lines(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    examples = [k for k, line in enumerate(lines) if line.startswith("    python -m benchmark")]
    assert len(examples) == {
        "sweep": 2,
        "tune": 1,
        "report": 3,
        "evaluate": 1,
        "zoo": 1,
        "reproduce": 1,
        "versus": 2,
    }.get(command, 0)
    assert sum("python -m benchmark" in line for line in lines) == len(examples) + (2 if not command else 1)
    if command == "sweep":
        assert lines[examples[1] :][1] == "        --env-ids Hopper-v4 --seeds 5 -- --total-timesteps 1_000_000"


def fork(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(Path(STANDIN).read_text())
    return path


def edit(script: Path) -> None:
    script.write_text(script.read_text().replace("args.seed / 1000", "args.seed * 1000"))


def final_returns(tmp_path: Path) -> list[float]:
    return [run.result["evaluation"]["mean"] for run in runs(tmp_path)]


def test_an_edited_script_is_never_taken_for_what_it_was(tmp_path, capsys):
    script = fork(tmp_path)
    command = [suite(tmp_path, scripts=[str(script)], seeds=2), "-o", tmp_path / "out"]
    assert sweep(*command) == 0
    edit(script)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for more in ([], ["--retry-failed"], ["--dry-run"]):
        capsys.readouterr()
        assert sweep(*command, *more) == 2
        printed = capsys.readouterr()
        assert f"{script} has changed since 2 of these began; --rerun runs them again" in printed.err
        assert "another --output" in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    assert sweep(*command, "--rerun", "--dry-run") == 0
    assert "--resume" not in capsys.readouterr().out
    assert sweep(*command, "--rerun") == 0
    assert final_returns(tmp_path) == pytest.approx([1000, 2000], abs=1)
    assert len(list(tmp_path.glob("out/*/.*/result.json"))) == 2  # what was run before is kept
    assert sweep(*command, "--rerun") == 0
    assert "2 of them settled before" in capsys.readouterr().out


def test_a_job_from_before_scripts_were_told_apart_is_known_by_its_run(tmp_path, capsys):
    script = fork(tmp_path)
    command = [suite(tmp_path, scripts=[str(script)]), "-o", tmp_path / "out"]
    assert sweep(*command) == 0
    (path,) = tmp_path.glob("out/*/job.json")
    described = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in described.items() if name != "version"}))
    assert sweep(*command) == 0 and "1 of them settled before" in capsys.readouterr().out
    edit(script)
    assert sweep(*command) == 2


@pytest.mark.parametrize("words", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_an_edited_file_of_settings_is_another_sweep(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.1")
    command = [suite(tmp_path, seeds=2), "-o", tmp_path / "out", "--", *words]
    assert sweep(*command) == 0 and sweep(*command) == 0
    assert "2 of them settled before" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.2")
    assert sweep(*command) == 2 and "with other contents of --config; choose another" in capsys.readouterr().err
    first, second = (replace(job, config="another") for job in jobs_in(tmp_path, seeds=2, args={"config": "mine.yaml"}))
    assert jobs.run_job(first) == "done" and jobs.run_job(replace(second, directory=str(tmp_path / "new"))) == "failed"
    assert "--config is not what it was" in (tmp_path / "new" / "failed.json").read_text()


def test_a_fork_goes_on_with_what_it_imports_from_beside_it(tmp_path):
    script = fork(tmp_path)
    script.write_text(f"import one_of_mine\n{script.read_text()}")
    (script.parent / "one_of_mine.py").touch()
    words = ["--scripts", script, "--env-ids", "A-v0", "-o", tmp_path / "out"]
    assert sweep(*words, "--", "--mood", "killed") == 1  # the run can be resumed
    assert sweep(*words, "--retry-failed", "--", "--mood", "killed") == 0


def test_a_fork_may_need_other_arguments_than_an_environment(tmp_path, capsys):
    script = fork(tmp_path)
    made = "\n\ndef make_eval_env(args):\n    import beside\n    raise ValueError(args.learning_rate * beside.side)\n"
    needs = "\n    def __post_init__(self):\n        assert self.learning_rate > 1\n"
    script.write_text(script.read_text().replace("\n\ndef main", f"{needs}\n\ndef main") + made)
    (script.parent / "beside.py").write_text("side = 2\n")
    assert sweep("--scripts", script, "--env-ids", "A-v0", "--dry-run", "--", "--learning-rate", "2") == 0
    assert sweep("--scripts", script, "--env-ids", "", "--dry-run") == 2
    assert "nothing to run: no env ids selected" in capsys.readouterr().err


def test_what_is_no_number_ends_no_sweep(tmp_path):
    script = fork(tmp_path)
    script.write_text(script.read_text().replace("0.1,1000", "0.1,fast"))
    words = ["--", "--mood", "slow-if-bad", "--learning-rate", "0.9"]  # so that it is looked at while it runs
    assert sweep("--scripts", script, "--env-ids", "A-v0", "-o", tmp_path / "out", *words) == 0


def test_a_fork_may_have_arguments_that_are_lists(tmp_path):
    script = fork(tmp_path)
    more = "    sizes: list = field(default_factory=lambda: [64, 64])\n    resume:"
    script.write_text(
        script.read_text().replace("import dataclass", "import dataclass, field").replace("    resume:", more)
    )
    assert sweep("--scripts", script, "--env-ids", "A-v0", "-o", tmp_path / "out", "--dry-run") == 0
    run = Run(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"script": script.stem}))
    (tmp_path / script.name).write_text(script.read_text())
    assert run.defaults["sizes"] == [64, 64] and run.defaults["learning_rate"] == 0.1


def test_a_mended_script_is_not_told_of_its_old_failure(tmp_path, capsys):
    script = fork(tmp_path)
    right = script.read_text()
    script.write_text(right.replace("    parser =", "    raise RuntimeError\n    parser ="))
    command = [suite(tmp_path, scripts=[str(script)]), "-o", tmp_path / "out"]
    assert sweep(*command) == 1
    script.write_text(right)
    assert sweep(*command) == 2 and "has changed" in capsys.readouterr().err
    assert sweep(*command, "--rerun") == 0


def test_a_script_that_is_edited_while_its_sweep_runs_begins_no_more_jobs(tmp_path):
    script = fork(tmp_path)
    first, second = jobs_in(tmp_path, scripts=[str(script)], seeds=2)
    assert jobs.run_job(first) == "done"
    edit(script)
    assert jobs.run_job(first) == "done" and jobs.run_job(second) == "failed"
    assert second.reason()["reason"] == f"{script} is not what it was at the start" and len(runs(tmp_path)) == 1
    command = [suite(tmp_path, scripts=[str(script)], seeds=2), "-o", tmp_path / "out"]
    assert sweep(*command) == 2  # because of the first
    assert sweep(*command, "--rerun") == 0  # the second, too: it has not begun
    assert final_returns(tmp_path) == pytest.approx([1000, 2000], abs=1)


def test_a_script_that_is_edited_while_a_job_begins(tmp_path, capsys):
    """What runs is the source of before, what its run keeps is that of after."""
    script = fork(tmp_path)
    later = tmp_path / "later.txt"
    later.write_text(script.read_text())
    edit(later)
    copies = f'if __name__ == "__main__":\n    __import__("shutil").copyfile({str(later)!r}, __file__)\n'
    script.write_text(copies + script.read_text())
    command = [suite(tmp_path, scripts=[str(script)]), "-o", tmp_path / "out"]
    assert sweep(*command) == 1 and "was edited while it began" in capsys.readouterr().out
    assert not runs(tmp_path)
    assert sweep(*command) == 2 and "--rerun runs them again" in capsys.readouterr().err
    (hidden,) = tmp_path.glob("out/*/.*__*")
    hidden.rename(hidden.with_name("left-by-a-sweep-that-was-killed"))
    assert sweep(*command, "--rerun") == 0
    assert final_returns(tmp_path) == pytest.approx([1000], abs=1)


def test_a_sweep_goes_on_with_its_script_in_another_folder(tmp_path, capsys):
    script = fork(tmp_path)
    assert sweep(suite(tmp_path, scripts=[str(script)]), "-o", tmp_path / "out") == 0
    moved = tmp_path / "elsewhere" / script.name
    moved.parent.mkdir()
    script.rename(moved)
    assert sweep(suite(tmp_path, scripts=[str(moved)]), "-o", tmp_path / "out") == 0
    assert "1 of them settled before" in capsys.readouterr().out


def test_a_job_goes_on_in_the_folder_that_it_began_in(tmp_path, monkeypatch):
    """Its relative paths are meant from there, wherever the sweep is started again."""
    script, began = fork(tmp_path), tmp_path / "began.txt"
    note = f'if __name__ == "__main__":\n    print(os.getcwd(), file=open({str(began)!r}, "a"))\n'
    script.write_text(f"import os\n\n{note}{script.read_text()}")
    command = [suite(tmp_path, scripts=[str(script)], args={"mood": "killed"}), "-o", tmp_path / "out"]
    for name, status in (("first", 1), ("second", 0)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert sweep(*command, "--retry-failed") == status
    assert began.read_text().split() == [str(tmp_path / "first")] * 2


def test_a_full_disk_does_not_break_a_sweep_for_good(tmp_path, capsys, monkeypatch):
    command = [suite(tmp_path, seeds=2), "-o", tmp_path / "out"]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert sweep(*command) == 2
        assert f"--output {tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
        patch.setattr("benchmark.sweep.keep_selection", lambda *_: None)  # it is full only later
        assert sweep(*command) == 1
    assert "its files cannot be written" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.json"))  # nor halves of them
    assert sweep(*command) == 0 and len(runs(tmp_path)) == 2


@pytest.mark.parametrize("name", ["job.json", "failed.json", "result.json", "meta.json", "config.yaml"])
@pytest.mark.parametrize("left", [0, 9])
def test_a_torn_file_counts_as_absent(tmp_path, name, left):
    (job,) = jobs_in(tmp_path)
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    if name == "failed.json":
        shutil.rmtree(job.run().directory)
        job.failure.write_text('{"reason": "exit status 1"}')
    (path,) = (tmp_path / "out").rglob(name)
    os.truncate(path, left)
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    assert job.run().result and sum(not run.damage for run in runs(tmp_path)) == 1


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_table(path, [["a", "b"], [1, 2]])
    for function in ("os.fsync", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(function, lambda *_, **__: os.open("/nowhere/x", 0))
            write_table(path, [["a", "b"], [3, 4]])
        assert path.read_bytes() == b"a,b\r\n1,2\r\n" and list(tmp_path.iterdir()) == [path]


def test_a_grid_runs_every_combination(tmp_path):
    """Of environments and seeds too."""
    given = {
        "env_ids": ["A-v0", "B-v0"],
        "seeds": [3, 5],
        "grid": {"learning-rate": [0.1, 0.2], "total_timesteps": [100, 200]},
    }
    assert sweep(suite(tmp_path, **given), "-o", tmp_path / "out", "--workers", 2) == 0
    names = ("env_id", "seed", "learning_rate", "total_timesteps")
    found = [tuple(run.config[name] for name in names) for run in runs(tmp_path)]
    expected = itertools.product(["A-v0", "B-v0"], [3, 5], [0.1, 0.2], [100, 200])
    assert sorted(found) == sorted(expected)


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


def test_a_job_lives_as_long_as_it_writes_to_its_log_or_a_table_and_runs_where_the_sweep_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative paths among its arguments are meant from
    assert sweep(suite(tmp_path), "-o", "out") == 0
    (run,), (job,) = runs(tmp_path), jobs_in(tmp_path)
    assert run.meta["folder"] == str(tmp_path)
    with job.log.open("ab") as log:
        for path in (job.log, run.directory / "progress.csv", run.directory / "episodes.csv", job.log):
            os.utime(path, (now := time.time() + 1000, now))
            assert jobs.last_sign(job, log) == path.stat().st_mtime
            os.utime(path, (0, 0))


@pytest.mark.parametrize(("last_sign", "silence"), [(time.time, 0.01), (lambda: 0.0, 60.0)])
def test_a_job_is_ended_only_where_it_has_run_for_long_and_long_written_nothing(
    tmp_path, monkeypatch, last_sign, silence
):
    monkeypatch.setattr(jobs, "last_sign", lambda *_: last_sign())
    assert jobs.run_job(*jobs_in(tmp_path), silence=silence) == "done"


def test_a_job_that_failed_before_and_is_stopped_now_is_interrupted(tmp_path):
    (job,) = jobs_in(tmp_path, args={"mood": "slow"})
    Path(job.directory).mkdir(parents=True)
    job.failure.write_text('{"reason": "of before"}')
    assert jobs.run_job(job, lambda: bool(job.run() and job.run().last_rows("progress", 1))) == "interrupted"
    assert job.state() == "interrupted"


def test_a_stopped_sweep_stops_its_jobs_and_goes_on_later(tmp_path):
    words = [sys.executable, "-m", "benchmark", "sweep", "--scripts", "ppo_continuous", "--env-ids", "Pendulum-v1"]
    words += ["--seeds", "2", "--workers", "2", "-o", str(tmp_path / "out"), "--", *REAL, "--num-evals", "0"]
    words[words.index("1024")] = "4096"
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while sum(len(run.last_rows("progress", 3)) == 3 for run in runs(tmp_path)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert (
        "stopped; the same command goes on: 0 of 2 done, 0 failed, 2 to go on with"
        in process.communicate(timeout=120)[0]
    )
    assert process.returncode == 130
    stopped = [run.last_rows("progress", 1)[0]["step"] for run in runs(tmp_path)]
    assert all(run.result is None and run.last_checkpoint.exists() for run in runs(tmp_path)) and max(stopped) < 4096

    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    finished = runs(tmp_path)
    assert len(finished) == 2 and all(run.result["steps"] == 4096 for run in finished)
    assert [len(run.table("progress")["step"]) for run in finished] == [32, 32]


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


def test_a_job_that_outlives_its_sweep_is_not_begun_again(tmp_path):
    (job,) = jobs_in(tmp_path, args={"mood": "stubborn"})
    words = [sys.executable, "-m", "benchmark", "sweep", str(tmp_path / "suite.yaml"), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not tail(job.log, 1):
        time.sleep(0.05)
    lives = int(tail(job.log, 1)[0].split()[1])
    process.kill()
    process.wait()
    try:
        time.sleep(0.3)
        assert jobs.lock(job, stopped=lambda: True) is None
    finally:
        os.kill(lives, signal.SIGKILL)
    time.sleep(0.3)
    with jobs.lock(job, stopped=lambda: True) as held:
        assert held


def test_the_harness_loads_where_posix_is_not_and_waits_for_no_torch():
    code = "import os, sys; sys.modules |= {'fcntl': None, 'torch': None}; del os.killpg, os.fork"
    code += "; import benchmark.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_who_waits_for_a_job_can_be_stopped(tmp_path):
    (job,) = jobs_in(tmp_path)
    Path(job.directory).mkdir(parents=True)
    with jobs.lock(job):
        words = [sys.executable, "-m", "benchmark", "sweep", suite(tmp_path), "-o", str(tmp_path / "out")]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().startswith("1 job in ")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert "stopped" in process.communicate(timeout=20)[0]
        assert not runs(tmp_path)


def jobs_in(tmp_path: Path, **content: object) -> list[jobs.Job]:
    from benchmark.suites import jobs_of, read_suite

    return jobs_of(read_suite(Path(suite(tmp_path, **content))), tmp_path / "out", 1)


def test_what_is_left_is_told_by_the_present_pace(tmp_path):
    first, second, third = jobs_in(tmp_path, seeds=3)
    watch = Watch([first, second, third], {first: "done"})
    assert watch.left({second: {"share": 0.75, "pace": 1 / 400}}) == "0:08:20"  # one and a quarter are left
    assert watch.left({}) == "-"


def test_the_headline_and_what_is_told_of_a_job_that_runs(tmp_path):
    a, b, c, d = jobs_in(tmp_path, seeds=4, args={"mood": "leave"})
    watch = Watch([a, b, c, d], {a: "done", b: "failed"})
    told = watch.headline({c: {"share": 0.5, "sps": 1200.0, "pace": 0.01}})
    assert told == "1 of 4 done, 1 running, 1 waiting, 1 failed   1,200 steps/s   ETA 0:02:30"
    subprocess.run(c.command(), check=True, stdout=subprocess.DEVNULL)
    (Path(c.directory) / "job.json").write_text("{}")
    run = c.run().directory
    (run / "progress.csv").write_text("step,wall_time,sps\n10,1,500\n25,2,200\n")
    (run / "episodes.csv").write_text("step,wall_time,return,length\n5,1,3,9\n9,1,5,9\n")
    assert watch.running() == {c: {"share": 0.25, "sps": 200.0, "pace": 2.0, "return": 4.0}}


def test_seeds_are_run_in_turn(tmp_path):
    order = [(job.seed, job.env_id) for job in jobs_in(tmp_path, env_ids=["A", "B"], seeds=2)]
    assert order == [(1, "A"), (1, "B"), (2, "A"), (2, "B")]


def test_a_job_is_the_same_wherever_and_with_how_many_threads_it_is_run(tmp_path):
    (job,) = jobs_in(tmp_path)
    assert replace(job, directory=str(tmp_path), threads=2, started_in="/").description() == job.description()
    assert replace(job, seed=7).description() != job.description()


def test_the_last_file_of_settings_is_the_one_that_counts(tmp_path):
    (tmp_path / "b.yaml").write_text("x: 1")
    words = ("--config", "a.yaml", "--config=b.yaml")
    assert jobs.fingerprint_of_config(words, str(tmp_path)) == fingerprint(tmp_path / "b.yaml")


def test_a_row_that_is_being_written_is_none_yet(tmp_path):
    rows = "".join(f"{k},{k}.5\n" for k in range(300))
    (tmp_path / "t.csv").write_text(f"step,sps\n{rows}30")
    run = Run(tmp_path)
    assert run.table("t")["step"].tolist() == [*range(300)]
    assert [row["step"] for row in run.last_rows("t", 2)] == [298, 299] and len(run.last_rows("t", 100)) == 100
    (tmp_path / "t.csv").write_text("step,sps\n1,2\n3")
    assert run.last_rows("t", 5) == [{"step": 1.0, "sps": 2.0}]


def test_what_was_interrupted_goes_on_before_anything_begins(tmp_path):
    first, second = jobs_in(tmp_path, seeds=2, args={"mood": "leave"})
    subprocess.run(second.command(), check=True, stdout=subprocess.DEVNULL)
    begun = []

    def execute(waiting: list[jobs.Job], _: object) -> Iterator[tuple[jobs.Job, str]]:
        begun.extend(waiting)
        yield from ((job, "failed") for job in waiting)

    run_sweep([first, second], {}, execute)
    assert begun == [second, first]


def test_half_a_run_directory_is_not_taken_for_a_run(tmp_path):
    (job,) = jobs_in(tmp_path)
    (Path(job.directory) / ".new-abc").mkdir(parents=True)
    (Path(job.directory) / ".new-abc" / "meta.json").write_text("{")
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    assert len(runs(tmp_path)) == 1


def test_a_job_that_cannot_be_begun_says_why(tmp_path, monkeypatch):
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    (job,) = jobs_in(tmp_path)
    monkeypatch.setattr("benchmark.jobs.subprocess.Popen", none)
    assert jobs.run_job(job) == "failed" and "Cannot allocate memory" in job.reason()["reason"]


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
        (["suite.yaml", "--seeds", "9"], "--scripts, --env-ids and --seeds: a suite names its own"),
        (["--sedes", "3"], "--sedes"),
        (["nowhere.yaml"], "nowhere.yaml: [Errno 2]"),
        (["--scripts", STANDIN, "--env-ids", "A-v0", "--silence", "nan"], "--silence nan: must be above 0"),
        ([*ONE, "--", "--learning_rat", "3"], "--learning_rat: scripts has no such argument; did you mean --learning-"),
        ([*ONE, "--dry-run", "--", "--seed=5"], "--seed=5: each run is given its own; environments, seeds, thr"),
        ([*ONE, "--", "--env_id", "Hopper-v4"], "--env_id: each run is given its own"),
        ([*ONE, "--", "--runs-dir", "elsewhere"], "--runs-dir: each run is given its own"),
        ([*ONE, "--dry-run", "--", "--mod=well"], "--mod=well: scripts has no such argument; did you mean --mood?"),
        ([*ONE, "--", "well"], "-- well: must be an argument of the script"),
        (["--scripts", "ppo_discrete", "--env-ids", "CartPol-v1", "--seeds", "2"], "CartPol-v1: Environment `CartPol`"),
        (["--scripts", "ppo_discrete", "--env-ids", "nowhere:A-v1"], "nowhere:A-v1: No module named 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert sweep(*arguments) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"env_ids": [1]}, "env_ids: [1] must be names"),
        ({"scripts": [None]}, "scripts: [None] must be names"),
        ({"seeds": True}, "seeds must be a number of seeds"),
        ({"seeds": [1, True]}, "seeds must be a number of seeds, or a list of them"),
        ({"seeds": [-1]}, "from 0 to 2147483647"),
        ({"args": {"moood": "well"}}, "--moood: scripts has no such argument; did you mean --mood?"),
        ({"grid": {"moood": ["well"]}}, "--moood: scripts has no such argument"),
        ({"args": {"seed": 3}}, "--seed: each run is given its own"),
        ({"grid": {"env-id": ["A-v0", "B-v0"]}}, "--env-id: each run is given its own"),
        ({"script": ["x"]}, "unknown key script; did you mean scripts?"),
        ({"seeds": "many"}, "seeds must be a number of seeds, or a list of them"),
        ({"grid": {"mood": "crash"}}, "mood must be a list of values"),
        ({"args": ["--mood"]}, "args must be a mapping"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, capsys, content, told):
    assert sweep(suite(tmp_path, **content), "-o", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_only_a_clone_has_is_said_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--scripts", STANDIN, "--env-ids", "A-v0", "--", "--mood", "configs/ppo_continuous/textbook.yaml"]
    for wrong, name in ((["suites/mujoco-1m.yaml"], "suites/mujoco-1m.yaml"), (words, words[-1])):
        assert sweep(*wrong) == 2
        assert f"{name}: " in (told := capsys.readouterr().err) and f"; it is {ROOT / name}\n" in told
    for path in (
        Path(STANDIN).with_name("envs.py"),
        ROOT / "ppo_discrete.py",
    ):  # as pip installs, among others' modules
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "IS_CLONE", False)
    assert suites.our_scripts() == {"ppo_discrete": tmp_path / "ppo_discrete.py"}
    assert sweep("suites/mujoco-1m.yaml") == 2 and "come with a clone only" in capsys.readouterr().err
    assert sweep("nowhere.yaml") == 2 and "clone" not in capsys.readouterr().err


def test_names_of_arguments_are_names(tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text(f"{{scripts: [{STANDIN}], env_ids: [A-v0], args: {{1: 2}}}}")
    assert sweep(tmp_path / "suite.yaml") == 2 and "args: [1] must be names of arguments" in capsys.readouterr().err


def test_another_sweep_is_not_mixed_in(tmp_path, capsys):
    assert sweep(suite(tmp_path), "-o", tmp_path / "out") == 0
    assert sweep(suite(tmp_path, args={"total_timesteps": 300}), "-o", tmp_path / "out") == 2
    assert "holds a job with other arguments" in capsys.readouterr().err
