"""DLRM_DCN by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.dlrm_dcn import DLRMDCNConfig
from tests.backbones.references import Case, affine, relu_mlp

CASES = {"dlrm_dcn": Case(config=DLRMDCNConfig(num_cross_layers=2, rank=3, hidden=(16, 8)), out_dim=8)}
REFUSED = [
    ({"num_cross_layers": 0}, "num_cross_layers is 0"),
    ({"rank": 0}, "rank is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: DLRMDCNConfig, x_FD: Tensor) -> Tensor:
    x0_K = x_K = torch.cat(list(x_FD))
    assert len(model.cross) == config.num_cross_layers
    for v, u in model.cross:
        assert v.weight.shape == (config.rank, len(x0_K))
        low = affine(v.weight, torch.zeros(config.rank), x_K)
        x_K = x0_K * affine(u.weight, u.bias, low) + x_K
    return relu_mlp(model.mlp, x_K)
