"""Proximal Policy Optimization (PPO) for discrete actions, complete in one file.

    python ppo_discrete.py --env-id CartPole-v1  # learn, in a new folder in runs/
        --run-dir runs/a                    # start in runs/a, or go on there
        --evaluate runs/a/best.pt --render  # watch what was learned
    torchrun --standalone --nproc-per-node 4 ppo_discrete.py  # learn with four processes

"The paper": Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
Detail n: Huang et al. 2022, "The 37 Implementation Details of PPO" (cn: for continuous actions).
"""

import math
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # the same seed gives the same run
    cuda: bool = True  # use a GPU where there is one
    compile: bool = False  # compile the gradient: pays in long runs
    run_dir: str | None = None  # folder of the run, which goes on from a checkpoint in it
    evaluate: str | None = None  # no training: play with the policy of this checkpoint
    eval_episodes: int = 10  # greedy episodes after training, or with --evaluate
    render: bool = False  # show the greedy episodes in a window
    capture_video: bool = False  # film the greedy episodes (needs moviepy)

    env_id: str = "CartPole-v1"  # Gymnasium id, or my_module:MyEnv-v0 for one of your own
    total_timesteps: int = 500_000  # steps to learn from, over all environments and processes
    target_return: float = math.inf  # end training once the last 100 episodes reach this mean
    num_envs: int = 16  # environments stepped side by side, in each process
    num_steps: int = 256  # steps of each environment per iteration
    vectorization_mode: Literal["auto", "sync", "async"] = "auto"  # native, else sync; films: sync

    hidden_size: int = 64  # units in each of the two hidden layers of both networks
    learning_rate: float = 8e-4  # of Adam, at the start
    anneal_lr: bool = True  # lower it linearly to 0 over the run
    gamma: float = 0.995  # discount factor γ
    gae_lambda: float = 0.95  # λ of GAE: 0 = TD(0), 1 = Monte Carlo
    num_minibatches: int = 16  # gradient steps per epoch
    update_epochs: int = 10  # passes over the data of an iteration
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.1  # ε: the probability ratio gains nothing by moving beyond 1 ± ε
    clip_vloss: bool = False  # in its loss, keep V within ε of its old value as well
    ent_coef: float = 0.003  # weight c2 of the entropy bonus
    vf_coef: float = 0.5  # weight c1 of the value loss, ½ (V - target)²
    max_grad_norm: float = 0.5  # largest norm of the gradient of all parameters together
    target_kl: float | None = None  # end an iteration's epochs once KL(old, new) exceeds this


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun


