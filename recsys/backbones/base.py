"""The backbone contract, and the legend of the shape suffixes that the whole project uses.

B rows of a batch, F fields, D embedding dimension, O backbone output, M members, K hidden width,
T tokens, L layers, N columns of a linear projection.
"""

import abc
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

Along = Literal["width", "depth"]
"""What a ladder scales."""


class Ladder(Protocol):
    """What every backbone's config can do: be scaled by one dial."""

    def ladder(self, k: float, along: Along) -> Self:
        """Scale these sizes, `k > 0`; 1 is the config itself, below it is smaller.

        Along the width, hidden widths grow with the root of `k`, so that square matrices grow with `k`; along the
        depth, layers grow with `k`. What reads the fields keeps its input width, so a rung mostly costs less than `k`
        times the work: `Backbone.flops` says how much. A larger `k` never gives fewer parameters or FLOPs, and no size
        falls below 1.
        """
        ...


class Backbone(nn.Module, abc.ABC):
    """Field embeddings in, one hidden vector a row out.

    A backbone is built as `Backbone(num_fields, dim, config)`. Dense columns arrive as one more field. It has no head,
    no sigmoid, no loss and no device, and a row's output depends on that row alone.
    """

    Config: ClassVar[type[Any]]
    """Its sizes: a frozen dataclass that is a `Ladder`."""
    out_dim: int

    @abc.abstractmethod
    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to hidden vectors h_BO [B, out_dim]."""

    @abc.abstractmethod
    def flops(self) -> int:
        """Multiplications and additions in the matrix products of one row's forward; backward takes twice as many."""

    def num_parameters(self) -> int:
        """Trained values."""
        return sum(parameter.numel() for parameter in self.parameters())
