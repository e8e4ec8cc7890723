"""Sweeps on a Ray cluster of several nodes, one of which dies."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ppo_continuous
from benchmark.runs import Run, find_runs
from tests.test_promises import load

pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent
SETTINGS = ["--env-id", "Pendulum-v1", "--total-timesteps", "8192", "--num-envs", "4", "--num-steps", "64"]
SETTINGS += ["--num-minibatches", "8", "--num-evals", "0", "--checkpoint-every", "512", "--no-compile"]
# A dead node is missed after seconds, and no processes wait for work that never comes.
QUICK = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
QUICK |= {"enable_worker_prestart": False, "prestart_worker_first_driver": False}


def last_step(run: Run) -> float:
    return next((row["step"] for row in run.last_rows("progress", 1)), 0.0)


@pytest.mark.filterwarnings("ignore")  # Ray's own, in this process
def test_the_jobs_of_a_node_that_dies_go_on_elsewhere(tmp_path):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    words = [sys.executable, "-m", "benchmark", "sweep", "--scripts", "ppo_continuous", "--env-ids", "Pendulum-v1"]
    words += ["--seeds", "2", "--executor", "ray", "--address", cluster.address, "-o", str(tmp_path / "out")]
    with subprocess.Popen([*words, "--", *SETTINGS[2:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as sweep:
        try:
            while sum(last_step(run) > 1000 for run in find_runs([tmp_path / "out"])) < 2:
                assert sweep.poll() is None, sweep.stdout.read()
                time.sleep(0.1)
            cluster.remove_node(nodes[0], allow_graceful=False)
            told = sweep.communicate(timeout=300)[0]
        finally:
            sweep.kill()
            cluster.shutdown()
    assert sweep.returncode == 0, told
    runs = find_runs([tmp_path / "out"])
    assert [run.result["steps"] for run in runs] == [8192, 8192]
    begun = [(run.directory.parent / "log.txt").read_text().count("parameters") for run in runs]  # headers
    assert sorted(begun) == [1, 2]

    moved = runs[begun.index(2)]
    alone = ppo_continuous.parse(
        [*SETTINGS, "--seed", str(moved.config["seed"]), "--runs-dir", str(tmp_path / "alone")]
    )
    one, two = (load(run / "checkpoint.pt")["agent"] for run in (moved.directory, ppo_continuous.train(alone)))
    assert all(torch.equal(one[name], two[name]) for name in one)
