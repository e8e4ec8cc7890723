"""PPO for Atari: what a game shows, what is learnt from it, and that it can be restored."""

import builtins
import copy
import json
from contextlib import closing
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ppo_atari_cnn as ppo
from ppo_atari_cnn import Args, Environments, make_eval_env, train
from tests.test_promises import load, rows

SMALL = Args(
    env_id="ALE/Breakout-v5",
    eval_env_kwargs='{"max_num_frames_per_episode": 400}',
    num_envs=2,
    num_steps=32,
    total_timesteps=256,
    num_minibatches=2,
    update_epochs=1,
    num_evals=0,
    eval_episodes=2,
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


# ---------------------------------------------------------------------------------------------------------- games


@pytest.mark.parametrize("game", ["Pong", "Breakout", "MsPacman", "Carnival"])  # with FIRE, without it, a taller screen
def test_evaluation_shows_what_training_shows(game):
    args = Args(env_id=f"ALE/{game}-v5", num_envs=1, threads=1)
    with closing(make_eval_env(args)) as env, closing(Environments(args)) as envs:
        seen, info = env.reset(seed=4)
        opening = None
        while opening != info["episode_frame_number"]:  # as many frames without action as in the other
            shown, other = envs.envs.reset()
            opening, envs.lives = other["episode_frame_number"][0], other["lives"]
        np.testing.assert_array_equal(seen, shown[0])
        random, paid = np.random.default_rng(0), []
        for action in random.integers(env.action_space.n, size=(250, 1)):
            before = envs.lives[0]
            seen, reward, terminated, truncated, info = env.step(action[0])
            shown, rewards, ended, cut, finished = envs.step(action)
            assert (reward, truncated, terminated) == (rewards[0], cut[0], bool(finished))
            assert ended[0] == (terminated or info["lives"] < before)
            np.testing.assert_array_equal(seen, shown[0])
            paid.append(reward)
            assert finished == [(sum(paid), len(paid))] if finished else envs.returns[0] == sum(paid)
            if terminated:
                break
    assert len(paid) > 100 and np.any(paid)
    assert game not in ("MsPacman", "Carnival") or max(paid) >= 10  # the score itself, not clipped


def test_a_game_goes_on_after_a_lost_life_and_nothing_is_spent_on_resets():
    random, lost, over = np.random.default_rng(0), np.zeros(3, int), np.zeros(3, int)
    scores, lengths = np.zeros(3), np.zeros(3, int)
    with closing(Environments(replace(SMALL, num_envs=3))) as envs:
        for _ in range(600):
            assert (envs.observations[:, 3] > 0).any((1, 2)).all()
            frames, rewards, terminated, truncated, finished = envs.step(random.integers(4, size=3))
            assert not truncated.any()
            ended = terminated & (envs.lengths == 0)
            lost += terminated & ~ended
            over += ended
            for n in np.flatnonzero(terminated):
                assert (
                    (frames[n] > 0).any((1, 2)).all()
                )  # no reset yet: all four frames are of the game that was played
            scores, lengths = scores + rewards, lengths + 1
            assert finished == list(zip(scores[ended], lengths[ended], strict=True))
            scores[ended], lengths[ended] = 0, 0
            assert (lost[ended] == 4 * over[ended]).all()  # five lives
            assert not envs.observations[ended, :3].any()
            np.testing.assert_array_equal(envs.observations[~ended], frames[~ended])
    assert (over >= 2).all()


def test_fire_is_pressed_after_a_lost_life_in_training_and_in_evaluation():
    """Breakout waits for it: without, an agent that never presses it would lose no second life."""
    args = replace(SMALL, num_envs=1, eval_env_kwargs="{}")
    lives, lost, finished = [], 0, []
    with closing(make_eval_env(args)) as env:
        env.reset(seed=1)
        for _ in range(300):
            *_, terminated, _, info = env.step(0)
            lives.append(info["lives"])
            if terminated:
                break
    with closing(Environments(args)) as envs:
        while not finished and len(envs.actions) < 300:
            _, _, ended, _, finished = envs.step(np.zeros(1, int))
            lost += ended[0] and not finished
    assert terminated and set(lives) == {0, 1, 2, 3, 4, 5} and finished and lost == 4
    assert [int(pressed[0]) for pressed in envs.actions].count(1) == 4


def test_evaluation_waits_at_the_start_as_long_as_training_may():
    with closing(make_eval_env(Args())) as env:
        waits = [env.reset(seed=seed)[1]["episode_frame_number"] for seed in (4, 19)]  # which draw the extremes
        assert waits == [1, 29]


def test_a_new_game_waits_for_no_fire():
    with closing(Environments(SMALL)) as envs:
        envs.waits[:] = True
        envs._reset(np.array([True, False]))
        assert envs.waits.tolist() == [False, True]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_sticky_actions_are_a_setting(probability):
    """At probability 1 every frame repeats the doing nothing of the start, so that actions make no difference."""
    args = replace(SMALL, num_envs=1, repeat_action_probability=probability)
    shown = {"evaluation": [], "training": []}
    for action in (2, 3):  # right, left
        with closing(make_eval_env(args)) as env, closing(Environments(args)) as envs:
            env.reset(seed=1)
            for _ in range(10):
                frames = {"evaluation": env.step(action)[0], "training": envs.step(np.array([action]))[0][0]}
        for name in shown:
            shown[name].append(frames[name])
    for right, left in shown.values():
        assert np.array_equal(right, left) == (probability == 1)


def test_a_time_limit_cuts_a_game():
    args = replace(SMALL, env_kwargs='{"max_num_frames_per_episode": 40}', eval_env_kwargs="{}", num_envs=1)
    with closing(Environments(args)) as envs:
        ends = [
            (ended[0], cut[0], len(told)) for *_, ended, cut, told in (envs.step(np.zeros(1, int)) for _ in range(20))
        ]
    assert ends == ([(False, False, 0)] * 9 + [(False, True, 1)]) * 2


def test_games_are_restored_exactly(monkeypatch):
    """With actions that are repeated by chance, and some games that begin with a seed and some without."""
    monkeypatch.setattr(Environments, "seed_lasts", 200)
    args = replace(SMALL, num_envs=3, repeat_action_probability=0.25)
    random, drawn, over = np.random.default_rng(0), [], 0

    def play(envs: Environments, steps: int) -> dict:
        nonlocal over
        for _ in range(steps):
            *_, finished = envs.step(random.integers(4, size=3))
            over += len(finished)
            drawn.append(envs.seeds.tolist())
        return {name: getattr(envs, name).copy() for name in ("observations", "returns", "lengths", "lives", "waits")}

    def equal(a: dict, b: dict) -> bool:
        return all(np.array_equal(a[name], b[name]) for name in a)

    with closing(Environments(args)) as envs:
        at = play(envs, 520)
        assert over >= 5 and 2 < len({str(seeds) for seeds in drawn}) <= over
        state, actions = copy.deepcopy(envs.state()), random.bit_generator.state
        assert len(state["actions"]) > max(state["began"]) > 0
        after = play(envs, 80)
        further = envs.state()
    with closing(Environments(args)) as envs:
        assert envs.restore(copy.deepcopy(state))
        assert equal(play(envs, 0), at)
        random.bit_generator.state = actions
        assert equal(play(envs, 80), after) and equal(envs.state(), further)
        for changed in ({"actions": 3 - state["actions"]}, {"returns": state["returns"] + 1}):
            assert not envs.restore(copy.deepcopy(state) | changed)
            assert not envs.lengths.any() and not envs.returns.any()
        play(envs, 20)  # other games follow, which can be restored again
        state = envs.state()
    with closing(Environments(args)) as envs:
        assert envs.restore(state)


def test_envpool_plays_the_same_games_and_says_what_it_cannot_restore(small, capsys, monkeypatch):
    envpool = pytest.importorskip("envpool")
    seeds, make = [], envpool.make
    monkeypatch.setattr(envpool, "make", lambda *a, seed, **kw: seeds.append(seed) or make(*a, seed=seed, **kw))
    args, random, ended, over = replace(small, vec="envpool"), np.random.default_rng(0), 0, 0
    with closing(ppo.EnvPool(replace(args, num_envs=3))) as envs:
        assert envs.observations.shape == (3, 4, 84, 84)
        for _ in range(300):
            *_, terminated, _, finished = envs.step(random.integers(4, size=3))
            ended, over = ended + terminated.sum(), over + len(finished)
            assert (envs.lives[envs.lengths == 0] == 5).all()
        assert ended > 3 * over > 0
        envs.state()
        assert not envs.actions

    run = train(replace(args, checkpoint_every=128))
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    train(ppo.parse(["--resume", str(run)]))
    assert "could not be restored exactly" in capsys.readouterr().out
    assert {*seeds[-2]}.isdisjoint(seeds[-1])  # those that begin anew are not the run's first games again
    assert rows(run, "progress")[-1]["step"] == "256"


def test_a_film_is_as_fast_as_the_game():
    with closing(make_eval_env(SMALL, "rgb_array")) as env:
        env.reset(seed=0)
        assert env.metadata["render_fps"] == 15 and env.render().shape == (210, 160, 3)


def test_without_ale_py_it_says_what_to_install(capsys, monkeypatch):
    def without(name: str, *arguments: object) -> object:
        if name == "ale_py":
            raise ImportError
        return importing(name, *arguments)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        train(Args())
    assert stop.value.code == 2 and "pip install ale-py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ mathematics


def random_batch(agent: ppo.Agent, size: int = 32) -> ppo.Batch:
    frames = torch.randint(256, (size, 84, 84, 4), dtype=torch.uint8).movedim(-1, 1)
    logits, values = agent(frames)
    actions = torch.randint(logits.shape[1], (size,))
    logprobs = ppo.log_prob(logits, actions) + 0.2 * torch.randn(size)
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
    parameters = ppo.lower_precision(dict(agent.named_parameters()), "bf16")
    low = torch.func.functional_call(agent, parameters, batch.observations)
    torch.testing.assert_close(low[0], expected, atol=0.1, rtol=0.05)
    assert low[0].dtype == low[1].dtype == torch.float32 and not torch.equal(low[0], expected)


def test_the_first_policy_is_nearly_uniform_and_the_first_values_are_of_the_size_of_returns():
    agent = ppo.Agent(6)
    torch.testing.assert_close(agent.hidden.weight @ agent.hidden.weight.T, 2 * torch.eye(512), atol=1e-4, rtol=0)
    assert agent.critic.weight.norm().item() == pytest.approx(1, rel=1e-4)
    assert agent.actor.weight.norm().item() == pytest.approx(0.01 * 6**0.5, rel=1e-3)


@pytest.mark.parametrize(("clip_vloss", "norm_adv"), [(True, True), (False, False)])
def test_loss_equals_the_papers(agent, clip_vloss, norm_adv):
    args, batch = Args(clip_vloss=clip_vloss, norm_adv=norm_adv, precision="fp32"), random_batch(agent)
    loss, (policy_loss, value_loss, entropy, kl, clipped) = ppo.ppo_loss(
        dict(agent.named_parameters()), agent, args, batch
    )
    logits, values = agent(batch.observations)
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(batch.actions) - batch.logprobs).exp()
    advantages = batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    surrogate = torch.stack((ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)).min(0).values
    torch.testing.assert_close(policy_loss, -surrogate.mean())
    near = torch.minimum(torch.maximum(values, batch.values - 0.1), batch.values + 0.1)
    errors = torch.stack(((values - batch.returns) ** 2, (near - batch.returns) ** 2))
    torch.testing.assert_close(value_loss, 0.5 * (errors.max(0).values if clip_vloss else errors[0]).mean())
    torch.testing.assert_close(entropy, policy.entropy().mean())
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(clipped, ((ratio - 1).abs() > 0.1).float().mean())
    torch.testing.assert_close(loss, policy_loss + 0.5 * value_loss - 0.01 * entropy)


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
    """Stands in for Environments: plays Bars, and remembers all that it showed and said. After a loss it plays 1."""

    cuts, losses = 0.0, 0.0  # how often a game is cut, or a life lost

    def __init__(self, args: Args):
        self.envs = gym.vector.SyncVectorEnv([Bars])
        self.games, self.random, self.steps = [Bars() for _ in range(args.num_envs)], np.random.default_rng(1), []
        self.observations = np.stack([game.reset(seed=seed)[0] for seed, game in enumerate(self.games)])
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        self.waits = np.zeros(args.num_envs, bool)

    def step(self, actions):
        actions = np.where(self.waits, 1, actions)
        results = zip(*(game.step(action) for game, action in zip(self.games, actions, strict=True)), strict=True)
        observations, rewards, over, _, _ = map(np.array, results)
        cut, lost = self.random.random((2, len(actions))) < [[self.cuts], [self.losses]]
        self.steps.append((self.observations, actions, observations, rewards, over, cut, lost))
        self.observations, self.waits, finished = observations.copy(), lost & ~over & ~cut, []
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        for n in np.flatnonzero(over | cut):
            finished.append((self.returns[n], self.lengths[n]))
            self.returns[n], self.lengths[n] = 0, 0
            self.observations[n] = self.games[n].reset()[0]
        return observations, rewards, over | lost, cut, finished

    def state(self):
        return {}

    def close(self):
        pass


