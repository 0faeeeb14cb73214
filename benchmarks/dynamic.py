"""What the map of dynamic tables costs beside looking their rows up: ids a second of CPU time, in turns.

Batches of raw 64-bit ids, drawn by Zipf's law, go through the map (learning, finding, settling), through FBGEMM's
tables of as many rows, which take the rows that the map gives, and, with --torchrec, through TorchRec's managed
collision modules. All take turns in one process, so that the ratios hold on a machine whose cores are shared.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from facts import facts
from recsys.embeddings.dynamic import DynamicMaps
from recsys.embeddings.dynamic_map import RESERVED_ROWS, MapRules

SPREAD = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the map of dynamic tables."""

    json: Path
    """File for the result."""
    batch_size: int = 8192
    """Rows of a batch."""
    features: int = 26
    """One id a row each."""
    num_values: int = 4_000_000
    """Values that a feature's ids are drawn from."""
    exponent: float = 1.05
    """Of Zipf's law."""
    rows: int = 100_000
    """Of each table."""
    dim: int = 16
    """Columns of each table."""
    admission: int = 0
    """How often an id must have been seen before it gets a row."""
    interval: int = 100
    """Batches between evictions."""
    batches: int = 400
    """Of the warm-up, which fills the tables."""
    turns: int = 100
    """Batches that are timed."""
    torchrec: bool = True
    """Whether TorchRec's modules take part."""
    threads: int = 1
    """Of torch and of the map."""


class Ids:
    """Draws batches of ids, in the order of a KeyedJaggedTensor's values."""

    def __init__(self, config: Config) -> None:
        self._size = config.features, config.batch_size
        weights = np.arange(1, config.num_values + 1) ** -config.exponent
        self._shares = weights.cumsum() / weights.sum()
        self._random = np.random.default_rng(0)

    def draw(self) -> Tensor:
        """Int64 [features * batch_size]; the same values in all features."""
        ranks = np.searchsorted(self._shares, self._random.random(self._size)).reshape(-1)
        return torch.from_numpy((ranks + 1) * np.int64(SPREAD))


def measure(config: Config) -> dict[str, Any]:
    """Fill maps and tables, then let all take turns."""
    torch.set_num_threads(config.threads)
    names = [f"C{i}" for i in range(config.features)]
    rules = MapRules(rows=config.rows, admission=config.admission, eviction="lfu", interval=10**9, buckets=48)
    maps = DynamicMaps(dict.fromkeys(names, 2**64), rules)
    evicted: list[int] = []
    maps.reset = lambda _, rows: evicted.append(len(rows))
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(RESERVED_ROWS + config.rows, config.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * config.features,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    )
    tables.init_embedding_weights_uniform(-0.01, 0.01)
    offsets = torch.arange(config.features * config.batch_size + 1)
    ids, grad = Ids(config), torch.full((config.batch_size, config.features * config.dim), 1e-3)

    def keyed(values: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            keys=names, values=values, lengths=torch.ones(len(values), dtype=torch.int32), stride=config.batch_size
        )

    for batch in range(config.batches):
        maps(keyed(ids.draw()))
        if batch % config.interval == config.interval - 1:
            maps._settle()
    modules = [_torchrec_module(config) for _ in names] if config.torchrec else []
    spent: dict[str, list[float]] = {}
    own_share = 0.0

    def timed(what: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        done = work()
        spent.setdefault(what, []).append(time.process_time() - started)
        return done

    for _ in range(config.turns):
        values = ids.draw()
        batch = keyed(values)
        batch.length_per_key(), batch.offset_per_key()
        rows = timed("learn", lambda: maps.train()(batch)).values()  # noqa: B023
        timed("find", lambda: maps.eval()(batch))  # noqa: B023
        own_share += (rows >= RESERVED_ROWS).float().mean().item() / config.turns
        found = timed("look up", lambda: tables(rows.long(), offsets))  # noqa: B023
        timed("update", lambda: found.backward(grad))  # noqa: B023
        for index, module in enumerate(modules):
            part = values[index * config.batch_size :][: config.batch_size]
            feature = {names[0]: JaggedTensor(part, lengths=torch.ones(len(part), dtype=torch.int32))}
            timed(f"torchrec {index}", lambda: module.remap(module.profile(feature)))  # noqa: B023
    evicted.clear()
    maps.train()
    timed("settle", maps._settle)
    return _summary(config, spent, own_share, sum(evicted))


def _torchrec_module(config: Config) -> MCHManagedCollisionModule:
    return MCHManagedCollisionModule(
        zch_size=config.rows,
        device=torch.device("cpu"),
        eviction_policy=DistanceLFU_EvictionPolicy(),
        eviction_interval=config.interval,
        input_hash_size=2**62,
    ).train()


def _summary(config: Config, spent: dict[str, list[float]], own_share: float, num_evicted: int) -> dict[str, Any]:
    if config.torchrec:
        parts = [spent.pop(f"torchrec {index}") for index in range(config.features)]
        spent["torchrec"] = [sum(turn) for turn in zip(*parts, strict=True)]
    num_ids = config.batch_size * config.features
    look_up = statistics.median(spent["look up"])
    settling = sum(spent.pop("settle"))
    result: dict[str, Any] = {
        what: {
            "ms": 1e3 * statistics.median(turns),
            "mean_ms": 1e3 * statistics.fmean(turns),
            "million_ids_per_cpu_second": num_ids / statistics.median(turns) / 1e6,
            "of_look_up": statistics.median(turns) / look_up,
        }
        for what, turns in spent.items()
    }
    return {
        "costs": result,
        "settle_ms": 1e3 * settling,
        "settle_ms_a_batch": 1e3 * settling / config.interval,
        "evicted": num_evicted,
        "share_with_own_row": own_share,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':<10}{'CPU ms':>8}{'mean':>8}{'M ids/s':>9}{'of look up':>12}"]
    for what, cost in result["costs"].items():
        lines.append(
            f"{what:<10}{cost['ms']:>8.2f}{cost['mean_ms']:>8.2f}{cost['million_ids_per_cpu_second']:>9.1f}"
            f"{cost['of_look_up']:>12.2f}"
        )
    lines.append(
        f"settle    {result['settle_ms']:>8.2f}, {result['settle_ms_a_batch']:.2f} a batch; {result['evicted']:,} rows "
        f"changed hands; {result['share_with_own_row']:.1%} of ids have a row of their own"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    load = os.getloadavg()
    result = measure(config)
    whole = facts(__file__, ["torch", "torchrec", "fbgemm-gpu-cpu", "numba"], load) | {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "result": result,
    }
    config.json.write_text(json.dumps(whole, indent=2) + "\n")
    print(table(result))
