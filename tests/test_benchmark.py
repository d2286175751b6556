"""The programs in tests/benchmark run, and the README shows what they wrote."""

import importlib.util
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "benchmark"))
import ablation  # noqa: E402
import learning  # noqa: E402
import plot  # noqa: E402
import speed  # noqa: E402


def test_tables_of_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert plot.renew(readme) == readme and readme.count("<!-- end -->") >= 5
    figures = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert figures and all((ROOT / figure).exists() for figure in figures)


@pytest.mark.parametrize("contender", ["ours", "stable-baselines3", "environment"])
def test_speed_is_measured(contender):
    row = speed.measure(contender, "CartPole 16 x 128, 256", 1)
    assert row["steps_per_second"] > 0 and row["peak_memory_mb"] > 0
    shares = [row.get(name, 0.0) for name in speed.SPLIT]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert row["environment"] > 0


def test_memory_is_measured():
    row = speed.measure("memory", "CartPole-v1", 5_000, 10_000)
    assert 50 < row["early_mb"] < 2_000 and abs(row["growth"]) < 0.5


@pytest.mark.parametrize("contender", ["ours", "stable-baselines3"])
def test_learning_is_recorded_and_goes_on_where_it_was(tmp_path, contender, monkeypatch):
    table, curves = tmp_path / "learning.csv", tmp_path / "curves.csv"
    runs = [learning.Run(contender, "CartPole-v1", seed, 8_192, {}) for seed in (1, 2)]
    learning.make_all(runs[:1], table, curves, episodes=3)
    before = table.read_text(), curves.read_text()
    started = []
    start = learning.start
    monkeypatch.setattr(learning, "start", lambda run, n: started.append(run) or start(run, n))
    learning.make_all(runs, table, curves, episodes=3)
    assert started == runs[1:]
    assert table.read_text().startswith(before[0]) and curves.read_text().startswith(before[1])

    for run, row, curve in zip(runs, learning.read(table), learning.read(curves), strict=True):
        assert tuple(row.values())[:4] == tuple(curve.values())[:4] == run.key
        assert 8 <= float(row["greedy_return"]) <= 500
        seconds = np.array(curve["seconds"].split(), float)
        returns = np.array(curve["returns"].split(), float)
        assert len(seconds) == len(returns) == learning.POINTS
        assert (np.diff(seconds) >= 0).all()
        assert 0.5 * float(row["seconds"]) < seconds[-1] <= float(row["seconds"]) * 1.001
        known = returns[np.isfinite(returns)]
        assert len(known) > 20 and known.min() >= 8
        assert known[-5:].mean() > known[:5].mean()  # it learns


def test_a_failed_run_is_named_and_keeps_the_others(tmp_path):
    table, curves = tmp_path / "learning.csv", tmp_path / "curves.csv"
    good = learning.Run("ours", "CartPole-v1", 1, 4_096, {})
    bad = learning.Run("ours num_steps=0", "CartPole-v1", 1, 4_096, {"num_steps": 0})
    with pytest.raises(RuntimeError, match="--num-steps 0 must be at least 1") as error:
        learning.make_all([good, bad], table, curves, episodes=1)
    assert "ours num_steps=0" in str(error.value)
    learning.make_all([good], table, curves, episodes=1)
    assert [row["contender"] for row in learning.read(table)] == ["ours"]


def test_record_sorts_episodes_into_the_curve():
    run = learning.Run("ours", "LunarLanderContinuous-v3", 1, 1_000, {})
    record, rng = learning.Record(run), np.random.default_rng(0)
    episodes = [(step, rng.normal(150, 100)) for step in range(3, 1_001, 3)]
    better = [(step, 280.0) for step in range(1_001, 1_101)]  # past the end: in the last part
    for k, start in enumerate(range(0, 300, 20)):
        record.note(60 * (k + 1), 2.0 * (k + 1), episodes[start : start + 20])
    record.note(1_100, 40.0, episodes[300:] + better)
    row = record.result([1.0, 3.0])
    assert row["greedy_return"] == 2 and row["greedy_std"] == 1 and row["training_return"] == 280
    assert row["seconds"] == 40 and row["target_steps"] == 1_100 and row["target_seconds"] == 40
    returns = [float(value) for value in row["curve"]["returns"].split()]
    for i, value in enumerate(returns[:-1]):
        inside = [r for step, r in episodes if 10 * i < step <= 10 * (i + 1)]
        assert value == pytest.approx(np.mean(inside), rel=1e-3)
    last = [r for step, r in episodes + better if step > 990]
    assert returns[-1] == pytest.approx(np.mean(last), rel=1e-3)
    seconds = [float(value) for value in row["curve"]["seconds"].split()]
    assert seconds[5] == pytest.approx(2) and seconds[89] == pytest.approx(30)


