"""Every action space that a script takes, every observation, and what it refuses."""

import numpy as np
import pytest
from envs import Seeds
from gymnasium import spaces

import ppo_continuous
import ppo_discrete

INF, BIG = np.inf, float(np.finfo(np.float32).max)
I8, I64, U64 = (np.iinfo(dtype) for dtype in (np.int8, np.int64, np.uint64))
# low, high, dtype, what the actions -1, 0 and 1 of the policy become
BOXES = [
    (-2, 2, np.float32, (-2, 0, 2)),
    (10, 14, np.float64, (10, 12, 14)),
    (0, 1, np.int8, (0, 0, 1)),
    (I8.min, I8.max, np.int8, (-128, 0, 127)),
    (0, 255, np.uint8, (0, 128, 255)),
    (-3, 3, np.int16, (-3, 0, 3)),
    (I64.min, I64.max, np.int64, (-1, 0, 1)),
    (0, I64.max, np.int64, (0, 0, 1)),
    (0, U64.max, np.uint64, (0, 0, 1)),
    (-1, 1, np.float16, (-1, 0, 1)),
    (-INF, INF, np.float32, (-1, 0, 1)),
    (-BIG, BIG, np.float32, (-1, 0, 1)),
    (50, INF, np.float32, (50, 50, 51)),
    (-INF, 3, np.float64, (-1, 0, 1)),
    (-INF, -5, np.float64, (-6, -5, -5)),
    (50, BIG, np.float32, (50, 50, 51)),
    ([0, -INF], [1, INF], np.float32, ([0, -1], [0.5, 0], [1, 1])),
    ([[0, 1]], [[2, 3]], np.float32, ([[0, 1]], [[1, 2]], [[2, 3]])),
]


@pytest.mark.parametrize(("low", "high", "dtype", "expected"), BOXES)
def test_actions_are_stretched_rounded_and_stay_inside(low, high, dtype, expected):
    shape = np.shape(low) or (1,)
    low, high = (np.broadcast_to(np.array(bound, dtype), shape) for bound in (low, high))
    space = spaces.Box(low, high, shape, dtype)
    agent = ppo_continuous.Agent(spaces.Box(-1, 1, (3,)), space, ppo_continuous.Args())
    for action, value in zip((-1.0, 0.0, 1.0), expected, strict=True):
        got = agent.to_env(np.full(space.low.size, action, np.float32))
        assert got in space and got.dtype == space.dtype
        np.testing.assert_array_equal(got, np.broadcast_to(np.array(value, dtype), shape))
    rng = np.random.default_rng(0)
    for size in (0.3, 1, 5, 1e3, 1e10, 1e18):
        for action in size * rng.normal(size=(20, 2, space.low.size)).astype(np.float32):
            assert all(row in space for row in agent.to_env(action))


def test_every_value_of_a_small_integer_space_is_played_often():
    space = spaces.Box(0, 1, (3,), np.int8)
    agent = ppo_continuous.Agent(spaces.Box(-1, 1, (3,)), space, ppo_continuous.Args())
    obs = agent.normalize(np.zeros((1000, 3)))
    assert 0.4 < agent.to_env(agent.get_action(obs).numpy()).mean() < 0.6


@pytest.mark.parametrize(("env_id", "at_least"), [("ThreeOnes-v0", -0.05), ("Beyond50-v0", -0.2)])
def test_actions_at_a_bound_or_beyond_it_are_learned(env_id, at_least, tmp_path):
    args = ppo_continuous.Args(env_id=f"tests/{env_id}", total_timesteps=4_000, num_steps=16)
    args.num_minibatches, args.learning_rate, args.run_dir = 4, 3e-3, str(tmp_path)
    ppo_continuous.train(args)
    assert ppo_continuous.evaluate(args, str(tmp_path / "checkpoint.pt")) >= at_least


OBSERVATIONS = [
    (spaces.Box(-1, 1, (4,)), np.float32),
    (spaces.Box(0, 255, (5,), np.uint8), np.uint8),
    (spaces.Box(-1, 1, (4,), np.float64), np.float64),
]


