"""Searches for better arguments of a script with Optuna: each trial is a few runs, ended early if they lag behind."""

import json
import math
import os
import shlex
import statistics
import threading
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import tyro
import yaml
from filelock import FileLock, Timeout

from benchmark.errors import nearest, refuse
from benchmark.executors import run_locally, until_told
from benchmark.jobs import Job, fingerprint_of_config
from benchmark.options import at_least, make_folder, need
from benchmark.runs import INCIDENTAL, Run, file_name, fingerprint, import_script, write_atomically, write_table
from benchmark.suites import GIVEN, Suite, as_words, check, find_script, jobs_of
from benchmark.sweep import Watch, live_view, tell_failure


@dataclass(frozen=True)
class Search:
    """What makes a study; another one is not mixed into it."""

    env_id: str
    seeds: int
    space: dict[str, dict[str, list]]
    words: list[str]
    version: str  # fingerprint of the script
    config: str = ""  # and of the file of --config among the words


def read_space(path: Path, script: Path) -> dict[str, dict[str, list]]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"--space {path}: {error}")
    if not isinstance(content, dict) or not content:
        refuse(f"--space {path}: must map arguments to ranges, such as learning_rate: {{log_float: [1.0e-4, 1.0e-3]}}")
    names, space = [field.name for field in fields(import_script(script).Args)], {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            refuse(f"--space {path}: {script.stem} has no argument {key}{nearest(name, names)}")
        if name in GIVEN:
            refuse(f"--space {path}: {key}: each run is given its own")
        if not is_range(value):
            refuse(
                f"--space {path}: {key}: must be float, log_float, int or log_int with two numbers, the lower first, or"
                " categorical with choices; YAML reads 1e-4 as text and 1.0e-4 as a number"
            )
        space[name] = value
    return space


def is_range(value: object) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, range_),) = value.items()
    if not isinstance(range_, list) or kind == "categorical":
        return isinstance(range_, list) and bool(range_)
    allowed = (int,) if kind in ("int", "log_int") else (int, float) if kind in ("float", "log_float") else ()
    numbers = len(range_) == 2 and all(type(end) in allowed and math.isfinite(end) for end in range_)
    return numbers and range_[0] < range_[1] and not (kind.startswith("log") and range_[0] <= 0)


def suggest(trial, name: str, value: dict[str, list]) -> object:
    ((kind, range_),) = value.items()
    if kind == "categorical":  # of anything, lists too
        return json.loads(trial.suggest_categorical(name, [json.dumps(choice) for choice in range_]))
    draw = trial.suggest_int if "int" in kind else trial.suggest_float
    return draw(name, *range_, log="log" in kind)


def evaluation_means(job: Job) -> list[tuple[float, float]]:
    """Step and mean return of each evaluation so far."""
    run = job.run()
    try:
        return list(run.means.items()) if run else []
    except (FileNotFoundError, ValueError):  # none so far
        return []


def settings_of(run: Run, space: dict) -> dict[str, object]:
    """What sets a run apart from its script's defaults, apart from what the search is run with."""
    budget = {*INCIDENTAL, "total_timesteps"}
    own = {name: value for name, value in run.config.items() if name not in budget and value != run.defaults.get(name)}
    return {"env_id": run.config["env_id"]} | own | {name: run.config[name] for name in space}


