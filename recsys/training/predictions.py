"""Predictions on held-out rows: their file, their merge and their metrics."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recsys.config import InputError, load
from recsys.members import FILE_COLUMNS
from recsys.merge.fit import fit
from recsys.merge.rules import FITTED, Merge
from recsys.merge.selection import greedy_selection
from recsys.metrics.click import ClickMetrics, ClickScores
from recsys.place import whole

MERGED = "merged"
ROW, LABEL, WEIGHT = FILE_COLUMNS

FACTS = b"recsys"
"""Key of a file's metadata: a JSON object that says what the predictions are of."""


@dataclass(frozen=True)
class Predictions:
    """Logits of N held-out rows, in the order of the split's files."""

    names: tuple[str, ...]
    """Of the M members."""
    logits_NM: np.ndarray
    labels_N: np.ndarray
    weights_N: np.ndarray
    """How often each row counts; 0 or more."""
    rows_N: np.ndarray | None = None
    """Number of each row, rising: its place in the split's files, from 0; None for 0 to N - 1."""

    @classmethod
    def of_whole_split(
        cls, names: Sequence[str], logits_NM: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray
    ) -> "Predictions":
        """Take all rows of a split in their order, and after them those that fill up its last batches.

        Rows of weight 0, which padding has too, are left out; the others keep their numbers, for padding is last.
        """
        rows_N = np.flatnonzero(weights_N > 0)
        return cls(tuple(names), logits_NM[rows_N], labels_N[rows_N], weights_N[rows_N], rows_N)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and weights, in float64."""
        logits, labels, weights = self.logits_NM, self.labels_N, self.weights_N
        return torch.from_numpy(logits).double(), torch.from_numpy(labels).double(), torch.from_numpy(weights).double()

    def of(self, members: Sequence[str]) -> "Predictions":
        """Predictions of some members, in their order."""
        columns = [self.names.index(name) for name in members]
        return replace(self, names=tuple(members), logits_NM=self.logits_NM[:, columns])

    def save(self, path: Path, facts: Mapping[str, str], merged_N: np.ndarray | None = None) -> None:
        """Write them to a Parquet file: row, label, weight, a logit a member (null where it gave none), and the merge.

        Args:
            path: of the file.
            facts: what they are predictions of, such as schema and split; kept in the file's metadata.
            merged_N: the merged logit.
        """
        assert not {*FILE_COLUMNS, MERGED} & set(self.names), "members have names of their own, see recsys.members"
        logits = {name: pa.array(self.logits_NM[:, i], from_pandas=True) for i, name in enumerate(self.names)}
        merged = {} if merged_N is None else {MERGED: pa.array(merged_N)}
        rows = np.arange(len(self.labels_N)) if self.rows_N is None else self.rows_N
        table = pa.table({ROW: rows, LABEL: self.labels_N, WEIGHT: self.weights_N, **logits, **merged})
        with whole(path) as partial:
            pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(dict(facts))}), str(partial))


def check_out(path: Path) -> None:
    """Look, before the work, whether a file can be written where predictions are to go.

    Raises:
        InputError: its folder is missing, or it is a folder itself.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: no such folder to write it to")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file in it, such as {path / 'predictions.parquet'}")


