"""Sweeps: many runs as subprocesses, that go on where they were stopped and hide no failure."""

import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.errors import refuse
from benchmark.executors import HERE, Cluster, run_locally, run_on_ray, until_told
from benchmark.jobs import Job
from benchmark.options import at_least, make_folder
from benchmark.slurm import check_slurm, run_on_slurm
from benchmark.suites import Suite, check, default_directory, jobs_of, keep_selection, read_suite


def described_at(job: Job) -> int | None:
    """When it began, by the clock of whoever keeps its files; other nodes' may differ."""
    description = Path(job.directory) / "job.json"
    return description.stat().st_mtime_ns if description.exists() else None


class Watch:
    """What the jobs' files say about how far the sweep is."""

    def __init__(self, jobs: list[Job], ended: dict[Job, str]):
        self.jobs, self.ended = jobs, ended
        self.before = {job: described_at(job) for job in jobs}
        self.finals: dict[Job, float | None] = {}  # evaluation returns

    def running(self) -> dict[Job, dict]:
        """The running jobs with their last progress."""
        found = {}
        for job in self.jobs:
            if job in self.ended or described_at(job) == self.before[job]:
                continue
            found[job] = {"share": 0.0, "sps": 0.0, "pace": 0.0, "return": None}
            with suppress(LookupError, ValueError):  # where a fork writes what is no number
                if (run := job.run()) and (rows := run.last_rows("progress", 1)):
                    episodes, total = run.last_rows("episodes", 100), run.config["total_timesteps"]
                    found[job] = {
                        "share": rows[0]["step"] / total,
                        "sps": rows[0]["sps"],
                        "pace": rows[0]["sps"] / total,  # runs a second
                        "return": statistics.fmean(row["return"] for row in episodes) if episodes else None,
                    }
        return found

    def final(self, jobs: list[Job]) -> list[float]:
        """The final evaluation returns of those that are done and were evaluated."""
        for job in jobs:
            if job not in self.finals and self.ended.get(job) == "done":
                self.finals[job] = (job.run().result["evaluation"] or {}).get("mean")
        return [value for job in jobs if (value := self.finals.get(job)) is not None]

    def left(self, running: dict[Job, dict]) -> str:
        """Time to the end at the present pace."""
        waiting = len(self.jobs) - len(self.ended) - sum(progress["share"] for progress in running.values())
        pace = sum(progress["pace"] for progress in running.values())
        return str(timedelta(seconds=round(waiting / pace))) if pace else "-"

    def headline(self, running: dict[Job, dict]) -> str:
        counts = Counter(self.ended.values())
        sps = sum(progress["sps"] for progress in running.values())
        waiting = len(self.jobs) - len(self.ended) - len(running)
        return (
            f"{counts['done']} of {len(self.jobs)} done, {len(running)} running, {waiting} waiting,"
            f" {counts['failed']} failed   {sps:,.0f} steps/s   ETA {self.left(running)}"
        )

    def groups(self) -> dict[tuple[str, str, str], list[Job]]:
        found: dict[tuple[str, str, str], list[Job]] = {}
        for job in self.jobs:
            found.setdefault((Path(job.script).stem, job.env_id, job.setting), []).append(job)
        return found

    def table(self, running: dict[Job, dict]):
        """For the terminal: a row per script, environment and setting, then one per running job."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.headline(running)), title_justify="left", title_style="bold", box=None)
        table.add_column("", overflow="fold")
        for column in ("done", "failed", "evaluation\nreturn", "training\nreturn", "steps/s", "progress"):
            table.add_column(column, justify="right")
        for (script, env_id, setting), jobs in self.groups().items():
            counts = Counter(self.ended.get(job) for job in jobs)
            mean = f"{statistics.fmean(finals):,.1f}" if (finals := self.final(jobs)) else "-"
            failed = Text(str(counts["failed"]), style="bold red" if counts["failed"] else "")
            done = f"{counts['done']}/{len(jobs)}"
            table.add_row(Text(f"{script}  {env_id}  {setting}"), done, failed, mean, "", "", "")
            for job in jobs:
                if progress := running.get(job):
                    now = "-" if progress["return"] is None else f"{progress['return']:,.1f}"
                    row = Text(f"  seed {job.seed}", style="dim"), "", "", "", now, f"{progress['sps']:,.0f}"
                    table.add_row(*row, f"{progress['share']:.0%}")
        return table


def previous_states(jobs: list[Job], retry_failed: bool, advice: str | None) -> dict[Job, str]:
    """The jobs that need not run, and why; refuses what belongs to another sweep.

    Where a script is not what it was, `advice` says what can be done; without it, its jobs are run again.
    """
    settled, changed = {}, Counter()
    for job in jobs:
        described, earlier = job.description(), job.describes_itself_as()
        told = described | (earlier or {})
        told["script"] = Path(told["script"]).stem
        differing = [name for name in described if name != "version" and told[name] != described[name]]
        if differing:
            names = ", ".join(differing).replace("words", "arguments").replace("config", "contents of --config")
            refuse(f"{job.directory}: holds a job with other {names}; choose another --output")
        if job.has_changed():
            changed[job.script] += 1
            continue
        state = job.state()
        if state == "done" or (state == "failed" and earlier and not retry_failed):  # without a job.json none began
            settled[job] = state
    if changed and advice:
        files = ", ".join(f"{script} has changed since {count} of these" for script, count in changed.items())
        refuse(f"{files} began; {advice}")
    return settled


def live_view() -> AbstractContextManager:
    """What to update on a terminal; None elsewhere."""
    if not (sys.stdout.isatty() and find_spec("rich")):
        return nullcontext()
    from rich.live import Live

    return Live(refresh_per_second=2, transient=True)


def run_sweep(jobs: list[Job], settled: dict[Job, str], execute: Callable = run_locally) -> Watch:
    """Runs what is not settled by `execute(jobs, stop)`, shows how it goes, and returns how it went."""
    watch = Watch(jobs, dict(settled))
    todo = sorted((job for job in jobs if job not in settled), key=lambda job: job.state() != "interrupted")
    said = 0.0
    with until_told() as stop, live_view() as screen:
        for event in execute(todo, stop):
            if event:
                job, how = event
                watch.ended[job] = how
                if how != "interrupted":
                    told = "".join(f"  evaluation return {value:,.1f}" for value in watch.final([job]))
                    line = f"{how}: {job.name}{told}"
                    screen.console.print(line, highlight=False) if screen else print(line, flush=True)
            running = watch.running()
            if screen:
                screen.update(watch.table(running))
            elif time.monotonic() - said > 60:
                said = time.monotonic()
                print(watch.headline(running), flush=True)
    if stop.is_set():
        counts = Counter(watch.ended.values())
        left = len(watch.jobs) - counts["done"] - counts["failed"]
        told = f"{counts['done']} of {len(watch.jobs)} done, {counts['failed']} failed, {left} to go on with"
        print(f"stopped; the same command goes on: {told}")
        raise SystemExit(128 + stop.signal)
    return watch


def tell_failure(job: Job) -> None:
    failure = job.reason()
    print(f"\n{job.name}: {failure['reason']}; {job.log}")
    print("\n".join(f"    {line}" for line in failure["log"][-8:]), flush=True)


def end_if_failed(watch: Watch, advice: str) -> None:
    """Tells what failed, if any did, and ends with status 1."""
    failed = [job for job, how in watch.ended.items() if how == "failed"]
    if failed:
        print(f"\n{len(failed)} of {len(watch.ended)} failed; {advice}:")
        for job in failed:
            tell_failure(job)
        raise SystemExit(1)


def check_cluster(cluster: Cluster) -> None:
    for name, needed in (("address", "ray"), ("partition", "slurm"), ("sbatch", "slurm")):
        if getattr(cluster, name) and cluster.executor != needed:
            refuse(f"--{name}: is of --executor {needed}")
    cpus, gpus, minutes = cluster.cpus, cluster.gpus, cluster.time_limit
    if cluster.executor == "slurm" and not (cpus >= 1 and gpus >= 0 and minutes >= 1 and cpus % 1 == gpus % 1 == 0):
        refuse(f"--cpus {cpus:g} --gpus {gpus:g} --time-limit {minutes}: Slurm takes whole numbers, from 1, 0 and 1")


def sweep(
    suite: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    scripts: tuple[str, ...] = (),
    env_ids: tuple[str, ...] = (),
    seeds: int | None = None,
    workers: int = 1,
    threads: int = 1,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    retry_failed: bool = False,
    rerun: bool = False,
    silence: float = 30.0,
    dry_run: bool = False,
    cluster: Annotated[Cluster, tyro.conf.OmitArgPrefixes] = HERE,
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    r"""Train many runs. Started again, it skips what is finished and resumes what was interrupted.

    Arguments after -- go to every run. A suite is a YAML file with scripts, env_ids, seeds, args and grid: seeds is how
    many or a list, args are the same for all, grid has a list of values for each argument, every combination of
    which is run.

        python -m benchmark sweep suites/mujoco-1m.yaml
        python -m benchmark sweep --scripts ppo_continuous my_fork.py \
            --env-ids Hopper-v4 --seeds 5 -- --total-timesteps 1_000_000

    Args:
        suite: a suite, instead of --scripts, --env-ids and --seeds
        scripts: names of ours, or paths of others
        env_ids: Gymnasium ids
        seeds: seeds 1 to this; by default 1
        workers: runs at the same time on this machine
        threads: torch threads of each run
        output: folder of the runs and their logs; by default sweeps/ and a name that follows from the selection
        retry_failed: also run again what failed before
        rerun: run again what an earlier version of its script has run; those runs stay, in hidden folders
        silence: minutes without a sign of life after which a run is ended, as failed
        dry_run: print the commands and end
        words: everything after --
    """
    if suite and (scripts or env_ids or seeds is not None):
        refuse("--scripts, --env-ids and --seeds: a suite names its own")
    seeds = 1 if seeds is None else seeds
    at_least(1, seeds=seeds, workers=workers, threads=threads)
    if not silence > 0:
        refuse(f"--silence {silence}: must be above 0")
    check_cluster(cluster)
    chosen = read_suite(suite) if suite else Suite(list(scripts), list(env_ids), list(range(1, seeds + 1)))
    chosen = replace(chosen, words=words)
    directory = output or (Path("sweeps") / suite.stem if suite else default_directory(chosen))
    jobs = jobs_of(chosen, directory.resolve(), threads)
    advice = None if rerun else "--rerun runs them again, another --output keeps them"
    settled = previous_states(jobs, retry_failed, advice)
    todo = [job for job in jobs if job not in settled]
    for script in dict.fromkeys(job.script for job in todo):
        own = [job for job in todo if job.script == script]
        words = dict.fromkeys(word for job in own for word in job.words)
        check(Path(script), dict.fromkeys(job.env_id for job in own), words)
    if dry_run:
        print("\n".join(shlex.join(job.command()) for job in todo))
        return
    if cluster.executor == "slurm":
        check_slurm(cluster)
    make_folder(directory)
    keep_selection(chosen, jobs, directory)
    print(
        f"{len(jobs)} job{'s' * (len(jobs) > 1)} in {directory}"
        + (f", {len(settled)} of them settled before" if settled else "")
    )

    executors = {
        "local": partial(run_locally, workers=workers),
        "ray": partial(run_on_ray, cluster=cluster),
        "slurm": partial(run_on_slurm, cluster=cluster),
    }
    watch = run_sweep(jobs, settled, partial(executors[cluster.executor], silence=silence * 60))
    for (script, env_id, setting), group in watch.groups().items():
        mean = f"{statistics.fmean(finals):,.1f}" if (finals := watch.final(group)) else "-"
        told = f"{len(finals)} of {len(group)} seeds  final evaluation return {mean}"
        print(f"{script:<16} {env_id:<26} {setting}  {told}")
    print(f"report: {shlex.join(['python', '-m', 'benchmark', 'report', str(directory)])}")
    end_if_failed(watch, "--retry-failed tries them again")
