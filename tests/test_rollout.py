"""What reaches learning from the environments: every step, and no reset row."""

import copy

import numpy as np
import pytest
import torch
from conftest import start
from envs import END

MODES = [("Counting", "sync"), ("Counting", "async"), ("CountingVector", "auto")]


def true_log(num_rows: int) -> list[tuple[float, float, bool] | None]:
    """What `Counting` does in each row from its start: observation, reward, end, or None: reset."""
    rows, episode = [], 0
    while len(rows) < num_rows:
        length = episode % 4 + 1
        rows += [(float(t), t + 1.0, t + 1 == length) for t in range(length)] + [None]
        episode += 1
    return rows[:num_rows]


@pytest.mark.parametrize(("env", "mode"), MODES)
def test_rollouts_hold_what_happened(script, args, env, mode):
    # 9 rows do not divide the period of 14, so that episodes end in any row of a rollout
    options = args(env, vectorization_mode=mode, num_envs=3, num_steps=9, gamma=0.9)
    envs, agent, *_ = start(script, options)
    rollouts = script.collect(envs, agent, 1, options)
    truth, before, got_episodes, got_steps, row = true_log(6 * 9), 0, [], 0, 0
    assert any(step is None for step in truth[9::9]), "no episode ends in a rollout's last row"
    expected_episodes, discounted, total = [], 0.0, 0
    terminated_too = []
    for _ in range(6):
        (obs, resets, actions, rewards, terminations, returns), steps, episodes = next(rollouts)
        assert obs.shape == (10, 3, 1) and resets.shape == (10, 3)
        assert actions.shape[:2] == rewards.shape == terminations.shape == returns.shape == (9, 3)
        for t in range(9):
            step, row = truth[row], row + 1
            if step is None:  # known although the end was in another rollout
                assert resets[t].all() and not resets[t + 1].any()
                assert (obs[t] >= END).all() and not terminations[t].any()
                discounted = 0.0
                continue
            start_of_step, reward, ends = step
            discounted = reward + 0.9 * discounted
            assert not resets[t].any() and (resets[t + 1] == ends).all()
            assert (obs[t] == start_of_step).all() and (rewards[t] == reward).all()
            # the successor is what the step itself led to, at an episode's end too
            assert (obs[t + 1] == start_of_step + 1 + END * ends).all()
            torch.testing.assert_close(returns[t], torch.full((3,), discounted))
            total += 3
            if ends:
                length = int(start_of_step) + 1
                expected_episodes += [(total, length * (length + 1) / 2, length)] * 3
                terminated_too.append(terminations[t].all())
            else:
                assert not terminations[t].any()
        got_episodes += [(before + end, value, length) for end, value, length in episodes]
        before += steps
        got_steps += steps
    envs.close()
    assert got_steps == total and got_episodes == expected_episodes
    assert any(terminated_too) and not all(terminated_too)  # time limits are no terminations


@pytest.mark.parametrize("env", ["Counting", "CountingVector"])
def test_training_learns_from_real_steps_only(script, args, env, monkeypatch):
    """After `train`, compare what was learned from with the environments' own logs."""
    made, seen, shapes, make_envs, gradient = [], [], set(), script.make_envs, script.gradient

    def keep_envs(*given, **options):
        made.append(make_envs(*given, **options))
        return made[-1]

    def watch(agent, args, x, *columns):
        seen.append(x * agent.obs_stats.std + agent.obs_stats.mean)  # not normalised any more
        shapes.add(tuple(column.shape for column in columns))
        return gradient(agent, args, x, *columns)

    monkeypatch.setattr(script, "make_envs", keep_envs)
    monkeypatch.setattr(script, "gradient", watch)
    options = args(env, num_envs=3, num_steps=14, num_minibatches=2, update_epochs=2, gamma=0.9)
    options.total_timesteps = 100
    result = script.train(options)
    logs = [single.unwrapped.log for single in made[1].unwrapped.envs]
    steps = [step for log in logs for step in log]
    assert result["global_step"] == len(steps) >= 100
    assert len(shapes) == 1  # of minibatches: it does not depend on the data

    # in each epoch, each step of the iteration once, and a few a second time
    obs = np.array([before for before, _, _ in steps])
    iterations = len(seen) // 4
    for i in range(iterations):
        part = np.concatenate(
            [[before for before, _, _ in log[10 * i : 10 * i + 10]] for log in logs]
        )
        for epoch in range(2):
            got = torch.cat(seen[4 * i + 2 * epoch :][:2]).round().flatten().tolist()
            assert len(got) == 42 and max(got) < END
            counts = {value: got.count(value) for value in {*got}}
            for value in {*part}:
                n = int((part == value).sum())
                assert n <= counts.pop(value) <= 2 * n
            assert not counts

    stats = result["agent"].obs_stats
    assert stats.sums[0].item() == len(obs) and obs.max() < END
    np.testing.assert_allclose([stats.mean.item(), stats.std.item()], [obs.mean(), obs.std()])

    # discounted returns, G <- gamma G + r, from 0 in every episode
    discounted = []
    for log in logs:
        so_far = 0.0
        for _, reward, ended in log:
            so_far = 0.9 * so_far + reward
            discounted.append(so_far)
            so_far = 0.0 if ended else so_far
    stats = result["agent"].return_stats
    assert stats.sums[0] == len(discounted)
    np.testing.assert_allclose(stats.std.item(), np.std(discounted), rtol=1e-6)


