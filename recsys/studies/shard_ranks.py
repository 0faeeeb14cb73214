"""The ranks of `recsys shard-bench`: those of a running job, or gloo ranks on this machine, started for it."""

import json
import logging
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from recsys.distributed import World, process_group
from recsys.progress import progress
from recsys.studies.shard_cases import Case, Layout
from recsys.studies.shard_config import ShardBenchConfig
from recsys.studies.shard_measure import Bench


def launched() -> bool:
    """Whether torchrun, or what is like it, started this process as a rank of a job."""
    return "MASTER_ADDR" in os.environ


def lacking(layout: Layout) -> str | None:
    """Why these ranks cannot be started here, or None where they can."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else None
    if devices is not None and layout.ranks > devices:
        return f"{layout.ranks} ranks need as many GPUs; this machine has {devices}"
    return None


def on_ranks(layout: Layout, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work(world, *arguments)` on ranks of this machine, each a process of its own; returns rank 0's JSON value.

    Args:
        layout: where it has several nodes, ranks take themselves to be on them.
        work: a module's function.
        arguments: what it gets beside the rank; they must pickle.
    """
    with tempfile.TemporaryDirectory(prefix="shard-bench-") as folder:
        result = Path(folder) / "result.json"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start = (layout, port, str(result), work, arguments)
        mp.start_processes(_rank, args=start, nprocs=layout.ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return json.loads(result.read_text())


def _rank(
    rank: int, layout: Layout, port: int, result: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": layout.ranks,
        "LOCAL_WORLD_SIZE": layout.ranks_per_node,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    with quiet(), process_group() as world:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // layout.ranks))
        found = work(world, *arguments)
    if rank == 0:
        Path(result).write_text(json.dumps(found))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch, torchrec and fbgemm tell their own developers with every module that is sharded."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def sweep(
    world: World, config: ShardBenchConfig, possible: Sequence[Case], seconds: float
) -> list[list[list[list[float]]]]:
    """Measure cases one after another for so many seconds; returns `Bench.measure` of those that there was time for."""
    found: list[list[list[list[float]]]] = []
    begin = time.monotonic()
    what = "{1} x {0} ranks".format(*possible[0].layout)
    with progress(what, total=seconds, unit="s", show=world.is_first) as advance:
        seen = 0.0
        for case in possible:
            if not _go_on(time.monotonic() - begin < seconds):
                break
            found.append(_measure(case, world, config).tolist())
            now = time.monotonic() - begin
            advance(min(now, seconds) - min(seen, seconds), f"{len(found)} of {len(possible)} cases")
            seen = now
    return found


def _go_on(yes: bool) -> bool:
    """What rank 0 decides by its clock."""
    decided = torch.tensor([int(yes)])
    dist.broadcast(decided, src=0)
    return bool(decided.item())


def _measure(case: Case, world: World, config: ShardBenchConfig) -> Tensor:
    workload = case.workload(config.rows)
    bench = Bench(workload, case.plan(workload), world)
    return bench.measure(max(3, config.repeats // config.rounds), config.case_seconds / config.rounds)
