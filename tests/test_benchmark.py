"""The programs in tests/benchmark run, and the README shows what they wrote."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "benchmark"))
import speed  # noqa: E402


def test_speed_tables_of_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    for table in speed.tables():
        assert table in readme


@pytest.mark.parametrize("contender", ["ours", "stable-baselines3", "environment"])
def test_speed_is_measured(contender):
    row = speed.measure(contender, "CartPole 16 x 128, 256", 1)
    assert row["steps_per_second"] > 0 and row["peak_memory_mb"] > 0
    shares = [row.get(name, 0.0) for name in speed.SPLIT]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert row["environment"] > 0


def test_memory_is_measured():
    row = speed.measure("memory", "CartPole-v1", 5_000, 10_000)
    assert 50 < row["early_mb"] < 2_000 and abs(row["growth"]) < 0.5
