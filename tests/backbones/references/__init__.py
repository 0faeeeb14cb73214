"""What the references are made of: plain loops over one row, on lists of vectors."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

F, D = 5, 6
"""Fields and embedding dimension of every case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config that is small and shows one way through the backbone."""

    config: Any
    out_dim: int


def affine(weight_NK: Tensor, bias_N: Tensor, x_K: Tensor) -> Tensor:
    y_N = torch.zeros(len(weight_NK), dtype=x_K.dtype)
    for n in range(len(weight_NK)):
        y_N[n] = sum(weight_NK[n, k] * x_K[k] for k in range(len(x_K))) + bias_N[n]
    return y_N


def layer_norm(norm: nn.LayerNorm, x_D: Tensor) -> Tensor:
    values = x_D.tolist()
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    y_D: Tensor = norm.weight * (x_D - mean) / math.sqrt(variance + 1e-5) + norm.bias
    return y_D


def relu_mlp(layers: nn.Module, x_K: Tensor) -> Tensor:
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            x_K = affine(layer.weight, layer.bias, x_K).clamp(min=0)
    return x_K
