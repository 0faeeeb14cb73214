"""The learning-rate schedule."""

import math
from typing import Any

import pytest

from recsys.training.optim import OptimizerConfig


def test_warmup_grows_to_1_in_equal_steps() -> None:
    config = OptimizerConfig(warmup_steps=4)
    assert [config.factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays_1() -> None:
    config = OptimizerConfig(decay="constant")
    assert {config.factor(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_decay_goes_from_1_to_0_through_one_half(decay, warmup_steps: int) -> None:
    config = OptimizerConfig(decay=decay, warmup_steps=warmup_steps)
    assert config.factor(warmup_steps, 100) == 1.0
    assert config.factor((100 + warmup_steps) // 2, 100) == pytest.approx(0.5)
    assert 0.0 < config.factor(99, 100) < 0.02, "the last step still learns"
    assert config.factor(100, 100) == pytest.approx(0.0)


def test_decay_follows_its_formula() -> None:
    linear, cosine = (OptimizerConfig(decay=decay) for decay in ("linear", "cosine"))
    assert linear.factor(25, 100) == pytest.approx(0.75)
    assert cosine.factor(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    config = OptimizerConfig(warmup_steps=10, decay="linear")
    assert [config.factor(step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["table_lr", "dense_lr", "weight_decay", "warmup_steps"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_negative_settings_are_named(name: str, value: float) -> None:
    fields: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} {value} must not be negative"):
        OptimizerConfig(**fields)


def test_tables_get_the_table_settings() -> None:
    tables = OptimizerConfig(tables="adagrad", table_lr=0.5, table_eps=0.25, dense_lr=9.0).table_optimizer
    assert (tables.kind, tables.lr, tables.eps) == ("adagrad", 0.5, 0.25)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_an_epsilon_that_rows_without_gradients_divide_by_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=f"table_eps {value} must be above 0"):
        OptimizerConfig(table_eps=value)