def learn(script, options, updates: int = 1, change=None, learning_rate=1e-3):
    """Minibatches of each `update` from now on, the agent, what was logged and the gradients."""
    envs, agent, params, optimizer = start(script, options, learning_rate)
    rollouts, gradient, log = script.collect(envs, agent, 1, options), script.gradient, None
    minibatches, before, gradients = [], [], []

    def watch(agent, args, *columns):
        minibatches[-1].append(columns)
        got = gradient(agent, args, *columns)
        gradients.append(got[0])
        return got

    for _ in range(updates):
        rollout, *_ = next(rollouts)
        if change:
            change(*rollout)
        minibatches.append([])
        before.append((copy.deepcopy(agent), rollout))
        log = script.update(agent, params, optimizer, rollout, options, watch)
    envs.close()
    return minibatches, before, agent, params, log, gradients


def test_every_epoch_compares_with_the_policy_and_values_of_the_rollout(script, args):
    """What `clip_vloss` clips around, too: what V said before the first gradient step."""
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=4, update_epochs=3)
    options.clip_vloss = True
    updates, before, *_ = learn(script, options, updates=3)
    for minibatches, (old_agent, _) in zip(updates, before, strict=True):
        assert len(minibatches) == 12
        for x, actions, logprobs, values, advantages, returns in minibatches:
            with torch.no_grad():
                expected, _ = old_agent.get_logprob_and_entropy(x, actions)
                torch.testing.assert_close(logprobs, expected)
                torch.testing.assert_close(values, old_agent.critic(x).squeeze(-1))
            torch.testing.assert_close(returns, advantages + values)


def test_rewards_are_divided_by_the_deviation_of_the_return_and_clipped(script, args):
    options = args("Counting", num_envs=2, num_steps=9, gamma=0.0, gae_lambda=0.0)
    options.num_minibatches = options.update_epochs = 1

    def change(obs, resets, actions, rewards, terminations, discounted):
        rewards[0, 0] = 1e6

    updates, ((_, rollout),), agent, *_ = learn(script, options, change=change)
    (*_, returns) = updates[0][0]
    _, resets, _, rewards, _, discounted = rollout
    real = ~resets[:-1]
    expected = np.clip(rewards[real].numpy() / discounted[real].numpy().std(), -10, 10)
    assert expected.max() == 10
    # with gamma = 0 the return of a step is its reward
    np.testing.assert_allclose(np.unique(returns), np.unique(expected), rtol=1e-5)


def test_observations_are_normalised_and_clipped(script, args):
    _, agent, *_ = start(script, args("Counting", num_envs=2))
    data = torch.tensor([[2.0], [4.0], [6.0], [8.0]])
    torch.testing.assert_close(agent.normalize(data), data)
    agent.obs_stats.update(data)
    torch.testing.assert_close(agent.normalize(data), (data - 5) / np.sqrt(5))
    assert agent.normalize(torch.tensor([[1e6], [-1e6]])).tolist() == [[10], [-10]]


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_a_gradient_step_is_clipped_and_that_of_adam(script, args, max_grad_norm):
    """As `torch.optim.Adam` and `clip_grad_norm_` would do it, parameter by parameter."""
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=4, update_epochs=2)
    options.max_grad_norm = max_grad_norm
    _, ((twin, _),), agent, params, _, gradients = learn(script, options)
    stock = torch.optim.Adam(twin.parameters(), 1e-3, eps=1e-5)
    assert len(gradients) == 8
    for gradient in gradients:
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
    updates, ((_, rollout), *_), _, _, log, _ = learn(script, options, learning_rate=1e-2)
    envs, agent, params, optimizer = start(script, options, 1e-2)  # the same once more, by hand
    envs.close()
    for minibatch in updates[0]:
        loss_log = script.ppo_loss(agent, options, *minibatch)[1]
        x, actions, logprobs, *_ = minibatch
        with torch.no_grad():
            logratios = agent.get_logprob_and_entropy(x, actions)[0] - logprobs
        gradient, _ = script.gradient(agent, options, *minibatch)
        params.grad = gradient * min(1, 0.5 / (gradient.norm().item() + 1e-6))
        optimizer.step()
    ratios = logratios.exp()
    expected = {
        "losses/policy_loss": loss_log["policy_loss"].item(),
        "losses/value_loss": loss_log["value_loss"].item(),
        "losses/entropy": loss_log["entropy"].item(),
        "losses/old_approx_kl": -logratios.mean().item(),
        "losses/approx_kl": (ratios - 1 - logratios).mean().item(),
        "losses/clipfrac": ((ratios - 1).abs() > 0.02).float().mean().item(),
    }
    real = int((~rollout[1][:-1]).sum())  # these many come first in an epoch, each once
    *_, advantages, returns = (torch.cat(c)[:real] for c in zip(*updates[0][:2], strict=True))
    expected["losses/explained_variance"] = 1 - (advantages.var() / returns.var()).item()
    assert expected["losses/clipfrac"] > 0.1
    assert log == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_target_kl_ends_the_epochs(script, args):
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=2, update_epochs=50)
    options.target_kl = 0.01
    updates, _, _, _, log, _ = learn(script, options, learning_rate=3e-3)
    assert 2 <= len(updates[0]) < 100 and log["losses/approx_kl"] > 0.01
