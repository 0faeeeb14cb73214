"""RankMixer by hand."""

import math
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.rankmixer import RankMixerConfig
from tests.backbones.references import Case, affine, layer_norm

# It pads: 30 values do not divide by 4 tokens.
CASES = {
    "rankmixer": Case(config=RankMixerConfig(num_tokens=4, token_dim=12), out_dim=12),
    "rankmixer_experts": Case(
        config=RankMixerConfig(num_tokens=4, token_dim=12, expansion=2, num_experts=3), out_dim=12
    ),
}
REFUSED = [
    ({"num_tokens": 0}, "num_tokens is 0"),
    ({"token_dim": 0}, "token_dim is 0"),
    ({"token_dim": 60}, "token_dim is 60: .* num_tokens = 8, give 56 or 64"),
    ({"token_dim": 6}, "token_dim is 6: .* num_tokens = 8, give 8$"),
    ({"num_layers": 0}, "num_layers is 0"),
    ({"expansion": 0}, "expansion is 0"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"num_experts": 1}, "num_experts is 1: give 2 or more, or None"),
    ({"target_active": 0.0}, "target_active is 0.0"),
    ({"target_active": 1.5}, "target_active is 1.5"),
    ({"l1": -1.0}, "l1 is -1.0"),
    ({"dropout": -0.1}, "dropout is -0.1"),
]


def ffn(layers: Any, t: int, s_D: Tensor) -> Tensor:
    first, _, _, second = layers
    z = affine(first.weight_TKN[t].T, first.bias_TN[t], s_D)
    return affine(second.weight_TKN[t].T, second.bias_TN[t], z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))


def sparse_moe(moe: Any, config: RankMixerConfig, t: int, s_D: Tensor) -> Tensor:
    assert config.num_experts is not None
    gates = affine(moe.router.weight_TKN[t].T, moe.router.bias_TN[t], s_D).clamp(min=0)
    v_D = torch.zeros_like(s_D)
    for e in range(config.num_experts):
        v_D += gates[e] * ffn(moe.experts, t * config.num_experts + e, s_D)
    return v_D


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
        head = width // T
        mixed = [torch.cat([tokens[t][h * head : (h + 1) * head] for t in range(T)]) for h in range(T)]
        s = [layer_norm(block.mix_norm, mixed[t] + tokens[t]) for t in range(T)]
        if config.num_experts is None:
            out = [ffn(block.ffn, t, s[t]) for t in range(T)]
        else:
            out = [sparse_moe(block.ffn, config, t, s[t]) for t in range(T)]
        tokens = [layer_norm(block.ffn_norm, out[t] + s[t]) for t in range(T)]
    return torch.stack(tokens).sum(0) / T
