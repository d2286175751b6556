# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14",
#     "gymnasium[box2d]>=1.1,<2",
#     "numpy>=1.26",
#     "tensorboard>=2.18",
#     "tyro>=0.9",
# ]
# ///
"""Proximal Policy Optimization (PPO) for continuous actions, complete in one file.

    python ppo_continuous.py                                # solve Pendulum-v1
    python ppo_continuous.py --env-id BipedalWalker-v3 --total-timesteps 1000000
    python ppo_continuous.py --evaluate runs/... --render   # watch what a run has learned
    torchrun --standalone --nproc-per-node 4 ppo_continuous.py  # learn with four processes
    tensorboard --logdir runs                               # watch the learning curves

The algorithm: Schulman et al. 2017, arXiv:1707.06347 ("the paper" below). Its advantages (GAE):
Schulman et al. 2016, arXiv:1506.02438. Time limits: Pardo et al. 2018, arXiv:1712.00378. What
matters in practice: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy
Optimization"; Andrychowicz et al. 2021, arXiv:2006.05990.
"""

import atexit
import contextlib
import copy
import io
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from importlib.util import find_spec
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = os.path.splitext(os.path.basename(__file__))[0]  # name of the experiment
    seed: int = 1  # the same seed gives the same run, to the bit on one CPU
    torch_deterministic: bool = True  # let cuDNN use deterministic algorithms only
    cuda: bool = True  # use a GPU where there is one
    compile: bool = False  # compile the gradient: pays from about 600k steps on
    run_dir: str | None = None  # folder of the run; None: a new one under runs/
    checkpoint_interval: float = 5.0  # seconds of training between checkpoints, at least
    resume: str | None = None  # go on with this run, its folder or one of its checkpoints
    auto_resume: bool = False  # go on with the run in --run-dir where there is one, else start it
    evaluate: str | None = None  # no training: play with the policy of this run or checkpoint
    eval_episodes: int = 10  # greedy episodes after training, or with --evaluate; 0: none
    render: bool = False  # show the greedy episodes in a window
    capture_video: bool = False  # film the greedy episodes, and one every 25 iterations

    env_id: str = "Pendulum-v1"  # Gymnasium id, or my_module:MyEnv-v0 for one of your own
    total_timesteps: int = 500_000  # environment steps to learn from, over all environments
    target_return: float = math.inf  # end training once the last 100 episodes reach this mean
    num_envs: int = 16  # environments stepped side by side, in each process of torchrun
    num_steps: int = 256  # steps of each environment per iteration
    vectorization_mode: Literal["auto", "sync", "async"] = "auto"  # auto: native, else sync

    hidden_size: int = 64  # units in each of the two hidden layers of both networks
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of the hidden layers
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running deviation of the return
    noise_color: float = 0.5  # β of the action noise at first, falling to 0: 0 = white, 1 = pink

    learning_rate: float = 8e-4  # step size of Adam at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    gamma: float = 0.998  # discount factor γ per step
    gae_lambda: float = 0.95  # λ of generalised advantage estimation: 0 = TD(0), 1 = Monte Carlo
    num_minibatches: int = 16  # gradient steps per epoch, each on an equal part of the data
    update_epochs: int = 10  # passes over the data of an iteration
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # ε: the probability ratio gains nothing by moving beyond 1 ± ε
    clip_vloss: bool = False  # keep the new value within ε of the old one in its loss too
    ent_coef: float = 0.003  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient of all parameters together
    target_kl: float | None = None  # end an iteration's epochs once KL(old, new) exceeds this


RANK = int(os.environ.get("RANK", 0))  # number of this process among those of torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # and among those on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # and how many on this machine
HOW_TO_RUN = {"run_dir", "resume", "auto_resume", "evaluate", "render"}  # not in a checkpoint


class UsageError(Exception):
    """A mistake in the options that the user can correct; the text says how."""


