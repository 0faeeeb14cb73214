"""The schema: the only thing that knows a dataset."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from recsys.config import InputError, dump, load_file, write_whole

SPLITS = ("train", "valid", "test")
MAX_NUM_IDS = 2**31 - 1
RAW = 2**64
"""Number of ids of a feature whose ids are the log's own values: any 64 bits, read as int64."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Names and sizes of a prepared dataset's columns, saved as `schema.json` beside its Parquet files."""

    name: str
    """Name of the raw format that it was prepared from."""
    dense: tuple[str, ...]
    """Dense columns, float32, finite."""
    sparse: dict[str, int]
    """Feature to number of ids, in field order; ids lie in [0, num_ids), 0 = missing or rare. With 2^64 they are raw:
    any int64, 0 = missing."""
    labels: tuple[str, ...]
    """Label columns."""
    weight: str | None = None
    """Column of row weights, float32; None where every row counts as one."""
    hotness: dict[str, int] = field(default_factory=dict)
    """Ids a row of the features that are stored multi-hot; the others have one."""

    def __post_init__(self) -> None:
        columns = [*self.labels, *([self.weight] if self.weight else []), *self.dense, *self.sparse]
        doubled = sorted({column for column in columns if columns.count(column) > 1})
        if doubled:
            raise ValueError(f"column {doubled[0]!r} stands twice; every column needs a name of its own")
        if not self.labels:
            raise ValueError("labels is empty; a model needs a column to predict")
        if not self.sparse:
            raise ValueError("sparse is empty; a model needs at least one sparse feature")
        for feature, num_ids in self.sparse.items():
            if num_ids < 1:
                raise ValueError(f"sparse feature {feature!r} has {num_ids} ids; it needs at least id 0")
            if MAX_NUM_IDS < num_ids != RAW:
                raise ValueError(
                    f"sparse feature {feature!r} has {num_ids} ids; {MAX_NUM_IDS:,} at most, or 2^64 (raw)"
                )
        if self.raw and len(self.raw) < len(self.sparse):
            bounded = next(feature for feature in self.sparse if feature not in self.raw)
            raise ValueError(f"ids of {self.raw[0]!r} are raw, those of {bounded!r} are not; all or none must be")
        for feature, hotness in self.hotness.items():
            if feature not in self.sparse:
                raise ValueError(f"hotness names {feature!r}, which is no sparse feature")
            if hotness < 1:
                raise ValueError(f"hotness of {feature!r} is {hotness}; it must be at least 1")

    @property
    def raw(self) -> tuple[str, ...]:
        """Features whose ids are raw: all, or none."""
        return tuple(feature for feature, num_ids in self.sparse.items() if num_ids == RAW)

    @property
    def num_fields(self) -> int:
        """Fields that a backbone sees: one a sparse feature, and one for all dense columns together."""
        return len(self.sparse) + bool(self.dense)

    @property
    def hash(self) -> str:
        """Twelve hex digits that change whenever a column or a size does."""
        return hashlib.sha256(json.dumps(dump(self)).encode()).hexdigest()[:12]

    def save(self, folder: Path) -> None:
        """Write `schema.json` into `folder`."""
        write_whole(folder / "schema.json", json.dumps(dump(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Schema":
        """Read the schema of a prepared folder.

        Raises:
            InputError: the folder or its `schema.json` is missing or does not hold a schema.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; `recsys prepare FORMAT FILE --out {folder}` makes it")
        path = folder / "schema.json"
        if not path.exists():
            raise InputError(
                f"{folder}: no schema.json in it, so it was not made by `recsys prepare` (or not finished)"
            )
        return load_file(cls, path)
