"""What predictions cost: latency of a call by the rows of its batch, and rows a second beside the forward floor.

Members are sharded as `recsys predict` does it, with random weights, and called as it calls them: ids in, logits out,
tables included, no gradients; logits of several members are merged. Each call gets a new batch. The floor is the matrix
products alone of the members' forward pass, in bf16, at their true shapes. All cases of one batch size take turns.

    python benchmarks/inference.py --backbone dcnv2 --json inference.json
    python benchmarks/inference.py --backbone dcnv2 --members 1 4 --plot inference.png
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

# As `recsys` does, before torch is imported: threads that spin starve those they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import tyro
from inference_display import PERCENTILES, plot, shown
from rich.console import Console
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from facts import facts
from harness import append, result, speedup, summary
from jobs import quieten_libraries
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.embeddings.init import init_tables
from recsys.embeddings.precision import for_inference
from recsys.members import ModelConfig
from recsys.merge.rules import Merge
from recsys.training.casts import cast_once
from recsys.training.sharded import shard
from roofline import Floor, member_products
from workload import Setting

PACKAGES = ("torch", "torchrec", "numpy")
FLOOR = "floor"
SEED = 7
SETTLING_CALLS = 3
"""At the beginning of each turn, not timed: caches are full of another case's data."""
LEAST_CALLS = 3
"""Of a turn."""
Call = Callable[[], object]
Seconds = list[list[float]]
"""Of each call, turn by turn."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure predictions."""

    backbone: str = "dcnv2"
    """Any of `recsys backbones`."""
    sizes: Literal["paper", "default"] = "paper"
    """Of the backbone: those of the recipes *_paper, or its own defaults, which are smaller."""
    members: tuple[int, ...] = (1,)
    """Seeds of the backbone whose logits are merged; several values are compared."""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the members; several are compared."""
    batch_sizes: tuple[int, ...] = (1, 16, 256, 4096)
    """Rows of a call."""
    fields: int = 39
    """Sparse fields; there are no dense columns."""
    rows_per_table: int = 25_000
    """Ids of a field, drawn uniformly."""
    dim: int = 16
    """Columns of a table."""
    calls: int = 1000
    """Of each case and batch size; fewer, but three a turn, where they would take longer than:"""
    seconds: float = 15.0
    """Of each case and batch size."""
    turns: int = 10
    """In which the calls are made."""
    json: Path | None = None
    """Append results to this file, one line each; `recsys bench compare` compares two such files."""
    plot: Path | None = None
    """Draw latency by batch size to this PNG."""

    def __post_init__(self) -> None:
        for name in ("members", "precision", "batch_sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one value")
        for name in ("calls", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds {self.seconds} must be a finite number above 0")
        for members, precision, rows in itertools.product(self.members, self.precision, self.batch_sizes):
            self.setting(members, precision, rows)

    def setting(self, members: int, precision: Literal["fp32", "bf16"], batch_size: int) -> Setting:
        """What one case is."""
        return Setting(
            backbone=self.backbone,
            sizes=self.sizes,
            fields=self.fields,
            rows_per_table=self.rows_per_table,
            dim=self.dim,
            batch_size=batch_size,
            members=members,
            model=ModelConfig(precision=precision),
        )

    def schema(self) -> Schema:
        """Of the batches."""
        features = dict.fromkeys((f"C{index + 1}" for index in range(self.fields)), self.rows_per_table)
        return Schema(name="inference", dense=(), sparse=features, labels=("label",))


def predictor(setting: Setting, schema: Schema, world: World) -> Callable[[Batch], Tensor]:
    """A function of a batch to its merged logits, made of members with random weights as `Predictor` makes a run's."""
    config = setting.config(Path("unread"))
    specs = [replace(spec, model=for_inference(spec.model, world.device)) for spec in config.specs()]
    task, model, _ = shard(config, schema, specs, setting.batch_size, world)
    init_tables(task, model.embedding.table_start)
    cast_once(model, schema)
    task.eval()
    merge = Merge(rule=config.merge)

    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        logits_BM = task(batch.to(world.device))[1].logits_BM
        return merge(logits_BM.double()).cpu()  # which waits for the device

    return predict


