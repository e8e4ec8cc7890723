"""Where jobs run: in processes of this machine, or on a Ray cluster.

Both yield every job that has ended, with how ("done", "failed", "interrupted"), and None about once a second. After
`stop` is set, running jobs are stopped where they can be resumed, and none begins.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager

from benchmark.errors import refuse
from benchmark.jobs import ROOT, SILENCE, Job, fail, run_job


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


def run_on_ray(
    jobs: list[Job], stop: threading.Event, address: str | None, cpus: float, gpus: float, silence: float
) -> Iterator:
    """A job whose node dies begins again on another node, where its run is found and resumed.

    The nodes must see this folder and the jobs' directories under the same paths.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        refuse("--executor ray: Ray is not installed; pip install -e '.[ray]'")
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    except Exception as error:  # Ray raises plain ones too, such as when its start takes too long
        where = f"--address {address}" if address else "--executor ray"
        refuse(f"{where}: {' '.join(str(error).split())[:200]}")

    work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(run_job)
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
