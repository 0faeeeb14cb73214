"""Merge files of predictions, so that models of other frameworks can join."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recsys.config import InputError
from recsys.merge.rules import FITTED, Merge
from recsys.studies.merge_runs import MergeConfig
from recsys.training.metrics import ClickMetrics
from recsys.training.predictions import Predictions, check_out, load_predictions, member_metrics, merge_for

SAME_DATA = ("schema", "manifest")
"""What files say of their data that must not differ, where both say it."""


def merge_files(config: MergeConfig) -> dict[str, ClickMetrics]:
    """Write one file of all members' logits and their merge; returns the metrics of both on its rows.

    Raises:
        InputError: files of other rows, labels or weights, a column that holds what it cannot, nothing to fit on, or a
            place where no file can be written.
    """
    rule = config.rule or "mean_logit"
    _check(config, rule)
    files = [_File.load(path) for path in config.sources]
    names = _names(files)
    predictions = _joined(files, names)
    merge = _fitted(rule, files, config.fit_on, names) if rule in FITTED else Merge(rule=rule)
    merged: np.ndarray = merge(predictions.tensors[0]).numpy()
    facts = {key: value for file in reversed(files) for key, value in file.facts.items()}
    predictions.save(config.out, facts | {"merge": rule, "weights": " ".join(map(str, merge.weights))}, merged)
    return member_metrics(predictions, merge)


@dataclass(frozen=True)
class _File:
    """A file of predictions, read."""

    path: Path
    predictions: Predictions
    facts: dict[str, str]
    rows: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "_File":
        return cls(path, *load_predictions(path))

    def check_facts(self, other: "_File", keys: Sequence[str]) -> None:
        """Raise InputError where both files say what they are of, and do not say the same."""
        for key in keys:
            mine, wanted = self.facts.get(key), other.facts.get(key)
            if mine is not None and wanted is not None and mine != wanted:
                raise InputError(f"{self.path} is of {key} {mine}, {other.path} of {wanted}")


def _check(config: MergeConfig, rule: str) -> None:
    """Raise InputError for what is wrong before any file is read."""
    for path in config.sources:
        if path.is_dir():
            raise InputError(
                f"{path} is a run, and others are files; `recsys predict {path} --out FILE.parquet` makes it one"
            )
    if config.data:
        raise InputError("--data is for runs whose prepared folder has moved; files of predictions need none")
    if rule in FITTED and not config.fit_on:
        raise InputError(f"--rule {rule} is fitted; give validation rows of the same members by --fit-on FILE ...")
    if config.fit_on and rule not in FITTED:
        raise InputError(f"--fit-on: --rule {rule} is not fitted; {' and '.join(FITTED)} are")
    if config.fit_on and len(config.fit_on) != len(config.sources):
        raise InputError(
            f"--fit-on names {len(config.fit_on)} files, the sources are {len(config.sources)}; name one for each "
            "source, in their order"
        )
    check_out(config.out)
    for path in (*config.sources, *config.fit_on):
        if path.resolve() == config.out.resolve():
            raise InputError(f"--out {config.out} is a file to read; name another")


def _names(files: Sequence[_File]) -> tuple[str, ...]:
    """Of all members; a column whose name is taken gets the file's name before it."""
    names: list[str] = []
    for file in files:
        own = [name if name not in names else f"{file.path.stem}_{name}" for name in file.predictions.names]
        for name in own:
            if name in names or own.count(name) > 1:
                raise InputError(
                    f"{file.path}: two members would be called {name}, which stands for its file and column; rename "
                    "the file or the column"
                )
        names += own
    return tuple(names)


def _joined(files: Sequence[_File], names: Sequence[str]) -> Predictions:
    """Members of several files side by side."""
    first = files[0]
    for number, file in enumerate(files[1:], start=1):
        for other in files[:number]:
            file.check_facts(other, (*SAME_DATA, "split"))
        if len(first.rows) != len(file.rows) or (first.rows != file.rows).any():
            raise InputError(f"{file.path} has other rows than {first.path}: {_difference(first.rows, file.rows)}")
        _check_same(first, file, "label")
        _check_same(first, file, "weight")
    logits = np.concatenate([file.predictions.logits_NM for file in files], axis=1)
    return replace(first.predictions, names=tuple(names), logits_NM=logits)


def _check_same(first: _File, file: _File, column: str) -> None:
    """Raise InputError where labels or weights of the same rows differ."""
    wanted, found = (getattr(each.predictions, f"{column}s_N") for each in (first, file))
    wrong = np.flatnonzero(wanted != found)
    if len(wrong):
        hint = "; without a column weight, every row counts once" if column == "weight" else ""
        raise InputError(
            f"{file.path}, row {file.rows[wrong[0]]}: {column} {found[wrong[0]]:g}, in {first.path} "
            f"{wanted[wrong[0]]:g}; they are not predictions of the same rows{hint}"
        )


def _fitted(rule: str, files: Sequence[_File], paths: Sequence[Path], names: Sequence[str]) -> Merge:
    """Fit on files that stand for the sources one by one: their names differ, their columns do not."""
    fit_on = []
    for source, path in zip(files, paths, strict=True):
        file, columns = _File.load(path), source.predictions.names
        if set(file.predictions.names) != set(columns):
            raise InputError(
                f"--fit-on {path} has members {', '.join(file.predictions.names)}, {source.path} at the same place "
                f"{', '.join(columns)}; name one file for each source, in their order"
            )
        split = file.facts.get("split", "valid")
        if split != "valid":
            raise InputError(f"--fit-on {path} is of split {split}; fit on predictions of the validation rows")
        for each in files:
            file.check_facts(each, SAME_DATA)
        fit_on.append(replace(file, predictions=file.predictions.of(columns)))
    return merge_for(rule, _joined(fit_on, names))


def _difference(rows: np.ndarray, other: np.ndarray) -> str:
    only_here, only_there = np.setdiff1d(rows, other), np.setdiff1d(other, rows)
    if len(only_here):
        return f"row {only_here[0]} is missing there (of {len(rows):,}, {len(only_here):,} are)"
    return f"row {only_there[0]} is there alone ({len(only_there):,} are)"