def as_text(trial) -> str:
    """Its arguments."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in trial.params.items()}
    return "  ".join(f"{name} {value}" for name, value in values.items())


class Tuner:
    """A study, and the folder of the runs that this process makes for it."""

    def __init__(self, script: Path, search: Search, study, folder: Path, stop: threading.Event, screen):
        self.script, self.search, self.study, self.folder, self.stop = script, search, study, folder, stop
        self.screen, self.under_way = screen, {}  # what to update on a terminal; the row of each trial there
        self.config = folder / file_name(f"{script.stem}__{search.env_id}.yaml")
        self.writing = threading.Lock()

    def trials(self) -> list:
        """All but those that were interrupted: later ones go on in their folders."""
        every = self.study.get_trials(deepcopy=False)
        return list({trial.user_attrs.get("folder", trial.number): trial for trial in every}.values())

    def left(self, wanted: int) -> int:
        return max(0, wanted - sum(trial.state.is_finished() for trial in self.trials()))

    def best(self):
        complete = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        return max(complete, key=lambda trial: trial.value, default=None)

    def put_back(self, trial) -> None:
        """Its arguments and its folder, with the runs begun, go to a trial that waits."""
        self.study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs["folder"]})

    def recover(self) -> None:
        """What seems to run for this folder, which no other process has, was left by one that was killed."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            if trial.user_attrs.get("owner") == str(self.folder):
                self.put_back(trial)
                self.study.tell(trial.number, state=TrialState.FAIL)

    def attempt(self, trial, workers: int, threads: int) -> float:
        """The mean final return of a trial's runs, which end early where their evaluations fall behind."""
        from optuna import TrialPruned

        search, folder = self.search, trial.user_attrs.get("folder", str(self.folder / f"trial-{trial.number:04d}"))
        chosen = {name: suggest(trial, name, value) for name, value in search.space.items()}
        trial.set_user_attr("owner", str(self.folder))
        trial.set_user_attr("folder", folder)
        trial.set_user_attr("parameters", chosen)
        words = [word for name, value in chosen.items() for word in as_words(name, value)]
        seeds = list(range(1, search.seeds + 1))
        suite = Suite([str(self.script)], [search.env_id], seeds, words=(*search.words, *words))
        given = jobs_of(suite, Path(folder), threads)
        jobs = [replace(job, version=search.version, config=search.config) for job in given]
        ends, halt, reported, behind = {}, threading.Event(), 0, False
        watch = Watch(jobs, ends)
        for ended in run_locally(jobs, halt, workers):
            if ended:
                job, ends[job] = ended
            for means in list(zip(*map(evaluation_means, jobs), strict=False))[reported:]:
                reported += 1  # by their number: steps differ where what is searched changes the rollout
                trial.report(statistics.fmean(mean for _, mean in means), reported)
                behind = behind or trial.should_prune()
            if behind or self.stop.is_set():
                halt.set()
            if self.screen:
                self.follow(trial, watch)
        if failed := [job for job in jobs if ends[job] == "failed"]:
            tell_failure(failed[0])
        elif {*ends.values()} == {"done"}:
            runs = [job.run() for job in jobs]
            trial.set_user_attr("settings", settings_of(runs[0], search.space))
            if all(run.result["evaluation"] for run in runs):
                return statistics.fmean(run.result["evaluation"]["mean"] for run in runs)
            print(f"{jobs[0].name}: was not evaluated")
        elif behind:
            raise TrialPruned
        else:
            self.put_back(trial)
        return math.nan  # which Optuna takes for a failure

    def follow(self, trial, watch: Watch) -> None:
        """Shows how far a trial is."""
        share = (len(watch.ended) + sum(row["share"] for row in watch.running().values())) / len(watch.jobs)
        means = [evaluations[-1][1] for job in watch.jobs if (evaluations := evaluation_means(job))]
        now = f"{statistics.fmean(means):,.5g}" if means else "-"
        self.under_way[trial.number] = f"trial {trial.number:>3}  {share:>10.0%}  now  {now:>10}   {as_text(trial)}"
        self.show()

    def show(self, line: str | None = None) -> None:
        """On a terminal the trials under way stand below what was said."""
        if self.screen:
            from rich.text import Text

            if line:
                self.screen.console.print(Text(line))
            self.screen.update(Text("\n".join(row for _, row in sorted(self.under_way.items()))))
        elif line:
            print(line, flush=True)

    def tell(self, trial) -> None:
        """A line on how it ended, and the files; nothing where it was interrupted."""
        self.under_way.pop(trial.number, None)
        if trial.number not in [other.number for other in self.trials()]:
            return
        text = trial.state.name.lower() if trial.state.name != "COMPLETE" else f"{trial.value:,.5g}"
        reached = f"{best.value:,.5g}" if (best := self.best()) else "-"
        self.show(f"trial {trial.number:>3}  {text:>10}  best {reached:>10}   {as_text(trial)}")
        self.write()

    def write(self) -> None:
        """trials.csv, results.json, and a file for --config with the best trial's arguments."""
        with self.writing:
            names = list(self.search.space)
            rows = [["trial", "state", "value", *names, "seconds", "folder"]]
            for trial in self.trials():
                chosen = [trial.params.get(name, "") for name in names]
                seconds = trial.duration.total_seconds() if trial.duration else ""
                folder = trial.user_attrs.get("folder", "")
                rows.append([trial.number, trial.state.name, trial.value, *chosen, seconds, folder])
            write_table(self.folder / "trials.csv", rows)
            if best := self.best():
                write_atomically(self.config, yaml.safe_dump(best.user_attrs["settings"], sort_keys=False))
                found = {"trial": best.number, "value": best.value, "parameters": best.user_attrs["parameters"]}
                results = {"script": self.script.stem} | vars(self.search) | {"best": found}
                write_atomically(self.folder / "results.json", json.dumps(results, indent=2) + "\n")


