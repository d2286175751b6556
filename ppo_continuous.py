# /// script
# requires-python = ">=3.10,<3.14"
# dependencies=["torch>=2.11,<2.14", "gymnasium[box2d]>=1.1", "numpy", "tensorboard>=2.21", "tyro"]
# ///
"""Proximal Policy Optimization (PPO) for continuous actions, complete in one file.

"The paper": Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
Detail n: Huang et al. 2022, "The 37 Implementation Details of PPO" (cn: for continuous actions).

    python ppo_continuous.py --env-id Pendulum-v1 --run-dir runs/a  # learn; repeat it to go on
    python ppo_continuous.py --evaluate runs/a/best.pt --render  # watch what was learned
"""

import io
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.error import DependencyNotInstalled, DeprecatedEnv, UnregisteredEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # the same seed gives the same run
    compile: bool = False  # compile the gradient: pays in long runs
    run_dir: str | None = None  # folder of the run, which goes on from a checkpoint in it
    evaluate: str | None = None  # no training: play with the policy of this checkpoint
    eval_episodes: int = 10  # greedy episodes after training; with --evaluate at least 1
    render: bool = False  # show the greedy episodes in a window
    capture_video: bool = False  # film the greedy episodes (needs moviepy)
    env_id: str = "Pendulum-v1"  # Gymnasium id, or my_module:MyEnv-v0 for one of your own
    total_timesteps: int = 500_000  # learn from at least these, of all environments and processes
    target_return: float = math.inf  # end training once the last 100 episodes have this mean
    num_envs: int = 16  # environments stepped side by side, in each process
    num_steps: int = 256  # steps of each environment per iteration
    hidden_size: int = 64  # units in each of the two hidden layers of both networks
    learning_rate: float = 8e-4  # of Adam, at the start
    anneal_lr: bool = True  # lower it linearly to 0 over the run
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE: 0 = TD(0), 1 = Monte Carlo
    num_minibatches: int = 16  # gradient steps per epoch
    update_epochs: int = 10  # passes over the data of an iteration
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.1  # epsilon: the ratio gains nothing by moving further than this from 1
    clip_vloss: bool = False  # in its loss, keep V within epsilon of its old value as well
    ent_coef: float = 0.003  # weight c2 of the entropy bonus
    vf_coef: float = 0.5  # weight c1 of the value loss, (V - target)^2 / 2
    max_grad_norm: float = 0.5  # largest norm of the gradient of all parameters together
    target_kl: float | None = None  # no more epochs once the last minibatch's KL(old, new) is above


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun


