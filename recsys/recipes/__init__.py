"""Recipes: functions that return a complete TrainConfig."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recsys.config import InputError, load_file, nearest
from recsys.members import ModelConfig
from recsys.recipes.mlperf import mlperf_dlrm_dcnv2
from recsys.recipes.paper import avazu_paper, criteo_paper, kdd12_paper
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig


def criteo_kaggle() -> TrainConfig:
    """Criteo Kaggle, a sample of some 100,000 rows: small steps, and one epoch, after which members overfit."""
    return TrainConfig(
        data=Path("data/criteo_kaggle"),
        out=Path("runs/criteo_kaggle"),
        model=ModelConfig(embedding_dim=16, head_hidden=(256,), init_scale=0.05),
        optimizer=OptimizerConfig(table_lr=0.1, dense_lr=1e-3, decay="linear"),
        train=LoopConfig(batch_size=64, log_every=200),
    )


def synthetic() -> TrainConfig:
    """A log of `recsys synth` with some 150,000 rows."""
    sample = criteo_kaggle()
    train = replace(sample.train, batch_size=128)
    return replace(sample, data=Path("data/synthetic"), out=Path("runs/synthetic"), train=train)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "criteo_kaggle": criteo_kaggle,
    "synthetic": synthetic,
    "criteo_paper": criteo_paper,
    "avazu_paper": avazu_paper,
    "kdd12_paper": kdd12_paper,
    "mlperf_dlrm_dcnv2": mlperf_dlrm_dcnv2,
}


def find_recipe(name: str) -> TrainConfig:
    """The config that a recipe's name, a config file or `package.module:function` stands for.

    Raises:
        InputError: there is none, or it is no config.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith((".json", ".yaml", ".yml")):
        return load_file(TrainConfig, Path(name))
    if ":" in name:
        module, function = name.split(":", maxsplit=1)
        sys.path.insert(0, str(Path.cwd()))
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise InputError(f"recipe {name!r}: {error}") from None
        config = make()
        if not isinstance(config, TrainConfig):
            raise InputError(f"recipe {name!r} returns {type(config).__name__} instead of TrainConfig")
        return config
    raise InputError(
        f"unknown recipe {name!r}; {nearest(name, RECIPES)} (or a config file, or package.module:function)"
    )
