"""The quote: what a plan costs on a cluster, rank by rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.sharding.cluster import GIB, PHASES, Cluster
from recsys.sharding.cost import CostModel, Tables
from recsys.sharding.plan import Plan
from recsys.sharding.work import MEMORIES, PARTS
from recsys.sharding.workload import Workload

RESERVE = 0.1
"""Share of device memory that plans leave free: CUDA's context, nccl's buffers, the allocator's gaps."""


@dataclass
class Quote:
    """Bytes and seconds of a plan.

    Args:
        workload: what is trained.
        cluster: on what.
        plan: how its tables lie there.
        seconds: [ranks, phases].
        bytes: [ranks, parts, memories].
        capacity: bytes that a rank may fill, by memory [memories].
        reserve: share of device memory that stays free.
    """

    workload: Workload
    cluster: Cluster
    plan: Plan
    seconds: np.ndarray
    bytes: np.ndarray
    capacity: np.ndarray
    reserve: float

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Of the slowest rank in each phase."""
        return dict(zip(PHASES, self.seconds.max(axis=0).tolist(), strict=True))

    @property
    def step_seconds(self) -> float:
        """Phases one after another, each as long as on its slowest rank."""
        return float(self.seconds.max(axis=0).sum())

    @property
    def pipelined_seconds(self) -> float:
        """As `step_seconds`, with the next batch's ids on their way during the dense part, as the trainer does it."""
        phases = self.phase_seconds
        return self.step_seconds - min(phases["input_dist"], phases["dense"])

    @property
    def rows_per_second(self) -> float:
        """Of the whole cluster, pipelined."""
        return self.workload.batch_size / self.pipelined_seconds if self.pipelined_seconds else float("inf")

    @property
    def table_seconds(self) -> np.ndarray:
        """What each rank spends on tables [ranks]."""
        phases = [index for index, phase in enumerate(PHASES) if phase not in ("dense", "all_reduce")]
        seconds: np.ndarray = self.seconds[:, phases].sum(axis=1)
        return seconds

    @property
    def balance(self) -> float:
        """Mean over slowest: of what ranks spend on tables, 1 is perfect."""
        total = self.table_seconds
        return float(total.mean() / total.max()) if total.max() else 1.0

    @property
    def used(self) -> np.ndarray:
        """Bytes [ranks, memories]."""
        used: np.ndarray = self.bytes.sum(axis=1)
        return used

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return bool((self.used <= self.capacity).all())

    def too_full(self) -> list[str]:
        """One line for each kind of memory that is not enough: how many ranks, and the fullest of them."""
        lines = []
        for memory, name in enumerate(MEMORIES):
            over = np.flatnonzero(self.used[:, memory] > self.capacity[memory])
            if len(over):
                worst = int(over[self.used[over, memory].argmax()])
                lines.append(
                    f"{name} memory is too small on {len(over)} of {len(self.used)} ranks: rank {worst} needs "
                    f"{self.used[worst, memory] / GIB:,.1f} GiB of {self.capacity[memory] / GIB:,.1f}"
                )
        return lines

    def values(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "workload": self.workload.name,
            "fingerprint": self.workload.fingerprint,
            "cluster": self.cluster.name,
            "world_size": self.cluster.world_size,
            "batch_size": self.workload.batch_size,
            "fits": self.fits,
            "too_full": self.too_full(),
            "step_seconds": self.step_seconds,
            "pipelined_seconds": self.pipelined_seconds,
            "rows_per_second": self.rows_per_second,
            "balance": self.balance,
            "phase_seconds": self.phase_seconds,
            "reserve": self.reserve,
            "capacity_bytes": dict(zip(MEMORIES, self.capacity.tolist(), strict=True)),
            "weight_bytes": sum(table.weight_bytes for table in self.workload.tables),
            "optimizer_bytes": self.workload.optimizer_bytes,
            "ranks": [
                {
                    "seconds": dict(zip(PHASES, seconds, strict=True)),
                    "bytes": {
                        memory: dict(zip(PARTS, [part[index] for part in parts], strict=True))
                        for index, memory in enumerate(MEMORIES)
                        if any(part[index] for part in parts)
                    },
                }
                for seconds, parts in zip(self.seconds.tolist(), self.bytes.tolist(), strict=True)
            ],
        }


def quote(plan: Plan, model: CostModel, *, reserve: float = RESERVE) -> Quote:
    """Price a plan; with 2-D parallelism, one group stands for all.

    Raises:
        InputError: the plan is of other tables or another number of ranks.
    """
    workload, group = model.workload, model.group
    plan.check_fits(workload.tables)
    plan.check_world(model.cluster.world_size, model.cluster.ranks_per_node)
    every = model.every_rank()
    types = {table.sharding_type for table in plan.tables.values()}
    calls = model.calls(types)
    rest, node, network = (np.zeros((group.world_size, len(PHASES))) for _ in range(3))
    held = np.zeros((group.world_size, len(PARTS), len(MEMORIES)))
    for ranks, cost in _costs(plan, model):
        for total, part in ((rest, cost.rest), (node, cost.node), (network, cost.network), (held, cost.bytes)):
            np.add.at(total, ranks, part)
    seconds = rest + every.rest + calls + np.maximum(node + every.node, network + every.network)
    seconds = group.shared(seconds)
    return Quote(
        workload=workload,
        cluster=model.cluster,
        plan=plan,
        seconds=seconds,
        bytes=held + every.bytes,
        capacity=model.capacity(reserve),
        reserve=reserve,
    )


def table_seconds(plan: Plan, model: CostModel) -> np.ndarray:
    """Seconds that each rank spends on each table [ranks, tables], all phases together."""
    seconds = np.zeros((model.group.world_size, len(plan.tables)))
    order = {name: index for index, name in enumerate(plan.tables)}
    for index, spec in enumerate(model.workload.tables):
        ranks, cost = _cost_of(plan, model, [index])
        np.add.at(seconds[:, order[spec.name]], ranks, cost.seconds.sum(axis=1))
    return seconds


def _costs(plan: Plan, model: CostModel) -> "Sequence[tuple[np.ndarray, Any]]":
    """Shards of tables that have type and kernel in common, priced together: ranks [n] and their costs."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, spec in enumerate(model.workload.tables):
        table = plan.tables[spec.name]
        groups.setdefault((table.sharding_type, table.kernel), []).append(index)
    return [_cost_of(plan, model, indices) for indices in groups.values()]


def _cost_of(plan: Plan, model: CostModel, indices: Sequence[int]) -> tuple[np.ndarray, Any]:
    specs = [model.workload.tables[index] for index in indices]
    first = plan.tables[specs[0].name]
    if first.sharding_type == "data_parallel":
        world = np.arange(model.group.world_size)
        ranks, of = np.tile(world, len(specs)), np.repeat(np.arange(len(specs)), len(world))
        tables = Tables.of(specs)[of]
        return ranks, model.shards("data_parallel", "dense", tables, tables.rows, tables.dim)
    shards = [np.array(plan.tables[spec.name].shards, dtype=np.int64) for spec in specs]
    of = np.repeat(np.arange(len(specs)), [len(part) for part in shards])
    every = np.concatenate(shards)
    cost = model.shards(first.sharding_type, first.kernel, Tables.of(specs)[of], every[:, 3] * 1.0, every[:, 4] * 1.0)
    return every[:, 0], cost
