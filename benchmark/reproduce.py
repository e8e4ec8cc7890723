"""Runs a row of the results again, and compares what it ends at."""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from benchmark.errors import choices, refuse
from benchmark.jobs import ROOT
from benchmark.options import at_least, check_seed
from benchmark.study import train_one
from benchmark.suites import Suite, jobs_of, read_suite

SOURCES = ROOT / "results" / "suites.yaml"


@dataclass(frozen=True)
class Row:
    suite: Suite  # of this row alone, without seeds
    low: float  # the ends of the interval of the mean over seeds; NaN where too few were run
    high: float
    finals: dict[int, float]  # of its seeds


def read_table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def rows_of(suite: Suite, table: Path, method: str | None) -> dict[tuple[str, str], Row]:
    """The rows of a suite in a report's table, by script and environment."""
    found, seeds = {}, read_table(table / "seeds.csv")
    for env_id, name, _, _, _, low, high, *_ in read_table(table / "results.csv"):
        for script in suite.scripts:
            if env_id in suite.env_ids and name == (method or script):
                finals = {int(seed): float(final) for e, m, seed, final, *_ in seeds if (e, m) == (env_id, name)}
                own = replace(suite, scripts=[script], env_ids=[env_id], seeds=[], grid={})
                found[script, env_id] = Row(own, float(low), float(high), finals)
    return found


def all_rows(sources: Path) -> dict[tuple[str, str], dict[str, Row]]:
    """By script and environment, and then by suite: some have a row by the defaults and one by their own settings."""
    rows: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for source in yaml.safe_load(sources.read_text()):
        suite = read_suite(sources.parent.parent / "suites" / f"{source['suite']}.yaml")
        for key, row in rows_of(suite, sources.parent / source["table"], source.get("method")).items():
            rows[key][source["suite"]] = row
    return rows


def find_row(rows: dict[tuple[str, str], dict[str, Row]], script: str, env_id: str, suite: str | None) -> tuple:
    """The suite's name, and its row."""
    scripts = sorted({script for script, _ in rows})
    if script not in scripts:
        refuse(f"{script}: no row has this script{choices(script, scripts)}")
    ids = [other for one, other in rows if one == script]
    if env_id not in ids:
        refuse(f"{env_id}: no row of {script} has this environment{choices(env_id, ids)}")
    found = rows[script, env_id]
    suite = suite or next(iter(found))
    if suite not in found:
        refuse(f"--suite {suite}: has no row of {script} on {env_id}{choices(suite, found)}")
    return suite, found[suite]


def compared(row: Row, seed: int, earned: float) -> str:
    """Where the return of a seed lies beside the row's."""
    lowest, highest, number = min(row.finals.values()), max(row.finals.values()), len(row.finals)
    reached = f"{lowest:,.1f} to {highest:,.1f}" if number > 1 else f"{lowest:,.1f}"
    own = f"; its seed {seed} at {row.finals[seed]:,.1f}" if number > 1 and seed in row.finals else ""
    if math.isnan(row.low):
        return f"the row has no interval; it ended at {reached}{own}"
    where = "inside" if row.low <= earned <= row.high else "outside"
    interval = f"[{row.low:,.1f}, {row.high:,.1f}], the 95% interval of the mean over {number} seeds"
    return f"{where} {interval}, which ended at {reached}{own}"


def reproduce(
    script: Annotated[str, tyro.conf.Positional],
    env_id: Annotated[str, tyro.conf.Positional],
    /,
    suite: str | None = None,
    seed: int = 1,
    threads: int = 1,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("sweeps/reproduced"),
) -> None:
    """Train what stands in a row of the results again, for one seed, and say whether it ends inside its interval.

    The interval is that of the mean over the row's seeds, so that single seeds lie outside now and then; the range of
    the row's seeds stands beside it. Started again, it goes on where it was stopped.

        python -m benchmark reproduce ppo_discrete CartPole-v1 --seed 6

    Args:
        script: name of one of ours
        env_id: a Gymnasium id, as the results name it
        suite: of several rows the one of this suite; by default the first that results/suites.yaml names
        seed: the seed
        threads: torch threads of the run
        output: a folder for the run
    """
    at_least(1, threads=threads)
    check_seed(seed)
    if not SOURCES.is_file():
        refuse(f"reproduce needs the repository's results and suites, and {SOURCES} is not there; clone it")
    name, row = find_row(all_rows(SOURCES), script, env_id, suite)
    print(f"the row of suites/{name}.yaml")
    args = {name: str(ROOT / value) if name == "config" else value for name, value in row.suite.args.items()}
    (job,) = jobs_of(replace(row.suite, seeds=[seed], args=args), output.resolve(), threads)
    trained = train_one(job, output)
    evaluation = trained.result["evaluation"]
    print(f"{script} on {env_id}, seed {seed}: final evaluation return {evaluation['mean']:,.1f}")
    print(compared(row, seed, evaluation["mean"]))
