"""What each detail is worth: the defaults with one detail changed, against the defaults.

    python tests/benchmark/ablation.py                         # all details, tasks and seeds
    python tests/benchmark/ablation.py --details "no ratio clipping" --seeds 2

Results go to ablation.csv in tests/benchmark/results/, as those of learning.py to learning.csv.
"""

import tempfile
from pathlib import Path

from common import RESULTS, ROOT
from learning import ALL, Run, parse, run_all

# short runs, in which a detail that slows learning down shows
TASKS = {
    "Pendulum-v1": 150_000,
    "LunarLander-v3": 150_000,
    "LunarLanderContinuous-v3": 150_000,
}
# options, or (code, what to have in its place)
DETAILS = {
    "no advantage normalisation": "--no-norm-adv",
    "no observation normalisation": (
        "((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10).float()",
        "obs.float()",
    ),
    "no reward scaling": (" / agent.return_stats.std", ""),
    "no learning-rate annealing": "--no-anneal-lr",
    "no bootstrap at time limits": ("masked_fill(terminated, 0)", "masked_fill(done, 0)"),
    # the policy's last layer stays small
    "PyTorch's initialisation": (
        "nn.init.orthogonal_(layer.weight, gain)",
        "layer.weight.data *= min(gain, 1)",
    ),
    "large policy output layer": ("last_gain=0.01", "last_gain=1.0"),
    "value clipping": "--clip-vloss",
    "no gradient clipping": "--max-grad-norm=1e9",
    "no ratio clipping": "--clip-coef=1e9",
    "Adam's epsilon 1e-8": ("eps=1e-5", "eps=1e-8"),
    "no entropy bonus": "--ent-coef=0",
    "GAE lambda 1": "--gae-lambda=1",
    "one epoch": "--update-epochs=1",
    "actions not stretched": ("self.action_center + self.action_scale * action", "action"),
}
STRETCHED = ["Pendulum-v1"]  # the lander's actions have the bounds ±1 anyway


def change(source: str, detail: str) -> tuple[str, str]:
    """The source of a script without the detail, and the options that it needs for that."""
    how = DETAILS.get(detail, "")
    if isinstance(how, str):
        return source, how
    if source.count(how[0]) != 1:
        raise ValueError(f"{detail}: {how[0]!r} is to be in the script exactly once")
    return source.replace(*how), ""


def main() -> None:
    details = dict(default=[*DETAILS], choices=DETAILS, metavar="NAME")
    given = parse(__doc__, TASKS, 5, RESULTS / "ablation.csv", details=details)
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for env_id in given.environments:
            script = f"{ALL[env_id][0]}.py"
            for detail in ["ours", *given.details]:
                if detail != "actions not stretched" or env_id in STRETCHED:
                    source, options = change((ROOT / script).read_text(), detail)
                    program = Path(folder, detail, script)
                    program.parent.mkdir(exist_ok=True)
                    program.write_text(source)
                    run = Run(detail, env_id, given.steps or TASKS[env_id], 0, options, program)
                    runs += [run._replace(seed=given.first_seed + k) for k in range(given.seeds)]
        # seed by seed, so that the details meet the same machine
        run_all(sorted(runs, key=lambda run: run.seed), given.results, given.jobs)


if __name__ == "__main__":
    main()
