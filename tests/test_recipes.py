"""The recipes: each patch applies to the script of now, which then does what the patch says."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, curves
from envs import Recall, Walk
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

RECIPES = ROOT / "tests" / "recipes"
SMALL = dict(num_envs=2, num_steps=8, num_minibatches=2, update_epochs=1, eval_episodes=0)
FOLDER = tempfile.TemporaryDirectory()  # for the patched scripts


@functools.cache
def patched(name: str) -> Path:
    """The script that a recipe makes."""
    patch, folder = RECIPES / f"{name}.patch", Path(FOLDER.name) / name
    script = re.search(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)[1]
    folder.mkdir()
    shutil.copy(ROOT / script, folder)
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    return folder / script


@functools.cache
def recipe(name: str):
    """The module of that script."""
    path = patched(name)
    name = f"recipe_{name}"  # one of them is named like the package that it imports
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENVIRONMENTS = {
    "action_masking": "envs:tests/HighestValid-v0",
    "cnn": "envs:tests/Corner-v0",
    "multidiscrete": "envs:tests/Digits-v0",
}
NAMES = sorted(path.stem for path in RECIPES.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_goes_on_and_plays(name, tmp_path):
    env = ["--env-id", ENVIRONMENTS[name]] if name in ENVIRONMENTS else []
    size = ["--num-envs", "16", "--num-steps", "16", "--num-minibatches", "2"]
    for options in (
        [*env, *size, "--run-dir", "run", "--total-timesteps", "512"],
        ["--resume", "run", "--total-timesteps", "1024"],
        ["--evaluate", "run"],
    ):
        command = [sys.executable, patched(name), *options, "--eval-episodes", "1"]
        environ = os.environ | {"WANDB_MODE": "disabled"}
        run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "greedy return over 1 episodes" in run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_does_and_is_in_the_readme(name):
    text, patch, _ = (RECIPES / f"{name}.patch").read_text().partition("\n--- a/")
    assert 50 < len(text) and text.count("\n") <= 3 and patch
    assert f"[{name}](tests/recipes/{name}.patch)" in (ROOT / "README.md").read_text()


def make_agent(script, actions=None, seed: int = 3):
    """An agent with a policy that depends on the state."""
    torch.manual_seed(seed)
    actions = actions or spaces.Box(-1, 1, (2,))
    agent = script.Agent(spaces.Box(-1, 1, (4,)), actions, script.Args())
    with torch.no_grad():
        agent.actor[-1].weight *= 100
        agent.actor_logstd += torch.linspace(-0.5, 0.5, len(agent.actor_logstd))
    return agent


# adaptive_kl


def test_the_penalty_is_the_kl_from_the_old_to_the_new_policy():
    """Value and gradient, estimated from actions of the old one: eq. 8 without advantages."""
    script, n = recipe("adaptive_kl"), 100_000
    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    logstd = torch.tensor(math.log(0.4), dtype=torch.float64, requires_grad=True)
    old, new = Normal(torch.zeros((), dtype=torch.float64), 0.5), Normal(mean, logstd.exp())
    actions = old.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # the old one's quantiles
    weights, zeros = torch.full_like(actions, 1 / n), torch.zeros_like(actions)
    mb = script.Batch(zeros, actions, old.log_prob(actions), zeros, zeros, zeros, weights)
    args = script.Args(ent_coef=0)
    loss, _ = script.ppo_loss(new.log_prob(actions), zeros, zeros, mb, args, beta=2.0)
    exact = 2 * kl_divergence(old, new)  # 2 x 0.18; the other way round it would be 2 x 0.12
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    gradients = [torch.autograd.grad(y, [mean, logstd], retain_graph=True) for y in (loss, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)
    mb = mb._replace(advantages=torch.where(actions > 0, 1.0, 0.0))  # E_old[r A] = π(a > 0)
    loss, _ = script.ppo_loss(new.log_prob(actions), zeros, zeros, mb, args, beta=0.0)
    assert -loss.item() == pytest.approx(1 - new.cdf(zeros[0]).item(), rel=1e-3)


@pytest.mark.parametrize(("share", "factor"), [(0.66, 0.5), (0.67, 1), (1.49, 1), (1.51, 2)])
def test_beta_follows_the_kl(share, factor, monkeypatch):
    script = recipe("adaptive_kl")
    args = script.Args(**SMALL, target_kl=0.02)
    envs = script.make_envs(args)
    agent, optimizer, _ = script.begin(envs, args, None)
    obs, _ = envs.reset(seed=1)
    state = (script.flat(obs), np.zeros(2, bool), np.zeros(2, np.float32))
    rollout, _, _ = script.collect(envs, agent, state, 0, args)
    kl = torch.tensor(share * args.target_kl)
    monkeypatch.setattr(script, "diagnose", lambda *_: {"approx_kl": kl})
    for before in (1.0, factor):
        assert agent.state_dict()["beta"] == before  # a checkpoint holds it
        assert script.update(agent, optimizer, rollout, args)["beta"] == before
    assert agent.beta == factor**2

    (mb, *_) = script.minibatches(script.prepare(rollout, agent, args), args)
    gradients = []
    for beta in (0, 1, 3):  # a tensor, which a compiled gradient reads anew
        agent.beta.fill_(beta)
        gradients.append(script.gradient(agent, mb, args))
    none, one, three = gradients
    assert (one - none).norm() > 1e-4 * none.norm()
    torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-2, atol=1e-4)


# shared_trunk


def test_both_losses_train_the_trunk_which_runs_once():
    script = recipe("shared_trunk")
    agent = make_agent(script)
    x, calls = torch.randn(7, 4), []
    agent.trunk.register_forward_hook(lambda *_: calls.append(None))
    action, logprob, _, value = agent.get_action_and_value(x, torch.randn(7, 2))
    assert len(calls) == 1
    policy = Normal(agent.actor(x), agent.actor_logstd.exp())
    torch.testing.assert_close(logprob, policy.log_prob(action).sum(-1))
    assert torch.equal(value, agent.get_value(x))
    weights = [layer.weight for layer in agent.trunk if hasattr(layer, "weight")]
    assert [weight.shape for weight in weights] == [(64, 4), (64, 64)]
    for loss in (logprob.sum(), value.sum()):
        assert all(g.any() for g in torch.autograd.grad(loss, weights, retain_graph=True))
    sizes = [5 * 64, 65 * 64, 65 * 1, 65 * 2, 2]  # trunk, value, mean, deviation: nothing twice
    assert len(script.Adam(agent, 1e-3).vector) == sum(sizes)


# separate_learning_rates


def test_adam_is_torchs_with_two_groups():
    script = recipe("separate_learning_rates")
    agent, other = make_agent(script), make_agent(script)
    groups = [[*other.critic.parameters()], [other.actor_logstd, *other.actor.parameters()]]
    groups = [{"params": group} for group in groups]
    expected = torch.optim.Adam(groups, lr=1.0, eps=1e-5)
    optimizer = script.Adam(agent, 1e-3)
    for lr, value_lr in [(1e-2, 3e-2), (1e-3, 1e-4), (1e-2, 0.0), (0.0, 1e-2)]:
        optimizer.lr, optimizer.value_lr = lr, value_lr
        expected.param_groups[0]["lr"], expected.param_groups[1]["lr"] = value_lr, lr
        gradient = torch.randn_like(optimizer.vector)
        parts = gradient.split([parameter.numel() for parameter in other.parameters()])
        for parameter, part in zip(other.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step(gradient)
        expected.step()
        for got, wanted in zip(agent.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_both_rates_are_annealed_and_logged(tmp_path, monkeypatch):
    script, rates, logged = recipe("separate_learning_rates"), [], []
    update, names = script.update, ("charts/learning_rate", "charts/value_learning_rate")

    def watch(agent, optimizer, *given):
        rates.append((optimizer.lr, optimizer.value_lr))
        return update(agent, optimizer, *given)

    monkeypatch.setattr(script, "update", watch)
    monkeypatch.setattr(script, "log", lambda *given: logged.append([given[3][n] for n in names]))
    options = dict(learning_rate=1e-3, value_learning_rate=4e-3, total_timesteps=32)
    script.train(script.Args(**SMALL, **options, cuda=False, run_dir=str(tmp_path / "run")))
    expected = [(1e-3, 4e-3), (0.5e-3, 2e-3)]
    np.testing.assert_allclose(rates, expected)
    np.testing.assert_allclose(logged, expected)


# returns_minus_baseline


@pytest.mark.parametrize("seed", range(3))
def test_returns_are_the_discounted_rewards_and_what_is_left_at_the_end(seed):
    script, gamma, shape = recipe("returns_minus_baseline"), 0.9, (23, 7)
    rng = np.random.default_rng(seed)
    resets = np.zeros((24, 7), bool)
    for t in range(23):  # a reset row ends nothing
        resets[t + 1] = ~resets[t] & (rng.random(7) < 0.3)
    dones, terminations = resets[1:], resets[1:] & (rng.random(shape) < 0.5)
    assert (dones & ~terminations).any() and terminations.any() and not dones[-1].all()
    rewards, next_values = np.where(resets[:-1], 0, rng.normal(size=shape)), rng.normal(size=shape)
    columns = (torch.tensor(c) for c in (rewards, next_values, terminations, dones))
    got = script.compute_returns(*columns, gamma).numpy()
    for t, env in np.argwhere(~resets[:-1]):
        last = t + [*dones[t:-1, env], True].index(True)
        steps = np.arange(last - t + 1)
        expected = gamma**steps @ rewards[t : last + 1, env]
        if not terminations[last, env]:
            expected += gamma ** len(steps) * next_values[last, env]
        assert got[t, env] == pytest.approx(expected, abs=1e-12)


def test_advantages_are_returns_minus_values_and_time_limits_are_bootstrapped():
    script = recipe("returns_minus_baseline")
    args = script.Args(env_id="Pendulum-v1", num_envs=2, num_steps=250, norm_reward=False)
    envs = script.make_envs(args)
    agent, _, _ = script.begin(envs, args, None)
    obs, _ = envs.reset(seed=1)
    state = (script.flat(obs), np.zeros(2, bool), np.zeros(2, np.float32))
    rollout, _, _ = script.collect(envs, agent, state, 0, args)
    batch = script.prepare(rollout, agent, args)
    torch.testing.assert_close(batch.advantages, batch.returns - batch.values)
    returns = batch.returns.view(250, 2)
    bootstrap = agent.get_value(agent.normalize(rollout.obs[200]))
    assert rollout.resets[200].all() and not rollout.terminations.any()  # the time limit
    expected = rollout.rewards[199] + args.gamma * bootstrap
    torch.testing.assert_close(returns[199], expected)


# squashed_policy


def tanh_policy(agent, x):
    normal = Normal(agent.actor(x), agent.actor_logstd.exp())
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def test_log_density_is_that_of_the_squashed_action():
    script = recipe("squashed_policy")
    agent = make_agent(script, spaces.Box(-3, 5, (2,))).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    u, logprob, _, _ = agent.get_action_and_value(x)
    torch.testing.assert_close(logprob, tanh_policy(agent, x).log_prob(u.tanh()).sum(-1))
    np.testing.assert_allclose(agent.to_env(u.detach().numpy()), 1 + 4 * u.tanh().detach())
    far = torch.tensor([[-90.0, 90.0]]).requires_grad_()  # where 1 - tanh² u rounds to 0
    slope = agent.log_slope(far)
    torch.testing.assert_close(slope, 2 * math.log(2) - 2 * far.abs())
    assert torch.autograd.grad(slope.sum(), far)[0].tolist() == [[2, -2]]


def test_entropy_and_its_gradient_are_those_of_the_squashed_policy():
    """The mean of the estimates against an integral over the actions of one state."""
    script = recipe("squashed_policy")
    agent, x = make_agent(script, spaces.Box(-1, 1, (2,))).double(), torch.ones(1, 4).double()
    parameters = [agent.actor_logstd, agent.actor[-1].bias]
    noise = Normal(0, 1).icdf((torch.arange(20_000).double() + 0.5) / 20_000).unsqueeze(-1)
    u = agent.actor(x) + agent.actor_logstd.exp() * noise
    exact = -tanh_policy(agent, x).log_prob(u.tanh()).mean(0).sum()
    torch.manual_seed(0)
    _, _, entropy, _ = agent.get_action_and_value(x.expand(100_000, 4), u[:1].detach())
    torch.testing.assert_close(entropy.mean(), exact, rtol=0, atol=0.02)
    got = torch.autograd.grad(entropy.mean(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(exact, parameters), rtol=0, atol=0.02)


def test_only_dimensions_with_both_bounds_are_squashed():
    script, inf = recipe("squashed_policy"), np.inf
    low, high = np.array([[-2, -inf], [0, -inf]]), np.array([[4, 0], [inf, inf]])
    agent = make_agent(script, spaces.Box(low, high, dtype=np.float64))
    u = torch.tensor([[0.5, -1.5, 1.5, 7.0], [9.0, 2.0, -2.0, -7.0]])
    expected = [[[1 + 3 * math.tanh(0.5), -1.5], [1.5, 7]], [[1 + 3 * math.tanh(9), 0], [0, -7]]]
    np.testing.assert_allclose(agent.to_env(u.numpy()), expected, rtol=1e-6)
    x = torch.randn(2, 4)
    gaussian = Normal(agent.actor(x), agent.actor_logstd.exp())
    expected = gaussian.log_prob(u).sum(-1) - (1 - u[:, 0].double().tanh() ** 2).log()
    _, logprob, _, _ = agent.get_action_and_value(x, u)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    free = make_agent(script, spaces.Box(-inf, inf, (2,)))
    _, _, entropy, _ = free.get_action_and_value(x)
    gaussian = Normal(free.actor(x), free.actor_logstd.exp())
    torch.testing.assert_close(entropy, gaussian.entropy().sum(-1))


@pytest.fixture
def gru():
    return recipe("gru")


@pytest.fixture
def cnn():
    return recipe("cnn")


def test_gru_learns_from_the_memory_it_acted_with(gru, monkeypatch):
    """Over rollouts and episode ends, acting, `prepare` and `update` agree with a plain loop."""
    sizes = dict(num_envs=6, num_steps=20, num_minibatches=3, update_epochs=2, hidden_size=8)
    args = gru.Args(env_id="tests/Walk-v0", gamma=0.9, norm_reward=False, **sizes)
    torch.manual_seed(0)
    envs = gru.make_envs(args)
    agent, optimizer, _ = gru.begin(envs, args, None)
    for parameter in agent.actor[-1].parameters():
        parameter.data *= 50  # no action is about as likely as another
    optimizer.lr = 0.0
    greedy = lambda shape, beta: torch.zeros(shape)  # noqa: E731
    monkeypatch.setattr(gru, "colored_noise", greedy)  # the likeliest actions, known beforehand
    compared = []

    def ppo_loss(logprobs, entropies, values, mb, args, loss=gru.ppo_loss):
        real = mb.weights > 0
        torch.testing.assert_close(logprobs[real], mb.logprobs[real])
        torch.testing.assert_close(values[real], mb.values[real])
        compared.append(len(values))
        return loss(logprobs, entropies, values, mb, args)

    monkeypatch.setattr(gru, "ppo_loss", ppo_loss)
    obs, _ = envs.reset(seed=1)
    memory = torch.zeros(args.num_envs, args.hidden_size)  # of the plain loop
    obs = gru.flat(obs, memory.numpy())
    state = (obs, np.zeros(args.num_envs, bool), np.zeros(args.num_envs, np.float32))
    ends_at_boundary = 0
    for _ in range(3):
        rollout, state, _ = gru.collect(envs, agent, state, 0, args)
        values = []
        for row in range(args.num_steps + 1):
            x = agent.gru(agent.normalize(rollout.obs[row][:, :3]), memory).detach()
            logprobs = agent.actor(x).log_softmax(-1).detach()
            values.append(agent.get_value(x).detach())
            if row < args.num_steps:
                assert torch.equal(rollout.actions[row], logprobs.argmax(-1))
                torch.testing.assert_close(rollout.logprobs[row], logprobs.max(-1).values)
                memory = torch.where(rollout.resets[row].unsqueeze(-1), 0, x)
        ends_at_boundary += int(rollout.resets[-1].sum())
        assert rollout.resets[1:-1].any()

        batch = gru.prepare(rollout, agent, args)
        torch.testing.assert_close(batch.values, torch.stack(values[:-1]).flatten())
        dones = rollout.resets[1:]
        columns = (rollout.rewards[:-1], torch.stack(values[:-1]), torch.stack(values[1:]))
        ends = (rollout.terminations[:-1], dones)
        advantages = gru.compute_gae(*columns, *ends, args.gamma, args.gae_lambda)
        torch.testing.assert_close(batch.advantages, advantages.flatten())

        gru.update(agent, optimizer, rollout, args)
        agent.obs_stats.update(rollout.obs[:-1][rollout.is_real][:, :3])
    assert ends_at_boundary > 0
    # 3 rollouts of 2 epochs of 3 minibatches, and of diagnose for each of the rollouts
    assert sorted(compared) == 18 * [40] + 3 * [120]
    envs.close()


def test_gru_minibatches_deal_out_each_row_once(gru):
    args = gru.Args(num_envs=6, num_steps=5, num_minibatches=3)
    rows = torch.arange(30.0)
    batch = gru.Batch(rows.unsqueeze(-1), *rows.expand(5, -1), weights=torch.ones(30))
    mbs = gru.minibatches(batch, args)
    assert torch.equal(torch.cat([mb.obs for mb in mbs]).flatten().sort().values, rows)
    for mb in mbs:
        envs = mb.obs.view(5, 2) % 6
        assert torch.equal(envs, envs[:1].expand(5, -1))
    shuffles = {tuple(gru.minibatches(batch, args)[0].obs.flatten().tolist()) for _ in range(9)}
    assert len(shuffles) > 1


def test_gru_gradient_reaches_the_first_step(gru):
    args = gru.Args(hidden_size=8)
    agent = gru.Agent(Walk.observation_space, Walk.action_space, args)
    obs = torch.randn(7, 2, 3 + 8).requires_grad_()
    agent.remember(obs)[-1, 0].sum().backward()
    assert (obs.grad[0, 0] != 0).all()  # the first memory too
    assert (obs.grad[1:, 0, :3] != 0).all()
    assert (obs.grad[1:, :, 3:] == 0).all() and (obs.grad[:, 1] == 0).all()


def test_gru_evaluation_carries_the_memory_through_each_episode(gru, tmp_path, monkeypatch):
    args = gru.Args(env_id="tests/Recall-v0", hidden_size=8)
    agent = gru.Agent(Recall.observation_space, Recall.action_space, args)
    seen, made = [], [None]

    def act(obs, *noise, act=agent.act):
        seen.append(obs[:, 2:])
        action, memory = act(obs, *noise)
        made.append(memory)
        return action, memory

    monkeypatch.setattr(agent, "act", act)
    assert len(list(gru.play(agent, args, 3, str(tmp_path)))) == 3
    assert len(seen) == 15  # three episodes of five steps
    for step, (before, memory) in enumerate(zip(seen, made[:-1], strict=True)):
        assert np.array_equal(before, np.zeros((1, 8)) if step % 5 == 0 else memory)


def test_gru_solves_what_needs_a_memory(gru, tmp_path):
    """Without a memory, the mean return is 0.5."""
    sizes = dict(num_envs=16, num_steps=32, num_minibatches=4, update_epochs=4, hidden_size=32)
    options = dict(run_dir=str(tmp_path / "run"), total_timesteps=15_000, target_return=0.98)
    args = gru.Args("gru", env_id="tests/Recall-v0", eval_episodes=20, **sizes, **options)
    result = gru.train(args)
    assert result["solved_at"] is not None
    assert result["eval_returns"] == 20 * [1.0]


@pytest.mark.parametrize("option", [dict(num_minibatches=32), dict(compile=True)])
def test_gru_refuses(gru, option):
    with pytest.raises(gru.UsageError, match=next(iter(option)).replace("_", "-")):
        gru.train(gru.Args(**option))


@pytest.mark.parametrize("shape", [(36, 44, 1), (84, 84, 4), (96, 96, 3)])
def test_cnn_sees_images_as_they_are(cnn, shape):
    """Rows, columns and channels keep their places on the way to the convolutions."""
    space = spaces.Box(0, 255, shape, np.uint8)
    agent = cnn.Agent(space, spaces.Discrete(5), cnn.Args())
    images = np.random.default_rng(1).integers(0, 256, (6, *shape), np.uint8)
    x = agent.normalize(torch.as_tensor(cnn.flat(images)))
    assert x.min() >= 0 and 0.9 < x.max() <= 1
    planes = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    features = nn.Sequential.forward(agent.actor[0], planes).flatten(1)
    torch.testing.assert_close(agent.actor(x), agent.actor[1:](features))
    torch.testing.assert_close(agent.actor(x.view(3, 2, -1)), agent.actor(x).view(3, 2, 5))
    assert agent.get_value(x.view(3, 2, -1)).shape == (3, 2)
    assert agent.act(cnn.flat(images)).shape == (6,)


def test_cnn_drives_a_car(cnn):
    """CarRacing-v3 with discrete actions: images of 96 x 96 x 3."""
    env = gym.make("CarRacing-v3", continuous=False)
    agent = cnn.Agent(env.observation_space, env.action_space, cnn.Args())
    obs, _ = env.reset(seed=1)
    action = agent.to_env(agent.act(cnn.flat(obs[None])))
    assert env.step(action[0])[0].shape == (96, 96, 3)
    env.close()


def test_cnn_solves_what_needs_to_see(cnn, tmp_path):
    """Blindly, the mean return is 2 of 8."""
    sizes = dict(num_envs=16, num_steps=32, num_minibatches=4, update_epochs=2)
    options = dict(run_dir=str(tmp_path / "run"), total_timesteps=6_000)
    args = cnn.Args("cnn", env_id="tests/Corner-v0", eval_episodes=10, **sizes, **options)
    assert np.mean(cnn.train(args)["eval_returns"]) > 7


def test_cnn_refuses_what_is_no_image(cnn):
    with pytest.raises(cnn.UsageError, match="uint8"):
        cnn.make_envs(cnn.Args(env_id="CartPole-v1"))


def randomised(agent, seed: int = 0):
    """The agent with random weights, large enough that probabilities differ clearly."""
    torch.manual_seed(seed)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return agent


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected).square() / expected).sum())


class TestMultiDiscrete:
    @property
    def script(self):
        return recipe("multidiscrete")

    nvec = [2, 5, 3]

    def agent(self, space=None):
        space = space or spaces.MultiDiscrete(self.nvec, start=[0, -2, 7])
        observations = spaces.Box(-1, 1, (4,), np.float32)
        return randomised(self.script.Agent(observations, space, self.script.Args()))

    def by_definition(self, agent, x) -> list[Categorical]:
        return [Categorical(logits=part) for part in agent.actor(x).split(self.nvec, -1)]

    def test_log_probability_and_entropy_are_sums_over_the_dimensions(self):
        agent, x = self.agent(), torch.randn(64, 4)
        actions = torch.stack([torch.randint(n, (64,)) for n in self.nvec], -1)
        _, logprob, entropy, _ = agent.get_action_and_value(x, actions)
        parts = self.by_definition(agent, x)
        columns = zip(parts, actions.T, strict=True)
        torch.testing.assert_close(logprob, sum(part.log_prob(a) for part, a in columns))
        torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))

    def test_probabilities_of_all_actions_sum_to_1(self):
        agent, x = self.agent(), torch.randn(4)
        actions = torch.cartesian_prod(*map(torch.arange, self.nvec))
        _, logprobs, _, _ = agent.get_action_and_value(x.expand(len(actions), -1), actions)
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)

    @torch.no_grad()
    def test_actions_are_samples_and_greedy_ones_the_mode(self):
        agent, x = self.agent(), torch.randn(4)
        noise = torch.randn(100_000, agent.actor[-1].out_features)  # as `collect` draws it
        actions = agent.get_action(x, noise)
        assert actions.shape == (100_000, 3) and actions.dtype == torch.int64
        choices = torch.cartesian_prod(*map(torch.arange, self.nvec))
        counts = torch.stack([(actions == choice).all(-1).sum() for choice in choices])
        _, logprobs, _, _ = agent.get_action_and_value(x.expand(len(choices), -1), choices)
        assert chi_square(counts, logprobs.exp()) < 60  # 29 degrees of freedom: p < 0.001
        greedy = agent.get_action(x, self.script.GREEDY)
        assert greedy.tolist() == [part.probs.argmax() for part in self.by_definition(agent, x)]

    @pytest.mark.parametrize("dtype", [np.int64, np.int8])
    def test_environments_get_actions_of_their_space(self, dtype):
        space = spaces.MultiDiscrete([[2, 3], [4, 5]], dtype, start=[[0, 1], [2, -3]])
        agent = self.agent(space)
        x, noise = torch.randn(4000, 4), torch.randn(4000, agent.actor[-1].out_features)
        actions = agent.to_env(agent.get_action(x, noise).numpy())
        assert all(action in space for action in actions)
        assert (actions.min(0) == space.start).all()
        assert (actions.max(0) == space.start + space.nvec - 1).all()

    @pytest.mark.parametrize("env", ["Digits", "Grid"])
    def test_learns(self, env, tmp_path):
        options = dict(run_dir=str(tmp_path / "run"), total_timesteps=20_000)
        result = self.script.train(self.script.Args(env_id=f"tests/{env}-v0", **options))
        assert np.mean(result["eval_returns"]) > 0.95

    def test_other_actions_are_refused(self):
        with pytest.raises(self.script.UsageError, match="MultiDiscrete is needed"):
            self.script.make_envs(self.script.Args(env_id="CartPole-v1"))


class TestActionMasking:
    @property
    def script(self):
        return recipe("action_masking")

    def agent(self):
        observations = spaces.Box(-1, 1, (9,), np.float32)  # 5 of the mask, 4 others
        return randomised(self.script.Agent(observations, spaces.Discrete(5), self.script.Args()))

    def observations(self, n: int = 64) -> torch.Tensor:
        mask = torch.rand(n, 5) < 0.5
        mask[:, 2] = ~mask.any(-1)  # otherwise none were valid
        return torch.cat([mask, torch.randn(n, 4)], -1)

    def test_policy_is_the_softmax_over_valid_actions(self):
        agent, x = self.agent(), self.observations()
        for row in x:
            valid = row[:5].nonzero().squeeze(-1)
            expected = Categorical(logits=agent.actor(row)[valid])
            rows = row.expand(len(valid), -1)
            _, logprobs, entropy, _ = agent.get_action_and_value(rows, valid)
            torch.testing.assert_close(logprobs.exp(), expected.probs)
            torch.testing.assert_close(entropy, expected.entropy().expand(len(valid)))

    @torch.no_grad()
    def test_actions_are_samples_and_greedy_ones_the_mode(self):
        agent, x = self.agent(), torch.tensor([1.0, 0, 1, 0, 1, 0.3, -0.2, 0.1, 0.5])
        actions = agent.get_action(x, torch.randn(100_000, agent.actor[-1].out_features))
        counts = actions.bincount(minlength=5)
        probabilities = agent.actor(x)[:5:2].softmax(-1)
        assert counts[1] == counts[3] == 0
        assert chi_square(counts[::2], probabilities) < 14  # 2 degrees of freedom: p < 0.001
        assert agent.get_action(x, self.script.GREEDY) == 2 * probabilities.argmax()

    def test_no_gradient_reaches_invalid_logits(self):
        agent, x = self.agent(), torch.tensor([1.0, 0, 1, 0, 1, 0.3, -0.2, 0.1, 0.5])
        _, logprob, entropy, _ = agent.get_action_and_value(x, torch.tensor(2))
        (bias,) = torch.autograd.grad(logprob + entropy, agent.actor[-1].bias)
        assert (bias != 0).tolist() == [True, False, True, False, True]

    def test_where_nothing_is_valid_all_is_finite(self):
        """So is the last observation of an episode, from which no step is made."""
        agent, x = self.agent(), torch.zeros(9)
        _, logprob, entropy, value = agent.get_action_and_value(x, torch.tensor(3))
        loss = logprob + entropy + value
        gradients = torch.autograd.grad(loss, [*agent.parameters()])
        assert logprob.item() == pytest.approx(-math.log(5))
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_normalisation_leaves_the_mask_alone(self):
        """Whether an action is always valid, never, or so rarely that it is many deviations off."""
        agent, obs = self.agent(), self.observations(4096)
        obs[:, 0], obs[:, 1], obs[:, 3] = 1, 0, torch.arange(4096) == 7
        obs[:, 5:] = 100 + 5 * obs[:, 5:]
        agent.obs_stats.update(obs)
        x = agent.normalize(obs)
        assert x.dtype == torch.float32
        assert x[:, :5].equal(obs[:, :5])
        assert x[:, 5:].mean().abs() < 1e-3 and (x[:, 5:].std() - 1).abs() < 1e-3

    def test_learns_and_never_takes_an_invalid_action(self, tmp_path):
        """The environment raises an error for one, in training and in the greedy episodes."""
        options = dict(run_dir=str(tmp_path / "run"), total_timesteps=30_000)
        args = self.script.Args(env_id="tests/HighestValid-v0", **options)
        assert self.script.train(args)["eval_returns"] == [4] * 10

    box, mask = spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)

    @pytest.mark.parametrize(
        "space",
        [
            box,
            spaces.Dict(observation=box),
            spaces.Dict(action_mask=spaces.MultiBinary(2), observation=box),
            spaces.Dict({"action_mask": mask, "Observation": box}),  # sorted, this comes first
            spaces.Dict(observation=box, action_mask=mask),  # Gymnasium sorts no keywords
            spaces.Tuple([mask, box]),
        ],
    )
    def test_observations_that_do_not_begin_with_a_mask_are_refused(self, space):
        class Silent(gym.Env):
            action_space, observation_space = spaces.Discrete(3), space

        gym.registry.pop("tests/Silent-v0", None)
        gym.register("tests/Silent-v0", Silent)
        with pytest.raises(self.script.UsageError, match="begins with action_mask, of 3 numbers"):
            self.script.make_envs(self.script.Args(env_id="tests/Silent-v0"))

    @pytest.mark.parametrize("mask", [spaces.MultiBinary(3), spaces.Box(0, 1, (3,), np.int8)])
    def test_both_kinds_of_mask_are_taken(self, mask):
        class Masked(gym.Env):
            action_space = spaces.Discrete(3)
            observation_space = spaces.Dict(action_mask=mask, observation=spaces.Discrete(2))

            def reset(self, *, seed=None, options=None):
                return {"action_mask": np.array([0, 1, 0], np.int8), "observation": 1}, {}

        gym.registry.pop("tests/Masked-v0", None)
        gym.register("tests/Masked-v0", Masked)
        envs = self.script.make_envs(self.script.Args(env_id="tests/Masked-v0", num_envs=2))
        obs, _ = envs.reset()
        assert self.script.flat(obs).tolist() == [[0, 1, 0, 0, 1]] * 2


def offline_run(path: Path) -> tuple[object, dict[str, list[tuple[int, float]]]]:
    """A .wandb file: its run record and the (global step, value) of each scalar.

    The file is LevelDB's log, blocks of 32 KiB with records cut into parts, after 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, run, points = path.read_bytes(), 7, b"", None, defaultdict(list)
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # padding
            at += 32768 - at % 32768
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            run = record.run if record.HasField("run") else run
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            row = {name: json.loads(item.value_json) for name, item in items.items()}
            for name in row.keys() - {"global_step", "_step", "_runtime", "_timestamp"}:
                points[name].append((row["global_step"], row[name]))
    return run, points


