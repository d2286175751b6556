"""Runs as a user meets them: they go on, stop, can be watched, and say what is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, curves, main, run
from envs import Drawn

SMALL = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def parameters(result) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(result["agent"].parameters()).detach()


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b


# Going on


def test_same_seed_same_parameters_to_the_bit(script, args, tmp_path):
    results = [
        script.train(args("Counting", **SMALL, seed=seed, total_timesteps=300, run_dir=str(path)))
        for seed, path in ((1, tmp_path / "a"), (1, tmp_path / "b"), (2, tmp_path / "c"))
    ]
    first, again, other = map(parameters, results)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert same(read(tmp_path / "a/best.pt")["run"], read(tmp_path / "b/best.pt")["run"])


def test_a_run_goes_on_as_if_its_environments_had_been_reset(script, args, tmp_path, monkeypatch):
    """Parameters, optimizer, statistics, counters and curves: all as without the interruption."""
    options = [*FLAGS, "--env-id", args("Endless").env_id, "--eval-episodes=0", "--seed=3"]
    steps, collect, update, signals = [], script.collect, script.update, []

    def reset_after_two(envs, agent, seed, args):
        for i in range(2):
            key = args.seed, 1, steps[-1] if steps else 0, 0
            rollouts = collect(envs, agent, script.derive_seed(*key), args)
            for _ in range(2 if i == 0 else 10**6):
                rollout = next(rollouts)
                steps.append((steps[-1] if steps else 0) + rollout[1])
                yield rollout

    with monkeypatch.context() as patch:
        patch.setattr(script, "collect", reset_after_two)
        whole = tmp_path / "whole"
        assert main(script, [*options, "--run-dir", whole, "--total-timesteps=400"], patch) == 0

    def stop_after_two(*given):
        signals.append(0)
        if len(signals) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", stop_after_two)
        options += ["--total-timesteps=400"]
        assert main(script, [*options, "--run-dir", parts], patch) == 143
    stopped = read(parts / "checkpoint.pt")
    assert stopped["run"]["global_step"] == steps[1]
    assert main(script, ["--run-dir", parts], monkeypatch) == 0  # all else as in the checkpoint
    ours, expected = (read(path / "checkpoint.pt") for path in (parts, whole))
    for part in ("run", "agent", "optimizer"):
        assert same(ours[part], expected[part]), part
    ours, expected = curves(parts), curves(whole)
    ours.pop("charts/SPS"), expected.pop("charts/SPS")
    assert ours == expected and len(ours["charts/episodic_return"]) > 10
    ends = [step for step, _ in ours["charts/episodic_return"]]
    assert ends == sorted(ends) and steps[1] < ends[-1] <= steps[-1]


@pytest.mark.parametrize("name", ["ppo_continuous"])
def test_a_killed_run_goes_on(name, tmp_path):
    """kill -9 at random moments: what is left can be read, and the same command ends the run."""
    kills = int(os.environ.get("KILLS", 2))
    start = command(name, *FLAGS, "--env-id=envs:tests/CountingContinuous-v0", "--run-dir=run")
    start += ["--total-timesteps=200000", "--eval-episodes=0"]
    path, before, report = tmp_path / "run/checkpoint.pt", 0, []
    for _ in range(kills):
        process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while not path.exists() or read(path)["run"]["global_step"] == before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.random())
        process.kill()
        process.wait()
        after = read(path)["run"]["global_step"]
        assert after > before
        report.append(after)
        before = after
        if (tmp_path / "run/best.pt").exists():
            assert read(tmp_path / "run/best.pt")["run"]["global_step"] <= after + 64
    print("steps at the kills:", report)
    start[start.index("--total-timesteps=200000")] = f"--total-timesteps={before + 100}"
    assert subprocess.run(start, cwd=tmp_path).returncode == 0
    assert read(path)["run"]["global_step"] >= before + 100


def test_a_checkpoint_is_written_whole_or_not_at_all(script, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    script.save(path, run=1)

    def fail(checkpoint, file):
        file.write(b"half of ")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        script.save(path, run=2)
    assert read(path) == {"run": 1}


def test_target_return_best_and_tags(script, args, tmp_path):
    options = args("ActionReward", **SMALL, target_return=0.9, total_timesteps=50_000)
    options.learning_rate = 5e-3
    result = script.train(options)
    assert result["global_step"] < 50_000 and np.mean(result["returns"]) >= 0.9
    best, last = (read(tmp_path / "run" / f"{name}.pt") for name in ("best", "checkpoint"))
    assert last["optimizer"]["param_groups"][0]["eps"] == 1e-5  # detail 3
    assert last["run"]["best"] == best["run"]["best"] >= 0.9
    assert np.mean(best["run"]["returns"]) == pytest.approx(best["run"]["best"])
    charts = {
        f"charts/{tag}" for tag in ("episodic_return episodic_length SPS learning_rate").split()
    }
    losses = "value_loss policy_loss entropy old_approx_kl approx_kl clipfrac explained_variance"
    got = curves(tmp_path / "run")
    assert {*got} == charts | {f"losses/{tag}" for tag in losses.split()}
    assert got["charts/episodic_return"][-1][0] <= result["global_step"]


def test_the_learning_rate_falls_linearly_or_stays(script, args, tmp_path):
    for anneal in (True, False):
        path = tmp_path / str(anneal)
        script.train(
            args("Endless", **SMALL, total_timesteps=640, anneal_lr=anneal, run_dir=str(path))
        )
        rates = curves(path)["charts/learning_rate"]
        steps = [0, *(step for step, _ in rates[:-1])]  # at the start of each iteration
        expected = [script.Args.learning_rate * (1 - step / 640 if anneal else 1) for step in steps]
        assert [rate for _, rate in rates] == pytest.approx(expected)
        assert len(rates) > 8


# Watching


def test_a_saved_policy_plays_the_same_in_another_process_and_program(script, args, tmp_path):
    """Statistics are in the checkpoint: the returns are the same to the digit."""
    env_id = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}[script.__name__]
    options = [
        f"--env-id={env_id}",
        "--total-timesteps=20000",
        "--run-dir=run",
        "--eval-episodes=5",
    ]
    trained = run(script.__name__, *options, "--seed=4", cwd=tmp_path)
    assert trained.returncode == 0 and trained.stderr == ""
    line = trained.stdout.splitlines()[-1]
    assert line.startswith("greedy return of 5 episodes: ")
    assert run(script.__name__, "--evaluate=run/checkpoint.pt", cwd=tmp_path).stdout == line + "\n"
    checkpoint = read(tmp_path / "run/checkpoint.pt")
    assert {"mean", "std"} <= {key.split(".")[1] for key in checkpoint["agent"] if "obs_s" in key}

    import gymnasium as gym

    env = gym.make(env_id)
    agent = script.Agent(env.observation_space, env.action_space, script.Args(**checkpoint["args"]))
    agent.load_state_dict(checkpoint["agent"])
    returns = []
    for episode in range(5):
        obs, _ = env.reset(seed=script.derive_seed(4, 3, episode))
        done, total = False, 0.0
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            done, total = terminated or truncated, total + reward
        returns.append(total)
    assert f"{np.mean(returns):.2f} ± {np.std(returns):.2f}" == line.split(": ")[1]


def test_episodes_are_shown_or_filmed(script, args, tmp_path, monkeypatch, capsys):
    """The same environment is drawn as was trained in, also where a native one sees otherwise."""
    path = tmp_path / "run"
    options = [*FLAGS, "--env-id", args("Drawn").env_id, "--total-timesteps=100", "--run-dir", path]
    Drawn.modes.clear()
    assert main(script, [*options, "--eval-episodes=2", "--capture-video"], monkeypatch) == 0
    assert sorted(map(str, Drawn.modes)) == ["None"] * 4 + ["rgb_array"]
    assert len([*path.glob("*.mp4")]) == 2
    assert not (path / "best.pt").exists()  # of fewer than 100 episodes
    Drawn.modes.clear()
    watch = ["--evaluate", path / "checkpoint.pt", "--no-capture-video", "--render"]
    assert main(script, watch, monkeypatch) == 0
    assert Drawn.modes == ["human"]
    assert capsys.readouterr().out.count("greedy return of 2 episodes: 3.00 ± 0.00") == 2


# Stopping


def is_running(group: int) -> bool:
    """Whether a process of the group is left; one that has ended counts as gone."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
    return any(
        int(pgid) == group and "Z" not in stat
        for pgid, stat in (line.split() for line in listed.splitlines())
    )


