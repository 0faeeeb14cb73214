"""DCNv2 by hand."""

import math
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.dcnv2 import DCNv2Config
from tests.backbones.references import Case, affine, relu_mlp

CASES = {
    "dcnv2": Case(config=DCNv2Config(hidden=(16, 8)), out_dim=30 + 8),
    "dcnv2_low_rank": Case(config=DCNv2Config(rank=3, num_cross_layers=2, hidden=(16, 8)), out_dim=30 + 8),
    "dcnv2_experts": Case(
        config=DCNv2Config(rank=3, num_experts=4, num_cross_layers=2, hidden=(16, 8)), out_dim=30 + 8
    ),
    "dcnv2_stacked": Case(config=DCNv2Config(structure="stacked", hidden=(16, 8)), out_dim=8),
}
REFUSED = [
    ({"num_cross_layers": 0}, "num_cross_layers is 0: give 1 or more"),
    ({"rank": 0}, "rank is 0"),
    ({"num_experts": 0, "rank": 4}, "num_experts is 0"),
    ({"num_experts": 2}, "num_experts is 2: .* give a rank"),
    ({"hidden": ()}, "hidden is empty"),
    ({"hidden": (16, -1)}, "hidden is "),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def experts(cross: Any, config: DCNv2Config, x0_K: Tensor, x_K: Tensor) -> Tensor:
    assert config.num_experts is not None
    assert cross.v_ERK.shape == cross.u_ERK.shape == (config.num_experts, config.rank, len(x0_K))
    zero = torch.zeros(len(x0_K))
    gates = [math.exp(g) for g in affine(cross.gate.weight, zero, x_K)]
    total = torch.zeros_like(x_K)
    for e in range(config.num_experts):
        low = torch.tanh(affine(cross.v_ERK[e], zero, x_K))
        low = torch.tanh(affine(cross.c_ERR[e], zero, low))
        total += gates[e] / sum(gates) * (x0_K * affine(cross.u_ERK[e].T, cross.bias_K, low))
    return total


def row(model: Any, config: DCNv2Config, x_FD: Tensor) -> Tensor:
    x0_K = x_K = torch.cat(list(x_FD))
    for cross in model.cross:
        if config.num_experts is not None:
            x_K = experts(cross, config, x0_K, x_K) + x_K
            continue
        if config.rank is None:
            y_K = affine(cross.weight, cross.bias, x_K)
        else:
            v, u = cross
            assert v.weight.shape == (config.rank, len(x0_K))
            y_K = affine(u.weight @ v.weight, u.bias, x_K)
        x_K = x0_K * y_K + x_K
    if config.structure == "stacked":
        return relu_mlp(model.mlp, x_K)
    return torch.cat([x_K, relu_mlp(model.mlp, x0_K)])
