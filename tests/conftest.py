"""What the tests of several files look at."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as some tests wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Callable[[str], Path]:
    """A script's small run, trained once; who changes anything in it takes a copy."""
    from tests.test_promises import Script

    return cache(lambda name: Script(name, tmp_path_factory.mktemp(name)).train())