def require(condition: bool, message: str) -> None:
    """Raise `UsageError` with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def validate(args: Args) -> None:
    """Check the options that can be judged before there is an environment.

    Raises:
        UsageError: naming the option, its value and what was expected.
    """

    def check(names: str, is_valid, expected: str) -> None:
        for name in names.split():
            flag, value = name.replace("_", "-"), getattr(args, name)
            require(value is None or is_valid(value), f"--{flag} {value} must be {expected}")

    counts = "total_timesteps num_envs num_steps hidden_size num_minibatches update_epochs"
    check(counts, lambda x: x >= 1, "at least 1")
    amounts = "seed checkpoint_interval eval_episodes ent_coef vf_coef"
    check(amounts, lambda x: 0 <= x < math.inf, "0 or more")
    check("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    check("noise_color", lambda x: 0 <= x <= 2, "between 0 (white) and 2 (red)")
    scales = "learning_rate clip_coef max_grad_norm target_kl"
    check(scales, lambda x: 0 < x < math.inf, "above 0 and finite")
    check("target_return", lambda x: not math.isnan(x), "a number")

    batch_size = args.num_envs * args.num_steps
    rollout = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {batch_size}"
    is_even = batch_size % args.num_minibatches == 0 and batch_size > args.num_minibatches
    parts = f"--num-minibatches {args.num_minibatches} must divide {rollout} into equal parts"
    require(is_even, f"{parts} of 2 or more steps")
    steps = f"--total-timesteps {args.total_timesteps} must be at least one rollout, {rollout}"
    require(args.total_timesteps >= batch_size, steps)
    can_film = not args.capture_video or find_spec("moviepy") is not None
    require(can_film, "--capture-video needs the package moviepy: pip install moviepy")


PARAMETERS, ITERATION, EVALUATION = range(3)  # the streams of random numbers
GREEDY = torch.zeros(())  # the noise that makes the likeliest action


def derive_seed(*key: int) -> int:
    """One 32-bit seed per key of non-negative integers, unrelated to those of other keys.

    Gymnasium seeds environment i with `seed + i`, so that seeds 1 and 2 would share most of their
    environments' streams. Keys of this file: (seed, stream, index, rank).
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def moments(data: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the weights, weighted mean and variance of the data of all processes.

    Args:
        data: [n, ...]; each column [n] has moments of its own.
        weights: what expands to that.

    Returns:
        float64, [...]. Sums of squares serve: float64 rounds far below the precision of the data,
        which are float32.
    """
    data = data.double()
    weights = weights.double().expand_as(data)
    sums = [column.sum(0) for column in (weights, weights * data, weights * data.square())]
    count, mean, square = total(torch.stack(sums))
    mean, square = mean / count.clamp(min=1), square / count.clamp(min=1)
    return count, mean, (square - mean.square()).clamp(min=0)


class RunningMoments(nn.Module):
    """Mean and variance of all the data seen so far, in float64; 0 and 1 before there is any."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, data: Tensor) -> None:
        """Merge in data of shape [n, *shape], of each process (Chan et al. 1979)."""
        count, mean, var = moments(data, data.new_ones(()))
        self.count += count.max()  # the same for each column
        share = count / self.count.clamp(min=1)  # of the new data in the whole
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var) + share * (1 - share) * delta**2


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights scaled by `std`, biases 0 (detail 2 of the 37)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Tanh(nn.Tanh):
    """tanh x = 2 σ(2x) - 1: on a CPU, PyTorch's σ takes a fraction of the time of its tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (2 * x).sigmoid() - 1


class Agent(nn.Module):
    """The policy π (`actor`), the value function V (`critic`) and the statistics of their data.

    Both see a state as x, float32, [..., obs_dim], which is what `normalize` makes of observations.
    The statistics are buffers: whoever saves the `state_dict` saves them with it.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        size = f"--hidden-size {args.hidden_size} --activation {args.activation}"
        self.shape = f"{size}, observations {observation_space}, actions {action_space}"
        self.norm_obs = args.norm_obs
        obs_dim = math.prod(observation_space.shape)
        self.obs_stats = RunningMoments(obs_dim)
        self.return_stats = RunningMoments()
        activation = {"tanh": Tanh, "relu": nn.ReLU}[args.activation]

        def network(outputs: int, std: float) -> nn.Sequential:
            first = layer_init(nn.Linear(obs_dim, args.hidden_size))
            second = layer_init(nn.Linear(args.hidden_size, args.hidden_size))
            last = layer_init(nn.Linear(args.hidden_size, outputs), std)
            return nn.Sequential(first, activation(), second, activation(), last)

        self.critic = network(1, std=1.0)
        action_dim = math.prod(action_space.shape)
        self.actor = network(action_dim, std=0.01)  # the mean of the Gaussian
        self.actor_logstd = nn.Parameter(torch.full((action_dim,), math.log(0.5)))
        # Where an action has both bounds, [-1, 1] is stretched over them: an initial deviation of
        # 0.5 (as in Andrychowicz et al. 2021) then fits every environment.
        bounded = action_space.bounded_below & action_space.bounded_above
        low = np.where(bounded, action_space.low, -1).astype(np.float64)
        high = np.where(bounded, action_space.high, 1).astype(np.float64)
        self.action_space = action_space
        self.action_center, self.action_scale = low / 2 + high / 2, high / 2 - low / 2

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations with mean 0 and variance 1, as far as seen, clipped to 10 deviations."""
        if not self.norm_obs:
            return obs
        deviation = (self.obs_stats.var + 1e-8).sqrt()
        return ((obs - self.obs_stats.mean) / deviation).clamp(-10, 10).float()

    def get_action(self, x: Tensor, noise: Tensor) -> Tensor:
        """What standard normal noise makes of π(·|s), a Gaussian: both [..., action_dim]."""
        return self.actor(x) + self.actor_logstd.exp() * noise

    def get_value(self, x: Tensor) -> Tensor:
        """V(s), [...]."""
        return self.critic(x).squeeze(-1)

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, ...]:
        """Action (sampled where none is given), its log π(a|s), the entropy of π(·|s), and V(s)."""
        if action is None:
            action = self.get_action(x, torch.randn_like(self.actor(x)))
        # by hand, since torch.distributions takes a good part of a gradient step
        errors = (action - self.actor(x)) / self.actor_logstd.exp()
        log_density = -0.5 * errors.square() - self.actor_logstd - 0.5 * math.log(2 * math.pi)
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).expand_as(errors)
        return action, log_density.sum(-1), entropy.sum(-1), self.get_value(x)

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: Tensor = GREEDY) -> np.ndarray:
        """Actions for observations in NumPy, with noise as in `get_action`."""
        obs = torch.as_tensor(obs, device=self.obs_stats.mean.device)
        return self.get_action(self.normalize(obs), noise).cpu().numpy()

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions as the environment takes them: [n, action_dim] -> [n, *action_space.shape]."""
        space = self.action_space
        action = action.reshape(-1, *space.shape) * self.action_scale + self.action_center
        return action.clip(space.low, space.high).astype(space.dtype)


class Adam(nn.Module):
    """torch.optim.Adam (Kingma and Ba 2015) in one operation a step, which saves most of its time.

    All parameters of the agent become views of one vector.
    """

    def __init__(self, agent: Agent, lr: float):
        super().__init__()
        self.lr = lr
        self.vector = nn.utils.parameters_to_vector(agent.parameters()).detach()
        nn.utils.vector_to_parameters(self.vector, agent.parameters())
        self.register_buffer("mean", torch.zeros_like(self.vector))
        self.register_buffer("square", torch.zeros_like(self.vector))
        self.register_buffer("steps", self.vector.new_zeros(()))

    def step(self, gradient: Tensor) -> None:
        """Descend the gradient, a vector like `vector`."""
        state = [self.vector], [gradient], [self.mean], [self.square], [], [self.steps]
        rates = dict(lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0)
        adam(*state, **rates, amsgrad=False, maximize=False, fused=True)


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16), [num_steps, num_envs].

    Args, tensors of that shape where nothing else is said:
        rewards: r[t], of the step from s[t] to s[t+1].
        values: V(s[t]).
        next_values: V(s[t+1]), where s[t+1] is what the step itself led to, never a reset.
        terminations: the task ended in s[t+1], whose future is therefore worth nothing.
        dones: the episode ended in s[t+1], by termination or by a time limit (whose future is worth
            V(s[t+1]), Pardo et al. 2018); no later reward enters the estimate.
        gamma, gae_lambda: γ and λ, numbers from 0 to 1.
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    # A[t] = delta[t] + decay[t] A[t+1], for all t at once: each round doubles the number of terms
    # that A[t] holds of its sum
    advantages, decay, reach = deltas, gamma * gae_lambda * (~dones).to(deltas), 1
    while reach < len(advantages):
        advantages[:-reach] += decay[:-reach] * advantages[reach:]
        decay[:-reach] = decay[:-reach] * decay[reach:]
        reach *= 2
    return advantages


