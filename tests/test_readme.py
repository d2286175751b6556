"""What the README says can be done: its commands, its examples, its links."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
SHELL, PYTHON = (
    re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for language in ("sh", "python")
)
COMMANDS = [line.partition("  #")[0].strip() for block in SHELL for line in block.splitlines()]
TRAINING = [
    line for line in COMMANDS if re.search(r"(^|&& )(python|torchrun .*) ppo_\w+\.py", line)
]


def options_of(command: str) -> list[str]:
    """What follows the script in a command."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("ppo_"))
    return words[script:]


def example(start: str) -> str:
    (block,) = (block for block in PYTHON if block.startswith(start))
    return block


@pytest.fixture
def folder(tmp_path):
    """A folder with the scripts and what the examples of the README put beside them."""
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "reach.py").write_text(example("import gymnasium"))
    return tmp_path


def test_shell_blocks_are_shell():
    assert len(COMMANDS) >= 24
    for block in SHELL:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", [line for line in TRAINING if "--help" not in line])
def test_options_of_commands_exist(command):
    script, *options = options_of(command)
    args = tyro.cli(__import__(script.removesuffix(".py")).Args, args=options)
    if "--run-dir" in options:
        assert args.run_dir == options[options.index("--run-dir") + 1]


def test_commands_run_in_the_readmes_order(folder):
    """Each for a few iterations only; a window and a second machine are not to be had here."""
    done, steps = {}, 24_576  # 100 episodes and more, so that there is a best.pt
    for command in TRAINING:
        if "--render" in command or "--nnodes" in command or "xargs" in command:
            continue
        command = command.rpartition("&& ")[2].replace("python ", f"{sys.executable} ", 1)
        if "--resume" in command or "--auto-resume" in command:
            steps += 4_096
        if "--help" not in command and "--evaluate" not in command:
            command += f" --total-timesteps {steps}"
        if "--eval-episodes" not in command and "--help" not in command:
            command += " --eval-episodes 2"
        command = command.replace("--eval-episodes 100", "--eval-episodes 3")
        process = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        assert process.returncode == 0, f"{command}\n{process.stderr}"
        done[command] = process.stdout
    assert len(done) >= 12
    for command, output in done.items():
        expected = "usage: " if "--help" in command else "greedy return over "
        assert expected in output, command


def test_training_from_python_runs_as_shown(folder):
    code = example("from ppo_continuous import").replace("100_000", "5_000")
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    steps, returns = re.search(r"^(\d+) \[(.*)\]$", process.stdout, re.MULTILINE).groups()
    assert int(steps) >= 5_000 and len(returns.split(",")) == 10


def test_links_lead_somewhere():
    """Links to lines of code are in test_benchmark.py: they are renewed with the tables."""
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"\$\$.*?\$\$", "", README))
    heads = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link.partition("#")[0]).exists(), link
    assert sum("#L" in link for link in links) > 40