HAS_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="is slow here"))]
)
def test_learns_where_the_bar_is(small, monkeypatch, precision):
    monkeypatch.setattr(ppo, "prepare", lambda args: (args, Played(args), Bars.action_space))
    monkeypatch.setattr(ppo, "make_eval_env", lambda args, render_mode=None: Bars())
    args = replace(small, num_envs=8, total_timesteps=2048, learning_rate=1e-3, gamma=0.0, precision=precision)
    run = train(replace(args, update_epochs=3, num_evals=1, eval_episodes=5))
    result = json.loads((run / "result.json").read_text())
    assert result["evaluation"]["mean"] == 30.0  # the score, not clipped
    returns = [float(row["return"]) for row in rows(run, "episodes")]
    assert len(returns) > 110 and result["training_return"] == pytest.approx(np.mean(returns[-100:]))


def test_the_network_that_plays_is_the_one_that_learns(small, monkeypatch):
    """In bfloat16 it is a copy."""
    same, collect = [], ppo.collect

    def compare(args, agent, envs, look, step, watch):
        frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
        lowered = ppo.lower_precision(dict(agent.named_parameters()), args.precision)
        same.append(torch.equal(look(frames), ppo.see(agent, lowered, frames)))
        return collect(args, agent, envs, look, step, watch)

    monkeypatch.setattr(ppo, "collect", compare)
    train(replace(small, num_steps=8, total_timesteps=48, precision="bf16", learning_rate=0.01))
    assert same == [True] * 3


