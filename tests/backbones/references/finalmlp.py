"""FinalMLP by hand."""

from typing import Any

import torch
from torch import Tensor

from recsys.backbones.finalmlp import FinalMLPConfig
from tests.backbones.references import Case, affine, relu_mlp

CASES = {
    "finalmlp": Case(
        config=FinalMLPConfig(hidden1=(16, 8), hidden2=(10, 12, 4), num_heads=2, gate_dim=7), out_dim=8 + 4 + 2
    ),
    "finalmlp_gated_by_fields": Case(
        config=FinalMLPConfig(
            hidden1=(16, 8), hidden2=(16, 8), num_heads=4, gate_dim=7, gate_fields1=(1,), gate_fields2=(1, 0)
        ),
        out_dim=8 + 8 + 4,
    ),
    "finalmlp_gated_both_ways": Case(
        config=FinalMLPConfig(hidden1=(16, 8), hidden2=(16, 8), num_heads=2, gate_dim=7, gate_fields2=(1,)),
        out_dim=8 + 8 + 2,
    ),
    "finalmlp_no_gate": Case(
        config=FinalMLPConfig(hidden1=(16, 8), hidden2=(16, 6), num_heads=1, gate_dim=None), out_dim=8 + 6 + 1
    ),
}
REFUSED = [
    ({"hidden1": ()}, "hidden1 is empty"),
    ({"hidden2": (16, 0)}, "hidden2 is "),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"num_heads": 3}, "hidden1 ends in 128: .* num_heads, such as 129"),
    ({"hidden2": (256, 12)}, "hidden2 ends in 12: .* num_heads, such as 16"),
    ({"gate_dim": 0}, "gate_dim is 0"),
    ({"gate_dim": None, "gate_fields2": (1,)}, "gate_fields need gates"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def row(model: Any, config: FinalMLPConfig, x_FD: Tensor) -> Tensor:
    outputs = []
    for stream, fields in ((model.stream1, config.gate_fields1), (model.stream2, config.gate_fields2)):
        gate, layers = stream
        x_K = torch.cat(list(x_FD))
        if config.gate_dim is not None:
            context_K = torch.cat([x_FD[field] for field in fields]) if fields else gate.context_D
            inner_N = affine(gate.inner.weight, gate.inner.bias, context_K).clamp(min=0)
            assert len(inner_N) == config.gate_dim
            logit_K = affine(gate.outer.weight, gate.outer.bias, inner_N)
            x_K = torch.stack([2 * x_K[k] / (1 + torch.exp(-logit_K[k])) for k in range(len(x_K))])
        outputs.append(relu_mlp(layers, x_K))
    one_K, two_N = outputs
    k, n = len(one_K) // config.num_heads, len(two_N) // config.num_heads
    fused = []
    for head in range(config.num_heads):
        weight = model.fusion_HKN[head]
        left, right = one_K[head * k : (head + 1) * k], two_N[head * n : (head + 1) * n]
        fused.append(sum(left[a] * weight[a, b] * right[b] for a in range(k) for b in range(n)))
    return torch.cat([one_K, two_N, torch.stack(fused)])
