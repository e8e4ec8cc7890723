"""PPO for Atari: what a game shows, what is learnt from it, and that it can be restored."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ppo_atari_cnn as ppo
from ppo_atari_cnn import Args, Environments, load_policy, make_eval_env, parse, train
from tests.marks import needs_compiler

SCRIPT = Path(ppo.__file__)
SMALL = Args(
    env_id="ALE/Breakout-v5",
    eval_env_kwargs='{"max_num_frames_per_episode": 400}',
    num_envs=2,
    num_steps=32,
    total_timesteps=640,
    num_minibatches=2,
    update_epochs=1,
    num_evals=2,
    eval_episodes=2,
    checkpoint_every=128,
    threads=1,
    precision="fp32",
    compile=False,
)


@pytest.fixture
def small(tmp_path):
    return replace(SMALL, runs_dir=str(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rows(run: Path, table: str) -> list[dict]:
    with (run / f"{table}.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]


def same(a: Path, b: Path) -> bool:
    """Equal weights and rows, bit for bit; only the wall time may differ."""
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in (a, b))
    return all(torch.equal(one[name], other[name]) for name in one) and rows(a, "episodes") == rows(b, "episodes")


# ---------------------------------------------------------------------------------------------------------- games


@pytest.mark.parametrize("game", ["Pong", "Breakout", "MsPacman", "Carnival"])  # with FIRE, without it, a taller screen
def test_evaluation_shows_what_training_shows(game):
    args = Args(env_id=f"ALE/{game}-v5", num_envs=1, threads=1)
    env, envs = make_eval_env(args), Environments(args)
    seen, info = env.reset(seed=4)
    envs.reset(np.ones(1, bool))
    opening = None
    while opening != info["episode_frame_number"]:  # as many frames without action as in the other
        shown, other = envs.envs.reset()
        opening, envs.lives = other["episode_frame_number"][0], other["lives"]
    np.testing.assert_array_equal(seen, shown[0])
    random, paid = np.random.default_rng(0), []
    for action in random.integers(env.action_space.n, size=(250, 1)):
        seen, reward, terminated, truncated, _ = env.step(action[0])
        shown, rewards, *ends, _ = envs.step(action)
        assert (reward, terminated, truncated) == (rewards[0], *(end[0] for end in ends))
        if terminated:
            break
        np.testing.assert_array_equal(seen, shown[0])
        paid.append(reward)
    assert len(paid) > 100 and np.any(paid)
    assert game not in ("MsPacman", "Carnival") or max(paid) >= 10  # the score itself, not clipped


def test_a_game_goes_on_after_a_lost_life_and_nothing_is_spent_on_resets():
    envs = Environments(replace(SMALL, num_envs=3))
    frames = envs.reset(np.ones(3, bool))
    random, lost, over = np.random.default_rng(0), np.zeros(3, int), np.zeros(3, int)
    for _ in range(600):
        assert (frames[:, 3] > 0).any((1, 2)).all()
        frames, _, terminated, truncated, died = envs.step(random.integers(4, size=3))
        assert not (died & terminated).any() and not truncated.any()
        lost += died
        over += terminated
        for n in np.flatnonzero(died | terminated):
            assert (frames[n] > 0).any((1, 2)).all()  # no reset yet: all four frames are of the game that was played
        if terminated.any():
            assert (lost[terminated] == 4 * over[terminated]).all()  # five lives
            others = frames[~terminated].copy()
            first = envs.reset(terminated)
            assert first.shape == (terminated.sum(), 4, 84, 84) and not first[:, :3].any()
            frames[terminated] = first
            np.testing.assert_array_equal(frames[~terminated], others)
    assert (over >= 2).all()


def test_fire_is_pressed_after_a_lost_life_in_training_and_in_evaluation():
    """Breakout waits for it: without, an agent that never presses it would lose no second life."""
    args = replace(SMALL, num_envs=1, eval_env_kwargs="{}")
    env, envs = make_eval_env(args), Environments(args)
    env.reset(seed=1)
    envs.reset(np.ones(1, bool))
    lives, lost = [], 0
    for _ in range(300):
        *_, terminated, _, info = env.step(0)
        lives.append(info["lives"])
        if terminated:
            break
    for _ in range(300):
        *_, over, _, died = envs.step(np.zeros(1, int))
        lost += died[0]
        if over[0]:
            break
    assert terminated and set(lives) == {0, 1, 2, 3, 4, 5} and over[0] and lost == 4
    assert [int(pressed[0]) for pressed in envs.actions].count(1) == 4


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_sticky_actions_are_a_setting(probability):
    """At probability 1 every frame repeats the doing nothing of the start, so that actions make no difference."""
    args = replace(SMALL, num_envs=1, repeat_action_probability=probability)
    shown = {"evaluation": [], "training": []}
    for action in (2, 3):  # right, left
        env, envs = make_eval_env(args), Environments(args)
        env.reset(seed=1)
        envs.reset(np.ones(1, bool))
        for _ in range(10):
            frames = {"evaluation": env.step(action)[0], "training": envs.step(np.array([action]))[0][0]}
        for name in shown:
            shown[name].append(frames[name])
    for right, left in shown.values():
        assert np.array_equal(right, left) == (probability == 1)


def test_a_time_limit_cuts_a_game():
    args = replace(SMALL, env_kwargs='{"max_num_frames_per_episode": 40}', eval_env_kwargs="{}", num_envs=1)
    envs = Environments(args)
    for _ in range(2):
        envs.reset(np.ones(1, bool))
        ends = [
            (terminated[0], cut[0]) for _, _, terminated, cut, _ in (envs.step(np.zeros(1, int)) for _ in range(10))
        ]
        assert ends == [(False, False)] * 9 + [(False, True)]


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_games_are_restored_exactly(monkeypatch, probability):
    monkeypatch.setattr(Environments, "seed_lasts", 200)  # so that some games begin with a seed and some without
    args = replace(SMALL, num_envs=3, repeat_action_probability=probability)
    envs, random = Environments(args), np.random.default_rng(0)
    observations, drawn, over = envs.reset(np.ones(3, bool)), [], 0

    def play(envs, steps):
        nonlocal observations, over
        for _ in range(steps):
            observations, _, terminated, truncated, _ = envs.step(random.integers(4, size=3))
            if (ended := terminated | truncated).any():
                observations[ended] = envs.reset(ended)
                over += ended.sum()
                drawn.append(envs.seeds.tolist())
        return observations.copy()

    at = play(envs, 520)
    assert over >= 5 and len({str(seeds) for seeds in drawn}) < len(drawn)
    state, actions, lives = envs.state(), random.bit_generator.state, envs.lives
    assert len(state["actions"]) > max(state["began"]) > 0
    after = play(envs, 80)

    resumed = Environments(args)
    resumed.reset(np.ones(3, bool))
    assert resumed.restore(state, at)
    np.testing.assert_array_equal(resumed.lives, lives)
    observations, random.bit_generator.state = at.copy(), actions
    np.testing.assert_array_equal(play(resumed, 80), after)
    assert not resumed.restore(state | {"actions": 3 - state["actions"]}, at)
    observations = resumed.reset(np.ones(3, bool))  # other games follow, which can be restored again
    at = play(resumed, 20)
    assert Environments(args).restore(resumed.state(), at)


def test_envpool_plays_the_same_games_and_says_what_it_cannot_restore(small, capsys, monkeypatch):
    envpool = pytest.importorskip("envpool")
    seeds, make = [], envpool.make
    monkeypatch.setattr(envpool, "make", lambda *a, seed, **kw: seeds.append(seed) or make(*a, seed=seed, **kw))
    args = replace(small, vec="envpool", num_evals=0)
    envs, random, lost = Environments(replace(args, num_envs=3)), np.random.default_rng(0), 0
    assert envs.reset(np.ones(3, bool)).shape == (3, 4, 84, 84)
    for _ in range(300):
        _, rewards, terminated, truncated, died = envs.step(random.integers(4, size=3))
        lost += died.sum()
        assert not (died & terminated).any()
        if (over := terminated | truncated).any():
            envs.reset(over)
            assert (envs.lives[over] == 5).all()
    assert lost > 10

    run = train(replace(args, total_timesteps=128, lr_schedule="constant"))
    (run / "checkpoint.pt").rename(run / "kept.pt")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 128", "steps: 256"))
    (run / "kept.pt").rename(run / "checkpoint.pt")
    train(parse(["--resume", str(run)]))
    assert "--vec envpool cannot restore the running games" in capsys.readouterr().out
    assert len(set(seeds)) == 2  # those that begin anew are not the run's first games again
    assert rows(run, "progress")[-1]["step"] == "256"


# ------------------------------------------------------------------------------------------------------ mathematics


def random_batch(agent: ppo.Agent, size: int = 32) -> ppo.Batch:
    frames = torch.randint(256, (size, 84, 84, 4), dtype=torch.uint8).movedim(-1, 1)
    logits, values = agent(frames)
    actions = torch.randint(logits.shape[1], (size,))
    logprobs = ppo.log_probs(logits, actions) + 0.2 * torch.randn(size)
    return ppo.Batch(frames, actions, logprobs, values + 0.3 * torch.randn(size), torch.randn(size), torch.randn(size))


@pytest.fixture
def agent():
    torch.manual_seed(0)
    agent = ppo.Agent(6).requires_grad_(False)
    agent.actor.weight *= 50  # a policy that prefers something
    return agent


def test_the_network_is_the_nature_network(agent):
    convolutions = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1)]
    nature = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(list(agent.parameters())[:-2]), nature.parameters())
    nature[7].weight = nn.Parameter(agent.hidden.weight.view(512, 7, 7, 64).movedim(-1, 1).flatten(1))
    batch = random_batch(agent)
    with torch.no_grad():
        expected = nature(batch.observations.float().div(255).contiguous())
    torch.testing.assert_close(agent(batch.observations)[0], expected, atol=1e-5, rtol=1e-4)
    low = torch.func.functional_call(agent, ppo.lowered(dict(agent.named_parameters()), "bf16"), batch.observations)
    torch.testing.assert_close(low[0], expected, atol=0.1, rtol=0.05)
    assert low[0].dtype == low[1].dtype == torch.float32 and not torch.equal(low[0], expected)


def test_loss_equals_the_papers(agent):
    args, batch = Args(clip_vloss=True, precision="fp32"), random_batch(agent)
    loss, (policy_loss, value_loss, entropy, kl, clipped) = ppo.ppo_loss(
        dict(agent.named_parameters()), agent, args, batch
    )
    logits, values = agent(batch.observations)
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(batch.actions) - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.1), batch.values + 0.1)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * errors.max(0).values.mean())
    torch.testing.assert_close(entropy, policy.entropy().mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(clipped, ((ratio - 1).abs() > 0.1).float().mean())
    torch.testing.assert_close(loss, policy_loss + 0.5 * value_loss - 0.01 * entropy)


def test_an_update_is_that_of_torchs_adam(agent):
    args, batch = Args(precision="fp32"), random_batch(agent)
    parameters = [parameter.clone().requires_grad_() for parameter in agent.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    learner = ppo.Learner.of(agent)
    learner.learning_rate.fill_(1e-3)
    for _ in range(3):
        names = (name for name, _ in agent.named_parameters())
        loss, _ = ppo.ppo_loss(dict(zip(names, parameters, strict=True)), agent, args, batch)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        adam.step()
        ppo.update(agent, args, learner, batch, torch.arange(32))
    expected = nn.utils.parameters_to_vector(parameters).detach()
    assert (learner.theta - expected).abs().mean() < 1e-6  # Adam blows up what little differs in the smallest gradients


@needs_compiler
def test_the_compiled_update_is_the_update(agent):
    args, batch, said = Args(num_minibatches=2, precision="fp32"), random_batch(agent), []
    learner = ppo.Learner.of(agent)
    learner.learning_rate.fill_(1e-4)
    fast = ppo.compile_update(args, agent, batch, said.append)
    assert "compiled in" in said[0]
    indices, start = torch.randperm(32)[:16], [tensor.clone() for tensor in learner]
    measures = fast(agent, args, learner, batch, indices)
    compiled = learner.theta.clone()
    for tensor, value in zip(learner, start, strict=True):
        tensor.copy_(value)
    torch.testing.assert_close(ppo.update(agent, args, learner, batch, indices), measures, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(learner.theta, compiled, atol=2e-5, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- learning


class Bars(gym.Env):
    """A bright bar stands in one of four places; naming it pays 3, and a game has ten of them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._draw(), {}

    def step(self, action):
        reward = 3.0 * (action == self.place)
        self.t += 1
        return self._draw(), reward, self.t == 10, False, {}

    def _draw(self):
        self.place = self.np_random.integers(4)
        frames = np.zeros((4, 84, 84), np.uint8)
        frames[3, :, 21 * self.place : 21 * self.place + 21] = 255
        return frames


