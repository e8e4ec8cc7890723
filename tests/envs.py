"""Small environments whose right answers are known."""

import gymnasium as gym
import numpy as np


class Clock(gym.Env):
    """Pays 1 every step for 20 steps, and shows how many have passed. `cut` says whether it is cut then, or ends."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, cut: bool = True, render_mode: str | None = None):
        self.cut = cut

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 20
        return np.full(1, self.t / 20, np.float32), 1.0, over and not self.cut, over and self.cut, {}


class Mirror(gym.Env):
    """Pays most for an action equal to the observation, a matrix; bounded unevenly. Pays NaN at step `breaks`."""

    observation_space = gym.spaces.Box(-1, 1, (2, 2))
    action_space = gym.spaces.Box(np.full((2, 2), -1, np.float32), np.full((2, 2), 2, np.float32))

    def __init__(self, breaks: int | None = None, render_mode: str | None = None):
        self.breaks, self.steps = breaks, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.target = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self.target, {}

    def step(self, action):
        assert self.action_space.contains(action.astype(np.float32))
        self.t += 1
        self.steps += 1
        reward = np.nan if self.steps == self.breaks else -float(((action - self.target) ** 2).mean())
        self.target = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self.target, reward, False, self.t == 10, {}


class Fates(gym.Env):
    """Its observation tells all: the seed of its episode and the time. Pays the sum of what it is told to do, and more.

    By their seed, episodes end by themselves, are cut, or both at once.
    """

    observation_space = gym.spaces.Box(0, np.inf, (2,))
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))

    @staticmethod
    def end_of(seed: int) -> tuple[int, bool, bool]:
        """After how many steps, whether it ends by itself, and whether it is cut."""
        return 1 + seed * 7919 % 13, seed % 3 != 1, seed % 3 != 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = seed % 1000, 0
        return np.float32([self.seed, 0]), {}

    def step(self, action):
        length, terminated, truncated = self.end_of(self.seed)
        assert self.action_space.contains(action) and self.t < length
        self.t += 1
        over = self.t == length
        reward = float(action.sum()) + self.seed / 100 + self.t
        return np.float32([self.seed, self.t]), reward, over and terminated, over and truncated, {}


class Turns(Fates):
    """The same with an action of two parts."""

    action_space = gym.spaces.MultiDiscrete([2, 4], start=[-1, 3])


class Lots(Fates):
    """The same with one of four actions."""

    action_space = gym.spaces.Discrete(4, start=3)


class Barred(Turns):
    """The same, but forbids some of it, by a mask in one row, or in a tuple, or of a single part. Nothing at the end.

    At the time `stuck` it allows nothing either.
    """

    def __init__(self, form: str = "row", stuck: int = -1, render_mode: str | None = None):
        self.form, self.stuck, self.mask = form, stuck, np.zeros(4, bool)  # always the same array
        if form == "single":
            self.action_space = gym.spaces.Discrete(4, start=3)

    @staticmethod
    def allowed(seed: int, t: int) -> list[np.ndarray]:
        first = (seed + t + np.arange(2)) % 2 == 0 if seed % 3 else np.ones(2)
        return [first.astype(np.int8), ((seed + t + np.arange(4)) % 3 > 0).astype(np.int8)]

    def _info(self):
        parts = self.allowed(self.seed, self.t)
        if self.t in (self.stuck, self.end_of(self.seed)[0]):
            parts = [np.zeros_like(part) for part in parts]
        self.mask[:] = parts[1]
        return {"action_mask": {"row": np.concatenate(parts), "tuple": tuple(parts), "single": self.mask}[self.form]}

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], self._info()

    def step(self, action):
        parts = np.atleast_1d(action - self.action_space.start)
        masks = self.allowed(self.seed, self.t)[-len(parts) :]
        assert all(mask[part] for mask, part in zip(masks, parts, strict=True))
        return *super().step(action)[:4], self._info()


class Kinds(Clock):
    """Says in whole numbers whether it ends. Pays in a row of one, or more than can be squared."""

    def __init__(self, pays: str = "", discrete: bool = False, render_mode: str | None = None):
        super().__init__()
        self.pays = pays
        if discrete:
            self.action_space = gym.spaces.Discrete(2)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        reward = {"": reward, "row": np.full(1, reward), "much": 1e200 * self.t}[self.pays]
        return observation, reward, int(terminated), int(truncated), info


class Counts(Clock):
    """Shows how often it was reset."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        return super().reset(seed=seed)[0] + self.resets / 100, {}


class Pair(Clock):
    observation_space = gym.spaces.Dict({"a": gym.spaces.Box(0, 1, (1,))})


class Bits(Clock):
    action_space = gym.spaces.MultiBinary(3)


class Endless(Clock):
    action_space = gym.spaces.Box(-np.inf, 1, (1,))


