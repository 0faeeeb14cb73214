"""Profile: what the columns of a prepared folder hold, and how much each alone tells of the label."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.config import InputError
from recsys.data.checks import one_line, open_parquet
from recsys.data.manifest import Manifest, SplitFacts
from recsys.data.sample import Sample
from recsys.data.schema import Schema
from recsys.progress import progress

NUM_TOP = 3
NUM_BUCKETS = 30


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Rows by bucket: of a dense column's value, or of the rank of a sparse feature's id (1 = most frequent)."""

    edges: list[float]
    """Where buckets begin, and where the last one ends."""
    counts: list[int]
    """Rows of each."""
    label_means: list[float | None]
    """Of those rows; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class DenseProfile:
    """What a dense column holds, or the rows' weights."""

    name: str
    kind: Literal["dense", "weight"]
    null_share: float | None
    """Share of raw rows without a value; None where no raw column has this name."""
    min: float
    mean: float
    p50: float
    p99: float
    max: float
    lift: float | None
    """Label mean of the top tenth of values over that of all rows; None where no value stands out."""
    buckets: Buckets


@dataclass(frozen=True, kw_only=True)
class TopValue:
    """One of the most frequent values of a sparse feature."""

    id: int
    key: str
    """The raw value, eight hexadecimal digits if it has 32 bits; `id N` where the feature has no vocabulary."""
    share: float
    lift: float | None
    """Label mean of its rows over that of all rows."""


