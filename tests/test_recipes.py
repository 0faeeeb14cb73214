"""Recipes are whole, and those of the merging paper train all eight backbones on the logs that they are for."""

import dataclasses
import inspect
import os
import re
from pathlib import Path

import pytest
import torch

from recsys.config import dump, load
from recsys.data.prepare import prepare
from recsys.data.schema import Schema
from recsys.data.settings import PrepareConfig
from recsys.distributed import process_group
from recsys.model import RecModel
from recsys.recipes import RECIPES
from recsys.recipes.paper import EIGHT, HIDDEN, SIZES
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer

PAPER = [name for name in RECIPES if name.endswith("_paper")]
LOGS = {"criteo_paper": "criteo_kaggle_137k.txt.gz", "avazu_paper": "avazu_14k.csv.gz"}
FIELDS = {"criteo_paper": 39, "avazu_paper": 24}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_saved_and_read_back(name: str) -> None:
    config = RECIPES[name]()
    assert load(TrainConfig, dump(config), name) == config
    assert RECIPES[name].__doc__


def test_the_paper_has_three_datasets_and_eight_backbones() -> None:
    assert len(PAPER) == 3
    for name in PAPER:
        config = RECIPES[name]()
        assert [spec.backbone for spec in config.specs()] == list(EIGHT)
        assert (config.model.embedding_dim, config.train.batch_size) == (16, 4096)
        # A group is named by --members, and keeps the sizes.
        group = dataclasses.replace(config, members=("dcnv2*2", "finalmlp")).specs()
        assert [spec.sizes for spec in group] == [SIZES.dcnv2, SIZES.dcnv2, SIZES.finalmlp]
    assert SIZES.dcnv2.hidden == HIDDEN == (1024, 512, 256)


def test_the_eight_cost_alike() -> None:
    schema = Schema(name="x", dense=(), sparse={f"C{i}": 10 for i in range(39)}, labels=("label",))
    members = RecModel(schema, RECIPES["criteo_paper"]().specs()).members
    flops = {spec.name: m.backbone.flops() for spec, m in zip(RECIPES["criteo_paper"]().specs(), members, strict=True)}
    assert max(flops.values()) < 8 * min(flops.values()), flops


@pytest.mark.parametrize("name", LOGS)
def test_paper_recipes_train_on_real_logs(name: str, tmp_path: Path) -> None:
    if "RECSYS_REAL_DATA" not in os.environ:
        pytest.skip(f"RECSYS_REAL_DATA names no folder that holds {LOGS[name]}")
    doc = inspect.getdoc(RECIPES[name]) or ""
    (command,) = re.findall(r"`recsys prepare (\w+) FILE (.*?)`", doc)
    options = dict(zip(command[1].split()[0::2], command[1].split()[1::2], strict=True))
    data = tmp_path / "data"
    prepare(
        PrepareConfig(
            format=command[0],
            paths=(Path(os.environ["RECSYS_REAL_DATA"]) / LOGS[name],),
            out=data,
            integers=options.get("--integers", "log1p"),
            threshold=int(options["--threshold"]),
        )
    )
    assert Schema.load(data).num_fields == FIELDS[name]
    config = RECIPES[name]()
    loop = dataclasses.replace(config.train, batch_size=128, num_steps=3)
    with process_group() as world:
        torch.set_num_threads(1)
        metrics = Trainer(dataclasses.replace(config, data=data, out=tmp_path / "run", train=loop), world).train()
    assert metrics is not None
    assert set(metrics) == {*EIGHT, "merged"}
