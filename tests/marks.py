import shutil
import sysconfig
from pathlib import Path

import pytest

HEADER = Path(sysconfig.get_path("include")) / "Python.h"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and HEADER.exists()), reason="torch.compile needs g++ and Python's headers"
)