@dataclass(frozen=True, kw_only=True)
class SparseProfile:
    """What a sparse feature holds. Shares are of rows; of ids, where rows have several."""

    name: str
    kind: Literal["sparse"] = "sparse"
    null_share: float | None
    """Share of raw rows without a value; None where no raw column has this name."""
    num_ids: int
    hotness: int
    """Ids a row."""
    rare_share: float
    """Share of id 0: missing or rare."""
    effective_ids: float
    """exp(entropy): as many ids, equally frequent, are as hard to guess."""
    top: list[TopValue]
    """Most frequent first, without id 0."""
    buckets: Buckets


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a prepared folder holds."""

    name: str
    schema_hash: str
    num_rows: int
    num_malformed: int
    splits: dict[str, SplitFacts]
    split: str
    """The one that columns were sampled from."""
    num_sampled: int
    """Rows."""
    label_mean: float
    """Of the sampled rows."""
    dense: list[DenseProfile]
    sparse: list[SparseProfile]


def profile(folder: Path, *, split: str, max_rows: int, show_progress: bool = True) -> Profile:
    """Profile every column of a split by at most `max_rows` of its rows, one column in memory at a time.

    Raises:
        InputError: the folder is not a prepared one, the split has no row, or a column holds what it must not.
    """
    schema, manifest = Schema.load(folder), Manifest.load(folder)
    names = [*([schema.weight] if schema.weight else []), *schema.dense, *schema.sparse]
    dense: list[DenseProfile] = []
    sparse: list[SparseProfile] = []
    with (
        progress("profile", total=len(names), unit="columns", show=show_progress) as advance,
        Sample(folder, split, schema, manifest, max_rows) as sample,
    ):
        labels = sample.read(schema.labels[0])
        for name in names:
            null_share = manifest.null_share.get(name)
            if name in schema.sparse:
                ids = _count_ids(sample.pieces(name), labels, schema.hotness.get(name, 1))
                vocabulary = f"vocabulary/{name}.parquet"
                key_of = partial(_key_of, folder / vocabulary) if vocabulary in manifest.files else "id {}".format
                sparse.append(_profile_sparse(name, schema, null_share, ids, labels, key_of))
            else:
                kind: Literal["dense", "weight"] = "weight" if name == schema.weight else "dense"
                dense.append(_profile_dense(name, kind, null_share, sample.read(name).astype(np.float64), labels))
            advance(1, name)
    return Profile(
        name=schema.name,
        schema_hash=schema.hash,
        num_rows=manifest.num_rows,
        num_malformed=manifest.num_malformed,
        splits=manifest.splits,
        split=split,
        num_sampled=len(labels),
        label_mean=float(labels.mean()),
        dense=dense,
        sparse=sparse,
    )


def _profile_dense(
    name: str, kind: Literal["dense", "weight"], null_share: float | None, values: np.ndarray, labels: np.ndarray
) -> DenseProfile:
    is_positive = labels == 1
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    is_top = values >= p90 if p90 > values.min() else values > p90
    counts, edges = np.histogram(values, NUM_BUCKETS)
    positives, _ = np.histogram(values[is_positive], edges)
    return DenseProfile(
        name=name,
        kind=kind,
        null_share=null_share,
        min=float(values.min()),
        mean=float(values.mean()),
        p50=float(p50),
        p99=float(p99),
        max=float(values.max()),
        lift=_lift(is_positive[is_top].sum(), is_top.sum(), labels),
        buckets=_buckets(edges, counts, positives),
    )


def _count_ids(pieces: Iterable[np.ndarray], labels: np.ndarray, hotness: int) -> pl.DataFrame:
    """Rows of each id (occurrences, where rows have several), those with a label of 1, and its share of all."""
    tallies = []
    row = 0
    for ids in pieces:
        end = row + len(ids) // hotness
        piece = pl.DataFrame({"id": ids, "label": np.repeat(labels[row:end], hotness)})
        tallies.append(piece.group_by("id").agg(count=pl.len().cast(pl.Int64), positives=pl.col("label").sum()))
        row = end
    return (
        pl.concat(tallies)
        .group_by("id")
        .sum()
        .sort("count", "id", descending=[True, False])
        .with_columns(share=pl.col("count") / (len(labels) * hotness))
    )


def _profile_sparse(
    name: str,
    schema: Schema,
    null_share: float | None,
    ids: pl.DataFrame,
    labels: np.ndarray,
    key_of: Callable[[int], str],
) -> SparseProfile:
    known = ids.filter(pl.col("id") != 0)
    share = ids["share"].to_numpy()
    return SparseProfile(
        name=name,
        null_share=null_share,
        num_ids=schema.sparse[name],
        hotness=schema.hotness.get(name, 1),
        rare_share=float(ids.filter(pl.col("id") == 0)["share"].sum()),
        effective_ids=float(np.exp(-(share * np.log(share)).sum())),
        top=[
            TopValue(
                id=row["id"],
                key=key_of(row["id"]),
                share=row["share"],
                lift=_lift(row["positives"], row["count"], labels),
            )
            for row in known.head(NUM_TOP).iter_rows(named=True)
        ],
        buckets=_by_rank(known["count"].to_numpy(), known["positives"].to_numpy()),
    )


def _lift(positives: int, count: int, labels: np.ndarray) -> float | None:
    """Label mean of some rows over that of all."""
    base = labels.mean()
    return float(positives / count / base) if count and base else None


def _by_rank(counts: np.ndarray, positives: np.ndarray) -> Buckets:
    """Buckets of ranks, each as wide as a constant share of its rank, of counts that fall."""
    edges = np.unique(np.geomspace(1, len(counts) + 1, NUM_BUCKETS + 1).round().astype(np.int64))
    if not len(counts):
        return Buckets(edges=[], counts=[], label_means=[])
    return _buckets(edges, np.add.reduceat(counts, edges[:-1] - 1), np.add.reduceat(positives, edges[:-1] - 1))


def _buckets(edges: np.ndarray, counts: np.ndarray, positives: np.ndarray) -> Buckets:
    return Buckets(
        edges=edges.tolist(),
        counts=counts.tolist(),
        label_means=[int(p) / int(n) if n else None for p, n in zip(positives, counts, strict=True)],
    )


def _key_of(path: Path, id_: int) -> str:
    """The raw value behind an id: row id - 1 of the vocabulary."""
    row = id_ - 1
    try:
        with open_parquet(path) as file:
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row < num_rows:
                    keys = file.read_row_group(group, columns=["key"], use_threads=False)["key"]
                    return f"{keys[row].as_py():08x}" if keys.type == pa.uint32() else str(keys[row].as_py())
                row -= num_rows
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot read it ({one_line(error)})") from None
    return f"id {id_}"
