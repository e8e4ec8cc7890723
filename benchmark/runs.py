"""Reads run directories. Nothing else in the harness knows their layout."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml


@dataclass(frozen=True)
class Run:
    directory: Path

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load((self.directory / "config.yaml").read_text())

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.directory / "meta.json").read_text())

    @cached_property
    def result(self) -> dict | None:
        """The summary; none while the run is unfinished."""
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def table(self, name: str) -> dict[str, np.ndarray]:
        with (self.directory / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        return dict(zip(header, np.array(rows, float).reshape(-1, len(header)).T, strict=True))


def find_runs(paths: list[Path]) -> list[Run]:
    """The run directories among the paths and one level below them, in order."""
    found = {path.parent for where in paths for path in (*where.glob("meta.json"), *where.glob("*/meta.json"))}
    return [Run(directory) for directory in sorted(found)]
