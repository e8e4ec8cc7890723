"""Sweeps on a Slurm cluster whose queue takes jobs back, whose sweep is stopped or killed, and whose users cancel."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark import jobs, slurm
from benchmark.executors import Cluster
from benchmark.runs import Run, find_runs
from tests.test_sweep import ONE, ROOT, jobs_in, suite, sweep

pytest.importorskip("submitit")
SETTINGS = ["--env-id", "Pendulum-v1", "--total-timesteps", "4096", "--num-envs", "4", "--num-steps", "64"]
SETTINGS += ["--num-minibatches", "8", "--num-evals", "0", "--checkpoint-every", "512", "--no-compile"]


def answers() -> bool:
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=10).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


needs_slurm = pytest.mark.skipif(not answers(), reason="no Slurm answers here; CONTRIBUTING.md says how to have one")


def begin(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmark", "sweep", "--executor", "slurm", "-o", str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    pytest.fail("nothing came of it within two minutes")


def runs_at(out: Path, step: int) -> list[Run]:
    """Those that have come so far."""
    return [
        run
        for run in find_runs([out])
        if run.last_rows("progress", 1) and run.last_rows("progress", 1)[0]["step"] >= step
    ]


def numbers(out: Path) -> dict[str, str]:
    """Slurm's, by the names of the jobs."""
    known = json.loads((out / "slurm" / "jobs.json").read_text())
    return {name: told["number"] for name, told in known.items()}


def queued(out: Path) -> list[str]:
    return [state for state in slurm.ask_queue(out / "slurm").values() if state not in slurm.ENDED]


def begun(out: Path) -> list[int]:
    """How often each job began."""
    return [
        (out / name / "log.txt").read_text().count("began") if (out / name).exists() else 0 for name in numbers(out)
    ]


@needs_slurm
def test_a_job_that_is_requeued_or_runs_out_of_time_ends_with_the_same_weights(tmp_path):
    out = tmp_path / "out"
    words = ["--scripts", "ppo_continuous", "--env-ids", "Pendulum-v1", "--seeds", "2", "--time-limit", "10"]
    with begin(out, *words, "--", *SETTINGS[2:]) as process:
        wait_for(lambda: len(runs_at(out, 1000)) == 2, process)
        one, two = numbers(out).values()
        subprocess.run(["scontrol", "requeue", one], check=True)  # as preemption does
        subprocess.run(["scancel", "--signal=TERM", two], check=True)  # as Slurm does before the time is over
        wait_for(lambda: queued(out) == ["PENDING"] * 2, process)
        assert not any(run.result for run in find_runs([out]))
        told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told
    runs = find_runs([out])
    assert [run.result["steps"] for run in runs] == [4096, 4096]
    assert all((run.directory.parent / "log.txt").read_text().count("parameters") == 2 for run in runs)  # headers
    for run in runs:
        alone = [sys.executable, "ppo_continuous.py", *SETTINGS, "--seed", str(run.config["seed"])]
        subprocess.run([*alone, "--runs-dir", str(tmp_path / "alone")], cwd=ROOT, check=True, capture_output=True)
    for run, other in zip(runs, find_runs([tmp_path / "alone"]), strict=True):
        one, two = (torch.load(r.last_checkpoint, weights_only=True)["agent"] for r in (run, other))
        assert all(torch.equal(one[name], two[name]) for name in one)


@needs_slurm
def test_a_stopped_sweep_leaves_nothing_in_the_queue_and_goes_on(tmp_path):
    out, words = tmp_path / "out", [suite(tmp_path, seeds=3, args={"mood": "slow"})]
    with begin(out, *words) as process:
        wait_for(lambda: len(runs_at(out, 50)) == 2, process)  # of three: there are two processors
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped; the same command goes on" in told
    assert queued(out) == [] and len(find_runs([out])) == 2
    with begin(out, *words[:1], "--", "--total-timesteps", "100") as process:  # other words: another sweep
        assert process.wait(60) == 2
    first = numbers(out)
    with begin(out, *words) as process:
        wait_for(lambda: sum(bool(run.result) for run in find_runs([out])) == 2, process)
        wait_for(lambda: begun(out) == [2, 2, 1], process)
        assert not {*first.values()} & {*numbers(out).values()}
        process.send_signal(signal.SIGTERM)
        assert "2 of 3 done" in process.communicate(timeout=60)[0]
    assert process.returncode == 143 and queued(out) == []


@needs_slurm
def test_what_a_killed_sweep_left_in_the_queue_is_watched_and_not_run_twice(tmp_path):
    out = tmp_path / "out"
    words = [suite(tmp_path, seeds=3), "--sbatch", "hold"]
    with begin(out, *words) as process:
        wait_for(lambda: (out / "slurm" / "jobs.json").exists(), process)
        process.kill()
    assert queued(out) == ["PENDING"] * 3
    first = numbers(out)
    with begin(out, *words, "--", "--total-timesteps", "300") as process:
        assert process.wait(60) == 2
    with begin(out, *words) as process:
        assert "3 jobs in" in process.stdout.readline()
        time.sleep(1)
        subprocess.run(["scontrol", "release", *first.values()], check=True)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 0, told
    assert numbers(out) == first and begun(out) == [1, 1, 1]


