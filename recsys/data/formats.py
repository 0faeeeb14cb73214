"""Raw log formats: columns, label and rules; no I/O."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from recsys.config import InputError, load_file, nearest

Kind = Literal[
    "label", "clicks", "impressions", "integer", "float", "hex32", "int64", "uint64", "text", "hour", "unused"
]
HOUR_FEATURES = ("hour", "weekday", "is_weekend")
CATEGORY_KINDS = ("hex32", "int64", "uint64", "text")
DIGITS = b"0123456789abcdefABCDEF-"
"""What fields of numeric formats are made of."""
NUMERIC_KINDS = ("label", "clicks", "impressions", "integer", *CATEGORY_KINDS[:3], "hour")

DTYPES: dict[str, type[pl.DataType]] = {
    "label": pl.UInt8,
    "clicks": pl.UInt32,
    "impressions": pl.UInt32,
    "integer": pl.Int64,
    "float": pl.Float64,
    "hex32": pl.UInt32,
    "int64": pl.Int64,
    "uint64": pl.UInt64,
    "text": pl.String,
    "hour": pl.UInt32,
}
"""Of a parsed column of each kind; columns that are unused are dropped."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a raw log."""

    name: str
    """Its name; a file's header must say the same."""
    kind: Kind
    """What it holds: label (0 or 1); clicks and impressions (counts; clicks > 0 is the label); integer (dense or
    bucketised); float (dense as it is); categories hex32 (up to 8 hexadecimal digits), int64, uint64 or text; hour (as
    YYMMDDHH: gives hour, weekday and is_weekend); unused."""
    max_ids: int | None = None
    """Cap of a category's ids, id 0 included."""

    @property
    def derived(self) -> tuple[str, ...]:
        """Features with other names than the column's that are made of it."""
        if self.kind == "hour":
            return tuple(name for name in HOUR_FEATURES if name != self.name)
        return ("weight",) if self.kind == "impressions" else ()


@dataclass(frozen=True, kw_only=True)
class RawFormat:
    """A click log: its columns in file order, and what is usually done with it."""

    name: str
    """The schema's name."""
    columns: tuple[Column, ...]
    """In file order (of a Parquet file: any order, by name)."""
    file: Literal["text", "parquet"] = "text"
    """text: lines of fields, plain or gzip."""
    separator: str = "\t"
    """Between fields."""
    quote: str = ""
    """Character that may enclose a field that holds a separator; empty when there is none."""
    header: bool = False
    """Whether the first line of every file names the columns."""
    integers: str = "log1p"
    """Rule of integer columns: log1p or log3 make dense features, log_squared_bucket makes categories."""
    threshold: int = 5
    """A value keeps an id of its own when it occurs at least this often in training rows."""
    split: str = "random"
    """Rule of the split: random, time, file or hash:COLUMN."""

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns] + [name for c in self.columns for name in c.derived]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"column {name!r} stands twice (hour gives {', '.join(HOUR_FEATURES)}, impressions weight)"
                )
            if name.startswith(".") or "/" in name or not name:
                raise ValueError(f"column {name!r}: a name must not be empty, begin with a dot or hold a slash")
        has_label, has_clicks, has_impressions = (bool(self.named(k)) for k in ("label", "clicks", "impressions"))
        if len(self.named("label")) + len(self.named("clicks")) != 1:
            raise ValueError("exactly one column must be of kind label (or clicks, with impressions)")
        if (has_label and has_impressions) or has_clicks != has_impressions:
            raise ValueError("columns of kind clicks and impressions go together")
        is_ascii = self.separator.isascii() and self.quote.isascii()
        if len(self.separator) != 1 or len(self.quote) > 1 or not is_ascii or self.separator in "\n\r" + self.quote:
            raise ValueError("separator must be one ASCII character, quote another one or none")
        integer_rule(self.integers)
        if not self.named(*CATEGORY_KINDS, "hour", *(["integer"] if self.integers in BUCKET_RULES else [])):
            raise ValueError("no column is a category (hex32, int64, uint64, text or hour)")
        for column in self.columns:
            if column.max_ids is not None and column.kind not in CATEGORY_KINDS:
                raise ValueError(f"column {column.name!r} has max_ids, but its kind {column.kind} is no category")

    def named(self, *kinds: str) -> tuple[str, ...]:
        """Names of the columns of these kinds, in file order."""
        return tuple(column.name for column in self.columns if column.kind in kinds)

    @property
    def label(self) -> str:
        """Name of the label column."""
        return self.named("label", "clicks")[0]

    @property
    def is_numeric(self) -> bool:
        """Whether every field is made of (hexadecimal) digits and minus signs, and the separator is none of them."""
        is_digit = self.separator in DIGITS.decode()
        return not (self.quote or is_digit) and all(c.kind in (*NUMERIC_KINDS, "unused") for c in self.columns)


