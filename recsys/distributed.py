"""The process group, and the only place but the CLI's error line that reads torchrun's variables."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import fbgemm_gpu
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store as _default_store

from recsys import native
from recsys.config import InputError
from recsys.memory import keep_freed

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)

REFUSED = "refused"
"""Key of the job's store, with the attempt, which says that a rank met bad input."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and nccl say when another rank is gone."""


@dataclass(frozen=True)
class World:
    """One process among those of its job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    attempt: int = 0
    """How often torchrun has started the job anew."""

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, plans and writes for all."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[World]:
    """Join the job that torchrun's variables describe, or be a job of one: nccl on CUDA, gloo on a CPU.

    Raises:
        InputError: more ranks than GPUs on this machine.
    """
    # Without MASTER_ADDR the others are not torchrun's: some schedulers set RANK and WORLD_SIZE too.
    launched = os.environ if "MASTER_ADDR" in os.environ else {}
    local_rank, local_size = int(launched.get("LOCAL_RANK", "0")), int(launched.get("LOCAL_WORLD_SIZE", "1"))
    world = World(
        rank=int(launched.get("RANK", "0")),
        size=int(launched.get("WORLD_SIZE", "1")),
        local_rank=local_rank,
        local_size=local_size,
        device=_device(local_rank, local_size),
        attempt=int(launched.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    if not world.is_first:
        native.log.setLevel(logging.ERROR)  # whether operators are missing, the first rank says for all
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle when there are fewer ranks than cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
        keep_freed()
    backend = "cuda:nccl,cpu:gloo" if world.device.type == "cuda" else "gloo"
    if launched:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield world
    except (InputError, OSError) as error:
        if world.size > 1 and not getattr(error, "on_all_ranks", False):
            _refuse(world, error)
        raise
    except RuntimeError as error:
        if world.size > 1 and any(words in str(error) for words in LOST_PEER):
            raise SystemExit(_lost(world, error)) from None
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def on_all_alike() -> Iterator[None]:
    """Refuse on all ranks what all of them find in the same config: one then speaks for all."""
    try:
        yield
    except InputError as error:
        error.on_all_ranks = True
        raise


def _refuse(world: World, error: Exception) -> None:
    """Leave word to the others, which wait for this rank and lose it."""
    with suppress(RuntimeError):  # whoever keeps the store may be gone before
        _default_store().set(f"{REFUSED}/{world.attempt}", "")
    if not world.is_first:
        print(f"recsys: rank {world.rank}: {error}", file=sys.stderr)  # noqa: T201  (rank 0 does not know of it)


def _lost(world: World, error: RuntimeError) -> int:
    """Exit status of a rank that has lost another one: 2 where that has told what it refused, and 1 with a line."""
    with suppress(RuntimeError):
        if _default_store().check([f"{REFUSED}/{world.attempt}"]):
            return 2
    what = next(words for words in LOST_PEER if words in str(error))
    print(f"recsys: rank {world.rank}: lost another rank ({what})", file=sys.stderr)  # noqa: T201
    return 1


def _device(local_rank: int, local_size: int) -> torch.device:
    # A CPU build of fbgemm beside a CUDA build of torch has no tables for the GPU.
    if not torch.cuda.is_available() or fbgemm_gpu.__variant__ == "cpu":
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise InputError(
            f"{local_size} ranks on a machine with {torch.cuda.device_count()} GPUs; start one a GPU (-j NODESxGPUS)"
        )
    return torch.device("cuda", local_rank)


def on_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give its result, or its error, to all ranks.

    What one rank decides, all must learn, or the others wait for it in the next collective until that times out.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = _attempt(work)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise _for_all(outcome[1])
    return outcome[0]


def on_every(work: Callable[[], T]) -> T:
    """Run `work` on every rank; where it fails on one, all raise that rank's error."""
    result, error = _attempt(work)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if isinstance(found, InputError) and errors[0] is None:
            raise _for_all(InputError(f"rank {rank}: {found}"))
        if found is not None:
            raise _for_all(found)
    return result


def _for_all(error: Exception) -> Exception:
    """Mark an error that every rank raises; what a disk refuses is bad input, too."""
    if isinstance(error, OSError):
        error = InputError(str(error))
    if isinstance(error, InputError):
        error.on_all_ranks = True
    return error


def _attempt(work: Callable[[], T]) -> list[Any]:
    """Result and error, one of them None."""
    try:
        return [work(), None]
    except Exception as error:
        return [None, error]


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
