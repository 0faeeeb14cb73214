"""`recsys shard-bench`: cases are measured, predicted, and the rates of the hardware profile fitted to them."""

import json
import os
import platform
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from recsys.config import InputError, dump, write_whole
from recsys.distributed import World, process_group
from recsys.sharding.cluster import PHASES, Hardware
from recsys.sharding.cost import CostModel
from recsys.sharding.here import cluster_here
from recsys.sharding.quote import quote
from recsys.studies.shard_calibrate import Amounts, amounts, fit, predict, profile, relative_errors
from recsys.studies.shard_cases import Case, Layout, cases, cluster, layouts
from recsys.studies.shard_config import ShardBenchConfig
from recsys.studies.shard_figure import draw
from recsys.studies.shard_measure import by_phase
from recsys.studies.shard_plans import compare
from recsys.studies.shard_ranks import lacking, launched, on_ranks, quiet, sweep
from recsys.studies.shard_report import show

PACKAGES = ("torch", "torchrec", "numpy", "scipy")

Run = Callable[..., Any]
"""Calls `work(world, *arguments)` on ranks: run(layout, work, *arguments)."""


@dataclass
class Measured:
    """A case, the work in it, and what is written of it."""

    amounts: Amounts
    record: dict[str, Any]

    @property
    def ranks(self) -> int:
        """That ran it."""
        return self.amounts.cluster.world_size


