"""DCN V2, the deep and cross network with matrix weights (arXiv 2008.13535)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.cross import cross, cross_flops, cross_weight
from recsys.backbones.layers import MLP, check_sizes, deeper, deeper_mlp, linear_flops, wider, wider_mlp


@dataclass(frozen=True, kw_only=True)
class DCNv2Config:
    """Sizes of a DCNv2."""

    num_cross_layers: int = 3
    """Cross layers; l of them cover feature interactions up to order l + 1."""

    rank: int | None = None
    """Rank of the cross weights W = U V^T; None keeps W full. Saves work below half of num_fields * dim."""

    num_experts: int | None = None
    """Low-rank experts that a gate mixes in each cross layer, all of that rank; None or 1 is one weight, no gate."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    structure: Literal["parallel", "stacked"] = "parallel"
    """Whether the MLP stands beside the cross network (both read the fields) or after it."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(
            self.dropout,
            num_cross_layers=self.num_cross_layers,
            rank=self.rank,
            num_experts=self.num_experts,
            hidden=self.hidden,
        )
        if self.rank is None and self.num_experts not in (None, 1):
            raise ValueError(
                f"num_experts is {self.num_experts}: experts are low-rank, give a rank too, such as rank = 64"
            )

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths and the rank, or the layers of both; full cross weights are as wide as the fields."""
        if along == "width":
            rank = None if self.rank is None else wider(self.rank, k)
            return replace(self, rank=rank, hidden=wider_mlp(self.hidden, k))
        return replace(self, num_cross_layers=deeper(self.num_cross_layers, k), hidden=deeper_mlp(self.hidden, k))


_DEFAULT = DCNv2Config()


class DCNv2(Backbone):
    """Cross network and MLP: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with x_0 the K = F * D flattened fields.

    parallel: h = concat(x_L, MLP(x_0)), K + hidden[-1] wide. stacked: h = MLP(x_L), hidden[-1] wide.
    With a rank, W_l = U_l V_l^T; with several experts, W_l x_l is what `CrossExperts` says. Paper: arXiv 2008.13535,
    equations 1 to 5.
    """

    Config: ClassVar[type] = DCNv2Config

    def __init__(self, num_fields: int, dim: int, config: DCNv2Config = _DEFAULT) -> None:
        super().__init__()
        in_dim = num_fields * dim
        self.stacked = config.structure == "stacked"
        self.cross = nn.ModuleList(
            cross_weight(in_dim, config.rank, config.num_experts) for _ in range(config.num_cross_layers)
        )
        self.mlp = MLP(in_dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1] + (0 if self.stacked else in_dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x0_BK = x_BFD.flatten(1)
        x_BK = cross(x0_BK, self.cross)
        h_BO: Tensor = self.mlp(x_BK) if self.stacked else torch.cat([x_BK, self.mlp(x0_BK)], dim=1)
        return h_BO

    def flops(self) -> int:
        """Every weight is applied once."""
        return cross_flops(self.cross) + linear_flops(self.mlp)
