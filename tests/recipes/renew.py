"""Make patches anew after their script has changed: python tests/recipes/renew.py [NAME ...]

A patch that no longer fits is merged with the script, from the version in git's history that it
was made for. Where both changed the same lines, a person must mend the file that is then named:
NAME=FILE makes the patch of a recipe from FILE, the whole script as the recipe changes it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parent.parent


def git(*command, cwd: Path = ROOT) -> tuple[int, str]:
    """The exit status of a git command, and what it prints."""
    # a folder of its own is no part of a repository that may surround it
    environ = os.environ | {"GIT_CEILING_DIRECTORIES": str(cwd.parent)}
    run = subprocess.run(["git", *command], cwd=cwd, env=environ, capture_output=True, text=True)
    return run.returncode, run.stdout


def merge(patch: Path, script: str, folder: Path) -> tuple[str, int]:
    """The script of now as the patch changes it, and the number of conflicts therein."""
    now, path = (ROOT / script).read_text(), folder / script
    commits = git("log", "--format=%H", "--", script)[1].split()
    versions = [now, *(git("show", f"{commit}:{script}")[1] for commit in commits)]
    # with less context for a patch that was made for a version that never was committed
    for base, context in [(base, context) for context in ("-C3", "-C1") for base in versions]:
        path.write_text(base)
        if git("apply", context, str(patch), cwd=folder)[0] == 0:
            for name, text in (("now", now), ("base", base), ("recipe", path.read_text())):
                (folder / name).write_text(text)
            conflicts, merged = git("merge-file", "-p", "now", "base", "recipe", cwd=folder)
            return merged, conflicts
    return f"<<<<<<< {patch} fits no version of the script\n{now}", 1


def renew(name: str, file: str) -> bool:
    """Write a patch anew; False where a person is needed."""
    patch = RECIPES / f"{name}.patch"
    text, script, _ = re.split(r"(?m)^--- a/(.+)\n", patch.read_text(), maxsplit=1)
    folder = Path(tempfile.mkdtemp())
    changed, conflicts = (Path(file).read_text(), 0) if file else merge(patch, script, folder)
    if conflicts:
        (folder / script).write_text(changed)
        print(f"{name}: CONFLICT, mend {folder / script} and renew {name}={folder / script}")
        return False
    for side, version in (("a", (ROOT / script).read_text()), ("b", changed)):
        (folder / side).mkdir()
        (folder / side / script).write_text(version)
    sides = f"a/{script}", f"b/{script}"
    _, diff = git("diff", "--no-index", "--no-prefix", "--no-color", *sides, cwd=folder)
    _, start, hunks = diff.partition("--- a/")
    if not hunks:
        print(f"{name}: the script already is as the recipe makes it")
        return False
    lines = len(re.findall(r"^[+-](?!\+\+ b/)", hunks, re.MULTILINE))
    row, readme = rf"(?m)^(\| \[{name}\].* )\d+ \|$", RECIPES / "README.md"
    readme.write_text(re.sub(row, rf"\g<1>{lines} |", readme.read_text()))
    state = "as before" if text + start + hunks == patch.read_text() else "renewed"
    patch.write_text(text + start + hunks)
    print(f"{name}: {state}, {lines} changed lines")
    shutil.rmtree(folder)
    return True


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in RECIPES.glob("*.patch"))
    done = [renew(name, file) for name, _, file in (name.partition("=") for name in names)]
    sys.exit(0 if all(done) else 1)
