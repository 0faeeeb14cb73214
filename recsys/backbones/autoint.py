"""AutoInt, automatic feature interaction by self-attention over the fields (arXiv 1810.11921)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import (
    MLP,
    Dropout,
    check_sizes,
    deeper,
    deeper_mlp,
    linear,
    linear_flops,
    wider,
    wider_mlp,
)


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig:
    """Sizes of an AutoInt."""

    num_layers: int = 3
    """Interacting layers."""

    num_heads: int = 2
    """Attention heads (H) of each layer."""

    head_dim: int = 32
    """Width (D) of a head's queries, keys and values; a layer gives num_heads * head_dim values a field."""

    scale: bool = False
    """Whether to divide attention's products by the root of head_dim: the paper does not, its authors' code does."""

    hidden: tuple[int, ...] | None = None
    """Widths of an MLP beside the attention, which makes it AutoInt+; None has no MLP."""

    dropout: float = 0.0
    """Share of the attention weights, and of each MLP layer's activations, dropped in training."""

    def __post_init__(self) -> None:
        sizes = {"num_layers": self.num_layers, "num_heads": self.num_heads, "head_dim": self.head_dim}
        check_sizes(self.dropout, hidden=self.hidden, **sizes)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the heads' width and the MLP's widths, or the layers of both."""
        if along == "width":
            hidden = None if self.hidden is None else wider_mlp(self.hidden, k)
            return replace(self, head_dim=wider(self.head_dim, k), hidden=hidden)
        hidden = None if self.hidden is None else deeper_mlp(self.hidden, k)
        return replace(self, num_layers=deeper(self.num_layers, k), hidden=hidden)


_DEFAULT = AutoIntConfig()


class InteractingLayer(nn.Module):
    """Fields [B, F, in_dim] to [B, F, H * D]: e_i' = ReLU(concat_h sum_j a_ij^h W_V^h e_j + W_res e_i).

    a_ij^h is the softmax over j of (W_Q^h e_i) . (W_K^h e_j), divided by the root of D if `scale`. There are no biases
    and no norm. The authors' code departs from their paper: biases, ReLU on queries, keys and values, a layer norm.
    """

    def __init__(self, in_dim: int, config: AutoIntConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.factor = 1.0 / math.sqrt(config.head_dim) if config.scale else 1.0
        heads_dim = config.num_heads * config.head_dim
        # Queries, keys, values and residual, each for all heads. One matmul; Xavier for each of the four.
        weights = [linear(in_dim, heads_dim, bias=False).weight for _ in range(4)]
        self.weight_NK = nn.Parameter(torch.cat(weights).detach())
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BFK: Tensor) -> Tensor:
        """One layer."""
        num_fields = x_BFK.shape[1]
        y_BFN = nn.functional.linear(x_BFK, self.weight_NK)
        q, k, v, residual = y_BFN.reshape(-1, num_fields, 4, self.num_heads, self.head_dim).unbind(2)
        scores_BHFF = (q.transpose(1, 2) * self.factor) @ k.permute(0, 2, 3, 1)
        out_BHFD = self.dropout(scores_BHFF.softmax(dim=3)) @ v.transpose(1, 2)
        return torch.relu(out_BHFD.transpose(1, 2) + residual).flatten(2)

    def flops(self, num_fields: int) -> int:
        """The four projections, scores and weighted sums."""
        return 2 * num_fields * self.weight_NK.numel() + 4 * num_fields**2 * self.num_heads * self.head_dim


class AutoInt(Backbone):
    """Interacting layers over the fields; the output is the last fields, flattened: F * H * D wide.

    AutoInt+ has an MLP over the flattened embeddings beside them, whose hidden[-1] values follow. See
    `InteractingLayer`. Paper: arXiv 1810.11921, section 4.
    """

    Config: ClassVar[type] = AutoIntConfig

    def __init__(self, num_fields: int, dim: int, config: AutoIntConfig = _DEFAULT) -> None:
        super().__init__()
        self.num_fields = num_fields
        heads_dim = config.num_heads * config.head_dim
        dims = [dim] + [heads_dim] * (config.num_layers - 1)
        self.layers = nn.Sequential(*(InteractingLayer(in_dim, config) for in_dim in dims))
        self.mlp = None if config.hidden is None else MLP(num_fields * dim, config.hidden, config.dropout)
        self.out_dim = num_fields * heads_dim + (0 if config.hidden is None else config.hidden[-1])

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        h_BO: Tensor = self.layers(x_BFD).flatten(1)
        return h_BO if self.mlp is None else torch.cat([h_BO, self.mlp(x_BFD.flatten(1))], dim=1)

    def flops(self) -> int:
        """Sum over layers, and the MLP."""
        layers = sum(layer.flops(self.num_fields) for layer in self.layers if isinstance(layer, InteractingLayer))
        return layers + (0 if self.mlp is None else linear_flops(self.mlp))
