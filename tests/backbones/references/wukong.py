"""Wukong by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.wukong import WukongConfig
from tests.backbones.references import Case, D, affine, layer_norm, relu_mlp

# The first projects its first residual, from 5 fields to 7 tokens; the second, which goes from 5 to 5, projects none.
CASES = {
    "wukong": Case(config=WukongConfig(num_fm=3, num_linear=4, fm_rank=2, hidden=(16,)), out_dim=7 * 6),
    "wukong_same": Case(config=WukongConfig(num_fm=3, num_linear=2, fm_rank=2, hidden=(16,)), out_dim=5 * 6),
}
REFUSED = [
    ({"num_layers": 0}, "num_layers is 0"),
    ({"num_fm": 0}, "num_fm is 0"),
    ({"num_linear": 0}, "num_linear is 0"),
    ({"fm_rank": 0}, "fm_rank is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.5}, "dropout is 1.5"),
]


def row(model: Any, config: WukongConfig, x_FD: Tensor) -> Tensor:
    tokens = list(x_FD)
    for layer in model.layers:
        n, y = len(tokens), layer.fm_weight_TK
        dots = [[sum(a * b for a, b in zip(tokens[i], tokens[j], strict=True)) for j in range(n)] for i in range(n)]
        fm = [sum(dots[i][j] * y[j, k] for j in range(n)) for i in range(n) for k in range(config.fm_rank)]
        norm, hidden, last = layer.fm_mlp
        flat_K = affine(last.weight, last.bias, relu_mlp(hidden, layer_norm(norm, torch.tensor(fm, dtype=x_FD.dtype))))
        out = [flat_K[i * D : (i + 1) * D] for i in range(config.num_fm)]
        out += [sum(w * token for w, token in zip(weights, tokens, strict=True)) for weights in layer.linear_weight]
        if n == len(out):
            assert layer.residual_weight is None
            residual = tokens
        else:
            residual = [sum(row[i] * tokens[i] for i in range(n)) for row in layer.residual_weight]
        tokens = [layer_norm(layer.norm, a + b) for a, b in zip(out, residual, strict=True)]
    return torch.cat(tokens)
