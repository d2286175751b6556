"""The README's commands, examples and links, in its order and shortened, and what they print."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, main

import ppo_continuous

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, code in BLOCKS
    for line in (code.replace("&&", "\n").splitlines() if language == "sh" else [])
]
SHORT = {"--total-timesteps": "600", "--num-steps": "64", "--eval-episodes": "1"}
FIRST_LINE = r"\S+: step [\d,]+, best return (-inf|-?[\d.]+)"
LINE = r"step [\d,]+  return (nan|-?[\d.]+)  [\d,]+ steps/s"
LAST_LINE = r"greedy return of \d+ episodes: -?[\d.]+ \+- [\d.]+"
LONGER = {"--total-timesteps": "24000"}  # until there is a best.pt


def test_commands_and_examples_do_what_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    program, reach = PYTHON
    (sample,) = [code.splitlines() for language, code in BLOCKS if not language]
    assert re.fullmatch(LINE, sample[0]) and re.fullmatch(LAST_LINE, sample[1])
    Path("reach.py").write_text(reach)
    runs = [c for c in COMMANDS if c[0] == "python" and c[1].startswith("ppo_")]
    assert len(runs) >= 8
    for command in runs:
        script = __import__(command[1].removesuffix(".py"))
        options = [option for option in command[2:] if option != "--compile"]  # test_compile.py
        short = SHORT | (LONGER if "runs/pendulum" in options else {})
        if "--evaluate" in options:
            short = {"--eval-episodes": "1"}
        capsys.readouterr()
        more = [word for option in short.items() for word in option]
        assert main(script, [*options, *more], monkeypatch) == 0, command
        printed = capsys.readouterr().out.splitlines()
        if "--evaluate" not in options:
            assert re.fullmatch(FIRST_LINE, printed[0]) and re.fullmatch(LINE, printed[1])
        assert re.fullmatch(LAST_LINE, printed[-1])

    # the example plays the episode that evaluation played, and gets the same return
    seed = ppo_continuous.seed_everything("evaluation 1 0")
    assert "reset(seed=0)" in program
    exec(program.replace("reset(seed=0)", f"reset(seed={seed})"), {})
    got = capsys.readouterr().out.strip()
    path = "runs/pendulum/best.pt"
    assert main(ppo_continuous, ["--evaluate", path, "--eval-episodes=1"], monkeypatch) == 0
    assert capsys.readouterr().out == f"greedy return of 1 episodes: {got} +- 0.00\n"


@pytest.mark.parametrize(
    "page", ["README.md", "tests/benchmark/README.md", "tests/recipes/README.md"]
)
def test_links_and_files_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link
    for word in re.findall(
        r"`(tests/[^` ]+|ppo_(?:discrete|continuous)\.py|requirements.txt)`", text
    ):
        assert (ROOT / word).exists(), word


def test_the_readme_names_only_options_that_exist():
    known = {f"--{name.replace('_', '-')}" for name in ppo_continuous.Args.__dataclass_fields__}
    known |= {"--logdir", "--standalone", "--nproc-per-node", "--no-cuda"}
    assert {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)} <= known


def test_the_readme_is_short():
    assert TEXT.count("\n") <= 200 and sys.version_info >= (3, 10)
    names = re.search(r"## How to read a script(.*?)\n## ", TEXT, re.DOTALL)[1]
    for name in re.findall(r"`(\w+)`", names):
        assert hasattr(ppo_continuous, name), name
