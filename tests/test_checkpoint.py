"""Runs that survive: checkpoints, resuming, signals; and policies that can be watched."""

import copy
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, children, command, curves, main, run
from envs import Counting, Drawn
from tensorboard.summary.writer.record_writer import RecordWriter

SMALL = dict(num_envs=4, num_steps=32, num_minibatches=2, update_epochs=2, hidden_size=8)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def to_the_bit(a, b) -> bool:
    """Whether two nests of tensors and plain values are the same."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(to_the_bit(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(to_the_bit, a, b))
    return type(a) is type(b) and a == b


def stop_after(script, iterations: int, monkeypatch) -> list[int]:
    """The signals for `train`: one comes in the iteration with this number."""
    signals, collect = [], script.collect
    calls = []

    def watch(*given):
        calls.append(None)
        if len(calls) == iterations:
            signals.append(signal.SIGTERM)
        return collect(*given)

    monkeypatch.setattr(script, "collect", watch)
    return signals


def stopped_run(script, args, monkeypatch, iterations: int = 2):
    """Options and checkpoint of a run that was stopped after some iterations."""
    with monkeypatch.context() as patch:
        result = script.train(args, stop_after(script, iterations, patch))
    assert result["eval_returns"] == []
    return script.load(os.path.join(args.run_dir, "checkpoint.pt"))


def next_second() -> None:
    """TensorBoard sorts the files of a folder by the second in their names."""
    time.sleep(1.01 - time.time() % 1)


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["MatchReward", "ObservedReward", "Endless"])
def test_resumed_run_is_an_uninterrupted_one_whose_environments_restart(
    script, args, env, tmp_path, monkeypatch
):
    options = args(env, total_timesteps=700, checkpoint_interval=1e9, **SMALL)
    stopped_run(script, options, monkeypatch, iterations=3)
    next_second()
    torch.manual_seed(12345)  # what goes on in between must not matter
    np.random.seed(12345)
    resumed = script.train(replace(options, run_dir=None, resume=options.run_dir))

    collect, iterations = script.collect, []

    def restart_at_3(envs, agent, state, *given):
        if len(iterations) == 3:
            obs, _ = envs.reset(seed=script.derive_seed(options.seed, script.ITERATION, 3))
            zeros = np.zeros(options.num_envs, np.float32)
            state = (script.flat(obs), zeros.astype(bool), zeros)
        iterations.append(None)
        return collect(envs, agent, state, *given)

    monkeypatch.setattr(script, "collect", restart_at_3)
    whole = script.train(replace(options, run_dir=str(tmp_path / "whole")))
    assert to_the_bit(resumed["agent"].state_dict(), whole["agent"].state_dict())
    assert resumed["global_step"] == whole["global_step"] and len(iterations) > 4
    a, b = (script.load(tmp_path / name / "checkpoint.pt") for name in ("run", "whole"))
    for checkpoint in (a, b):
        assert checkpoint["progress"].pop("seconds") > 0
    assert to_the_bit(a, b)

    scalars = [curves(tmp_path / name) for name in ("run", "whole")]
    for curve in scalars:
        del curve["charts/SPS"]
    assert scalars[0] == scalars[1]


def test_options_given_again_override_the_saved_ones(script, args, tmp_path, monkeypatch):
    saved = args("MatchReward", total_timesteps=1000, learning_rate=2e-3, seed=5, **SMALL)
    checkpoint = stopped_run(script, saved, monkeypatch)
    done = checkpoint["progress"]["global_step"]
    monkeypatch.chdir(tmp_path)
    next_second()
    assert main(script, ["--resume", "run", "--total-timesteps", 2000], monkeypatch) == 0
    options = script.load("run/checkpoint.pt")["args"]
    expected = saved.__dict__ | {"total_timesteps": 2000}
    assert options == {k: v for k, v in expected.items() if k not in script.HOW_TO_RUN}

    scalars = curves("run")
    ends, rates = zip(*scalars["charts/learning_rate"], strict=True)
    starts, totals = [0, *ends[:-1]], [1000 if end <= done else 2000 for end in ends]
    expected = [2e-3 * (1 - s / total) for s, total in zip(starts, totals, strict=True)]
    assert rates == pytest.approx(expected, rel=1e-6) and len(set(totals)) == 2
    for tag, curve in scalars.items():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), tag


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", ""])
def test_resume_takes_a_folder_or_a_file(script, args, name, tmp_path, monkeypatch):
    stopped_run(script, args("ConstantReward", **SMALL), monkeypatch, iterations=4)
    monkeypatch.chdir(tmp_path / "run")
    path = os.path.join(".", name) if name == "" else name
    assert main(script, ["--resume", path, "--total-timesteps", 600], monkeypatch) == 0
    assert script.load("checkpoint.pt")["progress"]["global_step"] >= 600
    assert sorted({f.split(".")[0] for f in os.listdir(".")}) == ["best", "checkpoint", "events"]


def test_how_to_run_is_never_taken_from_a_checkpoint(script, args, tmp_path, monkeypatch):
    options = args("MatchReward", **SMALL)
    checkpoint = stopped_run(script, options, monkeypatch)
    assert not checkpoint["args"].keys() & script.HOW_TO_RUN
    checkpoint["args"] |= dict(
        resume="elsewhere", auto_resume=True, evaluate="that", render=True, run_dir="there"
    )
    checkpoint["args"]["option_of_another_version"] = 1
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    resume = str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["ppo", "--resume", resume])
    assert script.parse_args() == replace(options, resume=resume, run_dir=None)


def test_auto_resume_starts_and_goes_on_with_one_command(script, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*FLAGS, f"--env-id=tests/MatchReward{kind}", "--run-dir=run", "--auto-resume"]

    def progress(total: int) -> dict:
        next_second()
        assert main(script, [*options, f"--total-timesteps={total}"], monkeypatch) == 0
        return script.load("run/checkpoint.pt")["progress"]

    first, second = progress(300), progress(700)
    assert 300 <= first["global_step"] < second["global_step"]
    assert second["global_step"] - 700 < 128 and second["iteration"] > first["iteration"]
    # a run that is finished: nothing is trained, no point is written twice
    before = curves("run")
    assert progress(700) == second and curves("run") == before
    # one that was killed before its first checkpoint starts anew
    os.remove("run/checkpoint.pt")
    assert progress(300)["iteration"] == first["iteration"]
    for tag, curve in curves("run").items():
        assert [step for step, _ in curve] == sorted({step for step, _ in curve}), tag


def test_checkpoint_holds_tensors_and_plain_values_only(script, args, monkeypatch):
    options = args("MatchReward", learning_rate=np.float64(1e-3), **SMALL)
    checkpoint = stopped_run(script, options, monkeypatch, iterations=5)

    def visit(value):
        if isinstance(value, dict):
            assert type(value) is dict
            for key, part in value.items():
                assert type(key) in (str, int)
                visit(part)
        elif type(value) is list:
            for part in value:
                visit(part)
        else:
            assert type(value) in (torch.Tensor, str, int, float, bool, type(None)), value

    visit(checkpoint)
    assert checkpoint["versions"]["torch"] == str(torch.__version__)
    assert len(checkpoint["progress"]["window"]) == 100
    assert checkpoint["agent"]["obs_stats.count"] > 0


def test_best_is_of_the_iteration_with_the_best_mean_return(script, args, tmp_path, monkeypatch):
    show, seen = script.show, []

    def watch(progress, *given):
        agent = script.collect.agent
        seen.append((progress.mean_return, progress.iteration, copy.deepcopy(agent.state_dict())))
        return show(progress, *given)

    collect = script.collect

    def remember(envs, agent, *given):
        script.collect.agent = agent
        return collect(envs, agent, *given)

    monkeypatch.setattr(script, "show", watch)
    monkeypatch.setattr(script, "collect", remember)
    script.train(args("ObservedReward", total_timesteps=1500, **SMALL))
    assert math.isnan(seen[0][0])  # 64 episodes are not yet 100
    best_return, iteration, state = max(seen[1:], key=lambda s: s[0])
    assert best_return > seen[-1][0]  # else the last one would do
    best = script.load(tmp_path / "run" / "best.pt")
    assert best["progress"]["iteration"] == iteration
    assert best["progress"]["best_return"] == best_return
    assert to_the_bit(best["agent"], dict(state))
    last = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert last["best_return"] == best_return and last["iteration"] == len(seen)


@pytest.mark.parametrize(("interval", "saves"), [(0, 8), (1e9, 2)])
def test_checkpoint_interval(script, args, interval, saves, monkeypatch):
    """The first iteration and the last are always saved."""
    save, paths = script.save, []
    monkeypatch.setattr(script, "save", lambda path, *rest: (paths.append(path), save(path, *rest)))
    options = args("Endless", total_timesteps=840, checkpoint_interval=interval, **SMALL)
    script.train(options)
    assert len([path for path in paths if path.endswith("checkpoint.pt")]) == saves


def test_curves_reach_as_far_as_their_checkpoint(script, args, monkeypatch):
    """Whenever a checkpoint appears, whatever is behind in TensorBoard's queue is on disk."""
    write, replace_file, steps = RecordWriter.write, os.replace, []

    def write_slowly(*given):
        time.sleep(0.002)
        write(*given)

    def watch(source, target):
        if target.endswith("checkpoint.pt"):
            step, _ = curves(os.path.dirname(target))["losses/value_loss"][-1]
            steps.append((step, script.load(source)["progress"]["global_step"]))
        replace_file(source, target)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)
    monkeypatch.setattr(os, "replace", watch)
    script.train(args("Endless", total_timesteps=400, checkpoint_interval=0, **SMALL))
    assert len(steps) == 4 and all(curve == checkpoint for curve, checkpoint in steps)