class Ticks(Clock):
    """Every action is as good as any other."""

    action_space = gym.spaces.Discrete(2)


class Once(Ticks):
    """Its mask is in what a reset says, and in nothing that a step does."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": np.ones(2, np.int8)}


class Ends(Clock):
    """The clock in episodes that end by themselves; those of odd seeds are cut, and show -1 instead."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.cut = seed % 2 == 1
        return super().reset(seed=seed)[0] - self.cut, {}

    def step(self, action):
        observation, *results = super().step(action)
        return np.where(self.cut, np.float32(-1), observation), *results


class TickingEnds(Ends):
    action_space = gym.spaces.Discrete(2)


class Echo(gym.Env):
    """Pays the share of an action's parts that name what the observation shows; each part begins at another number.

    Pays NaN at step `breaks`.
    """

    observation_space = gym.spaces.Box(-1, 5, (2, 2))
    action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 2]], np.int8, start=[[0, -1], [1, 4]])

    def __init__(self, breaks: int | None = None, render_mode: str | None = None):
        self.breaks, self.steps = breaks, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        self.steps += 1
        reward = np.nan if self.steps == self.breaks else float((action == self.shown).mean())
        return self._show(), reward, False, self.t == 10, {}

    def _show(self):
        self.shown = self.action_space.start + self.np_random.integers(self.action_space.nvec)
        return self.shown.astype(np.float32)


class Signs(Echo):
    """The same with one action of -1, 0 or 1."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(3, start=-1)

    def _show(self):
        self.shown = self.np_random.integers(-1, 2, 1)
        return self.shown.astype(np.float32)


class Opposites(Signs):
    """The same, shown beside its opposite."""

    observation_space = gym.spaces.Box(-1, 1, (1, 2))

    def _show(self):
        return np.array([[1, -1]], np.float32) * super()._show()


class Filmed(Clock):
    """The clock as an image: a bright line that falls by a row a step. Pays for the second half of an episode.

    Or, if it `asks`, for actions that say where the line is.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(0, 255, (24, 24, 3), np.uint8)
    action_space = gym.spaces.Box(np.float32([0, -1]), np.float32([1, 3]))

    def __init__(self, cut: bool = True, asks: bool = False, steps: int = 20, render_mode: str | None = None):
        super().__init__(cut)
        self.asks, self.steps, self.render_mode = asks, steps, render_mode

    def render(self):
        image = np.zeros((24, 24, 3), np.uint8)
        image[min(self.t, 19)] = 50, 100, 250
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.render(), {}

    def step(self, action):
        error = action - [self.t / 20, 1 + self.t / 20]
        reward = -float((error**2).mean()) if self.asks else float(self.t >= 10)
        self.t += 1
        over = self.t == self.steps
        return self.render(), reward, over and not self.cut, over and self.cut, {}


class Large(Filmed):
    """Large enough for torch to share scaling it out among threads."""

    observation_space = gym.spaces.Box(0, 255, (240, 240, 3), np.uint8)

    def render(self):
        return super().render().repeat(10, axis=0).repeat(10, axis=1)


class Transparent(Filmed):
    observation_space = gym.spaces.Box(0, 255, (24, 24, 4), np.uint8)


class Whole(Clock):
    action_space = gym.spaces.Box(0, 3, (1,), np.int64)


class ChannelsFirst(Clock):
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


class WithoutChannels(Clock):
    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)


class Stacked(Clock):
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84, 3), np.uint8)


class Deep(Clock):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 12), np.uint8)


class Luck(gym.Env):
    """Lasts as long as its seed decides, shows the seed and the time, and pays for the second of two actions."""

    observation_space = gym.spaces.Box(0, np.inf, (2,))
    action_space = gym.spaces.Discrete(2)
    made = 0  # steps of all of them

    @staticmethod
    def length_of(seed: int) -> int:
        return 1 + seed * 7919 % 29

    def __init__(self, render_mode: str | None = None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = self.np_random.integers(1000).item() if seed is None else seed, 0
        return self._observe(), {}

    def _observe(self):
        return np.array([self.seed, self.t], np.float32)

    def step(self, action):
        Luck.made += 1
        self.t += 1
        return self._observe(), float(action), self.t == self.length_of(self.seed), False, {}


class Loose(gym.Env):
    """Shows a list of numbers of 64 bits, where its space has 32; pays for what is done and seen."""

    observation_space = gym.spaces.Box(-10, 10, (3,))

    def __init__(self, discrete: bool = False, render_mode: str | None = None):
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = self.np_random.normal(size=3).tolist()
        return self.seen, {}

    def step(self, action):
        self.seen = self.np_random.normal(size=3).tolist()
        return self.seen, float(np.sum(action)) * self.seen[0], False, False, {}


class Strict(gym.Env):
    """Takes only what its action space contains. Of a Box's two actions one may be only 1.3, which scaling may miss."""

    def __init__(self, seen="float32", done="float64", masked: bool = False, render_mode: str | None = None):
        self.observation_space = gym.spaces.Box(-9, 9, (3,), np.dtype(seen).type)
        kind = np.dtype(done)
        if kind.kind in "iu":
            self.action_space = gym.spaces.Discrete(4, start=2, dtype=kind.type)
        else:
            self.action_space = gym.spaces.Box(np.array([-1, 1.3], kind), np.array([1, 1.3], kind), dtype=kind.type)
        self.told = {"action_mask": np.array([0, 1, 1, 0])} if masked else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), self.told

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.observation_space.sample(), 1.0, False, False, self.told