N, T = 8, 32
BARS = replace(SMALL, num_envs=N, num_steps=T, gamma=0.9, gae_lambda=0.8)


def look_of(agent: ppo.Agent):
    return partial(ppo.see, agent, dict(agent.named_parameters()))


@pytest.fixture
def played(monkeypatch):
    """A rollout, with cut games and lost lives, and all that was played."""
    monkeypatch.setattr(Played, "cuts", 0.1)
    monkeypatch.setattr(Played, "losses", 0.1)
    torch.manual_seed(0)
    agent, envs = ppo.Agent(4).requires_grad_(False), Played(BARS)
    agent.actor.weight *= 50
    watch = ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0))
    return agent, ppo.collect(BARS, agent, envs, look_of(agent), 1000, watch), envs


def test_a_rollout_is_what_was_played(played):
    agent, rollout, envs = played
    seen, actions, _, rewards, over, cut, lost = map(np.stack, zip(*envs.steps, strict=True))
    np.testing.assert_array_equal(rollout.observations, [*seen, envs.observations])
    np.testing.assert_array_equal(rollout.actions[rollout.chosen], actions[rollout.chosen])
    waited = np.zeros((T, N), bool)
    waited[1:] = (lost & ~over & ~cut)[:-1]
    np.testing.assert_array_equal(~rollout.chosen, waited)
    assert (actions[waited] == 1).all() and waited.sum() > 10
    np.testing.assert_array_equal(rollout.rewards, rewards)
    np.testing.assert_array_equal(rollout.terminated, over | lost)
    np.testing.assert_array_equal(rollout.truncated, cut)
    logits, values = agent(rollout.observations.flatten(0, 1))
    torch.testing.assert_close(rollout.values.flatten(), values)
    policy = torch.distributions.Categorical(logits=logits[: T * N])
    torch.testing.assert_close(rollout.logprobs.flatten(), policy.log_prob(rollout.actions.flatten()))


