"""Searches for better arguments of a script with Optuna: each trial is a few runs, stopped early if they lag behind."""

import json
import math
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
import yaml
from filelock import FileLock, Timeout

from benchmark.errors import nearest, refuse
from benchmark.jobs import ROOT, Job, run_job
from benchmark.options import at_least, make_folder, need
from benchmark.runs import fingerprint, import_script, write_atomically, write_table
from benchmark.suites import Suite, as_words, check, find_script, jobs_of

# What runs are given for the search's sake, and no setting that it finds.
BUDGET = {"total_timesteps", "num_evals", "eval_episodes", "checkpoint_every", "capture_video", "track", "runs_dir"}
BUDGET |= {"seed", "threads", "compile", "device"}

KINDS = ("float", "log_float", "int", "log_int")


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
        ours = self.script.removeprefix(f"{ROOT}/")  # is the same wherever it is
        return vars(self) | {"script": ours, "words": list(self.words)}


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
            refuse(f"--space {path}: {script.stem} has no argument {key}{nearest(name, names)}")
        if not isinstance(value, dict) or len(value) != 1 or not {*value} <= {*KINDS, "categorical"}:
            refuse(f"--space {path}: {key}: must be one of {', '.join(KINDS)} or categorical, with a list")
        ((kind, range_),) = value.items()
        if problem := problem_of(kind, range_):
            refuse(f"--space {path}: {key}: {problem}")
        space[name] = value
    return space


def problem_of(kind: str, range_: object) -> str:
    if not isinstance(range_, list) or not range_:
        return f"{kind} needs a list"
    if kind == "categorical":
        return ""
    if texts := [end for end in range_ if isinstance(end, str)]:
        return f"{texts[0]!r} is text; YAML's numbers are written 1.0e-4"
    numbers = len(range_) == 2 and all(type(end) in (int, float) and math.isfinite(end) for end in range_)
    whole = "int" in kind
    if not numbers or not range_[0] < range_[1] or (whole and any(end % 1 for end in range_)):
        return f"{kind} needs two {'whole ' * whole}numbers, the lower first"
    return f"{kind} needs numbers above 0" if "log" in kind and range_[0] <= 0 else ""


