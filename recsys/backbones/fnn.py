"""FNN, an MLP over the concatenated embeddings (arXiv 1601.02376)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recsys.backbones.base import Backbone
from recsys.backbones.layers import MLP, MLPSizes, linear_flops


@dataclass(frozen=True, kw_only=True)
class FNNConfig(MLPSizes):
    """Sizes of an FNN."""


_DEFAULT = FNNConfig()


class FNN(Backbone):
    """h = MLP(x), with x the flattened fields; hidden[-1] wide.

    Activations are ReLU, where the paper has tanh, and the tables are not pretrained by a factorization machine: the
    usual form of this baseline, also called DNN. Paper: arXiv 1601.02376.
    """

    Config: ClassVar[type] = FNNConfig

    def __init__(self, num_fields: int, dim: int, config: FNNConfig = _DEFAULT) -> None:
        super().__init__()
        self.mlp = MLP(num_fields * dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.mlp(x_BFD.flatten(1))
        return h_BO

    def flops(self) -> int:
        """Every weight is applied once."""
        return linear_flops(self)