def test_actions_are_drawn_by_the_policy(played):
    agent, _, _ = played
    agent.actor.bias[:] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    rollout = ppo.collect(BARS, agent, Played(BARS), look_of(agent), 0, ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0)))
    shares = rollout.actions.flatten().bincount(minlength=4) / (T * N)
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.07)
    assert len(rollout.actions.unique(dim=0)) > T // 2 and len(rollout.actions.unique(dim=1).T) > N // 2


def test_files_hold_scores_of_whole_games(played):
    _, rollout, envs = played
    games, scores, lengths = [], np.zeros(N), np.zeros(N, int)
    for t, (*_, rewards, over, cut, _) in enumerate(envs.steps, start=1):
        scores, lengths = scores + rewards, lengths + 1
        for n in np.flatnonzero(over | cut):
            games.append((1000 + t * N, scores[n], lengths[n]))
            scores[n], lengths[n] = 0, 0
    assert [(row["step"], row["return"], row["length"]) for row in rollout.episodes] == games
    assert max(score for _, score, _ in games) > 3


def test_lost_lives_end_returns_and_cut_games_bootstrap(played):
    """The advantages of a rollout against the recursion over what the games showed, with clipped rewards."""
    agent, rollout, envs = played
    advantages = ppo.estimate(BARS, rollout)
    following = agent(torch.from_numpy(np.concatenate([step[2] for step in envs.steps])))[1].view(T, N)
    values, expected, carry, cuts = rollout.values[:T], torch.zeros(T, N), torch.zeros(N), 0
    for t in reversed(range(T)):
        *_, rewards, over, cut, lost = map(torch.from_numpy, envs.steps[t])
        assert set(rewards.tolist()) <= {0.0, 3.0}
        delta = rewards.clamp(max=1) + 0.9 * following[t] * ~(over | lost) - values[t]
        carry = expected[t] = delta + 0.9 * 0.8 * carry * ~(over | lost | cut)
        cuts += (cut & ~over & ~lost).sum()
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-4)
    assert cuts > 5


