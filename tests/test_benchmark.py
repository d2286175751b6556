"""The programs in tests/benchmark run, and the tables there are those of what they wrote."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

import ppo_continuous

sys.path.append(str(ROOT / "tests" / "benchmark"))
import ablation  # noqa: E402
import learning  # noqa: E402
import plot  # noqa: E402
import sb3  # noqa: E402
import search  # noqa: E402
import speed  # noqa: E402
from common import commit, read, write  # noqa: E402


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Returns a function that runs a program with options; its results go to a temporary file."""

    def run(program: ModuleType, *options) -> list[dict]:
        path = tmp_path / f"{program.__name__}.csv"
        options = [*map(str, options), f"--results={path}"]
        monkeypatch.setattr(sys, "argv", [program.__name__, *options])
        program.main()
        return read(path)

    return run


@pytest.fixture
def measured(monkeypatch):
    """The runs that were made since, all in no time."""
    made = []

    def measure(run: learning.Run) -> dict:
        made.append(run)
        if run.seed == 13:
            raise RuntimeError("unlucky")
        row = dict(greedy_return=-100.0 * run.seed, mark_steps="", mark_cpu_seconds="")
        return run.key | row | dict(mark_wall_seconds="", source=run.program.read_text())

    monkeypatch.setattr(learning, "measure", measure)
    return made


@pytest.mark.parametrize("path", plot.PAGES, ids=["the README", "the benchmarks' README"])
def test_tables_are_those_of_the_results(path):
    page = path.read_text(encoding="utf-8")
    assert plot.render(page) == page and page.count("<!-- end -->") > 0


def test_speed_is_measured_also_of_another_checkout(call, tmp_path, capsys):
    other, setting = tmp_path / "other", "CartPole 16 x 128, 256"
    other.mkdir()
    source, trace = (ROOT / "ppo_discrete.py").read_text(), tmp_path / "trace"
    (other / "ppo_discrete.py").write_text(f"open({str(trace)!r}, 'a').write('.')\n{source}")
    kept, replaced = [{"setting": x, "contender": "environment"} for x in ("another", setting)]
    write(tmp_path / "speed.csv", [kept, replaced])
    quick = ["--repetitions=1", "--iterations=1", f"--against={other}", "--settings", setting]
    rows = call(speed, *quick, "--contenders", "ours", "environment")
    assert [row["setting"] for row in rows] == ["another", *[setting] * 3]
    rows = {row["contender"]: row for row in rows[1:]}
    assert [*rows] == ["ours", "environment", "other"]
    assert f"ppo {commit(ROOT)}, python" in rows["ours"]["versions"]
    speed.work("stable-baselines3", speed.STEADY[setting], "", 1, time.monotonic())
    rows["peer"] = json.loads(capsys.readouterr().out.splitlines()[-1])
    speeds = {name: float(row["steps_per_second"]) for name, row in rows.items()}
    assert trace.read_text() == "."  # the other script has run, once
    fastest = speeds.pop("environment")
    assert 100 < min(speeds.values()) and max(speeds.values()) < fastest
    for name, row in rows.items():
        first, iteration = float(row["first_step_s"]), float(row["first_iteration_s"])
        assert 0 < first < iteration < first + 30
        assert bool(row["gradient_step_us"]) == (name in ("ours", "other"))
    assert 50 < float(rows["ours"]["gradient_step_us"]) < 1e5


def test_steady_state_leaves_the_first_iterations_out():
    clock = speed.Clock(10.0, 2)
    with pytest.raises(speed.Enough):
        for steps in (1, 1, 1, 40, 60, 1):
            clock.lap(steps)
    times, clock.first, clock.gradients = (13.0, 14.0, 15.0, 16.0, 20.0), 12.0, [1.0, 1.5, 1.75, 2]
    clock.laps = [(time, steps) for time, (_, steps) in zip(times, clock.laps, strict=True)]
    assert clock.result() == {
        "steps_per_second": 20,  # 100 in 5 seconds
        "first_step_s": 2,
        "first_iteration_s": 3,
        "gradient_step_us": 250_000,
    }


