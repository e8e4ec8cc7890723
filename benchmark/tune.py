"""Searches for better arguments of a script with Optuna: each trial is a few runs, stopped early if they lag behind."""

import difflib
import fcntl
import json
import math
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
import yaml

from benchmark.errors import refuse
from benchmark.jobs import ROOT, Job, run_job
from benchmark.runs import fingerprint, import_script, write_atomically, write_table
from benchmark.suites import Suite, as_words, check, find_script, jobs_of

# What runs are given for the search's sake, and no setting that it finds.
BUDGET = {"total_timesteps", "num_evals", "eval_episodes", "checkpoint_every", "capture_video", "track", "runs_dir"}
BUDGET |= {"seed", "threads", "compile", "device"}

KINDS = {"float": float, "log_float": float, "int": int, "log_int": int}


@dataclass(frozen=True)
class Search:
    """What makes a study; another one is not mixed into it."""

    script: str
    env_id: str
    seeds: int
    space: dict[str, dict[str, list]]
    words: tuple[str, ...]
    version: str  # fingerprint of the script

    def description(self) -> dict:
        return {
            "script": self.script.removeprefix(f"{ROOT}/"),  # ours are the same wherever they are
            "env_id": self.env_id,
            "seeds": self.seeds,
            "space": self.space,
            "words": list(self.words),
            "version": self.version,
        }


