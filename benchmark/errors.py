import difflib
import re
import sys
from collections.abc import Iterable
from typing import NoReturn


def refuse(problem: str) -> NoReturn:
    """A user's mistake: one line, whatever lines a library's error has, and exit status 2."""
    print(f"benchmark: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def nearest(name: str, names: Iterable[str], lead: str = "") -> str:
    """What was meant, if one of the names, with `lead` before it, is near."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {lead}{near[0]}?" if near else ""


def choices(name: str, names: Iterable[str]) -> str:
    """What was meant, or else all that there is."""
    names = list(names)
    return nearest(name, names) or f"; there are {', '.join(names)}"


def unboxed(text: str) -> list[str]:
    """What stands in tyro's box, or in a line of it: the title and each part, without the rules between them."""
    text = re.sub(r"\033\[[\d;]*m|[│╭╮╰╯]", " ", text)
    parts = (" ".join(part.split()) for part in re.split("─+|-{5,}", text))
    return [part for part in parts if part and not part.startswith("For full helptext")]
