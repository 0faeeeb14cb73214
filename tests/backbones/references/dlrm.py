"""DLRM by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.dlrm import DLRMConfig
from tests.backbones.references import Case, F, relu_mlp

CASES = {"dlrm": Case(config=DLRMConfig(hidden=(16, 8)), out_dim=8)}
REFUSED = [
    ({"hidden": ()}, "hidden is empty"),
    ({"hidden": (16, 0)}, "hidden is "),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: DLRMConfig, x_FD: Tensor) -> Tensor:
    dots = [sum(a * b for a, b in zip(x_FD[i], x_FD[j], strict=True)) for i in range(F) for j in range(i + 1, F)]
    assert len(dots) == F * (F - 1) // 2
    return relu_mlp(model.mlp, torch.stack([*x_FD[F - 1], *dots]))
