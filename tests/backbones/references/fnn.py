"""FNN by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.fnn import FNNConfig
from tests.backbones.references import Case, affine

CASES = {
    "fnn": Case(config=FNNConfig(hidden=(16, 8)), out_dim=8),
    "fnn_one_layer": Case(config=FNNConfig(hidden=(12,)), out_dim=12),
}
REFUSED = [
    ({"hidden": ()}, "hidden is empty"),
    ({"hidden": (0,)}, r"hidden is \(0,\)"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: FNNConfig, x_FD: Tensor) -> Tensor:
    x_K = torch.cat(list(x_FD))
    for n, width in enumerate(config.hidden):
        layer = model.mlp[3 * n]
        assert layer.weight.shape == (width, len(x_K))
        x_K = affine(layer.weight, layer.bias, x_K)
        x_K = torch.where(x_K > 0, x_K, torch.zeros_like(x_K))
    return x_K
