"""On a Slurm cluster jobs are the elements of an array. The folder slurm/ beside them holds what Slurm wrote of them.

Slurm sends SIGTERM to what it preempts, what is cancelled, and what will soon be out of time: the run is stopped where
it can be resumed, and unless it was cancelled, Slurm puts the same element back into its queue.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmark.errors import refuse
from benchmark.executors import Cluster
from benchmark.jobs import ROOT, Job, fail, run_job
from benchmark.runs import read_json, write_atomically

NOTICE = 90  # seconds before a job is out of time, at most half of it
WAITS = 15  # seconds between two questions to Slurm's queue
OURS = {"array", "output", "error", "open-mode", "job-name", "signal", "requeue", "no-requeue", "wrap", "test-only"}
OURS |= {"partition", "time", "cpus-per-task", "gpus-per-node"}  # which have flags of the sweep
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT", "GONE"}


def asked_of_slurm(cluster: Cluster) -> dict[str, str | int | bool]:
    """What every job asks for, as options of sbatch."""
    asked = {"partition": cluster.partition, "time": cluster.time_limit, "cpus-per-task": int(cluster.cpus)}
    asked |= {"gpus-per-node": int(cluster.gpus) or None}
    for word in cluster.sbatch:
        name, equals, value = word.removeprefix("--").partition("=")
        asked[name] = value if equals else True
    return {name: value for name, value in asked.items() if value is not None}


def check_slurm(cluster: Cluster) -> None:
    """Refuses what Slurm would refuse, before anything is written."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        refuse("--executor slurm: submitit is not installed; pip install -e '.[slurm]'")
    for word in cluster.sbatch:
        name = word.removeprefix("--").partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]+", name) or name in OURS:
            refuse(f"--sbatch {word}: must be an option of sbatch that the sweep does not set, such as account=lab")
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked_of_slurm(cluster).items()]
    try:
        tried = subprocess.run(["sbatch", "--test-only", *words, "--wrap=true"], capture_output=True, text=True)
    except FileNotFoundError:
        refuse("--executor slurm: Slurm's sbatch is not installed here")
    if tried.returncode:
        told = tried.stderr.strip().splitlines() or ["it does not say why"]
        refuse(f"--executor slurm: sbatch {shlex.join(words)} is refused: {told[-1]}")


def run_on_slurm(jobs: list[Job], stop: threading.Event, cluster: Cluster, silence: float) -> Iterator:
    """Jobs that Slurm still has, from a sweep that was killed, are not given to it again."""
    if not jobs:
        return
    from submitit import SlurmJob

    folder = Path(jobs[0].directory).parent / "slurm"
    known = read_json(folder / "jobs.json") or {}
    queue = ask_queue(folder)
    if known and queue is None:
        refuse(
            "--executor slurm: squeue does not answer, so it is unknown what Slurm has of this sweep; try again later"
        )
    left = still_queued(jobs, known, queue or {})
    if new := [job for job in jobs if job not in left]:
        numbers = submit(new, cluster, silence, folder)
        known |= {job.name: {"number": numbers[job], "job": job.description()} for job in new}
        write_atomically(folder / "jobs.json", json.dumps(known, indent=2) + "\n")

    waiting = {job: SlurmJob(folder, known[job.name]["number"]) for job in jobs}
    asked, cancelled, missed = time.monotonic(), False, set()
    while waiting:
        if stop.is_set() and not cancelled:
            subprocess.run(["scancel", *(slurm_job.job_id for slurm_job in waiting.values())], capture_output=True)
            cancelled = True
        time.sleep(1)
        results = {job: slurm_job for job, slurm_job in waiting.items() if slurm_job.paths.result_pickle.exists()}
        ended = {job: outcome(job, slurm_job) for job, slurm_job in results.items()}
        if time.monotonic() - asked > (1 if cancelled else WAITS) and (states := ask_queue(folder)) is not None:
            asked = time.monotonic()
            gone = {job for job in waiting.keys() - ended if states.get(waiting[job].job_id, "GONE") in ENDED}
            for job in gone if cancelled else gone & missed:  # at the second time: a result may be on its way
                ended[job] = end_of(job, states.get(waiting[job].job_id, "GONE"), cancelled)
            missed = gone
        for job, how in ended.items():
            del waiting[job]
            yield job, how
        if not ended:
            yield None


