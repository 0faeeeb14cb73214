"""Fused tables alone: lookup, and backward with the update, ours beside FBGEMM's and beside the speed of memory.

Both work on the same tables and batches, in turns. With --busy, all is measured once more while other processes spin on
the same cores. Members with tables of their own, which look up the same ids, can have them side by side (separate) or
in one row (interleaved), which one line of memory then serves; for row-wise Adagrad that is other arithmetic, with one
accumulator for all members, and is measured for its speed alone.

Threads of OpenMP wait for one another as in `recsys`, with GOMP_SPINCOUNT=1000, which FBGEMM's update gains by wherever
it does not have its cores for itself. 300000 is what libgomp takes where nobody says.

    python benchmarks/tables.py --dim 16 128 --rows 25000 1000000 --ids uniform zipf --json tables.json
    python benchmarks/tables.py --dim 16 --rows 1000 10000 100000 1000000 --plot tables.png
    GOMP_SPINCOUNT=300000 python benchmarks/tables.py --dim 16 --rows 25000 --busy 1
    python benchmarks/tables.py --dim 16 --rows 25000 --members 4 --layout separate interleaved
"""

import gc
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

# As `recsys` does, before torch is imported: threads that spin starve those they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import tyro
from rich.console import Console
from table_cases import (
    FBGEMM,
    OURS,
    PHASES,
    Case,
    Ids,
    Layout,
    Sizes,
    Traffic,
    busy,
    cases,
    draw,
    lookups,
    make_tables,
    traffic,
)
from table_display import plot, shown

from facts import facts
from harness import Summary, Turns, append, measure, result, speedup, summary
from jobs import quieten_libraries
from recsys.distributed import World, process_group
from recsys.sharding.workload import FUSED_ON_CPU, OptimizerKind
from roofline import ceilings

