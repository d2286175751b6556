"""What the programs of this folder share: where results go, and what is said of each."""

import csv
import os
import platform
import subprocess
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
# of every measured process: one thread, no GPU
ENVIRON = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def commit(folder: Path | str) -> str:
    """The commit of a checkout, or the name of a folder that is none."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with suppress(FileNotFoundError):  # there is no git
        if head := git("rev-parse", "--short", "HEAD"):
            return head + "-dirty" * bool(git("status", "--porcelain", "--", "ppo_*.py"))
    return Path(folder).resolve().name


def describe() -> dict[str, str]:
    """When, on what and with which versions a row was measured."""
    packages = ("torch", "gymnasium", "numpy", "stable-baselines3")
    versions = [f"{name} {version(name)}" for name in packages]
    versions = [f"ppo {commit(ROOT)}", f"python {platform.python_version()}", *versions]
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return {"date": date.today().isoformat(), "machine": machine, "versions": ", ".join(versions)}


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    """Replace the file; after a kill it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(f"{path}.tmp", path)