def test_marks_are_first_reached_when_the_mean_is():
    record = learning.Record(learning.Run("ours", "CartPole-v1", 1, 1_000, {}))
    for k in range(1, 11):  # 10 episodes each; 20 of 475 or more after the seventh
        record.note(100 * k, float(k), [(100 * k, 500.0 if k > 5 else 20.0)] * 10)
    assert record.reached == {"solved": (700, 7.0)}


def test_a_mark_is_reached_by_an_episode_within_an_iteration():
    record = learning.Record(learning.Run("ours", "CartPole-v1", 1, 1_000, {}))
    record.note(500, 5.0, [(k, 9.0) for k in range(100, 500, 100)])
    record.note(1_000, 10.0, [(500 + 10 * k, 500.0 if k < 25 else 0.0) for k in range(50)])
    # the mean of 20 is above 475 once 19 of them are 500, and no longer at the end
    assert record.reached == {"solved": (680, pytest.approx(6.8))}


def test_bootstrap_interval_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, size=(400, 3))
    low, high = plot.interval(values, resamples=2_000)
    half = 1.96 * values.std(0) / math.sqrt(400)
    assert low == pytest.approx(values.mean(0) - half, abs=0.03)
    assert high == pytest.approx(values.mean(0) + half, abs=0.03)
    assert plot.interval([7.0, 7.0, 7.0]) == (7, 7)


def test_a_run_that_never_reaches_the_mark_counts_as_last():
    rows = [{"solved_steps": steps} for steps in ("1000", "", "3000", "", "2000")]
    assert plot.first_time(rows, "solved") == "3k (2 of 5 never)"
    assert plot.first_time(rows[1:4], "solved") == "never (2 of 3 never)"
    assert plot.first_time(rows[1:2], "solved") == "never (1 of 1)"
    assert plot.first_time([], "solved") == "not run"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Returns a function that adds a run to files that `plot` then reads."""
    monkeypatch.setattr(plot, "RESULTS", tmp_path)

    def add(contender, env_id, seed, greedy_return, returns=(), steps=None, prefix=""):
        steps = steps or plot.STEPS[env_id]
        row = dict(contender=contender, environment=env_id, seed=seed, total_timesteps=steps)
        marks = dict.fromkeys(("solved_steps", "solved_seconds", "target_steps"), "")
        learning.append(
            tmp_path / f"{prefix or 'learning'}.csv",
            row | marks | {"greedy_return": greedy_return, "target_seconds": ""},
        )
        if len(returns):
            seconds = " ".join(str(0.5 * seed * (i + 1)) for i in range(100))
            curve = {"seconds": seconds, "returns": " ".join(map(str, returns))}
            learning.append(tmp_path / f"{prefix}curves.csv", row | curve)

    return add


def test_figures_and_tables_take_each_run_once(results):
    line = np.arange(100.0)
    gaps = line.copy()
    gaps[:3] = gaps[50:60] = np.nan  # nothing ended before, or in between
    results("ours", "Pendulum-v1", 2, -150.0, line)
    results("ours", "Pendulum-v1", 1, -900.0, line * 0)
    results("ours", "Pendulum-v1", 1, -100.0, gaps)  # made anew: this one counts
    results("ours", "Pendulum-v1", 3, 0.0, line, steps=1_000)  # a quick look
    steps, seconds, returns = plot.curves("ours", "Pendulum-v1")
    assert steps[0] == 2_000 and steps[-1] == 200_000 and seconds[:, -1].tolist() == [50, 100]
    assert np.isnan(returns[0, :3]).all() and np.allclose(returns[0, 3:], line[3:])
    assert np.array_equal(returns[1], line)
    (row,) = [row for row in plot.results_table().splitlines() if row.startswith("| Pendulum")]
    assert "| -125.0 [-150.0, -100.0] (2) | -150.0 | not run |" in row
    assert "| Pendulum-v1 | -100 | -150 |" in plot.seeds_table()
    assert "| Pendulum-v1 (-200) | never (2 of 2) | not run |" in plot.solve_table()


def test_effects_are_between_runs_of_the_same_seed(results):
    steps = ablation.TASKS["Pendulum-v1"]
    for contender, seed, value in (
        *(("ours", 1, -100.0), ("ours", 2, -200.0), ("ours", 3, -300.0)),
        *(("one epoch", 3, -330.0), ("one epoch", 1, -110.0)),
    ):
        results(contender, "Pendulum-v1", seed, value, steps=steps, prefix="ablation")
    changes = plot.effects("Pendulum-v1")
    assert list(changes) == ["one epoch"] and changes["one epoch"].tolist() == [-10, -30]


def test_figures_are_drawn(results, tmp_path):
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        for env_id in learning.TASKS:
            results("ours", env_id, seed, rng.normal(), rng.normal(size=100))
        for contender in ("ours", *ablation.DETAILS):
            for env_id, steps in ablation.TASKS.items():
                results(contender, env_id, seed, rng.normal(), steps=steps, prefix="ablation")
    plot.draw()
    for name in ("curves_steps", "curves_seconds", "ablation"):
        for suffix in ("png", "svg"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 10_000


def fresh(name: str):
    """The script, imported anew."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name], before = script, sys.modules.get(name)
    spec.loader.exec_module(script)
    if before is not None:
        sys.modules[name] = before
    return script


