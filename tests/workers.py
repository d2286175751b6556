"""What test_parallel.py lets torchrun start in the folder of the test: `workers.py TASK SCRIPT`."""

import atexit
import importlib
import sys

import conftest  # noqa: F401 - finds the scripts
import torch
import torch.distributed as dist

# gloo sometimes aborts a process that ends with its group open
atexit.register(lambda: dist.is_initialized() and print("the process group was left open"))


def learn(script, setup: dict, rollouts: list) -> dict:
    """All that a new agent has become after learning from each rollout in turn."""
    torch.manual_seed(0)
    agent = script.Agent(*setup["spaces"], setup["args"])
    optimizer = script.Adam(agent, 1e-3)
    torch.manual_seed(script.RANK)  # of the order of the rows
    losses = []
    for rollout in rollouts:
        rollout = script.Rollout(*rollout)
        agent.return_stats.update(rollout.discounted[:-1][rollout.is_real])
        losses.append(script.update(agent, optimizer, rollout, setup["args"]))
        agent.obs_stats.update(rollout.obs[:-1][rollout.is_real])
    state = {**agent.state_dict(), **optimizer.state_dict()}
    return {name: value.clone() for name, value in state.items()} | {"losses": losses}


def update(script) -> None:
    setup = torch.load("setup.pt", weights_only=False)
    result = learn(script, setup, setup["rollouts"][script.RANK])
    torch.save(result, f"{script.RANK}.pt")


def drift(script) -> None:
    """A run in which the second process has the last gradient a little wrong."""
    step = script.gradient_step

    def wrong_step(agent, optimizer, *given):
        norm = step(agent, optimizer, *given)
        if script.RANK == 1:
            optimizer.vector[-1] += 1e-6
        return norm

    script.gradient_step = wrong_step
    script.train(script.Args(num_steps=8, total_timesteps=600, run_dir="run", eval_episodes=0))


if __name__ == "__main__":
    {"update": update, "drift": drift}[sys.argv[1]](importlib.import_module(sys.argv[2]))
