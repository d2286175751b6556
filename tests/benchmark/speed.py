"""Speed of the scripts, against Stable-Baselines3 and against the environment alone.

    python tests/benchmark/speed.py                    # steady state and gradient step
    python tests/benchmark/speed.py --repetitions 1 --iterations 8      # a quick look
    python tests/benchmark/speed.py --parts memory     # after 1M steps: 4 minutes
    python tests/benchmark/speed.py --parts scaling    # one and two processes, on idle cores

Each measurement is a process of its own with one thread. The contenders take turns in every
repetition, so that the drift of the machine hits all alike, and medians over the repetitions are
compared. Results go to tests/benchmark/results/*.csv, from where plot.py puts them into the README;
set_up_s there is the time from the import to the first step, with --compile that of compiling,
from an empty cache.
"""

import argparse
import csv
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"

# name: script, environment, num_envs, num_steps, minibatch size; 10 epochs each
SETTINGS = {
    "Pendulum 16 x 128, 256": ("ppo_continuous", "Pendulum-v1", 16, 128, 256),
    "Pendulum 8 x 256, 64": ("ppo_continuous", "Pendulum-v1", 8, 256, 64),
    "LunarLander 16 x 128, 256": ("ppo_discrete", "LunarLander-v3", 16, 128, 256),
    "CartPole 16 x 128, 256": ("ppo_discrete", "CartPole-v1", 16, 128, 256),
}
SCALING = {"BipedalWalker 16 x 256, 256": ("ppo_continuous", "BipedalWalker-v3", 16, 256, 256)}
CONTENDERS = ("ours", "ours --compile", "stable-baselines3", "environment")
WARM_UP = 3  # iterations that are left out
# passes: of the networks over all data, for values, log-probabilities and diagnostics
SPLIT = ("environment", "acting", "gradient_steps", "passes", "rest")

MEMORY = {
    "CartPole-v1": "ppo_discrete",
    "Pendulum-v1": "ppo_continuous",
    "LunarLander-v3": "ppo_discrete",
}


class Stopwatch:
    """Seconds spent in functions, by the name of what they do."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.is_running = False

    def time(self, name: str, owner, attribute: str) -> None:
        """Replace owner.attribute by itself with the clock running, unless one is already."""
        import torch  # only here, so that importing the script takes the time it takes

        function = getattr(owner, attribute)
        self.seconds[name] = 0.0

        def timed(*args, **kwargs):
            if torch.compiler.is_compiling() or self.is_running:
                return function(*args, **kwargs)
            self.is_running, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.is_running = False

        setattr(owner, attribute, timed)


class Laps:
    """Notes time and split at the end of every iteration; ends the run after enough of them."""

    def __init__(self, stopwatch: Stopwatch, iterations: int):
        self.stopwatch, self.iterations, self.laps = stopwatch, iterations, []
        self.begin = time.perf_counter()

    def lap(self) -> bool:
        self.laps.append((time.perf_counter(), dict(self.stopwatch.seconds)))
        return len(self.laps) >= self.iterations + WARM_UP

    def result(self, steps: int) -> dict[str, float]:
        """Speed and split of an iteration of so many steps, and what the first ones took longer."""
        (start, before), (end, after) = self.laps[WARM_UP - 1], self.laps[-1]
        lap = (end - start) / (len(self.laps) - WARM_UP)
        shares = {name: (after[name] - before[name]) / (end - start) for name in after}
        shares["rest"] = 1 - sum(shares.values())
        extra = start - self.begin - WARM_UP * lap
        return {"steps_per_second": steps / lap, "warm_up_s": extra} | shares


def script_args(script, setting: str):
    """Options of the script for a setting."""
    _, env_id, num_envs, num_steps, minibatch_size = (SETTINGS | SCALING)[setting]
    return script.Args(
        env_id=env_id,
        num_envs=num_envs,
        num_steps=num_steps,
        num_minibatches=num_envs * num_steps // minibatch_size,
        total_timesteps=10**9,
        eval_episodes=0,
        run_dir=os.path.join(tempfile.mkdtemp(), "run"),
    )


def measure_ours(setting: str, iterations: int, compiled: bool = False) -> dict[str, float]:
    start = time.perf_counter()
    name, _, num_envs, num_steps, _ = (SETTINGS | SCALING)[setting]
    script = importlib.import_module(name)
    imported = time.perf_counter()
    stopwatch, signals, make_envs, show = Stopwatch(), [], script.make_envs, script.show
    laps = Laps(stopwatch, iterations)

    def make_timed_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        stopwatch.time("environment", envs, "step")
        return envs

    def show_and_note(*args):
        show(*args)
        if laps.lap():
            signals.append(0)

    def collect_and_note(*args, collect=script.collect):
        if not laps.laps:
            laps.begin = time.perf_counter()
        return collect(*args)

    script.make_envs, script.show, script.collect = make_timed_envs, show_and_note, collect_and_note
    stopwatch.time("acting", script.Agent, "act")
    stopwatch.time("acting", script.Agent, "to_env")
    stopwatch.time("gradient_steps", script, "gradient_step")
    stopwatch.time("passes", script.Agent, "get_value")
    stopwatch.time("passes", script.Agent, "get_action_and_value")
    script.train(replace(script_args(script, setting), compile=compiled), signals)
    if script.RANK > 0:  # the first process measures
        return {}
    steps = script.WORLD_SIZE * num_envs * num_steps
    return laps.result(steps) | {"import_s": imported - start, "set_up_s": laps.begin - imported}


def make_sb3(env_id: str, num_envs: int, normalize: bool, seed: int, options: dict):
    """Stable-Baselines3's PPO; without the render mode that its make_vec_env would set."""
    import gymnasium as gym
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(lambda: gym.make(env_id), num_envs, seed=seed)
    if normalize:
        envs = VecNormalize(envs, gamma=options["gamma"])
    return PPO("MlpPolicy", envs, device="cpu", seed=seed, **options)


