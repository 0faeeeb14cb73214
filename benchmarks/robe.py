"""What ROBE costs a step beside whole tables: CPU and wall time of the lookup, and of the backward with the update.

Whole tables are TorchRec's, sharded on one rank: FBGEMM's kernel with row-wise Adagrad fused in. ROBE updates its array
by Adagrad within the backward too, with an accumulator for each element. All stand in one process and take turns on the
same batches, so that the ratios hold on a machine whose cores are shared.
"""

import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from facts import facts
from phases import CLOCKS, now, spread
from recsys.distributed import World, process_group
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.fields import Embeddings
from recsys.embeddings.init import init_tables
from recsys.embeddings.robe import RobeArray
from recsys.sharding.torchrec import TableOptimizer, TableSharder

PHASES = ("lookup", "backward and update")
WARM_UP_STEPS, NUM_BATCHES, LR, EPS = 3, 4, 0.01, 1e-8


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure ROBE against whole tables."""

    json: Path
    """File for the result."""
    features: int = 26
    """Tables."""
    num_ids: int = 400_000
    """Rows of each."""
    batch_size: int = 8192
    """Rows of a batch, each with one id a feature."""
    dims: tuple[int, ...] = (16, 64)
    """Columns of a table."""
    block_sizes: tuple[int, ...] = (8, 32, 128)
    """Of ROBE."""
    compressions: tuple[float, ...] = (10, 100, 1000)
    """Of ROBE with the block size 32; the other block sizes take the last."""
    rounds: int = 15
    """Turns of each."""
    threads: int = 1
    """Of torch."""


class Contender:
    """Embeddings that take turns with others."""

    def __init__(self, embeddings: nn.Module, step: Callable[[KeyedJaggedTensor], Tensor]) -> None:
        self.embeddings, self._step = embeddings, step
        self.turns: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}

    def turn(self, ids: KeyedJaggedTensor, grad_BFD: Tensor) -> None:
        """One step; keeps wall and CPU milliseconds of its phases."""
        marks = [now()]
        x_BFD = self._step(ids)
        marks.append(now())
        x_BFD.backward(grad_BFD)  # type: ignore[no-untyped-call]
        marks.append(now())
        for phase, (before, after) in zip(PHASES, itertools.pairwise(marks), strict=True):
            self.turns[phase].append([1e3 * (end - begin) for begin, end in zip(before, after, strict=True)])


def contender(sparse: dict[str, int], config: EmbeddingConfig, world: World) -> Contender:
    """Embeddings as a job of one rank has them."""
    embeddings = Embeddings(sparse, [Owner(name="one", seed="0", config=config)])
    optimizer = TableOptimizer(kind="rowwise_adagrad", lr=LR, eps=EPS)
    module: nn.Module = embeddings
    if config.embeddings == "tables":
        sharder = TableSharder(fused_params=optimizer.fused_params)
        tables = embeddings.by_kind["tables"].tables
        on_rank = {table.name: table_wise(rank=0, compute_kernel="fused") for table in tables.embedding_bag_configs()}  # type: ignore[operator, union-attr]
        words = construct_module_sharding_plan(tables, on_rank, sharder, 1, 1, world.device.type)
        sharded = module = DistributedModelParallel(
            embeddings,
            device=world.device,
            plan=ShardingPlan({"by_kind.tables.tables": words}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        assert sharded.fused_optimizer.params, "else gradients are dense"
        init_tables(module, embeddings.table_start)
    for part in embeddings.modules():
        if isinstance(part, RobeArray):
            part.fuse(torch.optim.Adagrad(part.parameters(), lr=LR, eps=EPS))
    return Contender(module, lambda ids: module(ids)[0])


def measure(dim: int, config: Config, world: World) -> list[dict[str, Any]]:
    """Let whole tables and all ROBEs of one dimension take turns."""
    sparse = {f"f{index}": config.num_ids for index in range(config.features)}
    kinds = {"tables": EmbeddingConfig(embedding_dim=dim)}
    for block_size in config.block_sizes:
        for compression in config.compressions if block_size == 32 else config.compressions[-1:]:
            kinds[f"robe Z={block_size} {compression:g}x"] = EmbeddingConfig(
                embeddings="robe", embedding_dim=dim, block_size=block_size, compression=compression
            )
    contenders = {name: contender(sparse, kind, world) for name, kind in kinds.items()}
    num_bags = config.features * config.batch_size
    generator = torch.Generator().manual_seed(0)
    batches = [
        KeyedJaggedTensor(
            keys=list(sparse),
            values=torch.randint(config.num_ids, (num_bags,), dtype=torch.int32, generator=generator),
            lengths=torch.ones(num_bags, dtype=torch.int32),
            offsets=torch.arange(num_bags + 1, dtype=torch.int32),
            stride=config.batch_size,
            length_per_key=[config.batch_size] * config.features,
        )
        for _ in range(NUM_BATCHES)
    ]
    grad_BFD = torch.randn(config.batch_size, config.features, dim, generator=generator) / config.batch_size
    for turn in range(WARM_UP_STEPS + config.rounds):
        for one in contenders.values():
            one.turn(batches[turn % NUM_BATCHES], grad_BFD)
    return [_result(name, dim, one, contenders["tables"]) for name, one in contenders.items()]


def _result(name: str, dim: int, one: Contender, tables: Contender) -> dict[str, Any]:
    """Milliseconds of a phase, and their ratios to those of whole tables, turn by turn."""
    phases: dict[str, Any] = {}
    for phase in PHASES:
        turns, whole = (own.turns[phase][WARM_UP_STEPS:] for own in (one, tables))
        for index, clock in enumerate(CLOCKS):
            pairs = [(mine[index], its[index]) for mine, its in zip(turns, whole, strict=True)]
            phases.setdefault(phase, {})[clock] = {
                "ms": spread([mine for mine, _ in pairs]),
                "ratio": spread([mine / its for mine, its in pairs]),
            }
    num_floats = sum(parameter.numel() for parameter in one.embeddings.parameters())
    return {"name": name, "dim": dim, "megabytes": num_floats * 4e-6, "phases": phases}


def _copy_gigabytes_per_second(num_floats: int = 1 << 26) -> float:
    """What this machine copies on one thread, read and written."""
    source, out, seconds = torch.ones(num_floats), torch.empty(num_floats), []
    for _ in range(5):
        before = now()
        out.copy_(source)
        seconds.append(now()[1] - before[1])
    return 8e-9 * num_floats / statistics.median(seconds)


def main(config: Config) -> dict[str, Any]:
    """Measure all dimensions."""
    load = os.getloadavg()
    with process_group() as world:
        torch.set_num_threads(1)
        copied = _copy_gigabytes_per_second()
        torch.set_num_threads(config.threads)
        results = [result for dim in config.dims for result in measure(dim, config, world)]
    return {
        "results": results,
        "copied_gigabytes_per_second": copied,
        **facts(__file__, ("torch", "torchrec", "fbgemm-gpu-cpu", "numba"), load),
        "config": asdict(config) | {"json": str(config.json)},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Milliseconds, and ratios to whole tables."""
    lines = [f"{'D':>4} {'':<20}{'MB':>9}" + "".join(f"{f'{phase}: CPU ms, ratio, wall':>46}" for phase in PHASES)]
    for result in results:
        line = f"{result['dim']:>4} {result['name']:<20}{result['megabytes']:>9.1f}"
        for phase in PHASES:
            cpu, wall = (result["phases"][phase][clock] for clock in ("cpu", "wall"))
            ratio = f"{cpu['ratio']['median']:.2f} ({cpu['ratio']['low']:.2f} to {cpu['ratio']['high']:.2f})"
            line += f"{cpu['ms']['median']:>16.1f}{ratio:>22}{wall['ratio']['median']:>8.2f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = main(config)
    config.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["results"]))
    print(f"copying: {result['copied_gigabytes_per_second']:.1f} GB/s on one thread")