def test_rewards_are_clipped_on_both_sides():
    no = torch.zeros(2, 1, dtype=torch.bool)
    rewards = torch.tensor([[-3.0], [3.0]])
    rollout = ppo.Rollout(None, [], None, None, torch.zeros(3, 1), torch.empty(0), rewards, ~no, no, ~no)
    assert ppo.estimate(BARS, rollout).flatten().tolist() == [-1, 1]


def test_a_batch_has_each_steps_own(played):
    _, rollout, _ = played
    advantages = torch.randn(T, N)
    batch = ppo.batch_of(rollout, advantages)
    assert all(len(column) == T * N for column in batch)
    for t, n in ((0, 0), (0, 3), (7, 2), (T - 1, N - 1)):
        observation, action, logprob, value, advantage, target = (column[N * t + n] for column in batch)
        assert torch.equal(observation, rollout.observations[t, n]) and action == rollout.actions[t, n]
        assert (logprob, value, advantage) == (rollout.logprobs[t, n], rollout.values[t, n], advantages[t, n])
        assert target == advantages[t, n] + rollout.values[t, n]


def improve(played: tuple, args: Args, kl=lambda call: 0.0) -> tuple[dict, list]:
    calls = []

    def update(agent: ppo.Agent, args: Args, learner: ppo.Learner, batch: ppo.Batch, indices: torch.Tensor):
        calls.append((batch, indices))
        measures = torch.arange(float(len(ppo.MEASURES))) + len(calls)
        measures[3] = kl(len(calls))
        return measures

    agent, rollout, _ = played
    learner = ppo.Learner.of(agent, "cpu")
    return ppo.improve(args, learner, rollout, partial(ppo.run_epoch, args, agent, learner, update)), calls


