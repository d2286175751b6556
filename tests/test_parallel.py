"""Several processes under torchrun: together they are one run, in learning and in failing."""

import importlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, children, curves, run
from envs import Seeds
from workers import learn

SMALL = ["--num-envs=4", "--num-steps=32", "--num-minibatches=2", "--update-epochs=2"]


def torchrun(*command: str, cwd: Path, restarts: int = 0) -> subprocess.Popen:
    """Two processes of a Python program, by PyTorch's launcher on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(script, *options: str, cwd: Path, restarts: int = 0) -> subprocess.Popen:
    return torchrun(script.__file__, "--run-dir=run", *options, cwd=cwd, restarts=restarts)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output and errors; none of the processes may hang for more than a minute."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()  # it takes its processes with it
    lines = [line for line in err.splitlines() if not re.match(r"[WE]\d{4} ", line)]
    return process.returncode, out, "\n".join(lines)


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """Process id of each rank."""
    found = {}
    for pid in children(process.pid):
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {int(value[5:]): pid for value in environment if value.startswith("RANK=")}
    return found


def exit_codes(err: str) -> list[int]:
    """Those of the processes, from torchrun's report."""
    return [int(code) for code in re.findall(r"exitcode +: (-?\d+)", err)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


# Learning -----------------------------------------------------------------------------------------


def make_spaces(script) -> tuple:
    actions = gym.spaces.Discrete(3)
    if script.__name__ == "ppo_continuous":
        actions = gym.spaces.Box(-1, 1, (2,), np.float32)
    return gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), actions


def make_rollout(script, spaces, num_steps: int, reset_rates: list[float], seed: int):
    """Made-up data, with its reset rows unevenly spread over the environments."""
    rng = np.random.default_rng(seed)
    shape = (num_steps + 1, len(reset_rates))
    obs = rng.normal(3, 2, (*shape, 3)) + rng.normal(size=(shape[1], 3))
    if script.__name__ == "ppo_discrete":
        actions = rng.integers(0, spaces[1].n, shape)
    else:
        actions = rng.normal(size=(*shape, *spaces[1].shape)).astype(np.float32)
    rewards, discounted, logprobs = rng.normal(size=(3, *shape)).astype(np.float32) + 0.5
    resets = rng.random(shape) < reset_rates
    terminations = np.roll(resets, -1, 0) & (rng.random(shape) < 0.5)
    columns = (obs.astype(np.float32), actions, rewards, terminations, resets, discounted)
    return [torch.as_tensor(column) for column in (*columns, logprobs - 2)]


