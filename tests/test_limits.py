"""The scripts stay small, formatted and alike."""

import ast
import difflib
import re
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
    assert len(definitions) <= 20
    assert all(
        ast.get_docstring(definition) for definition in definitions if definition.name != "Args"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_line_is_squeezed(name):
    """As far as a program can tell."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    pairs = set()
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr), f"walrus in line {node.lineno}"
        if isinstance(node, ast.Expr):
            effect = isinstance(node.value, ast.ListComp | ast.BoolOp | ast.IfExp)
            assert not effect, f"an expression for its effect in line {node.lineno}"
        if isinstance(node, ast.Assign):
            assert len(node.targets) == 1, f"a chain of assignments in line {node.lineno}"
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                assert len(target.elts) == 2, f"several values in line {node.lineno}"
                pairs.add(ast.unparse(target))
        if isinstance(node, ast.BoolOp):
            assert len(node.values) <= 3, f"a check for many things in line {node.lineno}"
    # two values that belong together
    assert pairs <= {
        "(RANK, WORLD_SIZE)",
        "(obs_dim, action_dim)",
        "(self.obs_stats, self.return_stats)",
    }


def test_the_scripts_are_twins():
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    lines = [source.splitlines() for source in sources]
    difference = list(difflib.unified_diff(*lines, n=0))[2:]
    assert 0 < sum(line[0] in "+-" for line in difference) <= 50
    # the options differ in nothing but defaults
    option = re.compile(r"^(    \w+: [^=]+) = \S+(  # .*)$", re.MULTILINE)
    assert option.findall(sources[0]) == option.findall(sources[1])


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
