"""What reaches learning from the environments: every step once, and nothing that is no step."""

import copy

import numpy as np
import pytest
import torch
from conftest import collect, spy, start
from envs import END, Noise


def counted(num_rows: int, gamma: float) -> dict[str, np.ndarray]:
    """What `Counting` does from its start: reward t + 1, episodes of 1, 2, 3, 4, 1, ... steps."""
    rows, episode = [], 0
    while len(rows) < num_rows:
        length = episode % 4 + 1
        for t in range(length):
            done = t + 1 == length
            row = dict(obs=t, next_obs=t + 1 + END * done, rewards=t + 1)
            row |= dict(done=done, terminated=done and episode % 3 > 0, episodic_length=t + 1)
            row["episodic_return"] = sum(range(t + 2))
            row["discounted_returns"] = sum(gamma**k * (t + 1 - k) for k in range(t + 1))
            rows.append(row)
        episode += 1
    return {name: np.array([row[name] for row in rows[:num_rows]]) for name in rows[0]}


def test_rollouts_hold_what_happened(script, args):
    # 9 rows do not divide the period of 10, so that episodes end in any row of a rollout
    options = args("Counting", num_envs=3, num_steps=9, gamma=0.9)
    envs, agent, *_ = start(script, options)
    assert envs.metadata["autoreset_mode"].name == "DISABLED"
    rollouts = collect(script, envs, agent, options)
    parts = [next(rollouts) for _ in range(6)]
    envs.close()
    assert all(len(column) == 9 for part in parts for column in part.values())
    got = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    actions = agent.to_env(got.pop("actions").numpy())
    expected = counted(6 * 9, gamma=0.9)
    assert (got["obs"] < END).all() and got.keys() == expected.keys()
    assert expected["done"][8::9].any(), "no episode ends in a rollout's last row"
    assert 0 < expected["terminated"].sum() < expected["done"].sum()
    for name, column in expected.items():
        shape = (54, 3, 1) if "obs" in name else (54, 3)
        column = np.broadcast_to(column.reshape(54, *[1] * (len(shape) - 1)), shape)
        np.testing.assert_allclose(got[name], column, rtol=1e-6, err_msg=name)
        assert (got[name].dtype == torch.bool) == (name in ("done", "terminated"))
    played = [env.unwrapped.actions for env in envs.unwrapped.envs]
    np.testing.assert_array_equal(np.stack(played, axis=1), actions)