def learned(script, tmp_path, env_id: str, options: dict) -> torch.Tensor:
    """Parameters after two iterations."""
    args = dict(env_id=env_id, num_envs=4, total_timesteps=2_048, update_epochs=4, eval_episodes=0)
    args["learning_rate"] = 5e-3  # far enough for the clipping of ratios
    args |= dict(run_dir=str(tmp_path / str(len([*tmp_path.iterdir()]))), num_minibatches=8)
    agent = script.train(script.Args(**(args | options)))["agent"]
    return torch.nn.utils.parameters_to_vector(agent.parameters())


@pytest.mark.parametrize(
    ("env_id", "task"),  # MountainCar reaches its time limit sooner than the lander would
    [("Pendulum-v1", "Pendulum-v1"), ("MountainCar-v0", "LunarLander-v3")],
)
def test_each_detail_of_the_ablation_changes_what_is_learned(tmp_path, env_id, task):
    name = learning.TASKS[task].script
    base = learned(fresh(name), tmp_path, env_id, {})
    assert torch.equal(base, learned(fresh(name), tmp_path, env_id, {}))
    for title, detail in ablation.DETAILS.items():
        if task in detail.tasks:
            script = fresh(name)
            detail.change(script)
            assert not torch.equal(base, learned(script, tmp_path, env_id, detail.options)), title


def test_details_changed_from_outside_are_what_they_say():
    script = fresh("ppo_continuous")
    rng = np.random.default_rng(0)
    rewards, values, next_values = (torch.tensor(rng.normal(size=(6, 1))) for _ in range(3))
    dones = torch.tensor([0, 0, 1, 0, 0, 0]).bool().unsqueeze(1)
    given = rewards, values, next_values, dones & False, dones, 0.9, 0.8
    ablation.end_at_time_limits(script)
    advantage = script.compute_gae(*given)
    assert float(advantage[2]) == pytest.approx(float(rewards[2] - values[2]))  # nothing after it

    ablation.learn_from_reset_rows(script)
    resets = torch.tensor([[False], [True]] * 2)
    columns = dict.fromkeys(script.Rollout._fields) | {"resets": resets}
    assert script.Rollout(**columns).is_real.tolist() == [[True]] * 3

    ablation.scale_no_actions(script)
    args = script.Args()
    envs = script.make_envs(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    assert agent.to_env(np.array([[0.5], [3.0]])).tolist() == [[0.5], [2.0]]
    ablation.begin_with_a_large_output(script)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    assert float(agent.actor[-1].weight.norm()) == pytest.approx(1)

    script = fresh("ppo_continuous")
    ablation.initialise_as_pytorch(script)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    for parameter in agent.actor[-1].parameters():
        assert 0 < float(parameter.detach().abs().max()) <= 0.01 / 8  # U(-1/8, 1/8) without it
    assert float(agent.critic[-1].weight.abs().max()) > 0.1
    seen = SimpleNamespace()
    script.adam = lambda *state, **rates: setattr(seen, "rates", rates)
    ablation.use_adams_own_epsilon(script)
    script.Adam(agent, 1e-3).step(torch.zeros(0))
    assert seen.rates["eps"] == 1e-8 and seen.rates["lr"] == 1e-3
