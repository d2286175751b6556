"""--compile: the same gradients, in one graph."""

import os
import shutil

import pytest
import torch
from conftest import collect, start

compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "clang++")


@pytest.mark.skipif(not shutil.which(compiler), reason="no C++ compiler")
def test_compiled_gradients_are_the_eager_ones(script, args):
    options = args("Counting", num_envs=4, num_steps=16, num_minibatches=4, clip_vloss=True)
    options.update_epochs, gradients = 3, []
    envs, agent, params, optimizer = start(script, options)
    rollouts = collect(script, envs, agent, options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.trace_autograd_ops = True
    compiled = torch.compile(script.gradient, dynamic=False)

    def both(*given):
        (eager, log), (fast, fast_log) = script.gradient(*given), compiled(*given)
        torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(fast_log, log, rtol=1e-3, atol=1e-5)
        gradients.append(fast)
        return fast.clone(), fast_log

    for _ in range(2):
        script.update(agent, params, optimizer, next(rollouts), options, both)
    envs.close()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(gradients) == 24 and not any(gradient.requires_grad for gradient in gradients)


@pytest.mark.skipif(not shutil.which(compiler), reason="no C++ compiler")
def test_a_run_may_be_compiled(script, args):
    options = args("Endless", num_envs=4, num_steps=16, num_minibatches=4, total_timesteps=200)
    options.compile = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.trace_autograd_ops = False  # as it is before `train`
    assert script.train(options).obs_stats.sums[0] >= 200
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
