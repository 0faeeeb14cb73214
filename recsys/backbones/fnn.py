"""FNN, an MLP over the concatenated embeddings (arXiv 1601.02376)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import check_sizes, deeper_mlp, linear_flops, mlp, wider_mlp


@dataclass(frozen=True, kw_only=True)
class FNNConfig:
    """Sizes of an FNN."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths, or its layers."""
        return replace(self, hidden=wider_mlp(self.hidden, k) if along == "width" else deeper_mlp(self.hidden, k))


_DEFAULT = FNNConfig()


class FNN(Backbone):
    """h = MLP(x), with x the flattened fields; hidden[-1] wide.

    Activations are ReLU, where the paper has tanh, and the tables are not pretrained by a factorization machine: the
    usual form of this baseline, also called DNN. Paper: arXiv 1601.02376.
    """

    Config: ClassVar[type] = FNNConfig

    def __init__(self, num_fields: int, dim: int, config: FNNConfig = _DEFAULT) -> None:
        super().__init__()
        self.mlp = mlp(num_fields * dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(x_BFD.flatten(1))
        return h_BO

    def flops(self) -> int:
        """Every weight is applied once."""
        return linear_flops(self)
