"""Small environments whose answers are known, registered with Gymnasium as `tests/...`.

Each takes `continuous`: with it an action is one number in [-1, 1], without it 0 or 1.
"""

import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

END = 1000.0  # Counting shows END + t in the last observation of an episode of t steps


def binary_action_space(continuous: bool) -> spaces.Space:
    return spaces.Box(-1, 1, (1,), np.float32) if continuous else spaces.Discrete(2)


def is_high(action) -> bool:
    return bool(np.asarray(action).item() > 0)


class Tiny(gym.Env):
    """Base of the environments with one number as observation."""

    def __init__(self, continuous: bool):
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = binary_action_space(continuous)
        self.t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.zeros(1, np.float32)


class NearlyHundred(Tiny):
    """One step, the reward is 100 less an error."""

    def step(self, action):
        return self.observe(), 100 - self.np_random.random(), True, False, {}


class ObservedReward(Tiny):
    """One step, the reward is the observation, -1 or 1: V(s) = s."""

    def observe(self):
        self.sign = self.np_random.choice([-1.0, 1.0])
        return np.array([self.sign], np.float32)

    def step(self, action):
        reward = self.sign
        return self.observe(), reward, True, False, {}


class TwoSteps(Tiny):
    """Two steps, reward 1 after the second: V(0) = gamma, V(1) = 1."""

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), float(self.t == 2), self.t == 2, False, {}


class ActionReward(Tiny):
    """One step, reward 1 for a high action and -1 for a low one."""

    def step(self, action):
        return self.observe(), 1.0 if is_high(action) else -1.0, True, False, {}


class MatchReward(ObservedReward):
    """One step, reward 1 for an action that is high exactly where the observation is 1, else -1."""

    def step(self, action):
        reward = 1.0 if is_high(action) == (self.sign > 0) else -1.0
        return self.observe(), reward, True, False, {}


class Endless(Tiny):
    """Reward 1 for ever, cut by a time limit of 5 steps: V = 1 / (1 - gamma)."""

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t >= 5, {}


class Counting(Tiny):
    """Shows (t, END) alternatingly ended episodes of 1, 2, 3, 4, 1, ... steps, reward t + 1.

    The last observation of an episode is END + t: no step ever starts from it, so that a row that
    is no step is recognised by its observation. `log` holds what really happened: (observation,
    reward, ended) of each step, in order; `actions` what it was told to do.
    """

    def __init__(self, continuous: bool):
        super().__init__(continuous)
        self.episode, self.length, self.log, self.actions = -1, 0, [], []

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.length = self.episode % 4 + 1
        return super().reset(seed=seed)

    def observe(self):
        return np.array([self.t + (END if self.t == self.length else 0)], np.float32)

    def step(self, action):
        self.actions.append(action)
        before = self.observe()
        self.t += 1
        ended = self.t == self.length
        self.log.append((before.item(), float(self.t), ended))
        is_terminated = ended and self.episode % 3 > 0
        return self.observe(), float(self.t), is_terminated, ended and not is_terminated, {}


class Noise(Tiny):
    """Random observations and rewards, none twice; 1 to 5 steps, then a termination or time limit.

    `log` holds what really happened: (observation, reward, ended) of each step, in order.
    """

    scale = 1.0  # of observations
    reward_scale, reward_center = 1.0, 0.0
    after_termination: float | None = None  # what is seen then

    def __init__(self, continuous: bool):
        super().__init__(continuous)
        self.log = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.terminates = self.np_random.integers(1, 6), self.np_random.random() < 0.5
        self.obs = self.observe()
        return self.obs, {}

    def observe(self):
        return (self.scale * self.np_random.normal(size=1)).astype(np.float32)

    def step(self, action):
        self.left -= 1
        ended = bool(self.left == 0)
        reward = self.reward_center + self.reward_scale * self.np_random.normal()
        self.log.append((self.obs.item(), reward, ended))
        self.obs = self.observe()
        if ended and self.terminates and self.after_termination is not None:
            self.obs = np.full(1, self.after_termination, np.float32)
        return self.obs, reward, ended and self.terminates, ended and not self.terminates, {}


class Dice(Tiny):
    """Draws from the generators of NumPy, Python and PyTorch, and notes in `drawn` what it got."""

    drawn: list[tuple[float, ...]] = []

    def __init__(self, continuous: bool):
        super().__init__(continuous)
        self.throw()

    def throw(self):
        self.drawn.append((np.random.random(), random.random(), torch.rand(()).item()))

    def observe(self):
        self.throw()
        return np.array([sum(self.drawn[-1])], np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), sum(self.drawn[-1]), self.t == 5, False, {}