def test_target_return_ends_training(script, args, monkeypatch, capsys):
    options = args("ConstantReward", total_timesteps=2000, target_return=1.0, **SMALL)
    result = script.train(options)
    # a window of 100 episodes, of one step each
    assert 100 <= result["solved_at"] == result["global_step"] < 100 + 128
    assert re.search(r"solved at step 1\d\d after \d+ s\n", capsys.readouterr().out)
    # solved stays solved
    again = script.train(replace(options, run_dir=None, resume=options.run_dir))
    assert again["global_step"] == result["global_step"]


def test_a_target_that_is_not_reached(script, args, capsys):
    options = args("ConstantReward", total_timesteps=500, target_return=1.01, **SMALL)
    result = script.train(options)
    assert result["solved_at"] is None and result["global_step"] >= 500
    assert "solved" not in capsys.readouterr().out


# Watching -----------------------------------------------------------------------------------------


def returns_of(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^episode \d+: (\S+)$", output, re.M)]


@pytest.mark.parametrize(
    ("name", "env_id", "total_timesteps"),
    [
        ("ppo_continuous", "Pendulum-v1", 100_000),
        ("ppo_continuous", "LunarLanderContinuous-v3", 100_000),
        ("ppo_discrete", "CartPole-v1", 30_000),
    ],
)
def test_evaluation_in_another_process_gives_the_same_returns(
    name, env_id, total_timesteps, tmp_path
):
    script = __import__(name)
    options = script.Args(env_id=env_id, total_timesteps=total_timesteps, run_dir=f"{tmp_path}/run")
    trained = script.train(options)["eval_returns"]
    process = run(name, "--evaluate", "run", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert returns_of(process.stdout) == [round(value, 2) for value in trained]
    mean, std = np.mean(trained), np.std(trained)
    assert f"greedy return over 10 episodes: {mean:.1f} ± {std:.1f}\n" in process.stdout

    # what evaluating without the statistics of the observations would look like
    checkpoint = script.load(tmp_path / "run" / "checkpoint.pt")
    if env_id == "CartPole-v1":  # too easy to tell
        return
    checkpoint["agent"]["obs_stats.mean"].zero_()
    checkpoint["agent"]["obs_stats.var"].fill_(1)
    torch.save(checkpoint, tmp_path / "forgetful.pt")
    forgetful = run(name, "--evaluate", "forgetful.pt", cwd=tmp_path)
    assert np.mean(returns_of(forgetful.stdout)) < mean - 0.2 * abs(mean)


def test_evaluation_trains_and_writes_nothing(script, args, tmp_path, monkeypatch, capsys):
    stopped_run(script, args("ObservedReward", **SMALL), monkeypatch)
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(script, ["--evaluate", "run", "--eval-episodes", "3"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert len(returns_of(out)) == 3 and err == ""
    assert main(script, ["--evaluate", "run"], monkeypatch) == 0  # was trained with 0 of them
    assert len(returns_of(capsys.readouterr().out)) == 10
    assert re.fullmatch(r"(episode .*\n){3}greedy return over 3 episodes: .* ± .*\n", out)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_render_shows_the_greedy_episodes_only(script, args, tmp_path, monkeypatch):
    """Also of a run that was filmed; that it was is not taken from its checkpoint."""
    Drawn.modes.clear()
    stopped_run(script, args("Drawn", capture_video=True, eval_episodes=1, **SMALL), monkeypatch)
    assert "rgb_array" in Drawn.modes and "human" not in Drawn.modes
    assert not (tmp_path / "run" / "videos").exists()  # it was stopped before the evaluation
    Drawn.modes.clear()
    assert main(script, ["--evaluate", tmp_path / "run", "--render"], monkeypatch) == 0
    assert Drawn.modes[-1] == "human" and "rgb_array" not in Drawn.modes
    assert len(Drawn.modes) < SMALL["num_envs"] * 2  # nor are the environments of training made

    Drawn.modes.clear()
    options = args("Drawn", render=True, total_timesteps=200, eval_episodes=1, **SMALL)
    script.train(replace(options, run_dir=str(tmp_path / "shown")))
    assert Drawn.modes.count(None) >= SMALL["num_envs"]  # nothing is drawn while training
    assert Drawn.modes[-1] == "human"


def test_capture_video(script, args, tmp_path, monkeypatch, recwarn):
    """An episode every 25 iterations, and those of the evaluation at the end."""
    options = args(
        "Drawn",
        total_timesteps=2600,
        eval_episodes=3,
        capture_video=True,
        **SMALL | {"num_envs": 4},
    )
    result = script.train(options)
    videos = {
        folder.name: sorted(path.name for path in folder.glob("*.mp4"))
        for folder in (tmp_path / "run" / "videos").iterdir()
    }
    steps = [step for step, _ in curves(tmp_path / "run")["charts/learning_rate"]]
    assert len(steps) > 26
    assert videos == {
        f"step-{steps[24]}": ["rl-video-episode-0.mp4"],
        f"step-{result['global_step']}": [f"rl-video-episode-{i}.mp4" for i in range(3)],
    }
    assert not [str(w.message) for w in recwarn if "video" in str(w.message).lower()]
    without = script.train(replace(options, capture_video=False, run_dir=str(tmp_path / "without")))
    assert to_the_bit(dict(result["agent"].state_dict()), dict(without["agent"].state_dict()))


def test_video_without_its_package_is_refused_before_training(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert main(script, ["--capture-video"], monkeypatch) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "--capture-video" in err and "pip install moviepy" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--capture-video", "--render"])
@pytest.mark.parametrize("metadata", [{}, {"render_modes": []}, {"render_modes": ["ansi"]}])
def test_what_cannot_be_drawn_is_refused_before_training(
    script, kind, option, metadata, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Counting, "metadata", metadata)
    assert main(script, [f"--env-id=tests/Counting{kind}", option], monkeypatch) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "cannot be shown or filmed, its render modes are" in err
    assert list(tmp_path.iterdir()) == []


# Bad input ----------------------------------------------------------------------------------------


def write_not_ours(path, script):
    torch.save({"weights": torch.zeros(3)}, path)


def write_a_list(path, script):
    torch.save([1, 2, 3], path)


def write_with_other_progress(path, script):
    torch.save(script.load(path) | {"progress": {"steps": 3}}, path)


def write_with_other_networks(path, script):
    torch.save(script.load(path) | {"agent": {"actor.weight": torch.zeros(3)}}, path)


def write_text(path, script):
    path.write_text("epoch,loss\n1,0.5\n")


def write_nothing(path, script):
    path.write_text("")


def write_half(path, script):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_with_a_flipped_bit(path, script):
    """In the data of a tensor, where `torch.load` does not notice."""
    data = bytearray(path.read_bytes())
    weights = script.load(path)["agent"]["critic.0.weight"].numpy().tobytes()
    data[data.index(weights) + 5] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "spoil",
    [
        write_not_ours,
        write_a_list,
        write_with_other_progress,
        write_with_other_networks,
        write_text,
        write_nothing,
        write_half,
        write_with_a_flipped_bit,
    ],
)
def test_a_file_that_is_no_good_checkpoint(
    script, args, option, spoil, tmp_path, monkeypatch, capsys
):
    stopped_run(script, args("MatchReward", **SMALL), monkeypatch)
    path = tmp_path / "run" / "checkpoint.pt"
    spoil(path, script)
    data = path.read_bytes()
    capsys.readouterr()
    for given in (path, tmp_path / "run"):
        assert main(script, [option, given], monkeypatch) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        if "other" in spoil.__name__:
            assert "another version" in err
        else:
            assert option in err and str(path) in err and "damaged" in err
    options = ["--run-dir", tmp_path / "run", "--auto-resume"]
    assert main(script, options, monkeypatch) == 2  # rather than start anew over it
    assert path.read_bytes() == data


OTHER = {"ppo_discrete": "ppo_continuous", "ppo_continuous": "ppo_discrete"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--resume nowhere", ["--resume", "nowhere"]),
        ("--evaluate nowhere", ["--evaluate", "nowhere"]),
        ("--resume {tmp}/empty", ["--resume", "empty/checkpoint.pt"]),
        ("--evaluate {tmp}/empty", ["--evaluate", "empty/checkpoint.pt"]),
        ("--resume {tmp}/run --hidden-size 16", ["--hidden-size 8", "--hidden-size 16"]),
        ("--evaluate {tmp}/run --hidden-size 16", ["--hidden-size 8", "--hidden-size 16"]),
        ("--resume {tmp}/run --env-id {env}", ["--env-id {env}", "Box"]),
        ("--evaluate {tmp}/run --env-id {env}", ["--env-id {env}", "Box"]),
        ("--resume {tmp}/run --total-timesteps 330", ["--total-timesteps 330", "more than the 4"]),
        ("--resume {tmp}/run --run-dir {tmp}/new", ["--run-dir {tmp}/new", "leave"]),
        ("--resume {tmp}/run --activation relu", ["--activation tanh", "--activation relu"]),
        ("--run-dir {tmp}/run", ["--run-dir", "new or empty", "--resume"]),
        ("--auto-resume", ["--auto-resume", "--run-dir"]),
        ("--checkpoint-interval -1", ["--checkpoint-interval -1", "0 or more"]),
        ("--checkpoint-interval nan", ["--checkpoint-interval nan", "0 or more"]),
        ("--target-return nan", ["--target-return nan", "a number"]),
        ("--resume {tmp}/run --learning-rate 0", ["--learning-rate 0"]),
    ],
)
def test_wrong_usage_of_checkpoints_is_one_line(
    script, args, options, says, tmp_path, monkeypatch, capsys
):
    stopped_run(script, args("Counting", num_envs=4, num_steps=80, hidden_size=8), monkeypatch)
    (tmp_path / "empty").mkdir()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    env = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}[script.__name__]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(script, options.format(tmp=tmp_path, env=env).split(), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    for part in says:
        assert part.format(env=env, tmp=tmp_path) in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_a_checkpoint_of_the_other_script(script, args, option, tmp_path, monkeypatch, capsys):
    other = __import__(OTHER[script.__name__])
    kind = {"ppo_discrete": "Continuous", "ppo_continuous": "Discrete"}[script.__name__]
    options = other.Args(env_id=f"tests/Counting{kind}-v0", run_dir=f"{tmp_path}/run", **SMALL)
    stopped_run(other, options, monkeypatch)
    capsys.readouterr()
    assert main(script, [option, tmp_path / "run"], monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{other.__name__}.py" in err


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_from_a_stranger_runs_no_code(script, args, tmp_path, monkeypatch, capsys):
    checkpoint = stopped_run(script, args("MatchReward", **SMALL), monkeypatch)
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint | {"versions": Evil()}, "evil.pt")
    torch.load("evil.pt", weights_only=False)
    os.rmdir("pwned")  # the file does bite who trusts it
    for option in ("--resume", "--evaluate"):
        assert main(script, [option, "evil.pt"], monkeypatch) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not os.path.exists("pwned")


def test_fuzzed_checkpoints_are_refused_or_load_correctly(
    script, args, tmp_path, monkeypatch, recwarn
):
    checkpoint = stopped_run(script, args("MatchReward", **SMALL), monkeypatch)
    data = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    rng, path, loaded = random.Random(0), tmp_path / "fuzzed.pt", 0
    cuts = [data[:size] for size in range(0, len(data), len(data) // 100)]
    # anywhere, and all over the directory at the end: there a bit says that the data of an entry
    # are to be left out, after which torch.load returns whatever was in memory
    with zipfile.ZipFile(tmp_path / "run" / "checkpoint.pt") as archive:
        directory = archive.start_dir
    bits = [rng.randrange(8 * len(data)) for _ in range(200)]
    bits += range(8 * directory, 8 * len(data), 13)
    flips = [bytearray(data) for _ in bits]
    for flipped, bit in zip(flips, bits, strict=True):
        flipped[bit // 8] ^= 1 << bit % 8
    for fuzzed in cuts + flips:
        path.write_bytes(fuzzed)
        try:
            result = script.load(path)
        except script.UsageError:
            continue
        loaded += 1
        assert to_the_bit(result, checkpoint)
    assert 0 < loaded < len(flips) / 2 and not recwarn.list  # in padding a flip does no harm


# Failures -----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_checkpoint_intact(script, args, tmp_path, monkeypatch):
    """A limit on the size of files gives the errors of a full disk."""
    options = args("Endless", **SMALL | {"hidden_size": 64})
    options.env_id = f"envs:{options.env_id}"
    stopped_run(script, options, monkeypatch)
    path = tmp_path / "run" / "checkpoint.pt"
    data = path.read_bytes()
    process = subprocess.run(
        command(script.__name__, "--resume", "run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2,) * 2),
    )
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "checkpoint.pt cannot be written" in process.stderr
    assert "File too large" in process.stderr
    assert path.read_bytes() == data


def test_a_full_disk_for_the_curves_is_one_line(script, tmp_path):
    process = subprocess.run(
        command(script.__name__, *FLAGS, "--checkpoint-interval=1e9", "--run-dir=run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000,) * 2),
    )
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "File too large" in process.stderr


def test_nothing_is_saved_after_a_value_that_is_not_finite(script, kind, tmp_path, monkeypatch):
    options = ["--num-envs=4", "--num-steps=4", "--num-minibatches=1", "--checkpoint-interval=0"]
    options += [f"--env-id=tests/nanReward{kind}", f"--run-dir={tmp_path}/run"]
    assert main(script, options, monkeypatch) == 1
    checkpoint = script.load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["progress"]["iteration"] == 2  # the value comes in the third, at step 11
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())


def test_nothing_is_saved_after_a_loss_that_is_not_finite(script, tmp_path, monkeypatch):
    """The statistics are broken by hand, so that the loss of the third iteration is NaN."""
    update, calls = script.update, []

    def spoil(agent, *given):
        calls.append(None)
        losses = update(agent, *given)
        return losses | {"value_loss": math.nan} if len(calls) == 3 else losses

    monkeypatch.setattr(script, "update", spoil)
    options = [*FLAGS, "--checkpoint-interval=0", f"--run-dir={tmp_path}/run"]
    assert main(script, options, monkeypatch) == 1
    assert script.load(tmp_path / "run" / "checkpoint.pt")["progress"]["iteration"] == 2


# Signals ------------------------------------------------------------------------------------------


def start(script: str, *options: str, cwd, given: list[str] | None = None) -> subprocess.Popen:
    """A run in a process group of its own, after its first checkpoint."""
    options = ["--run-dir", "run", *options]
    process = subprocess.Popen(
        [*given, *options] if given else command(script, *options),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (cwd / "run" / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def has_ended(group: int) -> bool:
    """Whether no process of the group is left, after a moment."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


SPAWN = """import multiprocessing, sys
multiprocessing.set_start_method("spawn")
import {script}
{script}.main()"""


def test_what_fails_with_a_signal_is_no_failure_of_the_run(script, monkeypatch, capsys):
    """The terminal's Ctrl-C also reaches the compiler, which then fails."""

    def fail(args, signals):
        signals += [signal.SIGINT] * is_stopped
        raise errors.pop(0)

    monkeypatch.setattr(script, "train", fail)
    errors = [RuntimeError("the compiler was killed"), script.UsageError("no compiler")]
    errors += [OSError("the disk is full"), RuntimeError("a bug")]
    is_stopped = True
    for _ in range(2):
        assert main(script, [], monkeypatch) == 130
        assert capsys.readouterr().err == ""
    assert main(script, [], monkeypatch) == 1  # the last checkpoint could not be written
    assert capsys.readouterr().err == "error: the disk is full\n"
    is_stopped = False
    with pytest.raises(RuntimeError):
        main(script, [], monkeypatch)


@pytest.mark.parametrize("mode", ["sync", "async", "spawned"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_iteration(
    script, mode, number, code, tmp_path, monkeypatch
):
    """A terminal's Ctrl-C goes to the whole group, the workers of async environments included.

    Spawned processes, as on macOS, do not inherit how the main process takes signals.
    """
    options = ["--num-envs=2", "--num-steps=512", "--checkpoint-interval=1e9"]
    options += [] if mode == "sync" else ["--vectorization-mode=async"]
    given = [sys.executable, "-c", SPAWN.format(script=script.__name__)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    process = start(
        script.__name__, *options, cwd=tmp_path, given=given if mode == "spawned" else None
    )
    time.sleep(0.5)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err == ""
    assert has_ended(process.pid)
    resume = re.search(
        r"^stopped at step ([\d,]+); to go on: python (\S+) --resume run$", out, re.M
    )
    progress = script.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert int(resume[1].replace(",", "")) == progress["global_step"] > 1024
    assert (tmp_path / resume[2]).samefile(script.__file__)
    (step, _) = curves(tmp_path / "run")["losses/value_loss"][-1]
    assert step == progress["global_step"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_second_ctrl_c_stops_at_once(script, mode, tmp_path):
    options = ["--num-envs=2", "--num-steps=65536", f"--vectorization-mode={mode}"]
    process = subprocess.Popen(
        command(script.__name__, "--run-dir=run", *options),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("run/events*")):
        time.sleep(0.02)
    time.sleep(0.5)
    for _ in range(2):  # a moment apart: two signals at the same time are one
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    out, err = process.communicate(timeout=10)  # an iteration takes longer
    assert process.returncode == 130 and err == "" and "stopped" not in out
    assert has_ended(process.pid)


def test_a_signal_ends_the_evaluation_after_training(script, args, monkeypatch):
    """The checkpoint is there already; how long the episodes take does not matter."""
    signals, act = [], script.Agent.act

    def watch(agent, obs, noise=script.GREEDY):
        if noise is script.GREEDY:
            signals.append(signal.SIGTERM)
            assert len(signals) < 3
        return act(agent, obs, noise)

    monkeypatch.setattr(script.Agent, "act", watch)
    result = script.train(args("Endless", total_timesteps=200, eval_episodes=9, **SMALL), signals)
    assert result["global_step"] >= 200 and result["eval_returns"] == []


def test_a_signal_in_the_last_iteration_is_answered(script, args, monkeypatch, capsys):
    signals, show = [], script.show

    def show_and_stop(run, args, is_due, is_done):
        show(run, args, is_due, is_done)
        signals.extend([signal.SIGTERM] * is_done)

    monkeypatch.setattr(script, "show", show_and_stop)
    options = args("MatchReward", total_timesteps=300, eval_episodes=2, **SMALL)
    result = script.train(options, signals)
    assert result["signals"] == [signal.SIGTERM] and result["eval_returns"] == []
    assert "to go on: python " in capsys.readouterr().out


def test_a_run_ends_when_a_worker_died(script, tmp_path):
    """With exit code 1, rather than waiting for the worker."""
    options = [
        "--num-envs=3",
        "--num-steps=64",
        "--num-minibatches=2",
        "--vectorization-mode=async",
    ]
    for _ in range(3):  # in the middle of a step or of an update
        process = start(script.__name__, *options, cwd=tmp_path)
        time.sleep(0.2)
        (worker, *_) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == 1 and has_ended(process.pid)
        shutil.rmtree(tmp_path / "run")


def test_evaluation_ends_at_once(script, args, tmp_path, monkeypatch):
    options = args("Endless", **SMALL)
    options.env_id = f"envs:{options.env_id}"
    stopped_run(script, options, monkeypatch)
    options = ["--evaluate", "run", "--eval-episodes=1000000"]
    process = subprocess.Popen(
        command(script.__name__, *options), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "episode 1: 5.00\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_better_policy_of_a_lost_iteration_is_kept(script, args, tmp_path, monkeypatch):
    """`best.pt` may be ahead of the checkpoint that a killed run goes on from."""
    options = args("ObservedReward", **SMALL)
    stopped_run(script, options, monkeypatch, iterations=4)
    best = script.load(tmp_path / "run" / "best.pt")
    best["progress"]["best_return"] = 0.9  # beyond what there is to reach
    torch.save(best, tmp_path / "run" / "best.pt")
    data = (tmp_path / "run" / "best.pt").read_bytes()
    resume = replace(options, run_dir=None, resume=options.run_dir, total_timesteps=700)
    script.train(resume)
    assert (tmp_path / "run" / "best.pt").read_bytes() == data
    assert script.load(tmp_path / "run" / "checkpoint.pt")["progress"]["best_return"] == 0.9


def test_evaluation_that_was_killed_is_made_up_for(script, args, tmp_path, monkeypatch):
    options = args("ObservedReward", eval_episodes=2, total_timesteps=200, **SMALL)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script, "evaluate", lambda *_: 1 / 0)
        script.train(options)
    resume = replace(options, run_dir=None, resume=options.run_dir)
    for _ in range(2):
        next_second()
        result = script.train(resume)
    expected = [(result["global_step"], pytest.approx(np.mean(result["eval_returns"])))]
    assert curves(tmp_path / "run")["eval/episodic_return"] == expected


def test_a_module_beside_a_checkpoint_is_not_imported(script, args, tmp_path, monkeypatch, capsys):
    """Gymnasium imports what stands before the colon of an id, which comes from the checkpoint."""
    checkpoint = stopped_run(script, args("Counting", **SMALL), monkeypatch)
    helper = f"run.{script.__name__}_helper"
    (tmp_path / f"{helper.replace('.', '/')}.py").write_text("import os; os.mkdir('pwned')")
    monkeypatch.delitem(sys.modules, "run", raising=False)
    env_id = f"{helper}:{checkpoint['args']['env_id']}"
    checkpoint["args"]["env_id"] = env_id
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for option in ("--resume", "--evaluate"):
        assert main(script, [option, "run"], monkeypatch) == 2
        assert f"--env-id {env_id} again if you trust" in capsys.readouterr().err
    assert not os.path.exists("pwned")
    trusted = ["--evaluate", "run", "--env-id", env_id, "--eval-episodes", "1"]
    assert main(script, trusted, monkeypatch) == 0 and os.path.exists("pwned")


def test_soak(script, tmp_path):
    """kill -9 at random moments; each restart goes on from a checkpoint that can be read."""
    rng = random.Random(script.__name__)
    options = [*FLAGS, "--checkpoint-interval=0", "--auto-resume", "--total-timesteps=60000"]
    path, step = tmp_path / "run" / "checkpoint.pt", 0
    for _ in range(5):
        process = start(script.__name__, *options, cwd=tmp_path)
        time.sleep(1.5 + rng.random() * 0.5 if step else rng.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert script.load(path)["progress"]["global_step"] >= step
        step = script.load(path)["progress"]["global_step"]
    process = run(script.__name__, "--run-dir", "run", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert script.load(path)["progress"]["global_step"] >= 60_000
    scalars = curves(tmp_path / "run")
    for tag, curve in scalars.items():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), tag
    iterations = script.load(path)["progress"]["iteration"]
    assert len(scalars["losses/value_loss"]) == iterations  # none is missing


def test_saving_is_atomic(script, args, tmp_path, monkeypatch):
    """The file at the path is never opened for writing, and flushed to disk before it is there."""
    checkpoint = stopped_run(script, args("MatchReward", **SMALL), monkeypatch)
    events, path = [], str(tmp_path / "run" / "checkpoint.pt")
    replace_file, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))

    def watch(source, target):
        events.append((source, target))
        assert zipfile.is_zipfile(source)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", watch)
    options = args("MatchReward", **SMALL)
    envs = script.make_envs(options)
    agent, optimizer, progress = script.begin(envs, options, checkpoint)
    envs.close()
    script.save(path, options, agent, optimizer, progress)
    assert events == ["fsync", (f"{path}.tmp", path)]
    assert to_the_bit(script.load(path), checkpoint)
    assert torch.load(io.BytesIO(open(path, "rb").read()), weights_only=True).keys()
