"""Learning over environments and seeds: ours, and Stable-Baselines3 with the RL Zoo's settings.

    python tests/benchmark/learning.py                     # everything: hours
    python tests/benchmark/learning.py --environments Pendulum-v1 --seeds 3 --contenders ours
    python tests/benchmark/learning.py --option gamma=0.99 norm_adv=False --results candidate.csv

Every run is a process of its own with one thread, started as a user would start it. Runs that the
CSV file has a row of are not made again: delete the row to have one anew. Linux only.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import ENVIRON, RESULTS, ROOT, describe, read, write
from numpy.lib.stride_tricks import sliding_window_view
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# script, steps, and the mark that the mean of the last 20 training episodes is to reach
TASKS = {
    "CartPole-v1": ("ppo_discrete", 100_000, 475),
    "Acrobot-v1": ("ppo_discrete", 500_000, -100),
    "MountainCar-v0": ("ppo_discrete", 500_000, -110),
    "LunarLander-v3": ("ppo_discrete", 1_000_000, 200),
    "Pendulum-v1": ("ppo_continuous", 200_000, -200),
    "LunarLanderContinuous-v3": ("ppo_continuous", 1_000_000, 200),
    "BipedalWalker-v3": ("ppo_continuous", 2_000_000, 250),
}
# run by ours alone
MORE = {
    "MountainCarContinuous-v0": ("ppo_continuous", 200_000, 90),
    "FrozenLake-v1": ("ppo_discrete", 200_000, 0.7),
    "CliffWalking-v1": ("ppo_discrete", 200_000, -14),
    "Taxi-v4": ("ppo_discrete", 500_000, 7),
    "Hopper-v5": ("ppo_continuous", 1_000_000, 2600),  # needs gymnasium[mujoco]
}
ALL = TASKS | MORE
POINTS = 100  # of a learning curve


class Run(NamedTuple):
    contender: str
    environment: str
    steps: int
    seed: int
    options: str  # as on the command line
    program: Path

    @property
    def key(self) -> dict[str, str]:
        """What tells the row of this run from the others."""
        return {name: str(getattr(self, name)) for name in self._fields[:5]}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def mark_reached(returns: list[float], mark: float) -> int | None:
    """Index of the first episode at which the mean of the last 20 is the mark or more."""
    ends = range(20, len(returns) + 1)
    return next((end - 1 for end in ends if np.mean(returns[end - 20 : end]) >= mark), None)


def best_mean(returns: list[float]) -> float:
    """The highest mean of 100 episodes in a row, which --target-return goes by."""
    return float(sliding_window_view(returns, 100).mean(1).max())


def curve(steps: list[int], returns: list[float], total: int) -> str:
    """Mean return of the episodes that ended in each of 100 equal parts of the steps."""
    parts = np.minimum((np.array(steps) - 1) * POINTS // total, POINTS - 1)
    inside = [np.array(returns)[parts == part] for part in range(POINTS)]
    return " ".join(f"{np.mean(values):.4g}" if len(values) else "nan" for values in inside)


def measure(run: Run) -> dict:
    """Make the run, and read what came of it from what it prints and logs."""
    with tempfile.TemporaryDirectory() as folder:
        options = dict(env_id=run.environment, seed=run.seed, total_timesteps=run.steps)
        options |= dict(run_dir=f"{folder}/run", eval_episodes=20)
        command = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [sys.executable, str(run.program), *command, *run.options.split()]
        clock = [(time.time(), 0.0)]  # of the wall and of the process
        with open(f"{folder}/output", "w") as output:
            streams = dict(stdout=output, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, env=os.environ | ENVIRON, **streams)
            while process.poll() is None:
                clock.append((time.time(), cpu_seconds(process.pid)))
                time.sleep(0.1)
        output = Path(f"{folder}/output").read_text()
        greedy = re.search(r"greedy return of 20 episodes: (\S+) \+- (\S+)", output)
        if process.returncode or not greedy:
            raise RuntimeError(f"{run}\n{output}")
        reader = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0}).Reload()
        tag = "charts/episodic_return"  # absent where no episode ended
        episodes = reader.Scalars(tag) if tag in reader.Tags()["scalars"] else []
    steps, returns = [e.step for e in episodes], [e.value for e in episodes]
    row = run.key | dict(greedy_return=greedy[1], greedy_std=greedy[2])
    row["best_mean"] = best_mean(returns) if len(returns) >= 100 else ""
    row |= dict(mark_steps="", mark_cpu_seconds="", mark_wall_seconds="")
    reached = mark_reached(returns, ALL[run.environment][2])
    if reached is not None:
        at = episodes[reached].wall_time
        row["mark_steps"], row["mark_wall_seconds"] = steps[reached], at - clock[0][0]
        row["mark_cpu_seconds"] = float(np.interp(at, *zip(*clock, strict=True)))
    row |= dict(cpu_seconds=clock[-1][1], wall_seconds=clock[-1][0] - clock[0][0])
    ends = (np.arange(POINTS) + 1) * run.steps / POINTS  # of the parts of the curve
    passed = np.interp([e.wall_time for e in episodes], *zip(*clock, strict=True))
    seconds = np.interp(ends, steps, passed) if steps else []
    row["curve_cpu_seconds"] = " ".join(f"{second:.4g}" for second in seconds)
    return row | describe() | {"curve": curve(steps, returns, run.steps)}


def run_all(runs: list[Run], path: Path, jobs: int) -> None:
    """Make the runs that the file has no row of, so many at a time."""
    rows, failures = read(path), []
    todo = [run for run in runs if not any(run.key.items() <= row.items() for row in rows)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(measure, run) for run in todo]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                if future.exception():  # the others are worth finishing
                    failures.append(str(future.exception()))
                    print(failures[-1], file=sys.stderr)
                    continue
                row = future.result()
                rows.append(row)
                write(path, rows)
                cells = [row[name] for name in ("contender", "options", "environment", "seed")]
                print(f"{done} of {len(todo)}:", *cells, row["greedy_return"], flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after the runs that go on now
            raise
    if failures:
        sys.exit(f"{len(failures)} of {len(todo)} runs failed")


def option(text: str) -> str:
    """NAME=VALUE as our scripts take it: norm_adv=False is --no-norm-adv."""
    name, value = text.split("=", 1)
    name = name.replace("_", "-")
    return {"True": f"--{name}", "False": f"--no-{name}"}.get(value, f"--{name}={value}")


def parse(description: str, environments: dict, seeds: int, results: Path, **lists):
    """The options of the command line; lists: more of them, of several words each."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    lists["environments"] = dict(default=[*environments], choices=environments, metavar="ID")
    for name, settings in lists.items():
        parser.add_argument(f"--{name}", nargs="+", **settings)
    parser.add_argument("--seeds", type=int, default=seeds, help="how many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of those of the task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--results", type=Path, default=results, help="CSV file")
    return parser.parse_args()


def main() -> None:
    contenders = dict(default=["ours", "stable-baselines3"], choices=["ours", "stable-baselines3"])
    options = dict(default=[], metavar="NAME=VALUE", help="of our scripts")
    lists = dict(contenders=contenders, option=options)
    given = parse(__doc__, ALL, 10, RESULTS / "learning.csv", **lists)
    runs = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for env_id in given.environments:
            script, steps, _ = ALL[env_id]
            for contender in given.contenders:  # side by side, so that they meet the same machine
                run = Run(contender, env_id, given.steps or steps, seed, "", ROOT / f"{script}.py")
                if contender == "ours":
                    runs.append(run._replace(options=" ".join(map(option, given.option))))
                elif env_id in TASKS:
                    runs.append(run._replace(program=Path(__file__).parent / "sb3.py"))
    run_all(runs, given.results, given.jobs)


if __name__ == "__main__":
    main()
