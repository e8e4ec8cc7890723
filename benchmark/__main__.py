"""The harness: `python -m benchmark <command> --help` explains each command."""

import tyro

from benchmark.returns import returns
from benchmark.speed import speed

if __name__ == "__main__":
    commands = {"returns": returns, "speed": speed}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m benchmark", description=__doc__)
