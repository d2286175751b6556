"""Learning over environments and seeds: ours, and Stable-Baselines3 with the RL Zoo's settings.

    python tests/benchmark/learning.py                     # everything: hours
    python tests/benchmark/learning.py --environments Pendulum-v1 --seeds 3 --contenders ours
    python tests/benchmark/learning.py --option learning_rate=1e-3 --results /tmp/candidate

As many runs at a time as there are cores, each a process of its own with one thread. A finished
run is not run again: delete its row to have it anew. Results go to two files in
tests/benchmark/results/, a row for each run in both: learning.csv has what came of it, curves.csv
the way there, in 100 parts of equal numbers of steps, with the seconds at their end and the mean
return of the training episodes that ended in them. Seconds are CPU seconds of training.
"""

import argparse
import csv
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from speed import RESULTS, ROOT, machine, make_sb3, read

POINTS = 100  # of a curve


class Task(NamedTuple):
    script: str
    total_timesteps: int
    mark: float  # solved is: the mean of the last 20 training episodes has reached it
    num_envs: int = 0  # of Stable-Baselines3, as all that follows
    normalize: bool = False
    options: dict = {}


# rl-baselines3-zoo, hyperparams/ppo.yml (lin_x there is a value that falls linearly to 0)
TASKS = {
    "CartPole-v1": Task(
        *("ppo_discrete", 100_000, 475, 8, False),
        dict(n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, ent_coef=0.0)
        | dict(learning_rate=lambda remaining: remaining * 1e-3)
        | dict(clip_range=lambda remaining: remaining * 0.2),
    ),
    "Acrobot-v1": Task(
        *("ppo_discrete", 500_000, -100, 16, True),
        dict(n_steps=256, gae_lambda=0.94, gamma=0.99, n_epochs=4, ent_coef=0.0),
    ),
    "MountainCar-v0": Task(
        *("ppo_discrete", 500_000, -110, 16, True),
        dict(n_steps=16, gae_lambda=0.98, gamma=0.99, n_epochs=4, ent_coef=0.0),
    ),
    "LunarLander-v3": Task(
        *("ppo_discrete", 1_000_000, 200, 16, False),
        dict(n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01),
    ),
    "Pendulum-v1": Task(
        *("ppo_continuous", 200_000, -200, 4, False),
        dict(n_steps=1024, gae_lambda=0.95, gamma=0.9, n_epochs=10, ent_coef=0.0, use_sde=True)
        | dict(learning_rate=1e-3, clip_range=0.2, sde_sample_freq=4),
    ),
    "LunarLanderContinuous-v3": Task(
        *("ppo_continuous", 1_000_000, 200, 16, False),
        dict(n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01),
    ),
    "BipedalWalker-v3": Task(
        *("ppo_continuous", 2_000_000, 250, 32, True),
        dict(n_steps=2048, batch_size=64, gae_lambda=0.95, gamma=0.999, n_epochs=10, ent_coef=0.0)
        | dict(learning_rate=3e-4, clip_range=0.18),
    ),
}
# without a part in the choice of the defaults, and run without a contender
HELD_OUT = {
    "MountainCarContinuous-v0": Task("ppo_continuous", 200_000, 90),
    "FrozenLake-v1": Task("ppo_discrete", 200_000, 0.7),
    "CliffWalking-v1": Task("ppo_discrete", 200_000, -14),
    "Taxi-v4": Task("ppo_discrete", 500_000, 7),
}
ALL = TASKS | HELD_OUT
TARGETS = {"LunarLanderContinuous-v3": 275}  # for the mean of the last 100 training episodes


class Run(NamedTuple):
    """One run: what tells it from others, and how to make it."""

    contender: str
    environment: str
    seed: int
    total_timesteps: int
    options: dict

    @property
    def key(self) -> tuple[str, ...]:
        return (self.contender, self.environment, str(self.seed), str(self.total_timesteps))


class Record:
    """Notes the training episodes of a run, and the seconds of training."""

    def __init__(self, run: Run):
        self.run, self.begin = run, time.perf_counter()
        self.mark = ALL[run.environment].mark
        self.target = TARGETS.get(run.environment, math.inf)
        self.steps, self.returns = [], []
        self.clock = [(0, 0.0)]  # (steps, seconds)
        self.reached = {}

    def note(self, steps: int, seconds: float, episodes) -> None:
        """Steps and seconds so far, and (step, return) of the episodes since the last call."""
        self.clock.append((steps, seconds))
        for step, value in episodes:
            self.steps.append(step)
            self.returns.append(value)
            if len(self.returns) >= 20 and np.mean(self.returns[-20:]) >= self.mark:
                at = float(np.interp(step, *zip(*self.clock, strict=True)))
                self.reached.setdefault("solved", (step, at))
        # as --target-return does, once in an iteration
        if len(self.returns) >= 100 and np.mean(self.returns[-100:]) >= self.target:
            self.reached.setdefault("target", (steps, seconds))

    def result(self, greedy_returns: list[float]) -> dict:
        edges = np.linspace(0, self.run.total_timesteps, POINTS + 1)
        parts = np.clip(np.digitize(self.steps, edges, right=True) - 1, 0, POINTS - 1)
        returns = np.array(self.returns)
        means = {i: np.mean(returns[parts == i]) for i in {*parts.tolist()}}
        seconds = np.interp(edges[1:], *zip(*self.clock, strict=True))
        row = {"greedy_return": np.mean(greedy_returns), "greedy_std": np.std(greedy_returns)}
        row["training_return"] = np.mean(self.returns[-100:])
        for name in ("solved", "target"):
            row[f"{name}_steps"], row[f"{name}_seconds"] = self.reached.get(name, ("", ""))
        row["seconds"] = self.clock[-1][1]
        row["wall_seconds"] = time.perf_counter() - self.begin
        row["curve"] = {
            "seconds": " ".join(f"{value:.4g}" for value in seconds),
            "returns": " ".join(f"{means.get(i, math.nan):.4g}" for i in range(POINTS)),
        }
        return row


