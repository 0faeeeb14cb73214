"""RankMixer, parameter-free token mixing and a feed-forward network of its own for each token (arXiv 2507.15551)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional

from recsys.backbones.base import Along, Backbone
from recsys.backbones.fused import Norm, mix_norm
from recsys.backbones.layers import check_sizes, deeper, wider
from recsys.backbones.tokens import SparseMoE, TokenFFN, TokenLinear


@dataclass(frozen=True, kw_only=True)
class RankMixerConfig:
    """Sizes of a RankMixer: about 2 * expansion * num_layers * num_tokens * token_dim^2 parameters, for each expert."""

    num_tokens: int = 8
    """Tokens (T) that the concatenated fields are cut into; also the heads that mixing splits a token in."""

    token_dim: int = 64
    """Width (D) of a token, a multiple of num_tokens."""

    num_layers: int = 2
    """Blocks of token mixing and feed-forward network (L)."""

    expansion: int = 4
    """Hidden width of the feed-forward networks, in multiples of token_dim (k)."""

    num_experts: int | None = None
    """Feed-forward networks that each token routes among (E), see `SparseMoE`; None is one, without a router."""

    target_active: float = 0.5
    """Share of open gates among a block's tokens and experts that training steers every row to, given num_experts."""

    l1: float = 0.1
    """Weight of the penalty on gates that steers there; 0 for none."""

    dropout: float = 0.0
    """Share of each feed-forward network's hidden activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(
            self.dropout,
            num_tokens=self.num_tokens,
            token_dim=self.token_dim,
            num_layers=self.num_layers,
            expansion=self.expansion,
            num_experts=self.num_experts,
        )
        if self.num_experts == 1:
            raise ValueError("num_experts is 1: give 2 or more, or None for one network without a router")
        if not 0.0 < self.target_active <= 1.0:
            raise ValueError(f"target_active is {self.target_active}: give more than 0 and at most 1")
        if self.l1 < 0.0:
            raise ValueError(f"l1 is {self.l1}: give 0 or more")
        below = self.token_dim // self.num_tokens * self.num_tokens
        if below != self.token_dim:
            above = below + self.num_tokens
            works = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"token_dim is {self.token_dim}: it must be a multiple of num_tokens = {self.num_tokens}, give {works}"
            )

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the tokens' width, kept a multiple of their number, or the blocks."""
        if along == "width":
            return replace(self, token_dim=wider(self.token_dim, k, multiple=self.num_tokens))
        return replace(self, num_layers=deeper(self.num_layers, k))


_DEFAULT = RankMixerConfig()


class RankMixerBlock(nn.Module):
    """Tokens [T, B, D] in and out: S = LN(Mix(X) + X), X' = LN(PFFN(S) + S), each LN over D alone.

    Mix: see `mix_norm`.
    PFFN: x_t -> GELU(x_t W1_t + b1_t) W2_t + b2_t, D -> expansion * D -> D, with own weights for each token; or, given
    num_experts, `SparseMoE`.
    """

    def __init__(self, config: RankMixerConfig) -> None:
        super().__init__()
        self.mix_norm = nn.LayerNorm(config.token_dim)
        sizes = (config.num_tokens, config.token_dim, config.expansion * config.token_dim, config.dropout)
        self.ffn = (
            TokenFFN(*sizes)
            if config.num_experts is None
            else SparseMoE(*sizes, config.num_experts, config.target_active, config.l1)
        )
        self.ffn_norm = Norm(config.token_dim)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """One block."""
        s_TBD = mix_norm(self.mix_norm, x_TBD)
        out_TBD: Tensor = self.ffn_norm(self.ffn(s_TBD), s_TBD)
        return out_TBD


class RankMixer(Backbone):
    """Fields -> T tokens -> L blocks -> mean over tokens, token_dim wide.

    The fields are concatenated, padded with zeros to T equal chunks (our choice: the paper groups them by meaning), and
    each chunk has its own projection to token_dim. See `RankMixerBlock`. Paper: arXiv 2507.15551, section 3.
    """

    Config: ClassVar[type] = RankMixerConfig

    def __init__(self, num_fields: int, dim: int, config: RankMixerConfig = _DEFAULT) -> None:
        super().__init__()
        chunk_dim = math.ceil(num_fields * dim / config.num_tokens)
        self.chunks_shape = (-1, config.num_tokens, chunk_dim)
        self.padding = config.num_tokens * chunk_dim - num_fields * dim
        self.tokenize = TokenLinear(config.num_tokens, chunk_dim, config.token_dim)
        self.blocks = nn.Sequential(*(RankMixerBlock(config) for _ in range(config.num_layers)))
        self.out_dim = config.token_dim

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        x_BTK = functional.pad(x_BFD.flatten(1), (0, self.padding)).reshape(self.chunks_shape)
        x_TBD: Tensor = self.blocks(self.tokenize(x_BTK.transpose(0, 1).contiguous()))
        return x_TBD.mean(dim=0)

    def flops(self) -> int:
        """Every weight is applied once, those of closed experts too."""
        return sum(2 * part.weight_TKN.numel() for part in self.modules() if isinstance(part, TokenLinear))