def test_learning_is_measured(call, monkeypatch):
    monkeypatch.setitem(learning.ALL, "CartPole-v1", ("ppo_discrete", 100_000, 20))
    quick = ["--environments", "CartPole-v1", "--seeds=1", "--steps=8192", "--jobs=1"]
    ours, peer = call(learning, *quick, "--option", "target_return=5", "anneal_lr=False")
    assert ours["contender"] == "ours" and peer["contender"] == "stable-baselines3"
    assert ours["options"] == "--target-return=5 --no-anneal-lr" and peer["options"] == ""
    for row in (ours, peer):
        assert 8 <= float(row["greedy_return"]) <= 500 and float(row["greedy_std"]) >= 0
        assert 100 < int(row["mark_steps"]) < 8_192
        assert 0 < float(row["mark_cpu_seconds"]) < float(row["cpu_seconds"])
        assert 0 < float(row["mark_wall_seconds"]) < float(row["wall_seconds"])
        seconds = [float(second) for second in row["curve_cpu_seconds"].split()]
        assert len(seconds) == learning.POINTS and seconds == sorted(seconds)
        part = int(row["mark_steps"]) * learning.POINTS // 8_192  # at the end of which it is past
        assert float(row["mark_cpu_seconds"]) <= seconds[part] + 0.01 < float(row["cpu_seconds"])
    curve, known = np.array([row["curve"].split() for row in (ours, peer)], float), np.isfinite
    assert known(curve[:, :50]).sum(1).min() > 20 and np.nanmin(curve) >= 8
    assert known(curve[1, 50:]).any() and not known(curve[0, 50:]).any()  # ours ended half-way


def test_the_peer_plays_the_greedy_episodes_of_ours(monkeypatch):
    class Still:
        def get_vec_normalize_env(self):
            return None

        def predict(self, obs, deterministic):
            return np.zeros(1, np.float32), None

    args = ppo_continuous.Args(env_id="Pendulum-v1", seed=7, eval_episodes=2)
    monkeypatch.setattr(ppo_continuous, "load", lambda path, **modules: {})
    monkeypatch.setattr(ppo_continuous.Agent, "act", lambda self, obs: np.zeros(1, np.float32))
    peers = sb3.evaluate(Still(), args.env_id, args.seed, args.eval_episodes)
    assert peers[0] != peers[1]
    assert np.mean(peers) == pytest.approx(ppo_continuous.evaluate(args, "some path"))


def test_finished_runs_are_not_made_again_and_a_failed_one_keeps_the_others(call, measured):
    tasks = ["--environments", "Pendulum-v1", "Taxi-v4", "--jobs=1"]
    rows = call(learning, *tasks, "--seeds=1")
    assert [run.contender for run in measured] == ["ours", "stable-baselines3", "ours"]
    with pytest.raises(SystemExit, match="3 of 36 runs failed"):
        call(learning, *tasks, "--seeds=13")
    assert len({run[:5] for run in measured}) == len(measured) == 39
    again = call(learning, *tasks, "--seeds=12")
    assert len(measured) == 39 and len(again) == 36 and again[:3] == rows
    call(learning, *tasks, "--seeds=1", "--steps=10")
    call(learning, *tasks, "--seeds=1", "--contenders", "ours", "--option", "gamma=0.9")
    assert [(run.steps, run.options) for run in measured[39:]] == [
        *([(10, "")] * 3),
        *((200_000, "--gamma=0.9"), (500_000, "--gamma=0.9")),
    ]
    call(learning, *tasks, "--seeds=2", "--first-seed=14", "--contenders", "ours")
    assert [run.seed for run in measured[44:]] == [14, 14, 15, 15]


def test_a_program_that_fails_is_reported_with_its_output(tmp_path):
    run = learning.Run("ours", "CartPole-v1", 10, 1, "--some", tmp_path / "program.py")
    for end in (1, 0):  # 0, but without a result
        run.program.write_text(f"import sys\nprint('why', sys.argv[-1])\nsys.exit({end})")
        with pytest.raises(RuntimeError, match="why --some"):
            learning.measure(run)


def test_curve_and_mark():
    returns = [0.0] * 30 + [10.0] * 30
    assert learning.mark_reached(returns, 10) == 49 and learning.mark_reached(returns, 9.5) == 48
    assert learning.mark_reached(returns, 10.1) is None
    assert learning.mark_reached([10.0] * 20, 10) == 19
    assert learning.mark_reached([10.0] * 19, 10) is None
    assert (
        learning.best_mean([*range(100)]) == 49.5
        and learning.best_mean([*range(300)][::-1]) == 249.5
    )
    curve = learning.curve([1, 10, 11, 990, 991, 1_005], [1.0, 2.0, 4.0, 5.0, 6.0, 8.0], 1_000)
    assert curve.split() == ["1.5", "4"] + ["nan"] * 96 + ["5", "7"]
    assert learning.curve([], [], 1_000).split() == ["nan"] * 100