def deviation_of_discounted_returns(logs, gamma: float) -> float:
    """Of G <- gamma G + r, from 0 in every episode, over all steps."""
    discounted = []
    for log in logs:
        so_far = 0.0
        for _, reward, ended in log:
            so_far = gamma * so_far + reward
            discounted.append(so_far)
            so_far = 0.0 if ended else so_far
    return np.std(discounted)


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_training_learns_from_every_step_once_an_epoch(script, args, scale, monkeypatch):
    """Three iterations of two epochs, against what the environments themselves noted."""
    monkeypatch.setattr(Noise, "scale", scale)
    made, losses = spy(script, "make_envs", monkeypatch), spy(script, "ppo_loss", monkeypatch)
    options = args("Noise", num_envs=3, num_steps=14, num_minibatches=4, update_epochs=2)
    options.gamma, options.total_timesteps = 0.9, 3 * 42
    agent = script.train(options)
    logs = [single.unwrapped.log for single in made[0][1].unwrapped.envs]
    assert [len(log) for log in logs] == [42] * 3
    obs = np.array([[step[0] for step in log] for log in logs]).T  # [step, environment]
    assert np.unique(obs).size == 126

    orders = []
    for k in range(3):
        before, raw = obs[: 14 * k], obs[14 * k : 14 * k + 14].flatten()
        mean, std = (before.mean(), before.std()) if k else (0, 1)  # of past iterations
        expected = ((raw - mean) / std).clip(-10, 10).astype(np.float32)
        for epoch in range(2):
            columns = [given["obs"].flatten() for given, _ in losses[8 * k + 4 * epoch :][:4]]
            assert [len(column) for column in columns] == [11, 11, 10, 10]
            seen = torch.cat(columns).numpy()
            orders.append(np.abs(seen[:, None] - expected).argmin(axis=1).tolist())
            atol = 1e-6 * seen.std()
            np.testing.assert_allclose(seen, expected[orders[-1]], rtol=1e-4, atol=atol)
    assert len(losses) == 24 and all(sorted(order) == [*range(42)] for order in orders)
    assert len({*map(tuple, orders)}) == 6  # shuffled, and never twice in the same way

    stats = agent.obs_stats
    assert stats.sums[0] == agent.return_stats.sums[0] == 126
    np.testing.assert_allclose([stats.mean.item(), stats.std.item()], [obs.mean(), obs.std()])
    expected = deviation_of_discounted_returns(logs, gamma=0.9)
    np.testing.assert_allclose(agent.return_stats.std.item(), expected)
    saved = torch.load(f"{options.run_dir}/checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 126
    returns, so_far = [], np.zeros(3)
    for t, i in np.ndindex(42, 3):
        _, reward, ended = logs[i][t]
        so_far[i] += reward
        if ended:
            returns.append(so_far[i])
            so_far[i] = 0
    assert saved["progress"]["returns"] == pytest.approx(returns[-100:])


def learn(script, options, updates: int = 1, learning_rate=1e-3):
    """Minibatches of each `update`, agent and rollout before it; what came of all; gradients."""
    envs, agent, params, optimizer = start(script, options, learning_rate)
    rollouts, log = collect(script, envs, agent, options), None
    minibatches, before, gradients = [], [], []

    def watch(agent, args, minibatch):
        minibatches[-1].append(minibatch)
        grad, log = script.gradient(agent, args, minibatch)
        gradients.append((grad.clone(), log))
        return grad, log

    for _ in range(updates):
        rollout = next(rollouts)
        minibatches.append([])
        before.append((copy.deepcopy(agent), rollout))
        log = script.update(agent, params, optimizer, rollout, options, watch)
    envs.close()
    return minibatches, before, agent, params, log, gradients


def test_advantages_and_targets_are_those_of_the_rollout(script, args):
    """By the policy and V before the first gradient step, which `clip_vloss` clips around, too."""
    options = args("Noise", num_envs=4, num_steps=16, num_minibatches=4, update_epochs=3)
    options.clip_vloss, options.gamma, options.gae_lambda = True, 0.9, 0.8
    updates, before, agent, *_ = learn(script, options, updates=3)
    later = [old for old, _ in before[1:]] + [agent]  # which have seen the rollout's rewards
    for minibatches, (old, rollout), new in zip(updates, before, later, strict=True):
        with torch.no_grad():
            values, after = (
                old.critic(old.normalize(rollout[name])).squeeze(-1).numpy()
                for name in ("obs", "next_obs")
            )
        rewards, terminated, done = (
            rollout[name].numpy() for name in ("rewards", "terminated", "done")
        )
        deltas = (
            rewards / new.return_stats.std.item() + 0.9 * np.where(terminated, 0, after) - values
        )
        expected = np.zeros((16, 4))
        for t, i in np.ndindex(16, 4):
            end = next((k for k in range(t, 16) if done[k, i]), 15)
            expected[t, i] = sum(0.72 ** (k - t) * deltas[k, i] for k in range(t, end + 1))
        assert done.any() and (terminated != done).any() and terminated.any()

        assert len(minibatches) == 12
        obs, actions, logprobs, old_values, advantages, targets = (
            torch.cat([minibatch[name] for minibatch in minibatches])
            for name in "obs actions old_logprobs old_values advantages targets".split()
        )
        with torch.no_grad():
            logprobs_then, _ = old.get_logprob_and_entropy(obs, actions)
            torch.testing.assert_close(logprobs, logprobs_then)
            torch.testing.assert_close(old_values, old.critic(obs).squeeze(-1))
        torch.testing.assert_close(targets, advantages + old_values)
        # as observations are, so are these in the same rows
        row = (obs - old.normalize(rollout["obs"]).flatten()).abs().argmin(dim=1)
        np.testing.assert_allclose(advantages, expected.flatten()[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("center", [0.0, 100.0])
def test_rewards_of_any_size_are_divided_by_the_deviation(script, args, center, monkeypatch):
    """Of discounted returns. 1e39 is more than a float32 holds."""
    collected = spy(script, "make_envs", monkeypatch)
    advantages, parameters = spy(script, "compute_gae", monkeypatch), []
    scales = (1.0, 1e-20, 1e-8, 1e8, 1e20, 1e39)
    for scale in scales:
        monkeypatch.setattr(Noise, "reward_scale", scale)
        monkeypatch.setattr(Noise, "reward_center", center * scale)
        path = f"{args('Noise').run_dir}/{scale}"
        options = args("Noise", num_envs=3, num_steps=14, num_minibatches=2, run_dir=path)
        options.update_epochs, options.gamma, options.total_timesteps = 2, 0.9, 2 * 42
        agent = script.train(options)
        parameters.append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach())
        logs = [single.unwrapped.log for single in collected[-1][1].unwrapped.envs]
        for k in range(2):
            std = deviation_of_discounted_returns([log[: 14 * k + 14] for log in logs], gamma=0.9)
            expected = np.array([[step[1] for step in log[14 * k :][:14]] for log in logs]).T / std
            got = advantages[k - 2][0]["rewards"]
            np.testing.assert_allclose(got, expected, rtol=1e-5)
    for other in parameters[1:]:
        torch.testing.assert_close(other, parameters[0], rtol=1e-3, atol=1e-5)


def test_a_high_score_at_every_end_still_tells_actions_apart(script, args, monkeypatch):
    """Episodes of one step that pay 100 less an error: what V is to learn has deviation 1."""
    losses = spy(script, "ppo_loss", monkeypatch)
    options = args("NearlyHundred", num_envs=4, num_steps=32, num_minibatches=1, update_epochs=1)
    options.total_timesteps = 128
    script.train(options)
    targets = losses[0][0]["targets"]
    assert len(targets.unique()) == 128
    assert targets.std(correction=0).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_a_gradient_step_is_clipped_and_that_of_adam(script, args, max_grad_norm):
    """As `torch.optim.Adam` and `clip_grad_norm_` would do it, parameter by parameter."""
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=4, update_epochs=2)
    options.max_grad_norm = max_grad_norm
    _, ((twin, _),), agent, params, _, gradients = learn(script, options)
    stock = torch.optim.Adam(twin.parameters(), 1e-3, eps=1e-5)
    assert len(gradients) == 8
    for gradient, _ in gradients:
        assert 1e-3 < gradient.norm() < 1e3
        parts = gradient.split([parameter.numel() for parameter in twin.parameters()])
        for parameter, part in zip(twin.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        stock.step()
    for expected, got in zip(twin.parameters(), agent.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    assert params.grad.norm() <= max_grad_norm * 1.001


def test_what_is_logged_is_of_the_last_minibatch(script, args):
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=2, update_epochs=4)
    options.clip_coef = 0.02
    updates, _, _, _, log, _ = learn(script, options, learning_rate=1e-2)
    envs, agent, params, optimizer = start(script, options, 1e-2)  # the same once more, by hand
    envs.close()
    for minibatch in updates[0]:
        _, expected = script.ppo_loss(agent, options, **minibatch)
        gradient, _ = script.gradient(agent, options, minibatch)
        params.grad = gradient * min(1, 0.5 / (gradient.norm().item() + 1e-6))
        optimizer.step()
    advantages, targets = (
        torch.cat([minibatch[name] for minibatch in updates[0][:2]])  # of an epoch: of all
        for name in ("advantages", "targets")
    )
    expected["losses/explained_variance"] = 1 - advantages.var() / targets.var()
    assert expected["losses/clipfrac"] > 0.1
    assert log.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(log[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_target_kl_ends_the_epochs(script, args):
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=2, update_epochs=50)
    options.target_kl = 0.002
    updates, _, _, _, log, gradients = learn(script, options, learning_rate=3e-3)
    assert 4 <= len(updates[0]) < 100 and len(updates[0]) % 2 == 0
    *before, last = (log["losses/approx_kl"] for _, log in gradients[1::2])  # of each epoch
    assert max(before) <= 0.002 < last == log["losses/approx_kl"]


# Values that are not finite


def test_what_is_seen_after_a_termination_changes_nothing(script, args, monkeypatch):
    """NaN and infinities either: nothing needs it."""
    runs = []
    losses = spy(script, "ppo_loss", monkeypatch)
    for last in (0.0, np.nan, np.inf, -np.inf):
        losses.clear()
        monkeypatch.setattr(Noise, "after_termination", last)
        path = f"{args('Noise').run_dir}/{last}"
        options = args("Noise", num_envs=3, num_steps=14, num_minibatches=2, run_dir=path)
        options.total_timesteps = 3 * 42
        agent = script.train(options)
        advantages = torch.cat([given["advantages"] for given, _ in losses])
        parameters = torch.nn.utils.parameters_to_vector(agent.parameters())
        runs.append([advantages, parameters.detach(), agent.obs_stats.std])
    for run in runs:
        assert all(part.isfinite().all() for part in run)
        assert all(torch.equal(part, first) for part, first in zip(run, runs[0], strict=True))


TROUBLE = [
    ("Fine", dict(obs=np.nan), ": obs [nan], reward 0.0"),
    ("Fine", dict(obs=np.inf), ": obs [inf], reward 0.0"),
    ("Fine", dict(obs=np.nan, truncated=True), ": obs [nan], reward 0.0"),  # V needs it
    ("Fine", dict(reward=np.inf), ": obs [0.0], reward inf"),
    ("Fine", dict(reward=np.nan, terminated=True), ": obs [0.0], reward nan"),
    ("Fine", dict(first=np.nan), "obs [nan]"),
    ("Wide", dict(obs=np.nan), "nan"),
]


@pytest.mark.filterwarnings("ignore:.*not within the observation space")
@pytest.mark.parametrize(("env", "trouble", "words"), TROUBLE)
def test_what_is_not_finite_names_its_environment_in_one_line(script, args, env, trouble, words):
    options = args(env, num_envs=4, num_steps=16)
    envs, agent, *_ = start(script, options)
    for name, value in trouble.items():
        setattr(envs.unwrapped.envs[2].unwrapped, name, value)
    with pytest.raises(SystemExit) as stop:
        next(collect(script, envs, agent, options))
    envs.close()
    assert stop.value.code.startswith("error: environment 2") and words in stop.value.code
    assert "\n" not in stop.value.code