class Painted(Clock):
    """Draws frames of this kind."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, shape: tuple[int, ...], kind: str, discrete: bool = False, render_mode: str | None = None):
        super().__init__()
        self.action_space = gym.spaces.Discrete(2) if discrete else Clock.action_space
        self.frame, self.render_mode = np.ones(shape, kind), render_mode

    def render(self):
        return self.frame


class Misshapen(gym.Env):
    """Begins with three numbers, as its space says, and goes on in another shape or kind."""

    observation_space = gym.spaces.Box(-9, 9, (3,), np.int64)

    def __init__(self, shape: tuple[int, ...], kind: str = "int64", discrete: bool = False, render_mode=None):
        self.later = np.ones(shape, kind)
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(3, np.int64), {}

    def step(self, action):
        return self.later, 1.0, False, False, {}


class Halves(Clock):
    """Pays 1 as long as what is half of what it was, each time, is not 0."""

    def reset(self, *, seed=None, options=None):
        self.left = np.ones(1, np.float32)
        return super().reset(seed=seed)

    def step(self, action):
        seen, _, terminated, _, _ = super().step(action)
        self.left = self.left * np.float32(0.5)
        return seen.clip(0, 1), float(self.left[0] > 0), terminated, False, {}


class Unseen(Clock):
    """Says that it can be drawn."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.render_mode = render_mode


class Forgetful(Unseen):
    """Does not keep how it is to be drawn."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(None)


class Scalar(Clock):
    """Shows a number, and no vector."""

    observation_space = gym.spaces.Box(0, 1, ())

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0][0], {}

    def step(self, action):
        seen, *rest = super().step(action)
        return seen[0], *rest


class Worldly(Clock):
    """Has a world of its own that outlives episodes."""

    made = 0

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.world = object()
        Worldly.made += 1


class Blocks(Clock):
    """Nine images of 84 x 84, channels first."""

    observation_space = gym.spaces.Box(0, 255, (9, 84, 84), np.uint8)


class Several(Clock):
    action_space = gym.spaces.MultiDiscrete([2, 2])


gym.register("Clock-v0", Clock)
gym.register("Ticks-v0", Ticks)
gym.register("Ends-v0", Ends)
gym.register("TickingEnds-v0", TickingEnds)
gym.register("Echo-v0", Echo)
gym.register("Signs-v0", Signs)
gym.register("Opposites-v0", Opposites)
gym.register("Mirror-v0", Mirror)
gym.register("Fates-v0", Fates)
gym.register("Turns-v0", Turns)
gym.register("Lots-v0", Lots)
gym.register("Barred-v0", Barred)
gym.register("Once-v0", Once)
gym.register("Kinds-v0", Kinds)
gym.register("Counts-v0", Counts)
gym.register("Pair-v0", Pair)
gym.register("Bits-v0", Bits)
gym.register("Endless-v0", Endless)
gym.register("Filmed-v0", Filmed)
gym.register("Large-v0", Large)
gym.register("Transparent-v0", Transparent)
gym.register("Whole-v0", Whole)
gym.register("ChannelsFirst-v0", ChannelsFirst)
gym.register("WithoutChannels-v0", WithoutChannels)
gym.register("Stacked-v0", Stacked)
gym.register("Deep-v0", Deep)
gym.register("Luck-v0", Luck, max_episode_steps=40)
gym.register("Loose-v0", Loose, max_episode_steps=10)
gym.register("Strict-v0", Strict, max_episode_steps=10)
gym.register("Painted-v0", Painted, max_episode_steps=30)
gym.register("Misshapen-v0", Misshapen, max_episode_steps=10)
gym.register("Halves-v0", Halves, max_episode_steps=200)
gym.register("Unseen-v0", Unseen)
gym.register("Forgetful-v0", Forgetful)
gym.register("Scalar-v0", Scalar)
gym.register("Worldly-v0", Worldly)
gym.register("Blocks-v0", Blocks)
gym.register("Several-v0", Several)