def read_space(path: Path, script: Path) -> dict[str, dict[str, list]]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"--space {path}: {' '.join(str(error).split())}")
    if not isinstance(content, dict) or not content:
        refuse(f"--space {path}: must map arguments to ranges, such as learning_rate: {{log_float: [1.0e-4, 1.0e-3]}}")
    names, space = [field.name for field in fields(import_script(script).Args)], {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            refuse(
                f"--space {path}: {script.stem} has no argument {key}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if not isinstance(value, dict) or len(value) != 1 or not {*value} <= {*KINDS, "categorical"}:
            refuse(f"--space {path}: {key}: must be one of {', '.join(KINDS)} or categorical, with a list")
        ((kind, range_),) = value.items()
        if not isinstance(range_, list) or not range_:
            refuse(f"--space {path}: {key}: {kind} needs a list")
        if kind in KINDS:
            if texts := [end for end in range_ if isinstance(end, str)]:
                refuse(f"--space {path}: {key}: {texts[0]!r} is text; YAML's numbers are written 1.0e-4")
            numbers = len(range_) == 2 and all(type(end) in (int, float) and math.isfinite(end) for end in range_)
            if (
                not numbers
                or not range_[0] < range_[1]
                or (KINDS[kind] is int and not all(float(e).is_integer() for e in range_))
            ):
                refuse(f"--space {path}: {key}: {kind} needs two {'whole ' * ('int' in kind)}numbers, the lower first")
            if kind.startswith("log") and range_[0] <= 0:
                refuse(f"--space {path}: {key}: {kind} needs numbers above 0")
        space[name] = {kind: range_}
    return space


def suggest(trial, space: dict[str, dict[str, list]]) -> dict[str, object]:
    chosen = {}
    for name, ((kind, range_),) in ((name, value.items()) for name, value in space.items()):
        if kind == "categorical":
            texts = [json.dumps(choice) for choice in range_]  # lists, too, can be chosen
            chosen[name] = json.loads(trial.suggest_categorical(name, texts))
        elif KINDS[kind] is int:
            chosen[name] = trial.suggest_int(name, *map(int, range_), log=kind == "log_int")
        else:
            chosen[name] = trial.suggest_float(name, *range_, log=kind == "log_float")
    return chosen


@contextmanager
def locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def evaluation_means(job: Job) -> list[tuple[float, float]]:
    """Step and mean return of each evaluation of which all episodes are there."""
    if not (run := job.run()):
        return []
    try:
        table = run.table("evaluations")
    except (FileNotFoundError, ValueError):
        return []
    steps, episodes = np.unique(table["step"], return_counts=True)
    whole = steps[episodes >= run.config.get("eval_episodes", 1)]
    return [(float(step), float(table["return"][table["step"] == step].mean())) for step in whole]


class Tuner:
    """A study and the folder of its runs, in which several of these may work at the same time."""

    def __init__(
        self, search: Search, settings: dict, study, folder: Path, trials: int, workers: int, threads: int, seed: int
    ):
        self.search, self.study, self.folder, self.trials, self.threads = search, study, folder, trials, threads
        self.settings, self.seed = settings, seed
        self.slots = threading.Semaphore(workers)
        self.stop = threading.Event()
        self.mutex = threading.Lock()

    def counted(self) -> list:
        """All trials but those that were interrupted, and begun anew as others."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if not trial.user_attrs.get("interrupted")]

    def begin(self):
        """The next trial with its arguments, unless there are enough; first those that an ended process left."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        with self.mutex, locked(self.folder / "study.lock"):
            free_now = {trial.number for trial in self.counted() if self.abandoned(trial)}
            for trial in self.counted():  # read again: what was told just before it was let go is not running any more
                if trial.number in free_now and trial.state == TrialState.RUNNING:
                    self.put_back(trial)
            begun = [trial for trial in self.counted() if trial.state != TrialState.WAITING]
            if len(begun) >= self.trials or self.stop.is_set():
                return None, None, {}
            # A seed for each trial: processes that share the study, or begin it again, draw nothing twice.
            self.study.sampler = TPESampler(seed=self.seed + len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask()
            chosen = suggest(trial, self.search.space)
            if "folder" not in trial.user_attrs:
                trial.set_user_attr("folder", f"trial-{trial.number:04d}")
            owner = self.owner(trial.user_attrs["folder"])
            owner.parent.mkdir(parents=True, exist_ok=True)
            held = owner.open("w")
            fcntl.flock(held, fcntl.LOCK_EX)
            return trial, held, chosen

    def abandoned(self, trial) -> bool:
        """Whether it is running, but no process that is alive runs it."""
        return trial.state.name == "RUNNING" and free(self.owner(trial.user_attrs.get("folder", "none")))

    def owner(self, name: str) -> Path:
        return self.folder / name / "owner.lock"

    def put_back(self, trial) -> None:
        """Its parameters and its folder, with the runs begun, go to a trial that waits."""
        from optuna.trial import TrialState

        self.study._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs["folder"]})

    def work(self) -> None:
        """Trial after trial, until there are enough."""
        while not self.stop.is_set():
            trial, held, chosen = self.begin()
            if trial is None:
                return
            with held:
                self.run(trial, chosen)
            self.write()

    def run(self, trial, chosen: dict[str, object]) -> None:
        from optuna.trial import TrialState

        words = tuple(word for name, value in chosen.items() for word in as_words(name, value))
        suite = Suite([self.search.script], [self.search.env_id], list(range(1, self.search.seeds + 1)))
        suite = Suite(suite.scripts, suite.env_ids, suite.seeds, words=(*self.search.words, *words))
        jobs = jobs_of(suite, self.folder / trial.user_attrs["folder"], self.threads)
        jobs = [replace(job, version=self.search.version) for job in jobs]
        pruned, started = threading.Event(), time.monotonic()

        def train(job: Job) -> str:
            with self.slots:
                try:
                    return run_job(job, lambda: self.stop.is_set() or pruned.is_set())
                except OSError:
                    return "failed"

        reported = 0
        with ThreadPoolExecutor(len(jobs)) as pool:
            running = [pool.submit(train, job) for job in jobs]
            while not all(future.done() for future in running):
                time.sleep(0.3)
                evaluations = [evaluation_means(job) for job in jobs]
                for means in list(zip(*evaluations, strict=False))[reported:]:
                    trial.report(statistics.fmean(mean for _, mean in means), int(means[0][0]))
                    reported += 1
                    if trial.should_prune():
                        pruned.set()
            ends = [future.result() for future in running]
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        if "failed" in ends:
            job = jobs[ends.index("failed")]
            trial.set_user_attr("failure", job.reason() | {"file": str(job.log)})
            self.tell(trial, state=TrialState.FAIL)
        elif all(end == "done" for end in ends):
            finals = [job.run().result["evaluation"].get("mean") for job in jobs]
            if None in finals:
                trial.set_user_attr("failure", {"reason": "was not evaluated", "log": [], "file": str(jobs[0].log)})
                self.tell(trial, state=TrialState.FAIL)
            else:
                self.tell(trial, value=statistics.fmean(finals))
        elif pruned.is_set():
            self.tell(trial, state=TrialState.PRUNED)
        else:
            with self.mutex:
                self.put_back(self.study.get_trials(deepcopy=False)[trial.number])

    def tell(self, trial, value: float | None = None, state=None) -> None:
        with self.mutex:
            told = self.study.tell(trial, value, state)
        text = f"{told.value:,.5g}" if value is not None else told.state.name.lower()
        best = self.best()
        parameters = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.params.items())
        print(
            f"trial {told.number:>3}  {text:>10}  best {f'{best.value:,.5g}' if best else '-':>10}   {parameters}",
            flush=True,
        )

    def best(self):
        complete = [trial for trial in self.counted() if trial.state.name == "COMPLETE"]
        return max(complete, key=lambda trial: trial.value, default=None)

    def write(self) -> None:
        """results.json and trials.csv, and a file for --config with the best trial's arguments."""
        with self.mutex, locked(self.folder / "study.lock"):
            trials, best = self.counted(), self.best()
            names = list(self.search.space)
            rows = [["trial", "state", "value", *names, "seconds", "folder"]]
            for trial in trials:
                attributes = [trial.user_attrs.get(name, "") for name in ("seconds", "folder")]
                value = "" if trial.value is None else trial.value
                rows.append(
                    [trial.number, trial.state.name, value, *(trial.params.get(n, "") for n in names), *attributes]
                )
            write_table(self.folder / "trials.csv", rows)
            states = [trial.state.name for trial in trials]
            results = self.search.description() | {
                "trials": {state: states.count(state) for state in sorted({*states})}
            }
            if best:
                parameters = {
                    n: json.loads(v) if "categorical" in self.search.space[n] else v for n, v in best.params.items()
                }
                results |= {"best": {"trial": best.number, "value": best.value, "parameters": parameters}}
                config = {"env_id": self.search.env_id} | self.settings | parameters
                write_atomically(self.config(), yaml.safe_dump(config, sort_keys=False))
            write_atomically(self.folder / "results.json", json.dumps(results, indent=2) + "\n")

    def config(self) -> Path:
        return (
            self.folder
            / f"{Path(self.search.script).stem}__{self.search.env_id.replace('/', '-').replace(':', '-')}.yaml"
        )


