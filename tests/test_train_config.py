"""The config of a run: what it refuses, and what a resumed run may do otherwise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recsys.backbones.dcnv2 import DCNv2Config
from recsys.config import InputError
from recsys.members import BackboneConfigs, ModelConfig
from recsys.recipes import criteo_kaggle
from recsys.training.config import LoopConfig, check_same_job

CONFIG = criteo_kaggle()
LOOP = CONFIG.train


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"seed": 7}, "seed 7, the run has 0"),
        (
            {"members": ("dcnv2", "wukong:width=2")},
            "members dcnv2 wukong:width=2, the run has dcnv2 wukong rankmixer",
        ),
        ({"model": replace(CONFIG.model, embedding_dim=32)}, "model.embedding_dim 32, the run has 16"),
        (
            {"backbones": BackboneConfigs(dcnv2=DCNv2Config(rank=4)), "train": replace(LOOP, batch_size=32)},
            "backbones.dcnv2.rank 4, the run has None; train.batch_size 32, the run has 64",
        ),
        ({"model": ModelConfig(embedding_dim=16, head_hidden=(256,))}, "model.init_scale 0.01, the run has 0.05"),
        ({"loader": replace(CONFIG.loader, seed=3)}, "loader.seed 3, the run has 0"),
    ],
)
def test_what_makes_another_run_is_named_with_both_values_and_nothing_else(
    changes: dict[str, Any], differs: str
) -> None:
    now = replace(CONFIG, **changes)
    with pytest.raises(InputError) as caught:
        check_same_job(CONFIG, now)
    expected = f"{CONFIG.out}: cannot go on with {differs}; name another --out to start a new run"
    assert str(caught.value) == expected


def test_a_run_goes_on_elsewhere_longer_and_otherwise_computed() -> None:
    now = replace(
        CONFIG,
        data=Path("elsewhere"),
        out=Path("copy"),
        model=replace(CONFIG.model, batched="on"),
        loader=replace(CONFIG.loader, workers=7),
        train=replace(LOOP, num_epochs=9, log_every=1),
    )
    check_same_job(CONFIG, now)


@pytest.mark.parametrize(("accumulate", "num_ranks", "works"), [(512, 1, True), (513, 1, False), (128, 4, True)])
def test_every_part_of_a_batch_has_rows(accumulate: int, num_ranks: int, works: bool) -> None:
    if works:
        LoopConfig(batch_size=512, accumulate=accumulate).check_parts(num_ranks)
        return
    with pytest.raises(ValueError, match=r"^accumulate 513: a rank has 512 rows of a batch of 512; at most as many"):
        LoopConfig(batch_size=512, accumulate=accumulate)


def test_ranks_share_the_rows_that_parts_are_made_of() -> None:
    loop = LoopConfig(batch_size=512, accumulate=200)
    with pytest.raises(InputError, match=r"accumulate 200: a rank has 128 rows of a batch of 512 on 4 ranks; at most"):
        loop.check_parts(4)