def learned(script: str, source: str, options: str, run_dir) -> torch.Tensor:
    """Parameters after two iterations of the source of a script."""
    module = ModuleType(script)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, script, module)
        exec(compile(source, f"{script}.py", "exec"), vars(module))
        env_id = {"ppo_discrete": "MountainCar-v0", "ppo_continuous": "Pendulum-v1"}[script]
        given = f"--env-id={env_id} --num-envs=2 --num-steps=128 --total-timesteps=500"
        # far enough for the clipping of ratios
        given += " --num-minibatches=4 --update-epochs=4 --learning-rate=5e-3 --eval-episodes=0"
        args = module.tyro.cli(
            module.Args, args=[*given.split(), *options.split(), f"--run-dir={run_dir}"]
        )
        return torch.nn.utils.parameters_to_vector(module.train(args).parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_detail_of_the_ablation_changes_what_is_learned(script, tmp_path):
    source = (ROOT / f"{script}.py").read_text()
    base = learned(script, source, "", tmp_path / "base")
    assert torch.equal(base, learned(script, *ablation.change(source, "ours"), tmp_path / "same"))
    for number, detail in enumerate(ablation.DETAILS):
        if detail != "actions not stretched" or script == "ppo_continuous":
            changed = learned(script, *ablation.change(source, detail), tmp_path / str(number))
            assert not torch.equal(base, changed), detail


def test_code_that_is_not_there_exactly_once_is_no_detail(monkeypatch):
    monkeypatch.setitem(ablation.DETAILS, "some", ("one", "two"))
    assert ablation.change("one", "some") == ("two", "")
    for source in ("one one", "none" * 2, "two"):
        with pytest.raises(ValueError, match="exactly once"):
            ablation.change(source, "some")


def test_ablation_runs_changed_copies(call, measured):
    details = ["--details", "one epoch", "Adam's epsilon 1e-8", "actions not stretched"]
    rows = call(ablation, "--environments", "Pendulum-v1", "LunarLander-v3", "--seeds=2", *details)
    assert len(rows) == len(measured) == 2 * 4 + 2 * 3
    for row in rows:
        script = "ppo_continuous" if row["environment"] == "Pendulum-v1" else "ppo_discrete"
        source = (ROOT / f"{script}.py").read_text()
        is_option = row["contender"] == "one epoch"
        assert row["options"] == ("--update-epochs=1" if is_option else "")
        assert (row["source"] == source) == (is_option or row["contender"] == "ours")
        assert ("eps=1e-8" in row["source"]) == (row["contender"] == "Adam's epsilon 1e-8")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with runs of two seeds, or more, that `plot` then takes."""
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(plot, "PAGES", [tmp_path / "README.md"])
    curve = " ".join(["nan"] * 3 + ["1.5"] * 40 + ["nan"] * 7 + ["2.5"] * 50)

    def row(contender: str, seed: int, value: float, mark: str = "") -> dict:
        row = dict(contender=contender, environment="Pendulum-v1", steps=5_000, seed=seed)
        row |= dict(options="", greedy_return=value, best_mean=value + 1, mark_steps=mark)
        return row | dict(mark_cpu_seconds=mark, mark_wall_seconds=mark[:2], curve=curve)

    given = zip((-100.0, -200.0, -300.0), ("3000", "", "1000"), strict=True)
    ours = [row("ours", seed, value, mark) for seed, (value, mark) in enumerate(given, 1)]
    ours[1]["curve"] = " ".join(["nan"] * plot.POINTS)  # no episode ended
    peers = [row("stable-baselines3", *each) for each in ((1, -7.0, "7500"), (3, -7.0))]
    peers.append(row("stable-baselines3", 2, -7.0, "9000"))
    write(tmp_path / "learning.csv", [*ours, *peers])
    changed = [row("one epoch", 3, -330.0), row("one epoch", 1, -110.0), row("one epoch", 9, 1e6)]
    write(tmp_path / "ablation.csv", [*changed, *ours])
    speeds = {"ours": 10_000.0, "environment": 35_000.0}
    rows = [{"setting": "a", "contender": k, "steps_per_second": v} for k, v in speeds.items()]
    times = dict(first_step_s=1.26, first_iteration_s=2.0, gradient_step_us="")
    write(tmp_path / "speed.csv", [row | times for row in rows])
    return tmp_path


def test_tables_and_the_figure_are_made_of_the_rows(results):
    plot.PAGES[0].write_text(
        "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in plot.TABLES)
    )
    plot.main()
    page = plot.PAGES[0].read_text()
    for line in (
        "ours | -200 ± 100 | -300 | -199 ± 100 | -200 | 2 of 3 | 3,000 | 3,000 | 30 |",
        "stable-baselines3 | -7 ± 0 | -7 | -6 ± 0 | -200 | 2 of 3 | 9,000 | 9,000 | 90 |",
        "| Pendulum-v1, 5,000 steps | 3000, never, 1000 | 7500, 9000, never | 3.0 |",
        "| the defaults: greedy return | -200 ± 100 |\n| one epoch | -20 ± 10 |",
        "| a | 10,000 (1.00) | 35,000 (3.50) |",
        "| a | 1.3, 2.0 | 1.3, 2.0 |",
        "<!-- gradient -->\n\nNot measured yet.\n\n<!-- end -->",
    ):
        assert line in page
    assert "old" not in page and plot.render(page) == page
    assert (results / "curves.png").read_bytes()[1:4] == b"PNG"
    assert not (results / "seconds.png").exists()  # they were not measured
    rows, seconds = read(results / "learning.csv"), " ".join(map(str, range(plot.POINTS)))
    write(results / "learning.csv", [row | dict(curve_cpu_seconds=seconds) for row in rows])
    plot.draw(results, "CPU seconds")
    assert (results / "seconds.png").read_bytes()[1:4] == b"PNG"

    ours, peers = plot.grouped(results / "learning.csv", "who").values()
    both = plot.paired({"ours": ours[1:], "peers": peers[:2]})
    assert [[row["seed"] for row in rows] for rows in both.values()] == [["3"], ["3"]]
    assert plot.paired({"ours": ours}) == plot.paired({"a": ours[:1], "b": peers[1:]}) == {}

    # in the parts between, a line; of the seed in which no episode ended, nothing
    ours = plot.grouped(results / "learning.csv", "who")["ours",]
    steps, mean, deviation = plot.average(ours)
    assert (steps[0], steps[-1]) == (50, 5_000) and np.isnan(mean[:3]).all()
    assert np.allclose(mean[3:43], 1.5) and np.allclose(mean[50:], 2.5)
    assert np.allclose(mean[42:51], np.linspace(1.5, 2.5, 9)) and np.allclose(deviation[3:], 0)


@pytest.mark.parametrize("mark, limit, reached, steps", [(5, 60, 1, 1024), (501, 0, 0, 512)])
def test_a_candidate_trains_to_the_mark_or_the_limit(monkeypatch, mark, limit, reached, steps):
    monkeypatch.setitem(learning.TASKS, "CartPole-v1", ("ppo_discrete", 100_000, mark))
    options = {name: choices[0] for name, choices in search.CHOICES.items()}
    options |= dict(batch=[4, 128], rows=256, update_epochs=1)
    row = search.train(options, "CartPole-v1", 11, limit)
    assert row["reached"] == reached and 0 < row["cpu_seconds"] and row["steps"] in (512, steps)


def test_the_search_drops_mixes_confirms_and_goes_on(monkeypatch, tmp_path):
    def train(options: dict, env_id: str, seed: int, limit: float) -> dict:
        made.append((options, env_id, seed))
        seconds = 1e4 * options["learning_rate"] * (1 if env_id == search.RACE[0] else 0.9)
        return dict(steps=1, reached=int(seconds <= limit), cpu_seconds=min(seconds, limit))

    made, argv = [], ["search.py", "race"]
    monkeypatch.setattr(search, "FILE", tmp_path / "search.csv")
    monkeypatch.setattr(search, "CANDIDATES", 40)
    monkeypatch.setattr(search.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(search, "train", train)
    monkeypatch.setattr(search, "describe", dict)
    monkeypatch.setattr(search, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setattr(sys, "argv", argv)
    search.main()
    runs = {}
    for row in read(search.FILE):
        runs.setdefault((int(row["number"]), int(row["seed"])), []).append(row)
    assert [*runs] == [(0, 11), (0, 12), (0, 13), *((k, 11) for k in range(1, 41))]
    rates = {key: json.loads(rows[0]["options"])["learning_rate"] for key, rows in runs.items()}
    for key, rows in runs.items():
        assert len(rows) == (len(search.RACE) if rates[key] <= 8e-4 else 1)  # else it is dropped
    mixed = [rate for (number, _), rate in rates.items() if number > 20]
    assert sum(rate <= 8e-4 for rate in mixed) > 0.7 * len(mixed)  # of the best; at random 2 of 7
    before = len(made)
    search.main()
    assert len(made) == before  # all is known
    argv[1] = "confirm"
    search.main()
    confirmed = {(options["learning_rate"], seed) for options, _, seed in made[before:]}
    assert confirmed == {(6e-4, 12), (6e-4, 13)} and len(made) == before + 10 * 2 * len(search.RACE)
