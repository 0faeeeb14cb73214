"""IPNN by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.ipnn import IPNNConfig
from tests.backbones.references import Case, relu_mlp

CASES = {"ipnn": Case(config=IPNNConfig(hidden=(16, 8)), out_dim=8)}
REFUSED = [
    ({"hidden": ()}, "hidden is empty"),
    ({"hidden": (16, 0)}, "hidden is "),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: IPNNConfig, x_FD: Tensor) -> Tensor:
    values = x_FD.flatten().tolist()
    # Pairs in the order (0, 1), (0, 2), ..., (1, 2), ...
    for i in range(len(x_FD)):
        for j in range(i + 1, len(x_FD)):
            values.append(sum(a * b for a, b in zip(x_FD[i].tolist(), x_FD[j].tolist(), strict=True)))
    return relu_mlp(model.mlp, torch.tensor(values, dtype=x_FD.dtype))
