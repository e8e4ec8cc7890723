"""Speed: what a comparison asks of ours and of others, and what it refuses before it measures anything."""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

import pytest

from benchmark.__main__ import main
from benchmark.speed import compare
from benchmark.speed.cases import CASES, in_our_words, in_their_words
from benchmark.speed.compare import without_bf16
from benchmark.speed.rl_zoo import SETTINGS as RL_ZOO


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ppo_discret"], "no speed comparison for 'ppo_discret'"),
        (["ppo_discrete", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["ppo_discrete", "--rollouts", "2"], "--rollouts 2: must be at least 3"),
        (["ppo_discrete", "--env-id", "CartPol-v1"], "CartPol-v1: Environment `CartPol` doesn't exist"),
        (["ppo_discrete", "--json", "/nowhere/speed.json"], "--json /nowhere/speed.json: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr("benchmark.speed.compare.measure", None)
    with pytest.raises(SystemExit) as stop:
        main(["speed", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


def ways_of_ours() -> list:
    return [
        pytest.param(script, variant, title, id=f"{script}, {variant}, {title}")
        for script, case in CASES.items()
        for variant, title in itertools.product(case.ours, case.settings)
    ]


@pytest.mark.parametrize(("script", "variant", "title"), ways_of_ours())
def test_a_script_understands_its_case(script, variant, title):
    case = CASES[script]
    settings = case.settings[title] | {"rollouts": 5}
    args = importlib.import_module(script).parse(in_our_words(case, settings | case.ours[variant]))
    assert args.total_timesteps == settings["num_envs"] * settings["num_steps"] * 5
    for name, value in (settings | case.ours[variant]).items():
        if name not in ("rollouts", "sizes") and not (name == "num_steps" and case.learns_off_policy):
            assert getattr(args, name) == value
    for name in case.networks if "sizes" in settings else ():
        assert list(getattr(args, name)) == settings["sizes"]


@pytest.mark.parametrize("script", CASES)
def test_ours_computes_where_the_others_do(script, monkeypatch):
    case, seen = CASES[script], []
    monkeypatch.setattr(compare, "run_alone", lambda words: seen.append(words) or sys.exit())
    settings = next(iter(case.settings.values())) | {"env_id": case.env_ids[0], "rollouts": 5}
    with pytest.raises(SystemExit):
        compare.measure(script, compare.Contender("ours", case.ways[0], 1), settings)
    assert importlib.import_module(script).parse(seen[0][2:]).device == "cpu"


@pytest.mark.parametrize("settings", [*RL_ZOO, *CASES], ids=str)
def test_others_understand_their_settings(settings):
    stable = pytest.importorskip("stable_baselines3")
    if settings in CASES:
        case = CASES[settings]
        algorithm, given = case.algorithm, [in_their_words(case, each) for each in case.settings.values()]
    else:
        (algorithm, _), given = settings, [RL_ZOO[settings]]
    understood = inspect.signature(getattr(stable, algorithm)).parameters.keys() | {"normalize", "noise_std", "n_envs"}
    for names in given:
        assert names.keys() <= understood


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_left_out_where_it_is_imitated(monkeypatch, has):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": has})
    assert ("ours, bf16" in without_bf16(CASES["sac_continuous"]).ours) is has
    assert "ours" in without_bf16(CASES["sac_continuous"]).ours


def test_others_get_the_settings_that_ours_have():
    case = CASES["dqn"]
    given = in_their_words(case, case.settings["8 environments"])
    names = ("n_envs", "gradient_steps", "train_freq", "batch_size")
    assert [given[name] for name in names] == [8, 8, 1, 64]  # an update for every step of every environment
    case = CASES["ppo_discrete"]
    common = {"n_envs": 8, "n_steps": 256, "n_epochs": 10, "policy_kwargs": {"net_arch": [64, 64]}, "normalize": True}
    assert in_their_words(case, case.settings["8 x 256, minibatch 64"]) == common | {"batch_size": 64}


def test_the_rate_is_of_the_steps_after_the_first_rows(monkeypatch):
    def run_alone(words):
        run = Path(words[words.index("--runs-dir") + 1]) / "run"
        run.mkdir()
        (run / "config.yaml").write_text("env_id: A")
        (run / "meta.json").write_text('{"script": "x"}')
        (run / "run.log").write_text("x  compiled in 2.5 s\n")
        rows = ["step,wall_time,sps,seconds_updating", "10,50,1,9", "20,60,1,9", "30,62,1,1", "40,64,1,2"]
        (run / "progress.csv").write_text("\n".join([*rows, ""]))

    monkeypatch.setattr(compare, "run_alone", run_alone)
    settings = next(iter(CASES["ppo_discrete"].settings.values())) | {"env_id": "A", "rollouts": 4}
    found = compare.measure("ppo_discrete", compare.Contender("ours", "sync", 1), settings)
    assert found == (5.0, {"updating": 0.75, "compiling": 2.5})


def test_rates_are_medians_and_ratios_are_ours_over_theirs(capsys):
    ours, theirs = compare.Contender("ours", "sync", 1), compare.Contender("sb3", "sync", 2)
    rates = {"ours": [300.0, 100.0, 900.0], "sb3": [100.0, 50.0, 100.0]}
    compare.tell_rates(CASES["ppo_beta"], {"ours": ours, "sb3": theirs}, rates)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "ours (sync, 1 thread) 300 steps/s (100 to 900)",
        "sb3 (sync, 2 threads) 100 steps/s (50 to 100) ours is 3.00 x",
    ]


def test_everyone_takes_the_way_that_is_fastest_for_them(monkeypatch):
    paces = {"sync": 5.0, "envpool": 7.0}
    monkeypatch.setattr(compare, "measure", lambda script, c, settings: (paces[c.vec] / c.threads, {}))
    monkeypatch.setattr(compare, "find_spec", lambda name: True)
    found = compare.find_fastest("ppo_discrete", CASES["ppo_beta"], {})
    assert found["ours"] == compare.Contender("ours", "envpool", 1) and found["sb3"].vec == "sync"
