"""GDCN, the gated deep and cross network (arXiv 2311.04635)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.cross import cross
from recsys.backbones.layers import MLP, check_sizes, deeper, deeper_mlp, linear, linear_flops, wider_mlp


@dataclass(frozen=True, kw_only=True)
class GDCNConfig:
    """Sizes of a GDCN."""

    num_cross_layers: int = 3
    """Gated cross layers; l of them cover feature interactions up to order l + 1."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    structure: Literal["parallel", "stacked"] = "parallel"
    """Whether the MLP stands beside the cross network (GDCN-P) or after it (GDCN-S)."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, num_cross_layers=self.num_cross_layers, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths, or cross layers and MLP layers; the cross layers are as wide as the fields."""
        if along == "width":
            return replace(self, hidden=wider_mlp(self.hidden, k))
        return replace(self, num_cross_layers=deeper(self.num_cross_layers, k), hidden=deeper_mlp(self.hidden, k))


_DEFAULT = GDCNConfig()


class GatedCrossWeight(nn.Module):
    """A(x) = (W_c x + b) * sigmoid(W_g x), x of K values; the gate has no bias."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.cross = linear(in_dim, in_dim)
        self.gate = linear(in_dim, in_dim, bias=False)

    def forward(self, x_BK: Tensor) -> Tensor:
        """Map x_l [B, K] to A(x_l) [B, K]."""
        a_BK: Tensor = self.cross(x_BK) * self.gate(x_BK).sigmoid()
        return a_BK


class GDCN(Backbone):
    """Gated cross network and MLP: x_{l+1} = x_0 * (W_c x_l + b_l) * sigmoid(W_g x_l) + x_l.

    x_0 are the K = F * D flattened fields. parallel: h = concat(x_L, MLP(x_0)), K + hidden[-1] wide. stacked:
    h = MLP(x_L), hidden[-1] wide. Paper: arXiv 2311.04635.
    """

    Config: ClassVar[type] = GDCNConfig

    def __init__(self, num_fields: int, dim: int, config: GDCNConfig = _DEFAULT) -> None:
        super().__init__()
        in_dim = num_fields * dim
        self.stacked = config.structure == "stacked"
        self.cross = nn.ModuleList(GatedCrossWeight(in_dim) for _ in range(config.num_cross_layers))
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
        return linear_flops(self)
