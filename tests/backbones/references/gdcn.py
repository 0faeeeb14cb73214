"""GDCN by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.gdcn import GDCNConfig
from tests.backbones.references import Case, affine, relu_mlp

CASES = {
    "gdcn": Case(config=GDCNConfig(num_cross_layers=2, hidden=(16, 8)), out_dim=30 + 8),
    "gdcn_stacked": Case(config=GDCNConfig(structure="stacked", hidden=(16, 8)), out_dim=8),
}
REFUSED = [
    ({"num_cross_layers": 0}, "num_cross_layers is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: GDCNConfig, x_FD: Tensor) -> Tensor:
    x0_K = x_K = torch.cat(list(x_FD))
    assert len(model.cross) == config.num_cross_layers
    for layer in model.cross:
        gate_K = 1 / (1 + torch.exp(-affine(layer.gate.weight, torch.zeros(len(x0_K)), x_K)))
        x_K = x0_K * affine(layer.cross.weight, layer.cross.bias, x_K) * gate_K + x_K
    if config.structure == "stacked":
        return relu_mlp(model.mlp, x_K)
    return torch.cat([x_K, relu_mlp(model.mlp, x0_K)])
