"""The policies of the zoo are what they say, and a row of the results can be run again."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("matplotlib")

import ppo_continuous as ppo
from benchmark.__main__ import main
from benchmark.evaluate import find_policy, load
from benchmark.reproduce import SOURCES, Row, all_rows, compared, find_row
from benchmark.runs import Run, find_runs
from benchmark.suites import Suite
from benchmark.zoo import median_run

ROOT = Path(__file__).parent.parent
ENTRIES = find_runs([ROOT / "zoo"])
EPISODES = 2


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> list[dict[str, str]]:
    """What all entries earn where numpy multiplies with its kernels for Haswell, as for those that they were made with.

    Kernels for other processors round otherwise, but each with AVX2 can run these.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs a processor with AVX2: other kernels of numpy's round otherwise")
    out = tmp_path_factory.mktemp("out")
    words = [sys.executable, "-m", "benchmark", "evaluate", "zoo", "--episodes", str(EPISODES), "-o", str(out)]
    subprocess.run(words, cwd=ROOT, env=os.environ | {"OPENBLAS_CORETYPE": "Haswell"}, check=True, capture_output=True)
    with (out / "episodes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", ENTRIES, ids=lambda run: run.directory.name)
def test_a_policy_earns_exactly_what_is_stated(run, played):
    table = run.evaluations
    last = table["step"] == table["step"].max()
    own = [row for row in played if row["run"] == run.directory.name]
    for name in ("seed", "return", "length"):
        assert [float(row[name]) for row in own] == table[name][last][:EPISODES].tolist()
    assert table["return"][last].mean() == pytest.approx(run.meta["final_returns"][str(run.config["seed"])])


@pytest.mark.parametrize("run", ENTRIES, ids=lambda run: run.directory.name)
def test_an_entry_is_small_and_says_how_it_was_made_but_not_where(run):
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < (8e6 if run.script == "ppo_atari_cnn" else 2e6)
    for path in files:
        assert not re.search(rb"/(home|root|tmp|work|Users)/", path.read_bytes()), path
    assert "host" not in run.meta
    module, args = load(run)
    words = run.meta["command"].split()
    assert words[:2] == ["python", f"{run.script}.py"]
    made = asdict(module.parse(words[2:]))
    assert {name: value for name, value in json.loads(json.dumps(made)).items() if value != run.config[name]} == {}


def as_median(of: dict[str, float]) -> float:
    return sorted(of.values())[(len(of) - 1) // 2]


@pytest.mark.parametrize("run", ENTRIES, ids=lambda run: run.directory.name)
def test_an_entry_is_its_median_seed(run):
    finals = run.meta["final_returns"]
    assert finals[str(run.config["seed"])] == as_median(finals)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Three seeds of a run, of which the second is the median."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--env-id", "Pendulum-v1", "--no-compile", "--num-evals", "2", "--eval-episodes", "2"]
    words += ["--total-timesteps", "512", "--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4"]
    first = ppo.train(ppo.parse([*words, "--actor-sizes", "8", "--runs-dir", str(runs / "first")]))
    for seed, more in ((2, 5.0), (3, 9.0)):
        other = runs / str(seed) / first.name
        shutil.copytree(first, other)
        text = (other / "config.yaml").read_text()
        (other / "config.yaml").write_text(text.replace("\nseed: 1\n", f"\nseed: {seed}\n"))
        result = json.loads((other / "result.json").read_text())
        result["evaluation"]["mean"] += more
        (other / "result.json").write_text(json.dumps(result))
        rows = [row.split(",") for row in (other / "evaluations.csv").read_text().splitlines()]
        last = [[*row[:3], str(float(row[3]) + more), row[4]] for row in rows[-2:]]
        (other / "evaluations.csv").write_text("".join(",".join(row) + "\n" for row in [*rows[:-2], *last]))
    return runs