PACKAGES = ("torch", "torchrec", "numpy")
GIB = 2**30
Phased = dict[str, list[float]]
"""Seconds of each turn, by phase."""
Measured = tuple[dict[str, Any], dict[str, Any], dict[str, Summary]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the lookup and update of tables."""

    dim: tuple[int, ...] = (16,)
    """Columns of a member's tables; this and the two below: all combinations are measured."""
    rows: tuple[int, ...] = (25_000,)
    """Of a table."""
    ids: tuple[Ids, ...] = ("uniform",)
    """How ids are drawn."""
    zipf: float = 1.05
    """Exponent of the power law of ids that are not uniform."""
    fields: int = 39
    """Features; fewer where their tables would not fit in memory_gib."""
    batch_size: int = 8192
    """Rows of a batch."""
    pooling: int = 1
    """Ids a row and feature."""
    optimizer: OptimizerKind = "rowwise_adagrad"
    """Of the tables."""
    members: int = 1
    """Members that look up the same ids in tables of their own."""
    layout: tuple[Layout, ...] = ("separate",)
    """How tables of several members lie in memory; of two, the second is compared with the first."""
    busy: int = 0
    """Processes that spin on the same cores, while all is measured a second time."""
    memory_gib: float = 8.0
    """Of all tables that are held at once."""
    timing: Annotated[Turns, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: Turns(seconds=0.5, least_steps=2, warmup_steps=2)
    )
    json: Path | None = None
    """Append results to this file, one line each; `recsys bench compare` compares two such files."""
    plot: Path | None = None
    """Draw milliseconds by the rows of a table to this PNG."""

    def __post_init__(self) -> None:
        for name in ("dim", "rows", "ids", "layout"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one value")
        if len(set(self.layout)) < len(self.layout):
            raise ValueError(f"layout {self.layout} names one twice")
        for name in ("fields", "batch_size", "pooling", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if min(self.dim + self.rows) < 1:
            raise ValueError(f"dim {self.dim} and rows {self.rows} must be at least 1")
        for name in ("zipf", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        if self.busy < 0:
            raise ValueError(f"busy {self.busy} must not be negative")
        if "interleaved" in self.layout and self.members == 1:
            raise ValueError("layout interleaved needs members of 2 or more, whose rows it joins")
        if self.optimizer not in FUSED_ON_CPU:
            raise ValueError(f"optimizer {self.optimizer} is in no fused update on a CPU; {sorted(FUSED_ON_CPU)} are")
        if self.plot and len(self.rows) < 2:
            raise ValueError(f"plot {self.plot}: there is nothing to draw; give several values of rows")


def main(config: Config) -> list[dict[str, Any]]:
    """Measure all combinations; show and keep their results."""
    load_at_start = os.getloadavg()
    with process_group() as world:
        found = measured(config, world)
        origin = facts(__file__, PACKAGES, load_at_start)
    results = [result("tables", *each, origin) for each in found]
    if results:
        Console().print(shown(results))
    if config.json:
        append(config.json, results)
    if config.plot and results:
        plot(results, config.plot)
    return results


def measured(config: Config, world: World) -> list[Measured]:
    """Config, metrics and ratios of every combination that fits in memory."""
    run = Run(config, world)
    found: list[Measured] = []
    for dim, rows in itertools.product(config.dim, config.rows):
        layouts = fitting(config, dim, rows)
        if layouts:
            found += run.sized(layouts)
            gc.collect()  # before the next tables take memory
    return found


def fitting(config: Config, dim: int, rows: int) -> list[Sizes]:
    """Tables in each layout, of as many features as fit in memory together; none where not even one does."""
    wanted = [
        Sizes(
            features=config.fields,
            rows=rows,
            dim=dim,
            members=config.members,
            layout=layout,
            optimizer=config.optimizer,
        )
        for layout in config.layout
    ]
    fit = min(sizes.within(config.memory_gib * GIB / len(wanted)).features for sizes in wanted)
    if fit < config.fields:
        whole = sum(sizes.memory for sizes in wanted) / GIB
        done = f"{fit} features are measured" if fit else "they are left out"
        print(
            f"tables: {config.fields} features of {rows:,} rows x {dim} take {whole:.1f} GiB, more than --memory-gib "
            f"{config.memory_gib:g}: {done}",
            file=sys.stderr,
        )
    return [replace(sizes, features=fit) for sizes in wanted] if fit else []


class Run:
    """One run of the benchmark, which knows how fast memory is here."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.device = config, world.device
        self.ceilings = ceilings((), self.device, self._synchronize)

    def sized(self, layouts: Sequence[Sizes]) -> list[Measured]:
        """Measure tables of one size, which are let go of afterwards."""
        config = self.config
        tables = {sizes.layout: make_tables(sizes, self.device) for sizes in layouts}
        found = []
        for ids in config.ids:
            drawn = draw(layouts[0], ids, config.zipf, config.batch_size, config.pooling)
            made = {
                sizes.layout: cases(
                    tables[sizes.layout], lookups(sizes, drawn, config.pooling, self.device), self._synchronize
                )
                for sizes in layouts
            }
            moved = {sizes.layout: traffic(sizes, drawn, config.pooling) for sizes in layouts}
            for spinning in sorted({0, config.busy}):
                seconds = self._seconds(made, spinning)
                first = seconds[layouts[0].layout].get(OURS)
                for sizes in layouts:
                    its = seconds[sizes.layout]
                    record = self._record(sizes, ids, spinning)
                    metrics = self._metrics(sizes, its, moved[sizes.layout])
                    ratios = self._ratios(its, moved[sizes.layout])
                    if first and sizes is not layouts[0]:
                        ratios |= {
                            f"{phase}_ratio_to_{layouts[0].layout}": speedup(its[OURS][phase], first[phase])
                            for phase in PHASES
                        }
                    found.append((record, metrics, ratios))
        return found

    def _seconds(self, made: Mapping[Layout, Mapping[str, Case]], spinning: int) -> dict[str, dict[str, Phased]]:
        """Seconds by layout, case and phase; all take turns."""
        runners = {
            f"{layout} {name} {phase}": run
            for layout, by_name in made.items()
            for name, case in by_name.items()
            for phase, run in (("forward", case.lookup), ("update", case.update))
        }
        turns = self.config.timing
        if spinning:  # steps may then take many times as long
            turns = replace(turns, warmup_steps=1, least_steps=1)
        with busy(spinning):
            seconds = measure(runners, turns)
        found: dict[str, dict[str, Phased]] = {}
        for key, values in seconds.items():
            layout, name, phase = key.split(" ")
            found.setdefault(layout, {}).setdefault(name, {})[phase] = values
        for by_name in found.values():
            for its in by_name.values():
                its["step"] = [sum(both) for both in zip(its["forward"], its["update"], strict=True)]
        return found

    def _record(self, sizes: Sizes, ids: Ids, spinning: int) -> dict[str, Any]:
        config = self.config
        return {
            **asdict(sizes),
            "ids": ids,
            "zipf": config.zipf if ids == "zipf" else None,
            "batch_size": config.batch_size,
            "pooling": config.pooling,
            "busy": spinning,
            "gomp_spincount": os.environ["GOMP_SPINCOUNT"],
        }

    def _metrics(self, sizes: Sizes, seconds: Mapping[str, Phased], moved: Traffic) -> dict[str, Any]:
        return {
            "ms": {
                name: {phase: summary([1e3 * turn for turn in turns]) for phase, turns in its.items()}
                for name, its in seconds.items()
            },
            "bytes": {phase: getattr(moved, phase) for phase in PHASES},
            "floor_ms": {phase: 1e3 * self._floor(moved, phase) for phase in PHASES},
            "unique_rows": moved.unique_rows,
            "lookups": sizes.num_tables * self.config.batch_size * self.config.pooling,
            "ceilings": {name: getattr(self.ceilings, name) for name in ("copy_bytes_per_s", "gather_bytes_per_s")},
            "features_asked": self.config.fields,
            "memory_gib": sizes.memory / GIB,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
        }

    def _ratios(self, seconds: Mapping[str, Phased], moved: Traffic) -> dict[str, Summary]:
        """Ours against FBGEMM's, and the share of memory's speed of ours, or FBGEMM's where there is none of ours."""
        own = seconds.get(OURS, seconds[FBGEMM])
        ratios = {
            f"{phase}_bandwidth_share": summary([self._floor(moved, phase) / turn for turn in own[phase]])
            for phase in PHASES
        }
        if OURS in seconds:
            ratios |= {f"{phase}_ratio_to_fbgemm": speedup(own[phase], seconds[FBGEMM][phase]) for phase in PHASES}
        return ratios

    def _floor(self, moved: Traffic, phase: str) -> float:
        return float(getattr(moved, phase)) / self.ceilings.copy_bytes_per_s

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


if __name__ == "__main__":
    quieten_libraries()
    main(tyro.cli(Config))