def average(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes of torchrun, in place."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(x.div_(WORLD_SIZE))
    return x


def derive_seed(*key: int) -> int:
    """A seed below 2^31 from integers; only zeros at their end make no difference."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


class RunningMoments(nn.Module):
    """Mean and deviation of all data so far, of all processes; 0 and 1 before there is any."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, *shape, dtype=torch.float64))  # of 1, x, x²

    def update(self, data: Tensor) -> None:
        """Take in data of shape [n, *shape]."""
        self.sums += average(torch.stack([data.double() ** k for k in range(3)]).sum(1))
        count, total, squares = self.sums
        self.mean = total / count
        self.std = ((squares / count - self.mean**2).clamp(min=0) + 1e-8).sqrt()


class Agent(nn.Module):
    """Policy π and value function V of x (see `normalize`), and the statistics of their data."""

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.spaces.Discrete, args: Args):
        super().__init__()
        obs_dim, action_dim = math.prod(obs_space.shape), int(action_space.n)

        def network(outputs: int, std: float) -> nn.Sequential:
            first, last = nn.Linear(obs_dim, args.hidden_size), nn.Linear(args.hidden_size, outputs)
            middle = nn.Linear(args.hidden_size, args.hidden_size)
            for layer, gain in ((first, math.sqrt(2)), (middle, math.sqrt(2)), (last, std)):
                nn.init.orthogonal_(layer.weight, gain)  # detail 2
                nn.init.zeros_(layer.bias)
            return nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last)

        self.critic = network(1, std=1.0)
        self.actor = network(action_dim, std=0.01)
        self.obs_stats, self.return_stats = RunningMoments(obs_dim), RunningMoments()
        self.action_space = action_space

    def normalize(self, obs: np.ndarray | Tensor) -> Tensor:
        """Observations, flat: [..., obs_dim], as the networks see them (details c6 and c7)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_stats.mean.device)
        if obs.shape[-1:] != self.obs_stats.mean.shape or not obs.isfinite().all():
            raise FloatingPointError("observations must be finite, in flat vectors")
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10).float()

    def get_action(self, x: Tensor) -> Tensor:
        """Actions sampled from π(·|s), [n], for x of [n, obs_dim]."""
        return torch.multinomial(self.actor(x).softmax(-1), 1).squeeze(-1)

    def get_logprob_and_entropy(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s), [...], and the entropy of π(·|s), [...]."""
        logprobs = self.actor(x).log_softmax(-1)
        logprob = logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return logprob, -(logprobs.exp() * logprobs).sum(-1)

    def to_env(self, action: Tensor) -> np.ndarray:
        """Actions as the environment takes them, [...]: a `Discrete` space may start anywhere."""
        return action.cpu().numpy() + self.action_space.start

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The likeliest actions, as the environment takes them, for flat observations."""
        return self.to_env(self.actor(self.normalize(obs)).argmax(-1))


def compute_gae(rewards, values, terminations, dones, gamma, gae_lambda) -> Tensor:
    """Generalised advantage estimates (GAE, eq. 16), [num_steps, num_envs]; values: a row more."""
    # what a time limit cut off (done, not terminated) would have had a future, worth V(s[t+1])
    deltas = rewards + gamma * values[1:] * ~terminations - values[:-1]
    advantages, last = torch.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + gamma * gae_lambda * last * ~dones[t]
    return advantages


def ppo_loss(agent, args, x, actions, old_logprobs, old_values, advantages, returns) -> tuple:
    """-L^CLIP + c1 L^VF - c2 S of a minibatch (eq. 9 of the paper), and what to log of it.

    A row a step: x is [n, obs_dim], actions [n, ...], all others [n]; returns: the targets of V.
    """
    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logprobs, entropies = agent.get_logprob_and_entropy(x, actions)
    logratios = logprobs - old_logprobs
    ratios = logratios.exp()  # r(θ)
    clipped_ratios = ratios.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratios * advantages, clipped_ratios * advantages).mean()  # eq. 7

    values = agent.critic(x).squeeze(-1)
    errors = (values - returns).square()
    if args.clip_vloss:  # detail 9
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - returns).square())
    value_loss, entropy = 0.5 * errors.mean(), entropies.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    log = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return loss, log | {"logratios": logratios}


def gradient(agent: Agent, args: Args, *minibatch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of `ppo_loss`, of all parameters in one vector, and what to log."""
    loss, log = ppo_loss(agent, args, *minibatch)
    grads = torch.autograd.grad(loss, [*agent.parameters()])
    return torch.cat([g.flatten() for g in grads]), {k: v.detach() for k, v in log.items()}


def make_envs(args: Args, num_envs: int, **drawing) -> gym.vector.VectorEnv:
    """Environments side by side, their observations flat; raises where there are none for PPO."""
    mode = "sync" if args.render or args.capture_video else args.vectorization_mode
    envs = gym.make_vec(args.env_id, num_envs, None if mode == "auto" else mode, **drawing)
    if not isinstance(s := envs.single_observation_space, gym.spaces.Box) or len(s.shape) != 1:
        with suppress(NotImplementedError):  # a space that Gymnasium does not know
            envs = gym.wrappers.vector.FlattenObservation(envs)
    spaces = envs.single_observation_space, envs.single_action_space
    if not all(map(isinstance, spaces, (gym.spaces.Box, gym.spaces.Discrete))):
        raise gym.error.Error(f"{spaces} must flatten to Box, Box (ppo_discrete.py: Box, Discrete)")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise gym.error.Error("its autoreset mode must be NEXT_STEP")
    return envs


@torch.no_grad()
def collect(envs: gym.vector.VectorEnv, agent: Agent, seed: int, args: Args):
    """Yields rollouts, their steps, and for each ended episode (steps so far, return, length)."""
    obs, _ = envs.reset(seed=seed)
    resets, lengths = np.zeros(args.num_envs, bool), np.zeros(args.num_envs, int)
    returns, discounted = np.zeros((2, args.num_envs), np.float32)
    # Gymnasium resets in the step after an episode's end. Such a row (`resets`), from the last
    # observation of one episode to the first of the next, is no step: it must not enter anything.
    while True:
        states, rows, episodes, steps = [(obs.astype(np.float32), resets)], [], [], 0
        for _ in range(args.num_steps):
            action = agent.get_action(agent.normalize(states[-1][0]))
            obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(action))
            steps += int((~resets).sum())
            rewards = np.where(resets, 0, rewards).astype(np.float32)
            discounted = rewards + args.gamma * discounted * ~resets
            returns, lengths = rewards + returns * ~resets, (lengths + 1) * ~resets
            resets = np.logical_or(terminated, truncated)  # the next row of these is no step
            states.append((obs.astype(np.float32), resets))
            rows.append((action.cpu(), rewards, np.array(terminated, bool), discounted))
            episodes += [(steps, returns[i].item(), lengths[i].item()) for i in resets.nonzero()[0]]
        columns = (*zip(*states, strict=True), *zip(*rows, strict=True))
        yield [torch.as_tensor(np.stack(column)) for column in columns], steps, episodes


