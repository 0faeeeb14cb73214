"""RankMixer by hand."""

import math
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.rankmixer import RankMixerConfig
from tests.backbones.references import Case, affine, layer_norm

# It pads: 30 values do not divide by 4 tokens.
CASES = {"rankmixer": Case(config=RankMixerConfig(num_tokens=4, token_dim=12), out_dim=12)}
REFUSED = [
    ({"num_tokens": 0}, "num_tokens is 0"),
    ({"token_dim": 0}, "token_dim is 0"),
    ({"token_dim": 60}, "token_dim is 60: .* num_tokens = 8, give 56 or 64"),
    ({"token_dim": 6}, "token_dim is 6: .* num_tokens = 8, give 8$"),
    ({"num_layers": 0}, "num_layers is 0"),
    ({"expansion": 0}, "expansion is 0"),
    ({"dropout": -0.1}, "dropout is -0.1"),
]


def row(model: Any, config: RankMixerConfig, x_FD: Tensor) -> Tensor:
    T, width = config.num_tokens, config.token_dim
    flat = [*x_FD.flatten(), *torch.zeros(2, dtype=x_FD.dtype)]
    chunk = len(flat) // T
    project = model.tokenize
    tokens = [
        affine(project.weight_TKN[t].T, project.bias_TN[t], torch.stack(flat[t * chunk : (t + 1) * chunk]))
        for t in range(T)
    ]
    for block in model.blocks:
        first, _, _, second = block.ffn
        head = width // T
        mixed = [torch.cat([tokens[t][h * head : (h + 1) * head] for t in range(T)]) for h in range(T)]
        s = [layer_norm(block.mix_norm, mixed[t] + tokens[t]) for t in range(T)]
        tokens = []
        for t in range(T):
            z = affine(first.weight_TKN[t].T, first.bias_TN[t], s[t])
            z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            tokens.append(
                layer_norm(block.ffn_norm, affine(second.weight_TKN[t].T, second.bias_TN[t], z) + s[t]),
            )
    return torch.stack(tokens).sum(0) / T
