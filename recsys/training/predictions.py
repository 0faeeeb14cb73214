"""Predictions on held-out rows: their file, their merge and their metrics."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recsys.config import InputError
from recsys.merge.fit import fit
from recsys.merge.rules import FITTED, Merge
from recsys.merge.selection import greedy_selection
from recsys.place import whole
from recsys.training.metrics import ClickMetrics, click_metrics

MERGED = "merged"
ROW, LABEL, WEIGHT = "row", "label", "weight"
"""Columns of a file of predictions beside the members'; a row's number is its place in the split's files."""


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
    """How often each row counts; above 0."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and weights, in float64."""
        logits, labels, weights = self.logits_NM, self.labels_N, self.weights_N
        return torch.from_numpy(logits).double(), torch.from_numpy(labels).double(), torch.from_numpy(weights).double()

    def of(self, members: Sequence[str]) -> "Predictions":
        """Predictions of some members, in their order."""
        columns = [self.names.index(name) for name in members]
        return Predictions(tuple(members), self.logits_NM[:, columns], self.labels_N, self.weights_N)

    def save(self, path: Path, facts: Mapping[str, str], merged_N: np.ndarray | None = None) -> None:
        """Write them to a Parquet file: row, label, weight, a logit a member (null where it gave none), and the merge.

        Args:
            path: of the file.
            facts: what they are predictions of, such as schema and split; kept in the file's metadata.
            merged_N: the merged logit.
        """
        logits = {name: pa.array(self.logits_NM[:, i], from_pandas=True) for i, name in enumerate(self.names)}
        merged = {} if merged_N is None else {MERGED: pa.array(merged_N)}
        rows = pa.array(np.arange(len(self.labels_N)))
        table = pa.table({ROW: rows, LABEL: self.labels_N, WEIGHT: self.weights_N, **logits, **merged})
        with whole(path) as partial:
            pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(dict(facts))}), str(partial))


def load_predictions(path: Path) -> tuple[Predictions, dict[str, str], np.ndarray]:
    """Read a file of predictions, of `recsys predict` or of another framework: predictions, facts, and row numbers.

    Columns: `row` (an integer a row, each once), `label` (0 or 1), optionally `weight`, and one column of logits for
    each member; `merged` is left out.

    Raises:
        InputError: a file that is none, or a column that is missing or holds what it cannot, naming it and the row.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot read it as Parquet ({' '.join(str(error).split())[:200]})") from None
    for name in (ROW, LABEL):
        if name not in table.column_names:
            raise InputError(f"{path}: no column {name!r}; a file of predictions has row, label and a logit a member")
    members = [name for name in table.column_names if name not in (ROW, LABEL, WEIGHT, MERGED)]
    if not members:
        raise InputError(f"{path}: no column of logits beside {', '.join(table.column_names)}")
    columns = {name: _numbers(path, table, name) for name in (LABEL, *members)}
    weights = _numbers(path, table, WEIGHT) if WEIGHT in table.column_names else np.ones(len(table), np.float32)
    rows = _numbers(path, table, ROW)
    if len(np.unique(rows)) < len(rows) or (rows != np.floor(rows)).any():
        raise InputError(f"{path}: column 'row' does not give every row a whole number of its own")
    wrong = np.flatnonzero((columns[LABEL] != 0) & (columns[LABEL] != 1))
    if len(wrong):
        raise InputError(f"{path}, column 'label', row {wrong[0] + 1}: {columns[LABEL][wrong[0]]} is neither 0 nor 1")
    order = np.argsort(rows)
    logits = np.stack([columns[name] for name in members], axis=1).astype(np.float32)
    facts = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
    labels, weights = columns[LABEL].astype(np.float32), weights.astype(np.float32)
    predictions = Predictions(tuple(members), logits[order], labels[order], weights[order])
    return predictions, facts, rows[order].astype(np.int64)


def _numbers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    try:
        values = table[name].cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        raise InputError(f"{path}: column {name!r} is {table[name].type}, not numbers") from None
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise InputError(f"{path}, column {name!r}, row {wrong[0] + 1}: no finite number; logits are wanted everywhere")
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
    logits, _, _ = predictions.tensors
    columns = {name: logits[:, index] for index, name in enumerate(predictions.names)} | {MERGED: merge(logits)}
    return {
        name: click_metrics(predictions.labels_N, torch.sigmoid(logit).numpy(), predictions.weights_N)
        for name, logit in columns.items()
    }
