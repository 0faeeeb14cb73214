"""What shards cost: amounts of work by phase, and the seconds and bytes that they come to on a cluster.

The model is analytic: ids are spread evenly over a table's rows, a phase ends when its slowest rank does, and phases
follow one another. It is for comparing plans; `recsys shard-bench` says how far it is from what is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.sharding.cluster import GIB, PHASES, Cluster, Rates
from recsys.sharding.workload import ELEMENT_BYTES, TableSpec, Workload

MEMORIES = ("device", "host", "ssd")
PARTS = ("weights", "optimizer", "activations", "dense")
"""Of what a rank holds: tables' weights and optimizer state; ids, pooled embeddings and their gradients; the dense part
with its gradients, optimizer and activations."""
CACHED_SHARE = 0.2
"""Share of a table's rows that the caching kernels keep on the device; TorchRec's default load factor."""
CACHE_MISSES = 0.2
"""Share of lookups that miss it: click logs are skewed, so a fifth of the rows answers most of them."""
HELD = {
    "fused": (1.0, 0.0, 0.0),
    "dense": (1.0, 0.0, 0.0),
    "fused_uvm": (0.0, 1.0, 0.0),
    "fused_uvm_caching": (CACHED_SHARE, 1.0, 0.0),
    "key_value": (CACHED_SHARE, 0.0, 1.0),
}
"""Kernel to the share of a table that it keeps in each kind of memory."""
DENSE_STEP_PASSES = 5
"""Times that a dense optimizer's step goes over a weight's bytes: gradient zeroed, written, read; weight and state."""
UPDATE_PASSES = 2
"""A row is read and written."""

_PHASE = {name: index for index, name in enumerate(PHASES)}


@dataclass(frozen=True)
class Tables:
    """A workload's tables as arrays [T], for arithmetic on all at once."""

    rows: np.ndarray
    dim: np.ndarray
    pooling: np.ndarray
    element: np.ndarray
    """Bytes of a weight."""

    @classmethod
    def of(cls, specs: Sequence[TableSpec]) -> "Tables":
        """Arrays of these tables."""
        return cls(
            rows=np.array([spec.rows for spec in specs], dtype=np.float64),
            dim=np.array([spec.dim for spec in specs], dtype=np.float64),
            pooling=np.array([spec.pooling for spec in specs], dtype=np.float64),
            element=np.array([ELEMENT_BYTES[spec.dtype] for spec in specs], dtype=np.float64),
        )

    def __getitem__(self, index: np.ndarray | int) -> "Tables":
        """Some of them."""
        return Tables(self.rows[index], self.dim[index], self.pooling[index], self.element[index])


@dataclass
class Cost:
    """Of n shards, each on its rank.

    Args:
        rest: seconds by phase [n, phases] of all but links.
        node: seconds on the links within a node, by phase [n, phases].
        network: seconds on those between nodes.
        bytes: by part and kind of memory [n, parts, memories].
    """

    rest: np.ndarray
    node: np.ndarray
    network: np.ndarray
    bytes: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """By phase [n, phases]."""
        seconds: np.ndarray = self.rest + np.maximum(self.node, self.network)
        return seconds