def measure_sb3(setting: str, iterations: int) -> dict[str, float]:
    start = time.perf_counter()
    from stable_baselines3.common.callbacks import BaseCallback

    imported = time.perf_counter()
    name, env_id, num_envs, num_steps, minibatch_size = SETTINGS[setting]
    args = script_args(importlib.import_module(name), setting)
    options = dict(n_steps=num_steps, batch_size=minibatch_size, n_epochs=args.update_epochs)
    options |= dict(gamma=args.gamma, gae_lambda=args.gae_lambda, ent_coef=args.ent_coef)
    options |= dict(learning_rate=args.learning_rate, clip_range=args.clip_coef)
    set_up = time.perf_counter()
    model = make_sb3(env_id, num_envs, True, 1, options)
    set_up = time.perf_counter() - set_up
    stopwatch = Stopwatch()
    laps = Laps(stopwatch, iterations)

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            return len(laps.laps) < iterations + WARM_UP

        def _on_rollout_start(self) -> None:
            if self.n_calls:
                laps.lap()

    stopwatch.time("environment", model.env, "step_wait")
    stopwatch.time("acting", model.policy, "forward")
    stopwatch.time("gradient_steps", model, "train")
    model.learn(10**9, callback=Note())
    return laps.result(num_envs * num_steps) | {"import_s": imported - start, "set_up_s": set_up}


def measure_environment(setting: str, iterations: int) -> dict[str, float]:
    """Random actions, drawn before: what no learner can be faster than."""
    start = time.perf_counter()
    script = importlib.import_module(SETTINGS[setting][0])
    imported = time.perf_counter()
    args = script_args(script, setting)
    envs = script.make_envs(args)
    envs.reset(seed=1)
    set_up = time.perf_counter() - imported
    actions = [envs.action_space.sample() for _ in range(args.num_steps)]
    stopwatch = Stopwatch()
    stopwatch.time("environment", envs, "step")
    laps = Laps(stopwatch, iterations)
    is_done = False
    while not is_done:
        for action in actions:
            envs.step(action)
        is_done = laps.lap()
    steps = args.num_envs * args.num_steps
    return laps.result(steps) | {"import_s": imported - start, "set_up_s": set_up}


