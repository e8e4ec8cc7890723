"""The LunarLanders of `examples/lunar_landers.py`."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d.lunar_lander import heuristic
from gymnasium.utils.env_checker import check_env

import examples.lunar_landers  # noqa: F401  registers them

ROOT = Path(__file__).parent.parent
MODES = ["terminal", "delayed", "graded"]


@pytest.mark.parametrize("continuous", [False, True])
def test_they_are_what_gymnasium_expects(continuous):
    check_env(gym.make("DenseLunarLander-v0", continuous=continuous).unwrapped, skip_render_check=True)
    for mode in MODES:
        env = gym.make("SparseLunarLander-v0", mode=mode, continuous=continuous)
        check_env(env.unwrapped, skip_render_check=True)


def test_their_older_ids_are_the_same_from_any_folder(tmp_path):
    code = "import gymnasium as gym; print(gym.make('benchmark.envs:SparseLunarLander-v0').unwrapped.mode)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout == "delayed\n", told.stderr


def test_starts_differ_in_place_and_angle_and_follow_from_the_seed():
    env = gym.make("DenseLunarLander-v0")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(30)])
    np.testing.assert_array_equal(env.reset(seed=7)[0], starts[7])
    x, y, angle = starts[:, 0], starts[:, 1], starts[:, 4]
    assert x.min() < -0.4 and x.max() > 0.4 and np.abs(x).max() < 0.6
    assert y.min() < 1.1 and y.max() > 1.3 and np.abs(angle).max() < 0.4 and angle.std() > 0.1
    assert not starts[:, 6:].any()


def test_moving_is_not_paid_for_and_keeps_the_lander_whole():
    env = gym.make("DenseLunarLander-v0")
    for seed in range(20):
        env.reset(seed=seed)
        lander = env.unwrapped
        for leg in lander.legs:
            assert np.hypot(*(leg.position - lander.lander.position)) < 1.0
        before = lander.prev_shaping
        _, reward, *_ = env.step(0)
        assert reward == pytest.approx(lander.prev_shaping - before) and abs(reward) < 5


def play(env: gym.Env, seed: int, act) -> tuple[list[float], dict, bool]:
    """The rewards of an episode, its last info, and whether it was cut."""
    (observation, _), rewards, over = env.reset(seed=seed), [], False
    while not over:
        observation, reward, terminated, truncated, info = env.step(act(env.unwrapped, observation))
        rewards.append(reward)
        over = terminated or truncated
    return rewards, info, truncated


def fall(env: gym.Env, observation: np.ndarray) -> int:
    return 0


def hover(env: gym.Env, observation: np.ndarray) -> int:
    """Lands on ground that is not there."""
    return heuristic(env, observation - [0, 0.8, 0, 0, 0, 0, 0, 0])


def test_delayed_pay_is_the_sum_of_the_dense():
    dense, delayed = gym.make("DenseLunarLander-v0"), gym.make("SparseLunarLander-v0")
    for seed, act in ((0, heuristic), (1, fall), (2, heuristic), (3, hover)):
        expected, _, cut = play(dense, seed, act)
        rewards, _, also_cut = play(delayed, seed, act)
        assert len(rewards) == len(expected) and cut == also_cut and not any(rewards[:-1])
        assert rewards[-1] == pytest.approx(sum(expected))


def test_an_episode_cut_earlier_is_paid_where_it_is_cut():
    expected, *_ = play(gym.make("DenseLunarLander-v0", max_episode_steps=150), 3, hover)
    rewards, _, cut = play(gym.make("SparseLunarLander-v0", limit=150), 3, hover)
    assert cut and len(rewards) == 150 and rewards[-1] == pytest.approx(sum(expected))


def test_pay_and_report_of_landings_crashes_and_flights():
    for seed, act, terminal in ((0, heuristic, 100), (1, fall, -100), (3, hover, 0)):
        rewards, info, cut = play(gym.make("SparseLunarLander-v0", mode="terminal"), seed, act)
        assert sum(rewards) == rewards[-1] == terminal and cut == (terminal == 0)
        assert info["success"] == (terminal == 100)
        graded, *_ = play(gym.make("SparseLunarLander-v0", mode="graded"), seed, act)
        assert sum(graded) == graded[-1] and (graded[-1] == 100 if info["success"] else -100 <= graded[-1] <= 0)
    _, landed, _ = play(gym.make("SparseLunarLander-v0"), 0, heuristic)
    _, crashed, _ = play(gym.make("SparseLunarLander-v0"), 1, fall)
    assert landed["landing_speed"] < 2 < 5 < crashed["landing_speed"]
    assert landed["distance"] < 0.3 and landed["legs"] == 2
    with pytest.raises(ValueError, match="terminal, delayed or graded"):
        gym.make("SparseLunarLander-v0", mode="dense")
