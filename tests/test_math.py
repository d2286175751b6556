"""The formulas against their definitions: sums, finite differences, distributions, NumPy."""

import math
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal


def make_agent(script, dtype=torch.float64, **options):
    """An agent with a policy far from uniform, and π as a distribution of PyTorch."""
    torch.manual_seed(3)
    actions = gym.spaces.Discrete(3)
    if script.__name__ == "ppo_continuous":
        actions = gym.spaces.Box(-1, 1, (2,))
    agent = script.Agent(gym.spaces.Box(-1, 1, (4,)), actions, script.Args(**options)).to(dtype)
    with torch.no_grad():
        agent.actor[-1].weight *= 100
        if script.__name__ == "ppo_continuous":
            agent.actor_logstd[:] = torch.tensor([-1.0, 0.5])

    def policy(x):
        if script.__name__ == "ppo_discrete":
            return Categorical(logits=agent.actor(x))
        return Independent(Normal(agent.actor(x), agent.actor_logstd.exp()), 1)

    return agent, policy


# Advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 1.0)])
def test_gae_is_its_definition(script, seed, gamma, lam):
    """The sum over k of (gamma lam)^k delta[t + k], up to the episode's or the rollout's end."""
    rng = np.random.default_rng(seed)
    shape = 23, 7
    done = rng.random(shape) < 0.25
    done[-1, :3] = True  # time limits and terminations in the last row too
    terminated = done & (rng.random(shape) < 0.5)
    assert (done & ~terminated).any() and terminated.any() and not done[-1].all()
    rewards, values, next_values = rng.normal(size=(3, *shape))
    expected = np.zeros(shape)
    for t, env in np.ndindex(shape):
        for k in range(t, 23):
            future = 0.0 if terminated[k, env] else next_values[k, env]
            delta = rewards[k, env] + gamma * future - values[k, env]
            expected[t, env] += (gamma * lam) ** (k - t) * delta
            if done[k, env]:
                break

    next_values[terminated] = rng.choice([np.nan, np.inf, 1e6], terminated.sum())  # never needed
    args = script.Args(gamma=gamma, gae_lambda=lam)
    columns = map(torch.tensor, (rewards, values, next_values, terminated, done))
    np.testing.assert_allclose(script.compute_gae(*columns, args), expected, rtol=1e-5, atol=1e-6)


# Loss


def random_minibatch(agent, policy, n: int = 40) -> dict[str, torch.Tensor]:
    """What an older policy did in n random states, and what came of it."""
    obs = torch.randn(n, 4, dtype=torch.float64)
    with torch.no_grad():
        actions = policy(obs).sample()
        old_logprobs = policy(obs).log_prob(actions) + 0.2 * torch.randn(n)
        old_values = agent.critic(obs).squeeze(-1) + 0.3 * torch.randn(n)
    minibatch = dict(obs=obs, actions=actions, old_logprobs=old_logprobs, old_values=old_values)
    return minibatch | dict(advantages=torch.randn(n).double(), targets=torch.randn(n).double())


