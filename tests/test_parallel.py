"""Two processes under torchrun: together they are one run, in learning and in failing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, curves

SMALL = ["--num-envs=4", "--num-steps=32", "--num-minibatches=2", "--update-epochs=2"]


def torchrun(*arguments, cwd: Path, restarts: int = 0) -> subprocess.Popen:
    """Two processes of a Python program, by PyTorch's launcher on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", f"--max-restarts={restarts}", *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(launcher, cwd=cwd, start_new_session=True, **pipes)


def start(name: str, *options: str, cwd: Path, restarts: int = 0) -> subprocess.Popen:
    return torchrun(ROOT / f"{name}.py", "--run-dir=run", *options, cwd=cwd, restarts=restarts)


def read(folder: Path) -> dict:
    """How far the run in this folder has come."""
    return torch.load(folder / "run/checkpoint.pt", weights_only=True)["progress"]


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """Process id of each rank."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True)
    found = {}
    for pid in listed.stdout.split():
        environment = Path(f"/proc/{int(pid)}/environ").read_text().split("\0")
        found |= {int(value[5:]): int(pid) for value in environment if value.startswith("RANK=")}
    return found


WORKER = """
import importlib, sys, torch
from pathlib import Path
import conftest, trouble
script, gradients = importlib.import_module(sys.argv[1]), []
gradient = script.gradient

def watch(agent, args, minibatch):
    got = gradient(agent, args, minibatch)
    gradients.append(got[0].clone())
    return got

script.gradient = watch
data, update, grads, kls = [], script.update, [], []

def keep(agent, params, optimizer, rollout, *rest):
    optimizer.register_step_post_hook(lambda *_: grads.append(params.grad.clone()))
    log = update(agent, params, optimizer, rollout, *rest)
    optimizer._optimizer_step_post_hooks.clear()
    data.append([rollout["obs"].flatten(0, 1), rollout["discounted_returns"].flatten()])
    kls.append([len(grads), log["losses/approx_kl"].item()])
    return log

script.update = keep
options = dict(num_envs=3, num_steps=9, num_minibatches=1, update_epochs=20, total_timesteps=150)
options |= dict(target_kl=1e-3, learning_rate=3e-3)
kind = "Discrete" if sys.argv[1] == "ppo_discrete" else "Continuous"
args = script.Args(env_id=f"trouble/Ranked{kind}-v0", run_dir="run", eval_episodes=2, **options)
agent = script.train(args).state_dict()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
saved = dict(agent=agent, gradients=gradients, grads=grads, data=data, threads=threads, kls=kls)
torch.save(saved, f"{script.RANK}.pt")
"""


def test_two_processes_are_one_run(script, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    process = torchrun("worker.py", script.__name__, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))

    # the gradient is the mean of all, and what it makes of the parameters the same to the bit
    assert len(first["grads"]) == len(second["grads"]) >= 3
    columns = [run[key] for key in ("gradients", "grads") for run in (first, second)]
    for a, b, *used in zip(*columns, strict=True):
        assert not torch.equal(a, b)
        mean = (a + b) / 2
        expected = mean * min(1, 0.5 / (mean.norm().item() + 1e-6))
        for gradient in used:
            torch.testing.assert_close(gradient, expected)
    for name, value in first["agent"].items():
        assert torch.equal(value, second["agent"][name]), name

    # so is the KL that ends an iteration's epochs early, and in all at once
    assert first["kls"] == second["kls"]
    assert len(first["grads"]) < 20 * len(first["data"])

    # no thread of the group outlives it: one that wants Python's lock at exit aborts the process
    names = first["threads"] + second["threads"]
    assert names and not any("gloo" in name for name in names)

    # so are the statistics, of the data of all
    obs, returns = (torch.cat(d) for d in zip(*first["data"], *second["data"], strict=True))
    agent = first["agent"]
    np.testing.assert_allclose(agent["obs_stats.mean"], obs.double().mean(0))
    np.testing.assert_allclose(agent["obs_stats.std"], obs.numpy().astype(float).std(0), rtol=1e-6)
    np.testing.assert_allclose(agent["return_stats.std"], returns.numpy().std(), rtol=1e-5)

    # steps count over both, the first one's episodes stand for all, and it alone writes
    assert read(tmp_path)["step"] == len(obs)
    steps = [step for step, _ in curves(tmp_path / "run")["charts/episodic_return"]]
    assert len(steps) > 5 and max(steps) <= len(obs) and steps == sorted(steps)
    assert len([*(tmp_path / "run").glob("events*")]) == 1 and out.count("step 54 ") == 1


def test_the_target_is_that_of_all_and_none_plays_the_same(tmp_path):
    """One process gets returns of 0, the other of 4: their mean is 2."""
    options = ["--env-id=trouble:trouble/RankedDiscrete-v0", *SMALL, "--eval-episodes=1"]
    for target, steps in ((2, 1024), (3, 2560)):  # 1024: each has seen 100 episodes
        more = [f"--target-return={target}", "--total-timesteps=2560"]
        process = start("ppo_discrete", *options, *more, cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.count("greedy return") == 1
        progress = read(tmp_path)
        assert progress["best"] == 2 and progress["step"] == steps
    seeds = (tmp_path / "seeds").read_text().split()
    # in both parts: the environments of both processes, and the same episode at the end
    assert len(seeds) == 2 * (2 * 4 + 1) and len({*seeds}) == 2 * (2 * 4) + 1


def test_ctrl_c_ends_all(tmp_path):
    """Each process prints where to go on; torchrun has an exit code of its own."""
    process = start("ppo_continuous", *SMALL, "--total-timesteps=10000000", cwd=tmp_path)
    while not (tmp_path / "run/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pids = ranks(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped: --run-dir run goes on" in err, err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert read(tmp_path)["step"] > 0 and "greedy" not in out


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_all_and_the_run_goes_on(victim, tmp_path):
    path = tmp_path / "run/checkpoint.pt"
    process = start("ppo_discrete", *SMALL, "--total-timesteps=10000000", cwd=tmp_path)
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pids = ranks(process)
    os.kill(pids[victim], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    before = read(tmp_path)["step"]
    goal = before + 500
    process = start("ppo_discrete", f"--total-timesteps={goal}", "--eval-episodes=1", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert read(tmp_path)["step"] >= goal
