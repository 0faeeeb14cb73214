"""Raw log formats: columns and rules, no I/O."""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, kw_only=True)
class RawFormat:
    """A headerless tab-separated click log: label first, then integers, then 32-bit hexadecimal categories."""

    name: str
    label: str
    integers: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in file order."""
        return (self.label, *self.integers, *self.categories)


FORMATS = {
    "criteo_kaggle": RawFormat(
        name="criteo_kaggle",
        label="label",
        integers=tuple(f"I{i}" for i in range(1, 14)),
        categories=tuple(f"C{i}" for i in range(1, 27)),
    ),
}


def log1p(value: pl.Expr) -> pl.Expr:
    """ln(max(v, 0) + 1); missing becomes 0 (the rule of the public DLRM scripts)."""
    return value.clip(lower_bound=0).log1p().fill_null(0.0)


def log_squared_bucket(value: pl.Expr) -> pl.Expr:
    """V > 2 -> floor(ln(v)^2), other values stay; missing stays missing (the rule of the CTR papers)."""
    return pl.when(value > 2).then(value.log().pow(2).floor().cast(pl.Int64)).otherwise(value)


# How integer columns become features. A dense rule gives one float32 column; a bucket rule gives category keys, which
# then pass through the vocabulary like any other category.
DENSE_RULES: dict[str, Callable[[pl.Expr], pl.Expr]] = {"log1p": log1p}
BUCKET_RULES: dict[str, Callable[[pl.Expr], pl.Expr]] = {"log_squared_bucket": log_squared_bucket}
