"""A member of every backbone trains among the others as it does alone."""

from pathlib import Path

import numpy as np
import pytest

from recsys.backbones import BACKBONES
from tests.distributed.jobs import Outcome, small_config, train_here

STEPS = 50
# Small, and with the ways through a backbone that its default does not take.
OPTIONS = {
    "dcnv2": "num_cross_layers=1,rank=4,num_experts=2,hidden=8",
    "rankmixer": "num_tokens=2,token_dim=8,num_layers=1,expansion=1,num_experts=2",
    "wukong": "num_layers=1,num_fm=2,num_linear=2,fm_rank=2,hidden=8",
    "finalmlp": "hidden1=8,hidden2=8,num_heads=2,gate_dim=4",
    "masknet": "block_dim=8,mask_dim=8",
    "autoint": "num_layers=1,num_heads=2,head_dim=4",
}
MEMBERS = tuple(f"{name}:{OPTIONS.get(name, 'hidden=8')}" for name in BACKBONES)


@pytest.fixture(scope="module")
def together(prepared: Path) -> Outcome:
    return train_here([small_config(prepared, members=MEMBERS, num_steps=STEPS)])[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_member_among_all_others_is_the_member_alone(name: str, prepared: Path, together: Outcome) -> None:
    index = list(BACKBONES).index(name)
    (alone,) = train_here([small_config(prepared, members=(MEMBERS[index],), num_steps=STEPS)])
    np.testing.assert_allclose(together.losses_SM[:, index], alone.losses_SM[:, 0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(together.logits_NM[:, index], alone.logits_NM[:, 0], atol=1e-3, rtol=0)
    losses = alone.losses_SM[:, 0]
    assert losses[-10:].mean() < losses[:10].mean()
