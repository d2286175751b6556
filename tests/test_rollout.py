"""What reaches learning from the environments: every step, and no reset row."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import END, Seeds, Strict
from gymnasium import spaces

MODES = [("Counting", "sync"), ("Counting", "async"), ("CountingVector", "auto")]


def start(script, args):
    """The environments, an agent for them, and where they are after a reset."""
    envs = script.make_envs(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    obs, _ = envs.reset(seed=1)
    n = args.num_envs
    return envs, agent, (script.flat(obs), np.zeros(n, bool), np.zeros(n, np.float32))


def rollouts(script, args, count: int):
    """`count` consecutive rollouts of a fresh agent, that agent, and the episodes that ended."""
    envs, agent, state = start(script, args)
    got, episodes, global_step = [], [], 0
    for _ in range(count):
        rollout, state, ended = script.collect(envs, agent, state, global_step, args)
        global_step += int(rollout.is_real.sum())
        got.append(rollout)
        episodes += ended
    envs.close()
    return got, agent, episodes


def true_log(num_rows: int) -> list[tuple[float, float, bool] | None]:
    """What `Counting` does in each row from its start: observation, reward, end, or None: reset."""
    rows, episode = [], 0
    while len(rows) < num_rows:
        length = episode % 4 + 1
        rows += [(float(t), t + 1.0, t + 1 == length) for t in range(length)] + [None]
        episode += 1
    return rows[:num_rows]


@pytest.mark.parametrize(("env", "mode"), MODES)
def test_reset_rows_are_known_across_rollouts(script, args, env, mode):
    # 9 rows do not divide the period of 14, so that episodes end in any row of a rollout
    options = args(env, vectorization_mode=mode, num_envs=3, num_steps=9, gamma=0.9)
    got, _, _ = rollouts(script, options, 6)
    truth = true_log(6 * 9)
    assert any(row is None for row in truth[9::9]), "no episode ends in the last row of a rollout"
    is_real = torch.cat([rollout.is_real for rollout in got])
    obs = torch.cat([rollout.obs[:-1] for rollout in got])
    rewards = torch.cat([rollout.rewards[:-1] for rollout in got])
    dones = torch.cat([rollout.resets[1:] for rollout in got])
    for t, row in enumerate(truth):
        if row is None:
            assert not is_real[t].any() and (obs[t] >= END).all() and not rewards[t].any()
            assert not dones[t].any()
        else:
            assert is_real[t].all() and not (obs[t] >= END).any()
            assert (obs[t] == row[0]).all() and (rewards[t] == row[1]).all()
            assert (dones[t] == row[2]).all()


@pytest.mark.parametrize(("env", "mode"), MODES)
def test_successors_are_what_the_step_led_to(script, args, env, mode):
    got, _, _ = rollouts(script, args(env, vectorization_mode=mode, num_envs=3, num_steps=9), 4)
    for rollout in got:
        before, after = rollout.obs[:-1][rollout.is_real], rollout.obs[1:][rollout.is_real]
        is_end = rollout.resets[1:][rollout.is_real]
        assert torch.equal(after[:, 0], before[:, 0] + 1 + END * is_end)
    terminations = torch.cat([rollout.terminations[:-1] for rollout in got])
    dones = torch.cat([rollout.resets[1:] for rollout in got])
    assert terminations.any() and not (terminations & ~dones).any()
    assert (dones & ~terminations).any()  # time limits


@pytest.mark.parametrize(("env", "mode"), MODES)
def test_episodes_and_step_numbers_count_steps_only(script, args, env, mode):
    options = args(env, vectorization_mode=mode, num_envs=3, num_steps=9)
    _, _, episodes = rollouts(script, options, 6)
    truth, expected, step = true_log(6 * 9), [], 0
    for row in truth:
        if row is not None:
            length = int(row[0]) + 1
            if row[2]:
                episode = (length * (length + 1) / 2, length)
                expected += [(step + i, *episode) for i in (1, 2, 3)]
            step += 3
    assert episodes == expected


@pytest.mark.parametrize("env", ["Counting", "CountingVector"])
def test_training_counts_and_learns_from_real_steps_only(script, args, env, monkeypatch):
    """After `train`, compare the agent's statistics with the environments' own logs."""
    made, seen = [], []
    make_envs, ppo_loss = script.make_envs, script.ppo_loss

    def keep_envs(args):
        made.append(make_envs(args))
        return made[-1]

    def watch_loss(*columns, mb, args):
        if torch.is_grad_enabled():  # rather than diagnosing
            seen.append(mb.x[mb.weights > 0])
        assert mb.weights.sum().item() == pytest.approx(1)
        return ppo_loss(*columns, mb, args)

    monkeypatch.setattr(script, "make_envs", keep_envs)
    monkeypatch.setattr(
        script, "ppo_loss", lambda *given: watch_loss(*given[:3], mb=given[3], args=given[4])
    )
    options = args(
        env,
        num_envs=3,
        num_steps=14,
        num_minibatches=2,
        update_epochs=1,
        total_timesteps=100,
        gamma=0.9,
        norm_obs=False,  # so that minibatches hold the observations themselves
    )
    result = script.train(options)
    logs = [single.unwrapped.log for single in made[0].unwrapped.envs]
    steps = [step for log in logs for step in log]
    assert result["global_step"] == len(steps) >= 100

    # what the loss saw is what happened, step for step
    obs = np.array([before for before, _, _ in steps])
    np.testing.assert_array_equal(np.sort(torch.cat(seen)[:, 0]), np.sort(obs))

    # observation statistics
    stats = result["agent"].obs_stats
    assert stats.count == len(obs) and obs.max() < END
    np.testing.assert_allclose(stats.mean.item(), obs.mean())
    np.testing.assert_allclose(stats.var.item(), obs.var())

    # discounted returns, G <- gamma G + r, from 0 in every episode
    discounted = []
    for log in logs:
        so_far = 0.0
        for _, reward, ended in log:
            so_far = 0.9 * so_far + reward
            discounted.append(so_far)
            so_far = 0.0 if ended else so_far
    stats = result["agent"].return_stats
    assert stats.count == len(discounted)
    np.testing.assert_allclose(stats.mean.item(), np.mean(discounted), rtol=1e-6)
    np.testing.assert_allclose(stats.var.item(), np.var(discounted), rtol=1e-6)


def test_rewards_are_divided_by_the_deviation_and_clipped(script, args):
    options = args("Counting", num_envs=2, num_steps=9, gamma=0.0, gae_lambda=0.0)
    (rollout,), agent, _ = rollouts(script, options, 1)
    rollout = rollout._replace(rewards=rollout.rewards.clone())
    rollout.rewards[0, 0] = 1e6
    agent.return_stats.update(rollout.discounted[:-1][rollout.is_real])
    batch = script.prepare(rollout, agent, options)
    deviation = np.std(rollout.discounted[:-1][rollout.is_real].numpy())
    expected = np.clip(rollout.rewards[:-1].numpy().flatten() / deviation, -10, 10)
    assert expected.max() == 10
    # with gamma = 0 the return of a step is its reward
    np.testing.assert_allclose(batch.returns, expected, rtol=1e-5, atol=1e-6)


def test_options_switch_normalisation_off(script, args):
    options = args("Counting", num_envs=2, num_steps=9, gamma=0.0, gae_lambda=0.0)
    options.norm_reward = options.norm_obs = False
    (rollout,), agent, _ = rollouts(script, options, 1)
    agent.obs_stats.update(rollout.obs.flatten(0, 1))
    batch = script.prepare(rollout, agent, options)
    np.testing.assert_allclose(batch.returns, rollout.rewards[:-1].flatten(), atol=1e-5)
    assert torch.equal(agent.normalize(rollout.obs), rollout.obs)


def test_observations_are_normalised_and_clipped(script, args):
    options = args("Counting", num_envs=2)
    _, agent, _ = start(script, options)
    data = torch.tensor([[2.0], [4.0], [6.0], [8.0]])
    agent.obs_stats.update(data)
    expected = (data - 5) / np.sqrt(5)
    torch.testing.assert_close(agent.normalize(data), expected)
    assert agent.normalize(torch.tensor([[1e6], [-1e6]])).tolist() == [[10], [-10]]


def test_old_and_new_logprobs_agree_before_the_first_gradient_step(script, args):
    """Acting, `prepare` and the loss see the same input, also once there are statistics."""
    options = args("Counting", num_envs=4, num_steps=16)
    envs, agent, state = start(script, options)
    for _ in range(3):
        rollout, state, _ = script.collect(envs, agent, state, 0, options)
        batch = script.prepare(rollout, agent, options)
        _, logprobs, _, values = agent.get_action_and_value(batch.x, batch.actions)
        assert torch.equal(logprobs, batch.logprobs) and torch.equal(values, batch.values)
        agent.obs_stats.update(rollout.obs[:-1][rollout.is_real])
    envs.close()


# Minibatches --------------------------------------------------------------------------------------


def real_rollout(script, args, **options):
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=4, **options)
    (rollout,), agent, _ = rollouts(script, options, 1)
    return rollout, agent, options


def real_batch(script, args, **options):
    rollout, agent, options = real_rollout(script, args, **options)
    return script.prepare(rollout, agent, options), agent, options


def learn_from(script, agent, optimizer, batch, options) -> torch.Tensor:
    """One epoch of gradient steps; returns the parameters after it."""
    for mb in script.minibatches(batch, options):
        script.gradient_step(agent, optimizer, mb, options)
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach()


def test_minibatches_deal_every_row_once(script, args):
    batch, _, options = real_batch(script, args, norm_adv=False)
    parts = list(script.minibatches(batch, options))
    assert [len(mb.x) for mb in parts] == [16] * 4
    for dealt, whole in zip(zip(*parts, strict=True), batch, strict=True):
        dealt = torch.cat(dealt)
        if whole is batch.weights:
            assert torch.equal(dealt > 0, torch.cat([mb.weights for mb in parts]) > 0)
        else:
            assert torch.equal(dealt.flatten().sort()[0], whole.flatten().sort()[0])
    order = torch.cat([mb.advantages for mb in parts])
    assert not torch.equal(order, batch.advantages)


def test_advantages_are_normalised_over_the_real_rows_of_a_minibatch(script, args):
    batch, _, options = real_batch(script, args)
    batch.advantages[batch.weights == 0] = 1e4  # a reset row's, which must not enter the moments
    for mb in script.minibatches(batch, options):
        is_real = mb.weights > 0
        assert 0 < is_real.sum() < 16
        n = int(is_real.sum())
        assert mb.weights[is_real].tolist() == pytest.approx([1 / n] * n)
        advantages = mb.advantages[is_real].numpy()
        assert advantages.mean() == pytest.approx(0, abs=1e-5)
        assert advantages.std() == pytest.approx(1, rel=1e-4)


def test_what_reset_rows_hold_does_not_change_an_update(script, args):
    parameters = []
    for garbage in (0.0, 1.0, -40.0):
        torch.manual_seed(1)
        batch, agent, options = real_batch(script, args)
        is_reset = batch.weights == 0
        for column in (batch.logprobs, batch.advantages, batch.returns, batch.values, batch.x):
            column[is_reset] += garbage
        optimizer = script.Adam(agent, 1e-3)
        torch.manual_seed(2)
        parameters.append(learn_from(script, agent, optimizer, batch, options))
    assert torch.equal(parameters[0], parameters[1])
    assert torch.equal(parameters[0], parameters[2])


def test_minibatches_of_reset_rows_alone_change_nothing(script, args):
    """Not even through the momentum that Adam has from earlier steps."""
    rollout, agent, options = real_rollout(script, args)
    optimizer = script.Adam(agent, 1e-3)
    script.update(agent, optimizer, rollout, options)
    before = torch.nn.utils.parameters_to_vector(agent.parameters())
    nothing = rollout._replace(resets=torch.ones_like(rollout.resets))
    assert script.update(agent, optimizer, nothing, options) == {}
    assert torch.equal(torch.nn.utils.parameters_to_vector(agent.parameters()), before)


def test_advantages_are_estimated_anew_in_each_epoch(script, args, monkeypatch):
    """By the value function as it is then, while the old log-probabilities stay."""
    rollout, agent, options = real_rollout(script, args, update_epochs=3)
    batches, values = [], []
    prepare = script.prepare

    def watch(rollout, agent, args):
        batches.append(prepare(rollout, agent, args))
        with torch.no_grad():
            values.append(agent.get_value(agent.normalize(rollout.obs[:-1])).flatten())
        return batches[-1]

    monkeypatch.setattr(script, "prepare", watch)
    optimizer = script.Adam(agent, options.learning_rate)
    metrics = script.update(agent, optimizer, rollout, options)
    assert len(batches) == 3
    for batch, value in zip(batches, values, strict=True):
        assert torch.equal(batch.values, value)
        assert torch.equal(batch.logprobs, batches[0].logprobs)
    assert not torch.equal(batches[0].advantages, batches[1].advantages)

    # the explained variance is the one from before learning
    is_real = batches[0].weights > 0
    returns = batches[0].returns[is_real].numpy()
    errors = returns - batches[0].values[is_real].numpy()
    assert metrics["explained_variance"] == pytest.approx(
        1 - errors.var() / returns.var(), rel=1e-3
    )


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_gradient_norm_is_clipped_over_all_parameters(script, args, max_grad_norm, monkeypatch):
    batch, agent, options = real_batch(script, args, max_grad_norm=max_grad_norm)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    mb = script.minibatches(batch, options)[0]
    optimizer, gradient = script.Adam(agent, 1.0), script.gradient(agent, mb, options)
    monkeypatch.setattr(optimizer, "step", lambda vector: optimizer.vector.sub_(vector))
    norm = script.gradient_step(agent, optimizer, mb, options)
    step = before - torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    assert 1e-3 < norm < 1e3
    assert norm.item() == pytest.approx(gradient.norm().item())
    assert step.norm().item() == pytest.approx(min(norm.item(), max_grad_norm), rel=1e-3)
    cosine = torch.cosine_similarity(step, gradient, dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-3)


def test_adam_is_pytorchs(script, args):
    """Its epsilon 1e-5 (detail 3 of the 37), on the agent's own parameters."""
    _, agent, _ = real_batch(script, args)
    twin = copy.deepcopy(agent)
    ours, stock = script.Adam(agent, 1.0), torch.optim.Adam(twin.parameters(), eps=1e-5)
    for i in range(5):
        ours.lr = stock.param_groups[0]["lr"] = 1e-3 * (5 - i)
        gradient = torch.randn(len(ours.vector)) * 10.0 ** (-2 * i)
        ours.step(gradient)
        parts = gradient.split([parameter.numel() for parameter in twin.parameters()])
        for parameter, part in zip(twin.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        stock.step()
    for old, new in zip(twin.parameters(), agent.parameters(), strict=True):
        torch.testing.assert_close(new, old)


def test_diagnostics_are_those_of_the_policy_after_the_update(script, args):
    rollout, agent, options = real_rollout(script, args, clip_coef=0.02, learning_rate=1e-2)
    optimizer = script.Adam(agent, options.learning_rate)
    metrics = script.update(agent, optimizer, rollout, options)
    is_real = rollout.is_real
    x, actions = agent.normalize(rollout.obs[:-1][is_real]), rollout.actions[:-1][is_real]
    with torch.no_grad():
        _, logprobs, entropies, _ = agent.get_action_and_value(x, actions)
    logratios = (logprobs - rollout.logprobs[:-1][is_real]).double()
    expected = {
        "old_approx_kl": -logratios.mean(),
        "approx_kl": (logratios.exp() - 1 - logratios).mean(),
        "clipfrac": ((logratios.exp() - 1).abs() > 0.02).double().mean(),
        "entropy": entropies.mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-7), name
    assert 0.05 < metrics["clipfrac"] < 0.95


@pytest.mark.parametrize(
    ("color", "progress"), [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (1, 2)]
)
def test_actions_are_as_alike_as_the_color_of_the_noise_says(script, args, color, progress):
    """The color falls linearly to 0 over the run."""
    options = args("MatchReward", num_envs=50, noise_color=color, total_timesteps=20_000)
    envs, agent, state = start(script, options)
    rollout, _, _ = script.collect(envs, agent, state, int(progress * 20_000), options)
    envs.close()
    beta = color * max(0, 1 - progress)
    actions = rollout.actions[:-1].double().reshape(256, 50)
    actions = (actions - actions.mean()) / actions.std()
    # what 1/f^β noise has: the mean of cos(2πf) over all frequencies, weighted by their power
    f = np.arange(1, 256) / 256
    power = np.minimum(f, 1 - f) ** -beta
    expected = (power * np.cos(2 * np.pi * f)).sum() / power.sum()
    found = (actions[1:] * actions[:-1]).mean().item()
    if "discrete" in script.__name__:  # of two actions: the difference of two Gumbel variables
        assert abs(found) < 0.05 if beta == 0 else 0.5 * expected < found < expected
    else:
        assert found == pytest.approx(expected, abs=0.05)
    assert abs((actions[:, 1:] * actions[:, :-1]).mean().item()) < 0.06  # environments differ


def test_target_kl_ends_the_epochs(script, args, monkeypatch):
    epochs = []
    prepare = script.prepare

    def count(*given):
        epochs.append(given)
        return prepare(*given)

    monkeypatch.setattr(script, "prepare", count)
    for target_kl, expected in ((None, 10), (1e-12, 1), (1e9, 10)):
        rollout, agent, options = real_rollout(script, args, target_kl=target_kl)
        epochs.clear()
        script.update(agent, script.Adam(agent, 1e-2), rollout, options)
        assert len(epochs) == expected


# Seeds and actions --------------------------------------------------------------------------------


def test_seeds_1_and_2_share_no_environment_stream(script, args, tmp_path):
    streams = []
    for seed in (1, 2):
        Seeds.seen = []
        options = args("Seeds", seed=seed, eval_episodes=5, num_steps=8, total_timesteps=128)
        options.run_dir = str(tmp_path / str(seed))
        script.train(options)
        streams.append(set(Seeds.seen))
        assert len(Seeds.seen) == len(streams[-1]) == options.num_envs + 5
    assert not streams[0] & streams[1]


ACTION_SPACES = {
    "two sides": spaces.Box(-2, 5, (3,), np.float32),
    "a matrix": spaces.Box(0, 1, (2, 2), np.float64),
    "half infinite": spaces.Box(
        np.array([-np.inf, 0, -np.inf, -3], np.float32),
        np.array([1, np.inf, np.inf, 4], np.float32),
    ),
    "awkward roundings": spaces.Box(
        np.array([0.1, -0.3, 1e-8], np.float32), np.array([0.7, 1e7, 1e-7], np.float32)
    ),
    "enormous": spaces.Box(-3e38, 3e38, (2,), np.float32),
}


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_continuous_actions_stay_inside_any_bounds(name):
    """`Strict` checks each action that it gets, dtype and shape included."""
    import ppo_continuous as script

    space = ACTION_SPACES[name]
    gym.register("tests/Strict-v0", Strict, kwargs={"action_space": space})
    args = script.Args(env_id="tests/Strict-v0", num_envs=2, num_steps=200)
    envs, agent, state = start(script, args)
    torch.nn.init.constant_(agent.actor_logstd, 1.5)  # well beyond the bounds, often
    script.collect(envs, agent, state, 0, args)
    actions = np.stack([action for env in envs.unwrapped.envs for action in env.unwrapped.actions])
    envs.close()
    # and each bound is reached, up to rounding
    with np.errstate(over="ignore"):
        tolerance = np.where(space.bounded_below & space.bounded_above, space.high - space.low, 0)
    tolerance = np.nan_to_num(tolerance, posinf=0) * 1e-6
    assert (actions.min(0) - space.low <= tolerance)[space.bounded_below].all()
    assert (space.high - actions.max(0) <= tolerance)[space.bounded_above].all()


def test_continuous_actions_are_stretched_over_their_bounds():
    import ppo_continuous as script

    space = spaces.Box(
        np.array([-2, 10, -np.inf, 0], np.float32), np.array([2, 20, 1, np.inf], np.float32)
    )
    agent = script.Agent(spaces.Box(-1, 1, (1,)), space, script.Args())
    for given, expected in (
        ([0, 0, 0, 0], [0, 15, 0, 0]),
        ([1, 1, 1, 1], [2, 20, 1, 1]),
        ([-0.5, -0.5, -0.5, 0.5], [-1, 12.5, -0.5, 0.5]),
        ([3, -3, 3, -3], [2, 10, 1, 0]),
        ([-3, 3, -30, 30], [-2, 20, -30, 30]),
    ):
        action = agent.to_env(np.array([given], np.float32))
        assert action.dtype == np.float32
        np.testing.assert_allclose(action, [expected], rtol=1e-6)


@pytest.mark.parametrize("first", [0, 5, -3])
def test_discrete_actions_may_start_anywhere(first):
    import ppo_discrete as script

    space = spaces.Discrete(3, start=first)
    gym.register("tests/Strict-v0", Strict, kwargs={"action_space": space})
    args = script.Args(env_id="tests/Strict-v0", num_envs=2, num_steps=50)
    envs, agent, state = start(script, args)
    rollout, _, _ = script.collect(envs, agent, state, 0, args)
    script.prepare(rollout, agent, args)
    taken = {int(action) for env in envs.unwrapped.envs for action in env.unwrapped.actions}
    envs.close()
    assert taken == {first, first + 1, first + 2}
    assert rollout.actions.unique().tolist() == [0, 1, 2]