@needs_slurm
def test_a_job_that_somebody_cancels_has_failed(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(slurm, "WAITS", 1)

    def cancel() -> None:
        wait_for(lambda: runs_at(out, 50))
        subprocess.run(["scancel", *numbers(out).values()])

    thread = threading.Thread(target=cancel)
    thread.start()
    command = [suite(tmp_path, args={"mood": "slow"}), "--executor", "slurm", "-o", out]
    assert sweep(*command) == 1
    thread.join()
    assert "Slurm ended it (CANCELLED)" in capsys.readouterr().out
    assert sweep(*command) == 1 and sweep(*command, "--retry-failed") == 0
    assert begun(out) == [2]


@needs_slurm
def test_what_slurm_refuses_is_refused_before_anything_is_written(tmp_path, capsys):
    for words, told in (
        (["--partition", "nowhere"], "nowhere"),
        (["--cpus", "4000"], "--cpus-per-task=4000"),
        (["--sbatch", "acount=lab"], "--acount=lab"),
    ):
        assert sweep(*ONE, "--executor", "slurm", "-o", tmp_path / "out", *words) == 2
        printed = capsys.readouterr()
        assert told in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--partition", "long"], "--partition: is of --executor slurm"),
        (["--executor", "ray", "--sbatch", "mem=8G"], "--sbatch: is of --executor slurm"),
        (["--executor", "slurm", "--address", "auto"], "--address: is of --executor ray"),
        (["--executor", "slurm", "--cpus", "0.5"], "--cpus 0.5 --gpus 0 --time-limit 240: Slurm takes whole numbers"),
        (["--executor", "slurm", "--time-limit", "0"], "--time-limit 0: Slurm takes whole numbers"),
        (["--executor", "slurm", "--sbatch", "array=0-7"], "--sbatch array=0-7: must be an option of sbatch that"),
        (["--executor", "slurm", "--sbatch", "mem 8G"], "--sbatch mem 8G: must be an option of sbatch that"),
        (["--executor", "slurm"], "--executor slurm: Slurm's sbatch is not installed here"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without Slurm
    assert sweep(*ONE, "-o", tmp_path / "out", *words) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out and not list(tmp_path.iterdir())


def test_without_submitit_it_is_said_how_to_have_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep(*ONE, "--executor", "slurm", "-o", tmp_path / "out") == 2
    assert "pip install -e '.[slurm]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_submitted_twice_while_squeue_does_not_answer(tmp_path, monkeypatch, capsys):
    (job,) = jobs_in(tmp_path)
    (tmp_path / "out" / "slurm").mkdir(parents=True)
    (tmp_path / "out" / "slurm" / "jobs.json").write_text(json.dumps({job.name: {"number": "7", "job": {}}}))
    monkeypatch.setattr(slurm, "ask_queue", lambda _: None)
    with pytest.raises(SystemExit) as stop:
        next(slurm.run_on_slurm([job], threading.Event(), Cluster(), 60.0))
    assert stop.value.code == 2 and "squeue does not answer" in capsys.readouterr().err


def test_what_the_queue_says_decides_what_is_submitted_and_how_a_job_ended(tmp_path, monkeypatch, capsys):
    (job,) = jobs_in(tmp_path)
    answer = subprocess.CompletedProcess([], 0, "7_0 RUNNING\n7_1 PENDING\n", "")
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: answer)
    assert slurm.ask_queue(tmp_path / "slurm") == {"7_0": "RUNNING", "7_1": "PENDING"}
    known = {job.name: {"number": "7_0", "job": job.description()}}
    for queue, left in (({"7_0": "PENDING"}, [job]), ({"7_0": "CANCELLED"}, []), ({}, [])):
        assert slurm.still_queued([job], known, queue) == left
    with pytest.raises(SystemExit, match="2"):
        slurm.still_queued([replace(job, words=("--x",))], known, {"7_0": "PENDING"})
    assert slurm.end_of(job, "TIMEOUT", True) == "interrupted"
    Path(job.directory).mkdir(parents=True)
    assert slurm.end_of(job, "TIMEOUT", False) == "failed" and "TIMEOUT" in job.reason()["reason"]


def test_what_a_job_asks_for_is_what_it_was_given():
    words = "account=lab", "exclusive", "--mem=8G"
    asked = slurm.asked_of_slurm(Cluster(cpus=4, gpus=1, partition="long", time_limit=90, sbatch=words))
    assert asked == {
        "partition": "long",
        "time": 90,
        "cpus-per-task": 4,
        "gpus-per-node": 1,
        "account": "lab",
        "exclusive": True,
        "mem": "8G",
    }
    assert slurm.asked_of_slurm(Cluster(time_limit=90)) == {"time": 90, "cpus-per-task": 1}


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False), ("", False)]
)
def test_only_a_job_that_slurm_still_wants_to_run_is_put_back(tmp_path, monkeypatch, state, requeued):
    (job,) = jobs_in(tmp_path, args={"mood": "slow"})
    asked = []

    def answer(words: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, f"{state}\n", "")

    def tell_to_stop() -> None:
        wait_for(lambda: runs_at(tmp_path / "out", 50))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(slurm.subprocess, "run", answer)
    monkeypatch.setattr(slurm, "run_job", lambda *words, grace: jobs.run_job(*words))
    for name, value in (("JOB_ID", "7"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    handler, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=tell_to_stop)
    thread.start()
    try:
        with pytest.raises(SystemExit) as stop:
            slurm.work(job, 1800.0)
    finally:
        signal.signal(signal.SIGTERM, handler)
        thread.join()
    assert stop.value.code == 143 and job.state() == "interrupted"
    assert (["scontrol", "requeue", "7_3"] in asked) == requeued
    assert jobs.run_job(job) == "done"
