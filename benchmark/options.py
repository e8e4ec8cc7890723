"""What several commands ask of their options and refuse in the same words."""

import json
from importlib.util import find_spec
from pathlib import Path

from benchmark.errors import refuse


def at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            refuse(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:  # as the scripts have it
        refuse(f"--seed {seed}: must be between 0 and 2147483647")


def read_kwargs(text: str) -> dict:
    """--env-kwargs"""
    try:
        return dict(**json.loads(text))
    except (ValueError, TypeError):
        refuse(f"--env-kwargs {text}: must be a JSON object")


def make_folder(output: Path) -> None:
    """--output"""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {output}: {error.strerror}")


def need(*packages: str) -> None:
    for package in packages:
        if not find_spec(package):
            refuse(f"{package} is not installed; pip install -e '.[benchmark]'")
