"""Two files of benchmark results, side by side: what became faster, and whether a ratio fell too far."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from recsys.config import InputError

PARTS = ("name", "config", "metrics", "ratios", "machine")
"""What every result must have."""
SAME_MACHINE = ("cpu", "cores")
"""What two machines must have in common for their metrics to be compared."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two files of benchmark results, matched by name and config."""

    a: Annotated[Path, Positional]
    """Results to compare with: one JSON object a line, as benchmarks append them."""
    b: Annotated[Path, Positional]
    """Results to look at. Of several with one name and config, the last counts, in both files."""
    fail_below: float | None = None
    """Exit with 1 where one of the ratios that are taken within a run is below this share of what it was."""

    def __post_init__(self) -> None:
        if self.fail_below is not None and not self.fail_below > 0:
            raise ValueError(f"fail_below {self.fail_below} must be above 0; 0.9 allows a tenth less")


@dataclass(frozen=True)
class Change:
    """One number of a result in both files."""

    result: str
    """Name and config of the result."""
    key: str
    a: float
    b: float
    is_ratio: bool
    """Whether it was taken within a run, and so holds on any machine; the higher the better."""

    @property
    def share(self) -> float | None:
        """B as a share of A; None where that is 0."""
        return self.b / self.a if self.a else None


@dataclass(frozen=True)
class Comparison:
    """All that two files have in common."""

    changes: list[Change]
    notes: list[str]
    """One line each: machines that differ, results that only one file has."""
    lost: list[str]
    """Ratios of results in common that A alone has."""

    def fallen(self, fail_below: float) -> list[str]:
        """One line a ratio that fell below that share of what it was, is no number, or is gone."""
        lost = [f"{ratio}: in A alone" for ratio in self.lost]
        return lost + [
            f"{change.result}: {change.key} is {change.share:.3f} of what it was ({change.a:.4g}, now {change.b:.4g})"
            for change in self.changes
            if change.is_ratio and change.share is not None and not change.share >= fail_below
        ]


def bench_compare(config: CompareConfig) -> list[str]:
    """Print what changed; returns one line a ratio that fell too far.

    Raises:
        InputError: a file that cannot be read or holds no results, or files that have none in common.
    """
    found = compare(config.a, config.b)
    for note in found.notes:
        print(note)  # noqa: T201
    console = Console()
    for result in dict.fromkeys(change.result for change in found.changes):
        table = Table(title=result, title_justify="left")
        table.add_column("")
        for column in ("A", "B", "B / A"):
            table.add_column(column, justify="right")
        for change in found.changes:
            if change.result == result:
                share = "" if change.share is None else f"{change.share:.3f}"
                table.add_row(change.key, f"{change.a:,.4g}", f"{change.b:,.4g}", share, style=_style(change))
        console.print(table)
    return found.fallen(config.fail_below) if config.fail_below is not None else []


def _style(change: Change) -> str:
    return "bold" if change.is_ratio else ""


def compare(a: Path, b: Path) -> Comparison:
    """Match the results of two files, and their numbers.

    Raises:
        InputError: see `bench_compare`.
    """
    first, second = _results(a), _results(b)
    common = [key for key in first if key in second]
    if not common:
        raise InputError(f"{a} and {b} have no result of one name and config in common")
    notes = [
        f"only in {path}: {_title(mine[key])}"
        for path, mine, others in ((a, first, second), (b, second, first))
        for key in mine
        if key not in others
    ]
    changes: list[Change] = []
    lost: list[str] = []
    foreign: dict[str, None] = {}
    for key in common:
        one, other = first[key], second[key]
        machines = [_machine(result) for result in (one, other)]
        if machines[0] != machines[1]:
            foreign[f"machines differ ({machines[0]}; {machines[1]}): only ratios are compared"] = None
        gone = [name for name, _ in _numbers(one["ratios"]) if name not in dict(_numbers(other["ratios"]))]
        if gone:
            notes.append(f"only in {a}: {', '.join(gone)} of {_title(one)}")
            lost += [f"{_title(one)}: {name}" for name in gone]
        parts = ("ratios", "metrics") if machines[0] == machines[1] else ("ratios",)
        for part in parts:
            now = dict(_numbers(other[part]))
            changes += [
                Change(_title(one), name, value, now[name], part == "ratios")
                for name, value in _numbers(one[part])
                if name in now
            ]
    return Comparison(changes, [*foreign, *notes], lost)


def _results(path: Path) -> dict[str, Mapping[str, Any]]:
    """Results of a file, by name and config."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({getattr(error, 'strerror', None) or 'not text'})") from None
    results = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        lacks = [part for part in PARTS if part not in values] if isinstance(values, dict) else list(PARTS)
        wrong = [part for part in PARTS[1:] if part not in lacks and not isinstance(values[part], dict)]
        if lacks or wrong:
            raise InputError(
                f"{path}, line {number}: no result of a benchmark, which is a JSON object in one line with "
                f"{', '.join(PARTS)} (here, {', '.join(lacks or wrong)} {'is missing' if lacks else 'is no object'})"
            )
        results[json.dumps([values["name"], values["config"]], sort_keys=True)] = values
    if not results:
        raise InputError(f"{path}: no result in it; benchmarks append one line of JSON each, given --json {path}")
    return results


def _title(result: Mapping[str, Any]) -> str:
    """Name and config in one line."""
    config = " ".join(f"{key}={value}" for key, value in result["config"].items() if value not in (None, {}, [], ""))
    return f"{result['name']}: {config}"


def _machine(result: Mapping[str, Any]) -> str:
    known = [result["machine"].get(part) for part in SAME_MACHINE] + [result["metrics"].get("device")]
    return f"{known[0]}, {known[1]} cores" + (f", {known[2]}" if known[2] not in (None, "cpu") else "")


def _numbers(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Every number under its path; of a summary, the median."""
    for name, value in values.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping):
            median = value.get("median")
            if isinstance(median, int | float):
                yield key, float(median)
            else:
                yield from _numbers(value, f"{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)
