"""DeepFM, a factorization machine beside an MLP (arXiv 1703.04247)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys.backbones.base import Backbone
from recsys.backbones.layers import MLP, MLPSizes, linear, linear_flops


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig(MLPSizes):
    """Sizes of a DeepFM."""


_DEFAULT = DeepFMConfig()


class DeepFM(Backbone):
    """h = concat(<w, x>, sum_{i<j} <e_i, e_j>, MLP(x)), with x the flattened fields e_i; 2 + hidden[-1] wide.

    A linear head with weights (1, 1, w_MLP) gives the paper's sum of first order, second order and deep part. The
    paper's first order has one weight for each id; a backbone sees embeddings alone, so here it is a linear term of the
    flattened embeddings, without a bias, which the head has. Paper: arXiv 1703.04247, section 2.
    """

    Config: ClassVar[type] = DeepFMConfig

    def __init__(self, num_fields: int, dim: int, config: DeepFMConfig = _DEFAULT) -> None:
        super().__init__()
        self.first_order = linear(num_fields * dim, 1, bias=False)
        self.mlp = MLP(num_fields * dim, config.hidden, config.dropout)
        self.out_dim = 2 + config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x_BK = x_BFD.flatten(1)
        # All pairs at once: sum_{i<j} <e_i, e_j> = (|sum_i e_i|^2 - sum_i |e_i|^2) / 2.
        # A small difference of large sums: never of bf16.
        wide_BFD = x_BFD.to(torch.promote_types(x_BFD.dtype, torch.float32))
        second_B = (wide_BFD.sum(dim=1).square().sum(dim=1) - wide_BFD.square().sum(dim=(1, 2))) / 2
        return torch.cat([self.first_order(x_BK), second_B.unsqueeze(1), self.mlp(x_BK)], dim=1)

    def flops(self) -> int:
        """Every weight is applied once; the factorization machine is elementwise work."""
        return linear_flops(self)
