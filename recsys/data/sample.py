"""A sample of a split: rows that are spread over its files, read one column at a time."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import InputError
from recsys.data.checks import decode, one_line, open_parquet, readable, rules_of
from recsys.data.manifest import Manifest
from recsys.data.schema import Schema

MAX_FILES = 64


class Sample:
    """At most `max_rows` rows of a split; a context, its files stay open within.

    All rows if there are no more; else as many of each of up to 64 files, from row groups spread over the file.

    Raises:
        InputError: the split has no row, a file cannot be read, or its columns are not those of the schema.
    """

    def __init__(self, folder: Path, split: str, schema: Schema, manifest: Manifest, max_rows: int) -> None:
        rows = {name: facts.num_rows or 0 for name, facts in manifest.files.items() if name.startswith(f"{split}/")}
        if not sum(rows.values()):
            raise InputError(f"{folder / split}: no row in it")
        self.folder = folder
        self.names, self.rows_a_file = sorted(rows), max(rows.values())
        if sum(rows.values()) > max_rows:
            self.names = [self.names[i] for i in _spread(min(len(rows), MAX_FILES, max_rows), len(rows))]
            self.rows_a_file = max_rows // len(self.names)
        self._rules, self._hotness = rules_of(schema), schema.hotness
        self._files: dict[str, pq.ParquetFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Sample":
        with ExitStack() as stack:
            for name in self.names:
                self._files[name] = self._open(stack, name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack, name: str) -> pq.ParquetFile:
        try:
            file = stack.enter_context(open_parquet(self.folder / name))
        except (OSError, pa.ArrowException) as error:
            raise self._unfit(name, f"cannot read it ({one_line(error)})") from None
        fit = readable(file.schema_arrow, {column: rule.types for column, rule in self._rules.items()})
        if unfit := [column for column in self._rules if column not in fit]:
            raise self._unfit(name, f"column {unfit[0]} is not as schema.json says")
        return file

    def _unfit(self, where: str, problem: str) -> InputError:
        return InputError(f"{self.folder / where}: {problem}; `recsys data verify {self.folder}` tells all")

    def read(self, column: str) -> np.ndarray:
        """All values of a column; see `pieces`."""
        return np.concatenate(list(self.pieces(column)))

    def pieces(self, column: str) -> Iterator[np.ndarray]:
        """Yield values of a column by row groups, in the order of rows; of a multi-hot feature row after row.

        Raises:
            InputError: they cannot be decoded, or the schema forbids one of them.
        """
        for name, file in self._files.items():
            left = self.rows_a_file * self._hotness.get(column, 1)
            for group in _groups(file, self.rows_a_file):
                values, problems = decode(file, group, column, self._rules[column])
                if problems:
                    raise self._unfit(f"{name}, row group {group}, column {column}", problems[0])
                yield values[:left]
                left -= min(len(values), left)


def _groups(file: pq.ParquetFile, num_rows: int) -> list[int]:
    """Row groups that have `num_rows` rows together, or more, or as many as there are."""
    of_a_group = max(file.metadata.num_rows // max(file.num_row_groups, 1), 1)
    return _spread(min(-(-num_rows // of_a_group), file.num_row_groups), file.num_row_groups)


def _spread(num: int, total: int) -> list[int]:
    """Return `num` of range(total), evenly spaced."""
    return [i * total // num for i in range(num)]