class Batch(NamedTuple):
    """What an epoch learns from: one row per step, reset rows (see `Rollout`) with weight 0."""

    x: Tensor  # [n, obs_dim], observations as the networks see them
    actions: Tensor  # [n, action_dim]
    logprobs: Tensor  # [n], log π_old(a|s)
    advantages: Tensor  # [n]
    returns: Tensor  # [n], what V should have said: advantages + values
    values: Tensor  # [n], V(s) at the start of the epoch
    weights: Tensor  # [n], in a minibatch weights @ v, summed over processes, is the mean of v


def ppo_loss(logprobs, entropies, values, mb: Batch, args: Args) -> tuple[Tensor, dict]:
    """The loss of a minibatch, -L^CLIP + c1 L^VF - c2 S (eq. 9 of the paper, to be minimised).

    Args:
        logprobs, entropies, values: what the policy being trained says of the minibatch, each [n].
        mb: the minibatch, and what the policy that collected it said.
        args: clip_coef, clip_vloss, ent_coef and vf_coef are used.

    Returns:
        The loss, and its parts by name; all scalars.
    """
    ratios = (logprobs - mb.logprobs).exp()  # r(θ)
    clipped_ratios = ratios.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    surrogates = torch.min(ratios * mb.advantages, clipped_ratios * mb.advantages)
    policy_loss = -mb.weights @ surrogates  # eq. 7

    errors = (values - mb.returns).square()
    if args.clip_vloss:
        clipped_values = mb.values + (values - mb.values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - mb.returns).square())
    value_loss = 0.5 * mb.weights @ errors
    entropy = mb.weights @ entropies

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}