@pytest.mark.parametrize(("space", "dtype"), OBSERVATIONS)
@pytest.mark.parametrize(
    "actions", [spaces.Discrete(3, start=-1), spaces.Box(-2, 1, (2, 2)), spaces.Box(-2, 1, ())]
)
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
def test_act_takes_what_the_environment_gives_and_gives_what_it_takes(space, dtype, actions):
    script = ppo_discrete if isinstance(actions, spaces.Discrete) else ppo_continuous
    agent = script.Agent(space, actions, script.Args())
    obs = np.stack([np.stack([space.sample() for _ in range(3)]) for _ in range(2)])
    one, row, both = agent.act(obs[0, 0]), agent.act(obs[0]), agent.act(obs)
    assert one in actions and {one: 1} if script is ppo_discrete else one in actions
    assert row.shape == (3, *actions.shape) and both.shape == (2, 3, *actions.shape)
    np.testing.assert_allclose(row, both[0], rtol=1e-5)
    np.testing.assert_allclose(one, row[0], rtol=1e-5)


@pytest.mark.parametrize("obs", [np.array(3), np.arange(5), np.zeros(5), np.zeros((2, 3))])
def test_act_refuses_what_has_another_size(script, obs):
    """A raw number of a `Discrete` space among it, and one number too many."""
    actions = spaces.Discrete(3) if script is ppo_discrete else spaces.Box(-1, 1, (2,))
    agent = script.Agent(spaces.Box(-1, 1, (4,)), actions, script.Args())
    with pytest.raises(AssertionError, match="no flat observations"):
        agent.act(obs)


FLAT = ["Plane", "Cell", "Mixed", "Bits", "Counted"]
DTYPES = ["uint8", "uint16", "uint32", "int64", "float64"]


@pytest.mark.parametrize("env", [*FLAT, *DTYPES])
def test_trains_and_plays_where_observations_flatten_and_others_count(script, args, env):
    options = args(env, num_envs=2, num_steps=16, num_minibatches=2, eval_episodes=1)
    options.total_timesteps = 100
    agent = script.train(options)
    if env in ("Cell", "Bits"):  # zeros and ones are not normalised
        ones = np.eye(len(agent.obs_stats.mean), dtype=int)
        assert agent.normalize(ones).tolist() == ones.tolist()
    else:
        assert agent.obs_stats.sums[0].min() == 128
    returned = script.evaluate(options, f"{options.run_dir}/checkpoint.pt")
    assert returned == {"Counted": 5.0}.get(env, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "binary"),
    [(0, 1, bool, True), (0, 1, np.int8, True), (0, 1, np.float32, False)]
    + [(-1, 1, np.int8, False), (-50, [0, 1], int, False), (0, 9, int, False)],
)
def test_only_whole_zeros_and_ones_are_not_normalised(low, high, dtype, binary):
    low, high = np.broadcast_to(low, 2).astype(dtype), np.broadcast_to(high, 2).astype(dtype)
    space = spaces.Box(low, high, dtype=dtype)
    agent = ppo_discrete.Agent(space, spaces.Discrete(2), ppo_discrete.Args())
    assert agent.binary == binary


@pytest.mark.parametrize(("script", "env"), [(ppo_discrete, "Start"), (ppo_continuous, "Scalar")])
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
def test_a_discrete_space_may_start_anywhere_and_a_box_have_no_shape(script, env, tmp_path):
    """`Strict` checks every action."""
    args = script.Args(env_id=f"tests/{env}-v0", num_envs=4, num_steps=32, total_timesteps=300)
    args.run_dir, args.eval_episodes = str(tmp_path), 1
    assert script.train(args).obs_stats.sums[0].min() >= 300
    script.evaluate(args, str(tmp_path / "checkpoint.pt"))


def test_observations_that_cannot_be_learned_from_are_refused(script, args):
    with pytest.raises(SystemExit, match="^error: .*Box.* not .*$"):
        script.train(args("Sequence"))


def test_actions_that_cannot_be_learned_are_refused(script, args, kind):
    options = args("Counting")
    other = {"Discrete-v0": "Continuous-v0", "Continuous-v0": "Discrete-v0"}[kind]
    for env_id in (f"tests/Counting{other}", "tests/MultiDiscrete-v0"):
        options.env_id = env_id
        with pytest.raises(SystemExit, match="^error: .*(Box|Discrete).* not .*$"):
            script.train(options)


def test_each_environment_has_a_seed_of_its_own_over_runs_too(script, args, tmp_path):
    seen = []
    for seed in (1, 2):
        Seeds.seen.clear()
        options = args("Seeds", seed=seed, num_envs=4, num_steps=4, num_minibatches=2)
        options.total_timesteps, options.run_dir = 10, str(tmp_path / str(seed))
        options.eval_episodes = 2
        script.train(options)
        script.evaluate(options, f"{options.run_dir}/checkpoint.pt")
        assert len(Seeds.seen) == len({*Seeds.seen}) == 4 + 2
        seen += Seeds.seen
    assert len({*seen}) == 12 and max(seen) < 2**31
