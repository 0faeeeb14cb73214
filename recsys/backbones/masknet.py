"""MaskNet, blocks that multiply features by instance-guided masks (arXiv 2102.07619)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import MLP, Dropout, check_sizes, deeper, deeper_mlp, linear_flops, wider, wider_mlp


@dataclass(frozen=True, kw_only=True)
class MaskNetConfig:
    """Sizes of a MaskNet."""

    structure: Literal["parallel", "serial"] = "parallel"
    """Whether the blocks all read the fields, with an MLP over them, or each reads the one before, without MLP."""

    num_blocks: int = 3
    """Mask blocks."""

    block_dim: int = 128
    """Width of a block's output."""

    mask_dim: int = 256
    """Hidden width of a mask's MLP (the paper's aggregation layer)."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP over parallel blocks."""

    dropout: float = 0.0
    """Share of each block's outputs and each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(
            self.dropout,
            num_blocks=self.num_blocks,
            block_dim=self.block_dim,
            mask_dim=self.mask_dim,
            hidden=self.hidden,
        )

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the widths of blocks, masks and MLP, or blocks and MLP layers."""
        if along == "depth":
            return replace(self, num_blocks=deeper(self.num_blocks, k), hidden=deeper_mlp(self.hidden, k))
        block_dim, mask_dim = wider(self.block_dim, k), wider(self.mask_dim, k)
        return replace(self, block_dim=block_dim, mask_dim=mask_dim, hidden=wider_mlp(self.hidden, k))


_DEFAULT = MaskNetConfig()


class MaskBlocks(nn.Module):
    """P mask blocks side by side, y_p = relu(LN(W_p (mask_p * v))), mask_p = U_p relu(V_p x + a_p) + c_p.

    x are the flattened embeddings; v is what is masked. LN is over a block's output alone. All V_p are one matmul.
    """

    def __init__(self, num_blocks: int, x_dim: int, in_dim: int, config: MaskNetConfig) -> None:
        super().__init__()
        self.mask_in_PNX = _xavier(num_blocks, config.mask_dim, x_dim)
        self.mask_in_bias_PN = nn.Parameter(torch.zeros(num_blocks, config.mask_dim))
        self.mask_out_PNK = _xavier(num_blocks, config.mask_dim, in_dim)
        self.mask_out_bias_PK = nn.Parameter(torch.zeros(num_blocks, in_dim))
        self.weight_PKO = _xavier(num_blocks, in_dim, config.block_dim)
        self.norm_weight_PO = nn.Parameter(torch.ones(num_blocks, config.block_dim))
        self.norm_bias_PO = nn.Parameter(torch.zeros(num_blocks, config.block_dim))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BX: Tensor, v_BK: Tensor) -> Tensor:
        """Map x [B, x_dim] and v [B, in_dim] to [B, P * block_dim]."""
        inner_BS = functional.linear(x_BX, self.mask_in_PNX.flatten(0, 1), self.mask_in_bias_PN.flatten()).relu()
        inner_PBN = inner_BS.reshape(-1, *self.mask_in_bias_PN.shape).transpose(0, 1)
        mask_PBK = torch.baddbmm(self.mask_out_bias_PK.unsqueeze(1), inner_PBN, self.mask_out_PNK)
        y_BPO = ((mask_PBK * v_BK) @ self.weight_PKO).transpose(0, 1)
        y_BPO = torch.addcmul(self.norm_bias_PO, self.norm_weight_PO, functional.layer_norm(y_BPO, y_BPO.shape[2:]))
        return torch.relu(self.dropout(y_BPO)).flatten(1)


class MaskNet(Backbone):
    """Mask blocks over v_0, the fields' embeddings each layer-normed over D with a gain and a bias of its own.

    parallel: h = MLP(concat_p y_p), all y_p of v_0; hidden[-1] wide. serial: h = y_L, each y_l of y_{l-1}, the first of
    v_0; block_dim wide. See `MaskBlocks`. Paper: arXiv 2102.07619, section 3.
    """

    Config: ClassVar[type] = MaskNetConfig

    def __init__(self, num_fields: int, dim: int, config: MaskNetConfig = _DEFAULT) -> None:
        super().__init__()
        parallel, in_dim = config.structure == "parallel", num_fields * dim
        self.norm_weight_FD = nn.Parameter(torch.ones(num_fields, dim))
        self.norm_bias_FD = nn.Parameter(torch.zeros(num_fields, dim))
        side, depth = (config.num_blocks, 1) if parallel else (1, config.num_blocks)
        widths = [in_dim] + [config.block_dim] * (depth - 1)
        self.blocks = nn.ModuleList(MaskBlocks(side, in_dim, width, config) for width in widths)
        all_dim = config.num_blocks * config.block_dim
        self.mlp = MLP(all_dim, config.hidden, config.dropout) if parallel else nn.Identity()
        self.out_dim = config.hidden[-1] if parallel else config.block_dim

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        normed_BFD = functional.layer_norm(x_BFD, x_BFD.shape[2:])
        v_BK = torch.addcmul(self.norm_bias_FD, self.norm_weight_FD, normed_BFD).flatten(1)
        for blocks in self.blocks:
            v_BK = blocks(x_BFD.flatten(1), v_BK)
        h_BO: Tensor = self.mlp(v_BK)
        return h_BO

    def flops(self) -> int:
        """Every matrix is applied once; those of blocks are three-dimensional."""
        return linear_flops(self) + sum(2 * weight.numel() for weight in self.blocks.parameters() if weight.dim() == 3)


def _xavier(num_blocks: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.stack([nn.init.xavier_uniform_(torch.empty(shape)) for _ in range(num_blocks)]))