def distribution(kind: str, range_: list):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if kind == "categorical":
        return CategoricalDistribution([json.dumps(choice) for choice in range_])  # lists, too, can be chosen
    if "int" in kind:
        return IntDistribution(*map(int, range_), log="log" in kind)
    return FloatDistribution(*range_, log="log" in kind)


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

    def __init__(self, search: Search, study, folder: Path, trials: int, workers: int, threads: int, seed: int):
        self.search, self.study, self.folder, self.trials = search, study, folder, trials
        self.threads, self.seed = threads, seed
        self.slots, self.stop, self.mutex = threading.Semaphore(workers), threading.Event(), threading.Lock()
        space = {name: next(iter(value.items())) for name, value in search.space.items()}
        self.distributions = {name: distribution(*value) for name, value in space.items()}

    def counted(self) -> list:
        """All trials but those that were interrupted: their folders are those of later ones."""
        return list({folder_of(trial): trial for trial in self.study.get_trials(deepcopy=False)}.values())

    def best(self):
        complete = [trial for trial in self.counted() if trial.state.name == "COMPLETE"]
        return max(complete, key=lambda trial: trial.value, default=None)

    def parameters(self, trial) -> dict[str, object]:
        return {n: json.loads(v) if "categorical" in self.search.space[n] else v for n, v in trial.params.items()}

    def owner(self, trial) -> FileLock:
        """Held by the process that runs the trial."""
        folder = self.folder / folder_of(trial)
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "owner.lock")

    def is_left(self, trial) -> bool:
        """Whether it is running, but no process that is alive runs it."""
        if trial.state.name != "RUNNING":
            return False
        try:
            with self.owner(trial).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def begin(self):
        """The next trial, with its lock, unless there are enough; first those that an ended process left.

        Optuna's heartbeats would tell of those after a while only, and in a database only.
        """
        from optuna.samplers import TPESampler

        with self.mutex, FileLock(self.folder / "study.lock"):
            left = {trial.number for trial in self.counted() if self.is_left(trial)}
            for trial in self.counted():  # read again: what was told just before it was let go is not running any more
                if trial.number in left and trial.state.name == "RUNNING":
                    self.put_back(trial)
            if self.stop.is_set() or sum(trial.state.name != "WAITING" for trial in self.counted()) >= self.trials:
                return None, None
            # A seed for each trial: processes that share the study, or begin it again, draw nothing twice.
            self.study.sampler = TPESampler(seed=self.seed + len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask(self.distributions)
            held = self.owner(trial)
            held.acquire()
            return trial, held

    def put_back(self, trial) -> None:
        """Its arguments and its folder, with the runs begun, go to a trial that waits."""
        self.study.enqueue_trial(trial.params, user_attrs={"folder": folder_of(trial)})
        self.study.tell(trial.number, state=state("FAIL"))

    def work(self) -> None:
        """Trial after trial, until there are enough."""
        while not self.stop.is_set():
            trial, held = self.begin()
            if trial is None:
                return
            try:
                self.carry_out(trial)
            finally:
                held.release()
            self.write()

    def jobs(self, trial) -> list[Job]:
        words = [word for name, value in self.parameters(trial).items() for word in as_words(name, value)]
        search, seeds = self.search, list(range(1, self.search.seeds + 1))
        suite = Suite([search.script], [search.env_id], seeds, words=(*search.words, *words))
        made = jobs_of(suite, self.folder / folder_of(trial), self.threads)
        return [replace(job, version=search.version) for job in made]

    def carry_out(self, trial) -> None:
        jobs, pruned, started = self.jobs(trial), threading.Event(), time.monotonic()

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
                for means in list(zip(*map(evaluation_means, jobs), strict=False))[reported:]:
                    trial.report(statistics.fmean(mean for _, mean in means), int(means[0][0]))
                    reported += 1
                    if trial.should_prune():
                        pruned.set()
            ends = [future.result() for future in running]
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        if "failed" in ends:
            job = jobs[ends.index("failed")]
            self.tell(trial, failure=job.reason() | {"file": str(job.log)})
        elif all(end == "done" for end in ends):
            finals = [job.run().result["evaluation"].get("mean") for job in jobs]
            if None in finals:
                self.tell(trial, failure={"reason": "was not evaluated", "log": [], "file": str(jobs[0].log)})
            else:
                self.tell(trial, value=statistics.fmean(finals))
        elif pruned.is_set():
            self.tell(trial)
        else:
            with self.mutex:
                self.put_back(trial)

    def tell(self, trial, value: float | None = None, failure: dict | None = None) -> None:
        """How it ended: early, if neither is given."""
        how = "FAIL" if failure else "PRUNED" if value is None else "COMPLETE"
        if failure:
            trial.set_user_attr("failure", failure)
        with self.mutex:
            self.study.tell(trial, value, state(how))
        best = self.best()
        parameters = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        text = how.lower() if value is None else f"{value:,.5g}"
        reached = f"{best.value:,.5g}" if best else "-"
        print(f"trial {trial.number:>3}  {text:>10}  best {reached:>10}   {parameters}", flush=True)

    def write(self) -> None:
        """results.json and trials.csv, and a file for --config with the best trial's arguments."""
        with self.mutex, FileLock(self.folder / "study.lock"):
            trials, best, names = self.counted(), self.best(), list(self.search.space)
            rows = [["trial", "state", "value", *names, "seconds", "folder"]]
            for trial in trials:
                chosen = [trial.params.get(name, "") for name in names]
                value = "" if trial.value is None else trial.value
                seconds = trial.user_attrs.get("seconds", "")
                rows.append([trial.number, trial.state.name, value, *chosen, seconds, folder_of(trial)])
            write_table(self.folder / "trials.csv", rows)
            states = [trial.state.name for trial in trials]
            results = self.search.description() | {"trials": {name: states.count(name) for name in sorted({*states})}}
            if best:
                parameters = self.parameters(best)
                results |= {"best": {"trial": best.number, "value": best.value, "parameters": parameters}}
                config = {"env_id": self.search.env_id} | settings_of(self.search.words) | parameters
                write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))
            write_atomically(self.folder / "results.json", json.dumps(results, indent=2) + "\n")

    @property
    def config(self) -> Path:
        env_id = self.search.env_id.replace("/", "-").replace(":", "-")
        return self.folder / f"{Path(self.search.script).stem}__{env_id}.yaml"


