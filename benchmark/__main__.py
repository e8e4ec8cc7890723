"""The harness: `python -m benchmark <command> --help` explains each command."""

import tyro

from benchmark.speed import speed

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed}, prog="python -m benchmark", description=__doc__)
