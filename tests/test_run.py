"""Runs as a user meets them: they go on, stop, can be watched, and say what is wrong."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import trouble
from conftest import ROOT, SCRIPTS, command, curves, main, run
from envs import Drawn, Seeds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture
def troubled(script, kind, tmp_path):
    """Returns a function that makes `Args` for one of the environments in trouble.py."""

    def make(env: str, **options):
        options = SMALL | {"run_dir": str(tmp_path / "run"), "eval_episodes": 0} | options
        return script.Args(env_id=f"trouble/{env}{kind}", **options)

    return make


def flags(args, *more) -> list:
    """The options of a command line that gives these `Args`."""
    given = [f"--env-id={args.env_id}", f"--run-dir={args.run_dir}", f"--seed={args.seed}"]
    return [*FLAGS, *given, f"--eval-episodes={args.eval_episodes}", *more]


def parameters(agent) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach()


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b


# Going on


def test_same_seed_same_parameters_to_the_bit(script, troubled, tmp_path):
    agents = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        options = dict(seed=seed, total_timesteps=300, run_dir=str(tmp_path / name))
        agents.append(script.train(troubled("Short", **options)))
    first, again, other = map(parameters, agents)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_goes_on_as_if_it_had_never_stopped(script, troubled, tmp_path, monkeypatch):
    """Where an iteration ends with all episodes, all is the same to the bit, curves too."""
    steps, save, saves = SMALL["num_envs"] * SMALL["num_steps"], torch.save, []
    total = f"--total-timesteps={6 * steps}"
    whole, parts = (
        troubled("Clockwork", run_dir=str(tmp_path / name), seed=3) for name in ("whole", "parts")
    )
    assert main(script, flags(whole, total), monkeypatch) == 0

    def stop_in_the_third(*given):
        saves.append(given)
        if len(saves) == 3:  # its curves are written already
            raise KeyboardInterrupt
        return save(*given)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop_in_the_third)
        assert main(script, flags(parts, total), patch) == 130
    assert read(tmp_path / "parts/checkpoint.pt")["progress"]["step"] == 2 * steps
    assert main(script, ["--run-dir", parts.run_dir], monkeypatch) == 0  # options: the checkpoint's
    ours, expected = (read(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole"))
    for part in ("progress", "agent", "optimizer"):
        assert same(ours[part], expected[part]), part
    ours, expected = curves(parts.run_dir), curves(whole.run_dir)
    ours.pop("charts/SPS"), expected.pop("charts/SPS")
    assert ours == expected and len(ours["charts/episodic_return"]) == 6 * steps // 4
    ends = [step for step, _ in ours["charts/episodic_return"]]
    assert ends == sorted(ends) and ends[0] == 4 * SMALL["num_envs"] and ends[-1] == 6 * steps


def test_train_goes_on_for_every_caller_and_in_other_episodes(script, args):
    """The second part of a run does not play the episodes of the first again."""
    options = args("Seeds", **SMALL, total_timesteps=64)
    seen = []
    for total in (64, 128, 192):
        Seeds.seen.clear()
        options.total_timesteps = total
        script.train(options)
        assert read(f"{options.run_dir}/checkpoint.pt")["progress"]["step"] == total
        seen += Seeds.seen
    assert len({*seen}) == 3 * SMALL["num_envs"] and max(seen) < 2**31


@pytest.mark.parametrize("name", ["ppo_continuous"])
def test_a_killed_run_goes_on(name, tmp_path):
    """kill -9 at random moments: what is left can be read, and the same command ends the run."""
    kills = int(os.environ.get("KILLS", 2))
    start = command(name, *FLAGS, "--env-id=trouble:trouble/ShortContinuous-v0", "--run-dir=run")
    start += ["--total-timesteps=200000", "--eval-episodes=0"]
    path, before, report = tmp_path / "run/checkpoint.pt", 0, []
    for _ in range(kills):
        process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while not path.exists() or read(path)["progress"]["step"] == before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.random())
        process.kill()
        process.wait()
        after = read(path)["progress"]["step"]
        assert after > before
        report.append(after)
        before = after
        if (tmp_path / "run/best.pt").exists():
            assert read(tmp_path / "run/best.pt")["progress"]["step"] <= after + 64
    print("steps at the kills:", report)
    start[start.index("--total-timesteps=200000")] = f"--total-timesteps={before + 100}"
    assert subprocess.run(start, cwd=tmp_path).returncode == 0
    assert read(path)["progress"]["step"] >= before + 100


def test_a_full_disk_is_named_and_harms_no_checkpoint(script, troubled, tmp_path):
    """With a real limit on the size of a file; the one before the failure stays."""
    options = troubled("Short", total_timesteps=64)
    script.train(options)
    path = tmp_path / "run/checkpoint.pt"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options.total_timesteps = 128
    for share in (0.2, 0.5, 0.9, 0.99):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), hard))
            with pytest.raises(OSError, match="File too large"):
                script.train(options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
    script.train(options)
    assert read(path)["progress"]["step"] == 128


def test_target_return_best_and_tags(script, args, tmp_path, monkeypatch, capsys):
    options = args("ActionReward", **SMALL, target_return=0.9, total_timesteps=50_000)
    options.learning_rate = 5e-3
    script.train(options)
    best, last = (read(tmp_path / "run" / f"{name}.pt") for name in ("best", "checkpoint"))
    reached = last["progress"]
    assert reached["step"] < 50_000 and np.mean(reached["returns"]) >= 0.9
    assert last["optimizer"]["param_groups"][0]["eps"] == 1e-5  # detail 3
    assert best["progress"]["best"] == reached["best"] == np.mean(best["progress"]["returns"])
    charts = {
        f"charts/{tag}" for tag in ("episodic_return episodic_length SPS learning_rate").split()
    }
    losses = "value_loss policy_loss entropy old_approx_kl approx_kl clipfrac explained_variance"
    got = curves(tmp_path / "run")
    assert {*got} == charts | {f"losses/{tag}" for tag in losses.split()}
    assert got["charts/episodic_return"][-1][0] <= reached["step"]
    (text,) = EventAccumulator(options.run_dir).Reload().Tensors("hyperparameters/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "target_return: 0.9\n" in shown and f"env_id: {options.env_id}" in shown

    # a target that is reached is not forgotten, and the run says why it ends at once
    capsys.readouterr()
    assert main(script, ["--run-dir", options.run_dir, "--total-timesteps=99999"], monkeypatch) == 0
    line = f"step {reached['step']:,}, best return {reached['best']:.2f}"
    assert capsys.readouterr().out == f"{options.run_dir}: {line}\n"
    assert read(tmp_path / "run/checkpoint.pt")["progress"] == reached


def test_the_best_is_the_best(script, troubled, tmp_path):
    script.train(troubled("Fading", total_timesteps=1000))
    points = curves(tmp_path / "run")["charts/episodic_return"]
    best = read(tmp_path / "run/best.pt")["progress"]
    returns = [value for step, value in points if step <= best["step"]]
    assert 100 <= len(returns) < 100 + SMALL["num_envs"] * SMALL["num_steps"] // 4
    assert best["best"] == pytest.approx(np.mean(returns[-100:]))


def test_the_learning_rate_falls_linearly_or_stays(script, troubled, tmp_path):
    for anneal in (True, False):
        path = tmp_path / str(anneal)
        script.train(troubled("Short", total_timesteps=640, anneal_lr=anneal, run_dir=str(path)))
        rates = curves(path)["charts/learning_rate"]
        steps = [0, *(step for step, _ in rates[:-1])]  # at the start of each iteration
        expected = [script.Args.learning_rate * (1 - step / 640 if anneal else 1) for step in steps]
        assert [rate for _, rate in rates] == pytest.approx(expected)
        assert len(rates) == 10


def test_runs_that_start_together_do_not_hurt_each_other(tmp_path):
    """Of two with one folder one says so; without --run-dir each has a folder of its own."""
    options = [*FLAGS, "--env-id=trouble:trouble/ShortDiscrete-v0", "--total-timesteps=20000"]
    options += ["--eval-episodes=0"]
    more = [], [], ["--run-dir=x", "--seed=1"], ["--run-dir=x", "--seed=2"]
    starts = [command("ppo_discrete", *options, *words) for words in more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(start, cwd=tmp_path, **pipes) for start in starts]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert ends[0] == ends[1] == ("", 0)
    assert sorted(ends[2:]) == [("", 0), ("error: another run writes to x\n", 1)]
    folders = [*(tmp_path / "runs/trouble_trouble").iterdir()]
    assert len(folders) == 2 and ":" not in str(folders)
    for path in (*folders, tmp_path / "x"):
        assert read(path / "checkpoint.pt")["progress"]["step"] == 20032


# Watching


def test_a_saved_policy_plays_the_same_in_another_process_and_program(script, tmp_path):
    """Statistics are in the checkpoint: the returns are the same to the digit."""
    env_id = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}[script.__name__]
    options = [f"--env-id={env_id}", "--total-timesteps=20000", "--run-dir=run"]
    trained = run(script.__name__, *options, "--eval-episodes=5", "--seed=4", cwd=tmp_path)
    assert trained.returncode == 0 and trained.stderr == ""
    line = trained.stdout.splitlines()[-1]
    assert line.startswith("greedy return of 5 episodes: ")
    assert run(script.__name__, "--evaluate=run/checkpoint.pt", cwd=tmp_path).stdout == line + "\n"
    checkpoint = read(tmp_path / "run/checkpoint.pt")
    assert {"mean", "std"} <= {key.split(".")[1] for key in checkpoint["agent"] if "obs_s" in key}

    env = gym.make(env_id)
    agent = script.Agent(env.observation_space, env.action_space, script.Args(**checkpoint["args"]))
    agent.load_state_dict(checkpoint["agent"])
    returns = []
    for episode in range(5):
        obs, _ = env.reset(seed=script.seed_everything(f"evaluation 4 {episode}"))
        done, total = False, 0.0
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            done, total = terminated or truncated, total + reward
        returns.append(total)
    assert f"{np.mean(returns):.2f} +- {np.std(returns):.2f}" == line.split(": ")[1]


def test_episodes_are_shown_and_filmed(script, args, tmp_path, monkeypatch, capsys):
    """By one environment, with a window, a film, or both; training draws nothing."""
    path, shown = tmp_path / "run", []
    window = gym.wrappers.HumanRendering
    monkeypatch.setattr(
        gym.wrappers, "HumanRendering", lambda env: (shown.append(env), window(env))[1]
    )
    options = [*FLAGS, "--env-id", args("Drawn").env_id, "--total-timesteps=100", "--run-dir", path]
    Drawn.modes.clear()
    assert main(script, [*options, "--eval-episodes=2", "--capture-video"], monkeypatch) == 0
    assert sorted(map(str, Drawn.modes)) == ["None"] * 4 + ["rgb_array"]
    assert len([*path.glob("*.mp4")]) == 2 and not shown
    assert not (path / "best.pt").exists()  # of fewer than 100 episodes
    for file in path.glob("*.mp4"):
        file.unlink()
    watch = ["--evaluate", path / "checkpoint.pt", "--render"]
    assert main(script, watch, monkeypatch) == 0
    assert len([*path.glob("*.mp4")]) == 2 and len(shown) == 1
    assert main(script, [*watch, "--no-capture-video"], monkeypatch) == 0
    assert len(shown) == 2
    assert capsys.readouterr().out.count("greedy return of 2 episodes: 3.00 +- 0.00") == 3


def test_evaluation_says_what_it_cuts_and_always_plays(script, troubled, monkeypatch, capsys):
    options = troubled("Endless", total_timesteps=64)  # it has no --eval-episodes
    script.train(options)
    path = f"{options.run_dir}/checkpoint.pt"
    capsys.readouterr()
    assert main(script, ["--evaluate", path], monkeypatch) == 0
    lines = [
        "episode 0 was cut after 10,000 steps",
        "greedy return of 1 episodes: 10000.00 +- 0.00",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_simulator_that_can_be_open_only_once(script, troubled, monkeypatch):
    trouble.Single.is_open = False
    options = troubled("Single", eval_episodes=1)
    more = ["--num-envs=1", "--total-timesteps=30"]
    assert main(script, flags(options, *more), monkeypatch) == 0


# Stopping


def start_and_wait(*options, cwd: Path, for_line: str) -> subprocess.Popen:
    """A run of ppo_continuous.py that has just printed such a line."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = command("ppo_continuous", *FLAGS, "--run-dir=a/run", *options)
    process = subprocess.Popen(words, cwd=cwd, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **pipes)
    while for_line not in process.stdout.readline():
        assert process.poll() is None
    return process