def learn_ours(run: Run, episodes: int) -> dict:
    script = importlib.import_module(ALL[run.environment].script)
    if not run.contender.startswith("ours"):
        importlib.import_module("ablation").DETAILS[run.contender].change(script)
    record, log = Record(run), script.log

    def log_and_note(writer, progress, ended, scalars):
        log(writer, progress, ended, scalars)
        seconds = time.process_time() - start
        record.note(progress.global_step, seconds, [episode[:2] for episode in ended])

    script.log = log_and_note
    options = dict(env_id=run.environment, seed=run.seed, total_timesteps=run.total_timesteps)
    with tempfile.TemporaryDirectory() as folder:
        options |= dict(run_dir=folder, eval_episodes=episodes)
        start = time.process_time()
        result = script.train(script.Args(**(options | run.options)))
    return record.result(result["eval_returns"])


def learn_sb3(run: Run, episodes: int) -> dict:
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback

    task, record, ended = TASKS[run.environment], Record(run), []
    script = importlib.import_module(task.script)  # for the seeds of the greedy episodes
    options = task.options | run.options
    model = make_sb3(run.environment, task.num_envs, task.normalize, run.seed, options)
    start = time.process_time()

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            ended.extend(
                (self.num_timesteps, info["episode"]["r"])
                for info in self.locals["infos"]
                if "episode" in info
            )
            return True

        def _on_rollout_start(self) -> None:  # after an update
            record.note(self.num_timesteps, time.process_time() - start, ended)
            ended.clear()

    model.learn(run.total_timesteps, callback=Note())
    record.note(model.num_timesteps, time.process_time() - start, ended)

    envs, env, returns = model.get_vec_normalize_env(), gym.make(run.environment), []
    for episode in range(episodes):
        seed = script.derive_seed(run.seed, script.EVALUATION, episode)
        (obs, _), is_done = env.reset(seed=seed), False
        returns.append(0.0)
        while not is_done:
            x = obs if envs is None else envs.normalize_obs(obs)
            action, _ = model.predict(x, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += float(reward)
            is_done = terminated or truncated
    return record.result(returns)


def work(given: str) -> None:
    """The run that a process of its own makes."""
    *described, episodes = json.loads(given)
    run = Run(*described)
    learn = learn_sb3 if run.contender == "stable-baselines3" else learn_ours
    print(json.dumps(learn(run, episodes)))


def start(run: Run, episodes: int) -> dict:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, "--worker", json.dumps([*run, episodes])]
    process = subprocess.run(command, env=environ, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{run}:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def append(path: Path, row: dict) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def is_finished(run: Run, path: Path) -> bool:
    return run.key in {tuple(row[name] for name in Run._fields[:4]) for row in read(path)}


def make_all(runs: list[Run], table: Path, curves: Path, episodes: int = 20) -> None:
    """Make the runs that the table does not have yet, and add them to both files."""
    from tqdm import tqdm

    table.parent.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not is_finished(run, table)]
    steps = sum(run.total_timesteps for run in todo)
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=steps, unit_scale=True) as bar:
        futures = {pool.submit(start, run, episodes): run for run in todo}
        failures = []
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    row = future.result()
                except RuntimeError as failure:  # the others are worth finishing
                    failures.append(str(failure))
                    continue
                curve = row.pop("curve")
                described = dict(zip(Run._fields, (*run.key, json.dumps(run.options)), strict=True))
                append(curves, described | curve)
                append(table, described | row | machine())
                bar.set_postfix_str(f"{run.contender} {run.environment} {row['greedy_return']:.1f}")
                bar.update(run.total_timesteps)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after the runs that go on now
            raise
    if failures:
        raise RuntimeError("\n".join(failures))


def parse(value: str):
    """A number, true, false or null; what is none of these is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contenders", nargs="+", default=["ours", "stable-baselines3"])
    parser.add_argument("--environments", nargs="+", default=[*ALL], metavar="ID")
    parser.add_argument("--seeds", type=int, default=10, help="1 to this")
    parser.add_argument("--steps", type=int, help="instead of those of the task")
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="a candidate")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.worker)
    contenders = [*given.contenders]
    if given.option:  # a candidate, by its own name, and alone
        contenders = [" ".join(["ours", *given.option])]
    options = {name: parse(value) for name, value in (x.split("=", 1) for x in given.option)}
    steps = {env_id: given.steps or task.total_timesteps for env_id, task in ALL.items()}
    runs = [
        Run(contender, env_id, seed, steps[env_id], options)
        for seed in range(1, given.seeds + 1)
        for env_id in given.environments
        for contender in contenders  # side by side, so that they meet the same machine
        if env_id in TASKS or contender != "stable-baselines3"
    ]
    make_all(runs, given.results / "learning.csv", given.results / "curves.csv")


if __name__ == "__main__":
    main()
