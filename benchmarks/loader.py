"""What loading prepared data costs: CPU, wall time and memory, beside copying the same bytes in memory.

Reads a prepared folder batch by batch in one thread of decoding and one of the loop's, and counts the CPU-seconds of
both; the page cache and the loader's own memory are warm. The copy is timed in the same process, before and after, so
that the ratio holds on a machine whose cores are shared. Every case has a process of its own, and so its own peak of
memory.
"""

import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from facts import facts
from recsys.data.loader import Loader, LoaderConfig
from recsys.data.schema import Schema

SEED, CTR, ZIPF_EXPONENT = 7, 0.25, 1.05
GROUP_ROWS, FILE_GROUPS = 65_536, 8
INTEGERS = 13
SIZES = [round(4 * 1_250_000 ** (field / 25)) for field in range(26)]
"""Ids of each feature, from 4 to 5 million."""
COPIED_BYTES = 64 * 2**20
"""More than a CPU's cache holds."""

CASES = {
    "one-hot, shuffled": (LoaderConfig(), True),
    "one-hot, in order": (LoaderConfig(), False),
    "multi-hot, uniform": (LoaderConfig(multi_hot="uniform"), True),
    "multi-hot, pareto": (LoaderConfig(multi_hot="pareto"), True),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the loader on prepared data."""

    json: Path
    """File for the result."""
    data: Path | None = None
    """Prepared folder with Criteo's columns; made of zipf columns when not given."""
    rows: int = 2_000_000
    """Training rows to make."""
    batch_size: int = 8192
    """Rows of a batch."""
    epochs: int = 3
    """Epochs to time, after one that warms up."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which to measure."""


def main(config: Config) -> dict[str, Any]:
    """Make data if there is none, measure every case, and return what was measured."""
    load = os.getloadavg()
    made = None if config.data else Path(tempfile.mkdtemp(prefix="benchmark-loader-"))
    data = config.data or made
    assert data is not None
    try:
        if made:
            make_data(made, config.rows)
        cases = {}
        for name in config.cases:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                cases[name] = pool.submit(measure, name, data, config).result()
    finally:
        if made:
            shutil.rmtree(made)
    return {
        **cases[config.cases[0]],
        "cases": cases,
        **facts(__file__, ("numpy", "pyarrow", "torch", "torchrec"), load),
        "config": asdict(config) | {"json": str(config.json), "data": str(config.data) if config.data else None},
    }


def make_data(folder: Path, num_rows: int) -> None:
    """Write a prepared folder of training rows: a label, 13 dense and 26 sparse columns, as `recsys prepare` stores."""
    sparse = {f"C{field + 1}": num_ids for field, num_ids in enumerate(SIZES)}
    dense = tuple(f"I{field + 1}" for field in range(INTEGERS))
    schema = Schema(name="zipf", dense=dense, sparse=sparse, labels=("label",))
    kinds = {"label": pa.uint8()} | dict.fromkeys(dense, pa.float32()) | dict.fromkeys(sparse, pa.int32())
    columns = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
    (folder / "train").mkdir(parents=True)
    file_rows = FILE_GROUPS * GROUP_ROWS
    for part, first in enumerate(range(0, num_rows, file_rows)):
        rng = np.random.default_rng([SEED, part])
        rows = min(file_rows, num_rows - first)
        values = {"label": rng.random(rows) < CTR}
        values |= {name: np.log1p(rng.geometric(0.5 ** (1 + i), rows) - 1) for i, name in enumerate(dense)}
        values |= {name: _zipf(rng, num_ids, rows) for name, num_ids in sparse.items()}
        table = pa.table(
            [pa.array(values[name].astype(kind.to_pandas_dtype())) for name, kind in kinds.items()], columns
        )
        path = folder / "train" / f"part-{part:05d}.parquet"
        pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="lz4")
    schema.save(folder)


def _zipf(rng: np.random.Generator, num_ids: int, rows: int) -> np.ndarray:
    """Draw ids of the power law x^-ZIPF_EXPONENT on [1, num_ids + 1), rounded down; the frequent ones are the small."""
    last = (num_ids + 1) ** (1 - ZIPF_EXPONENT)
    rank = (1 - rng.random(rows) * (1 - last)) ** (1 / (1 - ZIPF_EXPONENT))
    return rank.clip(max=num_ids).astype(np.int64) - 1


def measure(name: str, data: Path, config: Config) -> dict[str, float]:
    """Time one case."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    settings, shuffle = CASES[name]
    loader = Loader(data, "train", batch_size=config.batch_size, config=settings, shuffle=shuffle)
    warm = next(loader.epoch(0))
    batch_bytes = sum(tensor.nbytes for tensor in (warm.dense, warm.labels, warm.weights, warm.sparse.values()))
    copies = [_copy_seconds()]
    started, rows, ids = _cpu_seconds(), 0, 0
    for _ in loader.epoch(0):
        pass
    warm_up_s = _cpu_seconds() - started
    cpu_s, wall_s = _cpu_seconds(), time.perf_counter()
    for epoch in range(1, 1 + config.epochs):
        for batch in loader.epoch(epoch):
            rows += len(batch.labels)
            ids += batch.sparse.values().numel()
    cpu_s, wall_s = _cpu_seconds() - cpu_s, time.perf_counter() - wall_s
    peak = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    copies.append(_copy_seconds())
    copy_s = min(copies) * batch_bytes * rows / config.batch_size
    return {
        "rows_per_cpu_second": rows / cpu_s,
        "ids_per_cpu_second": ids / cpu_s,
        "cpu_seconds": cpu_s,
        "wall_seconds": wall_s,
        "rows": rows,
        "batch_bytes": batch_bytes,
        "warm_up_cpu_seconds": warm_up_s,
        "peak_rss_bytes": peak,
        "memcpy_cpu_seconds": copy_s,
        "memcpy_ratio": cpu_s / copy_s,
    }


def _copy_seconds() -> float:
    """CPU-seconds of copying a byte, the best of a few."""
    source, target = np.ones(COPIED_BYTES, dtype=np.uint8), np.ones(COPIED_BYTES, dtype=np.uint8)
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        np.copyto(target, source)
        seconds.append(time.thread_time() - started)
    return min(seconds) / COPIED_BYTES


def _cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    usage = getrusage(RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _table(cases: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<20}{'M rows/CPU-s':>14}{'M ids/CPU-s':>14}{'M rows/s':>10}{'x memcpy':>10}{'peak MiB':>10}"]
    for name, case in cases.items():
        rates = (case["rows_per_cpu_second"], case["ids_per_cpu_second"], case["rows"] / case["wall_seconds"])
        rows, ids, wall = (rate / 1e6 for rate in rates)
        peak = case["peak_rss_bytes"] / 2**20
        lines.append(f"{name:<20}{rows:>14.2f}{ids:>14.1f}{wall:>10.2f}{case['memcpy_ratio']:>10.1f}{peak:>10,.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = main(config)
    config.json.write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result["cases"]))