def settings_of(words: tuple[str, ...]) -> dict[str, object]:
    """What the arguments of every run set, and the file of their --config; but not what the search is run with."""
    found, filed = given(words), {}
    if path := found.pop("config", None):
        try:
            filed = dict(**yaml.safe_load(Path(str(path)).read_text()))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            refuse(f"--config {path}: is no file of arguments: {' '.join(str(error).split())}")
    settings = filed | {name: value for name, value in found.items() if name not in BUDGET}
    return {name: value for name, value in settings.items() if name != "env_id"}


def given(words: tuple[str, ...]) -> dict[str, object]:
    """The arguments among the words of a command line."""
    found: dict[str, object] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            found[name] = value_of(value) if equals else True
            if name.startswith("no_") and not equals:
                del found[name]
                found[name[3:]] = False
        else:
            value = value_of(word)
            found[name] = value if found[name] is True else [*np.atleast_1d(found[name]).tolist(), value]
    return found


def value_of(word: str) -> object:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def open_study(search: Search, storage: str | None, folder: Path, prune: bool):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or f"sqlite:///{folder / 'study.db'}"
    kept = JournalStorage(JournalFileBackend(url)) if "://" not in url else url
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0) if prune else optuna.pruners.NopPruner()
    try:
        study = optuna.create_study(
            storage=kept,
            study_name=f"{Path(search.script).stem}__{search.env_id}",
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:
        refuse(f"--storage {url}: {' '.join(str(error).split())[:200]}")
    earlier = study.user_attrs.get("search")
    described = search.description()
    if earlier is None:
        study.set_user_attr("search", described)
    elif differing := [name for name in described if earlier.get(name, described[name]) != described[name]]:
        refuse(f"{url}: holds a study with other {', '.join(differing)}; choose another --output or --storage")
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
    prune: bool = True,
    seed: int = 0,
    storage: str | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    r"""Search for the arguments with the highest final evaluation, in the mean over seeds.

    For example, 20 trials of two runs of 30,000 steps, the arguments of every run standing after --:

        python -m benchmark tune ppo_continuous HalfCheetah-v4 \
            --space configs/search/ppo_continuous.yaml --workers 2 \
            -- --total-timesteps 30_000 --num-evals 4

    A trial whose evaluations fall behind the median of those before it is ended early. Started again, the search goes
    on; several processes or machines may share it, by the same output folder and storage.

    Args:
        script: name of one of ours, or path of another
        env_id: a Gymnasium id
        space: YAML file: for each argument one of float, log_float, int, log_int (two ends) or categorical (choices)
        trials: how many, with those made before
        seeds: runs of each trial, seeds 1 to this
        workers: runs at the same time
        threads: torch threads of each run
        prune: end trials that fall behind
        seed: of the sampler
        storage: an Optuna URL, or a journal file; by default an SQLite file in the output folder
        output: a folder for the runs and the results; by default tuning/ and a name that follows from the others
        words: everything after --
    """
    for name, value in (("trials", trials), ("seeds", seeds), ("workers", workers), ("threads", threads)):
        if value < 1:
            refuse(f"--{name} {value}: must be at least 1")
    if seed < 0:
        refuse(f"--seed {seed}: must be at least 0")
    for package in ("optuna", "matplotlib"):
        if not find_spec(package):
            refuse(f"{package} is not installed; pip install -e '.[benchmark]'")
    path = find_script(script)
    check(path, [env_id], words)
    search = Search(str(path), env_id, seeds, read_space(space, path), words, fingerprint(path))
    settings = settings_of(words)
    folder = (output or Path("tuning") / f"{path.stem}__{env_id.replace('/', '-')}").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {folder}: {error.strerror}")
    with locked(folder / "study.lock"):  # two that begin at once would both make the tables
        study = open_study(search, storage, folder, prune)
    tuner = Tuner(search, settings, study, folder, trials, workers, threads, seed)

    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        tuner.stop.set()

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        at_once = max(1, workers // seeds)
        with ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(tuner.work) for _ in range(at_once)]:
                future.result()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    tuner.write()
    if caught:
        print("stopped; the same command goes on")
        raise SystemExit(128 + caught[0])
    failed = [trial for trial in tuner.counted() if trial.state.name == "FAIL"]
    for trial in failed:
        failure = trial.user_attrs["failure"]
        print(f"\ntrial {trial.number} failed: {failure['reason']}; {failure['file']}")
        print("\n".join(f"    {line}" for line in failure["log"][-8:]))
    if best := tuner.best():
        from benchmark.tune_figures import plot_search

        logs = {name for name, range_ in search.space.items() if {*range_} & {"log_float", "log_int"}}
        plot_search(tuner.study, logs, folder)
        print(f"\nbest: trial {best.number} with {best.value:,.5g}; results, settings and figures are in {folder}")
        print(f"  python {path.name} --config {tuner.config()}")
    if failed:
        raise SystemExit(1)
