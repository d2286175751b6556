"""compute_gae, ppo_loss and the running moments against their definitions."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor


def random_rollout(seed: int, num_steps: int = 23, num_envs: int = 7) -> dict[str, Tensor]:
    """Float64 columns with ends of both kinds anywhere, first and last rows among them."""
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_envs)
    resets = np.zeros((num_steps + 1, num_envs), bool)
    resets[0] = rng.random(num_envs) < 0.4
    for t in range(num_steps):  # a reset row ends nothing
        resets[t + 1] = ~resets[t] & (rng.random(num_envs) < 0.25)
    resets[-1, :3] = ~resets[-2, :3]
    dones = resets[1:]
    values = rng.normal(size=(num_steps + 1, num_envs))
    columns = {
        "rewards": np.where(resets[:-1], 0, rng.normal(size=shape)),
        "values": values[:-1],
        "next_values": values[1:],
        "terminations": dones & (rng.random(shape) < 0.5),
        "dones": dones,
        "resets": resets[:-1],
    }
    return {name: torch.tensor(column) for name, column in columns.items()}


def gae_by_definition(rollout: dict[str, Tensor], gamma: float, lam: float) -> np.ndarray:
    """sum over k of (gamma lam)^k delta[t + k], up to the end of the episode or of the rollout."""
    r, v, nv, term, done = (
        rollout[name].numpy()
        for name in ("rewards", "values", "next_values", "terminations", "dones")
    )
    num_steps, num_envs = r.shape
    advantages = np.zeros_like(r)
    for env in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                future = 0.0 if term[k, env] else nv[k, env]
                delta = r[k, env] + gamma * future - v[k, env]
                advantages[t, env] += (gamma * lam) ** (k - t) * delta
                if done[k, env]:
                    break
    return advantages


def run_gae(script, rollout: dict[str, Tensor], gamma: float, lam: float) -> np.ndarray:
    columns = {name: column for name, column in rollout.items() if name != "resets"}
    return script.compute_gae(**columns, gamma=gamma, gae_lambda=lam).numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 1.0), (0, 1)]
)
def test_gae_is_its_definition(script, seed, gamma, lam):
    rollout = random_rollout(seed)
    assert rollout["resets"][0].any() and rollout["dones"][-1].any()
    assert (rollout["dones"] & ~rollout["terminations"]).any() and rollout["terminations"].any()
    expected = gae_by_definition(rollout, gamma, lam)
    np.testing.assert_allclose(run_gae(script, rollout, gamma, lam), expected, atol=1e-12)


def test_gae_lambda_0_is_the_td_error(script):
    rollout = random_rollout(1)
    bootstrap = torch.where(rollout["terminations"], 0.0, rollout["next_values"])
    td_error = rollout["rewards"] + 0.9 * bootstrap - rollout["values"]
    np.testing.assert_allclose(run_gae(script, rollout, 0.9, 0.0), td_error, atol=1e-12)


def test_gae_lambda_1_is_the_return_minus_the_value(script):
    """Three steps of reward 1, then termination, or a time limit at a state worth 10."""
    rollout = {
        "rewards": torch.ones(3, 2),
        "values": torch.tensor([[5.0, 5.0], [4.0, 4.0], [3.0, 3.0]]),
        "next_values": torch.tensor([[4.0, 4.0], [3.0, 3.0], [10.0, 10.0]]),
        "terminations": torch.tensor([[False, False], [False, False], [True, False]]),
        "dones": torch.tensor([[False, False], [False, False], [True, True]]),
    }
    gamma = 0.5
    terminated = np.array([1 + 0.5 + 0.25 - 5, 1 + 0.5 - 4, 1 - 3])
    truncated = terminated + 10 * gamma ** np.array([3, 2, 1])
    expected = np.stack([terminated, truncated], axis=1)
    np.testing.assert_allclose(run_gae(script, rollout, gamma, 1.0), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_reset_row_does_not_change_the_advantages_of_real_rows(script, seed):
    rollout = random_rollout(seed)
    before = run_gae(script, rollout, 0.99, 0.95)
    is_reset = rollout["resets"]
    rollout["rewards"] = torch.where(is_reset, 1e6, rollout["rewards"])
    after = run_gae(script, rollout, 0.99, 0.95)
    np.testing.assert_array_equal(before[~is_reset], after[~is_reset])


# The loss -----------------------------------------------------------------------------------------


def random_minibatch(script, n: int = 40, num_resets: int = 9, seed: int = 0):
    """Float64 minibatch whose first rows are reset rows, and what a new policy says of it."""
    rng = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(n, generator=rng, dtype=torch.float64)

    weights = torch.ones(n, dtype=torch.float64) / max(1, n - num_resets)
    weights[:num_resets] = 0
    mb = script.Batch(
        x=normal(),
        actions=normal(),
        logprobs=normal() - 1,
        advantages=normal(),
        returns=normal(),
        values=normal(),
        weights=weights,
    )
    new = {
        "logprobs": mb.logprobs + normal(0.2),
        "entropies": normal().abs(),
        "values": mb.values + normal(0.3),
    }
    return mb, {name: column.requires_grad_() for name, column in new.items()}


def loss_by_hand(mb, new, args) -> dict[str, float]:
    """Row by row with plain floats, over the rows that count."""
    rows = [i for i, weight in enumerate(mb.weights.tolist()) if weight > 0]
    eps, sums = (
        args.clip_coef,
        dict.fromkeys(("policy", "value", "entropy", "clip"), 0.0),
    )
    for i in rows:
        advantage, ret, old_value = (
            column[i].item() for column in (mb.advantages, mb.returns, mb.values)
        )
        value, log_ratio = new["values"][i].item(), (new["logprobs"] - mb.logprobs)[i].item()
        ratio = math.exp(log_ratio)
        sums["policy"] -= min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)
        error = (value - ret) ** 2
        if args.clip_vloss:
            error = max(error, (min(max(value, old_value - eps), old_value + eps) - ret) ** 2)
        sums["value"] += 0.5 * error
        sums["entropy"] += new["entropies"][i].item()
        sums["clip"] += abs(ratio - 1) > eps
    means = {name: total / len(rows) for name, total in sums.items()}
    means["loss"] = (
        means["policy"] + args.vf_coef * means["value"] - args.ent_coef * means["entropy"]
    )
    return means


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_is_its_formula(script, clip_vloss):
    args = script.Args(clip_coef=0.15, clip_vloss=clip_vloss, ent_coef=0.03, vf_coef=0.7)
    mb, new = random_minibatch(script)
    expected = loss_by_hand(mb, new, args)
    assert 0.2 < expected["clip"] < 0.8  # both branches are taken
    loss, metrics = script.ppo_loss(**new, mb=mb, args=args)
    got = {
        "loss": loss,
        "policy": metrics["policy_loss"],
        "value": metrics["value_loss"],
        "entropy": metrics["entropy"],
    }
    for name, value in got.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_gradient_is_the_finite_difference(script, clip_vloss):
    args = script.Args(clip_vloss=clip_vloss, ent_coef=0.03)
    mb, new = random_minibatch(script)
    script.ppo_loss(**new, mb=mb, args=args)[0].backward()
    step = 1e-6
    for name, column in new.items():
        for i in range(len(column)):
            losses = []
            for sign in (1, -1):
                moved = {key: value.detach().clone() for key, value in new.items()}
                moved[name][i] += sign * step
                losses.append(script.ppo_loss(**moved, mb=mb, args=args)[0].item())
            slope = (losses[0] - losses[1]) / (2 * step)
            assert column.grad[i].item() == pytest.approx(slope, abs=1e-8), (name, i)


@pytest.mark.parametrize(
    ("ratio", "advantage", "binds"),
    [(1.5, 1, True), (0.5, -1, True), (0.5, 1, False), (1.5, -1, False), (1.1, 1, False)],
)
def test_policy_gradient_is_zero_exactly_where_clipping_binds(script, ratio, advantage, binds):
    mb, new = random_minibatch(script, n=1, num_resets=0)
    mb = mb._replace(advantages=torch.tensor([float(advantage)], dtype=torch.float64))
    logprobs = (mb.logprobs + math.log(ratio)).requires_grad_()
    loss, _ = script.ppo_loss(logprobs, new["entropies"], new["values"], mb, script.Args())
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(0 if binds else -ratio * advantage)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_reset_rows_change_neither_loss_nor_gradient(script, clip_vloss):
    args = script.Args(clip_vloss=clip_vloss, ent_coef=0.03)
    results = []
    for garbage in (0.0, 3.0, -50.0):
        mb, new = random_minibatch(script, num_resets=9)
        mb = script.Batch(*(torch.cat((c[:9] + garbage, c[9:])) for c in mb[:-1]), mb.weights)
        loss, metrics = script.ppo_loss(**new, mb=mb, args=args)
        loss.backward()
        gradients = torch.cat([column.grad for column in new.values()])
        results.append(torch.cat((torch.stack([loss, *metrics.values()]).detach(), gradients)))
        for column in new.values():
            assert not column.grad[:9].any() and column.grad[9:].any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Policy -------------------------------------------------------------------------------------------


def make_agent(script):
    """An agent with a policy that is far from uniform, and the distributions of its definition."""
    torch.manual_seed(3)
    actions = (
        gym.spaces.Discrete(3) if "discrete" in script.__name__ else gym.spaces.Box(-1, 1, (2,))
    )
    agent = script.Agent(gym.spaces.Box(-1, 1, (4,)), actions, script.Args())
    with torch.no_grad():
        agent.actor[-1].weight *= 100
        if "continuous" in script.__name__:
            agent.actor_logstd[:] = torch.tensor([-1.0, 0.5])

    def policy(x):
        outputs = agent.actor(x)
        if "discrete" in script.__name__:
            return torch.distributions.Categorical(logits=outputs)
        normal = torch.distributions.Normal(outputs, agent.actor_logstd.exp())
        return torch.distributions.Independent(normal, 1)

    return agent, policy


def test_log_probability_and_entropy_are_those_of_the_distribution(script):
    agent, policy = make_agent(script)
    x = torch.randn(50, 6, 4)
    action, logprob, entropy, value = agent.get_action_and_value(x)
    torch.testing.assert_close(logprob, policy(x).log_prob(action))
    torch.testing.assert_close(entropy, policy(x).entropy())
    assert torch.equal(value, agent.get_value(x)) and value.shape == (50, 6)
    again = agent.get_action_and_value(x, action)
    for old, new in zip((action, logprob, entropy, value), again, strict=True):
        assert torch.equal(old, new)


def test_actions_are_samples_and_greedy_ones_the_mode(script):
    agent, policy = make_agent(script)
    x, n = torch.randn(1, 4), 200_000
    noise = script.colored_noise((4, n // 4, *agent.actor(x).shape[1:]), 0.5).flatten(0, 1)
    samples = agent.get_action(x.expand(n, 4), noise).float()
    assert torch.equal(agent.get_action(x, script.GREEDY), policy(x).mode)
    assert agent.act(x.numpy()).tolist() == policy(agent.normalize(x)).mode.tolist()
    if "discrete" in script.__name__:
        frequencies = torch.bincount(samples.long()) / n
        torch.testing.assert_close(frequencies, policy(x).probs[0], atol=4e-3, rtol=0)
        return
    mean, std = policy(x).mean[0], policy(x).stddev[0]
    torch.testing.assert_close(samples.mean(0), mean, atol=2e-2, rtol=0)
    torch.testing.assert_close(samples.std(0), std, atol=0, rtol=1e-2)
    scores = ((samples - mean) / std).sort(0)[0]  # of a Gaussian, and independent of each other
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99]))
    at = scores[(torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99]) * n).long()]
    torch.testing.assert_close(at, quantiles[:, None].expand(5, 2), atol=3e-2, rtol=0)
    assert abs(torch.corrcoef(samples.T)[0, 1]) < 0.01


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 101, 256])
def test_colored_noise_is_standard_normal_with_its_power_spectrum(script, beta, steps):
    noise = script.colored_noise((steps, 20_000, 2), beta).double()
    assert noise.shape == (steps, 20_000, 2)
    some = noise[:: max(1, steps // 4)]  # each step alone
    torch.testing.assert_close(
        some.mean((1, 2)), torch.zeros(len(some)).double(), atol=0.03, rtol=0
    )
    torch.testing.assert_close(some.var((1, 2)), torch.ones(len(some)).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(
        some.pow(4).mean((1, 2)), torch.full((len(some),), 3.0).double(), atol=0.3, rtol=0
    )
    assert (some[..., 0] * some[..., 1]).mean().abs() < 0.05  # columns are independent
    power = torch.fft.rfft(noise, dim=0).abs().square().mean((1, 2))[1:]
    if steps > 2:
        frequencies = torch.arange(1, len(power) + 1) / steps
        expected = (frequencies / frequencies[0]) ** -beta
        torch.testing.assert_close(power / power[0], expected.double(), atol=0, rtol=0.1)


def test_tanh_is_tanh(script):
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e30, 1e30])]).requires_grad_()
    y = script.Tanh()(x)
    y.sum().backward()
    expected = np.tanh(x.detach().double().numpy())
    np.testing.assert_allclose(y.detach(), expected, atol=2e-7)
    np.testing.assert_allclose(x.grad, 1 - expected**2, atol=5e-7)


# Statistics ---------------------------------------------------------------------------------------


def test_moments_are_numpys_over_many_uneven_batches(script):
    rng = np.random.default_rng(0)
    stats = script.RunningMoments(3)
    batches = [
        rng.normal([0, 100, -5], [1, 0.01, 50], (n, 3)).astype(np.float32)
        for n in [1, 2, 500, 1, 0, *rng.integers(0, 100, 200)]
    ]
    for batch in batches:
        stats.update(torch.as_tensor(batch))
    everything = np.concatenate(batches).astype(np.float64)
    assert stats.count == len(everything)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-10)
    np.testing.assert_allclose(stats.var, everything.var(0), rtol=1e-8)


def test_moments_before_any_data_change_nothing(script):
    stats = script.RunningMoments(2)
    stats.update(torch.empty(0, 2))
    assert stats.mean.tolist() == [0, 0] and stats.var.tolist() == [1, 1] and stats.count == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_seeds_of_different_keys_differ(script, seed):
    keys = [(s, stream, i) for s in range(20) for stream in range(3) for i in range(50)]
    assert len({script.derive_seed(*key) for key in keys}) == len(keys)


# Initialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_initialisation_is_orthogonal(script, activation):
    observations = gym.spaces.Box(-1, 1, (2, 2))
    actions = {
        "ppo_discrete": gym.spaces.Discrete(3),
        "ppo_continuous": gym.spaces.Box(-1, 1, (3,)),
    }[script.__name__]
    args = script.Args(hidden_size=32, activation=activation)
    agent = script.Agent(observations, actions, args)
    for network, outputs, gain in ((agent.actor, 3, 0.01), (agent.critic, 1, 1.0)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [layer.weight.shape for layer in layers] == [(32, 4), (32, 32), (outputs, 32)]
        for layer, std in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
            assert not layer.bias.any()
            weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
            expected = std**2 * torch.eye(len(weight))
            torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5, rtol=0)
        kind = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[activation]
        assert sum(isinstance(layer, kind) for layer in network) == 2
