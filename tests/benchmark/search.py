"""Search for the defaults: which options reach the marks of learning.py in the least CPU time?

    python tests/benchmark/search.py race     # many candidates, seed 11, to the mark
    python tests/benchmark/search.py confirm  # the best ten of them, seeds 12 and 13

Both can be stopped and started again; whole runs are made with learning.py --first-seed 11. Seeds 1
to 10 are left for the evidence. The rule: a run's time is the CPU seconds that it trains until it
reaches the mark, in those of the first defaults (number 0); at 1.25 it is cut. A candidate's score
is the geometric mean; the race drops it once it is cut, or its score is above 1. The first 20 are
random, the others mix options of the ten best. The lowest score wins of those whose whole runs lose
no task; of equal ones, that with less in it.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from threading import Lock

from common import ENVIRON, RESULTS, ROOT, describe, read, write
from learning import TASKS, mark_reached

RACE = [env_id for env_id in TASKS if env_id != "BipedalWalker-v3"]  # which takes too long
CHOICES = {  # the first of each: the defaults of the first race
    "batch": [(16, 256), (16, 128), (32, 32), (32, 64), (32, 128), (64, 32)],  # environments, steps
    "rows": [256, 512, 1024],  # of a minibatch
    "update_epochs": [10, 4, 6, 8, 14, 20],
    "learning_rate": [8e-4, 6e-4, 1e-3, 1.2e-3, 1.5e-3, 2e-3, 3e-3],
    "clip_coef": [0.1, 0.15, 0.2, 0.3],
    "gamma": [0.995, 0.98, 0.99, 0.998],
    "gae_lambda": [0.95, 0.9, 0.98],
    "ent_coef": [0.003, 0.0, 0.001, 0.01],
    "deviation": [0.8, 0.6, 1.0],  # of continuous actions at first
}
FILE = RESULTS / "search.csv"
CANDIDATES = 120
CUT = 1.25


def train(options: dict, env_id: str, seed: int, limit: float) -> dict:
    """Train to the mark, or for so many CPU seconds."""
    script, total, mark = TASKS[env_id]
    options = dict(options)
    (envs, steps), rows = options.pop("batch"), options.pop("rows")
    options |= dict(num_envs=envs, num_steps=steps, num_minibatches=max(1, envs * steps // rows))
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    text = text.replace("math.log(0.8)", f"math.log({options.pop('deviation')})")
    sys.modules["candidate"] = module = types.ModuleType("candidate")
    exec(text, module.__dict__)
    update, returns, row = module.update, [], dict(steps=0, reached=0)

    def watched(agent, params, optimizer, rollout, *rest):
        log = update(agent, params, optimizer, rollout, *rest)
        returns.extend(rollout["episodic_return"][rollout["done"]].tolist())
        row["steps"] += rollout["done"].numel()
        row["reached"] = int(mark_reached(returns, mark) is not None)
        if row["reached"] or time.process_time() - start > limit:
            sys.exit()
        return log

    module.update = watched
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options |= dict(env_id=env_id, seed=seed, total_timesteps=total, run_dir=folder)
        start = time.process_time()
        with contextlib.suppress(SystemExit):  # also of the script: its loss became NaN
            module.train(module.Args(**options))
        return row | dict(cpu_seconds=time.process_time() - start)


def find(rows: list[dict], **key) -> list[dict]:
    return [row for row in rows if all(row[name] == str(key[name]) for name in key)]


def defaults_seconds(rows: list[dict], env_id: str) -> float:
    defaults = find(rows, number=0, environment=env_id)
    return statistics.median(float(row["cpu_seconds"]) for row in defaults)


def score(rows: list[dict], **key) -> float:
    cut = [CUT] * len(find(rows, **key, reached=0))
    reached = find(rows, **key, reached=1)
    times = [float(r["cpu_seconds"]) / defaults_seconds(rows, r["environment"]) for r in reached]
    return statistics.geometric_mean(times + cut)


def best(rows: list[dict]) -> list[str]:
    """The ten candidates that finished the race with the lowest scores."""
    numbers = {row["number"] for row in rows} - {"0"}
    finished = [n for n in numbers if len(find(rows, number=n, seed=11)) == len(RACE)]
    return sorted(finished, key=lambda number: score(rows, number=number, seed=11))[:10]


def options_of(rows: list[dict], number: int) -> dict:
    """Those of the file, or random ones, or most of them from the best so far."""
    if known := find(rows, number=number):
        return json.loads(known[0]["options"])
    draw, parents = random.Random(number), best(rows) if number > 20 else []
    options = {name: choices[0] for name, choices in CHOICES.items()}
    for name in options if number else ():
        options[name] = draw.choice(CHOICES[name])
        if parents and draw.random() < 0.8:
            options[name] = options_of(rows, draw.choice(parents))[name]
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["race", "confirm"])
    stage = parser.parse_args().stage
    os.environ |= ENVIRON
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    rows, lock = read(FILE), Lock()

    def examine(number: int, seed: int) -> None:
        options = options_of(rows, number)
        key = dict(number=str(number), seed=str(seed))
        for env_id in RACE:
            if find(rows, **key, environment=env_id):
                continue
            if stage == "race" and number and find(rows, **key):
                if find(rows, **key, reached=0) or score(rows, **key) > 1:
                    break
            limit = CUT * defaults_seconds(rows, env_id) if number else math.inf
            result = pool.submit(train, options, env_id, seed, limit).result()
            row = key | dict(environment=env_id, options=json.dumps(options)) | result
            with lock:
                rows.append({name: str(value) for name, value in (row | describe()).items()})
                write(FILE, rows)

    stages = {
        "race": [[(0, 11), (0, 12), (0, 13)], [(1 + k, 11) for k in range(CANDIDATES)]],
        "confirm": [[(number, seed) for seed in (12, 13) for number in map(int, best(rows))]],
    }
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for pairs in stages[stage]:
            list(threads.map(examine, *zip(*pairs, strict=True)))


if __name__ == "__main__":
    main()
