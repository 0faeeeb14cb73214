"""DCN by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.dcn import DCNConfig
from tests.backbones.references import Case, relu_mlp

# With one cross layer there is no c_l^T w_l; with four, biases of several layers meet later weights.
CASES = {
    "dcn": Case(config=DCNConfig(num_cross_layers=4, hidden=(16, 8)), out_dim=30 + 8),
    "dcn_one_layer": Case(config=DCNConfig(num_cross_layers=1, hidden=(16, 8)), out_dim=30 + 8),
}
REFUSED = [
    ({"num_cross_layers": 0}, "num_cross_layers is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: DCNConfig, x_FD: Tensor) -> Tensor:
    x0_K = x_K = torch.cat(list(x_FD))
    for layer in range(config.num_cross_layers):
        w_K, b_K = model.cross.weight[layer], model.bias_LK[layer]
        dot = sum(x_K[k] * w_K[k] for k in range(len(x_K)))
        x_K = x0_K * dot + b_K + x_K
    return torch.cat([x_K, relu_mlp(model.mlp, x0_K)])