def shard_bench(config: ShardBenchConfig) -> dict[str, Any]:
    """Measure, predict, fit, write it all and show it; returns what is written.

    Raises:
        InputError: no folder to write to, no such profile, or no case that can be measured here.
    """
    _check_places(config)
    if not launched():
        return _bench(config, layouts(config), on_ranks, None)
    with quiet(), process_group() as world:
        layout = Layout(world.local_size, max(world.size // world.local_size, 1))
        return _bench(config, [layout], lambda _, work, *rest: work(world, *rest), world)


def _bench(config: ShardBenchConfig, wanted: Sequence[Layout], run: Run, world: World | None) -> dict[str, Any]:
    """All of it; on every rank alike where the ranks are those of this job, but only the first writes and shows."""
    speaks = world is None or world.is_first
    hardware = _hardware(config, world)
    machine = _machine(hardware)
    every, skipped = _possible(config, wanted, world)
    for what, why in skipped.items() if speaks else ():
        print(f"recsys: {what} left out: {why}", file=sys.stderr)  # noqa: T201
    records = _sweep(config, every, run)
    measured = [_measured(record, config, hardware, world is None) for record in records]
    if not measured:
        raise InputError("no case was measured: allow other --types, --dims or --ranks, or more --seconds")
    fitted = calibrate(measured, hardware, config)
    result = {
        "config": dump(config),
        "machine": machine,
        "num_cases": sum(map(len, every.values())),
        "skipped": skipped,
        "errors": errors(measured, config.statistic),
        "hardware": dump(hardware),
        "fitted": dump(fitted),
        "cases": [case.record for case in measured],
        "plans": compare(config, fitted, list(every), run, world is None) if config.compare_plans else [],
    }
    if speaks:
        _write(config, result, fitted)
        show(result)
    return result


def _possible(
    config: ShardBenchConfig, wanted: Sequence[Layout], world: World | None
) -> tuple[dict[Layout, list[Case]], dict[str, str]]:
    """Cases by layout in the order in which they are measured, and why what else was asked for cannot be."""
    found: dict[Layout, list[Case]] = {}
    skipped: dict[str, str] = {}
    for layout in wanted:
        reason = None if world else lacking(layout)
        if reason:
            skipped[f"{layout.ranks} ranks"] = reason
            continue
        points, reasons = cases(config, layout, world is None)
        skipped |= reasons
        if points:
            found[layout] = points
    return found, skipped


def _sweep(config: ShardBenchConfig, every: Mapping[Layout, Sequence[Case]], run: Run) -> list[dict[str, Any]]:
    """Measure cases, as many as there is time for; in later rounds those of the first once more."""
    steps: dict[Case, list[torch.Tensor]] = {}
    for turn in range(config.rounds):
        for layout, points in every.items():
            wanted = [case for case in points if case in steps or not turn]
            if wanted:
                seconds = config.seconds / config.rounds * _share(layout, list(every))
                for case, found in zip(wanted, run(layout, sweep, config, wanted, seconds), strict=False):
                    steps.setdefault(case, []).append(torch.tensor(found))
    return [
        {
            **asdict(case),
            "layout": case.layout._asdict(),
            "steps": sum(map(len, found)),
            "measured": by_phase(torch.cat(found)),
        }
        for case, found in steps.items()
    ]


def _share(layout: Layout, every: Sequence[Layout]) -> float:
    """Of the time: fewer types are measured on several nodes that one machine plays."""
    parts = {each: 1 if each.nodes > 1 else 2 for each in every}
    return parts[layout] / sum(parts.values())


def _measured(record: dict[str, Any], config: ShardBenchConfig, hardware: Hardware, simulated: bool) -> Measured:
    """Price a case as the profile stands."""
    layout = Layout(**record["layout"])
    case = Case(**{**{name: record[name] for name in Case.__dataclass_fields__}, "layout": layout})
    workload = case.workload(config.rows)
    plan, ran = case.plan(workload), cluster(hardware, layout, simulated)
    record["predicted"] = quote(plan, CostModel(workload, ran)).phase_seconds
    return Measured(amounts(workload, plan, ran), record)


def calibrate(measured: Sequence[Measured], hardware: Hardware, config: ShardBenchConfig) -> Hardware:
    """Fit rates to all cases; give each case what is predicted by rates that were fitted to the other half."""
    _halve(measured, config.seed)
    weights: dict[str, np.ndarray] = {}
    for phase in PHASES:
        seconds = np.array([case.record["measured"][phase][config.statistic] for case in measured])
        works = np.array([case.amounts.any(phase) for case in measured])
        halves = np.array([case.record["half"] for case in measured])
        for half in (0, 1):
            used = np.flatnonzero(works & (halves == half)).tolist()
            if not used:
                continue
            of_half = fit([measured[index].amounts for index in used], seconds[used], phase, hardware)
            for index in np.flatnonzero(works & (halves != half)).tolist():
                case = measured[index]
                case.record.setdefault("calibrated", {})[phase] = predict(case.amounts, phase, of_half)
        if works.any():
            used = np.flatnonzero(works).tolist()
            weights[phase] = fit([measured[index].amounts for index in used], seconds[used], phase, hardware)
    return profile(hardware, weights)


def _halve(measured: Sequence[Measured], seed: int) -> None:
    """Put cases in two halves at random, so that each has as many of any type on any ranks."""
    by_kind: dict[tuple[Any, ...], list[Measured]] = defaultdict(list)
    for case in measured:
        by_kind[case.record["sharding_type"], *case.record["layout"].values()].append(case)
    chance, index = random.Random(seed), 0
    for alike in by_kind.values():
        chance.shuffle(alike)
        for case in alike:
            case.record["half"] = index % 2
            index += 1


def errors(measured: Sequence[Measured], statistic: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Median relative error of each phase by count of ranks: as the profile stood, and of fitted rates, held out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for ranks in sorted({case.ranks for case in measured}):
        of_ranks = found[str(ranks)] = {}
        for phase in PHASES:
            cases = [case.record for case in measured if case.ranks == ranks and case.amounts.any(phase)]
            if not cases:
                continue
            seconds = np.array([case["measured"][phase][statistic] for case in cases])
            before = np.array([case["predicted"][phase] for case in cases])
            judged = [index for index, case in enumerate(cases) if phase in case.get("calibrated", {})]
            after = np.array([cases[index]["calibrated"][phase] for index in judged])
            of_ranks[phase] = {
                "cases": len(cases),
                "before": float(np.median(relative_errors(before, seconds))),
                "after": float(np.median(relative_errors(after, seconds[judged]))) if judged else None,
            }
    return found


def _hardware(config: ShardBenchConfig, world: World | None) -> Hardware:
    """The profile before it is fitted."""
    cuda = torch.cuda.is_available()
    device = world.device if world else torch.device("cuda" if cuda else "cpu")
    size = world.local_size if world else max(config.ranks)
    return cluster_here(config.hardware, device, size, size).hardware


def _check_places(config: ShardBenchConfig) -> None:
    for name in ("out", "picture", "calibrate"):
        path: Path | None = getattr(config, name)
        if path is not None and not path.parent.is_dir():
            raise InputError(f"--{name} {path}: no folder {path.parent}; make it first")
    if config.calibrate and config.calibrate.suffix not in (".yaml", ".yml"):
        raise InputError(f"--calibrate {config.calibrate}: must end in .yaml, as --cluster and --hardware take it")


def _write(config: ShardBenchConfig, result: dict[str, Any], fitted: Hardware) -> None:
    write_whole(config.out, json.dumps(result, indent=1) + "\n")
    draw(result, config.picture or config.out.with_suffix(".png"))
    if config.calibrate:
        name = replace(fitted, name=config.calibrate.stem)
        write_whole(config.calibrate, yaml.safe_dump(dump(name), sort_keys=False))


def _machine(hardware: Hardware) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if hardware.device == "cuda"
        else [],
        "load_at_start": os.getloadavg(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
