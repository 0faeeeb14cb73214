"""What quantised tables cost and save: lookups against the fused fp32 table, and a run's metrics and bytes.

All tables stand in one process and take turns on the same batches, so that the ratios hold on a machine whose cores are
shared. A lookup is that of inference: ids in, x_BFD out.
"""

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from facts import facts
from phases import spread
from recsys.distributed import World, process_group
from recsys.embeddings.config import EmbeddingConfig, Owner, TableDtype, served_dtype
from recsys.embeddings.init import init_tables
from recsys.embeddings.quantised import quantise_tables
from recsys.embeddings.tables import Tables
from recsys.training.evaluate import EvaluateConfig, evaluate

FUSED: tuple[TableDtype, ...] = ("fp32", "fp16")
SERVED = ("fp32", "fp16", "int8", "int4", "int2")
NUM_BATCHES, WARM_UP = 16, 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure quantised tables."""

    json: Path
    """File for the result."""
    run: Path | None = None
    """Run folder whose test rows are predicted with each kind of tables."""
    num_tables: int = 26
    """Tables of one size."""
    rows: int = 100_000
    """Of a table; ids are uniform, so that few stay in a cache."""
    dims: tuple[int, ...] = (16, 64)
    """Widths of the tables."""
    batch_sizes: tuple[int, ...] = (64, 1024)
    """Rows of a batch."""
    hotness: tuple[int, ...] = (1, 10)
    """Ids of a row and table."""
    rounds: int = 7
    """Turns of every kind."""
    seconds: float = 0.2
    """A turn takes at least so long."""
    threads: int = 1
    """Of torch."""


def tables_of(config: Config, dim: int, dtype: TableDtype, world: World) -> nn.Module:
    """Tables as a job of one rank has them, filled."""
    owner = Owner(name="m", seed="0", config=EmbeddingConfig(embedding_dim=dim, table_dtype=dtype))
    tables = Tables({f"C{index}": config.rows for index in range(config.num_tables)}, [owner])
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    words = construct_module_sharding_plan(
        tables.tables,
        {table.name: table_wise(rank=0) for table in tables.tables.embedding_bag_configs()},
        sharder=sharder,
        local_size=1,
        world_size=1,
        device_type=world.device.type,
    )
    sharded = DistributedModelParallel(
        tables, device=world.device, plan=ShardingPlan({"tables": words}), sharders=[sharder], init_data_parallel=False
    )
    init_tables(sharded, lambda table: (table, 0.05))
    return sharded.eval()


def batches_of(config: Config, batch_size: int, hotness: int) -> list[KeyedJaggedTensor]:
    """Batches of uniform ids."""
    generator = torch.Generator().manual_seed(0)
    num_ids, keys = batch_size * hotness * config.num_tables, [f"C{index}" for index in range(config.num_tables)]
    lengths = torch.full((batch_size * config.num_tables,), hotness, dtype=torch.int32)
    offsets = torch.arange(len(lengths) + 1, dtype=torch.int32) * hotness
    return [
        KeyedJaggedTensor(
            keys=keys,
            values=torch.randint(config.rows, (num_ids,), dtype=torch.int32, generator=generator),
            lengths=lengths,
            offsets=offsets,
            stride=batch_size,
            length_per_key=[batch_size * hotness] * config.num_tables,
        )
        for _ in range(NUM_BATCHES)
    ]


def measure(config: Config, dim: int, world: World) -> list[dict[str, Any]]:
    """Let all kinds of one width take turns."""
    kinds: dict[str, nn.Module] = {f"fused {dtype}": tables_of(config, dim, dtype, world) for dtype in FUSED}
    sizes = {}
    for name in SERVED:
        kinds[name] = tables_of(config, dim, "fp32", world)
        found = quantise_tables(kinds[name], served_dtype(name))
        sizes[name] = found.after
        sizes["fused fp32"] = found.before
    results = []
    for batch_size, hotness in itertools.product(config.batch_sizes, config.hotness):
        batches = batches_of(config, batch_size, hotness)
        turns: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(config.rounds + 1):
            for name, tables in kinds.items():
                spent = _lookup_ms(tables, batches, config.seconds if turn else 0.0)
                if turn:  # the first warms up
                    turns[name].append(spent)
        fused = turns["fused fp32"]
        results.append(
            {
                "dim": dim,
                "batch_size": batch_size,
                "hotness": hotness,
                "bytes": sizes,
                "ms": {name: spread(times) for name, times in turns.items()},
                "throughput": {
                    name: spread([base / one for base, one in zip(fused, times, strict=True)])
                    for name, times in turns.items()
                },
            }
        )
    return results


@torch.no_grad()
def _lookup_ms(tables: Callable[..., Any], batches: list[KeyedJaggedTensor], seconds: float) -> float:
    """CPU milliseconds of a lookup."""
    for batch in batches[:WARM_UP]:
        tables(batch)
    began, before, done = time.perf_counter(), time.process_time(), 0
    while not done or time.perf_counter() - began < seconds:
        for batch in batches:
            tables(batch)
        done += len(batches)
    return 1e3 * (time.process_time() - before) / done


def accuracy(run: Path, world: World) -> list[dict[str, Any]]:
    """Metrics of a run on its test rows, and bytes, with each kind of tables; the first as they were trained."""
    found = []
    for dtype in (None, *SERVED):
        evaluation = evaluate(EvaluateConfig(run=run, tables=dtype), world)
        assert evaluation is not None
        metrics = {name: asdict(each) for name, each in evaluation.metrics.items()}
        found.append({"tables": dtype, "bytes": evaluation.tables and evaluation.tables.after, "metrics": metrics})
    return found


def main(config: Config) -> dict[str, Any]:
    """Measure all widths, and the run if there is one."""
    load = os.getloadavg()
    with process_group() as world:
        torch.set_num_threads(config.threads)
        metrics = accuracy(config.run, world) if config.run else []
        results = [result for dim in config.dims for result in measure(config, dim, world)]
    return {
        "results": results,
        "run": metrics,
        **facts(__file__, ("torch", "torchrec", "numpy"), load),
        "config": asdict(config) | {"json": str(config.json), "run": str(config.run) if config.run else None},
    }


def table(result: dict[str, Any]) -> str:
    """Throughput against the fused fp32 table, then metrics."""
    names = ["fused fp32", "fused fp16", *SERVED]
    lines = [f"{'dim':>4}{'batch':>6}{'ids':>4}  {'':<11}" + "".join(f"{name:>12}" for name in names)]
    for row in result["results"]:
        where = f"{row['dim']:>4}{row['batch_size']:>6}{row['hotness']:>4}  "
        lines.append(
            f"{where}{'throughput':<11}" + "".join(f"{row['throughput'][name]['median']:>12.2f}" for name in names)
        )
        lines.append(f"{where}{'CPU ms':<11}" + "".join(f"{row['ms'][name]['median']:>12.3f}" for name in names))
    for row in result["run"]:
        merged = row["metrics"]["merged"]
        size = f"{row['bytes']:,} bytes" if row["bytes"] else ""
        name = row["tables"] or "as trained"
        lines.append(f"{name:<11} AUC {merged['auc']:.5f} logloss {merged['logloss']:.5f} {size:>18}")
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = main(config)
    config.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
