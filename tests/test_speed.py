"""Speed: what a comparison asks of ours and of others, and what it refuses before it measures anything."""

import importlib
import inspect
import itertools
import sys

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
