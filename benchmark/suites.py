"""Suites: which scripts, environments, seeds and arguments a sweep runs, and the jobs that follow."""

import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import yaml

from benchmark.errors import choices, nearest, refuse
from benchmark.jobs import ROOT, Job, fingerprint_of_config
from benchmark.runs import file_name, fingerprint, import_script, read_json, write_atomically

IS_CLONE = (ROOT / "pyproject.toml").is_file()


@dataclass(frozen=True)
class Suite:
    scripts: list[str]  # names of ours, or paths
    env_ids: list[str]
    seeds: list[int]
    args: dict[str, object] = field(default_factory=dict)  # the same for every job
    grid: dict[str, list] = field(default_factory=dict)  # every combination of these
    words: tuple[str, ...] = ()  # as `args`, but as given on the command line


def our_scripts() -> dict[str, Path]:
    """By their names: those of the clone, or those that pip has put among the modules of others."""
    if IS_CLONE:
        return {path.stem: path for path in ROOT.glob("*.py")}
    modules = (metadata.distribution("solorl").read_text("top_level.txt") or "").split()
    return {name: path for name in modules if (path := ROOT / f"{name}.py").is_file()}


def hint(path: Path) -> str:
    """Where a file of ours that is not here may be."""
    if path.parts[:1] not in (("suites",), ("configs",)):
        return ""
    there = ROOT / path
    return f"; it is {there}" if there.is_file() else "" if IS_CLONE else "; suites and configs come with a clone only"


def find_script(name: str) -> Path:
    """A script of ours by its name, or any by its path."""
    ours = our_scripts()
    if name in ours:
        return ours[name]
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    refuse(f"script {name}: unknown{choices(name, sorted(ours))}")


GIVEN = "env_id", "seed", "threads", "runs_dir", "resume"  # of a job: no other argument may take their place


def check(script: Path, env_ids: Iterable[str], words: Iterable[str], filmed: bool = False) -> None:
    """Says once, before anything begins, what would end every run of a script: wrong arguments and environments."""
    sys.path.insert(0, str(script.parent))  # as for `python script.py`
    try:
        module = import_script(script)
        names = [each.name for each in fields(module.Args)]
    except Exception as error:
        refuse(f"{script}: {type(error).__name__}: {error}")
    else:
        check_words(script, names, words)
        check_environments(module, env_ids, filmed)
    finally:
        sys.path.remove(str(script.parent))


def check_words(script: Path, names: list[str], words: Iterable[str]) -> None:
    for word in words:
        if (told := hint(Path(word))) and not Path(word).exists():
            refuse(f"{word}: there is no such file{told}")
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in GIVEN:
            refuse(f"{word}: each run is given its own; environments, seeds, threads and folder are chosen before --")
        if word.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            flags = [each.replace("_", "-") for each in names]
            refuse(f"{word}: {script.stem} has no such argument{nearest(name.replace('_', '-'), flags, '--')}")


def check_environments(module: ModuleType, env_ids: Iterable[str], filmed: bool) -> None:
    def make(env_id: str, *mode: str) -> gym.Env:
        return module.make_eval_env(module.Args(env_id=env_id), *mode)

    for env_id in env_ids if hasattr(module, "make_eval_env") else ():
        try:
            make(env_id).close()
        except (gym.error.Error, ImportError) as error:
            refuse(f"{env_id}: {error}")
        except Exception:  # without the other arguments it need not work
            continue
        if filmed:
            try:
                with warnings.catch_warnings(action="ignore"), closing(make(env_id, "rgb_array")) as env:
                    env.reset(seed=0)
                    env.render()
            except Exception as error:
                refuse(f"{env_id}: cannot be filmed ({type(error).__name__} {error}); --no-video does without")


