"""The workload: tables, batch and dense part of a model, as far as a sharding plan depends on them."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.config import InputError, dump, load_file, write_whole

TableDtype = Literal["fp32", "fp16", "bf16"]
OptimizerKind = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"]

FUSED_ON_CPU: frozenset[OptimizerKind] = frozenset({"rowwise_adagrad", "adagrad", "sgd"})
"""What FBGEMM fuses into the backward of tables on a CPU; it fuses all kinds on CUDA."""
WHOLE_ROWS: frozenset[OptimizerKind] = frozenset({"rowwise_adagrad", "partial_rowwise_adam", "lamb"})
"""Kinds that take a mean or a norm over a row, which no column shard has whole."""
STATE_VALUES: dict[OptimizerKind, tuple[int, int]] = {
    "rowwise_adagrad": (1, 0),
    "adagrad": (0, 1),
    "sgd": (0, 0),
    "adam": (0, 2),
    "partial_rowwise_adam": (1, 1),
    "lamb": (0, 2),
}
"""Values of optimizer state that a row has, and that each of its elements has; all fp32."""

ELEMENT_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One embedding table."""

    name: str
    rows: int
    dim: int
    pooling: float = 1.0
    """Pooling factor: mean number of ids that a row of a batch looks up."""
    dtype: TableDtype = "fp32"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise ValueError(
                f"table {self.name!r} has {self.rows} rows of {self.dim} columns; it needs at least 1 of each"
            )
        if not self.pooling >= 0:
            raise ValueError(f"table {self.name!r} has pooling {self.pooling}; it must not be negative")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.rows * self.dim * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step works on."""

    name: str
    tables: tuple[TableSpec, ...]
    batch_size: int
    """Rows of a global batch."""
    optimizer: OptimizerKind = "rowwise_adagrad"
    """Of the tables."""
    id_bytes: int = 4
    dense_parameters: int = 0
    """Parameters that every rank holds and that are averaged over ranks; fp32, under Adam."""
    dense_flops: int = 0
    """FLOPs of one row's forward pass through them."""
    dense_precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    dense_activations: int = 0
    """Values that a row leaves behind in them for the backward pass."""

    def __post_init__(self) -> None:
        doubled = [name for name, count in Counter(table.name for table in self.tables).items() if count > 1]
        if doubled:
            raise ValueError(f"table {doubled[0]!r} stands twice; every table needs a name of its own")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with the name, rows or columns of any table, and with nothing else."""
        shapes = [[table.name, table.rows, table.dim] for table in self.tables]
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the tables' optimizer state, where no table is split by column."""
        return sum(optimizer_bytes(self.optimizer, table.rows, table.dim) for table in self.tables)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_whole(path, json.dumps(dump(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read JSON or YAML.

        Raises:
            InputError: no such file, or it holds no workload.
        """
        if not path.exists():
            raise InputError(f"{path}: no such file")
        return load_file(cls, path)


def optimizer_bytes(kind: OptimizerKind, rows: int, columns: int) -> int:
    """Bytes of optimizer state of a shard."""
    of_row, of_element = STATE_VALUES[kind]
    return 4 * rows * (of_row + of_element * columns)
