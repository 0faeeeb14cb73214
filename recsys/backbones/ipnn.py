"""IPNN, the inner product-based neural network (arXiv 1611.00144)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys.backbones.base import Backbone
from recsys.backbones.layers import MLP, MLPSizes, PairProducts, linear_flops


@dataclass(frozen=True, kw_only=True)
class IPNNConfig(MLPSizes):
    """Sizes of an IPNN."""


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
        self.mlp = MLP(num_fields * dim + len(self.products.pairs), config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(torch.cat([x_BFD.flatten(1), self.products(x_BFD)], dim=1))
        return h_BO

    def flops(self) -> int:
        """Products of all fields with all, and the MLP."""
        return self.products.flops() + linear_flops(self.mlp)
