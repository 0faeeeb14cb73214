"""DLRM, the deep learning recommendation model (arXiv 1906.00091)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import check_sizes, deeper_mlp, linear_flops, mlp, wider_mlp


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """Sizes of a DLRM. The authors' one for Criteo Terabyte has hidden = (1024, 1024, 512, 256) and dim 128."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the top MLP, its last layer (to one logit) left out: that is the head."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, hidden=self.hidden)

    def ladder(self, k: float, along: Along = "width") -> Self:
        """Scale the top MLP's widths or layers; the interaction has no size of its own."""
        scale = wider_mlp if along == "width" else deeper_mlp
        return replace(self, hidden=scale(self.hidden, k))


_DEFAULT = DLRMConfig()


class DLRM(Backbone):
    """Inner products of all pairs of fields, beside the last field: h = MLP(concat(x_F, (x_i . x_j for i < j))).

    The last field is the one that dense columns make, already through the paper's bottom MLP. In a schema without
    dense columns it is a categorical field like the others, and stands beside the products all the same. Paper: arXiv
    1906.00091, section 2; no field is multiplied by itself, as in the authors' default.
    """

    Config: ClassVar[type] = DLRMConfig
    pairs: Tensor

    def __init__(self, num_fields: int, dim: int, config: DLRMConfig = _DEFAULT) -> None:
        super().__init__()
        self.num_fields, self.dim = num_fields, dim
        # Where the products i < j stand in the flattened matrix of all.
        i, j = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("pairs", i * num_fields + j, persistent=False)
        self.mlp = mlp(dim + len(self.pairs), config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        dots_BFF = torch.bmm(x_BFD, x_BFD.transpose(1, 2))
        dots_BK = dots_BFF.flatten(1).index_select(1, self.pairs)
        h_BO: Tensor = self.mlp(torch.cat([x_BFD[:, -1], dots_BK], dim=1))
        return h_BO

    def flops(self) -> int:
        """The products of all fields with all (half of them are used), and the MLP."""
        return 2 * self.num_fields**2 * self.dim + linear_flops(self.mlp)