def measure_gradient_step(minibatch_size: int, seconds: float = 2.0) -> dict[str, float]:
    """Microseconds of a gradient step on Pendulum, and of its matrix products in NumPy."""
    import numpy as np
    import torch

    script = importlib.import_module("ppo_continuous")
    torch.set_num_threads(1)
    args = script.Args(num_minibatches=4096 // minibatch_size)
    envs = script.make_envs(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    optimizer = script.Adam(agent, args.learning_rate)
    n = minibatch_size
    columns = (torch.randn(n, 3), torch.randn(n, 1), *(torch.randn(n) for _ in range(4)))
    mb = script.Batch(*columns, torch.full((n,), 1 / n))

    obs, rng = np.random.randn(n, 3).astype(np.float32), np.random.default_rng(0)
    weights = [rng.standard_normal(shape, np.float32) / 8 for shape in ((3, 64), (64, 64), (64, 1))]

    def floor():
        for _ in range(2):  # actor and critic
            x, inputs = obs, []
            for i, w in enumerate(weights):
                inputs.append(x)
                x = x @ w
                if i < 2:
                    x = np.tanh(x)
            gradient = x
            for i in (2, 1, 0):
                inputs[i].T @ gradient  # of the weights
                if i:
                    gradient = (gradient @ weights[i].T) * (1 - inputs[i] ** 2)

    def median_us(function) -> float:
        for _ in range(10):
            function()
        end, times = time.perf_counter() + seconds, []
        while time.perf_counter() < end:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times)

    compute = script.compile_gradient(agent, args)
    result = {"numpy_floor_us": median_us(floor)}
    result["eager_us"] = median_us(lambda: script.gradient_step(agent, optimizer, mb, args))
    compiled = median_us(lambda: script.gradient_step(agent, optimizer, mb, args, compute))
    return result | {"compiled_us": compiled}


def measure_memory(env_id: str, early: int = 50_000, late: int = 1_000_000) -> dict[str, float]:
    """Resident memory after so many steps, in MiB."""
    script = importlib.import_module(MEMORY[env_id])
    resident, show = {}, script.show

    def show_and_note(run, *args):
        show(run, *args)
        for steps in (early, late):
            if run.global_step >= steps and steps not in resident:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident[steps] = pages * resource.getpagesize() / 2**20

    script.show = show_and_note
    run_dir = os.path.join(tempfile.mkdtemp(), "run")
    script.train(script.Args(env_id=env_id, total_timesteps=late, run_dir=run_dir))
    growth = resident[late] / resident[early] - 1
    return {"early_mb": resident[early], "late_mb": resident[late], "growth": growth}


MEASURE = {
    "ours": measure_ours,
    "ours --compile": partial(measure_ours, compiled=True),
    "stable-baselines3": measure_sb3,
    "environment": measure_environment,
    "gradient_step": measure_gradient_step,
    "memory": measure_memory,
}


def measure(what: str, *given, processes: int = 1) -> dict[str, float]:
    """One measurement, in a process of its own, or in several."""
    command = [sys.executable, __file__, "--worker", json.dumps([what, *given])]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command[1:1] = [*torchrun, f"--nproc-per-node={processes}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as cache:  # of compiled code: each process compiles anew
        environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        process = subprocess.run(command, env=environ, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def work(what: str, *given) -> None:
    result = MEASURE[what](*given)
    if not result:
        return
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(result | {"peak_memory_mb": kilobytes / 1024}))


def machine() -> dict[str, str]:
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "gymnasium")}
    versions |= {name: importlib.import_module(name).__version__ for name in ("numpy",)}
    versions["stable_baselines3"] = importlib.import_module("stable_baselines3").__version__
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
    } | versions


def write(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    described = [row | machine() for row in rows]
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, described[0].keys(), restval="")
        writer.writeheader()
        for row in described:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(values)
    print(f"wrote {(RESULTS / name).relative_to(ROOT)}")


