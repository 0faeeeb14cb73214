"""Parameters that predictions read in bf16 or fp16 alone are kept in it.

Autocast has a copy of each made anew in every call, which takes about half the time of one row.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recsys.data.schema import Schema
from recsys.embeddings.precision import AUTOCAST
from recsys.model import RecModel

ROWS = 2
"""Of the forward pass that is looked at."""


@torch.no_grad()
def cast_once(model: RecModel, schema: Schema) -> None:
    """Keep in the model's precision what a forward pass reads of its members' parameters in nothing else.

    Logits stay what they are, to the bit. One pass over a few rows is looked at: how parameters are read must not
    depend on the rows. What is read as it is stays fp32: gains of layer norms, a weight that is multiplied in fp32 too,
    and what is stacked or concatenated before it is cast, as parameters of members that are computed together are. The
    model can neither be trained nor loaded afterwards. Nothing happens where precision is fp32 or tf32.

    Args:
        model: on its device, with its values; sharded or not.
        schema: of its batches.
    """
    members = model.members
    dtype = AUTOCAST.get(members.precision)
    if dtype is None:
        return
    device = next(members.parameters()).device
    dims = [owner.config.embedding_dim for owner in model.embedding.owners.values()]
    fields = [torch.zeros(ROWS, len(schema.sparse), dim, device=device) for dim in dims]
    was_training = members.training
    members.eval()
    with _Reads(members.parameters(), dtype) as reads:
        members(fields, torch.zeros(ROWS, len(schema.dense), device=device))
    members.train(was_training)
    for parameter in members.parameters():
        if _memory(parameter) in reads.cast - reads.as_they_are:
            parameter.data = parameter.to(dtype)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how parameters are read; autocast stands above, so its casts come by as copies.

    Attributes:
        cast: memory of parameters that are copied to `dtype`, through views or not.
        as_they_are: memory of those that are read in another way.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._all = {_memory(parameter) for parameter in parameters}
        self.cast: set[int] = set()
        self.as_they_are: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # else it counts what is done with the view
            read = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} & self._all
            (self.cast if self._is_cast(func, args, out) else self.as_they_are).update(read)
        return out

    def _is_cast(self, func: Any, args: tuple, out: Any) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        # A view of part of a matrix is packed by its copy: products would read another layout without it.
        return bool(out.dtype is self._dtype and out.stride() == args[0].stride())


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