class CostModel:
    """Prices shards of a workload on a cluster.

    Args:
        workload: tables, batch, dense part.
        cluster: all ranks.
        replicas: groups that hold a copy of the tables each (2-D parallelism); shards are of one group.
        comm_bytes: of a value in pooled embeddings and their gradients on the way between ranks.
        sync_every: steps between averages of the copies of 2-D parallelism.
    """

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        *,
        replicas: int = 1,
        comm_bytes: tuple[int, int] = (4, 4),
        sync_every: int = 1,
    ) -> None:
        self.workload, self.cluster = workload, cluster
        self.replicas, self.sync_every = replicas, sync_every
        self.group = cluster.group(replicas)
        self.comm_bytes = comm_bytes
        self.local_batch = workload.batch_size / cluster.world_size
        self.rates = {phase: cluster.hardware.rate(phase, cluster.nodes > 1) for phase in PHASES}

    def shards(self, sharding_type: str, kernel: str, tables: Tables, rows: np.ndarray, columns: np.ndarray) -> Cost:
        """Cost of one shard of each of n tables.

        Args:
            sharding_type: of all of them.
            kernel: of all of them.
            tables: n tables.
            rows: of each shard [n].
            columns: of each shard [n].
        """
        work = _Work(self, len(rows))
        if sharding_type == "data_parallel":
            self._replicated(work, tables)
        else:
            self._sharded(work, sharding_type, kernel, tables, rows, columns)
        return work.cost()

    def _sharded(
        self, work: "_Work", sharding_type: str, kernel: str, tables: Tables, rows: np.ndarray, columns: np.ndarray
    ) -> None:
        group, batch, w = self.group, self.local_batch, self.workload
        world, local, nodes = group.world_size, group.ranks_per_node, group.nodes
        all_rows = world * batch
        ids = all_rows * tables.pooling * rows / tables.rows
        # Every rank sends its rows' ids, and how many each row has (int32).
        work.add("input_dist", fields=1, ids=ids)
        sent = ids * w.id_bytes + 4 * all_rows
        work.links("input_dist", sent * (local - 1) / world, sent * (world - local) / world)
        pooled = all_rows * columns
        for phase, bytes_ in zip(("output_dist", "gradient_dist"), self.comm_bytes, strict=True):
            work.add(phase, fields=1)
            volume = pooled * bytes_
            if sharding_type in ("table_row_wise", "grid_shard"):
                # Summed within the node first, so only a rank's share of the sums leaves it.
                work.links(phase, volume * (local - 1) / local, volume / local * (nodes - 1) / nodes)
            else:
                work.links(phase, volume * (local - 1) / world, volume * (world - local) / world)
        row_bytes = columns * tables.element
        state_bytes = self._state_bytes(columns)
        work.add("lookup", fields=1, ids=ids)
        work.add("update", fields=1, ids=ids)
        distinct = rows * -np.expm1(-ids / np.maximum(rows, 1))
        work.gather("lookup", kernel, ids * row_bytes, pooled * 4)
        work.gather(
            "update", kernel, UPDATE_PASSES * distinct * (row_bytes + state_bytes), (pooled + ids * columns) * 4
        )
        # Ids of two batches, since one is sent while another is worked on; pooled embeddings and their gradients.
        work.hold(kernel, rows * row_bytes, rows * state_bytes, 2 * ids * w.id_bytes + 2 * pooled * 4)
        if self.replicas > 1:
            moved = rows * (row_bytes + state_bytes) * 2 * (self.replicas - 1) / self.replicas / self.sync_every
            across = self.cluster.nodes > 1
            work.links("all_reduce", 0.0 * moved if across else moved, moved if across else 0.0 * moved)

    def _replicated(self, work: "_Work", tables: Tables) -> None:
        """Every rank looks up its own rows, and averages a gradient as large as the table."""
        ids = self.local_batch * tables.pooling
        size = tables.rows * tables.dim
        row_bytes = tables.dim * tables.element
        work.add("lookup", fields=1, ids=ids)
        work.gather("lookup", "dense", ids * row_bytes, self.local_batch * tables.dim * 4)
        work.add("update", fields=1, ids=ids)
        work.gather("update", "dense", ids * row_bytes * UPDATE_PASSES, DENSE_STEP_PASSES * size * tables.element)
        self._average(work, size * tables.element)
        state = tables.rows * self._state_bytes(tables.dim)
        activations = (
            size * tables.element + 2 * self.local_batch * tables.dim * 4
        )  # the gradient is as large as the table
        work.hold("dense", size * tables.element, state, activations)

    def _state_bytes(self, columns: np.ndarray) -> np.ndarray:
        """Optimizer state of a row of a shard."""
        kind = self.workload.optimizer
        per_column = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 4, "adam": 8}[kind]
        return per_column * columns + (4.0 if kind == "rowwise_adagrad" else 0.0)

    def _average(self, work: "_Work", bytes_: np.ndarray) -> None:
        """Ring all-reduce, within nodes first: a rank sends all but its share twice, then its share between nodes."""
        local, nodes = self.cluster.ranks_per_node, self.cluster.nodes
        work.links("all_reduce", bytes_ * 2 * (local - 1) / local, bytes_ / local * 2 * (nodes - 1) / nodes)

    def every_rank(self) -> Cost:
        """What a rank has without any table: the dense part, its batch, and one call of each kind."""
        work, w = _Work(self, 1), self.workload
        flops = 3 * w.dense_flops * self.local_batch  # backward is two products for each one of forward
        work.rest[:, _PHASE["dense"]] += flops / self.cluster.hardware.flops(w.dense_precision)
        if w.dense_parameters and self.cluster.world_size > 1:
            self._average(work, np.array([4.0 * w.dense_parameters]))
            work.add("all_reduce", calls=1)
        embedded = sum(table.dim for table in w.tables)
        # Weight, gradient and two moments of Adam; embeddings as they arrive, and their gradients.
        work.bytes[:, 3, 0] += 16.0 * w.dense_parameters
        work.bytes[:, 3, 0] += self.local_batch * (8.0 * embedded + 4.0 * w.dense_activations)
        return work.cost()

    def calls(self, sharding_types: set[str]) -> np.ndarray:
        """Seconds by phase [phases] that every rank spends on starting kernels and collectives of these types."""
        seconds = np.zeros(len(PHASES))
        apart = len(sharding_types - {"data_parallel"})
        # Ids take two collectives: how many there are, then they themselves.
        counts = {"input_dist": 2 * apart, "output_dist": apart, "gradient_dist": apart}
        if self.group.world_size == 1:
            counts = {}
        counts |= {"lookup": len(sharding_types), "update": len(sharding_types)}
        for phase, count in counts.items():
            seconds[_PHASE[phase]] = count * self.rates[phase].call_us * 1e-6 * self.cluster.slowdown
        return seconds

    def capacity(self, reserve: float) -> np.ndarray:
        """Bytes of each kind of memory that a rank may fill [3], `reserve` being the share kept free on the device."""
        hardware = self.cluster.hardware
        device = hardware.memory_gib * (1 - reserve)
        return np.array([device, hardware.host_gib, hardware.ssd_gib]) * GIB


