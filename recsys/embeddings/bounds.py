"""The check at the embeddings' door: every id has a row in its table.

The loader has looked at what it reads; this is for batches that are made otherwise. Nothing behind it would tell:
FBGEMM maps an id beyond a table's end to row 0, under a warning that comes once, and raises at a negative one without
saying whose it is.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError

ANY_ID = 2**63 - 1
"""Features of more ids than this have no bound."""


class IdBounds(nn.Module):
    """Raises at an id without a row. It has no parameters.

    Args:
        sparse: feature to number of ids.
        when: on "cpu" alone, for on a CUDA device the check has to wait for the device; "always" or "never".
    """

    def __init__(self, sparse: Mapping[str, int], when: Literal["cpu", "always", "never"] = "cpu") -> None:
        super().__init__()
        self.sparse = {feature: min(num_ids, ANY_ID) for feature, num_ids in sparse.items()}
        self.when = when

    def forward(self, ids: KeyedJaggedTensor) -> None:
        """Look at all ids.

        Raises:
            InputError: one is negative or too large, naming its feature, its row in the batch and the number of ids.
        """
        values = ids.values()
        on = self.when == "always" or (self.when == "cpu" and values.device.type == "cpu")
        if not on or torch.compiler.is_compiling():
            return
        # Read as unsigned, an id below 0 is one above all that there can be, so one pass finds both.
        words = values.detach().cpu().numpy().view(np.uint32 if values.itemsize == 4 else np.uint64)
        begins = np.asarray(ids.offset_per_key())
        sizes, limits = np.diff(begins), np.array([self.sparse.get(key, ANY_ID) for key in ids.keys()])  # noqa: SIM118
        filled = sizes > 0
        if not filled.any():
            return
        largest = np.maximum.reduceat(words, begins[:-1][filled])
        # An id without a bound may be any; the largest one that has a sign bit would stand above ANY_ID.
        outside = (largest >= limits[filled].astype(np.uint64)) & (limits[filled] < ANY_ID)
        if outside.any():
            self._refuse(ids, int(np.flatnonzero(filled)[outside.argmax()]))

    def _refuse(self, ids: KeyedJaggedTensor, key: int) -> None:
        feature, begins = ids.keys()[key], ids.offset_per_key()
        num_ids = self.sparse[feature]
        own = ids.values()[begins[key] : begins[key + 1]].cpu()
        at = int(((own < 0) | (own >= num_ids)).int().argmax())
        ends = ids.offsets().cpu()[key * ids.stride() + 1 : (key + 1) * ids.stride() + 1]
        row = int(torch.searchsorted(ends, begins[key] + at, right=True))
        raise InputError(
            f"feature {feature}, row {row} of the batch: id {own[at]} has no row in tables of {num_ids:,} ids; ids lie "
            f"in [0, {num_ids:,})"
        )
