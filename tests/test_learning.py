"""Whole runs of `train` on tasks whose answer is known."""

import importlib
import random

import numpy as np
import pytest
import torch
from envs import Dice

PROBE = dict(
    num_envs=8,
    num_steps=32,
    num_minibatches=2,
    gamma=0.9,
    total_timesteps=3_000,
    learning_rate=1e-2,
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
    agent = script.train(args("ObservedReward", **PROBE))
    assert values(agent, -1, 1) == pytest.approx([-1, 1], abs=0.03)


def test_value_is_discounted(script, args):
    agent = script.train(args("TwoSteps", **PROBE))
    assert values(agent, 0, 1) == pytest.approx([0.9, 1], abs=0.03)


def test_action_that_pays_depends_on_the_observation(script, args):
    agent = script.train(args("MatchReward", **PROBE))
    assert greedy(agent, -1, 1) == [False, True]
    assert min(values(agent, -1, 1)) > 0.9


def test_value_of_an_endless_task_ignores_the_time_limit(script, args):
    """Five steps an episode, yet V = 1 / (1 - gamma) = 10; taken for an end, 1 to 4.1."""
    agent = script.train(args("Endless", **PROBE | {"total_timesteps": 6_000}))
    assert values(agent, 0) == pytest.approx([10], abs=0.2)


# The greedy return of a random policy is about 22 on CartPole and -1200 on Pendulum.
@pytest.mark.parametrize(
    ("name", "env_id", "options", "at_least"),
    [
        ("ppo_discrete", "CartPole-v1", {"total_timesteps": 30_000}, 400),
        ("ppo_continuous", "Pendulum-v1", {"total_timesteps": 40_000, "gamma": 0.9}, -300),
    ],
)
def test_learns(tmp_path, name, env_id, options, at_least):
    script = importlib.import_module(name)
    sizes = dict(num_envs=8, num_steps=128, num_minibatches=4, learning_rate=2e-3)
    args = script.Args(env_id=env_id, run_dir=str(tmp_path / "run"), **sizes, **options)
    steps = script.train(args).obs_stats.sums[0].max()
    assert 0 <= steps - args.total_timesteps < args.num_envs * args.num_steps
    assert script.evaluate(args, f"{args.run_dir}/checkpoint.pt") >= at_least


# Environments and agents of one's own


def vector(agent) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach()


SMALL = dict(num_envs=3, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=4 * 48)


def test_random_numbers_of_an_environment_depend_on_the_seed_alone(script, args, tmp_path):
    """Those of NumPy, Python and PyTorch, in its constructor too, and none twice."""
    runs, draws = [], []
    for run, seed in enumerate([1, 1, 2]):
        random.seed(run)
        np.random.seed(run)
        torch.manual_seed(run)
        Dice.drawn.clear()
        agent = script.train(args("Dice", **SMALL, seed=seed, run_dir=str(tmp_path / str(run))))
        runs.append(vector(agent))
        draws.append([*Dice.drawn])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert draws[0] == draws[1] and len(draws[0]) > 3 + 192
    for column in range(3):
        assert len({numbers[column] for numbers in draws[0] + draws[2]}) == 2 * len(draws[0])


def test_an_environment_may_learn(script, args):
    """It runs with gradients on, in training and in evaluation."""
    options = args("Learner", **SMALL, eval_episodes=2)
    script.train(options)
    assert script.evaluate(options, f"{options.run_dir}/checkpoint.pt") == 6


def test_an_agent_may_have_parameters_that_the_loss_does_not_need(script, args, monkeypatch):
    class Headed(script.Agent):
        def __init__(self, *given):
            super().__init__(*given)
            self.head = torch.nn.Linear(3, 2)
            self.start = [parameter.clone() for parameter in self.parameters()]

    monkeypatch.setattr(script, "Agent", Headed)
    agent = script.train(args("MatchReward", **SMALL))
    for (name, parameter), before in zip(agent.named_parameters(), agent.start, strict=True):
        assert torch.equal(parameter, before) == name.startswith("head."), name
