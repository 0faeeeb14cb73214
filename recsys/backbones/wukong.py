"""Wukong, stacked factorization machines (arXiv 2403.02545)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.backbones.base import Along, Backbone
from recsys.backbones.fused import Norm, transposed, wukong_norm
from recsys.backbones.layers import MLP, check_sizes, deeper, linear, linear_flops, wider, wider_mlp


@dataclass(frozen=True, kw_only=True)
class WukongConfig:
    """Sizes of a Wukong. To scale up, add layers first."""

    num_layers: int = 2
    """Layers; l of them cover feature interactions up to order 2^l."""

    num_fm: int = 8
    """Tokens (n_F) that the factorization machine block of a layer gives."""

    num_linear: int = 8
    """Tokens (n_L) that the linear compression block of a layer gives."""

    fm_rank: int = 24
    """Columns (k) that the token by token products of the factorization machine are projected to."""

    hidden: tuple[int, ...] = (256,)
    """Hidden widths of the MLP in the factorization machine block."""

    dropout: float = 0.0
    """Share of each hidden activation of that MLP dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(
            self.dropout,
            num_layers=self.num_layers,
            num_fm=self.num_fm,
            num_linear=self.num_linear,
            fm_rank=self.fm_rank,
            hidden=self.hidden,
        )

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the layers (which the paper scales first), or tokens, rank and hidden widths."""
        if along == "depth":
            return replace(self, num_layers=deeper(self.num_layers, k))
        return replace(
            self,
            num_fm=wider(self.num_fm, k),
            num_linear=wider(self.num_linear, k),
            fm_rank=wider(self.fm_rank, k),
            hidden=wider_mlp(self.hidden, k),
        )


_DEFAULT = WukongConfig()


class WukongLayer(nn.Module):
    """T tokens in, n_F + n_L tokens out: X' = LN(concat(FMB(X), LCB(X)) + residual(X)).

    FMB(X) = reshape(MLP(LN(flatten(X (X^T Y))))) gives n_F tokens, LCB(X) = W_L X gives n_L. The residual is X itself
    where T = n_F + n_L, else W_R X. The last LN is over D alone, and the MLP ends in a linear layer (our choices).
    """

    def __init__(self, num_tokens: int, dim: int, config: WukongConfig) -> None:
        super().__init__()
        num_out, num_products = config.num_fm + config.num_linear, num_tokens * config.fm_rank
        self.fm_weight_TK = _xavier(num_tokens, config.fm_rank)
        self.fm_mlp = nn.Sequential(
            Norm(num_products),
            MLP(num_products, config.hidden, config.dropout),
            linear(config.hidden[-1], config.num_fm * dim),
        )
        self.linear_weight = _xavier(config.num_linear, num_tokens)
        self.residual_weight = None if num_tokens == num_out else _xavier(num_out, num_tokens)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map tokens [B, T, D] to tokens [B, n_F + n_L, D]."""
        # X (X^T Y), not (X X^T) Y: T D k products a row, where the T by T matrix would cost T T D.
        x_BDT = transposed(x_BTD)
        products_BTK = x_BTD @ functional.linear(x_BDT, self.fm_weight_TK.t())
        fm_BN = self.fm_mlp(products_BTK.flatten(1))
        # W_L X and W_R X as one product.
        if self.residual_weight is None:
            return wukong_norm(self.norm, fm_BN, functional.linear(x_BDT, self.linear_weight), x_BTD)
        weights = [weight.to(x_BDT.dtype) for weight in (self.linear_weight, self.residual_weight)]
        return wukong_norm(self.norm, fm_BN, functional.linear(x_BDT, torch.cat(weights)), None)

    def flops(self, dim: int) -> int:
        """X^T Y and X (X^T Y), the MLP, W_L X and W_R X."""
        products = 4 * self.fm_weight_TK.numel() * dim
        residual = 0 if self.residual_weight is None else self.residual_weight.numel()
        return products + linear_flops(self.fm_mlp) + 2 * (self.linear_weight.numel() + residual) * dim


class Wukong(Backbone):
    """Layers of factorization machines; the output is the last tokens, flattened: (n_F + n_L) * D wide.

    The fields are the tokens of the first layer; see `WukongLayer` for its formula. Paper: arXiv 2403.02545, section 3.
    """

    Config: ClassVar[type] = WukongConfig

    def __init__(self, num_fields: int, dim: int, config: WukongConfig = _DEFAULT) -> None:
        super().__init__()
        self.dim = dim
        num_out = config.num_fm + config.num_linear
        counts = [num_fields] + [num_out] * (config.num_layers - 1)
        self.layers = nn.Sequential(*(WukongLayer(num_tokens, dim, config) for num_tokens in counts))
        self.out_dim = num_out * dim

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x_BTD: Tensor = self.layers(x_BFD)
        return x_BTD.flatten(1)

    def flops(self) -> int:
        """Sum over layers."""
        return sum(layer.flops(self.dim) for layer in self.layers if isinstance(layer, WukongLayer))


def _xavier(num_rows: int, num_columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_rows, num_columns)))
