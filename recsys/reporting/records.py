"""What a run folder tells of a run, finished or not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.config import InputError, read_values
from recsys.training.mlperf import LAST
from recsys.training.run import RunFolder
from recsys.training.sinks import METRICS, parsed

MERGED = "merged"
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder describes it."""

    name: str
    config: Mapping[str, Any]
    """As it was saved, in plain values: a run of another version may have other fields."""
    data: Record | None
    """How many rows it is trained on."""
    train: Sequence[Record]
    valid: Sequence[Record]
    end: Record | None = None
    """Where and why it ended; runs of earlier versions do not tell."""

    @property
    def members(self) -> list[str]:
        """Names of the members, as the records have them."""
        if self.valid:
            return [name for name, values in self.valid[-1].items() if isinstance(values, Mapping) and name != MERGED]
        return list(self.train[-1].get("loss", {})) if self.train else []

    @property
    def step(self) -> int:
        """Step of the last record."""
        return max([0, *(int(record["step"]) for record in (*self.train, *self.valid))])

    @property
    def num_steps(self) -> int | None:
        """Steps that it is to take; None where its folder does not tell yet."""
        loop = self.config["train"]
        if loop.get("num_steps"):
            return int(loop["num_steps"])
        rows = self.data.get("rows") if self.data else None
        return int(loop["num_epochs"] * (rows // loop["batch_size"])) if rows else None

    @property
    def state(self) -> str:
        """How far it has come."""
        of = f" of {self.num_steps:,}" if self.num_steps else ""
        if self.end and self.end["step"] == self.step:  # else it went on
            if self.end["reason"] == LAST:
                return f"finished at step {self.step:,}"
            return f"stopped early at step {self.step:,}{of}: {self.end['reason']}"
        if self.num_steps == self.step and self.valid and self.valid[-1]["step"] == self.step:
            return f"finished at step {self.step:,}"
        return f"step {self.step:,}{of}: not finished"

    def series(self, kind: str, *names: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, by its path in the records of a kind, where they have it; null is NaN."""
        steps, values = [], []
        for record in self.train if kind == "train" else self.valid:
            value: Any = record
            for name in names:
                value = value.get(name, "") if isinstance(value, Mapping) else ""
            if value is None or isinstance(value, int | float):
                steps.append(int(record["step"]))
                values.append(math.nan if value is None else float(value))
        return steps, values

    def seconds(self) -> float:
        """Seconds of training, by its own rates: without validation and starts."""
        steps, rates = self.series("train", "rows_per_s")
        rows, before, total = int(self.config["train"]["batch_size"]), 0, 0.0
        for step, rate in zip(steps, rates, strict=True):
            total += (step - before) * rows / rate if rate > 0 else 0.0
            before = step
        return total

    def phases(self) -> dict[str, float]:
        """Milliseconds of each phase of a step, averaged over records by their steps; empty where none is told."""
        totals: dict[str, float] = {}
        before = weight = 0
        for record in self.train:
            steps, before = int(record["step"]) - before, int(record["step"])
            if "phase_ms" in record:
                weight += steps
                for name, value in record["phase_ms"].items():
                    totals[name] = totals.get(name, 0.0) + steps * value
        return {name: total / weight for name, total in totals.items()} if weight else {}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, which go by the names of their folders, or where those are alike by their paths.

    Raises:
        InputError: a folder that is no run's, or has no metrics yet, or ones that cannot be read.
    """
    if not paths:
        raise InputError("no run named; name one or more run folders")
    names = [path.absolute().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        records = _records(RunFolder.existing(path).path)
        by_kind = {
            kind: [record for record in records if record["kind"] == kind] for kind in ("data", "train", "valid", "end")
        }
        config = read_values(path / "config.json")
        if not isinstance(config, Mapping) or not {"train", "data"} <= set(config):
            raise InputError(f"{path / 'config.json'}: not the config of a run")
        runs.append(
            Run(
                name=name if names.count(name) == 1 else str(path),
                config=config,
                data=by_kind["data"][-1] if by_kind["data"] else None,
                train=by_kind["train"],
                valid=by_kind["valid"],
                end=by_kind["end"][-1] if by_kind["end"] else None,
            )
        )
    return runs


def _records(folder: Path) -> list[Record]:
    path = folder / METRICS
    records: list[Record] = [record for _, record in parsed(path)]
    if not records:
        raise InputError(f"{path}: nothing in it yet; the run has not logged a step")
    return records