def load_predictions(path: Path) -> tuple[Predictions, dict[str, str], np.ndarray]:
    """Read a file of predictions, of `recsys predict` or of another framework: predictions, facts, and row numbers.

    Columns: `row` (an integer a row, each once), `label` (0 or 1), optionally `weight` (how often a row counts, once
    without it), and one column of logits for each member; `merged` is left out. Files of `recsys predict` number rows
    by their place in the split's files, and lack those of weight 0.

    Raises:
        InputError: a file that is none, or a column that is missing or holds what it cannot, naming it and the row.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot read it as Parquet ({' '.join(str(error).split())[:200]})") from None
    members = _members(path, table)
    columns = {name: _numbers(path, table, name) for name in (LABEL, *members)}
    weights = _weights(path, table)
    rows = _numbers(path, table, ROW)
    if len(np.unique(rows)) < len(rows) or (rows != np.floor(rows)).any():
        raise InputError(f"{path}: column 'row' does not give every row a whole number of its own")
    wrong = np.flatnonzero((columns[LABEL] != 0) & (columns[LABEL] != 1))
    if len(wrong):
        raise InputError(f"{path}, column 'label', row {wrong[0] + 1}: {columns[LABEL][wrong[0]]} is neither 0 nor 1")
    order = np.argsort(rows)
    logits = np.stack([columns[name] for name in members], axis=1).astype(np.float32)
    labels, rows_N = columns[LABEL].astype(np.float32), rows[order].astype(np.int64)
    predictions = Predictions(tuple(members), logits[order], labels[order], weights[order], rows_N)
    return predictions, _facts(path, table), rows_N


def _members(path: Path, table: pa.Table) -> list[str]:
    names = table.column_names
    for name in (ROW, LABEL):
        if name not in names:
            raise InputError(f"{path}: no column {name!r}; a file of predictions has row, label and a logit a member")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: column {name!r} stands twice; every column needs a name of its own")
    members = [name for name in names if name not in (*FILE_COLUMNS, MERGED)]
    if not members:
        raise InputError(f"{path}: no column of logits beside {', '.join(names)}")
    if not len(table):
        raise InputError(f"{path}: no row in it; predict the rows of a split first")
    return members


def _facts(path: Path, table: pa.Table) -> dict[str, str]:
    where = f"{path}: its metadata {FACTS.decode()!r}"
    try:
        values = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); predict again, or remove it") from None
    return load(dict[str, str], values, where)


def _weights(path: Path, table: pa.Table) -> np.ndarray:
    if WEIGHT not in table.column_names:
        return np.ones(len(table), np.float32)
    weights = _numbers(path, table, WEIGHT)
    wrong = np.flatnonzero(weights < 0)
    if len(wrong):
        raise InputError(f"{path}, column 'weight', row {wrong[0] + 1}: {weights[wrong[0]]:g} is below 0")
    if not weights.sum() > 0:
        raise InputError(f"{path}: column 'weight' is 0 in every row; a row counts where it is above 0")
    return weights.astype(np.float32)


def _numbers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    try:
        values = table[name].cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        raise InputError(f"{path}: column {name!r} is {table[name].type}, not numbers") from None
    wrong = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
    if len(wrong):
        raise InputError(
            f"{path}, column {name!r}, row {wrong[0] + 1}: {values[wrong[0]]} is no finite number of float32; every "
            "row needs one in every column"
        )
    return values


def merge_for(rule: str, predictions: Predictions) -> Merge:
    """Make the merge of a rule, fitted on these predictions where the rule is one that is fitted.

    Raises:
        InputError: they cannot be fitted on.
    """
    if rule not in FITTED:
        return Merge(rule=rule)
    try:
        return fit(rule, *predictions.tensors)
    except ValueError as error:
        raise InputError(f"merge rule {rule}: {error}") from None


def greedy_order(predictions: Predictions) -> list[str]:
    """Members from the one to keep first to the one to drop first, by what the mean of those kept gains."""
    names = predictions.names
    if len(set(predictions.labels_N.tolist())) < 2:
        return list(names)
    taken = greedy_selection(*predictions.tensors, max_members=len(names)).members
    return [names[index] for index in taken]


def member_metrics(predictions: Predictions, merge: Merge) -> dict[str, ClickMetrics]:
    """Metrics of each member, and of all of them merged under the name `merged`."""
    merged_N: np.ndarray = merge(predictions.tensors[0]).numpy()
    return metrics_of(predictions, merged_N, np.ones(predictions.logits_NM.shape, dtype=bool))


def metrics_of(predictions: Predictions, merged_N: np.ndarray, answered_NM: np.ndarray) -> dict[str, ClickMetrics]:
    """Metrics of each member on the rows that it answered, if there are any, and of the merged logits on all."""
    logits, labels, weights = predictions.tensors

    def metrics(logit_N: Tensor, rows_N: Tensor) -> ClickMetrics:
        columns = (values[rows_N].numpy() for values in (logit_N, labels, weights))
        return ClickScores(np.float64, np.float64).add(*columns).metrics()

    answered = torch.from_numpy(answered_NM)
    found = {
        name: metrics(logits[:, index], answered[:, index])
        for index, name in enumerate(predictions.names)
        if answered[:, index].any()
    }
    everyone = torch.ones(len(labels), dtype=torch.bool)
    return found | {MERGED: metrics(torch.from_numpy(merged_N).double(), everyone)}
