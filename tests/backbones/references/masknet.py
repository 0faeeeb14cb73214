"""MaskNet by hand."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.masknet import MaskNetConfig
from tests.backbones.references import Case, affine, layer_norm, relu_mlp

CASES = {
    "masknet": Case(config=MaskNetConfig(num_blocks=3, block_dim=10, mask_dim=12, hidden=(16, 8)), out_dim=8),
    "masknet_one_block": Case(config=MaskNetConfig(num_blocks=1, block_dim=10, mask_dim=12, hidden=(16,)), out_dim=16),
    "masknet_serial": Case(
        config=MaskNetConfig(structure="serial", num_blocks=3, block_dim=10, mask_dim=12), out_dim=10
    ),
}
REFUSED = [
    ({"num_blocks": 0}, "num_blocks is 0"),
    ({"block_dim": 0}, "block_dim is 0"),
    ({"mask_dim": 0}, "mask_dim is 0"),
    ({"hidden": ()}, "hidden is empty"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


def mask_block(blocks: Any, p: int, x_K: Tensor, v_K: Tensor) -> Tensor:
    inner_N = affine(blocks.mask_in_PNX[p], blocks.mask_in_bias_PN[p], x_K).clamp(min=0)
    mask_K = affine(blocks.mask_out_PNK[p].T, blocks.mask_out_bias_PK[p], inner_N)
    weight_OK = blocks.weight_PKO[p].T
    y_O = affine(weight_OK, torch.zeros(len(weight_OK)), torch.stack([m * v for m, v in zip(mask_K, v_K, strict=True)]))
    norm: Any = SimpleNamespace(weight=blocks.norm_weight_PO[p], bias=blocks.norm_bias_PO[p])
    return layer_norm(norm, y_O).clamp(min=0)


def row(model: Any, config: MaskNetConfig, x_FD: Tensor) -> Tensor:
    normed = []
    for field, x_D in enumerate(x_FD):
        norm: Any = SimpleNamespace(weight=model.norm_weight_FD[field], bias=model.norm_bias_FD[field])
        normed.append(layer_norm(norm, x_D))
    x_K, v_K = torch.cat(list(x_FD)), torch.cat(normed)
    if config.structure == "parallel":
        (blocks,) = model.blocks
        return relu_mlp(model.mlp, torch.cat([mask_block(blocks, p, x_K, v_K) for p in range(config.num_blocks)]))
    assert len(model.blocks) == config.num_blocks
    for blocks in model.blocks:
        v_K = mask_block(blocks, 0, x_K, v_K)
    return v_K
