import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
os.environ["SDL_VIDEODRIVER"] = "dummy"  # windows that nobody sees
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT / "tests")

import envs  # noqa: E402, F401 - registers the environments of the tests
import pytest  # noqa: E402
import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

SCRIPTS = ["ppo_discrete", "ppo_continuous"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The module of each script in turn."""
    return importlib.import_module(request.param)


@pytest.fixture
def kind(script) -> str:
    """How the ids of the environments in envs.py end for this script."""
    return "Discrete-v0" if script.__name__ == "ppo_discrete" else "Continuous-v0"


@pytest.fixture
def args(script, kind, tmp_path):
    """Returns a function that makes `Args` for one of the environments in envs.py."""

    def make(env: str, **options):
        options = {"run_dir": str(tmp_path / "run"), "eval_episodes": 0} | options
        return script.Args(env_id=f"tests/{env}{kind}", **options)

    return make


def start(script, args, learning_rate: float = 1e-3):
    """Environments, agent, flat parameters and optimizer, as `train` makes them."""
    vector = script.make_envs(args)
    torch.manual_seed(args.seed)
    agent = script.Agent(vector.single_observation_space, vector.single_action_space, args)
    params = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    torch.nn.utils.vector_to_parameters(params, agent.parameters())
    return vector, agent, params, torch.optim.Adam([params], learning_rate, eps=1e-5, fused=True)


def collect(script, vector, agent, args):
    """Rollouts, as `train` gets them."""
    return script.collect(vector, agent, args, vector.reset(seed=args.seed)[0])


def spy(script, name: str, monkeypatch) -> list[tuple[dict, object]]:
    """Each call of a function of the script from now on: its arguments by name, its result."""
    function, calls = getattr(script, name), []

    def watch(*given, **named):
        arguments = inspect.signature(function).bind(*given, **named).arguments
        calls.append((arguments, function(*given, **named)))
        return calls[-1][1]

    monkeypatch.setattr(script, name, watch)
    return calls


def command(script: str, *options) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, options)]


def run(script: str, *options, cwd: Path) -> subprocess.CompletedProcess:
    """The script as a process of its own, with the environments of envs.py within reach."""
    return subprocess.run(command(script, *options), cwd=cwd, capture_output=True, text=True)


def main(script, options: list, monkeypatch) -> int | str:
    """The script's `main` in this process; returns its exit code, or the message it ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    try:
        script.main()
    except SystemExit as stop:
        return stop.code
    return 0


def curves(run_dir) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: (step, value) of each tag."""
    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
