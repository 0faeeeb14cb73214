"""Show what the columns of a prepared folder hold: as tables, as JSON, as a picture."""

import json
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from recsys.config import InputError, dump, write_whole
from recsys.data.profile import DenseProfile, Profile, SparseProfile, TopValue, profile
from recsys.data.schema import RAW
from recsys.place import Place

NO_TERMINAL_WIDTH = 120
UNKNOWN, RAW_IDS = "-", "raw"


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Which prepared folder to show, and what to write besides the tables."""

    folder: Positional[Place]
    """Prepared folder."""
    split: Literal["train", "valid", "test"] = "train"
    """Rows to look at."""
    rows: int = 2_000_000
    """As many of them at most, spread over the split's files."""
    json: Place | None = None
    """File for all that is known of each column."""
    png: Place | None = None
    """File for a picture with a panel a column; none is drawn unless asked for."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise InputError(f"--rows {self.rows} must be at least 1")
        for name, path in (("--json", self.json), ("--png", self.png)):
            if path and self.folder.resolve() in path.resolve().parents:
                raise InputError(
                    f"{name} {path}: not into {self.folder}, which holds its manifest's files and no others"
                )


def show(config: ShowConfig) -> Profile:
    """Print what a prepared folder holds, and return it.

    Raises:
        InputError: the folder is not a prepared one, the split has no row, or a column holds what it must not.
    """
    found = profile(config.folder, split=config.split, max_rows=config.rows)
    console = Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL_WIDTH)
    _print_head(console, found)
    if found.dense:
        console.print(_dense_table(found.dense))
    if found.sparse:
        console.print(_sparse_table(found.sparse))
    if config.json:
        write_whole(config.json, json.dumps(dump(found), indent=2) + "\n")
        console.print(f"wrote {config.json}", markup=False)
    if config.png:
        from recsys.data.panels import draw  # noqa: PLC0415  (drawing takes a library that tables do not need)

        draw(found, config.png)
        console.print(f"wrote {config.png}", markup=False)
    return found


def _print_head(console: Console, found: Profile) -> None:
    malformed = f", {found.num_malformed:,} malformed left out" if found.num_malformed else ""
    console.print(f"{found.name}: {found.num_rows:,} rows{malformed}, schema {found.schema_hash}", markup=False)
    for name, split in found.splits.items():
        console.print(f"  {name:<6}{split.num_rows:>15,} rows, label mean {split.label_mean:.4f}", markup=False)
    console.print(
        f"below: {found.num_sampled:,} rows of {found.split}, label mean {found.label_mean:.4f}; "
        "a lift is the label mean of some rows over that of all\n",
        markup=False,
        highlight=False,
    )


def _dense_table(columns: list[DenseProfile]) -> Table:
    table = _table("dense columns", "column", "null", "min", "mean", "p50", "p99", "max", "lift of top tenth")
    for column in columns:
        numbers = (column.min, column.mean, column.p50, column.p99, column.max)
        name = column.name if column.kind == "dense" else f"{column.name} (weight)"
        table.add_row(Text(name), _share(column.null_share), *(f"{x:,.4g}" for x in numbers), _lift(column.lift))
    return table


def _sparse_table(features: list[SparseProfile]) -> Table:
    table = _table("sparse features", "feature", "ids", "null", "id 0", "effective ids", "lift of top")
    table.add_column("most frequent values")
    for feature in features:
        table.add_row(
            Text(feature.name if feature.hotness == 1 else f"{feature.name} x{feature.hotness}"),
            RAW_IDS if feature.num_ids == RAW else f"{feature.num_ids:,}",
            _share(feature.null_share),
            _share(feature.rare_share),
            f"{feature.effective_ids:,.1f}",
            _lift(feature.top[0].lift if feature.top else None),
            Text("  ".join(map(_top_value, feature.top))),
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _top_value(value: TopValue) -> str:
    key = value.key if len(value.key) <= 16 else f"{value.key[:15]}…"
    return f"{key} {_share(value.share)}"


def _share(share: float | None) -> str:
    if share is None:
        return UNKNOWN
    if share == 0:
        return "0"
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _lift(lift: float | None) -> str:
    return UNKNOWN if lift is None else f"{lift:.2f}"