def run_command(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_median_seed_is_kept_with_its_final_policy(trained, tmp_path, capsys):
    for _ in range(2):  # an entry takes the place of an earlier one
        assert run_command("zoo", trained, "-o", tmp_path / "zoo") == 0
    (entry,) = find_runs([tmp_path / "zoo"])
    (source,) = find_runs([trained / "2"])
    assert entry.directory.name == "Pendulum-v1__ppo_continuous" and entry.config["seed"] == 2
    names = ["config.yaml", "evaluations.csv", "meta.json", "policies/step-000000512.pt", "ppo_continuous.py"]
    assert sorted(str(p.relative_to(entry.directory)) for p in entry.directory.rglob("*.*")) == names
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == [entry.directory.name]
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    policies = [ppo.load_policy(path) for path in (find_policy(entry, "last"), source.policies()[512])]
    np.testing.assert_array_equal(*(policy(observations) for policy in policies))
    assert not [p for p in entry.directory.rglob("*.*") if str(tmp_path.parent).encode() in p.read_bytes()]
    assert entry.meta["command"].startswith("python ppo_continuous.py --env-id Pendulum-v1 --num-envs 4 ")
    finals = {str(run.config["seed"]): run.result["evaluation"]["mean"] for run in find_runs([trained])}
    assert entry.meta["final_returns"] == finals and finals.keys() == {"1", "2", "3"}
    two = SimpleNamespace(runs=["higher", "lower"], final=np.array([2.0, 1.0]))
    assert median_run(two) == "lower"  # of an even number
    assert "seed 2, the median of 3, final evaluation return" in capsys.readouterr().out


def test_an_entry_is_evaluated_as_the_run_was(trained, tmp_path):
    assert run_command("zoo", trained / "first", "-o", tmp_path / "zoo") == 0
    assert run_command("evaluate", tmp_path / "zoo", "--episodes", 2, "-o", tmp_path / "out") == 0
    with (tmp_path / "out" / "episodes.csv").open() as file:
        played = [float(row["return"]) for row in csv.DictReader(file)]
    (entry,) = find_runs([tmp_path / "zoo"])
    assert played == entry.evaluations["return"][-2:].tolist()


def test_what_is_no_entry_is_not_replaced(trained, tmp_path, capsys):
    other = tmp_path / "zoo" / "Pendulum-v1__ppo_continuous"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    assert run_command("zoo", trained, "-o", tmp_path / "zoo") == 2
    assert "is no entry of a zoo" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "zoo").rglob("*.*")] == ["notes.txt"]


def test_runs_of_different_settings_are_no_seeds_of_each_other(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "runs")
    (other,) = find_runs([tmp_path / "runs" / "3"])
    text = (other.directory / "config.yaml").read_text()
    (other.directory / "config.yaml").write_text(text.replace("gamma: 0.992", "gamma: 0.9"))
    assert run_command("zoo", tmp_path / "runs", "-o", tmp_path / "zoo") == 2
    told = capsys.readouterr().err
    assert "ppo_continuous on Pendulum-v1: there are runs of" in told and told.count("\n") == 1
    assert not (tmp_path / "zoo").exists()


def test_every_source_of_the_results_has_its_rows():
    rows = all_rows(SOURCES)
    sources = yaml.safe_load(SOURCES.read_text())
    for source in sources:
        suite = yaml.safe_load((ROOT / "suites" / f"{source['suite']}.yaml").read_text())
        script, *_ = suite["scripts"]
        assert any(source["suite"] in rows[script, env_id] for env_id in suite["env_ids"]), source
    every = [(script, env_id, row) for (script, env_id), own in rows.items() for row in own.values()]
    for script, env_id, row in every:
        assert row.suite.scripts == [script] and row.suite.env_ids == [env_id] and not row.suite.grid
        mean = np.mean([*row.finals.values()])
        assert math.isnan(row.low) or row.low <= mean <= row.high, (script, env_id)
    assert len(rows["grpo", "CartPole-v1"]["grpo-cartpole"].finals) == 5
    own = {"config": "configs/ppo_continuous/Ant-v4.yaml"}
    assert find_row(rows, "ppo_continuous", "Ant-v4", "ant-1m")[1].suite.args == own
    name, row = find_row(rows, "ppo_continuous", "Ant-v4", None)  # the defaults, and what they reached
    assert name == "ant-swimmer-1m" and "config" not in row.suite.args and len(row.finals) == 5


