"""What backbones share: linear with explicit initial values, dropout with its own random stream, MLP, sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along
from recsys.backbones.fused import linear_relu


class Dropout(nn.Module):
    """Inverted dropout with a random stream of its own: y = x * mask / (1 - p), mask ~ Bernoulli(1 - p).

    Members that train in one job must not share a stream, or a member's result would depend on which others ride along.
    `reseed` starts the own stream; a layer that was never reseeded draws from torch's global stream. The identity in
    eval mode and where p is 0.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seed: int | None = None
        self.generator: torch.Generator | None = None

    def reseed(self, seed: int) -> None:
        """Start the stream of `seed` at the next forward, on the device of its input.

        Layers with one seed draw one mask: give every layer (and rank) its own.
        """
        self.seed = seed
        self.generator = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x`, whatever its shape."""
        if not self.training or self.p == 0.0:
            return x
        if self.generator is None and self.seed is not None:
            # Made here and not in reseed: only the input tells the device, and a model may be moved after reseed.
            self.generator = torch.Generator(x.device).manual_seed(self.seed)
        mask = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=self.generator)
        return x * mask.div_(1.0 - self.p)


@dataclass(frozen=True, kw_only=True)
class MLPSizes:
    """Sizes of a backbone that has an MLP, and else nothing with a size of its own."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP; a last layer to one logit is the head's."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        check_sizes(self.dropout, hidden=self.hidden)

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the MLP's widths, or its layers."""
        return replace(self, hidden=wider_mlp(self.hidden, k) if along == "width" else deeper_mlp(self.hidden, k))


class PairProducts(nn.Module):
    """Inner products of all pairs of fields, [B, F, D] -> [B, F (F - 1) / 2]: <x_i, x_j> for i < j, row by row."""

    pairs: Tensor

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.num_fields, self.dim = num_fields, dim
        # Where the products i < j stand in the flattened matrix of all.
        i, j = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("pairs", i * num_fields + j, persistent=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Multiply all with all at once, and keep one half."""
        return (x_BFD @ x_BFD.transpose(1, 2)).flatten(1).index_select(1, self.pairs)

    def flops(self) -> int:
        """All F * F products of a row, of which less than half are used."""
        return 2 * self.num_fields**2 * self.dim


def linear(in_dim: int, out_dim: int, bias: bool = True) -> nn.Linear:
    """Make a linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """[B, in_dim] -> [B, hidden[-1]]: Linear, ReLU, Dropout for each width of `hidden`."""

    def __init__(self, in_dim: int, hidden: Sequence[int], dropout: float) -> None:
        widths = pairwise((in_dim, *hidden))
        super().__init__(*(part for pair in widths for part in (linear(*pair), nn.ReLU(), Dropout(dropout))))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, a linear one together with the ReLU that follows."""
        layers = iter(self)
        for layer in layers:
            if type(layer) is nn.Linear:
                x = linear_relu(layer, x)
                next(layers)  # the ReLU, which keeps the names of parameters what they are
            else:
                x = layer(x)
        return x


def check_sizes(dropout: float, **sizes: int | tuple[int, ...] | None) -> None:
    """Check the fields of a config: every size is at least 1 or None, a tuple is not empty, dropout is in [0, 1).

    Raises:
        ValueError: names the field and what would work.
    """
    for name, size in sizes.items():
        if size == ():
            raise ValueError(f"{name} is empty: give at least one width, such as {name} = (256,)")
        widths = size if isinstance(size, tuple) else (size,)
        if any(width is not None and width < 1 for width in widths):
            raise ValueError(f"{name} is {size}: give 1 or more")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}: give 0 or more and less than 1")


def linear_flops(module: nn.Module) -> int:
    """FLOPs of the linear layers within `module` for one row, each of them applied once."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def wider(width: int, k: float, multiple: int = 1) -> int:
    """A width for `k` times the work of a square matrix: times the root of `k`, rounded to a multiple."""
    return max(round(width * math.sqrt(k) / multiple), 1) * multiple


def deeper(num_layers: int, k: float) -> int:
    """Layers for `k` times the work."""
    return max(round(num_layers * k), 1)


def wider_mlp(hidden: tuple[int, ...], k: float) -> tuple[int, ...]:
    """Every hidden width for `k` times the work."""
    return tuple(wider(width, k) for width in hidden)


def deeper_mlp(hidden: tuple[int, ...], k: float) -> tuple[int, ...]:
    """About `k` times as many hidden layers, each width repeated: (256, 128) becomes (256, 256, 128, 128)."""
    total = deeper(len(hidden), k)
    return tuple(hidden[index * len(hidden) // total] for index in range(total))
