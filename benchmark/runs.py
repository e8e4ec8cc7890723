"""Reads run directories. Nothing else in the harness knows their layout."""

import ast
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import yaml

# Arguments that say where a run was made, and those that change nothing of what is learnt.
WHERE = {"runs_dir", "resume", "config", "capture_video", "track", "wandb_project_name", "wandb_entity"}
INCIDENTAL = WHERE | {"seed", "threads", "compile", "device", "num_evals", "eval_episodes", "checkpoint_every"}


@dataclass(frozen=True)
class Run:
    directory: Path

    @cached_property
    def config(self) -> dict:
        return yaml.load((self.directory / "config.yaml").read_text(), FAST_LOADER)

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.directory / "meta.json").read_text())

    @cached_property
    def defaults(self) -> dict:
        """Of the script's arguments, as the run's own are read."""
        args = {field.name: field for field in fields(self.module().Args)}
        made = {name: field.default_factory() for name, field in args.items() if field.default_factory is not MISSING}
        given = {name: field.default for name, field in args.items() if field.default is not MISSING}
        return json.loads(json.dumps(given | made))

    def decides(self, name: str) -> bool:
        """Whether its script decides an argument where nobody does: the default, read without running it, is None."""
        nodes = ast.walk(ast.parse(self.source.read_text())) if self.source.is_file() else ()
        found = [node.value for node in nodes if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name]
        return any(isinstance(value, ast.Constant) and value.value is None for value in found)

    @property
    def result(self) -> dict | None:
        """The summary; none while the run is unfinished."""
        return read_json(self.directory / "result.json")

    @property
    def damage(self) -> str:
        """Which of the files that make it a run cannot be read; none, as a rule."""
        for name, read in (("meta.json", lambda: Path(self.script)), ("config.yaml", lambda: self.config["env_id"])):
            try:
                read()
            except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
                return f"{name} is torn"
        return ""

    @property
    def script(self) -> str:
        return self.meta["script"]

    @property
    def source(self) -> Path:
        """The copy of the script that the run made, which also resumes it."""
        return self.directory / f"{self.script}.py"

    @property
    def last_checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    @property
    def best_policy(self) -> Path:
        return self.directory / "best.pt"

    @property
    def version(self) -> str:
        """Of the script: which source ran."""
        return fingerprint(self.source)

    def policies(self) -> dict[int, Path]:
        """The policy of each evaluation, by its step."""
        return {int(path.stem.split("-")[1]): path for path in sorted((self.directory / "policies").glob("step-*.pt"))}

    def videos(self) -> dict[int, Path]:
        """The film of each evaluation, by its step."""
        return {int(path.stem.split("-")[1]): path for path in sorted((self.directory / "videos").glob("step-*.mp4"))}

    def table(self, name: str) -> dict[str, np.ndarray]:
        """A CSV file as a column per name; a last row that is still being written is left out."""
        text = (self.directory / f"{name}.csv").read_text()
        header, _, body = text[: text.rfind("\n") + 1].partition("\n")
        if not header:
            raise ValueError(f"{name}.csv has no header yet")
        names = header.split(",")
        rows = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2) if body else np.empty((0, len(names)))
        return dict(zip(names, rows.T, strict=True))

    @cached_property
    def evaluations(self) -> dict[str, np.ndarray]:
        return self.table("evaluations")

    @cached_property
    def means(self) -> dict[float, float]:
        """Mean return of each evaluation, by its step."""
        steps, which = np.unique(self.evaluations["step"], return_inverse=True)
        means = np.bincount(which, self.evaluations["return"]) / np.bincount(which)
        return dict(zip(steps.tolist(), means.tolist(), strict=True))

    @cached_property
    def progress(self) -> dict[str, np.ndarray]:
        return self.table("progress")

    @cached_property
    def episodes(self) -> dict[str, np.ndarray]:
        return self.table("episodes")

    @property
    def compiling(self) -> float:
        """Seconds, each time it was begun."""
        log = self.directory / "run.log"
        return sum(map(float, re.findall(r"compiled in ([\d.]+) s", log.read_text()))) if log.is_file() else 0.0

    def last_rows(self, name: str, most: int) -> list[dict[str, float]]:
        """The last rows of a table that may be long and is still being written."""
        try:
            with (self.directory / f"{name}.csv").open("rb") as file:
                names = file.readline().decode().strip().split(",")
                body, end = file.tell(), file.seek(0, io.SEEK_END)
                file.seek(max(body, end - 400 * most - 400))
                if file.tell() > body:
                    file.readline()  # begun in its middle
                lines = file.read().decode().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [dict(zip(names, map(float, row), strict=True)) for row in csv.reader(lines[-most:])]

    def module(self) -> ModuleType:
        """The script that ran, imported from the run directory, so that forks are evaluated just as well."""
        return import_script(self.source)


FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def import_script(path: Path) -> ModuleType:
    name = f"{path.stem}__{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    spec.loader.set_data = lambda *_, **__: None  # no bytecode is left in a run's directory
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def file_name(text: str) -> str:
    """Of anything, such as an environment's id with slashes and colons."""
    return "".join(letter if letter.isalnum() or letter in "-_.=" else "-" for letter in text)


def fingerprint(source: Path) -> str:
    """Of a script; "unknown" where there is none."""
    try:
        return hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    except OSError:
        return "unknown"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the other's place once all is on the disk: a full one leaves what was there."""
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:  # Windows syncs no file that is only read
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, newline="")


def write_table(path: Path, rows: Iterable[Iterable]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(path, text.getvalue())


def read_json(path: Path) -> dict | None:
    """None for a file that is absent, or torn, which is the same."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def names_of(runs: list[Run]) -> list[str]:
    """The job's name, which tells its setting, or the directory's; the whole path where two would have the same."""
    folders = [run.directory.resolve() for run in runs]
    names = [own.parent.name if (own.parent / "job.json").exists() else own.name for own in folders]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    whole = [file_name(str(folder)).strip("-") for folder in folders]
    return [path if name in repeated else name for name, path in zip(names, whole, strict=True)]


def is_run(path: Path) -> bool:
    return (path / "meta.json").is_file() and (path / "config.yaml").is_file()


def folders_with(name: str, paths: Iterable[Path]) -> list[Path]:
    """Those that hold a file of this name, among the paths and in them, however deep; hidden ones are unfinished."""
    found = set()
    for path in paths:
        for folder, below, files in os.walk(path, followlinks=True):
            below[:] = [each for each in below if not each.startswith(".")]
            if name in files:
                found.add(Path(folder))
    return sorted(found)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    return [Run(folder) for folder in folders_with("meta.json", paths) if is_run(folder)]
