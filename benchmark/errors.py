import sys
from typing import NoReturn


def refuse(problem: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"benchmark: {problem}", file=sys.stderr)
    raise SystemExit(2)
