"""The batch: the only thing that crosses from the loader to the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows of one rank."""

    dense: Tensor
    """[B, num_dense] float32, finite."""
    sparse: KeyedJaggedTensor
    """Ids of every feature, in schema order."""
    labels: Tensor
    """[B] float32, 0 or 1."""
    weights: Tensor
    """[B] float32; 0 marks a row that only fills up the batch."""

    def to(self, device: torch.device, non_blocking: bool = False, **_: object) -> "Batch":
        """Copy to `device`."""
        return Batch(
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` reads this batch."""
        for tensor in (self.dense, self.labels, self.weights):
            tensor.record_stream(stream)
        self.sparse.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from where copies to a CUDA device run asynchronously."""
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
        )


def batch_of(dense: Tensor, ids: Mapping[str, Tensor], labels: Tensor) -> Batch:
    """Build a batch of single-id features from tensors [B, num_dense], {feature: [B]} and [B]; every weight is 1."""
    values = torch.cat(list(ids.values()))
    return Batch(
        dense=dense,
        sparse=KeyedJaggedTensor(keys=list(ids), values=values, lengths=torch.ones(len(values), dtype=torch.int32)),
        labels=labels,
        weights=torch.ones_like(labels),
    )