class Played:
    """Stands in for Environments: plays Bars, and remembers all that it showed and said."""

    def __init__(self, args: Args):
        self.games, self.random, self.steps = [Bars() for _ in range(args.num_envs)], np.random.default_rng(1), []
        self.cuts, self.losses = 0.0, 0.0
        for seed, game in enumerate(self.games):
            game.reset(seed=seed)

    def reset(self, which):
        return np.stack([game.reset()[0] for game, again in zip(self.games, which, strict=True) if again])

    def step(self, actions):
        results = zip(*(game.step(action) for game, action in zip(self.games, actions, strict=True)), strict=True)
        observations, rewards, terminated, _, _ = map(np.array, results)
        cut, lost = self.random.random((2, len(actions))) < [[self.cuts], [self.losses]]
        self.steps.append((observations.copy(), rewards, terminated, cut, lost & ~terminated))
        return observations, *self.steps[-1][1:]

    def state(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def bars(monkeypatch, small):
    monkeypatch.setattr(ppo, "Environments", Played)
    monkeypatch.setattr(ppo, "make_eval_env", lambda args, render_mode=None: Bars())
    monkeypatch.setattr(ppo, "check_environments", lambda args: None)
    return replace(small, num_envs=8, total_timesteps=2048, learning_rate=1e-3, gamma=0.0, num_minibatches=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_learns_where_the_bar_is(bars, precision):
    run = train(replace(bars, precision=precision, update_epochs=3, num_evals=1, eval_episodes=5))
    assert json.loads((run / "result.json").read_text())["evaluation"]["mean"] == 30.0  # the score, not clipped


def test_lost_lives_end_returns_and_cut_games_bootstrap(bars, monkeypatch):
    """The advantages of a rollout against the recursion over what the games showed, with clipped rewards.

    Files hold games, which lost lives do not end, and scores that are not clipped.
    """
    played, learnt = [], []

    class Cut(Played):
        def __init__(self, args):
            super().__init__(args)
            self.cuts, self.losses = 0.1, 0.1
            played.append(self)

    def update(agent, args, learner, batch, indices):
        learnt.append((agent, [column.clone() for column in batch], indices))
        return torch.zeros(6)

    monkeypatch.setattr(ppo, "Environments", Cut)
    monkeypatch.setattr(ppo, "update", update)
    N, T, gamma, lam = 8, 32, 0.9, 0.8
    run = train(replace(bars, total_timesteps=N * T, gamma=gamma, gae_lambda=lam, num_evals=0))
    agent, (frames, actions, logprobs, values, advantages, returns), _ = learnt[0]
    assert sorted(torch.cat([indices for *_, indices in learnt]).tolist()) == list(range(N * T))

    logits, expected_values = agent(frames)
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(logprobs, ppo.log_probs(logits, actions))
    following = agent(torch.from_numpy(np.concatenate([seen for seen, *_ in played[0].steps])))[1].view(T, N)
    values, expected, carry = values.view(T, N), torch.zeros(T, N), torch.zeros(N)
    for t in reversed(range(T)):
        _, rewards, terminated, cut, lost = map(torch.from_numpy, played[0].steps[t])
        assert set(rewards.tolist()) <= {0.0, 3.0}
        delta = rewards.clamp(max=1) + gamma * following[t] * ~(terminated | lost) - values[t]
        carry = expected[t] = delta + gamma * lam * carry * ~(terminated | lost | cut)
    torch.testing.assert_close(advantages.view(T, N), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(returns, advantages + values.flatten())
    assert sum((cut & ~terminated & ~lost).sum() for _, _, terminated, cut, lost in played[0].steps) > 5

    games, scores, lengths = [], np.zeros(N), np.zeros(N, int)
    for t, (_, rewards, terminated, cut, _) in enumerate(played[0].steps, start=1):
        scores, lengths = scores + rewards, lengths + 1
        for n in np.flatnonzero(terminated | cut):
            games.append((t * N, scores[n], lengths[n]))
            scores[n], lengths[n] = 0, 0
    told = [(int(row["step"]), float(row["return"]), int(row["length"])) for row in rows(run, "episodes")]
    assert told == games and max(score for _, score, _ in games) > 3


# -------------------------------------------------------------------------------------------------------------- runs


def test_seed_decides_and_evaluation_does_not(small):
    first = train(small)
    assert same(first, train(replace(small, num_evals=0)))
    assert not same(first, train(replace(small, num_evals=0, seed=2)))
    policy, env = load_policy(first / "checkpoint.pt"), make_eval_env(small)
    for row in rows(first, "evaluations")[2:]:
        (observation, _), total, length, over = env.reset(seed=int(row["seed"])), 0.0, 0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, length, over = total + reward, length + 1, terminated or truncated
        assert (total, length) == (float(row["return"]), int(row["length"]))


def test_every_step_belongs_to_a_game(small):
    run = train(replace(small, num_evals=0))
    episodes, checkpoint = rows(run, "episodes"), torch.load(run / "checkpoint.pt", weights_only=True)
    assert len(episodes) >= 2
    assert sum(int(row["length"]) for row in episodes) + checkpoint["lengths"].sum() == 640


def test_a_killed_run_resumes_to_the_same_weights(small, tmp_path):
    args = replace(small, total_timesteps=1280, precision="bf16")
    undisturbed = train(args)
    runs, lines = tmp_path / "killed", 0
    words = [sys.executable, str(SCRIPT), "--config", str(undisturbed / "config.yaml"), "--runs-dir", str(runs)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while lines < 11 and process.poll() is None and time.monotonic() < deadline:
        lines = sum(path.read_text().count("\n") - 1 for path in runs.glob("*/progress.csv"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
    words = [sys.executable, str(SCRIPT), "--resume", str(run)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "begin anew" not in result.stdout and not result.stderr
    assert same(undisturbed, run)
    assert rows(undisturbed, "evaluations") == rows(run, "evaluations")


def test_a_film_shows_the_screen(small):
    from moviepy import VideoFileClip

    run = train(replace(small, total_timesteps=64, num_evals=1, eval_episodes=1, capture_video=True))
    (video,), (played,) = (run / "videos").iterdir(), rows(run, "evaluations")
    with VideoFileClip(str(video)) as clip:
        assert clip.size == [160, 210] and clip.fps == 15
        assert abs(clip.n_frames - int(played["length"])) <= 1
        assert clip.get_frame(1).std() > 5


MISTAKES = {
    "--env-id ALE/Pon-v5": "Pong",
    "--env-id HalfCheetah-v4": "not a game of ale-py's",
    '--env-kwargs {"wings":2}': "--env-kwargs",
    '--env-kwargs {"noop_max":2}': "--env-kwargs",
    '--env-kwargs {"max_num_frames_per_episode":"x"}': "--env-kwargs",
    '--env-kwargs {"frameskip":2}': "leave out frameskip",
    '--env-kwargs {"continuous":true}': "needs Discrete actions",
    '--eval-env-kwargs {"full_action_space":true}': "--eval-env-kwargs",
    "--repeat-action-probability 2": "between 0 and 1",
    "--num-minibatches 1000": "must divide a rollout of 8 x 128",
    "--total-timesteps 1000": "1024",
    "--precision fp16": "bf16",
    "--vec native": "envpool",
    "--vec envpool": "pip install envpool",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setattr(ppo, "find_spec", lambda name: name == "ale_py")
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        train(parse([*mistake.split(), "--runs-dir", str(runs)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not runs.exists()
    assert error.count("\n") == 1 and MISTAKES[mistake] in error


def test_without_ale_py_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(ppo, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train(Args())
    assert stop.value.code == 2 and "pip install ale-py" in capsys.readouterr().err
