"""Recipes: functions that return a complete TrainConfig."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recsys.config import InputError, load_file, nearest
from recsys.members import ModelConfig
from recsys.own_code import blamed_on_its_line, find_own, place_of
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
        return _own_recipe(name)
    raise InputError(
        f"unknown recipe {name!r}; {nearest(name, RECIPES)} (or a config file, or package.module:function)"
    )


def _own_recipe(name: str) -> TrainConfig:
    where = f"recipe {name!r}"
    make = find_own(name, where)
    if not callable(make):
        raise InputError(f"{where} is {type(make).__name__}, not a function that returns a TrainConfig")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise InputError(f"{where}: {place_of(make)}: {error}; a recipe is called without arguments") from None
    with blamed_on_its_line(where):
        config = make()
    if not isinstance(config, TrainConfig):
        raise InputError(f"{where}: {place_of(make)}: returns {type(config).__name__} instead of TrainConfig")
    return config
