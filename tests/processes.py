"""What other processes run, in a module that they load at once."""

import contextlib
import importlib
import os
import signal


def run_in_process(name: str, words: list[str], dies_at: int | None = None) -> None:
    """Trains; is killed at its so-many-th operation on files that has to be safe."""
    operations = 0

    def deadly(operation):
        def wrapped(*arguments, **keywords):
            nonlocal operations
            operations += 1
            if operations == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **keywords)

        return wrapped

    if dies_at:
        for operation in ("fsync", "replace", "rename", "link", "unlink"):
            setattr(os, operation, deadly(getattr(os, operation)))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module = importlib.import_module(name)
        module.train(module.parse(words))