def batches(schema: Schema, rows: int) -> Iterator[Batch]:
    """New batches without end, as the loader makes them: lengths and offsets are there already."""
    generator = torch.Generator().manual_seed(SEED)
    features = list(schema.sparse)
    lengths = torch.ones(rows * len(features), dtype=torch.int32)
    offsets = torch.arange(len(lengths) + 1, dtype=torch.int32)
    most = max(schema.sparse.values())
    while True:
        ids = torch.randint(most, (len(lengths),), dtype=torch.int32, generator=generator)
        sparse = KeyedJaggedTensor(
            keys=features,
            values=ids,
            lengths=lengths,
            offsets=offsets,
            stride=rows,
            length_per_key=[rows] * len(features),
        )
        yield Batch(dense=torch.empty(rows, 0), sparse=sparse, labels=torch.zeros(rows), weights=torch.ones(rows))


def timed(cases: Mapping[str, Callable[[], Call]], config: Config) -> dict[str, Seconds]:
    """Let cases take turns; each makes a call ready, which alone is timed."""

    def second(make: Callable[[], Call]) -> float:
        call = make()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    calls = {}
    for name, make in cases.items():
        several = [second(make) for _ in range(1 + SETTLING_CALLS)]
        wanted = min(config.calls, config.seconds / min(several))
        calls[name] = max(LEAST_CALLS, math.ceil(wanted / config.turns))
    found: dict[str, Seconds] = {name: [] for name in cases}
    for _ in range(config.turns):
        for name, make in cases.items():
            for _ in range(SETTLING_CALLS):
                second(make)
            found[name].append([second(make) for _ in range(calls[name])])
    return found


def main(config: Config) -> list[dict[str, Any]]:
    """Measure all batch sizes; show and keep their results."""
    load_at_start = os.getloadavg()
    schema, found = config.schema(), []
    with process_group() as world:
        largest = max(config.batch_sizes)
        predictors = {
            (members, precision): predictor(config.setting(members, precision, largest), schema, world)
            for members, precision in itertools.product(config.members, config.precision)
        }
        for rows in config.batch_sizes:
            found += measured(config, schema, predictors, rows, world)
        origin = facts(__file__, PACKAGES, load_at_start)
    results = [result("inference", *each, origin) for each in found]
    Console().print(shown(results))
    if config.json:
        append(config.json, results)
    if config.plot:
        plot(results, config.plot)
    return results


def measured(
    config: Config,
    schema: Schema,
    predictors: Mapping[tuple[int, Any], Callable[[Batch], Tensor]],
    rows: int,
    world: World,
) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, float]]]]:
    """Config, metrics and ratios of each case at one batch size."""
    source = batches(schema, rows)
    cases: dict[str, Callable[[], Call]] = {
        f"{members} {precision}": _call(predict, source) for (members, precision), predict in predictors.items()
    }
    floors = {}
    for members in config.members:
        specs = config.setting(members, "bf16", rows).config(Path("unread")).specs()
        of_each = (member_products(spec, schema, rows, world.device, backward=False) for spec in specs)
        products = list(itertools.chain.from_iterable(of_each))
        floors[members] = floor = Floor(products, torch.bfloat16, world.device)
        cases[f"{members} {FLOOR}"] = _ready(floor, world)
    seconds = timed(cases, config)
    medians = {name: [float(np.median(turn)) for turn in turns] for name, turns in seconds.items()}
    results = []
    for members, precision in predictors:
        name, floor_name = f"{members} {precision}", f"{members} {FLOOR}"
        milliseconds = [1e3 * call for turn in seconds[name] for call in turn]
        metrics = {
            "ms": {f"p{q}": float(np.percentile(milliseconds, q)) for q in PERCENTILES} | {"high": max(milliseconds)},
            "rows_per_s": summary([rows / float(np.mean(turn)) for turn in seconds[name]]),
            "floor_ms": summary([1e3 * median for median in medians[floor_name]]),
            "flops": floors[members].flops,
            "calls": len(milliseconds),
            "threads": torch.get_num_threads(),
            "device": world.device.type,
        }
        ratios = {"floor_share": speedup(medians[name], medians[floor_name])}
        if precision != config.precision[0]:
            first = config.precision[0]
            ratios[f"ratio_to_{first}"] = speedup(medians[name], medians[f"{members} {first}"])
        if members != config.members[0]:
            few = config.members[0]
            ratios[f"ratio_to_members_{few}"] = speedup(medians[name], medians[f"{few} {precision}"])
        record = config.setting(members, precision, rows).record() | {"precision": precision}
        results.append((record, metrics, ratios))
    return results


def _call(predict: Callable[[Batch], Tensor], source: Iterator[Batch]) -> Callable[[], Call]:
    def make() -> Call:
        batch = next(source)
        return lambda: predict(batch)

    return make


def _ready(floor: Floor, world: World) -> Callable[[], Call]:
    def call() -> None:
        floor()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    return lambda: call


if __name__ == "__main__":
    quieten_libraries()
    main(tyro.cli(Config))