def test_epochs_of_minibatches(played):
    measures, calls = improve(played, replace(BARS, update_epochs=3, num_minibatches=4))
    orders = [torch.cat([indices for _, indices in calls[at : at + 4]]).tolist() for at in (0, 4, 8)]
    assert len(calls) == 12 and all(len(indices) == T * N // 4 for _, indices in calls)
    assert len(set(map(tuple, orders))) == 3 and orders[0] != sorted(orders[0])
    batch = calls[0][0]
    assert all(other is batch for other, _ in calls)
    torch.testing.assert_close(batch.advantages, ppo.estimate(BARS, played[1]).flatten())
    assert measures["updates"] == 12 and measures["policy_loss"] == 6.5 and measures["grad_norm"] == 11.5
    expected = 1 - (batch.returns - batch.values).var() / batch.returns.var()
    assert measures["explained_variance"] == pytest.approx(expected.item(), rel=1e-5)


def test_minibatches_have_their_size_however_few_steps_were_chosen(played):
    chosen = torch.zeros_like(played[1].chosen)
    chosen[:2] = True
    few = played[0], played[1]._replace(chosen=chosen), played[2]
    _, calls = improve(few, replace(BARS, num_minibatches=4))
    assert all(len(indices) == T * N // 4 and indices.max() < 2 * N for _, indices in calls)


def test_what_was_not_played_is_not_learnt_from(played):
    """After a lost life FIRE is pressed whatever the agent chose: that choice weighs nothing, every other as ever."""
    chosen = set(played[1].chosen.flatten().nonzero().squeeze(-1).tolist())
    again = []
    for _, calls in (improve(played, replace(BARS, num_minibatches=4)) for _ in range(10)):
        counts = torch.cat([indices for _, indices in calls]).bincount(minlength=T * N)
        assert set(counts.nonzero().squeeze(-1).tolist()) == chosen and counts.max() == 2
        again.append(counts == 2)
    assert len(chosen) < T * N - 10 and torch.stack(again).any(0).sum() > 3 * (
        T * N - len(chosen)
    )  # not always the same


def test_where_every_choice_was_played_an_epoch_is_all_of_them_once(played):
    agent, rollout, envs = played
    rollout = rollout._replace(chosen=torch.ones_like(rollout.chosen))
    _, calls = improve((agent, rollout, envs), replace(BARS, num_minibatches=4))
    assert sorted(torch.cat([indices for _, indices in calls]).tolist()) == list(range(T * N))


def test_a_choice_after_a_lost_life_is_known_as_not_played():
    """In Breakout: the same rollout with other choices there leads to the same frames and scores."""
    args = replace(SMALL, num_steps=128)
    torch.manual_seed(0)
    agent = ppo.Agent(4).requires_grad_(False)
    with closing(Environments(args)) as envs:
        rollout = ppo.collect(args, agent, envs, look_of(agent), 0, ppo.Stopwatch(dict.fromkeys(ppo.SECONDS, 0.0)))
    assert (~rollout.chosen).sum() > 2
    other = torch.where(rollout.chosen, rollout.actions, 3 - rollout.actions)
    with closing(Environments(args)) as envs:
        for t in range(128):
            np.testing.assert_array_equal(rollout.observations[t], envs.observations)
            _, rewards, *_ = envs.step(other[t].numpy())
            np.testing.assert_array_equal(rewards, rollout.rewards[t])


def test_an_update_ends_once_a_minibatch_has_moved_too_far(played):
    args = replace(BARS, update_epochs=3, num_minibatches=4)
    for target, updates in ((0.45, 5), (0.1, 2), (9.0, 12), (None, 12)):
        measures, calls = improve(played, replace(args, target_kl=target), kl=lambda call: 0.1 * call)
        assert measures["updates"] == len(calls) == updates


# -------------------------------------------------------------------------------------------------------------- runs


def test_every_step_belongs_to_a_game(small):
    run = train(replace(small, total_timesteps=640))
    episodes, running = rows(run, "episodes"), load(run / "checkpoint.pt")["environments"]["lengths"]
    assert episodes and sum(int(row["length"]) for row in episodes) + running.sum() == 640
    rates = [float(row["learning_rate"]) for row in rows(run, "progress")]
    assert rates == pytest.approx([2.5e-4 * (1 - n / 10) for n in range(10)])


def test_what_is_not_finite_stops_the_run(small, monkeypatch, capsys):
    step, steps = Environments.step, []

    def broken(envs: Environments, actions: np.ndarray) -> tuple:
        steps.append(1)
        observations, rewards, *ends = step(envs, actions)
        return observations, rewards * (np.nan if len(steps) == 100 else 1.0), *ends

    monkeypatch.setattr(Environments, "step", broken)
    with pytest.raises(SystemExit, match="1"):
        train(replace(small, total_timesteps=640, checkpoint_every=64))
    said = capsys.readouterr()
    assert "not finite" in said.err and "the last checkpoint is of step 192" in said.err


def test_a_policy_acts_by_the_largest_logit_and_samples_by_all(agent):
    policy = ppo.Policy(SMALL, agent)
    observations = np.random.default_rng(0).integers(256, size=(20, 4, 84, 84), dtype=np.uint8)
    logits, _ = agent(torch.from_numpy(observations))
    np.testing.assert_array_equal(policy(observations), logits.argmax(-1))
    assert len(set(policy(observations))) > 1
    drawn = policy(np.repeat(observations[:1], 1000, axis=0), sample=True)
    shares = np.bincount(drawn, minlength=6) / 1000
    np.testing.assert_allclose(shares, logits[0].softmax(-1), atol=0.06)
