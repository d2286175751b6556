"""Whole runs of `train` on tasks whose answer is known."""

import numpy as np
import pytest
import torch

PROBE = dict(
    num_envs=8,
    num_steps=32,
    num_minibatches=4,
    gamma=0.9,
    total_timesteps=8_000,
    learning_rate=3e-3,
)


def values(agent, *observations: float) -> list[float]:
    """V in the units of the reward."""
    with torch.no_grad():
        scaled = agent.critic(agent.normalize(np.array(observations)[:, None])).squeeze(-1)
    return (scaled * agent.return_stats.std).tolist()


def greedy(agent, *observations: float) -> list[bool]:
    """Whether the greedy action is the high one."""
    return [np.asarray(action).item() > 0 for action in agent.act(np.array(observations)[:, None])]


def test_value_of_an_observed_reward(script, args):
    agent = script.train(args("ObservedReward", **PROBE))["agent"]
    assert values(agent, -1, 1) == pytest.approx([-1, 1], abs=0.03)


def test_value_is_discounted(script, args):
    agent = script.train(args("TwoSteps", **PROBE))["agent"]
    assert values(agent, 0, 1) == pytest.approx([0.9, 1], abs=0.03)


def test_action_that_pays_depends_on_the_observation(script, args):
    agent = script.train(args("MatchReward", **PROBE))["agent"]
    assert greedy(agent, -1, 1) == [False, True]
    assert min(values(agent, -1, 1)) > 0.9


def test_value_of_an_endless_task_ignores_the_time_limit(script, args):
    """Five steps an episode, yet V = 1 / (1 - gamma) = 10; taken for an end, 1 to 4.1."""
    options = PROBE | {"total_timesteps": 16_000}
    agent = script.train(args("Endless", **options))["agent"]
    assert values(agent, 0) == pytest.approx([10], abs=0.4)


# The greedy return of a random policy is about 22 on CartPole and -1200 on Pendulum.
@pytest.mark.parametrize(
    ("name", "env_id", "options", "at_least"),
    [
        ("ppo_discrete", "CartPole-v1", {"total_timesteps": 60_000}, 400),
        ("ppo_continuous", "Pendulum-v1", {"total_timesteps": 100_000, "gamma": 0.95}, -300),
    ],
)
def test_learns(tmp_path, name, env_id, options, at_least):
    script = __import__(name)
    args = script.Args(env_id=env_id, run_dir=str(tmp_path / "run"), **options)
    result = script.train(args)
    assert 0 <= result["global_step"] - args.total_timesteps < args.num_envs * args.num_steps
    assert result["eval_return"] >= at_least
