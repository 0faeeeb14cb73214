"""What exact metrics over many predictions cost: memory and time of a rank.

Every rank makes its share of the predictions batch by batch, as evaluation does, and keeps them; then all ranks compute
every metric together. The growth of a rank's resident memory is read while they do, so the predictions count too.
AUC is compared with that of a histogram of 65,536 bins, which is off by at most what is printed beside it.
"""

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from facts import facts
from recsys.metrics.click import ClickScores
from recsys.metrics.histogram import BINS, area, bins_of

MADE_ROWS = 65_536
"""Rows that are made at once."""
SEED, BIAS = 7, -2.0
PORT = 29_517
READ_EVERY_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure metrics of predictions that follow their own probabilities."""

    json: Path
    """File for the result."""
    rows: int = 100_000_000
    """Predictions over all ranks."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks to measure, each a process of this machine."""
    decimals: int | None = None
    """Round logits to so many decimals, which ties them."""


class Peak:
    """Highest resident memory of this process beyond that at the start."""

    def __init__(self) -> None:
        self._process, self._stopped = psutil.Process(), threading.Event()
        self._before = self._highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(READ_EVERY_S):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def growth(self) -> int:
        """End, and return bytes."""
        self._stopped.set()
        self._thread.join()
        return self._highest - self._before


def main(config: Config) -> dict[str, Any]:
    """Measure every number of ranks, and return what was measured."""
    load = os.getloadavg()
    cases = {str(size): measure(size, config) for size in config.ranks}
    return {
        "rows": config.rows,
        "decimals": config.decimals,
        "ranks": cases,
        **facts(__file__, ["numpy", "torch"], load),
    }


def measure(size: int, config: Config) -> dict[str, Any]:
    """Run `size` ranks; returns metrics, and of each rank memory and seconds."""
    found: Any = mp.get_context("spawn").SimpleQueue()
    spawn: Any = mp.start_processes
    spawn(rank, args=(size, config, found), nprocs=size, start_method="spawn")
    ranks = sorted((found.get() for _ in range(size)), key=lambda result: result["rank"])
    metrics, *_ = [each.pop("metrics") for each in ranks]
    print(f"{size} ranks: " + "; ".join(f"{each['bytes'] / 2**30:.2f} GiB, {each['seconds']:.1f} s" for each in ranks))
    return {"metrics": metrics, "by_rank": ranks}


def rank(index: int, size: int, config: Config, found: Any) -> None:
    """Make one rank's share, and compute the metrics of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=index, world_size=size)
    rng = np.random.default_rng([SEED, index])
    scores, bins = ClickScores(), torch.zeros(2 * BINS, dtype=torch.float64)
    warm_up()
    dist.barrier()
    peak, started, making = Peak(), time.perf_counter(), 0.0
    for begin in range(0, config.rows // size, MADE_ROWS):
        at = time.perf_counter()
        logits = rng.standard_normal(min(MADE_ROWS, config.rows // size - begin), np.float32) + np.float32(BIAS)
        logits = logits if config.decimals is None else logits.round(config.decimals)
        labels = rng.random(len(logits), np.float32) < 1 / (1 + np.exp(-logits))
        places = bins_of(torch.from_numpy(logits)) + BINS * torch.from_numpy(labels)
        bins.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
        making += time.perf_counter() - at
        scores.add(logits, labels, np.ones(len(logits), np.float32))
    kept = time.perf_counter()
    metrics = scores.metrics(dist.group.WORLD)
    ended = time.perf_counter()
    growth = peak.growth()
    dist.all_reduce(bins)
    binned, error = area(bins.view(2, BINS))
    assert abs(metrics.auc - binned) <= error, (metrics.auc, binned, error)
    told = {"auc": metrics.auc, "auprc": metrics.auprc, "ne": metrics.ne, "auc_binned": binned, "binned_error": error}
    seconds = {"seconds": ended - started - making, "seconds_at_the_end": ended - kept}
    found.put({"rank": index, "bytes": growth, **seconds, "metrics": told})
    dist.destroy_process_group()


def warm_up() -> None:
    """Have what is loaded or compiled only once loaded now."""
    few = np.arange(4, dtype=np.float32)
    ClickScores().add(few, few % 2, np.ones(4, np.float32)).metrics(dist.group.WORLD)


if __name__ == "__main__":
    arguments = tyro.cli(Config)
    result = main(arguments)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ranks"], indent=2))
