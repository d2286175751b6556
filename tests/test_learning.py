"""Whole runs of `train` on tasks whose answer is known."""

import numpy as np
import pytest
import torch

PROBE = dict(
    num_envs=8,
    num_steps=32,
    num_minibatches=4,
    gamma=0.9,
    norm_reward=False,  # so that values are in the units of the reward
    total_timesteps=8_000,
    learning_rate=3e-3,
)


def values(agent, *observations: float) -> list[float]:
    with torch.no_grad():
        return agent.get_value(agent.normalize(torch.tensor(observations)[:, None])).tolist()


def greedy(agent, *observations: float) -> list[bool]:
    """Whether the greedy action is the high one."""
    action = agent.act(np.array(observations, np.float32)[:, None])
    return [np.asarray(a).item() > 0 for a in agent.to_env(action)]


def test_value_of_a_constant_reward(script, args):
    agent = script.train(args("ConstantReward", **PROBE))["agent"]
    assert values(agent, 0) == pytest.approx([1], abs=0.02)


def test_value_of_an_observed_reward(script, args):
    agent = script.train(args("ObservedReward", **PROBE))["agent"]
    assert values(agent, -1, 1) == pytest.approx([-1, 1], abs=0.02)


def test_value_is_discounted(script, args):
    agent = script.train(args("TwoSteps", **PROBE))["agent"]
    assert values(agent, 0, 1) == pytest.approx([0.9, 1], abs=0.02)


def test_action_that_pays_is_chosen(script, args):
    agent = script.train(args("ActionReward", **PROBE))["agent"]
    assert greedy(agent, 0) == [True]
    assert values(agent, 0)[0] > 0.9


def test_action_that_pays_depends_on_the_observation(script, args):
    agent = script.train(args("MatchReward", **PROBE))["agent"]
    assert greedy(agent, -1, 1) == [False, True]
    assert min(values(agent, -1, 1)) > 0.9


def test_value_of_an_endless_task_ignores_the_time_limit(script, args):
    """Five steps an episode, yet V = 1 / (1 - gamma) = 10; taken for an end, 1 to 4.1."""
    options = PROBE | {"total_timesteps": 16_000}
    agent = script.train(args("Endless", **options))["agent"]
    assert values(agent, 0) == pytest.approx([10], abs=0.3)


# The greedy return of a random policy is about 22 on CartPole and -1200 on Pendulum.
@pytest.mark.parametrize(
    ("name", "env_id", "options", "at_least"),
    [
        ("ppo_discrete", "CartPole-v1", {"total_timesteps": 50_000}, 400),
        ("ppo_continuous", "Pendulum-v1", {"total_timesteps": 100_000, "gamma": 0.95}, -300),
    ],
)
def test_learns(tmp_path, name, env_id, options, at_least):
    script = __import__(name)
    args = script.Args(env_id=env_id, run_dir=str(tmp_path / "run"), **options)
    result = script.train(args)
    assert 0 <= result["global_step"] - args.total_timesteps < args.num_envs * args.num_steps
    assert len(result["eval_returns"]) == args.eval_episodes
    assert np.mean(result["eval_returns"]) >= at_least


def test_learning_rate_falls_linearly_to_0_or_stays(script, args, tmp_path, monkeypatch):
    rates = []
    update = script.update

    def watch(agent, optimizer, *given):
        rates.append(optimizer.lr)
        return update(agent, optimizer, *given)

    monkeypatch.setattr(script, "update", watch)
    options = dict(num_envs=2, num_steps=32, total_timesteps=640, num_minibatches=2)
    script.train(args("Endless", **options))
    first = script.Args.learning_rate
    assert rates[0] == first and 0 < rates[-1] <= first * 64 / 640
    # two environments, five of six rows real: 52 to 56 of an iteration's 64 rows
    steps_between = -np.diff(rates) / first * 640
    np.testing.assert_allclose(steps_between, steps_between.round(), atol=1e-6)
    assert set(steps_between.round()) <= {52, 54, 56}
    rates.clear()
    script.train(args("Endless", **options, anneal_lr=False, run_dir=str(tmp_path / "b")))
    assert set(rates) == {first}