def folder_of(trial) -> str:
    """Where its runs are; a trial that goes on with an interrupted one has that one's."""
    return trial.user_attrs.get("folder", f"trial-{trial.number:04d}")


def state(name: str):
    from optuna.trial import TrialState

    return TrialState[name]


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
    found: dict[str, list] = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            values = found[flag.replace("-", "_")] = [value_of(value)] if equals else []
        else:
            values.append(value_of(word))
    named: dict[str, object] = {}
    for name, values in found.items():
        off = name.startswith("no_") and not values
        named[name[3:] if off else name] = values if len(values) > 1 else values[0] if values else not off
    return named


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
    name = f"{Path(search.script).stem}__{search.env_id}"
    try:
        with FileLock(folder / "study.lock"):  # two that begin at once would both make the tables
            study = optuna.create_study(
                storage=kept, study_name=name, pruner=pruner, direction="maximize", load_if_exists=True
            )
    except Exception as error:
        refuse(f"--storage {url}: {' '.join(str(error).split())[:200]}")
    described = search.description()
    earlier = described | study.user_attrs.get("search", {})
    if differing := [name for name in described if earlier[name] != described[name]]:
        refuse(f"{url}: holds a study with other {', '.join(differing)}; choose another --output or --storage")
    study.set_user_attr("search", described)
    return study


def carry_on(tuner: Tuner, at_once: int) -> int:
    """Works until there are enough trials, or until a signal, which is returned; a second one ends it at once."""
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        tuner.stop.set()

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(tuner.work) for _ in range(at_once)]:
                future.result()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    tuner.write()
    return caught[0] if caught else 0


def conclude(tuner: Tuner) -> int:
    """Draws and tells what was found; how many trials failed."""
    failed = [trial for trial in tuner.counted() if trial.state.name == "FAIL"]
    for trial in failed:
        failure = trial.user_attrs["failure"]
        print(f"\ntrial {trial.number} failed: {failure['reason']}; {failure['file']}")
        print("\n".join(f"    {line}" for line in failure["log"][-8:]))
    if best := tuner.best():
        from benchmark.tune_figures import plot_search

        plot_search(tuner.study, tuner.folder)
        print(
            f"\nbest: trial {best.number} with {best.value:,.5g}; results, settings and figures are in {tuner.folder}"
        )
        print(f"  python {Path(tuner.search.script).name} --config {tuner.config}")
    return len(failed)


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
    at_least(1, trials=trials, seeds=seeds, workers=workers, threads=threads)
    at_least(0, seed=seed)
    need("optuna", "matplotlib")
    path = find_script(script)
    check(path, [env_id], words)
    search = Search(str(path), env_id, seeds, read_space(space, path), words, fingerprint(path))
    settings_of(words)  # refuses a file that is none
    folder = (output or Path("tuning") / f"{path.stem}__{env_id.replace('/', '-').replace(':', '-')}").resolve()
    make_folder(folder)
    study = open_study(search, storage, folder, prune)
    tuner = Tuner(search, study, folder, trials, workers, threads, seed)
    if caught := carry_on(tuner, max(1, workers // seeds)):
        print("stopped; the same command goes on")
        raise SystemExit(128 + caught)
    if conclude(tuner):
        raise SystemExit(1)