class Learner(Tiny):
    """Takes a gradient step of its own in each of three steps."""

    def step(self, action):
        assert torch.is_grad_enabled()
        weight = torch.ones(1, requires_grad=True)
        (2 * weight).sum().backward()
        self.t += 1
        return self.observe(), weight.grad.item(), self.t == 3, False, {}


class Seeds(Tiny):
    """Ends after each step and notes in `seen` every seed it was reset with."""

    seen: list[int] = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seen.append(seed)
        return super().reset(seed=seed)

    def step(self, action):
        return self.observe(), 0.0, True, False, {}


class Broken(Tiny):
    """Nine good steps, then what it is told to give: a value that is not finite, for example."""

    first = obs = 0.0  # in the first observation of an episode, and in those after nine steps
    reward = 0.0
    terminated = truncated = False

    def __init__(self, continuous: bool, size: int):
        super().__init__(continuous)
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observe(self):
        obs = np.full(self.observation_space.shape, np.pi, np.float32)
        obs[0] = self.first if self.t == 0 else self.obs if self.t >= 10 else 0
        return obs

    def step(self, action):
        self.t += 1
        if self.t < 10:
            return self.observe(), 0.0, False, False, {}
        return self.observe(), self.reward, self.terminated, self.truncated, {}


class Drawn(Tiny):
    """Three steps, each a picture; `modes` has the render mode of each that was made."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 30}
    modes: list[str | None] = []

    def __init__(self, continuous: bool, render_mode: str | None = None):
        super().__init__(continuous)
        self.render_mode = render_mode
        self.modes.append(render_mode)

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, self.t == 3, False, {}

    def render(self):
        return np.full((64, 64, 3), self.t * 80, np.uint8)


class Strict(gym.Env):
    """Refuses an action that is not in its space exactly as declared; remembers those it got."""

    def __init__(self, action_space: spaces.Space, observation_space: spaces.Space | None = None):
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Box(-1, 1, (2, 3), np.float64)
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action in self.action_space, f"{action!r} is not in {self.action_space}"
        self.actions.append(np.array(action))
        return self.observation_space.sample(), 0.0, False, len(self.actions) % 7 == 0, {}


class Target(gym.Env):
    """One step; the nearer the action comes to a target, the better."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, action_space: spaces.Box, target: float):
        self.action_space, self.target = action_space, target

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space, f"{action!r} is not in {self.action_space}"
        distance = np.abs(action.astype(float) - self.target).mean()
        return np.zeros(1, np.float32), -float(distance), True, False, {}


class Digits(gym.Env):
    """One step: repeat the digits that are shown; reward is the share of them that is right."""

    def __init__(self, nvec=(2, 5, 3), start=(0, -2, 7), dtype=np.int64):
        self.action_space = spaces.MultiDiscrete(nvec, dtype, start=start)
        self.observation_space = spaces.Dict(shown=spaces.MultiDiscrete(nvec))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = self.np_random.integers(self.action_space.nvec)
        return {"shown": self.shown}, {}

    def step(self, action):
        assert action in self.action_space, f"{action!r} is not in {self.action_space}"
        reward = np.mean(action - self.action_space.start == self.shown)
        return {"shown": self.shown.copy()}, float(reward), True, False, {}


class HighestValid(gym.Env):
    """Four steps: reward 1 for the highest of the valid actions; an invalid one is an error.

    Action 0 is always valid, 3 never, 5 in one of 200 steps; after the last step none is.
    """

    def __init__(self, actions: int = 6):
        self.action_space = spaces.Discrete(actions, start=10)
        mask = spaces.MultiBinary(actions)
        clock = spaces.Box(0, 4, (1,), np.float32)
        self.observation_space = spaces.Dict({"action_mask": mask, "observation": clock})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        odds = np.array([1, 0.5, 0.5, 0, 0.5, 0.005])
        self.mask = (self.np_random.random(6) < odds * (self.t < 4)).astype(np.int8)
        return {"action_mask": self.mask, "observation": np.array([self.t], np.float32)}

    def step(self, action):
        assert self.mask[action - 10], f"{action} is invalid, {self.mask}"
        reward = float(action - 10 == np.flatnonzero(self.mask).max())
        self.t += 1
        return self.observe(), reward, self.t == 4, False, {}


