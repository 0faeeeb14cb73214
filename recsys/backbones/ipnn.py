"""IPNN, the inner product-based neural network (arXiv 1611.00144)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import PairProducts, check_sizes, deeper_mlp, linear_flops, mlp, wider_mlp


@dataclass(frozen=True, kw_only=True)
class IPNNConfig:
    """Sizes of an IPNN."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths, or its layers; the products are as many as the pairs of fields."""
        return replace(self, hidden=wider_mlp(self.hidden, k) if along == "width" else deeper_mlp(self.hidden, k))


_DEFAULT = IPNNConfig()


class IPNN(Backbone):
    """h = MLP(concat(x, <e_i, e_j> for i < j)), with x the flattened fields e_i; hidden[-1] wide.

    Every product has its own weight in the MLP's first layer, which the paper offers to factorise. A field's product
    with itself is left out, as in the usual implementations. Paper: arXiv 1611.00144, section III.
    """

    Config: ClassVar[type] = IPNNConfig

    def __init__(self, num_fields: int, dim: int, config: IPNNConfig = _DEFAULT) -> None:
        super().__init__()
        self.products = PairProducts(num_fields, dim)
        self.mlp = mlp(num_fields * dim + len(self.products.pairs), config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(torch.cat([x_BFD.flatten(1), self.products(x_BFD)], dim=1))
        return h_BO

    def flops(self) -> int:
        """Products of all fields with all, and the MLP."""
        return self.products.flops() + linear_flops(self.mlp)
