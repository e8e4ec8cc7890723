"""The ids `benchmark.envs:…`, with which results/grpo was made, of the environments in examples/lunar_landers.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # whichever folder this is run in
import examples.lunar_landers  # noqa: E402, F401  registers them
