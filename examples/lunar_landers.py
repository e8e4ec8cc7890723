"""LunarLander as it starts in more places, and as it pays only at the end.

python grpo.py --env-id examples.lunar_landers:DenseLunarLander-v0
python grpo.py --env-id examples.lunar_landers:SparseLunarLander-v0 --env-kwargs '{"mode": "graded"}'
"""

from typing import Literal

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.lunar_lander import SCALE, VIEWPORT_H, VIEWPORT_W, LunarLander

LIMIT = 1000  # steps of an episode, as in LunarLander-v3


class DenseLunarLander(LunarLander):
    """LunarLander-v3, except that it begins at a random place in the upper part of the view, and tilted."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        x = self.np_random.uniform(0.25, 0.75) * VIEWPORT_W / SCALE
        y = self.np_random.uniform(0.75, 1.0) * VIEWPORT_H / SCALE
        self.move(x, y, self.np_random.uniform(-0.3, 0.3))
        # This step, whose reward nobody gets, sets the shaping anew: having been moved is not paid for.
        return self.step(np.zeros(2, np.float32) if self.continuous else 0)[0], {}

    def move(self, x: float, y: float, angle: float) -> None:
        """Puts lander and legs, as one rigid body, to where the lander's centre is at (x, y), turned by `angle`."""
        cos, sin, (x0, y0) = np.cos(angle), np.sin(angle), tuple(self.lander.position)
        for body in (self.lander, *self.legs):
            dx, dy = body.position[0] - x0, body.position[1] - y0
            body.transform = (x + cos * dx - sin * dy, y + sin * dx + cos * dy), body.angle + angle


class SparseLunarLander(DenseLunarLander):
    """DenseLunarLander paid at the end of an episode only.

    `terminal`: 100 for a landing, -100 for a crash or for leaving, 0 when time is up; `delayed`: the sum of what
    DenseLunarLander would have paid; `graded`: 100 for a landing, otherwise from -100 to 0, the higher the nearer to
    the pad, the slower at the first touch, and the more legs stand. An episode ends after `limit` steps; who cuts it
    earlier sees no pay.
    """

    def __init__(self, mode: Literal["terminal", "delayed", "graded"] = "delayed", limit: int = LIMIT, **kwargs):
        if mode not in ("terminal", "delayed", "graded"):
            raise ValueError(f"mode {mode!r} must be terminal, delayed or graded")
        self.mode, self.limit = mode, limit
        super().__init__(**kwargs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.begin()
        observation, info = super().reset(seed=seed, options=options)
        self.begin()  # resetting makes two steps
        return observation, info

    def begin(self) -> None:
        self.steps, self.total, self.touched, self.landing_speed = 0, 0.0, False, 0.0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not self.touched:
            self.landing_speed = self.lander.linearVelocity.length
        observation, reward, terminated, _, _ = super().step(action)
        legs, distance = int(observation[6] + observation[7]), float(np.hypot(*observation[:2]))
        self.touched |= self.game_over or legs > 0
        self.steps += 1
        self.total += float(reward)
        success = terminated and not self.lander.awake
        truncated = self.steps == self.limit
        over = terminated or truncated
        info = {"success": success, "landing_speed": self.landing_speed, "legs": legs, "distance": distance}
        return observation, self.outcome(info, terminated) if over else 0.0, terminated, truncated, info

    def outcome(self, info: dict, terminated: bool) -> float:
        if self.mode == "delayed":
            return self.total
        if info["success"]:
            return 100.0
        if self.mode == "terminal":
            return -100.0 if terminated else 0.0
        near, slow = 1 - min(info["distance"], 1.0), 1 - min(info["landing_speed"] / 5, 1.0)
        return -100.0 + 40 * near + 40 * slow + 10 * info["legs"]


gym.register("DenseLunarLander-v0", DenseLunarLander, max_episode_steps=LIMIT)
gym.register("SparseLunarLander-v0", SparseLunarLander, max_episode_steps=LIMIT)
