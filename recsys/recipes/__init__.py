"""Recipes: functions that return a complete TrainConfig."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recsys.backbones.dcnv2 import DCNv2Config
from recsys.members import BackboneConfigs, ModelConfig
from recsys.training.optim import OptimizerConfig
from recsys.training.config import LoopConfig, TrainConfig


def criteo_kaggle() -> TrainConfig:
    """Criteo Kaggle, a sample of some 100,000 rows: small steps, and one epoch, after which members overfit."""
    return TrainConfig(
        data=Path("data/criteo_kaggle"),
        out=Path("runs/criteo_kaggle"),
        model=ModelConfig(embedding_dim=16, head_hidden=(256,), init_scale=0.05),
        optimizer=OptimizerConfig(table_lr=0.1, dense_lr=1e-3, decay="linear"),
        train=LoopConfig(batch_size=64, log_every=200),
    )


def criteo_kaggle_full() -> TrainConfig:
    """Criteo Kaggle, all 45 million rows: batch and widths of the merging paper (2512.07650); not measured yet."""
    return TrainConfig(
        data=Path("data/criteo_kaggle_full"),
        out=Path("runs/criteo_kaggle_full"),
        model=ModelConfig(embedding_dim=16, head_hidden=(256,)),
        backbones=BackboneConfigs(dcnv2=DCNv2Config(hidden=(1024, 512, 256))),
        optimizer=OptimizerConfig(table_lr=0.05, dense_lr=1e-3, warmup_steps=500, decay="linear"),
        train=LoopConfig(batch_size=4096),
    )


def synthetic() -> TrainConfig:
    """A log of `recsys synth` with some 150,000 rows."""
    sample = criteo_kaggle()
    train = replace(sample.train, batch_size=128)
    return replace(sample, data=Path("data/synthetic"), out=Path("runs/synthetic"), train=train)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "criteo_kaggle": criteo_kaggle,
    "criteo_kaggle_full": criteo_kaggle_full,
    "synthetic": synthetic,
}