class Recall(gym.Env):
    """A cue is seen in the first step only; the action of the last must be what it was."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.cue = 5, int(self.np_random.integers(2))
        return np.eye(2, dtype=np.float32)[self.cue], {}

    def step(self, action):
        self.left -= 1
        is_right = self.left == 0 and action == self.cue
        return np.zeros(2, np.float32), float(is_right), self.left == 0, False, {}


class Walk(gym.Env):
    """Random observations, episodes of 1 to 9 steps that are terminated or truncated."""

    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def look(self):
        return self.np_random.normal(size=3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.terminates = self.np_random.integers(1, 10), self.np_random.random() < 0.5
        return self.look(), {}

    def step(self, action):
        self.left -= 1
        is_over = bool(self.left == 0)
        ends = (is_over and self.terminates, is_over and not self.terminates)
        return self.look(), float(action), *ends, {}


class Corner(gym.Env):
    """A bright square lies in one corner of a noisy image; the action must name the corner."""

    observation_space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    action_space = spaces.Discrete(4)

    def look(self):
        self.corner = int(self.np_random.integers(4))
        image = self.np_random.integers(0, 100, (36, 40, 3), np.uint8)
        y = self.corner // 2 * 18 + self.np_random.integers(12)
        x = self.corner % 2 * 20 + self.np_random.integers(14)
        image[y : y + 6, x : x + 6] = 255
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.look(), {}

    def step(self, action):
        reward = float(action == self.corner)
        return self.look(), reward, False, False, {}


ENVS = {
    "NearlyHundred": NearlyHundred,
    "ObservedReward": ObservedReward,
    "TwoSteps": TwoSteps,
    "ActionReward": ActionReward,
    "MatchReward": MatchReward,
    "Endless": Endless,
    "Counting": Counting,
    "Noise": Noise,
    "Dice": Dice,
    "Learner": Learner,
    "Seeds": Seeds,
}
OBSERVATIONS = {
    "Plane": spaces.Box(-1, 1, (2, 3), np.float64),
    "Cell": spaces.Discrete(5, start=2),
    "Mixed": spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2, 2), np.float32)}),
    "Bits": spaces.MultiBinary(4),
    "float64": spaces.Box(-1, 1, (4,), np.float64),
    "Sequence": spaces.Sequence(spaces.Discrete(2)),
}
for dtype in ("uint8", "uint16", "uint32", "int64"):
    OBSERVATIONS[dtype] = spaces.Box(0, 200, (5,), dtype)

for kind in ("Discrete", "Continuous"):
    kwargs = {"continuous": kind == "Continuous"}
    for name, env in ENVS.items():
        gym.register(f"tests/{name}{kind}-v0", env, kwargs=kwargs)
    for name, size in {"Fine": 1, "Wide": 24}.items():
        gym.register(f"tests/{name}{kind}-v0", Broken, kwargs=kwargs | {"size": size})
    gym.register(f"tests/Drawn{kind}-v0", Drawn, kwargs=kwargs)
    gym.register(
        f"tests/Counted{kind}-v0",
        Endless,
        kwargs=kwargs,
        additional_wrappers=(gym.wrappers.RecordEpisodeStatistics.wrapper_spec(),),
    )
    for name, space in OBSERVATIONS.items():
        options = {"action_space": binary_action_space(**kwargs), "observation_space": space}
        gym.register(f"tests/{name}{kind}-v0", Strict, kwargs=options)
gym.register("tests/MultiDiscrete-v0", Strict, kwargs={"action_space": spaces.MultiDiscrete([2])})
gym.register("tests/Start-v0", Strict, kwargs={"action_space": spaces.Discrete(3, start=-1)})
scalar = {"action_space": spaces.Box(-2, 1, (), np.float32)}
gym.register("tests/Scalar-v0", Strict, kwargs=scalar)
ones = {"action_space": spaces.Box(0, 1, (3,), np.int8), "target": 1}
gym.register("tests/ThreeOnes-v0", Target, kwargs=ones)
beyond = {"action_space": spaces.Box(50, np.inf, (1,), np.float32), "target": 52}
gym.register("tests/Beyond50-v0", Target, kwargs=beyond)
gym.register("tests/Digits-v0", Digits)
grid = {"nvec": [[2, 3], [4, 5]], "start": [[0, 1], [2, 3]], "dtype": np.int8}
gym.register("tests/Grid-v0", Digits, kwargs=grid)
gym.register("tests/HighestValid-v0", HighestValid)
gym.register("tests/Recall-v0", Recall)
gym.register("tests/Walk-v0", Walk)
gym.register("tests/Corner-v0", Corner, max_episode_steps=8)