def test_a_signal_ends_the_run_and_says_where_to_go_on(tmp_path):
    """Ctrl-C, in training as in the greedy episodes, and SIGTERM, which says nothing."""
    endless = "--total-timesteps=10000000"
    for number, line, code in ((signal.SIGINT, "a/run", 130), (signal.SIGTERM, "", -15)):
        process = start_and_wait(endless, cwd=tmp_path, for_line="return")
        time.sleep(random.random())
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code and err.count("\n") <= 1 and line in err
        assert (
            "greedy" not in out and read(tmp_path / "a/run/checkpoint.pt")["progress"]["step"] > 0
        )
    step = read(tmp_path / "a/run/checkpoint.pt")["progress"]["step"]
    many = [f"--total-timesteps={step + 64}", "--eval-episodes=100000"]
    process = start_and_wait(*many, cwd=tmp_path, for_line=f"step {step + 64:,}")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.count("\n") == 1 and "greedy" not in out


@pytest.mark.parametrize("at", ["", "AtOnce"])
@pytest.mark.parametrize("error", trouble.ERRORS)
def test_an_error_in_the_environment_is_raised_as_it_is(script, troubled, error, at, monkeypatch):
    expected = trouble.ERRORS[error]
    with pytest.raises(type(expected), match=str(expected)):
        main(script, flags(troubled(error + at)), monkeypatch)