def medians(results: list[dict]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def steady(repetitions: int, iterations: int) -> None:
    rows = []
    for setting in SETTINGS:
        results = {contender: [] for contender in CONTENDERS}
        for _ in range(repetitions):
            for contender in CONTENDERS:
                results[contender].append(measure(contender, setting, iterations))
        base = medians(results["stable-baselines3"])["steps_per_second"]
        for contender in CONTENDERS:
            row = dict.fromkeys(SPLIT, "")
            row |= medians(results[contender])
            row["ratio"] = row["steps_per_second"] / base
            rows.append({"setting": setting, "contender": contender, "n": repetitions} | row)
            speed, ratio = row["steps_per_second"], row["ratio"]
            print(f"{setting:28} {contender:18} {speed:9,.0f} steps/s  {ratio:5.2f} x", flush=True)
            parts = " ".join(f"{name} {row[name]:.0%}" for name in SPLIT if row[name] != "")
            print(f"{'':28} {parts}", flush=True)
    write("speed.csv", rows)


def gradient(repetitions: int) -> None:
    rows = []
    for size in (64, 256):
        row = medians([measure("gradient_step", size) for _ in range(repetitions)])
        row["floors"] = row["compiled_us"] / row["numpy_floor_us"]
        rows.append({"minibatch": size, "n": repetitions} | row)
        times = "eager {eager_us:.0f}, compiled {compiled_us:.0f}, NumPy {numpy_floor_us:.0f}"
        ratio = f"compiled is {row['floors']:.2f} x NumPy"
        print(f"gradient step, {size}: {times.format(**row)} us; {ratio}", flush=True)
    write("gradient_step.csv", rows)


def memory() -> None:
    rows = []
    for env_id in MEMORY:
        rows.append({"environment": env_id} | measure("memory", env_id))
        print("{environment:16} {early_mb:.0f} MiB, later {late_mb:.0f}".format(**rows[-1]))
    write("memory.csv", rows)


def scaling(repetitions: int, iterations: int) -> None:
    rows = []
    for setting in SCALING:
        results = {1: [], 2: []}
        for _ in range(repetitions):
            for processes in results:
                results[processes].append(measure("ours", setting, iterations, processes=processes))
        alone = medians(results[1])["steps_per_second"]
        for processes in results:
            row = medians(results[processes])
            row["efficiency"] = row["steps_per_second"] / alone / processes
            rows.append({"setting": setting, "processes": processes, "n": repetitions} | row)
            each = [round(result["steps_per_second"]) for result in results[processes]]
            print(f"{setting}, {processes}: {row['efficiency']:.0%} of {each} steps/s", flush=True)
            print(" ".join(f"{name} {row[name]:.0%}" for name in SPLIT), flush=True)
    write("scaling.csv", rows)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed_table() -> str:
    speeds = {(row["setting"], row["contender"]): row for row in read(RESULTS / "speed.csv")}
    ours, compiled, peer, bare = CONTENDERS

    def speed(setting: str, contender: str) -> str:
        row = speeds[setting, contender]
        ratio = f" ({float(row['ratio']):.2f} x)" if contender in (ours, compiled) else ""
        return f"{float(row['steps_per_second']):,.0f}{ratio}"

    header = ["environment, num_envs x num_steps, minibatch", "Stable-Baselines3", "ours"]
    header += ["ours, `--compile`", "environment alone"]
    order = (peer, ours, compiled, bare)
    return markdown(header, [[x, *(speed(x, name) for name in order)] for x in SETTINGS])


def shares(row: dict[str, str]) -> list[str]:
    return [f"{float(row[name]):.0%}" for name in SPLIT]


PARTS = [name.replace("_", " ") for name in SPLIT]


def split_table() -> str:
    ours = [row for row in read(RESULTS / "speed.csv") if row["contender"].startswith("ours")]
    rows = [[row["setting"], row["contender"], *shares(row)] for row in ours]
    return markdown(["setting", "", *PARTS], rows)


def scaling_table() -> str:
    rows = []
    for row in read(RESULTS / "scaling.csv"):
        speed = f"{float(row['steps_per_second']):,.0f}"
        efficiency = f"{float(row['efficiency']):.0%}"
        rows.append([row["setting"], row["processes"], speed, efficiency, *shares(row)])
    return markdown(["setting", "processes", "steps/s", "efficiency", *PARTS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parts = ["steady", "gradient", "memory", "scaling"]
    parser.add_argument("--parts", nargs="+", default=["steady", "gradient"], choices=parts)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20, help="measured, after 3 to warm up")
    options = parser.parse_args()
    if options.worker:
        return work(*json.loads(options.worker))
    if "steady" in options.parts:
        steady(options.repetitions, options.iterations)
    if "gradient" in options.parts:
        gradient(options.repetitions)
    if "memory" in options.parts:
        memory()
    if "scaling" in options.parts:
        scaling(options.repetitions, options.iterations)


if __name__ == "__main__":
    main()
