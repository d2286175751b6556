"""Speed of the scripts, against Stable-Baselines3, the environment alone, and other versions.

    python tests/benchmark/speed.py                    # a quarter of an hour, on idle cores
    python tests/benchmark/speed.py --repetitions 1 --iterations 8      # a quick look
    python tests/benchmark/speed.py --against ../other # and the scripts of another checkout
    python tests/benchmark/speed.py --parts scaling    # one and two processes

Each measurement is a process of its own with one thread. The contenders take turns in every
repetition, so that the drift of the machine hits all alike; medians over the repetitions are
compared. They replace the rows of the same setting and contender in results/speed.csv.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from common import ENVIRON, RESULTS, ROOT, commit, describe, read, write

# script, environment, num_envs, num_steps, minibatch size; 10 epochs each
STEADY = {
    "Pendulum 16 x 128, 256": ("ppo_continuous", "Pendulum-v1", 16, 128, 256),
    "Pendulum 8 x 256, 64": ("ppo_continuous", "Pendulum-v1", 8, 256, 64),
    "LunarLander 16 x 128, 256": ("ppo_discrete", "LunarLander-v3", 16, 128, 256),
    "CartPole 16 x 128, 256": ("ppo_discrete", "CartPole-v1", 16, 128, 256),
}
SCALING = {"BipedalWalker 16 x 256, 256": ("ppo_continuous", "BipedalWalker-v3", 16, 256, 256)}
CONTENDERS = ["ours", "ours --compile", "stable-baselines3", "environment"]
WARM_UP = 3  # iterations that are left out


class Enough(BaseException):
    """Ends a measured program: no `except Exception` is to stop it on its way out."""


class Clock:
    """Notes the first step, and the end of each iteration until there are enough."""

    def __init__(self, begin: float, iterations: int):
        self.begin, self.iterations = begin, iterations
        self.first, self.laps, self.gradients = 0.0, [], []

    def lap(self, steps: int) -> None:
        self.laps.append((time.monotonic(), steps))
        if len(self.laps) == WARM_UP + self.iterations:
            raise Enough

    def note_first_step(self, envs):
        def step(actions):
            self.first = time.monotonic()
            del envs.step  # back to its own, which costs no time
            return envs.step(actions)

        envs.step = step
        return envs

    def result(self) -> dict[str, float | None]:
        (start, _), (end, _) = self.laps[WARM_UP - 1], self.laps[-1]
        steps = sum(steps for _, steps in self.laps[WARM_UP:])
        times = [after - before for before, after in pairwise(self.gradients)]
        return {
            "steps_per_second": steps / (end - start),
            "first_step_s": self.first - self.begin,
            "first_iteration_s": self.laps[0][0] - self.begin,
            "gradient_step_us": 1e6 * statistics.median(times) if times else None,
        }


def run_ours(clock: Clock, setting: list, folder: str, options: list[str]) -> None:
    name, env_id, num_envs, num_steps, minibatch = setting
    sys.path.insert(0, folder)
    script = importlib.import_module(name)
    make_envs, update = script.make_envs, script.update

    def timed_update(*given):
        *before, rollout, args, gradient = given

        def timed_gradient(*minibatch):  # from one to the next: all of a gradient step
            clock.gradients.append(time.perf_counter())
            return gradient(*minibatch)

        result = update(*before, rollout, args, timed_gradient)
        if isinstance(rollout, dict):
            steps = rollout["done"].numel()
        else:  # of an earlier version, which has rows that are no steps
            steps = int((~rollout[1][:-1]).sum())
        clock.lap(script.WORLD_SIZE * steps)
        return result

    script.make_envs = lambda *args, **kwargs: clock.note_first_step(make_envs(*args, **kwargs))
    script.update = timed_update
    options += [f"--env-id={env_id}", f"--num-envs={num_envs}", f"--num-steps={num_steps}"]
    options += [f"--num-minibatches={num_envs * num_steps // minibatch}", "--update-epochs=10"]
    with tempfile.TemporaryDirectory() as folder:
        options += [f"--total-timesteps={10**9}", f"--run-dir={folder}/run"]
        sys.argv = [f"{name}.py", *options]
        script.main()


def run_sb3(clock: Clock, setting: list) -> None:
    import sb3

    _, env_id, num_envs, num_steps, minibatch = setting
    options = dict(n_steps=num_steps, batch_size=minibatch, n_epochs=10, gamma=0.99)
    model = sb3.make(env_id, num_envs, True, options)
    train = model.train
    model.train = lambda: (train(), clock.lap(num_envs * num_steps))
    clock.note_first_step(model.env)
    model.learn(10**9)


def run_environment(clock: Clock, setting: list) -> None:
    """Random actions, drawn before: what no learner can be faster than."""
    import gymnasium as gym

    _, env_id, num_envs, num_steps, _ = setting
    no_autoreset = dict(autoreset_mode=gym.vector.AutoresetMode.DISABLED)  # as in the scripts
    envs = gym.make_vec(env_id, num_envs, "sync", vector_kwargs=no_autoreset)
    clock.note_first_step(envs)
    envs.reset(seed=1)
    actions = [envs.action_space.sample() for _ in range(num_steps)]
    while True:
        for action in actions:
            _, _, terminated, truncated, _ = envs.step(action)
            done = terminated | truncated
            if done.any():
                envs.reset(options={"reset_mask": done})
        clock.lap(num_envs * num_steps)


def work(contender: str, setting: list, folder: str, iterations: int, begin: float) -> None:
    """One measurement, in this process, the result of which is printed."""
    clock = Clock(begin, iterations)
    try:
        if contender == "environment":
            run_environment(clock, setting)
        elif contender == "stable-baselines3":
            run_sb3(clock, setting)
        else:
            is_compiled = contender.endswith("--compile")
            run_ours(clock, setting, folder, ["--compile"] if is_compiled else [])
    except Enough:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(clock.result()), flush=True)


def measure(contender: str, setting: tuple, folder: Path, iterations: int) -> dict:
    """One measurement, in a process of its own, or in two."""
    given = json.dumps([contender, setting, str(folder), iterations, time.monotonic()])
    command = [sys.executable, __file__, "--worker", given]
    if contender.endswith("2 processes"):
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as cache:  # of compiled code: each process compiles anew
        environ = os.environ | ENVIRON | {"TORCHINDUCTOR_CACHE_DIR": cache}
        process = subprocess.run(command, env=environ, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def compare(name: str, setting: tuple, contenders: dict[str, Path], given) -> None:
    """Medians of the contenders in one setting, printed and put into the file."""
    results = {contender: [] for contender in contenders}
    for _ in range(given.repetitions):
        for contender, folder in contenders.items():
            results[contender].append(measure(contender, setting, folder, given.iterations))
    rows = []
    for contender, each in results.items():
        row = {"setting": name, "contender": contender, "repetitions": given.repetitions}
        for key in each[0]:
            values = [result[key] for result in each if result[key] is not None]
            row[key] = statistics.median(values) if values else ""
        rows.append(row | describe())
        ratio = row["steps_per_second"] / rows[0]["steps_per_second"]
        text = f"{name:28} {contender:20} {row['steps_per_second']:9,.0f} steps/s ({ratio:.2f})"
        print(f"{text}  first step after {row['first_step_s']:.1f} s", flush=True)
    measured = [(name, contender) for contender in contenders]
    old = [r for r in read(given.results) if (r["setting"], r["contender"]) not in measured]
    write(given.results, old + rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", default=["steady"], choices=["steady", "scaling"])
    parser.add_argument("--settings", nargs="+", default=[*STEADY], choices=STEADY)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--against", type=Path, metavar="DIR", help="a checkout to compare with")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20, help="measured, after 3 to warm up")
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.csv")
    given = parser.parse_args()
    if given.worker:
        return work(*json.loads(given.worker))
    contenders = dict.fromkeys(given.contenders, ROOT)
    if given.against:
        label, folder = commit(given.against), given.against.resolve()
        ours = [name for name in contenders if name.startswith("ours")]
        contenders |= {name.replace("ours", label): folder for name in ours}
    if "steady" in given.parts:
        for name in given.settings:
            compare(name, STEADY[name], contenders, given)
    if "scaling" in given.parts:
        for name, setting in SCALING.items():
            compare(name, setting, {"ours": ROOT, "ours, 2 processes": ROOT}, given)


if __name__ == "__main__":
    main()
