"""DLRM, the deep learning recommendation model (arXiv 1906.00091)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys.backbones.base import Backbone
from recsys.backbones.layers import MLP, MLPSizes, PairProducts, linear_flops


@dataclass(frozen=True, kw_only=True)
class DLRMConfig(MLPSizes):
    """Sizes of a DLRM. The authors' one for Criteo Terabyte has hidden = (1024, 1024, 512, 256) and dim 128."""


_DEFAULT = DLRMConfig()


class DLRM(Backbone):
    """Inner products of all pairs of fields, beside the last field: h = MLP(concat(x_F, (x_i . x_j for i < j))).

    The last field is the one that dense columns make, already through the paper's bottom MLP. In a schema without
    dense columns it is a categorical field like the others, and stands beside the products all the same. Paper: arXiv
    1906.00091, section 2; no field is multiplied by itself, as in the authors' default.
    """

    Config: ClassVar[type] = DLRMConfig

    def __init__(self, num_fields: int, dim: int, config: DLRMConfig = _DEFAULT) -> None:
        super().__init__()
        self.products = PairProducts(num_fields, dim)
        self.mlp = MLP(dim + len(self.products.pairs), config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(torch.cat([x_BFD[:, -1], self.products(x_BFD)], dim=1))
        return h_BO

    def flops(self) -> int:
        """Products of all fields with all, and the MLP."""
        return self.products.flops() + linear_flops(self.mlp)