@pytest.mark.parametrize(("clip_vloss", "norm_adv"), [(False, True), (True, False)])
def test_loss_is_its_formula_and_the_gradient_its_derivative(script, clip_vloss, norm_adv):
    args = script.Args(
        clip_coef=0.15, clip_vloss=clip_vloss, norm_adv=norm_adv, ent_coef=0.03, vf_coef=0.7
    )
    agent, policy = make_agent(script)
    minibatch = random_minibatch(agent, policy)
    obs, actions, old_logprobs, old_values, advantages, targets = minibatch.values()
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    logratios = (policy(obs).log_prob(actions) - old_logprobs).tolist()
    policy_loss, value_loss, clipped, kl, eps = 0.0, 0.0, 0, 0.0, args.clip_coef
    for i, value in enumerate(agent.critic(obs).squeeze(-1).tolist()):
        ratio, advantage = math.exp(logratios[i]), advantages[i].item()
        policy_loss -= min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage) / 40
        old, target = old_values[i].item(), targets[i].item()
        error = (value - target) ** 2
        if clip_vloss:
            error = max(error, (min(max(value, old - eps), old + eps) - target) ** 2)
        value_loss += 0.5 * error / 40
        clipped += abs(ratio - 1) > eps
        kl += (ratio - 1 - logratios[i]) / 40
    assert 8 < clipped < 32  # both branches are taken
    entropy = policy(obs).entropy().mean().item()
    loss, log = script.ppo_loss(agent, args, **minibatch)
    assert loss.item() == pytest.approx(policy_loss + 0.7 * value_loss - 0.03 * entropy)
    expected = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    expected |= dict(approx_kl=kl, old_approx_kl=-sum(logratios) / 40, clipfrac=clipped / 40)
    assert log == {f"losses/{name}": pytest.approx(value) for name, value in expected.items()}
    assert not any(value.requires_grad for value in log.values())

    gradient, same_log = script.gradient(agent, args, minibatch)
    assert same_log == log
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    for _ in range(10):
        direction, losses = torch.randn_like(before), []
        for step in (1e-6, -1e-6):
            moved = before + step * direction
            torch.nn.utils.vector_to_parameters(moved, agent.parameters())
            losses.append(script.ppo_loss(agent, args, **minibatch)[0].item())
        slope = (losses[0] - losses[1]) / 2e-6
        assert gradient @ direction == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "binds"),
    [(1.5, 1, True), (0.5, -1, True), (0.5, 1, False), (1.5, -1, False), (1.1, 1, False)],
)
def test_policy_gradient_is_zero_exactly_where_clipping_binds(script, ratio, advantage, binds):
    agent, policy = make_agent(script)
    args = script.Args(norm_adv=False, ent_coef=0, vf_coef=0)
    minibatch = random_minibatch(agent, policy, n=1)
    obs, actions = minibatch["obs"], minibatch["actions"]
    minibatch["old_logprobs"] = policy(obs).log_prob(actions).detach() - math.log(ratio)
    minibatch["advantages"] = torch.full((1,), float(advantage))
    gradient, _ = script.gradient(agent, args, minibatch)
    score = torch.autograd.grad(policy(obs).log_prob(actions).sum(), agent.actor.parameters())
    names = [name for name, _ in agent.named_parameters()]
    parts = dict(zip(names, gradient.split([p.numel() for p in agent.parameters()]), strict=True))
    got = torch.cat([part for name, part in parts.items() if name.startswith("actor.")])
    expected = -ratio * advantage * torch.cat([g.flatten() for g in score])
    torch.testing.assert_close(got, torch.zeros_like(got) if binds else expected)


# Policy


def test_log_probability_entropy_samples_and_mode_are_those_of_the_distribution(script):
    agent, policy = make_agent(script, torch.float32)
    x = torch.randn(50, 6, 4)
    action = policy(x).sample()
    logprob, entropy = agent.get_logprob_and_entropy(x, action)
    torch.testing.assert_close(logprob, policy(x).log_prob(action))
    torch.testing.assert_close(entropy.expand(50, 6), policy(x).entropy())
    n = 100_000
    samples = agent.get_action(x[0, :1].expand(n, 4)).float().detach()
    expected = policy(x[0, :1].expand(n, 4)).sample().float()
    if script.__name__ == "ppo_discrete":
        samples, expected = (
            torch.nn.functional.one_hot(y.long()).float() for y in (samples, expected)
        )
    torch.testing.assert_close(samples.mean(0), expected.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(expected.T), atol=0.05, rtol=0.02)
    greedy = agent.act(x.numpy())
    mode = policy(agent.normalize(x)).mode.detach().numpy()
    np.testing.assert_array_equal(greedy, agent.to_env(mode))


