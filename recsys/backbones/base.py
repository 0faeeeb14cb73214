"""The backbone contract, and the legend of the shape suffixes that the whole project uses.

B rows of a batch, F fields, D embedding dimension, O backbone output, M members, K hidden width,
T tokens, L layers, N columns of a linear projection.
"""

import abc

from torch import Tensor, nn


class Backbone(nn.Module, abc.ABC):
    """Field embeddings in, one hidden vector a row out.

    A backbone is built as `Backbone(num_fields, dim, config)`. Dense columns arrive as one more field. It has no head,
    no sigmoid, no loss and no device, and a row's output depends on that row alone.
    """

    out_dim: int

    @abc.abstractmethod
    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to hidden vectors h_BO [B, out_dim]."""
