"""DLRM_DCN, the recommendation model of MLPerf (v3.0 and later): DLRM with a low-rank DCN V2 for its interaction."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.cross import cross, cross_flops, cross_weight
from recsys.backbones.layers import MLP, check_sizes, deeper, deeper_mlp, linear_flops, wider, wider_mlp


@dataclass(frozen=True, kw_only=True)
class DLRMDCNConfig:
    """Sizes of a DLRM_DCN. MLPerf's: num_cross_layers = 3, rank = 512, hidden = (1024, 1024, 512, 256) and dim 128."""

    num_cross_layers: int = 3
    """Cross layers; l of them cover feature interactions up to order l + 1."""

    rank: int = 64
    """Rank of the cross weights W = U V^T. Saves work below half of num_fields * dim."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the over-arch, its last layer (to one logit) left out: that is the head."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, num_cross_layers=self.num_cross_layers, rank=self.rank, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the rank and the over-arch's widths, or the layers of both."""
        if along == "width":
            return replace(self, rank=wider(self.rank, k), hidden=wider_mlp(self.hidden, k))
        return replace(self, num_cross_layers=deeper(self.num_cross_layers, k), hidden=deeper_mlp(self.hidden, k))


_DEFAULT = DLRMDCNConfig()


class DLRMDCN(Backbone):
    """Cross network, then MLP: x_{l+1} = x_0 * (U_l (V_l^T x_l) + b_l) + x_l and h = MLP(x_L).

    x_0 are the K = F * D flattened fields; the one that dense columns make is already through MLPerf's bottom MLP. It
    is what a stacked `DCNv2` with a rank computes, with the benchmark's name and sizes. Papers: arXiv 2008.13535 and
    1906.00091.
    """

    Config: ClassVar[type] = DLRMDCNConfig

    def __init__(self, num_fields: int, dim: int, config: DLRMDCNConfig = _DEFAULT) -> None:
        super().__init__()
        in_dim = num_fields * dim
        self.cross = nn.ModuleList(cross_weight(in_dim, config.rank) for _ in range(config.num_cross_layers))
        self.mlp = MLP(in_dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(cross(x_BFD.flatten(1), self.cross))
        return h_BO

    def flops(self) -> int:
        """Every weight is applied once."""
        return cross_flops(self.cross) + linear_flops(self.mlp)