# Statistics, initialisation, random numbers


def test_moments_are_numpys_over_many_uneven_batches(script):
    rng = np.random.default_rng(0)
    stats = script.RunningMoments(4)
    assert stats.mean.tolist() == [0] * 4 and stats.std.tolist() == [1] * 4
    sizes = [1, 2, 500, *rng.integers(1, 100, 200)]
    shape = [0, 100, -5, 3e4], [1, 0.01, 50, 0]
    batches = [rng.normal(*shape, (n, 4)).astype(np.float32) for n in sizes]
    for batch in batches:
        stats.update(torch.as_tensor(batch))
    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-10)
    np.testing.assert_allclose(stats.std[:3], everything.std(0)[:3], rtol=1e-6)
    assert 0 < stats.std[3] < 0.01  # a constant: no NaN


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_observations_of_any_size_are_normalised_and_constants_vanish(script, dtype):
    """After every one of many uneven batches, near-constant features stay in bounds, too."""
    rng = np.random.default_rng(1)
    constants, scales = np.array([0, 0.1, 1e6, 123456.789]), np.array([1e-20, 1e-6, 1, 1e6])
    near = np.array([1e-3, 1, 1e4, 1e6])
    actions = gym.spaces.Discrete(2) if script.__name__ == "ppo_discrete" else gym.spaces.Box(0, 1)
    agent = script.Agent(gym.spaces.Box(-1, 1, (12,)), actions, script.Args())
    for n in [1, 2, 500, *rng.integers(1, 100, 200)]:
        noise = rng.normal(size=(2, n, 4))
        features = np.tile(constants, (n, 1)), scales * noise[0], near * (1 + 1e-9 * noise[1])
        batch = np.concatenate(features, axis=1).astype(dtype)
        agent.obs_stats.update(torch.as_tensor(batch))
        got = agent.normalize(batch)
        assert got[:, :4].abs().max() < 1e-3
        assert got.isfinite().all() and got.abs().max() <= 10
    batch = (scales * rng.normal(size=(10_000, 4))).astype(dtype)
    got = agent.normalize(np.pad(batch, ((0, 0), (4, 4))))[:, 4:8].numpy()
    np.testing.assert_allclose([got.mean(0), got.std(0)], [[0] * 4, [1] * 4], atol=0.04)
    assert agent.normalize(np.full(12, 1e30)).tolist() == [10] * 12
    assert agent.normalize(np.full(12, -1e30)).tolist() == [-10] * 12


def test_initialisation_is_orthogonal(script):
    agent, _ = make_agent(script, torch.float32, hidden_size=32)
    outputs = agent.actor[-1].out_features
    for network, size, gain in ((agent.actor, outputs, 0.01 * 100), (agent.critic, 1, 1.0)):
        layers = network[::2]
        assert [layer.weight.shape for layer in layers] == [(32, 4), (32, 32), (size, 32)]
        for layer, std in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
            assert not layer.bias.any()
            weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
            expected = std**2 * torch.eye(len(weight))
            torch.testing.assert_close(weight @ weight.T, expected, atol=1e-4, rtol=1e-4)


def test_seeds_are_small_and_differ_and_all_generators_with_them(script):
    def draw(key):
        seeds[key] = script.seed_everything(key)
        return random.random(), np.random.random(), torch.rand((), dtype=float64).item()

    seeds, float64 = {}, torch.float64
    keys = [f"{purpose} {s} {i}" for s in range(8) for purpose in "abc" for i in range(10)]
    draws = [draw(key) for key in keys]
    for column in (seeds.values(), *zip(*draws, strict=True)):
        assert len({*column}) == len(keys)
    # a seed for each of many environments, from this one on, must suit an int32
    assert 0 <= min(seeds.values()) and 2**29 < max(seeds.values()) < 2**31 - 2**20
    assert [draw(key) for key in keys[::7]] == draws[::7]
