"""The scripts stay small, formatted and alike."""

import ast
import difflib
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_small(name):
    source = (ROOT / f"{name}.py").read_text()
    assert source.count("\n") <= 400
    assert max(map(len, source.splitlines())) <= 100
    definitions = [
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(definitions) <= 26
    assert all(
        ast.get_docstring(definition) for definition in definitions if definition.name != "Args"
    )


def test_the_scripts_are_twins():
    sources = [(ROOT / f"{name}.py").read_text().splitlines() for name in SCRIPTS]
    difference = list(difflib.unified_diff(*sources, n=0))[2:]
    assert 0 < sum(line[0] in "+-" for line in difference) <= 50


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check"], ["format", "--check"]):
        process = subprocess.run([*ruff, *check, "."], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {line.split("/")[0] for line in listed.split() if not line.startswith(".")}
    scripts = {f"{name}.py" for name in SCRIPTS}
    assert names == scripts | {"README.md", "LICENSE", "requirements.txt", "tests"}
