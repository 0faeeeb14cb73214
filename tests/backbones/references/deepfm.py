"""DeepFM by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.deepfm import DeepFMConfig
from tests.backbones.references import Case, relu_mlp

CASES = {"deepfm": Case(config=DeepFMConfig(hidden=(16, 8)), out_dim=2 + 8)}
REFUSED = [
    ({"hidden": ()}, "hidden is empty"),
    ({"hidden": (16, 0)}, "hidden is "),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: DeepFMConfig, x_FD: Tensor) -> Tensor:
    x_K = torch.cat(list(x_FD))
    (weight_K,) = model.first_order.weight
    first = sum(weight_K[k] * x_K[k] for k in range(len(x_K)))
    second = 0.0
    for j in range(len(x_FD)):
        for i in range(j):
            second += sum(a * b for a, b in zip(x_FD[i].tolist(), x_FD[j].tolist(), strict=True))
    return torch.cat([torch.tensor([first, second], dtype=x_FD.dtype), relu_mlp(model.mlp, x_K)])