def update(agent: Agent, params: Tensor, optimizer, rollout: list, args, step_gradient) -> dict:
    """Improve π and V by epochs x minibatches Adam steps on `params`, which all layers view."""
    # [num_steps, num_envs, ...], the first two a row more: row t + 1 is what row t led to
    obs, resets, actions, rewards, terminations, discounted = (c.to(params.device) for c in rollout)
    real, dones = ~resets[:-1], resets[1:]  # rows that are steps; steps that ended an episode
    agent.return_stats.update(discounted[real])
    rewards = (rewards / agent.return_stats.std).clamp(-10, 10).float()  # details c8 and c9
    x = agent.normalize(obs)  # [num_steps + 1, num_envs, obs_dim]
    with torch.no_grad():
        values = agent.critic(x).squeeze(-1)  # [num_steps + 1, num_envs]
        logprobs, _ = agent.get_logprob_and_entropy(x[:-1], actions)
    advantages = compute_gae(rewards, values, terminations, dones, args.gamma, args.gae_lambda)
    returns = advantages + values[:-1]
    columns = [c[real] for c in (x[:-1], actions, logprobs, values[:-1], advantages, returns)]
    for _ in range(args.update_epochs):
        # shuffled; in the places of reset rows, a few real ones a second time
        order = torch.randperm(len(columns[0]), device=real.device)
        order = order.repeat(math.ceil(real.numel() / len(order)))[: real.numel()]
        for minibatch in zip(*(c[order].chunk(args.num_minibatches) for c in columns), strict=True):
            grad, log = step_gradient(agent, args, *minibatch)
            grad = average(grad)  # then clipped as by `clip_grad_norm_` (detail 11)
            params.grad = grad * (args.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1)
            optimizer.step()
        logratios = log.pop("logratios")  # of the last minibatch, like the losses
        log["approx_kl"] = average((logratios.exp() - 1 - logratios).mean())
        if args.target_kl is not None and log["approx_kl"] > args.target_kl:
            break
    log["old_approx_kl"] = -logratios.mean()
    log["clipfrac"] = ((logratios.exp() - 1).abs() > args.clip_coef).float().mean()
    if not params.isfinite().all():
        raise FloatingPointError("a reward, or the loss, became NaN: lower --learning-rate?")
    agent.obs_stats.update(obs[:-1][real])  # only now: acting and learning have seen the old ones
    log["explained_variance"] = 1 - advantages[real].var() / returns[real].var()  # A = target - V
    return {f"losses/{name}": value.item() for name, value in log.items()}


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, args: Args) -> float:
    """Mean return of greedy episodes; episode k depends on (seed, k) and the agent alone."""
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = envs.reset(seed=derive_seed(args.seed, 3, episode))
        for _ in range(envs.spec.max_episode_steps or 10_000):  # some have no limit
            obs, rewards, terminated, truncated, _ = envs.step(agent.act(obs))
            returns[episode] += rewards[0]
            if terminated[0] or truncated[0]:
                break
    print(f"greedy return of {len(returns)} episodes: {returns.mean():.2f} ± {returns.std():.2f}")
    return float(returns.mean())


