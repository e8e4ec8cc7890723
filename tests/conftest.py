"""What the tests of several files look at."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Callable[[str], Path]:
    """A script's small run, trained once; who changes anything in it takes a copy."""
    from tests.test_promises import Script

    return cache(lambda name: Script(name, tmp_path_factory.mktemp(name)).train())
