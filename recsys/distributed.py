"""The process group, and the only place that reads torchrun's variables."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import InputError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process among those of its job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, plans and writes for all."""
        return self.rank == 0


def rank_from_environment() -> int:
    """Rank that torchrun gave this process, 0 without torchrun; needs no process group."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group() -> Iterator[World]:
    """Join the job that torchrun's variables describe, or be a job of one: nccl on CUDA, gloo on a CPU."""
    world = World(
        rank=rank_from_environment(),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=_device(int(os.environ.get("LOCAL_RANK", "0"))),
    )
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle when there are fewer ranks than cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    backend = "cuda:nccl,cpu:gloo" if world.device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def on_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give its result, or its InputError, to all ranks.

    What one rank decides, all must learn, or the others wait for it in the next collective until that times out.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except InputError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def gather_to_first(tensor: Tensor) -> Tensor | None:
    """Concatenate tensors of one shape from all ranks along dim 0 on rank 0; None on the others."""
    is_first = dist.get_rank() == 0
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(tensor, parts)
    return torch.cat(parts) if parts is not None else None


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, on all ranks."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