def leave_signals(env: gym.Env) -> gym.Env:
    """In a worker of an async environment, leave Ctrl-C and SIGTERM to the main process."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return env


def make_envs(args: Args, **drawing) -> gym.vector.VectorEnv:
    """The vector environment to learn or play in, its episodes counted, its observations a Box.

    Args:
        drawing: render_mode, and what else `gymnasium.make_vec` is to know where it is drawn.

    Raises:
        UsageError: where there is no such environment, or this script cannot learn in it.
    """
    env = f"--env-id {args.env_id}:"
    hint = "gymnasium.pprint_registry() lists the known ids; another needs its module in front, on "
    hint += "PYTHONPATH or installed: --env-id ale_py:ALE/Pong-v5 after pip install ale-py"
    mode = "sync" if drawing else args.vectorization_mode
    options = {"wrappers": [leave_signals]} if mode == "async" else drawing
    try:
        with warnings.catch_warnings(record=True) as notes:
            modes = drawing and gym.make(args.env_id).metadata.get("render_modes", [])
            is_drawable = not drawing or drawing["render_mode"] in modes
            require(is_drawable, f"{env} cannot be shown or filmed, its render modes are {modes}")
            mode = None if mode == "auto" else mode
            envs = gym.make_vec(args.env_id, args.num_envs, mode, **options)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"{env} {error} ({hint})") from None
    actions, observations = envs.single_action_space, envs.single_observation_space
    takers = "ppo_continuous.py takes Box, ppo_discrete.py Discrete"
    require(isinstance(actions, gym.spaces.Box), f"{env} its actions are {actions}; {takers}")
    reset_mode = envs.metadata.get("autoreset_mode")
    is_next_step = reset_mode is gym.vector.AutoresetMode.NEXT_STEP
    require(is_next_step, f"{env} its autoreset mode is {reset_mode}, NEXT_STEP is needed")
    require(observations.is_np_flattenable, f"{env} {observations} cannot be flattened to a Box")
    for note in notes:  # only now: a refusal is one line
        warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
    if not isinstance(observations, gym.spaces.Box):
        envs = gym.wrappers.vector.FlattenObservation(envs)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def kill_workers() -> None:
    """End the workers of async environments at once."""
    for worker in multiprocessing.active_children():
        worker.kill()


@contextlib.contextmanager
def closing(envs: gym.vector.VectorEnv) -> Iterator[gym.vector.VectorEnv]:
    """Close the environments in the end; after an error, wait for no worker: it may be dead."""
    try:
        yield envs
    except BaseException:
        kill_workers()
        raise
    envs.close()


class Rollout(NamedTuple):
    """What the environments answered: [num_steps + 1, num_envs, ...].

    Row t holds the step from obs[t] to obs[t+1]. Vector environments begin a new episode one step
    after the last one ended (`AutoresetMode.NEXT_STEP`): where resets[t] is true, obs[t] is the end
    of an episode, obs[t+1] the start of the next and row t, a *reset row*, no step at all. It must
    not enter anything. Of the last row only obs and resets count: there the next rollout goes on.
    """

    obs: Tensor  # [..., obs_dim], float32
    actions: Tensor  # [..., action_dim], float32
    rewards: Tensor  # float32, 0 in reset rows
    terminations: Tensor  # bool: the task ended (rather than the time that was given for it)
    resets: Tensor  # bool
    discounted: Tensor  # float32, rewards of the episode so far, each γ times the one after it
    logprobs: Tensor  # float32, log π_old(a|s)

    @property
    def is_real(self) -> Tensor:
        """Which rows are steps: bool, [num_steps, num_envs]."""
        return ~self.resets[:-1]


def flat(obs: np.ndarray) -> np.ndarray:
    """Observations as the agent takes them: [n, *shape] -> [n, obs_dim], float32."""
    return obs.reshape(len(obs), -1).astype(np.float32)


def colored_noise(shape: tuple[int, int, int], beta: float) -> Tensor:
    """Standard normal noise whose power falls as 1/f^β along its first axis, the steps; float32.

    With β = 0 all values are independent. With more, nearby ones are alike, as are the first and
    the last: the policy tries a course of action rather than a tremble (Hollenstein et al. 2024,
    arXiv:2312.11091, who found a color between white and pink to be best for PPO).
    """
    steps = shape[0]
    frequencies = torch.fft.rfftfreq(steps).clamp(min=1 / steps)
    power = frequencies**-beta
    variance = torch.fft.irfft(power, steps)[0]  # autocovariance at lag 0 (Wiener-Khinchin)
    amplitudes = (power / variance).sqrt().view(-1, 1, 1)
    white = torch.fft.rfft(torch.randn(shape), dim=0)
    return torch.fft.irfft(amplitudes * white, steps, dim=0)


def collect(envs, agent: Agent, state: tuple, global_step: int, args: Args) -> tuple:
    """Play num_steps x num_envs rows with the current policy.

    Args:
        state: obs, resets and discounted where the environments are now (see `Rollout`), NumPy.
        global_step: how many steps were made before.

    Returns:
        The `Rollout`, the state after it, and (global step, return, length) of each episode that
        ended in it. Each step of each environment has a number of its own, those of several
        processes in turn.

    Raises:
        FloatingPointError: an observation or a reward is not finite.
    """
    obs, resets, discounted = state
    beta = args.noise_color * max(0, 1 - global_step / args.total_timesteps)
    shape = (args.num_steps, args.num_envs, agent.actor[-1].out_features)
    # processes number their steps in turn: the first one's next is global_step + 1
    latest_step = global_step + RANK + 1 - WORLD_SIZE
    rows, episodes = [], []
    for noise in colored_noise(shape, beta):
        action = agent.act(obs, noise)
        next_obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action))
        reward = np.where(resets, 0, reward).astype(np.float32)
        discounted = args.gamma * discounted * ~resets + reward
        rows.append((obs, action, reward, terminated.copy(), resets, discounted))

        steps = latest_step + np.cumsum(~resets) * WORLD_SIZE
        obs = flat(next_obs)
        resets, latest_step = terminated | truncated, int(steps[-1])
        for name, value in (("an observation", obs), ("a reward", reward)):
            if not np.isfinite(value).all():
                problem = f"{name} that is NaN or infinite at step {latest_step}"
                raise FloatingPointError(f"--env-id {args.env_id} returned {problem}")
        if resets.any():
            ended = (steps, envs.episode_returns, envs.episode_lengths)
            episodes += zip(*(column[resets].tolist() for column in ended), strict=True)

    # here only obs and resets count
    rows.append((obs, action, reward, terminated, resets, discounted))
    columns = [torch.as_tensor(np.stack(column)) for column in zip(*rows, strict=True)]
    with torch.no_grad():  # all at once, since the policy is the same in every step
        _, logprobs, _, _ = agent.get_action_and_value(agent.normalize(columns[0]), columns[1])
    return Rollout(*columns, logprobs), (obs, resets, discounted), episodes


@torch.no_grad()
def prepare(rollout: Rollout, agent: Agent, args: Args) -> Batch:
    """The rollout as a batch to learn from, with advantages by the present value function."""
    actions, logprobs = rollout.actions[:-1], rollout.logprobs[:-1]
    rewards, terminations = rollout.rewards[:-1], rollout.terminations[:-1]
    if args.norm_reward:
        deviation = (agent.return_stats.var + 1e-8).sqrt()
        rewards = (rewards / deviation).clamp(-10, 10).float()
    x = agent.normalize(rollout.obs)
    all_values = agent.get_value(x)
    values, next_values, dones = all_values[:-1], all_values[1:], rollout.resets[1:]
    gamma, gae_lambda = args.gamma, args.gae_lambda
    advantages = compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda)
    weights = rollout.is_real.float()
    columns = (x[:-1], actions, logprobs, advantages, advantages + values, values, weights)
    return Batch(*(column.flatten(0, 1) for column in columns))


def minibatches(batch: Batch, args: Args) -> list[Batch]:
    """Shuffle all rows into equal minibatches, and normalise the advantages of each.

    A minibatch is that of all processes together, each of which holds an equal part of it. The
    number and size of minibatches do not depend on the data; one of nothing but reset rows is left
    out, since even a gradient of 0 moves parameters, by Adam's momentum.
    """
    order = torch.randperm(len(batch.weights)).to(batch.weights.device)
    # each column: [num_minibatches, minibatch_size, ...]
    mbs = Batch(*(column[order].unflatten(0, (args.num_minibatches, -1)) for column in batch))
    columns = moments(mbs.advantages.T, mbs.weights.T)
    counts, means, variances = (column.unsqueeze(1) for column in columns)
    weights, advantages = (mbs.weights / counts.clamp(min=1)).float(), mbs.advantages
    if args.norm_adv:
        advantages = ((advantages - means) / (variances.sqrt() + 1e-8)).float()
    mbs = mbs._replace(weights=weights, advantages=advantages)
    return [Batch(*mb) for n, *mb in zip(counts.flatten().tolist(), *mbs, strict=True) if n]


def gradient(agent: Agent, mb: Batch, args: Args) -> Tensor:
    """The gradient of the loss of a minibatch, of all parameters in one vector."""
    _, logprobs, entropies, values = agent.get_action_and_value(mb.x, mb.actions)
    loss, _ = ppo_loss(logprobs, entropies, values, mb, args)
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, [*agent.parameters()]))


def compile_gradient(agent: Agent, args: Args):
    """`gradient`, compiled for the minibatches of this run; on CUDA replayed as a graph.

    Raises:
        UsageError: there is nothing to compile with.
    """
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # since PyTorch 2.11
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward pass in one
    compiled = torch.compile(gradient, dynamic=False, mode="reduce-overhead")
    rows = args.num_envs * args.num_steps // args.num_minibatches
    with torch.no_grad():
        x = agent.obs_stats.mean.float().expand(rows, -1).contiguous()
        mb = Batch(x, agent.get_action(x, GREEDY), *x.new_zeros(len(Batch._fields) - 2, rows))
    try:
        compiled(agent, mb, args)
    except Exception as error:  # compilers fail in many ways, and at length
        need = "a C++ compiler and Python's headers (apt install g++ python3-dev; xcode-select"
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--compile needs {need} --install): {reason}") from None
    return compiled


def gradient_step(
    agent: Agent, optimizer: Adam, mb: Batch, args: Args, compute_gradient=gradient
) -> Tensor:
    """Descend the loss of one minibatch; returns the norm of its gradient before clipping."""
    vector = total(compute_gradient(agent, mb, args))
    norm = vector.norm()
    optimizer.step(vector * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def explained_variance(batch: Batch) -> float:
    """Share of the returns' variance that V foresaw: 1 is all of it, 0 is none."""
    errors_and_returns = torch.stack([batch.returns - batch.values, batch.returns], -1)
    _, _, variances = moments(errors_and_returns, batch.weights.unsqueeze(-1))
    return float(1 - variances[0] / variances[1].clamp(min=1e-8))


