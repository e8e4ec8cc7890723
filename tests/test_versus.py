"""Head to head: who takes part, evaluations that change nothing, honest minutes, going on where it stopped."""

import itertools
import json
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

pytest.importorskip("matplotlib")
pytest.importorskip("stable_baselines3")

from benchmark.__main__ import main
from benchmark.groups import gather
from benchmark.runs import Run, find_runs, fingerprint
from benchmark.speed import learner, race, versus
from benchmark.speed.learner import build, load, make_envs
from benchmark.speed.rl_zoo import SETTINGS

QUICK = {"n_envs": 2, "n_steps": 64, "batch_size": 32, "n_epochs": 2}


def learn(folder: Path, settings: dict = QUICK, **more) -> Run:
    args = {"total_timesteps": 256, "num_evals": 1, "eval_episodes": 2, "runs_dir": str(folder)} | more
    return Run(learner.learn(learner.Args("sb3", "PPO", "CartPole-v1", settings=json.dumps(settings), **args)))


def final_returns(run: Run) -> list[float]:
    table = run.evaluations
    return table["return"][table["step"] == table["step"].max()].tolist()


def test_another_library_leaves_what_a_script_leaves(tmp_path):
    run = learn(tmp_path, num_evals=2)
    assert find_runs([tmp_path]) == [run] and not run.damage
    assert run.evaluations["step"].tolist() == [128, 128, 256, 256]
    assert run.evaluations["seed"].tolist() == [10_000, 10_001] * 2
    assert run.progress["step"].tolist() == [128, 256]
    assert run.result["evaluation"]["mean"] == np.mean(final_returns(run))
    assert run.result["steps"] == 256 and run.version == fingerprint(versus.LEARNER)


@pytest.mark.parametrize("settings", [QUICK, QUICK | {"normalize": True}], ids=["plain", "normalised"])
def test_evaluation_changes_nothing_of_another_librarys_training(tmp_path, settings):
    once, often = (learn(tmp_path / str(n), settings, num_evals=n) for n in (1, 2))
    assert final_returns(once) == final_returns(often)


@pytest.mark.parametrize("normalises", [True, False])
def test_another_librarys_policy_is_evaluated_as_it_was_trained(tmp_path, monkeypatch, normalises):
    from stable_baselines3.common.base_class import BaseAlgorithm

    seen, predict = [], BaseAlgorithm.predict

    def look(model, observation, **keywords):
        seen.append((observation, keywords))
        return predict(model, observation, **keywords)

    monkeypatch.setattr(BaseAlgorithm, "predict", look)
    learn(tmp_path, QUICK | {"normalize": normalises})
    first, _ = gym.make("CartPole-v1").reset(seed=10_000)
    assert all(keywords["deterministic"] for _, keywords in seen)
    assert np.array_equal(seen[0][0][0], first) is not normalises


def test_another_librarys_rows_noise_and_best_are_what_was_asked_for(tmp_path):
    assert learn(tmp_path / "rows", num_evals=0, row_every=128).progress["step"].tolist() == [128, 256]
    run = learn(tmp_path / "best", num_evals=2)
    assert run.result["best"]["mean"] == max(run.means.values()) > min(run.means.values())
    model = build(load("sb3", 1), "TD3", make_envs("Pendulum-v1", 1, "sync", 1), {"noise_std": 0.1}, 1)
    assert model.action_noise._sigma.tolist() == [0.1]


def test_a_report_has_another_librarys_runs(tmp_path):
    learn(tmp_path)
    (group,) = gather([tmp_path]).groups
    assert not gather([tmp_path]).left_out and len(group.runs) == 1


def test_seeds_take_turns_and_evaluations_come_as_often_as_asked(tmp_path, monkeypatch):
    begun = []
    contestants = [versus.Contestant(name, name, Path(learner.__file__)) for name in ("a", "b")]
    monkeypatch.setattr(versus, "contestants", lambda *_: contestants)
    monkeypatch.setattr(versus, "run_sweep", lambda jobs, *_: begun.extend(jobs) or sys.exit())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["versus", "CartPole-v1", "--script", "ppo_discrete", "--seeds", "2", "--eval-every", "25000"])
    assert [job.seed for job in begun] == [1, 1, 2, 2] and len({job.directory for job in begun}) == 4
    asked = [dict(zip(job.words, job.words[1:], strict=False)) for job in begun]
    assert all(int(words["--num-evals"]) * 25_000 == int(words["--total-timesteps"]) for words in asked)


