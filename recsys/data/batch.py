"""The batch: the only thing that crosses from the loader to the model."""

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
