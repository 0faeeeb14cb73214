"""Batches made by hand."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.batch import Batch


def batch_of(dense: Tensor, ids: Mapping[str, Tensor], labels: Tensor) -> Batch:
    """Build a batch of single-id features from tensors [B, num_dense], {feature: [B]} and [B]; every weight is 1."""
    values = torch.cat(list(ids.values()))
    return Batch(
        dense=dense,
        sparse=KeyedJaggedTensor(keys=list(ids), values=values, lengths=torch.ones(len(values), dtype=torch.int32)),
        labels=labels,
        weights=torch.ones_like(labels),
    )