@torch.no_grad()
def diagnose(agent: Agent, batch: Batch, args: Args) -> dict[str, Tensor]:
    """How far the policy has moved from the one that collected the batch, and how V fits it.

    Returns:
        Scalars by CleanRL's names: means over the real rows, the losses as in a minibatch.
    """
    (mb,) = minibatches(batch, replace(args, num_minibatches=1))
    _, logprobs, entropies, values = agent.get_action_and_value(mb.x, mb.actions)
    _, metrics = ppo_loss(logprobs, entropies, values, mb, args)
    logratios = logprobs - mb.logprobs
    ratios = logratios.exp()
    metrics["old_approx_kl"] = mb.weights @ -logratios
    metrics["approx_kl"] = mb.weights @ (ratios - 1 - logratios)  # joschu.net/blog/kl-approx.html
    metrics["clipfrac"] = mb.weights @ ((ratios - 1).abs() > args.clip_coef).to(ratios)
    return dict(zip(metrics, total(torch.stack([*metrics.values()])), strict=True))


def update(
    agent: Agent, optimizer: Adam, rollout: Rollout, args: Args, compute_gradient=gradient
) -> dict[str, float]:
    """Improve the policy and the value function: epochs x minibatches of gradient steps.

    Each epoch estimates the advantages anew, by the value function that the one before improved
    (recommended by Andrychowicz et al. 2021).

    Args:
        compute_gradient: `gradient`, or what it was compiled to.

    Returns:
        Diagnostics of the outcome, the mean norm of the gradient in the last epoch, and the
        explained variance before the first; nothing where all rows are reset rows.
    """
    for epoch in range(args.update_epochs):
        batch = prepare(rollout, agent, args)
        if epoch == 0:
            foreseen = explained_variance(batch)
        mbs = minibatches(batch, args)
        norms = [gradient_step(agent, optimizer, mb, args, compute_gradient) for mb in mbs]
        if not norms:
            return {}
        if args.target_kl is not None:
            if diagnose(agent, batch, args)["approx_kl"] > args.target_kl:
                break
    metrics = diagnose(agent, batch, args) | {"grad_norm": torch.stack(norms).mean()}
    means = torch.stack([*metrics.values()]).tolist()  # all at once: on CUDA, this waits
    return dict(zip(metrics, means, strict=True)) | {"explained_variance": foreseen}


def play(
    agent: Agent, args: Args, num_episodes: int, video_dir: str, signals: Sequence[int] = ()
) -> Iterator[float]:
    """Returns of greedy episodes in a fresh environment, one after the other, until a signal.

    Episode k depends on (seed, k) and the agent alone. Where the environment registers no time
    limit, an episode is cut after 10,000 steps: a policy that stands still would never end it.
    """
    drawing = {"render_mode": "human"} if args.render else {}
    if args.capture_video:
        film = [lambda env: gym.wrappers.RecordVideo(env, video_dir, lambda _: True)]
        drawing = {"render_mode": "rgb_array", "wrappers": film}
    with closing(make_envs(replace(args, num_envs=1), **drawing)) as envs:
        for episode in range(num_episodes):
            obs, _ = envs.reset(seed=derive_seed(args.seed, EVALUATION, episode))
            for _ in range(envs.spec.max_episode_steps or 10_000):
                action = agent.act(flat(obs))
                obs, _, terminated, truncated, _ = envs.step(agent.to_env(action))
                if signals:
                    return
                if terminated[0] or truncated[0]:
                    break
            yield envs.episode_returns[0].item()


def evaluate(agent: Agent, args: Args, run_dir: str, run, signals: Sequence[int]) -> list[float]:
    """Play the greedy episodes that the user asked for, print and return their returns."""
    returns, video_dir = [], f"{run_dir}/videos/step-{run.global_step}"
    for episodic_return in play(agent, args, args.eval_episodes, video_dir, signals):
        returns.append(episodic_return)
        if args.evaluate is not None:
            print(f"episode {len(returns)}: {episodic_return:.2f}", flush=True)
    if returns:
        mean, std = np.mean(returns), np.std(returns)
        print(f"greedy return over {len(returns)} episodes: {mean:.1f} ± {std:.1f}")
    return returns