def average(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes of torchrun, in place."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(x.div_(WORLD_SIZE))
    return x


def seed_everything(key: str) -> int:
    """Seed Python, NumPy and torch from a text; returns a seed for environments' resets."""
    random.seed(key)
    seed = random.getrandbits(30)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


class RunningMoments(nn.Module):
    """Mean and deviation of all data so far, of all processes; 0 and 1 before there is any."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, *shape, dtype=torch.float64))  # of 1, x, x²

    def update(self, x: Tensor) -> None:
        """Take in data, [n, *shape]; std has a floor: rounding can make a variance negative."""
        x = x.double()
        self.sums += average(torch.stack([torch.ones_like(x), x, x**2]).sum(dim=1))
        count, total, squares = self.sums
        self.mean = total / count
        self.std = (squares / count - self.mean**2).clamp(min=1e-15 * self.mean**2).sqrt() + 1e-30


class Agent(nn.Module):
    """Policy π and value function V, with the statistics that scale observations and rewards."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        if not (isinstance(obs_space, gym.spaces.Box) and isinstance(action_space, gym.spaces.Box)):
            sys.exit(f"error: spaces must be Box, Box, not {obs_space}, {action_space}")
        obs_dim, action_dim = math.prod(obs_space.shape), math.prod(action_space.shape)

        def network(outputs: int, last_gain: float) -> nn.Sequential:
            first = nn.Linear(obs_dim, args.hidden_size)
            second = nn.Linear(args.hidden_size, args.hidden_size)
            last = nn.Linear(args.hidden_size, outputs)
            for layer, gain in ((first, math.sqrt(2)), (second, math.sqrt(2)), (last, last_gain)):
                nn.init.orthogonal_(layer.weight, gain)  # detail 2
                nn.init.zeros_(layer.bias)
            return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

        self.critic = network(1, last_gain=1.0)
        self.actor = network(action_dim, last_gain=0.01)
        self.actor_logstd = nn.Parameter(torch.full((action_dim,), math.log(0.8)))  # detail c2
        self.obs_stats, self.return_stats = RunningMoments(obs_dim), RunningMoments()
        # Where all are integers 0 or 1, they stay as they are: scaled, a rare 1 would be a 10.
        self.binary = obs_space.dtype.kind in "biu" and {*obs_space.low, *obs_space.high} == {0, 1}
        # Actions are clipped (detail c5), and [-1, 1] is stretched to bounds that are within ±1e9.
        self.action_space = action_space
        low, high = np.array([action_space.low, action_space.high], float).clip(-1e9, 1e9)
        bounded = (low > -1e9) & (high < 1e9)
        self.action_center = np.where(bounded, (low + high) / 2, np.clip(0, low, high))
        self.action_scale = np.where(bounded, (high - low) / 2, 1)

    def normalize(self, obs: np.ndarray | Tensor) -> Tensor:
        """Flat observations, [..., obs_dim], as the networks see them (details c6 and c7)."""
        obs = torch.as_tensor(obs).to(self.obs_stats.mean)  # its device and dtype
        assert obs.shape[-1:] == self.obs_stats.mean.shape, f"no flat observations: {obs.shape}"
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10).float()

    @torch.no_grad()
    def get_action(self, obs: Tensor) -> Tensor:
        """Actions sampled from π, one each, for normalised observations, [n, obs_dim]."""
        return torch.normal(self.actor(obs), self.actor_logstd.exp())

    def get_logprob_and_entropy(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s), [...], and the entropy of π(·|s), which is the same in every state."""
        z = (action - self.actor(obs)) / self.actor_logstd.exp()
        log_density = -0.5 * z.square() - self.actor_logstd - 0.5 * math.log(2 * math.pi)
        return log_density.sum(-1), (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions of the policy as the environment takes them."""
        space = self.action_space
        action = action.reshape(action.shape[:-1] + space.shape)
        action = np.clip(self.action_center + self.action_scale * action, space.low, space.high)
        return (action.round() if space.dtype.kind in "iu" else action).astype(space.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The likeliest actions, as the environment takes them, for flat observations."""
        return self.to_env(self.actor(self.normalize(obs)).cpu().numpy())


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """Environments side by side, their observations flat."""
    # No autoreset: it adds a row after each episode that looks like a step. `collect` resets.
    no_autoreset = dict(autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    envs = gym.make_vec(args.env_id, args.num_envs, "sync", vector_kwargs=no_autoreset)
    space = envs.single_observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        envs = gym.wrappers.vector.FlattenObservation(envs)
    return envs


def collect(envs: gym.vector.VectorEnv, agent: Agent, args: Args, obs: np.ndarray):
    """Yields rollouts from obs on: tensors [num_steps, num_envs, ...] by name."""
    done = np.zeros(args.num_envs, bool)  # in the step before
    lengths, returns, discounted_returns = np.zeros((3, args.num_envs))  # of each running episode
    while True:
        rows = []
        for _ in range(args.num_steps):
            for i in np.flatnonzero(~np.isfinite(obs).all(axis=1)):
                sys.exit(f"error: environment {i} starts with obs {obs[i].tolist()}")
            actions = agent.get_action(agent.normalize(obs)).cpu().numpy()
            next_obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(actions))
            # what is seen after a termination may be NaN, since nothing needs it
            finite = np.isfinite(rewards) & (np.isfinite(next_obs).all(axis=1) | terminated)
            for i in np.flatnonzero(~finite):
                sys.exit(f"error: environment {i}: obs {next_obs[i].tolist()}, reward {rewards[i]}")
            lengths = lengths * ~done + 1
            returns = returns * ~done + rewards
            discounted_returns = args.gamma * discounted_returns * ~done + rewards  # so far: c8
            done = terminated | truncated
            row = dict(obs=obs, actions=actions, rewards=rewards, next_obs=next_obs)
            row |= dict(terminated=terminated, done=done, discounted_returns=discounted_returns)
            rows.append(row | dict(episodic_return=returns, episodic_length=lengths))
            obs = envs.reset(options={"reset_mask": done})[0] if done.any() else next_obs
        yield {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in rows[0]}


def compute_gae(rewards, values, next_values, terminated, done, args: Args) -> Tensor:
    """Generalised advantage estimates (eq. 16 of GAE); every tensor is [num_steps, num_envs]."""
    # A time limit (done, but not terminated) only cut the episode off: V(s') stands for the rest.
    deltas = rewards + args.gamma * next_values.masked_fill(terminated, 0) - values
    advantages = deltas.clone()
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] += args.gamma * args.gae_lambda * ~done[t] * advantages[t + 1]
    return advantages


def ppo_loss(agent, args, obs, actions, old_logprobs, old_values, advantages, targets) -> tuple:
    """-L^CLIP + c1 L^VF - c2 S of a minibatch (eq. 9 of the paper), and what to log of it."""
    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logprobs, entropies = agent.get_logprob_and_entropy(obs, actions)
    logratios = logprobs - old_logprobs
    ratios = logratios.exp()  # r(θ)
    clipped_ratios = ratios.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratios * advantages, clipped_ratios * advantages).mean()  # eq. 7
    values = agent.critic(obs).squeeze(-1)
    errors = (values - targets).square()
    if args.clip_vloss:  # detail 9
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - targets).square())
    value_loss = 0.5 * errors.mean()
    entropy = entropies.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    log = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    log |= dict(old_approx_kl=-logratios.mean(), approx_kl=(ratios - 1 - logratios).mean())
    log["clipfrac"] = (ratios != clipped_ratios).float().mean()
    return loss, {f"losses/{name}": value.detach() for name, value in log.items()}


def gradient(agent: Agent, args: Args, minibatch: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """The gradient of `ppo_loss`, of all parameters in one vector, and what to log."""
    loss, log = ppo_loss(agent, args, **minibatch)
    grads = torch.autograd.grad(loss, [*agent.parameters()], materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads]), log


def update(agent, params, optimizer, rollout, args: Args, compute_gradient) -> dict[str, Tensor]:
    """Improve π and V on shuffled minibatches; params: all their parameters, as one vector."""
    agent.return_stats.update(rollout["discounted_returns"].flatten())
    rewards = (rollout["rewards"] / agent.return_stats.std).float()  # scaled: c8; not clipped: c9
    with torch.no_grad():
        obs = agent.normalize(rollout["obs"])
        values = agent.critic(obs).squeeze(-1)
        next_values = agent.critic(agent.normalize(rollout["next_obs"])).squeeze(-1)
        logprobs, _ = agent.get_logprob_and_entropy(obs, rollout["actions"])
    done = rollout["done"]
    advantages = compute_gae(rewards, values, next_values, rollout["terminated"], done, args)
    batch = dict(obs=obs, actions=rollout["actions"], old_logprobs=logprobs, old_values=values)
    batch |= dict(advantages=advantages, targets=advantages + values)
    batch = {name: column.flatten(0, 1) for name, column in batch.items()}  # one row per step
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"]), device=params.device)
        for rows in order.tensor_split(args.num_minibatches):
            minibatch = {name: column[rows] for name, column in batch.items()}
            grad, log = compute_gradient(agent, args, minibatch)
            params.grad = average(grad)
            nn.utils.clip_grad_norm_(params, args.max_grad_norm, foreach=False)  # detail 11
            optimizer.step()
        if args.target_kl is not None and average(log["losses/approx_kl"]) > args.target_kl:
            break
    if not params.isfinite().all():
        sys.exit("error: the loss became NaN: lower --learning-rate, or --num-minibatches?")
    if not agent.binary:  # last: π acted and learned with the statistics before
        agent.obs_stats.update(rollout["obs"].flatten(0, 1))
    unexplained = batch["advantages"].var() / batch["targets"].var()  # A = target - V
    return log | {"losses/explained_variance": 1 - unexplained}


def load(path: str, **modules: nn.Module | torch.optim.Optimizer) -> dict:
    """Read a checkpoint; load the named modules from it; exits where it does not fit."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except Exception as error:  # damage has many names
        sys.exit(f"error: {path}: no checkpoint of this script and environment: {error!r:.200}")


def train(args: Args) -> Agent:
    """Algorithm 1 of the paper, in args.run_dir, where it goes on from a checkpoint."""
    torch.set_num_threads(1)  # small networks gain little from more
    gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # one each
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    args = Args(**json.loads(json.dumps(vars(args))))  # plain types: `load` takes no others
    seed_everything(f"start {args.seed}")  # so that all processes have the same parameters
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    # All parameters become views of one vector: one tensor for Adam and torchrun, which is faster.
    params = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(params, agent.parameters())
    optimizer = torch.optim.Adam([params], args.learning_rate, eps=1e-5, fused=True)  # detail 3
    if WORLD_SIZE > 1:  # after Adam, whose imports would keep the group from ending
        torch.distributed.init_process_group()
    torch._dynamo.config.trace_autograd_ops = args.compile  # loss and gradient in one graph
    compute_gradient = torch.compile(gradient, dynamic=False) if args.compile else gradient
    path = os.path.join(args.run_dir, "checkpoint.pt")
    progress = dict(step=0, best=-math.inf, returns=[])
    if os.path.exists(path):
        progress = load(path, agent=agent, optimizer=optimizer)["progress"]
    if RANK == 0:  # the first process writes and prints
        writer = SummaryWriter(args.run_dir, purge_step=progress["step"] + 1)
        writer.add_text("hyperparameters", "\n\n".join(f"{k}: {v}" for k, v in vars(args).items()))
        print(f"{args.run_dir}: step {progress['step']:,}, best return {progress['best']:.2f}")
    seed = seed_everything(f"reset {args.seed} {RANK} {progress['step']}")
    rollouts = collect(envs, agent, args, envs.reset(seed=seed)[0])

    while progress["step"] < args.total_timesteps and progress["best"] < args.target_return:
        clock = time.time()
        start = progress["step"]
        seed_everything(f"iteration {args.seed} {RANK} {start}")  # the same in a resumed run
        remaining = 1 - start / args.total_timesteps if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = remaining * args.learning_rate  # detail 4
        rollout = {name: column.to(device) for name, column in next(rollouts).items()}
        log = update(agent, params, optimizer, rollout, args, compute_gradient)
        done = rollout["done"]
        step = start + done.numel() * WORLD_SIZE
        returns = (progress["returns"] + rollout["episodic_return"][done].tolist())[-100:]
        mean = sum(returns) / 100 if len(returns) == 100 else math.nan  # NaN: no best yet
        mean = average(torch.tensor(mean, device=device, dtype=torch.float64)).item()
        if RANK == 0 and os.path.exists(path) and load(path)["progress"] != progress:
            sys.exit(f"error: another run writes to {args.run_dir}")  # not what we saved last
        files = ["best.pt", "checkpoint.pt"] if mean > progress["best"] else ["checkpoint.pt"]
        progress = dict(step=step, best=max(progress["best"], mean), returns=returns)
        if RANK > 0:
            continue
        for t, i in done.nonzero().tolist():
            end = start + (t + 1) * args.num_envs * WORLD_SIZE
            for tag in ("episodic_return", "episodic_length"):
                writer.add_scalar(f"charts/{tag}", rollout[tag][t, i], end)
        sps = (step - start) / (time.time() - clock)
        log |= {"charts/learning_rate": remaining * args.learning_rate, "charts/SPS": sps}
        for tag, value in log.items():
            writer.add_scalar(tag, value, step)
        writer.flush()
        checkpoint = dict(args=vars(args), progress=progress)
        checkpoint |= dict(agent=agent.state_dict(), optimizer=optimizer.state_dict())
        data = io.BytesIO()  # given a path, torch.save hides why writing fails
        torch.save(checkpoint, data)
        for name in files:  # after a kill, a file is the old one or the new one
            with open(f"{args.run_dir}/{name}.tmp", "wb") as file:
                file.write(data.getbuffer())
            os.replace(f"{args.run_dir}/{name}.tmp", f"{args.run_dir}/{name}")
        print(f"step {step:,}  return {mean:.2f}  {sps:,.0f} steps/s", flush=True)
    envs.close()
    if RANK == 0:
        writer.close()
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    return agent


def evaluate(args: Args, path: str) -> float:
    """Mean return of greedy episodes of a checkpoint, shown or filmed if args say so."""
    drawing = {"render_mode": "rgb_array"} if args.render or args.capture_video else {}
    env = gym.wrappers.FlattenObservation(gym.make(args.env_id, **drawing))
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, os.path.dirname(path), episode_trigger=lambda k: True)
    if args.render:
        env = gym.wrappers.HumanRendering(env)
    agent = Agent(env.observation_space, env.action_space, args)
    load(path, agent=agent)
    returns = np.zeros(max(1, args.eval_episodes))
    for k in range(len(returns)):
        obs, _ = env.reset(seed=seed_everything(f"evaluation {args.seed} {k}"))
        for _ in range(env.spec.max_episode_steps or 10_000):
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            returns[k] += reward
            if terminated or truncated:
                break
        else:
            print(f"episode {k} was cut after 10,000 steps")
    env.close()
    print(f"greedy return of {len(returns)} episodes: {returns.mean():.2f} +- {returns.std():.2f}")
    return float(returns.mean())


def main() -> None:
    """Train and evaluate, or only that; options not given are the checkpoint's, if there is one."""
    args = tyro.cli(Args, description=__doc__)
    run_dir = args.run_dir or f"runs/{args.env_id}__{args.seed}__{time.time_ns()}".replace(":", "_")
    path = os.path.join(run_dir, "checkpoint.pt") if args.evaluate is None else args.evaluate
    if args.evaluate is not None or os.path.exists(path):
        args = tyro.cli(Args, default=load(path)["args"], description=__doc__)
    args.run_dir = run_dir
    try:
        if args.evaluate is None:
            train(args)
        if RANK == 0 and (args.evaluate is not None or args.eval_episodes > 0):
            evaluate(args, path)
    except (UnregisteredEnv, DeprecatedEnv, DependencyNotInstalled, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if RANK == 0 and args.evaluate is None:
            print(f"stopped: --run-dir {args.run_dir} goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
