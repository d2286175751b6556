"""The recipes: each patch applies to the script of now, which then does what the patch says."""

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
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, curves, main, start
from envs import Strict
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import ppo_continuous

RECIPES = ROOT / "tests" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.patch"))
ENVIRONMENTS = {
    "action_masking": "tests/HighestValid-v0",
    "cnn": "tests/Corner-v0",
    "episode_info": "tests/Success-v0",
    "gru": "tests/Walk-v0",
    "multidiscrete": "tests/Digits-v0",
    "wandb": "tests/Walk-v0",
}
SMALL = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2)
FOLDER = tempfile.TemporaryDirectory()  # for the patched scripts


def script_of(name: str) -> str:
    return re.search(r"^--- a/(.+)$", (RECIPES / f"{name}.patch").read_text(), re.MULTILINE)[1]


@functools.cache
def patched(name: str) -> Path:
    """The script that a recipe makes."""
    folder = Path(FOLDER.name) / f"recipe_{name}"
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / script_of(name), folder)
    subprocess.run(["git", "apply", RECIPES / f"{name}.patch"], cwd=folder, check=True)
    return folder / script_of(name)


@functools.cache
def recipe(name: str):
    """The module of that script."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", patched(name))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(name: str, **options):
    """The `Args` of a recipe for a small run, in an environment that suits it."""
    env_id = ENVIRONMENTS.get(name, "Pendulum-v1")
    return recipe(name).Args(**SMALL | {"env_id": env_id, "eval_episodes": 0} | options)


def make_agent(name: str, actions: spaces.Space, obs_dim: int = 4):
    """An agent whose policy depends on the state."""
    script = recipe(name)
    torch.manual_seed(3)
    agent = script.Agent(spaces.Box(-1, 1, (obs_dim,)), actions, script.Args())
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.4)
    return agent


def train_and_play(name: str, run_dir, **options) -> float:
    """The mean return of greedy episodes after training."""
    args = arguments(name, run_dir=str(run_dir), **options)
    recipe(name).train(args)
    return recipe(name).evaluate(args, f"{run_dir}/checkpoint.pt")


def parameters(module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return ((counts - expected).square() / expected).sum().item()


@pytest.fixture
def told(monkeypatch):
    """What W&B is told, in a list instead of to W&B."""
    calls, wandb = [], recipe("wandb").wandb
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(wandb.tensorboard, "patch", lambda **options: calls.append(options))
    return calls


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_trains_goes_on_and_plays(name, tmp_path, monkeypatch, capsys, request):
    if name == "wandb":
        request.getfixturevalue("told")
    monkeypatch.chdir(tmp_path)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    options = ["--run-dir=run", "--env-id", arguments(name).env_id, *sizes, "--eval-episodes=3"]
    steps = []
    played = []
    for command in (
        [*options, "--total-timesteps=100"],
        [*options, "--total-timesteps=200"],
        ["--evaluate=run/checkpoint.pt"],
    ):
        assert main(recipe(name), command, monkeypatch) == 0
        said = capsys.readouterr().out
        steps += map(int, re.findall(r"^step (\d+) ", said, re.MULTILINE))
        played += re.findall(r"greedy return of 3 episodes: .+", said)
    assert steps == [64, 128, 192, 256]
    _, last, again = played
    assert last == again  # a checkpoint has all that acting needs


def test_patched_scripts_are_clean():
    for command in (["format", "--check"], ["check", "--no-cache"]):
        command += ["--config", ROOT / ".ruff.toml", *map(patched, NAMES)]
        command = [sys.executable, "-m", "ruff", *command]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_readme_lists_each_recipe_with_its_changed_lines():
    rows = re.findall(
        r"^\| \[(.+?)\]\((.+?)\) \| `(.+?)` \| .+ \| (\d+) \|$",
        (RECIPES / "README.md").read_text(),
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == NAMES
    for name, link, script, changes in rows:
        text, _, hunks = (RECIPES / link).read_text().partition("\n--- a/")
        assert link == f"{name}.patch" and script == script_of(name)
        assert text.count("\n") <= 3
        assert len(re.findall(r"^(?:\+(?!\+\+ b/)|-)", hunks, re.MULTILINE)) == int(changes)


@pytest.fixture
def repository(tmp_path):
    """A git repository with renew.py: how to run a command there, the script and the patch."""
    (tmp_path / "tests/recipes").mkdir(parents=True)
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path)
    for file in ("renew.py", "shared_trunk.patch", "README.md"):
        shutil.copy(RECIPES / file, tmp_path / "tests/recipes")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}

    def run(*command) -> subprocess.CompletedProcess:
        settings = dict(cwd=tmp_path, env=environ, capture_output=True, text=True)
        return subprocess.run([*map(str, command)], **settings)

    run("git", "init", "-q")
    run("git", "config", "user.email", "a@b.c")
    run("git", "config", "user.name", "a")
    run("git", "add", "ppo_continuous.py")
    assert run("git", "commit", "-qm", "script").returncode == 0
    return run, tmp_path / "ppo_continuous.py", tmp_path / "tests/recipes/shared_trunk.patch"


def edit(file: Path, old: str, new: str) -> str:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file.read_text()


def test_renew_follows_the_script(repository):
    run, script, patch = repository
    renew, readme = (sys.executable, "tests/recipes/renew.py"), patch.parent / "README.md"
    words = patch.read_text().partition("--- a/")[0]
    assert run(*renew).returncode == 0
    before = patch.read_text()
    assert "as before" in run(*renew).stdout and patch.read_text() == before
    edit(readme, "hidden layers | 2 |", "hidden layers | 5 |")
    for line in ("self.critic = network(1, last_gain=1.0)", "def network(outputs: int,"):
        edited = edit(script, line, f"pass\n        {line}")
        assert run("git", "apply", "--check", patch).returncode == (1 if "critic" in line else 0)
        assert "renewed, 2 changed lines" in run(*renew, "shared_trunk").stdout
        text, _, hunks = patch.read_text().partition("--- a/")
        assert text == words and "+        pass" not in hunks
        assert run("git", "apply", patch).returncode == 0
        assert run("git", "apply", "-R", patch).returncode == 0
        assert script.read_text() == edited
    assert "hidden layers | 2 |" in readme.read_text()

    edit(
        script,
        "self.actor = network(action_dim, last_gain=0.01)",
        "self.actor = network(action_dim, 0.02)",
    )
    renewed, conflict = patch.read_text(), run(*renew)
    assert conflict.returncode == 1 and patch.read_text() == renewed
    mended = Path(re.search(r"CONFLICT, mend (\S+)", conflict.stdout)[1])
    theirs = re.compile(r"<{7}.+?={7}\n(.+?)>{7}.*?\n", re.DOTALL)
    mended.write_text(theirs.sub(r"\1", mended.read_text(), count=1))
    assert run(*renew, f"shared_trunk={mended}").returncode == 0
    assert run("git", "apply", patch).returncode == 0
    assert script.read_text() == mended.read_text()
    assert "critic[:-1]" in script.read_text() and "<<<<<<<" not in script.read_text()


# adaptive_kl


def test_the_penalty_is_the_kl_from_the_old_to_the_new_policy():
    """Value and gradient, estimated from actions of the old one: eq. 8 without advantages."""
    script, n = recipe("adaptive_kl"), 100_000
    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    logstd = torch.tensor(math.log(0.4), dtype=torch.float64, requires_grad=True)
    old, new = Normal(torch.zeros((), dtype=torch.float64), 0.5), Normal(mean, logstd.exp())
    actions = old.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # the old one's quantiles
    zeros = torch.zeros_like(actions)
    judge = {"get_logprob_and_entropy": lambda obs, a: (new.log_prob(a), zeros)}
    agent = SimpleNamespace(beta=2.0, critic=lambda obs: zeros.unsqueeze(-1), **judge)
    args, fixed = script.Args(norm_adv=False), (zeros, actions, old.log_prob(actions), zeros)
    loss, _ = script.ppo_loss(agent, args, *fixed, zeros, zeros)
    exact = 2 * kl_divergence(old, new)  # 2 x 0.18; the other way round it would be 2 x 0.12
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    gradients = [torch.autograd.grad(y, [mean, logstd], retain_graph=True) for y in (loss, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)
    agent.beta = 0.0
    loss, _ = script.ppo_loss(agent, args, *fixed, (actions > 0).double(), zeros)
    above = 1 - new.cdf(zeros[0])  # E_old[r(θ) A] = π(a > 0), nothing is clipped
    torch.testing.assert_close(-loss, above, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("share", "factor"), [(0.66, 0.5), (0.67, 1), (1.49, 1), (1.51, 2)])
def test_beta_follows_the_kl(share, factor):
    script, calls = recipe("adaptive_kl"), []
    args = arguments("adaptive_kl", target_kl=0.005 / share)
    envs, agent, params, optimizer = start(script, args)
    rollout = next(script.collect(envs, agent, args, envs.reset(seed=1)[0]))

    def gradient(*_):
        calls.append(None)
        return torch.zeros_like(params), {"losses/approx_kl": torch.tensor(0.005)}

    for before in (1.0, factor):
        assert agent.state_dict()["beta"] == before  # a checkpoint holds it
        log = script.update(agent, params, optimizer, rollout, args, gradient)
        assert log["losses/beta"] == before
    assert agent.beta == factor**2
    assert len(calls) == 8  # no epoch is left out


# shared_trunk


def test_both_losses_train_the_trunk():
    agent = make_agent("shared_trunk", spaces.Box(-1, 1, (2,)))
    x, action = torch.randn(7, 4), torch.randn(7, 2)
    logprob, _ = agent.get_logprob_and_entropy(x, action)
    weights = [layer.weight for layer in agent.critic[:-1] if hasattr(layer, "weight")]
    assert [weight.shape for weight in weights] == [(64, 4), (64, 64)]
    for loss in (logprob.sum(), agent.critic(x).sum()):
        assert all(g.any() for g in torch.autograd.grad(loss, weights))
    sizes = [5 * 64, 65 * 64, 65 * 1, 65 * 2, 2]  # trunk, value, mean, deviation: nothing twice
    assert len(parameters(agent)) == sum(sizes)


# separate_learning_rates


def test_each_network_learns_at_its_own_rate(tmp_path):
    """Equal rates are the script itself; with a rate of 0, only the other network moves."""
    script, rates = recipe("separate_learning_rates"), {}

    def learn(script, **options):
        folder = str(tmp_path / f"{len(rates)}")
        options |= {"env_id": "tests/CountingContinuous-v0", "run_dir": folder}
        args = script.Args(**SMALL, **options, total_timesteps=150, eval_episodes=0)
        agent = script.train(args)
        rates[agent] = curves(folder)
        return agent

    base = learn(ppo_continuous, learning_rate=1e-3)
    initial, equal, policy, value = (
        learn(script, learning_rate=lr, value_learning_rate=value_lr)
        for lr, value_lr in ((0.0, 0.0), (1e-3, 1e-3), (1e-3, 0.0), (0.0, 1e-3))
    )
    torch.testing.assert_close(parameters(equal), parameters(base))
    for moved, at_rest in ((policy, "critic"), (value, "actor")):
        for name, before in initial.named_parameters():
            assert torch.equal(moved.get_parameter(name), before) == name.startswith(at_rest)
    annealed = [lr for _, lr in rates[policy]["charts/learning_rate"]]
    assert annealed[0] == pytest.approx(1e-3) and annealed == sorted(set(annealed), reverse=True)
    assert [lr for _, lr in rates[value]["charts/value_learning_rate"]] == annealed


# returns_minus_baseline


def test_returns_are_the_discounted_rewards_and_what_is_left_at_the_end():
    script, gamma, shape = recipe("returns_minus_baseline"), 0.9, (23, 7)
    rng = np.random.default_rng(0)
    done = rng.random(shape) < 0.3
    terminated = done & (rng.random(shape) < 0.5)
    assert (done & ~terminated).any() and terminated.any() and not done[-1].all()
    rewards, values, next_values = rng.normal(size=(3, *shape))
    columns = map(torch.tensor, (rewards, values, next_values, terminated, done))
    got = script.compute_advantages(*columns, script.Args(gamma=gamma)).numpy() + values
    for t, env in np.ndindex(shape):
        last = t + [*done[t:-1, env], True].index(True)
        steps = np.arange(last - t + 1)
        expected = gamma**steps @ rewards[t : last + 1, env]
        if not terminated[last, env]:
            expected += gamma ** len(steps) * next_values[last, env]
        assert got[t, env] == pytest.approx(expected, abs=1e-12)


def test_the_same_is_learned_as_from_gae_with_lambda_1(tmp_path):
    options = SMALL | dict(total_timesteps=50, env_id="tests/CountingContinuous-v0")
    script = recipe("returns_minus_baseline")
    agents = [
        script.train(script.Args(**options, run_dir=str(tmp_path / "a"))),
        ppo_continuous.train(
            ppo_continuous.Args(**options, run_dir=str(tmp_path / "b"), gae_lambda=1.0)
        ),
    ]
    torch.testing.assert_close(*map(parameters, agents), rtol=0, atol=1e-5)


# squashed_policy


def tanh_policy(agent, x):
    normal = Normal(agent.actor(x), agent.actor_logstd.exp())
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def test_log_density_is_that_of_the_squashed_action():
    agent = make_agent("squashed_policy", spaces.Box(-3, 5, (2,))).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    u = agent.get_action(x)
    logprob, _ = agent.get_logprob_and_entropy(x, u)
    torch.testing.assert_close(logprob, tanh_policy(agent, x).log_prob(u.tanh()).sum(-1))
    np.testing.assert_allclose(agent.to_env(u.numpy()), 1 + 4 * u.tanh(), rtol=1e-6)
    far = torch.tensor([[-90.0, 90.0]]).requires_grad_()  # where 1 - tanh² u rounds to 0
    slope = agent.log_slope(far)
    torch.testing.assert_close(slope, 2 * math.log(2) - 2 * far.abs())
    assert torch.autograd.grad(slope.sum(), far)[0].tolist() == [[2, -2]]


def test_entropy_and_its_gradient_are_those_of_the_squashed_policy():
    """The mean of the estimates against an integral over the actions of one state."""
    agent = make_agent("squashed_policy", spaces.Box(-1, 1, (2,))).double()
    x, biases = torch.ones(1, 4).double(), [agent.actor_logstd, agent.actor[-1].bias]
    noise = Normal(0, 1).icdf((torch.arange(20_000).double() + 0.5) / 20_000).unsqueeze(-1)
    u = agent.actor(x) + agent.actor_logstd.exp() * noise
    exact = -tanh_policy(agent, x).log_prob(u.tanh()).mean(0).sum()
    _, entropy = agent.get_logprob_and_entropy(x.expand(100_000, 4), u[:1].detach())
    torch.testing.assert_close(entropy.mean(), exact, rtol=0, atol=0.02)
    got = torch.autograd.grad(entropy.mean(), biases)
    torch.testing.assert_close(got, torch.autograd.grad(exact, biases), rtol=0, atol=0.02)


def test_only_dimensions_with_both_bounds_are_squashed():
    low, high = np.array([[-2, -np.inf], [0, -np.inf]]), np.array([[4, 0], [np.inf, np.inf]])
    space = spaces.Box(low, high, dtype=np.float64)
    agent, plain = make_agent("squashed_policy", space), ppo_continuous.Args()
    plain = ppo_continuous.Agent(spaces.Box(-1, 1, (4,)), space, plain)
    plain.load_state_dict(agent.state_dict(), strict=False)
    u, x = torch.tensor([[0.5, -1.5, 1.5, 7.0], [9.0, 2.0, -2.0, -7.0]]), torch.randn(2, 4)
    expected = plain.to_env(u.numpy())
    expected[:, 0, 0] = 1 + 3 * np.tanh([0.5, 9])
    np.testing.assert_allclose(agent.to_env(u.numpy()), expected, rtol=1e-6)
    logprob, _ = plain.get_logprob_and_entropy(x, u)
    expected = logprob - (1 - u[:, 0].double().tanh() ** 2).log()
    logprob, _ = agent.get_logprob_and_entropy(x, u)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


# colored_noise


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 101, 256])
def test_noise_is_standard_normal_with_its_power_spectrum(beta, steps):
    torch.manual_seed(0)
    noise = recipe("colored_noise").colored_noise((steps, 5_000, 2), beta).double()
    for row in noise[:: math.ceil(steps / 4)]:  # each step alone
        moments = torch.stack([row.pow(k).mean() for k in (1, 2, 4)])
        torch.testing.assert_close(moments, torch.tensor([0.0, 1, 3]).double(), atol=0.3, rtol=0)
        assert (moments[:2] - torch.tensor([0, 1])).abs().max() < 0.06
        assert row.prod(-1).mean().abs() < 0.06  # columns are independent
    power = torch.fft.rfft(noise, dim=0).abs().square().mean((1, 2))[1:]
    expected = torch.arange(1.0, len(power) + 1) ** -beta
    torch.testing.assert_close(power / power[0], expected.double(), atol=0, rtol=0.1)


def test_noise_makes_the_actions_and_its_color_falls_to_white(tmp_path, monkeypatch):
    """Also in a run that goes on."""
    script, drawn, steps = recipe("colored_noise"), [], []
    colored_noise = script.colored_noise

    def draw(shape, beta):
        drawn.append((beta, colored_noise(shape, beta)))
        return drawn[-1][1]

    def update(agent, params, optimizer, rollout, args, gradient):
        beta, noise = drawn[-1]
        steps.append(64 * len(steps))
        assert beta == pytest.approx(0.8 * (1 - steps[-1] / args.total_timesteps))
        expected = agent.actor(agent.normalize(rollout["obs"])) + agent.actor_logstd.exp() * noise
        torch.testing.assert_close(rollout["actions"], expected.detach())
        return {}

    monkeypatch.setattr(script, "colored_noise", draw)
    monkeypatch.setattr(script, "update", update)
    options = dict(noise_color=0.8, env_id="tests/EndlessContinuous-v0", run_dir=str(tmp_path))
    for total in (100, 300):
        script.train(arguments("colored_noise", total_timesteps=total, **options))
    assert len(drawn) == len(steps) == 5


# episode_info


class Success(gym.Env):
    """1 to 5 steps; the return of an episode is 1 if it was a success, which `info` says."""

    observation_space, action_space = spaces.Box(0, 1, (1,)), spaces.Box(-1, 1, (1,))

    def __init__(self, kind: str = "at the end"):
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.success = self.np_random.integers(1, 6), self.np_random.random() < 0.5
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        ended = bool(self.left == 0)
        said = {"always": self.success if ended else not self.success, "number": int(self.success)}
        said["array"] = np.bool_(self.success)
        said["at the end"] = bool(self.success)
        is_said = self.kind != "never" and (ended or self.kind != "at the end")
        info = {"is_success": said[self.kind]} if is_said else {}
        return np.zeros(1, np.float32), float(ended and self.success), False, ended, info


gym.register("tests/Success-v0", Success)


@pytest.mark.parametrize("kind", ["always", "number", "array", "at the end", "never"])
def test_success_is_that_of_the_episode(kind, tmp_path):
    """A point for each episode, at its end."""
    gym.registry.pop("tests/SuccessSaid-v0", None)
    gym.register("tests/SuccessSaid-v0", Success, kwargs={"kind": kind})
    options = dict(total_timesteps=120, env_id="tests/SuccessSaid-v0", run_dir=str(tmp_path))
    recipe("episode_info").train(arguments("episode_info", **options))
    found = curves(tmp_path)
    returns = found["charts/episodic_return"]
    assert len(returns) > 20 and {value for _, value in returns} == {0, 1}
    expected = [(step, 0.0) for step, _ in returns] if kind == "never" else returns
    assert found["charts/success"] == expected


# gru


def test_gru_learns_from_the_memory_it_acted_with(monkeypatch):
    """Over rollouts and episode ends, acting and `update` agree with a plain loop."""
    script = recipe("gru")
    args = arguments("gru", num_envs=6, num_steps=20, num_minibatches=3, hidden_size=8)
    envs, agent, params, optimizer = start(script, args)
    optimizer.param_groups[0]["lr"] = 0.0  # what was collected stays what is learned from
    for parameter in agent.actor[-1].parameters():
        parameter.data *= 50  # no action is about as likely as another
    acted_with, learned_from, ppo_loss = [], [], script.ppo_loss
    agent.actor.register_forward_pre_hook(lambda _, given: acted_with.append(given[0].clone()))
    names = ["actions", "old_logprobs", "old_values", "advantages", "targets"]

    def watch(agent, args, obs, **columns):
        rest = torch.stack([columns[name] for name in names], -1)
        learned_from.append(torch.cat([obs.detach(), rest], -1).flatten(0, 1))
        return ppo_loss(agent, args, obs, **columns)

    monkeypatch.setattr(script, "ppo_loss", watch)
    rollouts = script.collect(envs, agent, args, envs.reset(seed=1)[0])
    memory = torch.zeros(6, 8)
    ends_at_boundary = 0
    for _ in range(3):
        acted_with.clear()
        learned_from.clear()
        rollout = next(rollouts)
        plain, next_plain = [], []
        rows = agent.normalize(rollout["obs"]), agent.normalize(rollout["next_obs"])
        for obs, next_obs, done in zip(*rows, rollout["done"], strict=True):
            plain.append(agent.gru(obs, memory).detach())
            next_plain.append(agent.gru(next_obs, plain[-1]).detach())
            memory = torch.where(done.unsqueeze(-1), 0, plain[-1])
        plain, next_plain = torch.stack(plain), torch.stack(next_plain)
        torch.testing.assert_close(torch.stack(acted_with), plain)
        ends_at_boundary += int(done.sum())

        log = script.update(agent, params, optimizer, rollout, args, script.gradient)
        assert abs(log["losses/approx_kl"]) < 1e-6
        values = agent.critic(plain).squeeze(-1).detach()
        next_values = agent.critic(next_plain).squeeze(-1).detach()
        logprobs, _ = agent.get_logprob_and_entropy(plain, rollout["actions"])
        scaled = (rollout["rewards"] / agent.return_stats.std).float()
        ends = rollout["terminated"], rollout["done"]
        advantages = script.compute_gae(scaled, values, next_values, *ends, args)
        columns = logprobs.detach(), values, advantages, advantages + values
        expected = torch.stack([rollout["actions"], *columns], -1)
        expected = torch.cat([plain, expected], -1).flatten(0, 1)
        for epoch in (learned_from[:3], learned_from[3:]):  # each step once
            got = torch.cat(epoch)
            orders = got[:, 0].argsort(), expected[:, 0].argsort()
            torch.testing.assert_close(got[orders[0]], expected[orders[1]])
        assert not torch.equal(learned_from[0], learned_from[3])  # shuffled
    assert ends_at_boundary > 0


def test_gru_gradient_reaches_the_first_step_of_an_episode_only():
    script = recipe("gru")
    agent = script.Agent(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), script.Args(hidden_size=8))
    obs, memory = torch.randn(7, 2, 3).requires_grad_(), torch.randn(2, 8).requires_grad_()
    done = torch.zeros(7, 2, dtype=bool)
    done[3, 1] = True
    agent.remember(obs, memory, done)[-1].sum().backward()
    reached = (obs.grad != 0).all(-1)
    assert reached[:, 0].all() and reached[:, 1].tolist() == [False] * 4 + [True] * 3
    assert (memory.grad != 0).all(-1).tolist() == [True, False]


def test_gru_minibatches_are_whole_sequences():
    """So there cannot be more of them than environments."""
    script, seen = recipe("gru"), []
    args = arguments("gru", num_envs=3, num_minibatches=2, update_epochs=1)
    envs, agent, params, optimizer = start(script, args)

    def gradient(agent, args, minibatch):
        seen.append(len(minibatch["obs"]))
        assert all(column.shape[1] == args.num_steps for column in minibatch.values())
        return script.gradient(agent, args, minibatch)

    rollout = next(script.collect(envs, agent, args, envs.reset(seed=1)[0]))
    script.update(agent, params, optimizer, rollout, args, gradient)
    assert seen == [2, 1]
    with pytest.raises(SystemExit, match="at most --num-envs"):
        start(script, arguments("gru", num_envs=3, num_minibatches=4))


def test_gru_solves_what_needs_a_memory(tmp_path, monkeypatch):
    """Without a memory, the mean return is 0.5; it is empty at the start of an episode."""
    script = recipe("gru")
    sizes = dict(num_envs=16, num_steps=32, num_minibatches=4, update_epochs=4, hidden_size=32)
    options = dict(total_timesteps=15_000, target_return=0.98, learning_rate=3e-3)
    options |= dict(env_id="tests/Recall-v0", eval_episodes=20)
    act, given, made = script.Agent.act, [], [None]

    def watch(agent, obs):
        given.append(agent.memory)
        action = act(agent, obs)
        made.append(agent.memory)
        return action

    monkeypatch.setattr(script.Agent, "act", watch)
    assert train_and_play("gru", tmp_path, **sizes, **options) == 1
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] < 15_000
    expected = [None if step % 5 == 0 else memory for step, memory in enumerate(made[:-1])]
    assert len(given) == 100 and all(a is b for a, b in zip(given, expected, strict=True))


# cnn


@pytest.mark.parametrize("shape", [(36, 44, 1), (84, 84, 4)])
def test_cnn_sees_images_as_they_are(shape):
    """Rows, columns and channels keep their places on the way to the convolutions."""
    script = recipe("cnn")
    space = spaces.Box(0, 255, shape, np.uint8)
    agent = script.Agent(space, spaces.Discrete(5), script.Args())
    images = np.random.default_rng(1).integers(0, 256, (6, *shape), np.uint8)
    x = agent.normalize(images)
    planes = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    features = nn.Sequential.forward(agent.actor[0], planes).flatten(1)
    torch.testing.assert_close(agent.actor(x), agent.actor[1:](features))
    torch.testing.assert_close(agent.actor(x.view(3, 2, *shape)), agent.actor(x).view(3, 2, 5))
    both = agent.act(images.reshape(3, 2, *shape))
    assert both.shape == (3, 2) and agent.act(images[0]) == both[0, 0]


def test_cnn_solves_what_needs_to_see(tmp_path):
    """Blindly, the mean return is 2 of 8."""
    options = dict(num_envs=16, num_steps=32, num_minibatches=4)
    assert train_and_play("cnn", tmp_path, total_timesteps=4_000, eval_episodes=5, **options) > 5


@pytest.mark.parametrize(
    "observations",
    [
        spaces.Box(0, 1, (40, 40, 3), np.float32),
        spaces.Box(0, 255, (40, 35, 3), np.uint8),
        spaces.Box(0, 255, (40, 40), np.uint8),
        spaces.Dict(image=spaces.Box(0, 255, (40, 40, 3), np.uint8)),
    ],
)
def test_cnn_refuses_other_observations(observations):
    options = {"observation_space": observations, "action_space": spaces.Discrete(2)}
    gym.registry.pop("tests/Refused-v0", None)
    gym.register("tests/Refused-v0", Strict, kwargs=options)
    with pytest.raises(SystemExit, match="must be (uint8|Box)"):
        start(recipe("cnn"), arguments("cnn", env_id="tests/Refused-v0"))


# multidiscrete


def test_log_probability_and_entropy_are_sums_over_the_dimensions():
    """Of all actions, how often each is sampled, and which is played when greedy."""
    nvec = [2, 5, 3]
    agent = make_agent("multidiscrete", spaces.MultiDiscrete(nvec, start=[0, -2, 7]))
    x, actions = torch.randn(4), torch.cartesian_prod(*map(torch.arange, nvec))
    logprob, entropy = agent.get_logprob_and_entropy(x.expand(30, 4), actions)
    parts = [Categorical(logits=part) for part in agent.actor(x).split(nvec)]
    expected = sum(part.log_prob(a) for part, a in zip(parts, actions.T, strict=True))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts).expand(30))
    samples = agent.get_action(x.expand(50_000, 4))
    counts = torch.stack([(samples == action).all(-1).sum() for action in actions])
    assert chi_square(counts, logprob.exp()) < 60  # 29 degrees of freedom: p < 0.001
    greedy = [int(part.probs.argmax()) for part in parts] + agent.action_space.start
    assert agent.act(x.numpy()).tolist() == greedy.tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
def test_environments_get_actions_of_their_space(dtype):
    space = spaces.MultiDiscrete([[2, 3], [4, 5]], dtype, start=[[0, 1], [2, -3]])
    agent = make_agent("multidiscrete", space)
    actions = agent.to_env(agent.get_action(torch.zeros(1000, 4)).numpy())
    assert all(action in space for action in actions)
    assert (actions.min(0) == space.start).all()
    assert (actions.max(0) == space.start + space.nvec - 1).all()


def test_multidiscrete_learns(tmp_path):
    """Each dimension of the action its own part."""
    options = dict(total_timesteps=8_000, learning_rate=3e-3, eval_episodes=20)
    options |= dict(num_envs=16, num_steps=64, num_minibatches=4, update_epochs=4)
    assert train_and_play("multidiscrete", tmp_path, env_id="tests/Grid-v0", **options) > 0.95


def test_other_actions_are_refused():
    with pytest.raises(SystemExit, match="must be Box, MultiDiscrete"):
        start(recipe("multidiscrete"), arguments("multidiscrete", env_id="CartPole-v1"))


# action_masking


def masked_agent():
    """It, and observations of 5 numbers of the mask and 4 others."""
    agent = make_agent("action_masking", spaces.Discrete(5), obs_dim=9)
    mask = torch.rand(64, 5) < 0.5
    mask[:, 2] = ~mask.any(-1)  # otherwise none were valid
    return agent, torch.cat([mask, torch.randn(64, 4)], -1)


def test_policy_is_the_softmax_over_valid_actions():
    agent, x = masked_agent()
    for row in x:
        valid = row[:5].nonzero().squeeze(-1)
        expected = Categorical(logits=agent.actor(row)[valid])
        rows = row.expand(len(valid), -1)
        logprobs, entropy = agent.get_logprob_and_entropy(rows, valid)
        torch.testing.assert_close(logprobs.exp(), expected.probs)
        torch.testing.assert_close(entropy, expected.entropy().expand(len(valid)))
    (bias,) = torch.autograd.grad(logprobs[0] + entropy[0], agent.actor[-1].bias)
    assert (bias != 0).tolist() == row[:5].bool().tolist() and 1 < len(valid) < 5
    counts = agent.get_action(row.expand(50_000, 9)).bincount(minlength=5)
    assert counts[valid].sum() == 50_000
    assert chi_square(counts[valid], expected.probs) < 18  # p < 0.001
    assert agent.act(row.numpy()) == valid[expected.probs.argmax()]


def test_where_nothing_is_valid_all_is_finite():
    """So is the last observation of an episode, from which no step is made."""
    agent, _ = masked_agent()
    logprob, entropy = agent.get_logprob_and_entropy(torch.zeros(9), torch.tensor(3))
    gradients = torch.autograd.grad(logprob + entropy, agent.actor.parameters())
    assert logprob.item() == pytest.approx(-math.log(5))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_normalisation_leaves_the_mask_alone():
    """Whether an action is always valid, never, or so rarely that it is many deviations off."""
    agent, x = masked_agent()
    obs = x.repeat(64, 1)
    obs[:, 0], obs[:, 1], obs[:, 3] = 1, 0, torch.arange(4096) == 7
    obs[:, 5:] = 100 + 5 * torch.randn(4096, 4)
    agent.obs_stats.update(obs)
    x = agent.normalize(obs)
    assert x.dtype == torch.float32 and x[:, :5].equal(obs[:, :5])
    assert x[:, 5:].mean().abs() < 1e-3 and (x[:, 5:].std() - 1).abs() < 1e-3


def test_masking_learns_and_never_takes_an_invalid_action(tmp_path):
    """The environment raises an error for one, in training and in the greedy episodes."""
    options = dict(total_timesteps=8_000, learning_rate=3e-3, eval_episodes=10)
    options |= dict(num_envs=16, num_steps=64, num_minibatches=4, update_epochs=4)
    assert train_and_play("action_masking", tmp_path, **options) > 3.5


BOX, MASK = spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)


@pytest.mark.parametrize(
    ("space", "is_taken"),
    [
        (spaces.Dict(action_mask=MASK, observation=BOX), True),
        (spaces.Dict(action_mask=spaces.Box(0, 1, (3,), np.int8), b=spaces.Discrete(2)), True),
        (spaces.Dict(observation=BOX, action_mask=MASK), False),
        (spaces.Dict({"action_mask": MASK, "Observation": BOX}), False),  # sorted, this is first
        (spaces.Dict(action_mask=spaces.MultiBinary(2), observation=BOX), False),
        (spaces.Tuple([MASK, BOX]), False),
        (BOX, False),
    ],
)
def test_observations_must_begin_with_a_mask(space, is_taken):
    class Still(gym.Env):
        action_space, observation_space = spaces.Discrete(3), space

        def reset(self, *, seed=None, options=None):
            return space.sample() | {"action_mask": np.array([0, 1, 0], np.int8)}, {}

    gym.registry.pop("tests/Still-v0", None)
    gym.register("tests/Still-v0", Still)
    script, args = recipe("action_masking"), arguments("action_masking", env_id="tests/Still-v0")
    if is_taken:
        obs, _ = script.make_envs(args).reset()
        assert obs[:, :3].tolist() == [[0, 1, 0]] * 4 and obs.shape == (4, 5)
    else:
        with pytest.raises(SystemExit, match="begins with action_mask, of 3"):
            script.make_envs(args)


# wandb


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


def test_a_run_holds_the_scalars_of_tensorboard(tmp_path):
    command = [sys.executable, str(patched("wandb")), "--run-dir=a/run", "--num-steps=64"]
    environ = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    run = subprocess.run(
        [*command, "--total-timesteps=3000"],
        cwd=tmp_path,
        env=environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    record, found = offline_run(file)
    expected = curves(tmp_path / "a/run")
    assert found.keys() == expected.keys() >= {"charts/SPS", "losses/entropy"}
    for tag, points in expected.items():
        assert dict(found[tag]) == pytest.approx(dict(points), nan_ok=True), tag
    assert record.display_name == "a/run" and record.project == "ppo"
    config = {item.key: json.loads(item.value_json) for item in record.config.update}
    assert config["total_timesteps"] == 3000 and config["num_steps"] == 64


def test_each_folder_is_a_run_of_the_first_process(told, tmp_path, monkeypatch):
    """The same one when it goes on, another one in another folder of the same name."""
    script = recipe("wandb")
    for run_dir in ("a/run", "b/run"):
        script.train(arguments("wandb", total_timesteps=64, run_dir=str(tmp_path / run_dir)))
    monkeypatch.chdir(tmp_path)  # so that the folder has another name
    script.train(arguments("wandb", total_timesteps=64, run_dir="b/run"))
    script.evaluate(arguments("wandb"), "b/run/checkpoint.pt")  # no run
    monkeypatch.setattr(script, "RANK", 1)
    script.train(arguments("wandb", total_timesteps=64, run_dir="c"))
    first, second, again = (call for call in told if "id" in call)
    assert first["id"] != second["id"] == again["id"]
    assert {call["resume"] for call in (first, second, again)} == {"allow"}
