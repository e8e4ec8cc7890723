"""The harness: `python -m benchmark <command> --help` explains each command."""

import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial, wraps
from textwrap import fill

import tyro

from benchmark.errors import refuse, unboxed
from benchmark.evaluate import evaluate
from benchmark.random_policy import random
from benchmark.report import report
from benchmark.reproduce import reproduce
from benchmark.speed.compare import speed
from benchmark.speed.versus import versus
from benchmark.study import study
from benchmark.sweep import sweep
from benchmark.tune import tune
from benchmark.zoo import zoo

COMMANDS = {
    "run": study,
    "sweep": sweep,
    "tune": tune,
    "evaluate": evaluate,
    "report": report,
    "random": random,
    "zoo": zoo,
    "reproduce": reproduce,
    "speed": speed,
    "versus": versus,
}
SHORT = tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName
WITH_WORDS = (study, sweep, tune)  # what stands after -- goes to the scripts that these run


def later(function: Callable, brief: bool = False) -> Callable:
    @wraps(function)
    def chosen(*args, **kwargs) -> Callable:
        return partial(function, *args, **kwargs)

    if brief:
        chosen.__doc__ = function.__doc__.split("\n")[0]
    return chosen


def wrapped(text: str) -> str:
    """Paragraphs, which tyro leaves in one line each, are wrapped; the boxes below them are so already."""
    width = min(80, shutil.get_terminal_size().columns)
    lines = [fill(line, width) if line[:1].isalpha() else line for line in text.rstrip().splitlines()]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def main(arguments: list[str]) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, words = arguments[:at], tuple(arguments[at + 1 :])
    if words and not words[0].startswith("--"):
        refuse(f"-- {words[0]}: must be an argument of the script, such as --gamma 0.98")
    brief = not {*arguments[:1]} & {*COMMANDS}
    commands = {name: later(function, brief) for name, function in COMMANDS.items()}
    told, printed = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding), io.StringIO()
    try:
        with redirect_stdout(told), redirect_stderr(printed):
            chosen = tyro.extras.subcommand_cli_from_dict(
                commands, args=arguments, prog="python -m benchmark", description=__doc__, config=SHORT
            )
    except SystemExit as stop:
        if not stop.code:
            told.seek(0)
            print(wrapped(told.read()) if {"-h", "--help"} & {*arguments} else told.read())
            raise
        _, *parts = unboxed(printed.getvalue())
        refuse("; ".join(parts))
    if chosen.func in WITH_WORDS:
        chosen(words=words)
    elif words:
        named = [name for name, function in COMMANDS.items() if function in WITH_WORDS]
        refuse(f"--: {chosen.func.__name__} runs no script; {', '.join(named)} do")
    else:
        chosen()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no unfinished file is left
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest as it ends
        sys.exit(1)
