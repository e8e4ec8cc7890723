"""Where jobs run: in processes of this machine, or on a Ray cluster.

Both yield every job that has ended, with how ("done", "failed", "interrupted"), and None about once a second. After
`stop` is set, running jobs are stopped where they can be resumed, and none begins.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from benchmark.errors import refuse
from benchmark.jobs import ROOT, SILENCE, Job, fail, run_job


@dataclass(frozen=True)
class Cluster:
    """Its nodes must see this folder and the output under the same paths."""

    executor: Literal["local", "ray", "slurm"] = "local"  # this machine, or a Ray or Slurm cluster
    cpus: float = 1.0  # what a run reserves
    gpus: float = 0.0  # what a run reserves
    address: str | None = None  # of the Ray cluster; by default this machine's, started if there is none
    partition: str | None = None  # of the Slurm cluster
    time_limit: int = 240  # minutes after which Slurm puts a run back into its queue, to go on later
    sbatch: tuple[str, ...] = ()  # more of Slurm's options, such as account=lab mem=8G


HERE = Cluster()


class Stop(threading.Event):
    signal = 0  # which set it


@contextmanager
def until_told() -> Iterator[Stop]:
    """What SIGINT and SIGTERM set; a second one ends everything at once."""
    stop = Stop()

    def catch(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.signal = number
        stop.set()

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_locally(jobs: list[Job], stop: threading.Event, workers: int = 1, silence: float = SILENCE) -> Iterator:
    def work(job: Job) -> str:
        return "interrupted" if stop.is_set() else run_job(job, stop.is_set, silence)

    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(work, job): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in ended:
                yield waiting.pop(future), future.result()
            if not ended:
                yield None


def run_on_ray(jobs: list[Job], stop: threading.Event, cluster: Cluster, silence: float) -> Iterator:
    """A job whose node dies begins again on another node, where its run is found and resumed."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        refuse("--executor ray: Ray is not installed; pip install -e '.[ray]'")
    try:
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    except Exception as error:  # Ray raises plain ones too, such as when its start takes too long
        where = f"--address {cluster.address}" if cluster.address else "--executor ray"
        refuse(f"{where}: {shorten(str(error), 200, placeholder=' …')}")

    work = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=-1)(run_job)
    waiting = {work.options(name=job.name).remote(job, silence=silence): job for job in jobs}
    cancelled = False
    try:
        while waiting:
            if stop.is_set() and not cancelled:
                cancelled = True
                for reference in waiting:
                    ray.cancel(reference)
            ended, _ = ray.wait(list(waiting), timeout=1)
            for reference in ended:
                job = waiting.pop(reference)
                try:
                    yield job, ray.get(reference)
                except RayError as error:
                    told = f"Ray ended it ({type(error).__name__})"
                    yield job, "interrupted" if cancelled else fail(job, told)
            if not ended:
                yield None
    finally:
        ray.shutdown()
