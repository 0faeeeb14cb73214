"""Recipes: functions that return a complete TrainConfig."""

from collections.abc import Callable
from pathlib import Path

from recsys.training.trainer import LoopConfig, TrainConfig


def criteo_kaggle() -> TrainConfig:
    """Criteo Kaggle (display advertising challenge) as `recsys prepare criteo_kaggle` leaves it."""
    return TrainConfig(
        data=Path("data/criteo_kaggle"), out=Path("runs/criteo_kaggle"), train=LoopConfig(batch_size=1024)
    )


def synthetic() -> TrainConfig:
    """A log of `recsys synth`."""
    return TrainConfig(data=Path("data/synthetic"), out=Path("runs/synthetic"), train=LoopConfig(batch_size=1024))


RECIPES: dict[str, Callable[[], TrainConfig]] = {"criteo_kaggle": criteo_kaggle, "synthetic": synthetic}
