import importlib
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import envs  # noqa: E402, F401 - registers the environments of the tests
import pytest  # noqa: E402

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
