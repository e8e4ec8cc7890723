"""Jobs: one training run each, as a subprocess that can be stopped, found again and resumed."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from benchmark.runs import Run, find_runs, fingerprint, read_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent
POSIX = os.name == "posix"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PATIENCE = 60  # seconds in which a job that is told to stop may write its checkpoint
SILENCE = 1800.0  # seconds without a sign of life after which a job is ended


@dataclass(frozen=True)
class Job:
    script: str  # a path
    env_id: str
    seed: int
    words: tuple[str, ...]  # all other arguments, as on a command line
    setting: str  # what sets it apart from other jobs, besides script, environment and seed: "learning-rate=0.001"
    directory: str  # its own: holds the run directory, job.json, log.txt and perhaps failed.json
    version: str  # fingerprint of the script
    threads: int = 1
    started_in: str = "."  # the folder that relative paths among its arguments are meant from
    config: str = ""  # fingerprint of the file that --config names among them

    @property
    def name(self) -> str:
        return Path(self.directory).name

    @property
    def log(self) -> Path:
        return Path(self.directory) / "log.txt"

    @property
    def failure(self) -> Path:
        return Path(self.directory) / "failed.json"

    def runs(self) -> list[Run]:
        """What can be read of the run directories in its own."""
        return [run for run in find_runs([Path(self.directory)]) if not run.damage]

    def run(self) -> Run | None:
        """The run directory that it made, once there is one."""
        return next((run for run in self.runs() if run.version == self.version), None)

    def state(self) -> str:
        run = self.run()
        if run and run.result:
            return "done"
        if read_json(self.failure):
            return "failed"
        return "interrupted" if run else "new"

    def command(self) -> list[str]:
        """Begins the run, or goes on with it by the source that began it."""
        if run := self.run():
            return [sys.executable, str(run.source), "--resume", str(run.directory), "--threads", str(self.threads)]
        own = ["--env-id", self.env_id, "--seed", self.seed, "--threads", self.threads, "--runs-dir", self.directory]
        return [sys.executable, self.script, *map(str, own), *self.words]

    def describes_itself_as(self) -> dict | None:
        """What an earlier sweep wrote about the job in this directory."""
        return read_json(Path(self.directory) / "job.json")

    def has_changed(self) -> bool:
        """Whether what is in its directory is from another version of its script."""
        told = self.describes_itself_as() or {}
        return {told.get("version", self.version), *(run.version for run in self.runs())} != {self.version}

    def reason(self) -> dict:
        """What is written about its failure."""
        return {"reason": "its files cannot be written", "log": []} | (read_json(self.failure) or {})

    def description(self) -> dict:
        described = asdict(self) | {"words": list(self.words), "script": Path(self.script).stem}
        for name in ("directory", "threads", "started_in"):  # may change from one start to the next
            del described[name]
        return described


def fingerprint_of_config(words: Sequence[str], folder: str) -> str:
    """Of the file that counts; empty where none is named."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    named = [file for flag, file in pairwise(parts) if flag == "--config"]
    return fingerprint(Path(folder, named[-1])) if named else ""


def tail(path: Path, lines: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def die_with_parent() -> None:
    """In the child: the kernel ends it with the process that began it, however that ends (Linux)."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lock(job: Job, stopped: Callable[[], bool] = lambda: False) -> IO | None:
    """Held by the job's process too, so nobody begins the job elsewhere while it is alive; None once `stopped`.

    Windows lets no process inherit a lock: there only the sweep holds it.
    """
    file = (Path(job.directory) / "lock").open("ab")
    while not lock_descriptor(file.fileno(), blocking=False):
        if stopped():
            file.close()
            return None
        time.sleep(0.2)
    return file


def alone(held: IO) -> dict[str, object]:
    """How a job is started so that Ctrl-C reaches the sweep alone, which stops its jobs in order."""
    if not POSIX:
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True, "pass_fds": [held.fileno()], "preexec_fn": die_with_parent}


def beside(job: Job) -> str:
    """Where Python looks for modules: first beside the script, from where its copy in the run's directory goes on."""
    return os.pathsep.join([str(Path(job.script).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_job(job: Job, stopped: Callable[[], bool] = lambda: False, silence: float = SILENCE, grace: float = 0.0) -> str:
    """Runs a job to its end: "done", "failed" or, once `stopped` says so, "interrupted".

    A job that writes nothing for `silence` seconds is ended; that is a failure too, as is one that cannot be begun or
    whose files cannot be written. One that is stopped is told after `grace` seconds, if it has not ended by itself.
    """
    try:
        return carry_out(job, stopped, silence, grace)
    except OSError as error:
        return fail(job, f"could not be run: {error}")


def hide(run: Run) -> None:
    """It stays, where nothing looks for it."""
    run.directory.rename(run.directory.with_name(f".{time.time_ns()}-{run.directory.name}"))


def carry_out(job: Job, stopped: Callable[[], bool], silence: float, grace: float) -> str:
    """Runs of another version of its script get hidden: who begins the job has asked for that."""
    directory = Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    held = lock(job, stopped)
    if held is None:
        return "interrupted"
    with held, job.log.open("ab") as log:
        told = {"version": job.version} | (job.describes_itself_as() or {})
        own = job.run() if told["version"] == job.version else None  # else it may have been edited as it began
        if not own and fingerprint(Path(job.script)) != job.version:
            return fail(job, f"{job.script} is not what it was at the start")
        if not own and fingerprint_of_config(job.words, job.started_in) != job.config:
            return fail(job, "the file of --config is not what it was at the start")
        for run in find_runs([directory]):
            if not own or run.directory != own.directory:
                hide(run)
        if job.state() == "done":
            return "done"
        job.failure.unlink(missing_ok=True)
        begun_in = told.get("started_in") if own else None  # what its relative paths are meant from
        started_in = begun_in if begun_in and Path(begun_in).is_dir() else job.started_in
        described = job.description() | {"started_in": started_in}
        write_atomically(directory / "job.json", json.dumps(described, indent=2) + "\n")
        started = time.monotonic()
        process = subprocess.Popen(
            job.command(),
            cwd=started_in,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1", "PYTHONPATH": beside(job)},
            **alone(held),
        )
        reason = None
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if stopped():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(grace)
                    end(process)
                    break
                if time.monotonic() - started > silence and time.time() - last_sign(job, log) > silence:
                    reason = f"wrote nothing for {silence:.0f} s, and was ended"
                    end(process)
        finally:
            end(process)
    if edited := [run for run in job.runs() if run.version != job.version]:
        hide(edited[0])  # made by the source of before, it would pass for the new one's
        return fail(job, f"{job.script} was edited while it began")
    if job.state() == "done":
        return "done"
    if stopped() and reason is None:
        return "interrupted"
    reason = reason or (
        f"ended by {signal.Signals(-process.returncode).name}"
        if process.returncode < 0
        else f"exit status {process.returncode}"
    )
    return fail(job, reason)


def fail(job: Job, reason: str) -> str:
    with suppress(OSError):  # where nothing can be written, that is told instead
        write_atomically(job.failure, json.dumps({"reason": reason, "log": tail(job.log, 20)}, indent=2) + "\n")
    return "failed"


def last_sign(job: Job, log: IO) -> float:
    """When the job last wrote something."""
    run = job.run()
    files = [path for path in run.directory.iterdir() if path.suffix == ".csv"] if run else []
    return max([os.fstat(log.fileno()).st_mtime, *(path.stat().st_mtime for path in files)])


def end(process: subprocess.Popen) -> None:
    """Asks it to stop where it can be resumed, and after a while insists."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            if POSIX:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