def connect() -> None:
    """Join the other processes that torchrun started; NCCL serves tensors on GPUs, gloo others."""
    # gloo's threads spin while they wait; with this, they do not interrupt what they wait for
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    store, _, _ = next(dist.rendezvous("env://"))
    if WORLD_SIZE == LOCAL_WORLD_SIZE:
        # after a restart (torchrun --max-restarts), addresses of before may still be in the store
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    options = dict(store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timedelta(minutes=10))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, **options)
    atexit.register(dist.destroy_process_group)  # without it, gloo may abort a process at its end
    # once one process has ended, torchrun sends SIGTERM: this one is to keep its own exit code
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Around what waits for the other processes.

    Raises:
        ConnectionError: one of them has ended, or let the others wait for ten minutes.
    """
    try:
        if not dist.is_initialized():
            connect()
        yield
    except RuntimeError as error:
        lost = f"process {RANK} of {WORLD_SIZE} has lost another, or never reached it"
        hint = "--resume goes on from the last checkpoint, if there is one"
        raise ConnectionError(f"{lost} ({hint}): {str(error).splitlines()[0]}") from None


def total(data: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        with connected():
            work = dist.all_reduce(data, async_op=True)
            if data.device.type == "cpu" and hasattr(os, "sched_yield"):
                while not work.is_completed():  # to sleep and be woken takes longer than the sum
                    os.sched_yield()
            work.wait()
    return data


def gather(item) -> list:
    """The items of all processes, by rank."""
    items = [item] * WORLD_SIZE
    if WORLD_SIZE > 1:
        with connected():
            dist.all_gather_object(items, item)
    return items


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all, so that none waits for one that has stopped."""
    failure = None
    try:
        yield
    except (SystemExit, UsageError, FloatingPointError, OSError) as error:
        failure = error
    for error in filter(None, gather(failure)):
        raise error


def in_first(function, *args):
    """What the function returns or raises in the first process, in all of them."""
    with together():
        result = function(*args) if RANK == 0 else None
    return gather(result)[0]


@dataclass
class Progress:
    """How far a run has come, as a checkpoint holds it."""

    global_step: int = 0  # steps learned from
    iteration: int = 0  # rollouts they came in
    seconds: float = 0.0  # of training
    best_return: float = -math.inf  # the highest `mean_return` so far
    evaluated_step: int = 0  # where the last evaluation was made
    window: list[float] = field(default_factory=list)  # returns of the last 100 episodes
    saved_at = -math.inf  # `seconds` at the last checkpoint; without a type, so no field: not saved

    @property
    def mean_return(self) -> float:
        """Mean return of the last 100 episodes; NaN before there are as many."""
        return sum(self.window) / 100 if len(self.window) == 100 else math.nan

    def advance(self, steps: int, episodes: list, seconds: float) -> list:
        """Count an iteration of all processes; returns its episodes, sorted."""
        self.global_step += steps
        self.iteration += 1
        self.seconds += seconds
        # a process with fewer reset rows than others numbers its steps beyond those of all
        episodes = [(min(step, self.global_step), *rest) for step, *rest in episodes]
        episodes.sort(key=lambda episode: episode[0])
        self.window = (self.window + [value for _, value, _ in episodes])[-100:]
        return episodes

    def is_done(self, args: Args) -> bool:
        """Whether all steps are made, or the target return is reached."""
        return self.global_step >= args.total_timesteps or self.mean_return >= args.target_return