class TestWandb:
    def play(self, folder: Path, *options: str) -> None:
        """Run the patched script; wandb looks for the root of the logs for 10 s, asleep."""
        command = [sys.executable, str(patched("wandb")), "--num-steps", "64", *options]
        env = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    def test_a_run_and_what_it_went_on_with_hold_the_scalars_of_tensorboard(self, tmp_path):
        self.play(tmp_path, "--run-dir", "a/run", "--total-timesteps", "4096")
        self.play(tmp_path, "--resume", "a/run", "--total-timesteps", "8192")
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        events = sorted((tmp_path / "a/run").glob("events*"))
        assert len(files) == len(events) == 2
        (first, earlier), (second, later) = map(offline_run, files)
        for file, found in zip(events, (earlier, later), strict=True):
            expected = curves(file)
            assert found.keys() == expected.keys() >= {"charts/SPS", "eval/episodic_return"}
            for tag, points in expected.items():
                assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
                values = [value for _, value in found[tag]]
                assert values == pytest.approx([value for _, value in points], nan_ok=True), tag
        assert max(earlier["charts/SPS"])[0] < min(later["charts/SPS"])[0]
        assert first.run_id == second.run_id
        assert first.display_name == "run" and first.project == "ppo"
        config = {item.key: json.loads(item.value_json) for item in second.config.update}
        assert config["total_timesteps"] == 8192 and config["num_steps"] == 64

    def test_each_folder_is_a_run_of_the_first_process(self, tmp_path, monkeypatch):
        """The same one when it goes on, another one in another folder of the same name."""
        script, calls = recipe("wandb"), []
        start = lambda **options: contextlib.nullcontext(calls.append(options))  # noqa: E731
        monkeypatch.setattr(script.wandb, "init", start)
        args = script.Args(num_envs=2, num_steps=32, total_timesteps=64, eval_episodes=0)
        for run_dir in ("a/run", "b/run"):
            script.train(script.replace(args, run_dir=str(tmp_path / run_dir)))
        monkeypatch.chdir(tmp_path)  # so that the folder has another name
        script.train(script.replace(args, resume="b/run", total_timesteps=128))
        script.train(script.replace(args, evaluate="b/run"))  # no training: nothing to log
        monkeypatch.setattr(script, "RANK", 1)
        script.train(script.replace(args, run_dir=str(tmp_path / "c")))
        first, second, again = calls
        assert first["id"] != second["id"] == again["id"]
        assert {call["resume"] for call in calls} == {"allow"}
