"""What each detail is worth: the defaults with one detail changed, against the defaults.

    python tests/benchmark/ablation.py                         # all details, tasks and seeds
    python tests/benchmark/ablation.py --details "no ratio clipping" --seeds 2

Results go to ablation.csv and ablation_curves.csv in tests/benchmark/results/, written and read as
those of learning.py. A detail without an option is changed from outside, by replacing a function of
the imported script.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from learning import RESULTS, Run, make_all

# short runs, in which a detail that slows learning down shows
TASKS = {
    "Pendulum-v1": 150_000,
    "LunarLander-v3": 150_000,
    "LunarLanderContinuous-v3": 150_000,
}
PENDULUM, _, CONTINUOUS = TASKS


def end_at_time_limits(script) -> None:
    estimate = script.compute_gae

    def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        return estimate(rewards, values, next_values, dones, dones, gamma, gae_lambda)

    script.compute_gae = compute_gae


def learn_from_reset_rows(script) -> None:
    script.Rollout.is_real = property(lambda rollout: rollout.resets[:-1] | True)


def keep_advantages(script) -> None:
    prepare, latest = script.prepare, [None, None]

    def prepare_once(rollout, agent, args):
        if latest[0] is not rollout:
            latest[:] = rollout, prepare(rollout, agent, args)
        return latest[1]

    script.prepare = prepare_once


def initialise_as_pytorch(script) -> None:
    def layer_init(layer, std=1.0):
        for parameter in layer.parameters():
            parameter.data *= min(std, 1.0)  # the policy's last layer stays small
        return layer

    script.layer_init = layer_init


def begin_with_a_large_output(script) -> None:
    layer_init = script.layer_init
    script.layer_init = lambda layer, std=2**0.5: layer_init(layer, max(std, 1.0))


def use_adams_own_epsilon(script) -> None:
    adam = script.adam
    script.adam = lambda *state, **rates: adam(*state, **(rates | {"eps": 1e-8}))


def scale_no_actions(script) -> None:
    class Agent(script.Agent):
        def __init__(self, *spaces_and_args):
            super().__init__(*spaces_and_args)
            self.action_center, self.action_scale = 0.0, 1.0

    script.Agent = Agent


class Detail(NamedTuple):
    """Options, or a function that changes the script, and the tasks that either matters to."""

    options: dict
    change: Callable = lambda script: None
    tasks: tuple[str, ...] = tuple(TASKS)


DETAILS = {
    "white noise": Detail({"noise_color": 0.0}, tasks=(PENDULUM, CONTINUOUS)),
    "no bootstrap at time limits": Detail({}, end_at_time_limits),
    "reset rows learned from": Detail({}, learn_from_reset_rows),
    "advantages not renewed": Detail({}, keep_advantages),
    "no advantage normalisation": Detail({"norm_adv": False}),
    "no observation normalisation": Detail({"norm_obs": False}),
    "no reward scaling": Detail({"norm_reward": False}),
    "PyTorch's initialisation": Detail({}, initialise_as_pytorch),
    "large policy output layer": Detail({}, begin_with_a_large_output),
    "no learning-rate annealing": Detail({"anneal_lr": False}),
    "no gradient clipping": Detail({"max_grad_norm": 1e9}),
    "no ratio clipping": Detail({"clip_coef": 1e9}),
    "value clipping": Detail({"clip_vloss": True}),
    "Adam's epsilon 1e-8": Detail({}, use_adams_own_epsilon),
    "no entropy bonus": Detail({"ent_coef": 0.0}),
    "no action scaling": Detail({}, scale_no_actions, (PENDULUM,)),  # the lander's are [-1, 1]
    "GAE lambda 1": Detail({"gae_lambda": 1.0}),
    "one epoch": Detail({"update_epochs": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--details", nargs="+", choices=DETAILS, default=[*DETAILS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="1 to this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    details = {"ours": Detail({})} | {name: DETAILS[name] for name in given.details}
    runs = [
        Run(name, env_id, seed, steps, detail.options)
        for env_id, steps in TASKS.items()
        for seed in range(1, given.seeds + 1)
        for name, detail in details.items()
        if env_id in detail.tasks
    ]
    make_all(runs, given.results / "ablation.csv", given.results / "ablation_curves.csv")


if __name__ == "__main__":
    main()
