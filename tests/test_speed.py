"""What a comparison of speeds refuses before it measures anything."""

import pytest

from benchmark.__main__ import main


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
