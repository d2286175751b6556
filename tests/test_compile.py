"""--compile: the same learning, in one graph, or a message that says what is missing."""

import dataclasses
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import command, run
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = dict(num_envs=4, num_steps=32, num_minibatches=4, update_epochs=3)

compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "clang++")
needs_compiler = pytest.mark.skipif(not shutil.which(compiler), reason="no C++ compiler")


def learn(script, options) -> tuple[list, list]:
    """The parameters and the diagnostics after each of three updates."""
    envs = script.make_envs(options)
    agent, optimizer, _ = script.begin(envs, options, None)
    gradient = script.compile_gradient(agent, options) if options.compile else script.gradient
    obs, _ = envs.reset(seed=1)
    state = (script.flat(obs), np.zeros(4, bool), np.zeros(4, np.float32))
    parameters, metrics = [], []
    for iteration in range(3):
        torch.manual_seed(iteration)
        rollout, state, _ = script.collect(envs, agent, state, 0, options)
        metrics.append(script.update(agent, optimizer, rollout, options, gradient))
        agent.obs_stats.update(rollout.obs[:-1][rollout.is_real])
        parameters.append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach())
    envs.close()
    return parameters, metrics


@needs_compiler
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_compiled_updates_are_the_eager_ones(script, args, clip_vloss):
    options = args("Counting", **OPTIONS, clip_vloss=clip_vloss, ent_coef=0.02)
    expected, expected_metrics = learn(script, options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got, metrics = learn(script, dataclasses.replace(options, compile=True))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for old, new in zip(expected, got, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)
    for old, new in zip(expected_metrics, metrics, strict=True):
        assert new == pytest.approx(old, rel=1e-3, abs=1e-5)


@needs_compiler
def test_a_run_may_be_compiled_and_go_on_without(script, tmp_path, monkeypatch):
    options = ["--num-envs=4", "--num-steps=16", "--num-minibatches=2", "--eval-episodes=1"]
    start = [*options, "--run-dir=run", "--total-timesteps=200", "--compile"]
    process = run(script.__name__, *start, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    monkeypatch.setenv("CXX", "no-such-compiler")  # needed only to train
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert run(script.__name__, "--evaluate=run", cwd=tmp_path).returncode == 0
    go_on = ["--resume=run", "--total-timesteps=400", "--no-compile"]
    process = run(script.__name__, *go_on, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""


def test_no_compiler_is_said_before_training(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    process = run(script.__name__, "--compile", "--run-dir=run", cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: --compile needs a C++ compiler")
    assert "no-such-compiler" in line and len(line) < 300
    assert not (tmp_path / "run").exists()


COMPILER = """#!/bin/sh
case "$*" in *-version*) echo "g++ (GCC) 12.2.0"; exit 0;; esac
mkdir {marker} && kill -INT 0
exit 1
"""


def test_ctrl_c_while_compiling_is_no_failure(script, tmp_path):
    """A compiler that sends it to the whole process group, as a terminal does, and fails."""
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER.format(marker=tmp_path / "marker"))
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.run(
        command(script.__name__, "--compile", "--run-dir=run"),
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert (tmp_path / "marker").exists()
    assert process.returncode == 130 and process.stderr == ""
    assert not (tmp_path / "run").exists()


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value is read, for which a GPU would have to be waited."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "equal")
        assert function.name().removeprefix("aten::") not in reads, function
        return function(*args, **(kwargs or {}))


def test_gradient_steps_read_no_value(script, args):
    options = args("Counting", **OPTIONS)
    envs = script.make_envs(options)
    agent, optimizer, _ = script.begin(envs, options, None)
    obs, _ = envs.reset(seed=1)
    state = (script.flat(obs), np.zeros(4, bool), np.zeros(4, np.float32))
    rollout, _, _ = script.collect(envs, agent, state, 0, options)
    envs.close()
    mbs = script.minibatches(script.prepare(rollout, agent, options), options)
    with NoReading():
        for mb in mbs:
            script.gradient_step(agent, optimizer, mb, options)
    with NoReading(), pytest.raises(AssertionError):
        mbs[0].advantages[0].item()