def save(path: str, **checkpoint) -> None:
    """Write a checkpoint; after a kill the file is the old one or the new one, never a part."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(checkpoint, file)
    os.replace(f"{path}.tmp", path)


def train(args: Args, checkpoint: dict | None = None, signals=()) -> dict:
    """Algorithm 1 of the paper, then greedy episodes; once there is a signal, save and return."""
    torch.set_num_threads(1)  # small networks gain little from more
    gpu = args.cuda and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else "cpu"
    run_dir = args.run_dir or f"runs/{args.env_id}__{args.seed}__{time.time():.0f}"
    wrappers = [lambda env: gym.wrappers.RecordVideo(env, run_dir, lambda episode: True)]
    video = {"render_mode": "rgb_array", "wrappers": wrappers} if args.capture_video else {}
    eval_envs = make_envs(args, 1, **({"render_mode": "human"} if args.render else video))
    envs = eval_envs if args.evaluate else make_envs(args, args.num_envs)
    torch.manual_seed(derive_seed(args.seed, 0))  # the same parameters in all processes
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    params = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(params, agent.parameters())  # now views of it: never rebind one
    optimizer = torch.optim.Adam([params], args.learning_rate, eps=1e-5, fused=True)  # detail 3
    if WORLD_SIZE > 1:  # after Adam, whose imports would keep the group alive for good
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    run = dict(global_step=0, best=-math.inf, returns=[])
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        run = checkpoint["run"]
    if RANK == 0 and not args.evaluate:  # the first process writes and prints
        writer = SummaryWriter(run_dir, purge_step=run["global_step"] + 1)

    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # since PyTorch 2.11
        torch._dynamo.config.trace_autograd_ops = True  # --compile: loss and gradient in one graph
    step_gradient = torch.compile(gradient, dynamic=False) if args.compile else gradient
    rollouts = collect(envs, agent, derive_seed(args.seed, 1, run["global_step"], RANK), args)
    is_over = bool(args.evaluate) or run["best"] >= args.target_return
    while run["global_step"] < args.total_timesteps and not is_over:
        clock, start = time.time(), run["global_step"]
        torch.manual_seed(derive_seed(args.seed, 2, start, RANK))
        remaining = 1 - start / args.total_timesteps if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = lr = remaining * args.learning_rate  # detail 4
        rollout, steps, episodes = next(rollouts)
        log = update(agent, params, optimizer, rollout, args, step_gradient)
        run["returns"] = (run["returns"] + [value for _, value, _ in episodes])[-100:]
        mean = sum(run["returns"]) / 100 if len(run["returns"]) == 100 else math.nan
        mine = [float(steps), mean >= args.target_return or len(signals) > 0]  # summed below
        steps, is_over = (average(torch.tensor(mine, device=device)) * WORLD_SIZE).tolist()
        run["global_step"] = global_step = start + round(steps)
        if RANK > 0:
            continue
        for end, episodic_return, length in episodes:
            writer.add_scalar("charts/episodic_return", episodic_return, start + end * WORLD_SIZE)
            writer.add_scalar("charts/episodic_length", length, start + end * WORLD_SIZE)
        sps = steps / (time.time() - clock)
        log |= {"charts/learning_rate": lr, "charts/SPS": sps}
        for tag, value in log.items():
            writer.add_scalar(tag, value, global_step)
        writer.flush()
        states = dict(run=run, agent=agent.state_dict(), optimizer=optimizer.state_dict())
        if mean > run["best"]:  # of episodes played before this update
            run["best"] = mean
            save(f"{run_dir}/best.pt", args=asdict(args), **states)
        save(f"{run_dir}/checkpoint.pt", args=asdict(args), **states)
        print(f"{run_dir}: step {global_step:,}  return {mean:.2f}  {sps:,.0f} steps/s", flush=True)

    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    if RANK == 0 and args.eval_episodes and not signals:
        run["eval_return"] = evaluate(agent, eval_envs, args)
    envs.close()
    eval_envs.close()
    return run | {"agent": agent}


def main() -> None:
    """Options that are not given are those of the checkpoint, if there is one."""
    args, checkpoint, signals = tyro.cli(Args, description=__doc__), None, []
    path = args.evaluate or os.path.join(args.run_dir or "", "checkpoint.pt")
    if args.evaluate or args.run_dir and os.path.exists(path):
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load compares no checksums
                raise ValueError("wrong checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            saved = Args(**checkpoint["args"])
        except Exception as error:  # damage has many names
            sys.exit(f"error: {path} is damaged, or no checkpoint of this script: {error!r:.200}")
        args = tyro.cli(Args, default=saved, description=__doc__)
        args.run_dir = os.path.dirname(path) or "."
        if (args.env_id, args.hidden_size) != (saved.env_id, saved.hidden_size):
            sys.exit(f"error: {path} has --env-id {saved.env_id} --hidden-size {saved.hidden_size}")

    rows, parts = args.num_envs * args.num_steps, args.num_minibatches
    least = min(args.num_envs, args.num_steps - 1, parts, args.update_epochs, args.hidden_size)
    if least < 1 or rows % parts or rows == parts or min(args.seed, args.learning_rate) < 0:
        sys.exit("error: counts >= 1, --num-steps >= 2, minibatches equal and >= 2 rows, all >= 0")

    def on_signal(number, _frame):
        if not multiprocessing.parent_process():  # else a worker, which is ended below
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one ends at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if args.evaluate else on_signal)
    try:
        train(args, checkpoint, signals)
    except (gym.error.Error, ImportError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {args.env_id}: {error}")
    finally:
        [worker.kill() for worker in multiprocessing.active_children()]
    sys.exit(128 + signals[0] if signals else 0)


if __name__ == "__main__":
    main()
