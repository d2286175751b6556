"""Environments that make trouble, registered as `trouble/...`: for whole runs of the scripts."""

import os

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ERRORS = {
    "OSError": OSError("no track.csv"),
    "ImportError": ImportError("no simulator"),
    "FloatingPointError": FloatingPointError("overflow"),
    "GymError": gym.error.InvalidAction("what is this"),
    "RuntimeError": RuntimeError("the simulator has crashed"),
}


class Short(gym.Env):
    """Episodes of four steps, each with reward 1, that a time limit ends."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, continuous: bool):
        self.action_space = (
            spaces.Box(-1, 1, (1,), np.float32) if continuous else spaces.Discrete(2)
        )
        self.t = 0

    def observe(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def reward(self) -> float:
        return 1.0

    def step(self, action):
        self.t += 1
        return self.observe(), self.reward(), False, self.t % 4 == 0, {}


class Failing(Short):
    """Raises an error in its twentieth step, or while it is made."""

    def __init__(self, continuous: bool, error: str, at_once: bool = False):
        super().__init__(continuous)
        self.error = ERRORS[error]
        self.steps = 0
        if at_once:
            raise self.error

    def reward(self):
        self.steps += 1
        if self.steps == 20:
            raise self.error
        return 1.0


class Fading(Short):
    """Each episode of an environment pays less than the one before."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        return super().reset(seed=seed)

    def reward(self):
        return -float(self.episodes)


class Clockwork(Short):
    """Shows the time, pays the action, and draws no random number."""

    def observe(self):
        return np.array([np.cos(self.t), np.sin(self.t)], np.float32)

    def step(self, action):
        _, _, *rest = super().step(action)
        return self.observe(), float(np.sum(action)), *rest


class Endless(Short):
    """No episode ends."""

    def step(self, action):
        return self.observe(), 1.0, False, False, {}


class Single(Short):
    """Can be open only once at a time, like a simulator with a port of its own."""

    is_open = False

    def __init__(self, continuous: bool):
        super().__init__(continuous)
        if Single.is_open:
            raise RuntimeError("the simulator is already running")
        Single.is_open = True

    def close(self):
        Single.is_open = False


class Ranked(Short):
    """The reward is the number of the process; every seed is noted in the file `seeds`."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            with open("seeds", "a") as file:
                file.write(f"{seed}\n")
        return super().reset(seed=seed)

    def reward(self):
        return float(os.environ.get("RANK", 0))


class Wide(Short):
    """`Short` with more numbers in an observation."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def observe(self):
        return np.zeros(3, np.float32)


for kind in ("Discrete", "Continuous"):
    kwargs = {"continuous": kind == "Continuous"}
    for env in (Short, Fading, Clockwork, Endless, Single, Ranked, Wide):
        gym.register(f"trouble/{env.__name__}{kind}-v0", env, kwargs=kwargs)
    for error in ERRORS:
        options = kwargs | {"error": error}
        gym.register(f"trouble/{error}{kind}-v0", Failing, kwargs=options)
        gym.register(f"trouble/{error}AtOnce{kind}-v0", Failing, kwargs=options | {"at_once": True})