def test_minutes_leave_evaluation_out(tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.5)
        return play(*args, **kwargs)

    play = learner.play
    monkeypatch.setattr(learner, "play", slow)
    started = time.perf_counter()
    run = learn(tmp_path, num_evals=2)
    assert run.progress["wall_time"][-1] < time.perf_counter() - started - 1.0


def test_settings_are_read_as_rl_zoo_writes_them():
    library = load("sb3", 1)
    model = build(library, "PPO", make_envs("CartPole-v1", 8, "sync", 1), SETTINGS["PPO", "CartPole-v1"], 1)
    assert model.n_envs == 8 and model.lr_schedule(0.5) == pytest.approx(0.0005)
    assert model.clip_range(0.25) == pytest.approx(0.05) and model.get_vec_normalize_env() is None
    tuned = SETTINGS["PPO", "HalfCheetah-v4"]
    model = build(library, "PPO", make_envs("Pendulum-v1", 1, "sync", 1), tuned, 1)
    assert [layer.out_features for layer in model.policy.mlp_extractor.policy_net[::2]] == [256, 256]
    assert {type(layer).__name__ for layer in model.policy.mlp_extractor.value_net} == {"Linear", "ReLU"}
    assert model.policy.log_std.tolist() == [-2.0] and model.get_vec_normalize_env().gamma == 0.98


def entered(script: str, env_id: str) -> list[str]:
    return [contestant.label for contestant in versus.contestants(script, env_id)]


def test_who_takes_part(monkeypatch, capsys):
    monkeypatch.setattr(versus, "find_spec", lambda package: True)
    assert entered("ppo_continuous", "HalfCheetah-v4") == [
        "SoloRL",
        "Stable-Baselines3, rl-zoo's settings",
        "Stable-Baselines3, defaults",
        "SBX, rl-zoo's settings",
        "CleanRL's settings in SoloRL",
    ]
    own, *others = entered("sac_continuous", "HalfCheetah-v4")
    assert others == ["Stable-Baselines3, rl-zoo's settings", "SBX, rl-zoo's settings"]
    assert not capsys.readouterr().out
    assert entered("ppo_discrete", "Acrobot-v1") == ["SoloRL", "Stable-Baselines3, defaults", "SBX, defaults"]
    assert "left out: rl-zoo's settings; of PPO on Acrobot-v1 none are known" in capsys.readouterr().out


def test_ours_computes_where_the_others_do():
    own = [
        each for each in versus.contestants("ppo_continuous", "HalfCheetah-v4") if each.script.stem == "ppo_continuous"
    ]
    assert len(own) == 2 and all(each.words[:2] == ("--device", "cpu") for each in own)


def test_what_is_not_installed_is_left_out_in_words(monkeypatch, capsys):
    monkeypatch.setattr(versus, "find_spec", lambda package: package != "sbx")
    assert not [label for label in entered("ppo_discrete", "CartPole-v1") if label.startswith("SBX")]
    assert capsys.readouterr().out == "left out: SBX, which is not installed; pip install -e '.[peers]'\n"


def made_up(folder: Path, seed: int, last: float, compiled: str = "") -> Run:
    """Ten evaluations that rise to `last`, 60 s apart, each of which took 20 of them."""
    run = folder / f"{last}__{seed}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"env_id": "A-v0", "seed": seed}))
    (run / "meta.json").write_text(json.dumps({"script": "x"}))
    (run / "run.log").write_text(compiled)
    steps = range(10, 101, 10)
    rows = [f"{step},0,10000,{last * step / 100},5" for step in steps]
    (run / "evaluations.csv").write_text("\n".join(["step,episode,seed,return,length", *rows, ""]))
    rows = [f"{step},{step * 6},1,{20 if step > 10 else 0}" for step in steps]
    (run / "progress.csv").write_text("\n".join(["step,wall_time,sps,seconds_evaluating", *rows, ""]))
    result = {"evaluation": {"mean": last}, "best": {"mean": last}, "training_return": last, "wall_time": 600}
    (run / "result.json").write_text(json.dumps(result))
    return Run(run)