def as_words(name: str, value: object) -> list[str]:
    """An argument as it stands on a command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def read_suite(path: Path) -> Suite:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"{path}: {error}{hint(path)}")
    if not isinstance(content, dict):
        refuse(f"{path}: a suite is a mapping with scripts, env_ids and seeds")
    known = {"scripts": [], "env_ids": [], "seeds": 1, "args": {}, "grid": {}}
    content = known | {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in content:
        if key not in known:
            refuse(f"{path}: unknown key {key}{choices(key, known)}")
    if type(content["seeds"]) is int:
        content["seeds"] = list(range(1, content["seeds"] + 1))
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        refuse(f"{path}: seeds must be a number of seeds, or a list of them, from 0 to 2147483647")
    for key in ("scripts", "env_ids", "args", "grid"):
        listed = key in ("scripts", "env_ids")
        if not isinstance(content[key], list if listed else dict):
            refuse(f"{path}: {key} must be a {'list' if listed else 'mapping'}")
        if not all(isinstance(name, str) and name for name in content[key]):
            refuse(f"{path}: {key}: {list(content[key])} must be {'names' if listed else 'names of arguments'}")
    for name, values in content["grid"].items():
        if not isinstance(values, list) or not values:
            refuse(f"{path}: grid: {name} must be a list of values")
    return Suite(**content)


def job_of(
    script: Path, env_id: str, seed: int, words: tuple[str, ...], setting: str, directory: Path, threads: int
) -> Job:
    """Of the script and of the file of settings as they are now; relative paths are meant from here."""
    here = os.getcwd()
    config = fingerprint_of_config(words, here)
    return Job(str(script), env_id, seed, words, setting, str(directory), fingerprint(script), threads, here, config)


def jobs_of(suite: Suite, directory: Path, threads: int) -> list[Job]:
    """Every combination, the first seed of all of them before the second."""
    for name in ("scripts", "env_ids", "seeds"):
        if not getattr(suite, name) or "" in getattr(suite, name):
            refuse(f"nothing to run: no {name.replace('_', ' ')} selected")
    scripts = [find_script(name) for name in suite.scripts]
    common = [word for name, value in suite.args.items() for word in as_words(name, value)]
    points = [tuple(zip(suite.grid, values, strict=True)) for values in itertools.product(*suite.grid.values())]
    jobs = []
    for seed, script, env_id, point in itertools.product(suite.seeds, scripts, suite.env_ids, points):
        setting = " ".join(f"{name.replace('_', '-')}={str(value).replace(' ', '')}" for name, value in point)
        chosen = [word for name, value in point for word in as_words(name, value)]
        name = file_name("__".join([env_id, script.stem, *([setting] if setting else []), str(seed)]))
        if len(name) > 150:
            name = f"{name[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        words = (*common, *suite.words, *chosen)
        jobs.append(job_of(script, env_id, seed, words, setting, directory / name, threads))
    if len({job.directory for job in jobs}) < len(jobs):
        refuse("two jobs have the same name: scripts, environments and seeds must differ from each other")
    return jobs


def default_directory(suite: Suite) -> Path:
    """The same for the same selection, so that the same command goes on with what it began."""
    text = json.dumps([suite.scripts, suite.env_ids, suite.args, suite.grid, suite.words], sort_keys=True)
    scripts = "+".join(Path(script).stem for script in suite.scripts)
    return Path("sweeps") / f"{scripts}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def keep_selection(suite: Suite, jobs: list[Job], directory: Path) -> None:
    """For reports, which compare in the order in which scripts and values were named, those of earlier sweeps first."""
    order = list(dict.fromkeys((job.script, job.setting) for job in jobs))
    names = [job.name for job in sorted(jobs, key=lambda job: order.index((job.script, job.setting)))]
    kept = {"jobs": [name for name in jobs_in_order(directory) if name not in names] + names}
    kept["swept"] = sorted(settings_swept(directory) | {name.replace("-", "_") for name in suite.grid})
    try:
        write_atomically(directory / "sweep.json", json.dumps(asdict(suite) | kept, indent=2) + "\n")
    except OSError as error:
        refuse(f"--output {directory}: {error.strerror}")


def jobs_in_order(directory: Path) -> list[str]:
    """The names of those that sweeps in this folder were to run; none if none was here."""
    return (read_json(directory / "sweep.json") or {}).get("jobs", [])


def settings_swept(directory: Path) -> set[str]:
    """The arguments that the grids of this folder's sweeps vary."""
    return {*(read_json(directory / "sweep.json") or {}).get("swept", ())}