def open_study(name: str, search: Search, storage: str, prune: bool):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()
    try:
        kept = storage
        if "://" not in storage:
            kept = JournalStorage(JournalFileBackend(storage, JournalFileOpenLock(storage)))
        study = optuna.create_study(
            storage=kept, study_name=name, pruner=pruner, direction="maximize", load_if_exists=True
        )
    except Exception as error:  # whatever a database says
        refuse(f"--storage {storage}: {shorten(str(error), 200, placeholder=' …')}")
    earlier = vars(search) | study.user_attrs.get("search", {})
    if differing := [name for name, value in vars(search).items() if earlier[name] != value]:
        told = ", ".join(differing)
        refuse(f"{storage}: holds a study with other {told}; choose another --output, and --storage if given")
    study.set_user_attr("search", vars(search))
    # Another seed each time: a search that is begun again, or joined, draws nothing twice.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    return study


def tune(
    script: Annotated[str, tyro.conf.Positional],
    env_id: Annotated[str, tyro.conf.Positional],
    /,
    space: Path,
    trials: int = 20,
    seeds: int = 2,
    workers: int = 1,
    threads: int = 1,
    no_prune: bool = False,
    storage: str | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    r"""Search for the arguments with the highest final evaluation, in the mean over seeds.

    For example, 20 trials of two runs of 30,000 steps, the arguments of every run standing after --:

        python -m benchmark tune ppo_continuous HalfCheetah-v4 \
            --space configs/search/ppo_continuous.yaml --workers 2 \
            -- --total-timesteps 30_000 --num-evals 4

    From the sixth on, a trial whose evaluations fall behind the median of those before it is ended early. Started
    again, the search goes on. Several machines may share it, by the same storage and each its own output folder.

    Args:
        script: name of one of ours, or path of another
        env_id: a Gymnasium id
        space: YAML file: for each argument one of float, log_float, int, log_int (two ends) or categorical (choices)
        trials: how many, with those made before
        seeds: runs of each trial, seeds 1 to this
        workers: runs at the same time
        threads: torch threads of each run
        no_prune: let trials that fall behind go on
        storage: a journal file of Optuna's, or a database server's URL; by default study.log in the output folder
        output: a folder for the runs and the results; by default tuning/ and a name that follows from the others
        words: everything after --
    """
    at_least(1, trials=trials, seeds=seeds, workers=workers, threads=threads)
    if storage and storage.startswith("sqlite"):  # which gives a trial that waits to two that ask at once
        refuse(f"--storage {storage}: SQLite mixes trials up; name a journal file, or the URL of a database server")
    need("optuna", "matplotlib")
    path = find_script(script)
    check(path, [env_id], words)
    config = fingerprint_of_config(words, os.getcwd())
    search = Search(env_id, seeds, read_space(space, path), list(words), fingerprint(path), config)
    named = output or Path("tuning") / file_name(f"{path.stem}__{env_id}")
    make_folder(named)
    folder = named.resolve()
    at_once, kept = max(1, workers // seeds), storage or str(folder / "study.log")
    try:
        with FileLock(folder / "lock", timeout=0), until_told() as stop, live_view() as screen:
            study = open_study(f"{path.stem}__{env_id}", search, kept, not no_prune)
            known = {Path(trial.user_attrs.get("folder", "")).name for trial in study.get_trials(deepcopy=False)}
            if others := {each.name for each in folder.glob("trial-*")} - known:
                refuse(f"--output {named}: holds {min(others)} of another search; choose another")
            tuner = Tuner(path, search, study, folder, stop, screen)
            tuner.recover()
            print(f"{tuner.left(trials)} of {trials} trials to go, of seeds 1 to {seeds}, in {named}", flush=True)

            def settle(_, trial) -> None:
                tuner.tell(trial)
                if stop.is_set() or not tuner.left(trials):  # others may add to the study
                    study.stop()

            attempt = partial(tuner.attempt, workers=min(workers, seeds), threads=threads)
            study.optimize(attempt, tuner.left(trials), n_jobs=at_once, callbacks=[settle])
            tuner.write()
    except Timeout:
        refuse(f"--output {folder}: another search works there")
    if stop.is_set():
        print("stopped; the same command goes on")
        raise SystemExit(128 + stop.signal)
    if best := tuner.best():
        from benchmark.tune_figures import plot_search

        plot_search(study, folder)
        print(f"\nbest: trial {best.number} with {best.value:,.5g}; all of it is in {named}")
        print("  " + shlex.join(["python", os.path.relpath(path), "--config", str(named / tuner.config.name)]))
    if any(trial.state.name == "FAIL" for trial in tuner.trials()):
        raise SystemExit(1)
