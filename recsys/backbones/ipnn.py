"""IPNN, the inner product-based neural network (arXiv 1611.00144)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import check_sizes, deeper_mlp, linear_flops, mlp, wider_mlp


@dataclass(frozen=True, kw_only=True)
class IPNNConfig:
    """Sizes of an IPNN."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, hidden=self.hidden)

    def ladder(self, k: float, along: Along = "width") -> Self:
        """Scale the MLP's widths, or its layers; the products are as many as the pairs of fields."""
        return replace(self, hidden=wider_mlp(self.hidden, k) if along == "width" else deeper_mlp(self.hidden, k))


_DEFAULT = IPNNConfig()


class IPNN(Backbone):
    """h = MLP(concat(x, <e_i, e_j> for i < j)), with x the flattened fields e_i; hidden[-1] wide.

    Every product has its own weight in the MLP's first layer, which the paper offers to factorise. A field's product
    with itself is left out, as in the usual implementations. Paper: arXiv 1611.00144, section III.
    """

    Config: ClassVar[type] = IPNNConfig
    pairs: Tensor

    def __init__(self, num_fields: int, dim: int, config: IPNNConfig = _DEFAULT) -> None:
        super().__init__()
        self.num_fields, self.dim = num_fields, dim
        # Where the products i < j stand in the flattened matrix of all.
        i, j = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("pairs", i * num_fields + j, persistent=False)
        self.mlp = mlp(num_fields * dim + len(self.pairs), config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        products_BFF = x_BFD @ x_BFD.transpose(1, 2)
        products_BN = products_BFF.flatten(1).index_select(1, self.pairs)
        h_BO: Tensor = self.mlp(torch.cat([x_BFD.flatten(1), products_BN], dim=1))
        return h_BO

    def flops(self) -> int:
        """All F * F products, of which less than half are used, and the MLP."""
        return 2 * self.num_fields**2 * self.dim + linear_flops(self)