# Mistakes


def test_a_cut_checkpoint_is_refused(script, troubled, monkeypatch):
    options = troubled("Short", total_timesteps=64)
    script.train(options)
    path = Path(options.run_dir, "checkpoint.pt")
    whole = path.read_bytes()
    rng = random.Random(script.__name__)
    for _ in range(20):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        for option in ("--evaluate", "--run-dir"):
            given = path if option == "--evaluate" else options.run_dir
            code = main(script, [option, given], monkeypatch)
            assert code.startswith(f"error: {path}: ") and "\n" not in code
        with pytest.raises(SystemExit, match=re.escape(str(path))):
            script.train(options)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_is_none_of_ours_is_refused(script, troubled, tmp_path, monkeypatch):
    """And runs no code."""
    monkeypatch.chdir(tmp_path)
    options = troubled("Short", total_timesteps=64)
    script.train(options)
    good = read(f"{options.run_dir}/checkpoint.pt")
    args = good["args"]
    wide = {"env_id": options.env_id.replace("Short", "Wide")}
    other = "Continuous" if script.__name__ == "ppo_discrete" else "Discrete"
    others = {"env_id": f"trouble/Short{other}-v0"}
    strangers = [Payload(), {"args": Payload()}, [1, 2], good | {"args": args | {"unknown": 1}}]
    strangers += [good | {"args": args | wide}, good | {"args": args | others}]
    strangers += [good | {"args": args | {"hidden_size": 32}}]
    strangers.append({name: part for name, part in good.items() if name != "agent"})
    for content in strangers:
        torch.save(content, "stranger.pt")
        code = main(script, ["--evaluate", "stranger.pt"], monkeypatch)
        assert code.startswith(("error: stranger.pt: no checkpoint", "error: spaces must be")), code
    assert not Path("executed").exists()