class _Work:
    """Adds up the work of n shards."""

    def __init__(self, model: CostModel, count: int) -> None:
        self.model = model
        self.rest, self.node, self.network = (np.zeros((count, len(PHASES))) for _ in range(3))
        self.bytes = np.zeros((count, len(PARTS), len(MEMORIES)))

    def add(self, phase: str, *, calls: float = 0, fields: float = 0, ids: np.ndarray | float = 0.0) -> None:
        rates: Rates = self.model.rates[phase]
        self.rest[:, _PHASE[phase]] += (
            rates.call_us * calls + rates.field_us * fields
        ) * 1e-6 + rates.id_ns * ids * 1e-9

    def links(self, phase: str, node_bytes: np.ndarray, network_bytes: np.ndarray) -> None:
        rates = self.model.rates[phase]
        self.node[:, _PHASE[phase]] += _time(node_bytes, rates.node_gbs)
        self.network[:, _PHASE[phase]] += _time(network_bytes, rates.network_gbs)

    def gather(self, phase: str, kernel: str, table_bytes: np.ndarray, other_bytes: np.ndarray) -> None:
        """Read or write rows where the kernel keeps them, and pooled values on the device."""
        hardware = self.model.cluster.hardware
        on_device = self.model.rates[phase].memory_gbs
        seconds = _time(other_bytes, on_device)
        if kernel in ("fused", "dense"):
            seconds = seconds + _time(table_bytes, on_device)
        elif kernel == "fused_uvm":
            seconds = seconds + _time(table_bytes, hardware.host_gbs * hardware.gather_share)
        else:
            behind = hardware.host_gbs if kernel == "fused_uvm_caching" else hardware.ssd_gbs
            seconds = seconds + _time(table_bytes, on_device)
            seconds = seconds + CACHE_MISSES * _time(table_bytes, behind * hardware.gather_share)
        self.rest[:, _PHASE[phase]] += seconds

    def hold(self, kernel: str, weights: np.ndarray, state: np.ndarray, activations: np.ndarray) -> None:
        shares = np.array(HELD[kernel])
        self.bytes[:, 0] += np.multiply.outer(weights, shares)
        self.bytes[:, 1] += np.multiply.outer(state, shares)
        self.bytes[:, 2, 0] += activations

    def cost(self) -> Cost:
        slow = self.model.cluster.slowdown
        return Cost(self.rest * slow, self.node * slow, self.network * slow, self.bytes)


def _time(bytes_: np.ndarray, gbs: float | None) -> np.ndarray:
    return bytes_ / (gbs * 1e9) if gbs else 0.0 * bytes_