def test_the_table_counts_compiling_and_not_evaluating(tmp_path):
    found = {
        "quick": [
            made_up(tmp_path, seed, 100.0 + seed, "x  compiled in 60.0 s\nx  compiled in 60.0 s\n") for seed in (1, 2)
        ],
        "slow": [made_up(tmp_path, seed, 50.0 + seed) for seed in (1, 2, 3)],
        "absent": [],
    }
    (tmp_path / "out").mkdir()
    race.tell(found, "A-v0", (50, 1000), tmp_path / "out")
    table, seeds = race.standings([race.Runner(name, "A-v0", runs) for name, runs in found.items() if runs], (50, 1000))
    assert table.header == ["contestant", "seeds", "steps", "minutes to 50", "minutes to 1,000", "minutes", "return"]
    quick, slow = table.rows
    # 50 is reached at the fifth evaluation, before which four took 20 s each; compiling took two minutes.
    assert quick[:6] == ["quick", 2, 100, pytest.approx((300 - 80 + 120) / 60), np.inf, pytest.approx(9.0)]
    assert np.isnan(quick[6].low) and quick[6].middle == 101.5  # two seeds have no interval
    assert slow[5] == pytest.approx((600 - 180) / 60)
    assert seeds.rows[1] == ["quick", 2, *quick[3:6], 102.0]
    assert race.standings([race.Runner("slow", "A-v0", found["slow"])], (52,))[0].rows[0][3] == 7.0  # the median's
    assert 51 <= slow[6].low < 52 == slow[6].middle < slow[6].high <= 53
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "versus.png",
        "versus.svg",
        "versus.md",
        "seeds.csv",
    }


@pytest.mark.parametrize("ends", [(500, 500, 499, 500, 20), (0, 1, 500, 2, 1), (7739, 5950, 2163, 5464, 2717)])
def test_names_stand_at_the_ends_of_their_lines_and_apart(tmp_path, ends):
    names = ["SoloRL", "Stable-Baselines3, rl-zoo's settings", "c", "d", "e"]
    runners = [
        race.Runner(name, "A-v0", [made_up(tmp_path / name, seed, float(end)) for seed in (1, 2)])
        for name, end in zip(names, ends, strict=True)
    ]
    figure = race.race(runners, race.figures.colours(names), "A-v0")
    figure.draw_without_rendering()
    named = figure.axes[1].texts
    assert [text.get_text() for text in named] == sorted(names, key=lambda name: -ends[names.index(name)])
    boxes = [text.get_window_extent() for text in named]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))
    low, high = figure.axes[1].bbox.intervaly
    assert all(low - 8 < box.y0 and box.y1 < high + 8 and box.x1 < figure.bbox.x1 for box in boxes)
    assert named[0].get_position()[1] == max(ends)


STAND_IN = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if words["--seed"] == "2" and not pathlib.Path("second").exists():
    raise SystemExit("not yet")
with open("made", "a") as made:
    made.write(words["--seed"])
run = pathlib.Path(words["--runs-dir"]) / "run"
run.mkdir(parents=True)
(run / "stand_in.py").write_text(pathlib.Path(__file__).read_text())
(run / "config.yaml").write_text(f"{{env_id: A-v0, seed: {words['--seed']}, threads: 1, total_timesteps: 10}}")
(run / "meta.json").write_text('{"script": "stand_in"}')
(run / "evaluations.csv").write_text("step,episode,seed,return,length\\n10,0,10000,7,5\\n")
(run / "progress.csv").write_text("step,wall_time,sps\\n10,60,1\\n")
result = {"evaluation": {"mean": 7}, "best": {"mean": 7}, "training_return": 7, "wall_time": 60}
(run / "result.json").write_text(json.dumps(result))
"""


def test_it_goes_on_and_tells_what_is_finished(tmp_path, monkeypatch, capsys):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    stand_in = versus.Contestant("ours", "SoloRL", tmp_path / "stand_in.py")
    monkeypatch.setattr(versus, "contestants", lambda *_: [stand_in])
    monkeypatch.chdir(tmp_path)
    command = ["versus", "CartPole-v1", "--script", "ppo_discrete", "--seeds", "2", "-o", "out"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1 and "not yet" in capsys.readouterr().out
    assert "| SoloRL | 1 | 10 |" in (tmp_path / "out" / "versus.md").read_text()
    (tmp_path / "second").touch()
    main(command)
    assert "| SoloRL | 2 | 10 |" in (tmp_path / "out" / "versus.md").read_text()
    assert (tmp_path / "made").read_text() == "12"  # each once
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:  # minutes are measured
        main([*command, "--threads", "2"])
    assert stop.value.code == 2 and "--threads 2: " in (told := capsys.readouterr().err) and " has 1; choose" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--script", "ppo_atari_cnn"], "--script ppo_atari_cnn: has no comparison; there is one for ppo_continuous"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--eval-every", "0"], "--eval-every 0: must be at least 1"),
        (["--total-timesteps", "49_999"], "--total-timesteps 49999: must be at least --eval-every, 50000"),
        (["--env", "Hopp-v4"], "--env"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["versus", "CartPole-v1", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and told in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