def log1p(values: np.ndarray) -> np.ndarray:
    """ln(max(v, 0) + 1): the rule of the public DLRM scripts."""
    return np.log1p(np.maximum(values, 0))


def log3(values: np.ndarray) -> np.ndarray:
    """ln(max(v, -2) + 3): the rule of TorchRec's and MLPerf's DLRM, whose integers start at -1 or -2."""
    return np.log(np.maximum(values, -2) + 3.0)


def log_squared_bucket(value: pl.Expr) -> pl.Expr:
    """V > 2 -> floor(ln(v)^2), other values stay; missing stays missing (the rule of the CTR papers)."""
    return pl.when(value > 2).then(value.log().pow(2).floor().cast(pl.Int64)).otherwise(value)


# How integer columns become features. A dense rule gives one float32 column, and takes a missing value for 0; a bucket
# rule gives category keys, which then pass through the vocabulary like any other category.
DENSE_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"log1p": log1p, "log3": log3}
BUCKET_RULES: dict[str, Callable[[pl.Expr], pl.Expr]] = {"log_squared_bucket": log_squared_bucket}


def integer_rule(name: str) -> str:
    """Return the name of a rule, if there is one.

    Raises:
        InputError: there is not.
    """
    rules = {**DENSE_RULES, **BUCKET_RULES}
    if name not in rules:
        raise InputError(f"unknown rule --integers {name!r}; {nearest(name, rules)}")
    return name


def hour_features(name: str) -> dict[str, pl.Expr]:
    """Hour of the day, weekday (1 = Monday) and is_weekend of a column of YYMMDDHH, as Int64 keys."""
    hour = pl.col(name)
    day = pl.date(2000 + hour // 1_000_000, hour // 10_000 % 100, hour // 100 % 100)
    return {
        "hour": (hour % 100).cast(pl.Int64),
        "weekday": day.dt.weekday().cast(pl.Int64),
        "is_weekend": (day.dt.weekday() > 5).cast(pl.Int64),
    }


def _columns(kind: Kind, *names: str) -> tuple[Column, ...]:
    return tuple(Column(name=name, kind=kind) for name in names)


_CRITEO = (
    *_columns("label", "label"),
    *_columns("integer", *(f"I{i}" for i in range(1, 14))),
    *_columns("hex32", *(f"C{i}" for i in range(1, 27))),
)

# The table sizes of MLPerf's DLRM-DCNv2: distinct values of the 24 days, at most 40 million.
MLPERF_NUM_IDS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip

_AVAZU_SITES_AND_DEVICES = (
    "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model",
)  # fmt: skip

FORMATS = {
    "criteo_kaggle": RawFormat(name="criteo_kaggle", columns=_CRITEO),
    "criteo_1tb": RawFormat(
        name="criteo_1tb",
        columns=(
            *_CRITEO[:14],
            *(Column(name=c.name, kind=c.kind, max_ids=n) for c, n in zip(_CRITEO[14:], MLPERF_NUM_IDS, strict=True)),
        ),
        threshold=1,
        split="file",
    ),
    # As Criteo's dataset page on the Hugging Face hub holds it since 2026.
    "criteo_1tb_parquet": RawFormat(
        name="criteo_1tb_parquet",
        file="parquet",
        columns=(
            *_columns("label", "label"),
            *_columns("integer", *(f"integer_feature_{i}" for i in range(1, 14))),
            *(
                Column(name=f"categorical_feature_{i}", kind="hex32", max_ids=max_ids)
                for i, max_ids in enumerate(MLPERF_NUM_IDS, start=1)
            ),
        ),
        threshold=1,
        split="file",
    ),
    "avazu": RawFormat(
        name="avazu",
        columns=(
            *_columns("unused", "id"),
            *_columns("label", "click"),
            *_columns("hour", "hour"),
            *_columns("int64", "C1", "banner_pos"),
            *_columns("hex32", *_AVAZU_SITES_AND_DEVICES),
            *_columns("int64", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))),
        ),
        separator=",",
        header=True,
        threshold=2,
    ),
    "kdd12": RawFormat(
        name="kdd12",
        columns=(
            *_columns("clicks", "Click"),
            *_columns("impressions", "Impression"),
            *_columns("uint64", "DisplayURL", "AdID", "AdvertiserID", "Depth", "Position", "QueryID"),
            *_columns("uint64", "KeywordID", "TitleID", "DescriptionID", "UserID"),
        ),
        threshold=10,
    ),
}


def format_of(name: str) -> RawFormat:
    """The format of that name, or the one that a YAML or JSON file describes.

    Raises:
        InputError: no such format, or the file does not describe one.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        return load_file(RawFormat, Path(name))
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; {nearest(name, FORMATS)} (or a YAML file that describes columns)")
    return FORMATS[name]