def save(path: str, args: Args, agent: Agent, optimizer: Adam, run: Progress) -> None:
    """Write a checkpoint; whenever this is killed, the file is whole, the old one or the new one.

    It holds tensors and plain values only, so that it can be loaded without running code of it.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    options = {k: v for k, v in asdict(args).items() if k not in HOW_TO_RUN}
    options = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
    versions = {module.__name__: str(module.__version__) for module in (torch, gym, np)}
    checkpoint = dict(args=options, versions=versions, shape=agent.shape, progress=asdict(run))
    checkpoint |= dict(agent=dict(agent.state_dict()), optimizer=dict(optimizer.state_dict()))
    data = io.BytesIO()  # torch.save to a full disk would fail in ways that say nothing
    torch.save(checkpoint, data)
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise OSError(f"{path} cannot be written (the one before is intact): {error}") from None


def load(path: str) -> dict:
    """Read a checkpoint (see `save`), which may come from a stranger.

    Raises:
        UsageError: there is none, or it is damaged, or something else.
    """
    hint = "(--resume and --evaluate take the folder of a run or a checkpoint in it)"
    require(os.path.isfile(path), f"there is no checkpoint {path!r} {hint}")
    data = io.BytesIO()
    with contextlib.suppress(Exception):  # damage has many names
        # torch.load compares no checksums; zipfile does, and leaves damage of the headers behind
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(data, "w") as clean:
            for name in set(archive.namelist()):
                clean.writestr(name, archive.read(name))
        data.seek(0)
        checkpoint = torch.load(data, map_location="cpu", weights_only=True)
        if {"args", "shape", "agent", "optimizer", "progress"} <= checkpoint.keys():
            return checkpoint
    raise UsageError(f"{path!r} is damaged, or no checkpoint of this script {hint}")


def find_checkpoint(args: Args) -> str | None:
    """Path of the checkpoint to start from, None where there is to be none."""
    path = args.resume if args.evaluate is None else args.evaluate
    is_clear = args.run_dir is None or path is None
    require(is_clear, f"--run-dir {args.run_dir}: a run goes on in its own folder, leave this out")
    if path is not None:
        return os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    require(args.run_dir or not args.auto_resume, "--auto-resume needs --run-dir, where to go on")
    path = os.path.join(args.run_dir or "", "checkpoint.pt")
    return path if args.auto_resume and os.path.exists(path) else None


def make_run_dir(args: Args) -> str:
    """Make the folder of a new run, one that no other run has."""
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}"
    run_dir = args.run_dir or f"runs/{name}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    os.makedirs(run_dir, exist_ok=bool(args.run_dir))
    is_ours = args.auto_resume or not os.listdir(run_dir)
    require(is_ours, f"--run-dir {run_dir} must be new or empty (--resume {run_dir} goes on there)")
    return run_dir


def begin(envs: gym.vector.VectorEnv, args: Args, checkpoint: dict | None) -> tuple:
    """The agent, its optimizer and the progress: new ones, or those of a checkpoint.

    Raises:
        UsageError: the options do not fit the checkpoint.
    """
    torch.manual_seed(derive_seed(args.seed, PARAMETERS))
    gpus = torch.cuda.device_count() if args.cuda and torch.cuda.is_available() else 0
    few = f"process {LOCAL_RANK} has no GPU: use --nproc-per-node {gpus}, or --no-cuda"
    require(gpus == 0 or LOCAL_RANK < gpus, few)
    device = torch.device("cuda", LOCAL_RANK) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)  # where NCCL looks
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    optimizer = Adam(agent, args.learning_rate)
    if checkpoint is None:
        return agent, optimizer, Progress()

    shapes = f"{checkpoint['shape']}; asked for: {agent.shape}, --env-id {args.env_id}"
    require(agent.shape == checkpoint["shape"], f"the checkpoint has {shapes}")
    try:
        run, saved_total = Progress(**checkpoint["progress"]), checkpoint["args"]["total_timesteps"]
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        # a finished run may be started again as it was
        is_enough = args.total_timesteps > min(run.global_step, saved_total - 1)
    except Exception as error:
        raise UsageError(f"the checkpoint is of another version of this script: {error}") from None
    steps = f"--total-timesteps {args.total_timesteps} must be more than the {run.global_step} done"
    require(is_enough or args.evaluate is not None, steps)
    return agent, optimizer, run


def make_writer(run_dir: str, first_step: int, args: Args) -> SummaryWriter:
    """TensorBoard's writer for the steps from `first_step` on.

    Later points that are there already are of a run killed after its checkpoint; they are hidden.
    """
    # the queue is long so that learning never waits for the disk
    writer = SummaryWriter(run_dir, max_queue=10_000, flush_secs=5, purge_step=first_step)
    rows = "".join(f"\n|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|option|value|\n|-|-|{rows}", first_step)
    return writer


def log(writer: SummaryWriter, run: Progress, episodes: list, scalars: dict) -> None:
    """Write what an iteration brought to TensorBoard."""
    for step, episodic_return, length in episodes:
        writer.add_scalar("charts/episodic_return", episodic_return, step)
        writer.add_scalar("charts/episodic_length", length, step)
    for tag, value in (scalars | {"charts/SPS": run.global_step / run.seconds}).items():
        writer.add_scalar(tag, value, run.global_step)


def show(run: Progress, args: Args, is_due: bool, is_done: bool) -> None:
    """Print how far the run is: on a terminal always, elsewhere when it is due."""
    goal, speed = args.total_timesteps, run.global_step / run.seconds
    mean = f"{np.mean(run.window):.1f}" if run.window else "-"
    left = timedelta(seconds=max(0, goal - run.global_step) // speed)
    line = f"{min(1, run.global_step / goal):4.0%}  {run.global_step:,} steps  return {mean}"
    line = f"{line}  {speed:,.0f} steps/s  {left} left"
    if sys.stdout.isatty():  # rewrite the line in place
        print(f"\r{line}\033[K", end="\n" if is_done else "", flush=True)
    elif is_due:
        print(line, flush=True)


def save_and_film(run_dir, writer, agent, optimizer, run: Progress, args: Args, is_due) -> None:
    """Save best.pt at a new best mean, checkpoint.pt when due; film every 25th iteration."""
    if run.mean_return > run.best_return:
        run.best_return = run.mean_return
        save(f"{run_dir}/best.pt", args, agent, optimizer, run)
    if is_due:
        run.saved_at = run.seconds
        writer.flush()  # first: no curve is to end before its checkpoint
        save(f"{run_dir}/checkpoint.pt", args, agent, optimizer, run)
    if args.capture_video and run.iteration % 25 == 0:
        list(play(agent, args, 1, f"{run_dir}/videos/step-{run.global_step}"))


def train(args: Args, signals: Sequence[int] = ()) -> dict:
    """Learn with PPO (Algorithm 1 of the paper), then play greedily; only that with `evaluate`.

    Args:
        args: used as they are, also with `resume`; it is `parse_args` that adds saved options.
        signals: those received so far; once there is one, the iteration is the last.

    Returns:
        agent: the trained `Agent`; global_step: how many steps it learned from; episodes: (step,
        return) of each episode that ended meanwhile; solved_at: the step at which target_return was
        reached, or None; signals: those that ended it, of any process; eval_returns: those of the
        greedy episodes, in the first process. With `evaluate`, the first and the last.

    Raises:
        UsageError: an option is wrong; nothing was written.
        ConnectionError: another process has ended.
        FloatingPointError: an observation, a reward or the loss became NaN or infinite.
        OSError: the folder of the run cannot be written.
    """
    in_first(validate, args)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small networks gain little from more
    torch.backends.cudnn.deterministic = args.torch_deterministic
    path = in_first(find_checkpoint, args)
    checkpoint = None if path is None else in_first(load, path)
    if args.evaluate is not None:
        args = replace(args, num_envs=1)
    with contextlib.ExitStack() as stack:
        with together():
            if RANK == 0 and (args.capture_video or args.render):  # fail now, not after training
                make_envs(args, render_mode="rgb_array" if args.capture_video else "human").close()
            envs = stack.enter_context(closing(make_envs(args)))
            agent, optimizer, run = begin(envs, args, checkpoint)
            device, is_training = agent.obs_stats.mean.device, args.evaluate is None
            is_compiled = args.compile and is_training
            compute_gradient = compile_gradient(agent, args) if is_compiled else gradient
        run_dir = in_first(make_run_dir, args) if path is None else os.path.dirname(path) or "."
        if not is_training:
            returns = evaluate(agent, args, run_dir, run, signals) if RANK == 0 else []
            return {"agent": agent, "eval_returns": returns}
        with together():
            if RANK == 0:  # the first process writes and prints for all
                if os.path.exists(f"{run_dir}/best.pt"):  # may be newer than the checkpoint
                    run.best_return = load(f"{run_dir}/best.pt")["progress"]["best_return"]
                writer = stack.enter_context(make_writer(run_dir, run.global_step + 1, args))

        obs, _ = envs.reset(seed=derive_seed(args.seed, ITERATION, run.iteration, RANK))
        state = (flat(obs), np.zeros(args.num_envs, bool), np.zeros(args.num_envs, np.float32))
        history, stopped_by, clock = [], [], time.perf_counter()
        is_done = run.is_done(args)
        while not is_done:
            torch.manual_seed(derive_seed(args.seed, ITERATION, run.iteration, RANK))
            remaining = 1 - run.global_step / args.total_timesteps if args.anneal_lr else 1
            optimizer.lr = remaining * args.learning_rate

            # environments live on the CPU: so does the policy that acts, to wait for no GPU
            player = agent if device.type == "cpu" else copy.deepcopy(agent).cpu()
            with together():
                rollout, state, episodes = collect(envs, player, state, run.global_step, args)
            rollout = Rollout(*(column.to(device) for column in rollout))
            agent.return_stats.update(rollout.discounted[:-1][rollout.is_real])
            losses = update(agent, optimizer, rollout, args, compute_gradient)
            # only now, so that acting and learning have seen the same input
            agent.obs_stats.update(rollout.obs[:-1][rollout.is_real])

            reports = gather((int(rollout.is_real.sum()), episodes, [*signals]))  # of all processes
            counts, episode_lists, signal_lists = zip(*reports, strict=True)
            stopped_by = sum(signal_lists, [])
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            episodes = run.advance(sum(counts), sum(episode_lists, []), seconds)
            history += [(step, value) for step, value, _ in episodes]
            if not all(map(math.isfinite, losses.values())):
                problem = f"the loss became NaN or infinite at step {run.global_step}"
                raise FloatingPointError(f"{problem}: lower --learning-rate {args.learning_rate}")
            scalars = {f"losses/{name}": value for name, value in losses.items()}
            scalars["charts/learning_rate"] = optimizer.lr

            is_done = run.is_done(args) or bool(stopped_by)
            is_due = is_done or run.seconds - run.saved_at >= args.checkpoint_interval
            with together():
                if RANK == 0:
                    log(writer, run, episodes, scalars)
                    show(run, args, is_due, is_done)
                    save_and_film(run_dir, writer, agent, optimizer, run, args, is_due)

        if len({*gather(zlib.crc32(optimizer.vector.cpu().numpy()))}) > 1:
            raise RuntimeError("the processes have learned different parameters: please report it")
        solved_at = run.global_step if run.mean_return >= args.target_return else None
        result = dict(agent=agent, global_step=run.global_step, episodes=history)
        result |= dict(solved_at=solved_at, signals=[*signals] or stopped_by, eval_returns=[])
        if RANK == 0:
            if solved_at is not None:
                print(f"solved at step {solved_at:,} after {run.seconds:.0f} s")
            if result["signals"]:
                start = "python" if WORLD_SIZE == 1 else "torchrun ..."
                command = shlex.join([os.path.relpath(__file__), "--resume", run_dir])
                print(f"stopped at step {run.global_step:,}; to go on: {start} {command}")
            else:
                result["eval_returns"] = evaluate(agent, args, run_dir, run, signals)
            if result["eval_returns"] and run.evaluated_step < run.global_step:
                mean = np.mean(result["eval_returns"])
                writer.add_scalar("eval/episodic_return", mean, run.global_step)
                run.evaluated_step = run.global_step
                save(f"{run_dir}/checkpoint.pt", args, agent, optimizer, run)
            print(f"tensorboard --logdir {run_dir}")
    return result


def parse_args() -> Args:
    """The options of the command line; those not given there are as in the checkpoint, if any."""
    args = tyro.cli(Args, description=__doc__)
    path = find_checkpoint(args)
    saved = {} if path is None else load(path)["args"]
    if args.evaluate is not None:  # watching is not as it was while training
        saved |= {"capture_video": False, "eval_episodes": saved.get("eval_episodes") or 10}
    kept = vars(args).keys() - HOW_TO_RUN
    defaults = {name: value for name, value in saved.items() if name in kept}
    # Gymnasium imports what stands before a colon; a folder from a stranger may hold modules too.
    env_id = defaults.get("env_id", args.env_id)
    is_trusted = "." not in env_id.rpartition(":")[0] or env_id == args.env_id
    require(is_trusted, f"{path!r} imports code: give --env-id {env_id} again if you trust it")
    return tyro.cli(Args, default=Args(**defaults), description=__doc__)


def main() -> None:
    """Train or evaluate with the options of the command line.

    Exit codes: 0 done, 1 the run failed, 2 wrong usage (both with one line that says why), 130
    stopped by Ctrl-C (SIGINT), 143 by SIGTERM.
    """
    signals: list[int] = []

    def stop(number: int, _frame) -> None:
        """Let the iteration be finished and saved; on a second Ctrl-C, end at once."""
        signals.append(number)
        if signals.count(signal.SIGINT) > 1:
            kill_workers()
            os._exit(128 + number)

    if RANK > 0:
        warnings.simplefilter("ignore")  # the first process prints them
    try:
        args = in_first(parse_args)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        # TensorBoard's thread: its OSErrors reach the main thread anyway
        threading.excepthook = lambda e: e.exc_type is OSError or threading.__excepthook__(e)
        signals += train(args, signals).get("signals", [])
    except Exception as error:
        is_usage = isinstance(error, UsageError) and not signals
        if is_usage or isinstance(error, (FloatingPointError, OSError)):
            clear = "\r\033[K" if sys.stderr.isatty() else ""  # the line about the progress
            if RANK == 0:
                print(f"{clear}error:", *str(error).split(), file=sys.stderr)
            sys.exit(2 if is_usage else 1)
        if not signals:  # with one, it is the compiler, which got the Ctrl-C too
            raise
    if signals:
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    main()