def order_of_both(num_steps: int, num_envs: int, num_minibatches: int):
    """A stand-in for torch.randperm that puts into each minibatch what the two processes have."""
    torch_randperm = torch.randperm
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    rows = torch.arange(num_steps * num_envs).reshape(num_steps, 2, -1).transpose(0, 1)

    def randperm(n: int):
        assert n == num_steps * num_envs
        orders = [torch_randperm(n // 2, generator=generator) for generator in generators]
        both = [rows[rank].flatten()[order] for rank, order in enumerate(orders)]
        return torch.stack([half.reshape(num_minibatches, -1) for half in both], 1).flatten()

    return randperm


def test_an_update_is_that_of_one_process_on_all_the_data(script, tmp_path, monkeypatch):
    """Some minibatches have real rows in one process only, or in none."""
    spaces = make_spaces(script)
    options = dict(num_minibatches=16, update_epochs=3, clip_vloss=True, ent_coef=0.02)
    setup = {"args": script.Args(**options), "spaces": spaces}
    rates = [0.3] * 4 + [0.9] * 4
    whole = [make_rollout(script, spaces, 8, rates, seed) for seed in range(3)]
    halves = [[[c[:, part] for c in rollout] for rollout in whole] for part in np.s_[:4, 4:]]
    torch.save(setup | {"rollouts": halves}, tmp_path / "setup.pt")
    process = torchrun(ROOT / "tests/workers.py", "update", script.__name__, cwd=tmp_path)
    assert finish(process) == (0, "", "")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name in first.keys() - {"losses"}:
        assert torch.equal(first[name], second[name]), name
    assert first["losses"] == second["losses"]

    monkeypatch.setattr(torch, "randperm", order_of_both(8, 8, 16))
    expected = learn(script, setup, whole)
    assert 60 < expected["steps"] < 3 * 3 * 16  # some minibatches were empty
    for name in first.keys() - {"losses"}:
        torch.testing.assert_close(first[name], expected[name], rtol=1e-4, atol=1e-5)
    for got, wanted in zip(first["losses"], expected["losses"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_gradient_step_exchanges_the_gradient_and_nothing_else(script, monkeypatch):
    spaces, sums = make_spaces(script), []
    args = script.Args(num_minibatches=4, update_epochs=3)
    agent = script.Agent(*spaces, args)
    optimizer = script.Adam(agent, 1e-3)
    rollout = script.Rollout(*make_rollout(script, spaces, 16, [0.1] * 4, 0))
    monkeypatch.setattr(script, "total", lambda data: sums.append(data.shape) or data)
    script.update(agent, optimizer, rollout, args)
    steps = [optimizer.vector.shape] * args.num_minibatches
    epoch = [(3, args.num_minibatches), *steps]
    explained_variance, diagnosis = [(3, 2)], [(3, 1), (6,)]
    assert sums == [*explained_variance, *epoch, *epoch, *epoch, *diagnosis]


def test_each_process_has_its_own_environments_and_samples(script, args, monkeypatch):
    seeds, actions, collect = [], [], script.collect

    def watch(*given):
        rollout, state, episodes = collect(*given)
        actions.append(rollout.actions)
        return rollout, state, episodes

    monkeypatch.setattr(script, "collect", watch)
    monkeypatch.setattr(Seeds, "seen", seeds)
    options = dict(num_envs=2, num_steps=32, num_minibatches=1, total_timesteps=64)
    for rank in range(2):
        monkeypatch.setattr(script, "RANK", rank)
        script.train(args("Seeds", run_dir=None, **options))
    assert len(set(seeds)) == len(seeds) == 2 * 2
    one, other = actions[: len(actions) // 2], actions[len(actions) // 2 :]
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_processes_are_one_run(script, kind, tmp_path):
    """Episodes take 5 steps and a reset row: 5 a rollout in each environment, 40 in all."""
    options = [f"--env-id=envs:tests/Endless{kind}", "--num-envs=4", "--num-steps=30"]
    options += ["--num-minibatches=2", "--update-epochs=2", "--eval-episodes=1"]
    code, out, err = finish(start(script, *options, "--total-timesteps=1000", cwd=tmp_path))
    assert (code, err) == (0, "")
    assert out.count("greedy return over 1 episodes: 5.0") == out.count("tensorboard") == 1
    assert len(list(tmp_path.glob("run/events*"))) == 1
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert (progress["global_step"], progress["iteration"]) == (1000, 5)
    assert progress["window"] == [5.0] * 100
    scalars = curves(tmp_path / "run")
    ends, rates = zip(*scalars["charts/learning_rate"], strict=True)
    assert ends == (200, 400, 600, 800, 1000)
    assert rates == pytest.approx([8e-4 * share for share in (1, 0.8, 0.6, 0.4, 0.2)])
    steps = [step for step, _ in scalars["charts/episodic_return"]]
    assert len(steps) == len(set(steps)) == 200 and max(steps) == 1000
    assert steps == sorted(steps)
    # those of the first rows that end: the 33rd to the 40th step
    assert steps[:8] == list(range(33, 41))

    # another number of processes goes on, and the same number again
    goes_on = ["--resume", "run", "--total-timesteps"]
    assert run(script.__name__, *goes_on, 1300, cwd=tmp_path).returncode == 0
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert (progress["global_step"], progress["iteration"]) == (1300, 8)
    code, _, err = finish(torchrun(script.__file__, *goes_on, 1700, cwd=tmp_path))
    assert (code, err) == (0, "")
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert (progress["global_step"], progress["iteration"]) == (1700, 10)
    assert len(curves(tmp_path / "run")["charts/learning_rate"]) == 10


def test_episodes_never_end_ahead_of_the_run(script, args, monkeypatch):
    """Numbers of steps are dealt out evenly, but the other process has nothing but reset rows."""

    def gather(item):
        return [item, (0, [], []) if isinstance(item, tuple) else item]

    monkeypatch.setattr(script, "gather", gather)
    monkeypatch.setattr(script, "total", lambda data: data)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    options = dict(num_envs=4, num_steps=30, num_minibatches=2, total_timesteps=300)
    result = script.train(args("Endless", **options))
    steps = [step for step, _ in result["episodes"]]
    assert steps == sorted(steps) and steps[-1] == result["global_step"] == 300


def test_processes_stop_together(script, tmp_path):
    """An epoch that one takes and another leaves out, or an iteration, would never end."""
    options = ["--target-kl=0.003", "--target-return=-2000", "--total-timesteps=100000"]
    options += ["--env-id=Pendulum-v1"] if script.__name__ == "ppo_continuous" else []
    options += ["--learning-rate=0.003", *SMALL]
    code, out, err = finish(start(script, *options, cwd=tmp_path))
    assert (code, err) == (0, "") and "solved at step" in out
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert len(progress["window"]) == 100 and progress["iteration"] >= 10


def test_compiled_processes(tmp_path):
    options = ["--compile", "--total-timesteps=1000", "--eval-episodes=0", *SMALL]
    script = importlib.import_module("ppo_discrete")
    assert finish(start(script, *options, cwd=tmp_path))[::2] == (0, "")


# Failing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--help"], 0, "show this help message and exit"),
        (["--num-envs=0"], 2, "error: --num-envs 0 must be at least 1"),
        (["--env-id=No-v0"], 2, "error: --env-id No-v0: Environment `No` doesn't exist"),
    ],
)
def test_what_all_have_to_say_is_said_once(options, code, message, tmp_path):
    script = importlib.import_module("ppo_continuous")
    returned, out, err = finish(torchrun(script.__file__, *options, cwd=tmp_path))
    assert (out + err).count(message) == 1
    assert returned == bool(code) and set(exit_codes(err)) == ({code} if code else set())
    assert not list(tmp_path.iterdir())


def test_what_fails_in_one_process_fails_in_all(script, kind, tmp_path):
    options = [f"--env-id=envs:tests/BrokenInOne{kind}", *SMALL]
    code, _, err = finish(start(script, *options, cwd=tmp_path))
    assert code == 1 and exit_codes(err) == [1, 1]
    assert err.count("error: ") == err.count("an observation that is NaN or infinite at step ") == 1


def test_what_the_first_process_cannot_read_stops_all(script, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_text("damaged")
    code, _, err = finish(start(script, "--auto-resume", *SMALL, cwd=tmp_path))
    assert code == 1 and exit_codes(err) == [2, 2]
    assert err.count("error: ") == err.count("is damaged") == 1


def test_parameters_that_differ_are_found_out(script, tmp_path):
    process = torchrun(ROOT / "tests/workers.py", "drift", script.__name__, cwd=tmp_path)
    code, _, err = finish(process)
    assert code == 1 and "RuntimeError: the processes have learned different parameters" in err


@pytest.mark.parametrize(
    ("name", "target"), [("ppo_discrete", None), ("ppo_continuous", 0), ("ppo_discrete", 1)]
)
def test_a_signal_ends_all_after_the_iteration(name, target, tmp_path):
    """To torchrun, which passes it on, or to one of its processes."""
    script = importlib.import_module(name)
    process = start(script, "--checkpoint-interval=1e9", "--num-envs=2", cwd=tmp_path)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    time.sleep(0.5)
    os.kill(process.pid if target is None else ranks(process)[target], signal.SIGTERM)
    began = time.time()
    code, out, err = finish(process)
    assert code == 1 and "error: " not in err
    assert set(exit_codes(err)) == (set() if target is None else {143})
    stopped = re.search(
        rf"^stopped at step ([\d,]+); to go on: torchrun ... \S+{name}.py", out, re.M
    )
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert int(stopped[1].replace(",", "")) == progress["global_step"]
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime - began < 10  # torchrun waits 30 s


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_all(script, victim, tmp_path):
    process = start(script, *SMALL, cwd=tmp_path)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    os.kill(ranks(process)[victim], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1 and -9 in exit_codes(err)
    assert err.count("error: process 0 of 2 has lost another") == victim  # the first one prints
    assert "Error: " not in err.replace("ChildFailedError: ", "")


def test_restarted_processes_go_on(script, tmp_path):
    """One of them is killed at random moments, as often as the variable KILLS says."""
    rng = random.Random(script.__name__)
    kills = int(os.environ.get("KILLS", 2))
    total = 20_000 * (kills + 1)
    options = ["--auto-resume", "--checkpoint-interval=0", f"--total-timesteps={total}", *SMALL]
    process = start(script, *options, cwd=tmp_path, restarts=kills)
    path, step = tmp_path / "run" / "checkpoint.pt", 0
    for _ in range(kills):
        deadline = time.time() + 60
        while not path.exists() or script.load(path)["progress"]["global_step"] <= step:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        time.sleep(rng.random())
        os.kill(ranks(process)[rng.randrange(2)], signal.SIGKILL)
        time.sleep(1)  # until the other one has ended too
        step = script.load(path)["progress"]["global_step"]
    code, out, _ = finish(process)
    assert code == 0 and "greedy return over" in out
    assert script.load(path)["progress"]["global_step"] >= total
