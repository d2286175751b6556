"""The scripts as a user meets them: options, output, folders, errors, exit codes."""

import ast
import difflib
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, curves, main, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
TASKS = [
    *(
        ("ppo_discrete", env_id)
        for env_id in (
            "CartPole-v1",
            "Acrobot-v1",
            "MountainCar-v0",
            "LunarLander-v3",
            "FrozenLake-v1",
            "Blackjack-v1",
            TAXI,
        )
    ),
    *(
        ("ppo_continuous", env_id)
        for env_id in (
            "Pendulum-v1",
            "MountainCarContinuous-v0",
            "LunarLanderContinuous-v3",
            "BipedalWalker-v3",
        )
    ),
]
TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/learning_rate",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/old_approx_kl",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/grad_norm",
    "eval/episodic_return",
}


@pytest.mark.parametrize(("script", "env_id"), TASKS)
def test_trains_on(script, env_id, tmp_path):
    options = ("--env-id", env_id, "--total-timesteps", "5000", "--eval-episodes", "2")
    process = run(script, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert re.search(r"greedy return over 2 episodes: -?[\d.]+ ± [\d.]+\n", process.stdout)
    assert "Traceback" not in process.stderr

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{env_id}__{script}__1__\d{{8}}-\d{{6}}-\d{{6}}", run_dir.name)
    assert process.stdout.endswith(f"tensorboard --logdir runs/{run_dir.name}\n")
    assert re.search(r"100% +\d,\d{3} steps +return \S+ +\S+ steps/s +0:00:00 left", process.stdout)
    scalars = curves(run_dir)
    expected = (
        TAGS
        if scalars.keys() & {"charts/episodic_return"}
        else TAGS
        - {
            "charts/episodic_return",
            "charts/episodic_length",
        }
    )
    assert scalars.keys() == expected
    last_step = scalars["losses/value_loss"][-1][0]
    assert 5000 <= last_step < 5000 + 4096
    assert scalars["eval/episodic_return"][0][0] == last_step
    for tag in expected - {"losses/explained_variance"}:
        steps, values = zip(*scalars[tag], strict=True)
        assert list(steps) == sorted(set(steps)) and np.isfinite(values).all(), tag


def test_output_on_a_terminal_is_one_line_rewritten_in_place(script, tmp_path):
    """`script` gives the process a pseudo-terminal."""
    import pty

    lines, file = [], ROOT / f"{script.__name__}.py"

    def read(fd):
        data = os.read(fd, 1024)
        lines.append(data)
        return data

    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        options = ["--total-timesteps", "12000", "--eval-episodes", "1"]
        status = pty.spawn([sys.executable, str(file), *options], read)
    finally:
        os.chdir(home)
    output = b"".join(lines).decode()
    assert os.waitstatus_to_exitcode(status) == 0, output
    progress, *rest = output.replace("\r\n", "\n").strip().split("\n")
    assert progress.count("\r") >= 2 and "\x1b[K" in progress
    assert len(rest) == 2 and rest[0].startswith("greedy return over 1 episodes")


def test_a_users_own_environment(script, tmp_path):
    """`--env-id my_module:MyEnv-v0`, from a module beside the script."""
    kind = "Discrete" if script.__name__ == "ppo_discrete" else "Continuous"
    env_id = f"envs:tests/Counting{kind}-v0"
    options = ("--env-id", env_id, "--total-timesteps", "5000", "--run-dir", "here")
    process = run(script.__name__, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    scalars = curves(tmp_path / "here")
    assert {length for _, length in scalars["charts/episodic_length"]} == {1, 2, 3, 4}
    assert {value for _, value in scalars["charts/episodic_return"]} == {1, 3, 6, 10}


def test_warnings_of_a_usable_environment_are_passed_on(script, args):
    options = args("Counting")
    options.env_id = {"ppo_discrete": "CartPole-v0", "ppo_continuous": "Pendulum"}[script.__name__]
    with pytest.warns(Warning, match="out of date|latest versioned"):
        script.make_envs(options).close()


def test_hyperparameters_are_logged_as_text(script, args, tmp_path):
    script.train(args("Counting", seed=7, num_steps=4, total_timesteps=64))
    reader = EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = reader.Tensors("hyperparameters/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "|seed|7|" in text and "|num_steps|4|" in text


def test_without_eval_episodes_nothing_is_played(script, args, capsys):
    options = args("Counting", total_timesteps=5000)
    assert script.train(options)["eval_returns"] == []
    assert "greedy" not in capsys.readouterr().out


def test_same_seed_same_run_to_the_bit(script, args, tmp_path):
    """Parameters, statistics and all curves but the speed; another seed gives another run."""
    states, scalars = [], []
    for run_dir, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = args("Endless", seed=seed, run_dir=str(tmp_path / run_dir), eval_episodes=2)
        options.env_id = "CartPole-v1" if script.__name__ == "ppo_discrete" else "Pendulum-v1"
        options.total_timesteps = 6_000
        torch.manual_seed(hash(run_dir) % 1000)  # what went on before must not matter
        np.random.seed(hash(run_dir) % 1000)
        states.append(script.train(options)["agent"].state_dict())
        scalars.append(curves(tmp_path / run_dir))
        del scalars[-1]["charts/SPS"]
    same, other = ({k: torch.equal(v, s[k]) for k, v in states[0].items()} for s in states[1:])
    assert all(same.values()) and not all(other.values())
    assert scalars[0] == scalars[1] and scalars[0] != scalars[2]


def test_each_iteration_has_random_numbers_of_its_own(script, args, tmp_path, monkeypatch):
    """They depend on (seed, iteration) alone: what else was drawn before does not matter."""
    update, states = script.update, []

    def draw_and_update(*given):
        result = update(*given)
        torch.rand(7)
        return result

    for name, function in (("a", update), ("b", draw_and_update)):
        monkeypatch.setattr(script, "update", function)
        options = args("Endless", run_dir=str(tmp_path / name), num_envs=2, num_steps=32)
        options.total_timesteps = 200
        states.append(script.train(options)["agent"].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_evaluation_depends_on_seed_and_episode_alone(script, args):
    options = args("ObservedReward")
    torch.manual_seed(0)
    envs = script.make_envs(options)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, options)
    envs.close()
    six = list(script.play(agent, options, 6, ""))
    assert six == list(script.play(agent, options, 6, "")) and len(set(six)) == 2
    assert list(script.play(agent, options, 3, "")) == six[:3]


def test_runs_of_the_same_second_have_folders_of_their_own(script, args, tmp_path, monkeypatch):
    """Those of the same microsecond do not share one either: the second of them fails."""
    monkeypatch.chdir(tmp_path)

    class Clock(datetime):
        readings = [datetime(2026, 1, 2, 3, 4, 5, microsecond) for microsecond in (0, 6, 6)]

        @classmethod
        def now(cls):
            return cls.readings.pop(0)

    monkeypatch.setattr(script, "datetime", Clock)
    options = args("Counting", run_dir=None)
    options.env_id = "some_module:name/Space-v0"
    folders = [script.make_run_dir(options) for _ in range(2)]
    name = f"runs/some_module-name-Space-v0__{script.__name__}__1__20260102-030405-"
    assert folders == [name + "000000", name + "000006"]
    assert all(Path(folder).is_dir() for folder in folders)
    with pytest.raises(FileExistsError):
        script.make_run_dir(options)


def test_help_gives_meaning_and_default_of_every_option(script):
    process = run(script.__name__, "--help", cwd=ROOT)
    assert process.returncode == 0
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", process.stdout).split())
    source = Path(script.__file__).read_text().splitlines()
    fields = script.Args.__dataclass_fields__
    (args,) = (
        node for node in ast.parse("\n".join(source)).body if getattr(node, "name", 0) == "Args"
    )
    assert [field.target.id for field in args.body] == list(fields)
    for field in args.body:
        _, meaning = source[field.lineno - 1].split("  # ")
        name = field.target.id
        assert f"--{name.replace('_', '-')}" in text
        assert f"{meaning} (default: {fields[name].default})" in text


# Bad input ----------------------------------------------------------------------------------------

OTHER = {"ppo_discrete": "ppo_continuous", "ppo_continuous": "ppo_discrete"}
BAD_OPTIONS = [
    ("--env-id NoSuchEnv-v0", ["--env-id", "NoSuchEnv", "pprint_registry"]),
    ("--env-id CartPole-v99", ["--env-id", "CartPole", "v99", "v1"]),
    ("--env-id no_such_module:Env-v0", ["--env-id", "no_such_module", "installed", "PYTHONPATH"]),
    ("--env-id HalfCheetah-v5", ["--env-id", 'pip install "gymnasium[mujoco]"']),
    ("--env-id ALE/Pong-v5", ["--env-id", "ALE", "pip install ale-py"]),
    ("--env-id what?", ["--env-id", "what?"]),
    ("--env-id LunarLander-v2", ["--env-id", "LunarLander-v3"]),
    ("--env-id tests/MultiDiscrete-v0", ["--env-id", "MultiDiscrete", "Box", "Discrete"]),
    ("--env-id tests/SameStepVector{kind}", ["--env-id", "SAME_STEP", "NEXT_STEP"]),
    ("--env-id tests/UnsaidModeVector{kind}", ["--env-id", "None", "NEXT_STEP"]),
    ("--env-id tests/Sequence{kind}", ["--env-id", "Sequence", "Box"]),
    ("--num-minibatches 3", ["--num-minibatches 3", "--num-envs 16", "--num-steps"]),
    ("--num-envs 2 --num-steps 3 --num-minibatches 6", ["--num-minibatches 6", "2 or more"]),
    ("--total-timesteps 100", ["--total-timesteps 100", "at least", "--num-envs 16"]),
    ("--total-timesteps 0", ["--total-timesteps 0", "at least 1"]),
    ("--num-envs 0", ["--num-envs 0", "at least 1"]),
    ("--num-envs -1", ["--num-envs -1", "at least 1"]),
    ("--num-steps 0", ["--num-steps 0", "at least 1"]),
    ("--hidden-size 0", ["--hidden-size 0", "at least 1"]),
    ("--num-minibatches 0", ["--num-minibatches 0", "at least 1"]),
    ("--update-epochs 0", ["--update-epochs 0", "at least 1"]),
    ("--seed -1", ["--seed -1", "0 or more"]),
    ("--eval-episodes -1", ["--eval-episodes -1", "0 or more"]),
    ("--gamma 1.01", ["--gamma 1.01", "between 0 and 1"]),
    ("--gamma -0.1", ["--gamma -0.1", "between 0 and 1"]),
    ("--gamma nan", ["--gamma nan", "between 0 and 1"]),
    ("--gae-lambda 2", ["--gae-lambda 2", "between 0 and 1"]),
    ("--learning-rate 0", ["--learning-rate 0", "above 0"]),
    ("--learning-rate inf", ["--learning-rate inf", "finite"]),
    ("--learning-rate nan", ["--learning-rate nan", "above 0"]),
    ("--clip-coef -0.2", ["--clip-coef -0.2", "above 0"]),
    ("--max-grad-norm 0", ["--max-grad-norm 0", "above 0"]),
    ("--target-kl 0", ["--target-kl 0", "above 0"]),
    ("--ent-coef -1", ["--ent-coef -1", "0 or more"]),
    ("--vf-coef nan", ["--vf-coef nan", "0 or more"]),
]


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS, ids=[o for o, _ in BAD_OPTIONS])
def test_wrong_usage_is_one_line(
    script, kind, options, says, tmp_path, monkeypatch, capsys, recwarn
):
    monkeypatch.chdir(tmp_path)
    code = main(script, options.format(kind=kind).split(), monkeypatch)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and not recwarn.list
    assert err.count("\n") == 1 and err.startswith("error: ")
    for part in says:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_the_other_scripts_environment_names_the_other_script(script, tmp_path):
    env_id = {"ppo_discrete": "Pendulum-v1", "ppo_continuous": "CartPole-v1"}[script.__name__]
    process = run(script.__name__, "--env-id", env_id, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and f"{OTHER[script.__name__]}.py" in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [["--no-such-option", "1"], ["--num-envs", "many"], ["--activation", "sine"]]
)
def test_what_tyro_finds_keeps_its_form(script, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(script, options, monkeypatch) == 2
    _, err = capsys.readouterr()
    assert options[0] in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_dir_in_use_is_refused(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("precious")
    assert main(script, ["--run-dir", str(tmp_path / "run")], monkeypatch) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "--run-dir" in err and "new or empty" in err


def test_a_file_where_a_folder_is_expected_fails(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert main(script, ["--run-dir", str(tmp_path / "file" / "run")], monkeypatch) == 1
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "file/run" in err


@pytest.mark.parametrize("what", ["nanObs", "infObs", "nanReward", "infReward"])
def test_a_non_finite_observation_or_reward_stops_the_run(
    script, kind, what, tmp_path, monkeypatch, capsys
):
    options = f"--env-id tests/{what}{kind} --run-dir {tmp_path}/run --num-envs 4".split()
    assert main(script, options, monkeypatch) == 1
    _, err = capsys.readouterr()
    name = "observation" if "Obs" in what else "reward"
    assert err.count("\n") == 1 and name in err and "at step 44" in err


def test_a_non_finite_loss_stops_the_run(script, tmp_path, monkeypatch, capsys):
    options = f"--learning-rate 1e30 --num-steps 16 --run-dir {tmp_path}/run".split()
    assert main(script, options, monkeypatch) == 1
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "loss" in err and re.search(r"at step \d+", err)
    assert "--learning-rate" in err


# The files ----------------------------------------------------------------------------------------


def metadata(script) -> dict[str, str]:
    """The PEP 723 block of a script."""
    source = Path(script.__file__).read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source).group(1)
    return re.sub("^# ?", "", block, flags=re.M)


def test_inline_metadata_is_requirements_txt(script):
    text = metadata(script)
    assert re.search(r'^requires-python = ">=3.10"$', text, re.M)
    dependencies = ast.literal_eval(
        re.search(r"^dependencies = (\[\n.*?^\])", text, re.M | re.S)[1]
    )
    assert dependencies == (ROOT / "requirements.txt").read_text().split()


def test_importing_does_nothing(script, tmp_path):
    code = (
        f"import sys, signal, threading, torch; sys.path.insert(0, {str(ROOT)!r});"
        "before = (torch.get_num_threads(), torch.initial_seed(), signal.getsignal(2));"
        f"import {script.__name__};"
        "assert before == (torch.get_num_threads(), torch.initial_seed(), signal.getsignal(2));"
        "assert threading.active_count() == 1"
    )
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)
    assert list(tmp_path.iterdir()) == []


def functions(source: str) -> dict[str, str]:
    """Everything at the top level of a file, and the methods of its classes, by name."""
    parts = {}
    for node in ast.parse(source).body:
        for part in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                prefix = f"{node.name}." if part is not node else ""
                parts[prefix + part.name] = ast.get_source_segment(source, part)
    return parts


def test_the_scripts_are_twins():
    """The same names in the same order, and the same text but for what the actions touch."""
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    discrete, continuous = map(functions, sources)
    assert list(discrete) == list(continuous)
    differ = {name for name in discrete if discrete[name] != continuous[name]}
    touched_by_actions = {
        "Args",  # the defaults of env_id, noise_color and ent_coef
        "Agent",
        "Agent.__init__",
        "Agent.get_action",
        "Agent.get_action_and_value",
        "Agent.to_env",
        "Batch",  # the shape of the actions
        "Rollout",
        "make_envs",  # the space that is asked for
    }
    assert differ == touched_by_actions
    lines = [source.splitlines() for source in sources]
    diff = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    assert len(diff) <= 60
