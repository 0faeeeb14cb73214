"""DCN V2, the deep and cross network with matrix weights (arXiv 2008.13535)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import check_sizes, deeper, deeper_mlp, linear, linear_flops, mlp, wider_mlp


@dataclass(frozen=True, kw_only=True)
class DCNv2Config:
    """Sizes of a DCNv2."""

    num_cross_layers: int = 3
    """Cross layers; l of them cover feature interactions up to order l + 1."""

    rank: int | None = None
    """Rank of the cross weights W = U V^T; None keeps W full. Saves work below half of num_fields * dim."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    structure: Literal["parallel", "stacked"] = "parallel"
    """Whether the MLP stands beside the cross network (both read the fields) or after it."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, num_cross_layers=self.num_cross_layers, rank=self.rank, hidden=self.hidden)

    def ladder(self, k: float, along: Along = "width") -> Self:
        """Scale the MLP's widths, or cross layers and MLP layers; the cross layers are as wide as the fields."""
        if along == "width":
            return replace(self, hidden=wider_mlp(self.hidden, k))
        return replace(self, num_cross_layers=deeper(self.num_cross_layers, k), hidden=deeper_mlp(self.hidden, k))


_DEFAULT = DCNv2Config()


class DCNv2(Backbone):
    """Cross network and MLP: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with x_0 the K = F * D flattened fields.

    parallel: h = concat(x_L, MLP(x_0)), K + hidden[-1] wide. stacked: h = MLP(x_L), hidden[-1] wide.
    With a rank, W_l = U_l V_l^T. Paper: arXiv 2008.13535, equations 1 and 2.
    """

    Config: ClassVar[type] = DCNv2Config

    def __init__(self, num_fields: int, dim: int, config: DCNv2Config = _DEFAULT) -> None:
        super().__init__()
        in_dim = num_fields * dim
        self.stacked = config.structure == "stacked"
        self.cross = nn.ModuleList(_cross_weight(in_dim, config.rank) for _ in range(config.num_cross_layers))
        self.mlp = mlp(in_dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1] + (0 if self.stacked else in_dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x0_BK = x_BK = x_BFD.flatten(1)
        for weight in self.cross:
            x_BK = x0_BK * weight(x_BK) + x_BK
        h_BO: Tensor = self.mlp(x_BK) if self.stacked else torch.cat([x_BK, self.mlp(x0_BK)], dim=1)
        return h_BO

    def flops(self) -> int:
        """Every weight is applied once."""
        return linear_flops(self)


def _cross_weight(in_dim: int, rank: int | None) -> nn.Module:
    """Make the affine part of a cross layer, W x + b or U (V^T x) + b."""
    if rank is None:
        return linear(in_dim, in_dim)
    return nn.Sequential(linear(in_dim, rank, bias=False), linear(rank, in_dim))
