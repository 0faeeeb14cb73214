"""DCN, the deep and cross network with vector weights (arXiv 1708.05123)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import MLP, check_sizes, deeper, deeper_mlp, linear, linear_flops, wider_mlp


@dataclass(frozen=True, kw_only=True)
class DCNConfig:
    """Sizes of a DCN."""

    num_cross_layers: int = 3
    """Cross layers; l of them cover feature interactions up to order l + 1."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, num_cross_layers=self.num_cross_layers, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths, or cross layers and MLP layers; the cross layers are as wide as the fields."""
        if along == "width":
            return replace(self, hidden=wider_mlp(self.hidden, k))
        return replace(self, num_cross_layers=deeper(self.num_cross_layers, k), hidden=deeper_mlp(self.hidden, k))


_DEFAULT = DCNConfig()


class DCN(Backbone):
    """Cross network beside an MLP: x_{l+1} = x_0 (x_l^T w_l) + b_l + x_l, with x_0 the K = F * D flattened fields.

    h = concat(x_L, MLP(x_0)), K + hidden[-1] wide. Paper: arXiv 1708.05123, section 2.

    x_l never leaves the line a_l x_0 + c_l, with a scalar a_l for each row and a vector c_l = b_0 + ... + b_{l-1} for
    all of them. Put in, the recursion is a_{l+1} = a_l (1 + x_0^T w_l) + c_l^T w_l with a_0 = 1: one matrix product for
    all layers, then scalars.
    """

    Config: ClassVar[type] = DCNConfig

    def __init__(self, num_fields: int, dim: int, config: DCNConfig = _DEFAULT) -> None:
        super().__init__()
        in_dim = num_fields * dim
        self.cross = linear(in_dim, config.num_cross_layers, bias=False)
        self.bias_LK = nn.Parameter(torch.zeros(config.num_cross_layers, in_dim))
        self.mlp = MLP(in_dim, config.hidden, config.dropout)
        self.out_dim = in_dim + config.hidden[-1]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x0_BK = x_BFD.flatten(1)
        # Under autocast the product is bf16, where 1 + it would lose digits of x_0 itself.
        product_BL = self.cross(x0_BK)
        gain_BL = 1 + product_BL.to(torch.promote_types(product_BL.dtype, torch.float32))
        c_LK = self.bias_LK.cumsum(dim=0)
        shift_L = (c_LK[:-1] * self.cross.weight[1:]).sum(dim=1)
        a_B1 = gain_BL[:, :1]
        for layer in range(1, gain_BL.shape[1]):
            a_B1 = a_B1 * gain_BL[:, layer : layer + 1] + shift_L[layer - 1]
        return torch.cat([a_B1 * x0_BK + c_LK[-1], self.mlp(x0_BK)], dim=1)

    def flops(self) -> int:
        """Every weight is applied once."""
        return linear_flops(self)
