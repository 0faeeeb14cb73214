"""AutoInt by hand."""

import math
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.autoint import AutoIntConfig
from tests.backbones.references import Case, affine, relu_mlp

CASES = {
    "autoint": Case(config=AutoIntConfig(num_layers=2, num_heads=3, head_dim=4), out_dim=5 * 12),
    "autoint_plus": Case(
        config=AutoIntConfig(num_layers=1, num_heads=1, head_dim=4, scale=True, hidden=(16, 8)), out_dim=5 * 4 + 8
    ),
}
REFUSED = [
    ({"num_layers": 0}, "num_layers is 0"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: AutoIntConfig, x_FD: Tensor) -> Tensor:
    fields = list(x_FD)
    for layer in model.layers:
        zero_N = torch.zeros(config.num_heads * config.head_dim, dtype=x_FD.dtype)
        queries, keys, values, residuals = (
            [affine(weight, zero_N, field) for field in fields] for weight in layer.weight_NK.chunk(4)
        )
        new = []
        for i in range(len(fields)):
            heads = []
            for h in range(config.num_heads):
                part = slice(h * config.head_dim, (h + 1) * config.head_dim)
                scores = [float(queries[i][part] @ keys[j][part]) for j in range(len(fields))]
                if config.scale:
                    scores = [score / math.sqrt(config.head_dim) for score in scores]
                weights = [math.exp(score) for score in scores]
                mixed = [w / sum(weights) * value[part] for w, value in zip(weights, values, strict=True)]
                heads.append(torch.stack(mixed).sum(0))
            new.append((torch.cat(heads) + residuals[i]).clamp(min=0))
        fields = new
    if config.hidden is None:
        return torch.cat(fields)
    return torch.cat([*fields, relu_mlp(model.mlp, torch.cat(list(x_FD)))])