@pytest.mark.parametrize(
    ("number", "mode", "to_all"),
    [
        (signal.SIGINT, "async", True),
        (signal.SIGTERM, "async", True),
        (signal.SIGTERM, "sync", True),
    ],
)
def test_a_signal_saves_and_ends_the_run(number, mode, to_all, tmp_path):
    """Ctrl-C reaches the workers of async environments too."""
    options = [
        *FLAGS,
        f"--vectorization-mode={mode}",
        "--run-dir=run",
        "--total-timesteps=10000000",
    ]
    process = subprocess.Popen(
        command("ppo_continuous", *options),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline()
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and err == ""
    assert "greedy" not in out
    step = int(out.splitlines()[-1].split("step ")[1].split()[0].replace(",", ""))
    assert read(tmp_path / "run/checkpoint.pt")["run"]["global_step"] == step
    assert not is_running(process.pid)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_error_is_never_lost(mode, tmp_path):
    """Neither one after a Ctrl-C, nor one in a worker; and no worker is left."""
    start = command(
        "ppo_discrete", *FLAGS, "--env-id=envs:tests/InterruptedDiscrete-v0", "--run-dir=run"
    )
    process = subprocess.Popen(
        [*start, f"--vectorization-mode={mode}"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "the simulator has crashed" in err
    assert not is_running(process.pid)


# Mistakes


def test_damaged_checkpoints_are_refused_or_read_correctly(script, args, tmp_path, monkeypatch):
    script.train(args("Endless", **SMALL, total_timesteps=100))
    path, seen = tmp_path / "run/checkpoint.pt", []
    good, whole = read(path), path.read_bytes()
    monkeypatch.setattr(script, "train", lambda args, checkpoint, signals: seen.append(checkpoint))
    rng, refused = random.Random(script.__name__), 0
    files = int(os.environ.get("DAMAGED_FILES", 200))
    for i in range(files):
        data = bytearray(whole)
        if i % 4 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            position = rng.randrange(len(data))
            data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        seen.clear()
        code = main(script, ["--evaluate", path], monkeypatch)
        if seen:
            assert code == 0 and same(seen[0], good)
        else:
            assert code.startswith(f"error: {path} is damaged") and "\n" not in code
            refused += 1
    print(f"{refused} of {files} refused, the others read correctly")
    assert refused > files / 2


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_from_a_stranger_runs_no_code(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Payload(), {"args": Payload()}, {"args": {"unknown": 1}}, [1, 2]):
        torch.save(content, "stranger.pt")
        code = main(script, ["--evaluate", "stranger.pt"], monkeypatch)
        assert code.startswith("error: stranger.pt is damaged, or no checkpoint of this script")
    assert not Path("executed").exists()


MISTAKES = [
    (["--env-id=Foo-v0"], "Foo"),
    (["--env-id=no_such_module:Env-v0"], "no_such_module"),
    (["--env-id=ALE/Pong-v5"], "ALE"),
    (["--env-id=tests/MultiDiscrete-v0"], "MultiDiscrete"),
    (["--num-minibatches=7"], "minibatches equal"),
    (["--num-minibatches=4096"], ">= 2 rows"),
    (["--num-envs=0"], "counts >= 1"),
    (["--num-steps=1"], "--num-steps >= 2"),
    (["--hidden-size=-1"], "counts >= 1"),
    (["--seed=-1"], "all >= 0"),
    (["--learning-rate=-1"], "all >= 0"),
    (["--evaluate=nowhere.pt"], "nowhere.pt"),
    (["--evaluate=."], "IsADirectory"),
    (["--run-dir=file/run"], "file/run"),
    (
        ["--env-id=tests/NanStart{kind}", *FLAGS],
        "tests/NanStart{kind}: observations must be finite",
    ),
    (["--env-id=tests/NanObs{kind}", *FLAGS], "tests/NanObs{kind}: observations must be finite"),
    (["--env-id=tests/InfReward{kind}", *FLAGS], "tests/InfReward{kind}: a reward, or the loss"),
    (["--learning-rate=1e30", *FLAGS], "--learning-rate"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m[0][0] for m in MISTAKES])
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_is_one_clear_line(script, kind, options, message, tmp_path, monkeypatch):
    """`sys.exit` with a text: exit code 1, and no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code = main(script, [option.format(kind=kind) for option in options], monkeypatch)
    assert code.startswith("error: ") and message.format(kind=kind) in code
    assert not [*tmp_path.rglob("*.pt")]


def test_the_other_scripts_environment_or_checkpoint_is_refused(
    script, args, tmp_path, monkeypatch
):
    other = "ppo_continuous" if script.__name__ == "ppo_discrete" else "ppo_discrete"
    env_id = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}[other]
    assert "ppo_discrete.py" in main(script, [f"--env-id={env_id}"], monkeypatch)
    script.train(args("Endless", **SMALL, total_timesteps=100))
    for option in ("--env-id=Foo-v0", "--hidden-size=32"):
        code = main(script, ["--run-dir", tmp_path / "run", option], monkeypatch)
        assert "checkpoint.pt has --env-id tests/Endless" in code


def test_evaluation_names_an_environment_that_gives_nan(script, args, kind, tmp_path, monkeypatch):
    script.train(args("Endless", **SMALL, total_timesteps=100))
    path = tmp_path / "run/checkpoint.pt"
    checkpoint = read(path)
    checkpoint["args"] |= {"env_id": f"tests/NanObs{kind}", "eval_episodes": 1}
    torch.save(checkpoint, path)
    code = main(script, ["--evaluate", path], monkeypatch)
    assert code.startswith(f"error: tests/NanObs{kind}: observations must be finite")


def test_what_the_library_reports_and_what_help_says(tmp_path):
    process = run("ppo_continuous", "--gama=0.9", cwd=tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "--gama" in process.stderr and "--help" in process.stderr
    process = run("ppo_continuous", "--help", cwd=tmp_path)
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
