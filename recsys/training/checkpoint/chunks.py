"""Sharded tensors cut into chunks, so that writing and reading a checkpoint copies no whole table.

torch.distributed.checkpoint clones every tensor that is a part of a larger storage, as tables of one kernel are, and
keeps the clones until its file is written: memory doubled. It reads a saved shard whole before it takes what it wants.
Chunks have storages of their own over the same memory, so nothing is cloned, and are small, so little is read at once.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata

CHUNK_BYTES = 16 * 2**20


def in_chunks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Cut all sharded tensors of a nested state by rows, into chunks that share their memory."""
    return {key: _cut(value) for key, value in state.items()}


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return in_chunks(value)
    return _chunked(value) if isinstance(value, ShardedTensor) else value


def _chunked(whole: ShardedTensor) -> ShardedTensor:
    metadata = whole.metadata()
    itemsize = metadata.tensor_properties.dtype.itemsize
    local = []
    for shard in whole.local_shards():
        first = shard.metadata.shard_offsets[0]
        for chunk in _chunks_of(shard.metadata, itemsize):
            begin = chunk.shard_offsets[0] - first
            local.append(Shard(_own_storage(shard.tensor[begin : begin + chunk.shard_sizes[0]]), chunk))
    everywhere = [chunk for shard in metadata.shards_metadata for chunk in _chunks_of(shard, itemsize)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, replace(metadata, shards_metadata=everywhere), process_group=whole._process_group
    )


def _chunks_of(shard: ShardMetadata, itemsize: int) -> list[ShardMetadata]:
    """Cut a shard's rows: on every rank alike, since all must know of all chunks."""
    (first, *columns), (num_rows, *widths) = shard.shard_offsets, shard.shard_sizes
    step = max(CHUNK_BYTES // max(math.prod(widths) * itemsize, 1), 1)
    return [
        replace(shard, shard_offsets=[first + begin, *columns], shard_sizes=[min(step, num_rows - begin), *widths])
        for begin in range(0, max(num_rows, 1), step)
    ]


def _own_storage(rows: Tensor) -> Tensor:
    """The same memory, under a storage that holds nothing else."""
    rows = rows.detach()
    begin = rows.storage_offset() * rows.itemsize
    storage = rows.untyped_storage()[begin : begin + rows.nbytes]
    return torch.empty(0, dtype=rows.dtype, device=rows.device).set_(storage, 0, rows.size(), rows.stride())