ROW = Row(Suite(["x"], ["y"], []), 10.0, 20.0, {1: 8.0, 2: 15.0, 3: 22.0})


@pytest.mark.parametrize(
    ("row", "seed", "earned", "told"),
    [
        (ROW, 7, 10.0, "inside [10.0, 20.0], the 95% interval of the mean over 3 seeds, which ended at 8.0 to 22.0"),
        (ROW, 1, 8.0, "outside [10.0, 20.0], the 95% interval of the mean over 3 seeds, which ended at 8.0 to 22.0;"),
        (ROW, 3, 20.1, "; its seed 3 at 22.0"),
        (Row(ROW.suite, math.nan, math.nan, {1: 8.0}), 1, 8.0, "the row has no interval; it ended at 8.0"),
    ],
)
def test_a_return_is_compared_with_the_rows_interval_and_seeds(row, seed, earned, told):
    assert told in compared(row, seed, earned)


def test_a_row_is_run_again_by_its_suite(tmp_path, monkeypatch, capsys):
    for folder in ("suites", "results/table"):
        (tmp_path / folder).mkdir(parents=True)
    standin = str(ROOT / "tests" / "scripts.py")
    suite = {"scripts": [standin], "env_ids": ["Nowhere-v0"], "args": {"learning_rate": 0.2}}
    (tmp_path / "suites" / "made-up.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "results" / "suites.yaml").write_text(f"[{{suite: made-up, table: table, method: {standin}}}]")
    head = "environment,method,seeds,steps,final,low,high\n"
    (tmp_path / "results" / "table" / "results.csv").write_text(f"{head}Nowhere-v0,{standin},3,100,0,-0.02,0\n")
    (tmp_path / "results" / "table" / "seeds.csv").write_text(f"a,b,c,d\nNowhere-v0,{standin},4,-0.006\n")
    monkeypatch.setattr("benchmark.reproduce.SOURCES", tmp_path / "results" / "suites.yaml")
    for _ in range(2):  # the second time it is finished
        assert run_command("reproduce", standin, "Nowhere-v0", "--seed", 4, "-o", tmp_path / "out") == 0
    (run,) = find_runs([tmp_path / "out"])
    assert run.config["learning_rate"] == 0.2 and run.config["seed"] == 4
    assert "inside [-0.0, 0.0]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["reproduce", "ppo_continuos", "Ant-v4"], "no row has this script; did you mean ppo_continuous?"),
        (["reproduce", "ppo_continuous", "HalfChetah-v4"], "has this environment; did you mean HalfCheetah-v4?"),
        (["reproduce", "ppo_discrete", "Q"], "no row of ppo_discrete has this environment; there are CartPole-v1, "),
        (["reproduce", "ppo_discrete", "CartPole-v1", "--seed", "-1"], "--seed -1: must be between 0 and 2147483647"),
        (
            ["reproduce", "ppo_continuous", "Ant-v4", "--suite", "ant"],
            "--suite ant: has no row of ppo_continuous on Ant",
        ),
        (["zoo", "nowhere"], "nowhere: no such folder"),
        (["zoo", "."], "no finished run in ."),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert run_command(*arguments) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list(tmp_path.iterdir())


def test_outside_the_repository_it_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmark.reproduce.SOURCES", tmp_path / "suites.yaml")
    assert run_command("reproduce", "ppo_discrete", "CartPole-v1") == 2
    assert "clone it" in capsys.readouterr().err


def test_the_last_policy_is_the_checkpoint_where_there_is_one(trained):
    (run,) = find_runs([trained / "first"])
    assert find_policy(run, "last") == run.last_checkpoint
    assert find_policy(Run(trained / "first" / "none"), "last") is None
