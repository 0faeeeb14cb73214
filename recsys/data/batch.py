"""The batch: the only thing that crosses from the loader to the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recsys.data.groups import Layout
from recsys.data.multihot import MultiHot


@dataclass
class Batch(Pipelineable):
    """B rows of one rank."""

    dense: Tensor
    """[B, num_dense] float32, finite."""
    sparse: KeyedJaggedTensor
    """Ids of every feature, in schema order: int32, or int64 where they are raw."""
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


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to `device`; to a CUDA device on a stream of its own, each while the one before is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: list[tuple[Batch, torch.cuda.Event]] = []

    def first_copied() -> Batch:
        batch, done = copied.pop(0)
        working = torch.cuda.current_stream(device)
        working.wait_event(done)
        batch.record_stream(working)
        return batch

    for batch in batches:
        with torch.cuda.stream(copying):
            copied.append((batch.to(device, non_blocking=True), copying.record_event()))
        if len(copied) == 2:
            yield first_copied()
    if copied:
        yield first_copied()


class BatchMaker:
    """Makes batches of blocks that hold the columns of B rows each.

    How many ids a feature has in a row is the same in every batch, so lengths and offsets are built once.

    Args:
        layout: of the blocks.
        batch_size: B.
        multi_hot: expands the ids of a block, which then holds one a row and feature.
    """

    def __init__(self, layout: Layout, batch_size: int, multi_hot: MultiHot | None = None) -> None:
        self.features = list(layout.sparse)
        self.num_floats, self.num_dense = layout.num_floats, layout.num_dense
        self.has_long_ids = layout.ids.itemsize == 8
        self.batch_size = batch_size
        self.multi_hot = multi_hot
        # Copies from page-locked memory to a CUDA device overlap with its work.
        self.pinned = torch.cuda.is_available()
        sizes = torch.tensor(multi_hot.sizes if multi_hot else list(layout.sparse.values()), dtype=torch.int32)
        self.num_ids = int(sizes.sum()) * batch_size
        self.length_per_key = (sizes * batch_size).tolist()
        lengths = sizes.repeat_interleave(batch_size)
        self.lengths = self.empty(len(lengths), dtype=torch.int32).copy_(lengths)
        self.offsets = self.empty(len(lengths) + 1, dtype=torch.int32).zero_()
        self.offsets[1:] = lengths.cumsum(0)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory for parts of batches, page-locked where a CUDA device will read it."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)

    def batches(self, blocks: Tensor) -> Iterator[Batch]:
        """Turn blocks int32 [steps, width * B] into one batch each, which share their memory."""
        floats, ids = blocks.tensor_split([self.num_floats * self.batch_size], dim=1)
        columns = floats.view(torch.float32).view(len(blocks), self.num_floats, self.batch_size)
        labels, weights = columns[:, 0], columns[:, 1]
        dense = self.empty(len(blocks), self.batch_size, self.num_dense, dtype=torch.float32)
        dense.copy_(columns[:, 2 : 2 + self.num_dense].transpose(1, 2))
        if self.has_long_ids:
            ids = ids.view(torch.int64)
        for step in range(len(blocks)):
            yield Batch(
                dense=dense[step],
                sparse=KeyedJaggedTensor(
                    keys=self.features,
                    values=self._expanded(ids[step]),
                    lengths=self.lengths,
                    offsets=self.offsets,
                    stride=self.batch_size,
                    length_per_key=self.length_per_key,
                ),
                labels=labels[step],
                weights=weights[step],
            )

    def _expanded(self, ids: Tensor) -> Tensor:
        if self.multi_hot is None:
            return ids
        values = self.empty(self.num_ids, dtype=torch.int32)
        self.multi_hot.expand(ids.view(len(self.features), -1).numpy(), out=values.numpy())
        return values
