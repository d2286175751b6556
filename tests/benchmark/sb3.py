"""Stable-Baselines3's PPO with the RL Zoo's settings, run and logged as our scripts are.

python tests/benchmark/sb3.py --env-id CartPole-v1 --run-dir runs/sb3
"""

import argparse
import sys

import gymnasium as gym
import numpy as np
import torch
from common import ROOT
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter

LUNAR_LANDER = dict(n_steps=1024, batch_size=64, n_epochs=4, gamma=0.999, gae_lambda=0.98)
LUNAR_LANDER |= dict(ent_coef=0.01)
# num_envs, normalised, options; rl-baselines3-zoo, hyperparams/ppo.yml (lin_x there is a value that
# falls linearly to 0)
ZOO = {
    "CartPole-v1": (
        *(8, False),
        dict(n_steps=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8, ent_coef=0.0)
        | dict(learning_rate=lambda remaining: remaining * 1e-3)
        | dict(clip_range=lambda remaining: remaining * 0.2),
    ),
    "Acrobot-v1": (
        *(16, True),
        dict(n_steps=256, n_epochs=4, gamma=0.99, gae_lambda=0.94, ent_coef=0.0),
    ),
    "MountainCar-v0": (
        *(16, True),
        dict(n_steps=16, n_epochs=4, gamma=0.99, gae_lambda=0.98, ent_coef=0.0),
    ),
    "LunarLander-v3": (16, False, LUNAR_LANDER),
    "Pendulum-v1": (
        *(4, False),
        dict(n_steps=1024, n_epochs=10, gamma=0.9, gae_lambda=0.95, ent_coef=0.0, use_sde=True)
        | dict(learning_rate=1e-3, clip_range=0.2, sde_sample_freq=4),
    ),
    "LunarLanderContinuous-v3": (16, False, LUNAR_LANDER),
    "BipedalWalker-v3": (
        *(32, True),
        dict(n_steps=2048, batch_size=64, n_epochs=10, gamma=0.999, gae_lambda=0.95, ent_coef=0.0)
        | dict(learning_rate=3e-4, clip_range=0.18),
    ),
}


def make(env_id: str, num_envs: int, normalize: bool, options: dict, seed: int = 1) -> PPO:
    # a function, as make_vec_env would set a render mode for an id
    envs = make_vec_env(lambda: gym.make(env_id), num_envs, seed=seed)
    if normalize:
        envs = VecNormalize(envs, gamma=options["gamma"])
    return PPO("MlpPolicy", envs, device="cpu", seed=seed, **options)


class Log(BaseCallback):
    """Training episodes, as our scripts log them."""

    def __init__(self, run_dir: str):
        super().__init__()
        self.writer = SummaryWriter(run_dir)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                value = info["episode"]["r"]
                self.writer.add_scalar("charts/episodic_return", value, self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        self.writer.close()


def evaluate(model: PPO, env_id: str, seed: int, episodes: int) -> list[float]:
    """Returns of the greedy episodes that our scripts would play with this seed."""
    sys.path.insert(0, str(ROOT))
    # only now: it takes time that is not Stable-Baselines3's
    from ppo_discrete import seed_everything

    env, envs, returns = gym.make(env_id), model.get_vec_normalize_env(), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed_everything(f"evaluation {seed} {episode}"))
        is_done = False
        returns.append(0.0)
        while not is_done:
            x = obs if envs is None else envs.normalize_obs(obs)
            obs, reward, terminated, truncated, _ = env.step(
                model.predict(x, deterministic=True)[0]
            )
            returns[-1] += float(reward)
            is_done = terminated or truncated
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env-id", choices=ZOO, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--run-dir", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make(args.env_id, *ZOO[args.env_id], seed=args.seed)
    model.learn(args.total_timesteps, callback=Log(args.run_dir))
    returns = evaluate(model, args.env_id, args.seed, args.eval_episodes)
    mean, deviation = np.mean(returns), np.std(returns)
    print(f"greedy return of {len(returns)} episodes: {mean:.2f} +- {deviation:.2f}")


if __name__ == "__main__":
    main()
