"""Vocabularies: which values of a categorical column get an id of their own."""

from pathlib import Path

import polars as pl


def count_values(keys: pl.LazyFrame, *, threshold: int) -> pl.DataFrame:
    """Give ids to the values of a one-column frame named `key` that occur at least `threshold` times.

    Ids start at 1, most frequent first, ties by value, so that they depend on the data alone; id 0 is left for missing
    and rare values. Returns columns key, id (Int32) and count, in order of id.
    """
    return (
        keys.drop_nulls()
        .group_by("key")
        .agg(count=pl.len())
        .filter(pl.col("count") >= threshold)
        .sort("count", "key", descending=[True, False])
        .with_row_index("id", offset=1)
        .select("key", pl.col("id").cast(pl.Int32), "count")
        .collect(engine="streaming")
    )


def encode(keys: pl.DataFrame, vocabulary: pl.DataFrame) -> pl.Series:
    """Replace the values of a one-column frame named `key` by their ids, in row order; 0 where there is none."""
    joined = keys.join(vocabulary.select("key", "id"), on="key", how="left", maintain_order="left")
    return joined["id"].fill_null(0)


def save(vocabularies: dict[str, pl.DataFrame], folder: Path) -> None:
    """Write one Parquet file a column."""
    folder.mkdir()
    for name, vocabulary in vocabularies.items():
        vocabulary.write_parquet(folder / f"{name}.parquet")
