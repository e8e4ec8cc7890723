"""A study from end to end, stopped on the way."""

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmark.__main__ import main
from benchmark.evaluate import film
from benchmark.runs import Run, find_runs
from benchmark.study import keep_checkpoint

ROOT = Path(__file__).parent.parent
SETTINGS = ["--total-timesteps", "1024", "--num-envs", "4", "--num-steps", "16", "--num-minibatches", "4"]
SETTINGS += ["--num-evals", "4", "--eval-episodes", "3", "--no-compile"]


def test_a_study_from_the_random_policy_to_the_last(tmp_path, monkeypatch, capsys):
    command = ["run", "ppo_continuous", "Pendulum-v1", "-o", str(tmp_path / "out"), "--", *SETTINGS]
    filmed = []

    def look(player: object, seed: int, *rest: object) -> float:
        filmed.append(seed)
        return film(player, seed, *rest)

    monkeypatch.setattr("benchmark.study.film", look)
    main(command)
    (run,) = find_runs([tmp_path / "out"])
    films = []
    for share, step in (("025", 256), ("050", 512), ("100", 1024)):
        folder = tmp_path / "out" / "checkpoints" / share
        assert (folder / "policy.pt").read_bytes() == run.policies()[step].read_bytes()
        with (folder / "evaluations.csv").open() as file:
            played = list(csv.DictReader(file))
        returns = [float(row["return"]) for row in played]
        assert filmed[len(films)] == int(played[np.argmax(returns)]["seed"])
        table = run.table("evaluations")
        assert returns == table["return"][table["step"] == step].tolist() and len(returns) == 3
        films.append(f"{int(share)}% of the run: an episode of return {max(returns):,.1f}, the best of 3<")
        for name in ("episode.mp4", "episode.gif"):
            assert (folder / name).stat().st_size > 2000
    html = (tmp_path / "out" / "report" / "index.html").read_text()
    assert html.count("data:video/mp4") == 3 and "random policy" in html
    assert all(film in html for film in films) and "<h1>ppo_continuous on Pendulum-v1, 20" in html
    assert "100%  step      1,024" in capsys.readouterr().out

    made = (tmp_path / "out" / "checkpoints" / "100" / "episode.gif").stat().st_mtime_ns
    main(command)  # nothing is trained or filmed again
    assert (tmp_path / "out" / "checkpoints" / "100" / "episode.gif").stat().st_mtime_ns == made
    assert len(find_runs([tmp_path / "out"])) == 1
    (tmp_path / "out" / "checkpoints" / "100" / "policy.pt").write_bytes(b"of another study")
    main(command)
    assert (tmp_path / "out" / "checkpoints" / "100" / "episode.gif").stat().st_mtime_ns > made


def test_a_failing_study_says_so(tmp_path, capsys):
    words = ["run", "ppo_continuous", "tests.envs:Mirror-v0", "--no-video", "-o", str(tmp_path / "out"), "--"]
    words += SETTINGS
    with pytest.raises(SystemExit) as stop:
        main([*words, "--env-kwargs", '{"breaks": 40}'])
    told = capsys.readouterr().out
    assert stop.value.code == 1 and not (tmp_path / "out" / "report").exists()
    assert "1 of 1 failed; the same command tries again:" in told and "retry-failed" not in told


def test_a_script_that_keeps_no_policies_cannot_be_studied(tmp_path, capsys):
    (tmp_path / "evaluations.csv").write_text("step,episode,seed,return,length\n10,0,1,2,3\n")
    with pytest.raises(SystemExit) as stop:
        keep_checkpoint(Run(tmp_path), 10, tmp_path / "out", filmed=False)
    assert stop.value.code == 2 and "lacks the policy of its evaluation at step 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Pendulum-v1", "--threads", "0"], "--threads 0: must be at least 1"),
        (["Pendulum-v1", "--seed", "-1"], "--seed -1: must be between 0 and 2147483647"),
        (["tests.envs:Mirror-v0"], "Mirror-v0: cannot be filmed (NotImplementedError"),
        (["Pendulu-v1"], "Pendulu-v1: Environment `Pendulu` doesn't exist. Did you mean: `Pendulum`?"),
        (["Pendulum-v1", "--", "--gama", "1"], "--gama: ppo_continuous has no such argument; did you mean --gamma?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["run", "ppo_continuous", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and told in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list(tmp_path.iterdir())
