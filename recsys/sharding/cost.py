"""What shards cost: amounts of work by phase, and the seconds and bytes that they come to on a cluster.

The model is analytic: ids are spread evenly over a table's rows, a phase ends when its slowest rank does, and phases
follow one another. It is for comparing plans; `recsys shard-bench` says how far it is from what is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.sharding.cluster import GIB, PHASES, Cluster
from recsys.sharding.tiling import COLUMN_TYPES
from recsys.sharding.work import Cost, Work
from recsys.sharding.workload import ELEMENT_BYTES, STATE_VALUES, TableSpec, Workload

DENSE_STEP_PASSES = 10
"""Times that a replicated table's step goes over its bytes: the gradient is zeroed, written, and copied to where ranks
average it (2); squared (2) and averaged by row; read once more, and the weight read and written."""
DENSE_SHARD_PASSES = 4
"""Times that the step of a shard under the kernel dense goes over its bytes: the gradient is zeroed and written, and
read to find the rows that are not zero (2); only those are updated."""
UPDATE_PASSES = 2
"""A row is read and written."""
REDUCE_SCATTER_ON_CPU = 2
"""What gloo sends, as a share of what it need send: it sums all of it on every rank and throws the others' away."""
SORTED_IDS = 4
"""Ids that are only sent while one is sorted by the rank that holds its row, and sent (measured on a CPU)."""
DENSE_PASSES = 3
"""Times that the dense part goes over its activations: written, read by what follows, read by the backward pass."""
TWO_STAGES = ("table_row_wise", "grid_shard")
"""Types whose pooled embeddings take two collectives: one within the node, one between nodes."""
BY_ROWS = ("row_wise", *TWO_STAGES)
"""Types that send ids where their rows are, and sum what comes back."""


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
        work = Work(self.cluster.hardware, self.rates, len(rows))
        if sharding_type == "data_parallel":
            self._replicated(work, tables)
        else:
            self._sharded(work, sharding_type, kernel, tables, rows, columns)
        return work.cost()

    def _sharded(
        self, work: Work, sharding_type: str, kernel: str, tables: Tables, rows: np.ndarray, columns: np.ndarray
    ) -> None:
        group, batch, w = self.group, self.local_batch, self.workload
        world, local, nodes = group.world_size, group.ranks_per_node, group.nodes
        all_rows = world * batch
        ids = all_rows * tables.pooling * rows / tables.rows
        # Every rank sends its rows' ids, and how many each row has (int32): both are gone through wherever they come.
        counted = ids + all_rows
        work.add("input_dist", fields=1, ids=all_rows + ids * (SORTED_IDS if sharding_type in BY_ROWS else 1))
        sent = ids * w.id_bytes + 4 * all_rows
        work.links("input_dist", sent * (local - 1) / world, sent * (world - local) / world)
        pooled = all_rows * columns
        for phase, bytes_ in zip(("output_dist", "gradient_dist"), self.comm_bytes, strict=True):
            work.add(phase, fields=1, ids=all_rows if sharding_type in COLUMN_TYPES else 0.0)
            volume = pooled * bytes_
            summed = volume * self._reduce_scatter() if phase == "output_dist" else volume
            if sharding_type in TWO_STAGES:
                # Summed within the node first, so only a rank's share of the sums leaves it.
                work.links(phase, summed * (local - 1) / local, volume / local * (nodes - 1) / nodes)
            else:
                sent = summed if sharding_type in BY_ROWS else volume
                work.links(phase, sent * (local - 1) / world, sent * (world - local) / world)
        row_bytes = columns * tables.element
        state_bytes = self._state_bytes(columns)
        work.add("lookup", fields=1, ids=counted)
        work.add("update", fields=1, ids=counted)
        distinct = rows * -np.expm1(-ids / np.maximum(rows, 1))
        work.gather("lookup", kernel, ids * row_bytes, pooled * 4)
        # The kernel dense has a gradient as large as its shard; on a CPU our operators update its rows without one.
        gradient = rows * row_bytes if kernel == "dense" and not self._on_cpu else 0.0 * rows
        work.gather(
            "update",
            kernel,
            UPDATE_PASSES * distinct * (row_bytes + state_bytes),
            (pooled + ids * columns) * 4 + DENSE_SHARD_PASSES * gradient,
        )
        # Ids of two batches, since one is sent while another is worked on; pooled embeddings and their gradients.
        work.hold(kernel, rows * row_bytes, rows * state_bytes, 2 * ids * w.id_bytes + 2 * pooled * 4 + gradient)
        if self.replicas > 1:
            moved = rows * (row_bytes + state_bytes) * 2 * (self.replicas - 1) / self.replicas / self.sync_every
            across = self.cluster.nodes > 1
            work.links("all_reduce", 0.0 * moved if across else moved, moved if across else 0.0 * moved)

    def _replicated(self, work: Work, tables: Tables) -> None:
        """Every rank looks up its own rows, and averages a gradient as large as the table."""
        ids = self.local_batch * tables.pooling
        size = tables.rows * tables.dim
        row_bytes = tables.dim * tables.element
        counted = ids + self.local_batch
        work.add("lookup", fields=1, ids=counted)
        work.gather("lookup", "dense", ids * row_bytes, self.local_batch * tables.dim * 4)
        work.add("update", fields=1, ids=counted)
        work.gather("update", "dense", ids * row_bytes * UPDATE_PASSES, DENSE_STEP_PASSES * size * tables.element)
        self._average(work, size * tables.element)
        state = tables.rows * self._state_bytes(tables.dim)
        # The gradient is as large as the table.
        activations = size * tables.element + 2 * self.local_batch * tables.dim * 4
        work.hold("dense", size * tables.element, state, activations)

    def _state_bytes(self, columns: np.ndarray) -> np.ndarray:
        """Optimizer state of a row of a shard."""
        of_row, of_element = STATE_VALUES[self.workload.optimizer]
        return 4.0 * (of_row + of_element * columns)

    @property
    def _on_cpu(self) -> bool:
        return self.cluster.hardware.device == "cpu"

    def _reduce_scatter(self) -> int:
        return REDUCE_SCATTER_ON_CPU if self._on_cpu else 1

    def _average(self, work: Work, bytes_: np.ndarray) -> None:
        """Ring all-reduce, within nodes first: a rank sends all but its share twice, then its share between nodes."""
        local, nodes = self.cluster.ranks_per_node, self.cluster.nodes
        work.links("all_reduce", bytes_ * 2 * (local - 1) / local, bytes_ / local * 2 * (nodes - 1) / nodes)

    def every_rank(self) -> Cost:
        """What a rank has without any table: the dense part, its batch, and one call of each kind."""
        work, w = Work(self.cluster.hardware, self.rates, 1), self.workload
        flops = 3 * w.dense_flops * self.local_batch  # backward is two products for each one of forward
        work.rest[:, PHASES.index("dense")] += flops / self.cluster.hardware.flops(w.dense_precision)
        work.add("dense", calls=1 if flops else 0)
        work.gather(
            "dense", "dense", np.zeros(1), np.array([4.0 * DENSE_PASSES * self.local_batch * w.dense_activations])
        )
        if w.dense_parameters and self.cluster.world_size > 1:
            self._average(work, np.array([4.0 * w.dense_parameters]))
            work.add("all_reduce", calls=1, peers=self.cluster.world_size - 1)
        embedded = sum(table.dim for table in w.tables)
        # Weight, gradient and two moments of Adam; embeddings as they arrive, and their gradients.
        work.bytes[:, 3, 0] += 16.0 * w.dense_parameters
        work.bytes[:, 3, 0] += self.local_batch * (8.0 * embedded + 4.0 * w.dense_activations)
        return work.cost()

    def calls(self, sharding_types: set[str]) -> np.ndarray:
        """Seconds by phase [phases] that every rank spends on starting kernels and collectives of these types."""
        work, group = Work(self.cluster.hardware, self.rates, 1), self.group
        work.add("lookup", calls=len(sharding_types))
        work.add("update", calls=len(sharding_types))
        if "data_parallel" in sharding_types and self.cluster.world_size > 1:
            work.add("all_reduce", calls=1, peers=self.cluster.world_size - 1)
        if group.world_size > 1:
            for name in sorted(sharding_types - {"data_parallel"}):
                # Ids take two collectives: how many there are, then they themselves.
                work.add("input_dist", calls=2, peers=2 * (group.world_size - 1))
                stages = [group.ranks_per_node, group.nodes] if name in TWO_STAGES else [group.world_size]
                for phase in ("output_dist", "gradient_dist"):
                    work.add(phase, calls=len(stages), peers=sum(stages) - len(stages))
        seconds: np.ndarray = work.rest[0]
        return seconds

    def capacity(self, reserve: float) -> np.ndarray:
        """Bytes of each kind of memory that a rank may fill [3], `reserve` being the share kept free on the device."""
        hardware = self.cluster.hardware
        device = hardware.memory_gib * (1 - reserve)
        return np.array([device, hardware.host_gib, hardware.ssd_gib]) * GIB