MISTAKES = [
    (["--env-id=Foo-v0"], "Foo"),
    (["--env-id=Pendulum-v0"], "v1"),
    (["--env-id=no_such_module:Env-v0"], "no_such_module"),
    (["--env-id=ALE/Pong-v5"], "ALE"),
    (["--env-id=tests/MultiDiscrete-v0"], "MultiDiscrete"),
    (["--evaluate=nowhere.pt"], "nowhere.pt"),
    (["--evaluate="], "No such file"),
    (["--evaluate=."], "Is a directory"),
    (["--learning-rate=1e30", *FLAGS, "--run-dir=run"], "--learning-rate"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_a_mistake_is_one_clear_line(script, options, message, tmp_path, monkeypatch):
    """`sys.exit` with a text: exit code 1, and no traceback."""
    monkeypatch.chdir(tmp_path)
    code = main(script, options, monkeypatch)
    assert code.startswith("error: ") and message in code
    assert not [*tmp_path.rglob("*.pt")]


def test_the_other_scripts_environment_is_refused(script, monkeypatch):
    env_id = "CartPole-v1" if script.__name__ == "ppo_continuous" else "Pendulum-v1"
    code = main(script, [f"--env-id={env_id}"], monkeypatch)
    assert code.startswith("error: spaces must be ")


def test_options_that_no_checkpoint_can_hold_are_refused_before_training(
    script, troubled, tmp_path
):
    for wrong in ({"num_envs": np.int64(4)}, {"run_dir": tmp_path / "run"}):
        with pytest.raises(TypeError, match="not JSON serializable"):
            script.train(troubled("Short", **wrong))
        assert not [*tmp_path.iterdir()]
    options = troubled("Short", learning_rate=np.float64(1e-3), total_timesteps=64)
    script.train(options)
    assert script.load(f"{options.run_dir}/checkpoint.pt")["args"].learning_rate == 1e-3


def test_what_the_library_reports_and_what_help_says(tmp_path):
    process = run("ppo_continuous", "--gama=0.9", cwd=tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "--gama" in process.stderr and "--help" in process.stderr
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = command("ppo_continuous", "--help")
    process = subprocess.run(words, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert process.returncode == 0 and "discount factor" in process.stdout


def test_importing_does_nothing(tmp_path):
    code = (
        "import json, sys, ppo_discrete, ppo_continuous; json.dump(sorted(sys.modules), sys.stdout)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True
    )
    assert "Box2D" not in json.loads(process.stdout) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_and_requirements_say_the_same(name):
    """PEP 723: what `uv run` installs."""
    source = (ROOT / f"{name}.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source)[1]
    listed = re.search(r"dependencies *= *(\[.*\])", block.replace("\n#", ""))[1]
    assert json.loads(listed) == (ROOT / "requirements.txt").read_text().split()
    assert 'requires-python = ">=3.10,<3.14"' in block
