"""A copy of this rank's part of a state, from which a checkpoint is written while training goes on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.remote_device import _remote_device


class Stager:
    """Copies states to the host.

    From a GPU, copies go to pinned memory, at the full rate of the bus, which is kept for the next state: it takes long
    to get. On a CPU, memory is given back when the state is written.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of pinned memory that are kept."""
        return sum(pinned.nbytes for pinned in self._pinned.values())

    @torch.no_grad()
    def stage(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Copy all tensors of a nested state; on return, the state may change."""
        staged = self._copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert isinstance(staged, dict)
        return staged

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(part, f"{name}/{key}") for key, part in value.items()}
        if isinstance(value, ShardedTensor):
            return self._sharded(value, name)
        return self._tensor(value, name) if isinstance(value, Tensor) else value

    def _sharded(self, whole: ShardedTensor, name: str) -> ShardedTensor:
        on_host = [replace(shard, placement=_host(shard.placement)) for shard in whole.metadata().shards_metadata]
        by_place = {tuple(shard.shard_offsets): shard for shard in on_host}
        local = [
            Shard(self._tensor(shard.tensor, f"{name}/{number}"), by_place[tuple(shard.metadata.shard_offsets)])
            for number, shard in enumerate(whole.local_shards())
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            local, replace(whole.metadata(), shards_metadata=on_host), process_group=whole._process_group
        )

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        value = value.detach()
        if value.device.type == "cpu":
            return value.clone()
        pinned = self._pinned.get(name)
        if pinned is None or pinned.shape != value.shape or pinned.dtype != value.dtype:
            pinned = self._pinned[name] = torch.empty_like(value, device="cpu", pin_memory=True)
        return pinned.copy_(value, non_blocking=True)


def local_bytes(state: Any) -> int:
    """Bytes of this rank's part of a nested state."""
    if isinstance(state, Mapping):
        return sum(local_bytes(part) for part in state.values())
    if isinstance(state, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in state.local_shards())
    return state.nbytes if isinstance(state, Tensor) else 0


def _host(placement: Any) -> _remote_device:
    return _remote_device(f"rank:{placement.rank()}/cpu")