def still_queued(jobs: list[Job], known: dict[str, dict], states: dict[str, str]) -> list[Job]:
    """Those that an earlier sweep gave to Slurm, which is not done with them."""
    left = [job for job in jobs if job.name in known and states.get(known[job.name]["number"], "GONE") not in ENDED]
    for job in left:
        number, description = known[job.name]["number"], Path(job.directory) / "job.json"
        if known[job.name]["job"] != job.description():
            refuse(
                f"{job.name}: Slurm still has it with other arguments, or another script; scancel {number} ends that"
            )
        if states[number] == "RUNNING" and description.exists():
            os.utime(description)  # as if it had begun now: it is shown as running
    return left


def submit(jobs: list[Job], cluster: Cluster, silence: float, folder: Path) -> dict[Job, str]:
    """Slurm's number of each job."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    executor = SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name_of(folder),
        time=cluster.time_limit,
        stderr_to_stdout=True,
        array_parallelism=len(jobs),
        setup=[f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
        srun_args=[f"--cpus-per-task={int(cluster.cpus)}"],  # which it does not take from sbatch, from Slurm 22.05 on
        additional_parameters=asked_of_slurm(cluster)
        | {"requeue": True, "signal": f"TERM@{min(NOTICE, 30 * cluster.time_limit)}"},
    )
    kept = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_CONF", "SBATCH_"))}
    try:
        with clean_env():  # of a job of Slurm's that this may be run in
            os.environ.update(kept)
            submitted = executor.submit_array([partial(work, job, silence) for job in jobs])
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        refuse(f"--executor slurm: {' '.join(str(error).split())[-300:]}")
    return {job: slurm_job.job_id for job, slurm_job in zip(jobs, submitted, strict=True)}


def name_of(folder: Path) -> str:
    return "solorl-" + re.sub(r"[^\w.-]", "-", folder.parent.name)


def work(job: Job, silence: float) -> str:
    """What runs on the node. It returns when the job needs no more of Slurm."""
    from submitit import JobEnvironment

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # Slurm signals the run itself too, where it does not track processes by cgroups; told twice, a run stops at once.
    how = run_job(job, stop.is_set, silence, grace=5)
    if how != "interrupted":
        return how
    number = JobEnvironment().job_id  # of this element: $SLURM_JOB_ID may mean the whole array
    state = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={number}"], capture_output=True, text=True)
    if state.stdout.strip() == "RUNNING":  # nobody cancelled it, nor has Slurm requeued it
        subprocess.run(["scontrol", "requeue", number])
    raise SystemExit(128 + signal.SIGTERM)


def ask_queue(folder: Path) -> dict[str, str] | None:
    """The state of each job of this folder that Slurm remembers, by its number; None if Slurm does not answer."""
    words = ["squeue", "--me", "--array", "--noheader", "--states=all", f"--name={name_of(folder)}", "--format=%i %T"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in listed.splitlines())


def outcome(job: Job, slurm_job) -> str:
    """What `work` returned."""
    from submitit.core.utils import UncompletedJobError

    try:
        return slurm_job.result()
    except UncompletedJobError:
        return fail(job, f"could not be run on its node; {slurm_job.paths.stdout} says why")


def end_of(job: Job, state: str, cancelled: bool) -> str:
    """How a job is that has left Slurm without a result."""
    if job.state() == "done":
        return "done"
    if cancelled:
        return "interrupted"
    return fail(job, f"Slurm ended it ({state}); what it wrote is in {Path(job.directory).parent / 'slurm'}")
