"""Merge files of predictions, so that models of other frameworks can join."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recsys.config import InputError
from recsys.merge.rules import FITTED
from recsys.studies.merge_runs import MergeConfig
from recsys.training.metrics import ClickMetrics
from recsys.training.predictions import Predictions, load_predictions, member_metrics, merge_for

NAMED = ("schema", "split", "data")
"""What two files say of themselves that must not differ, where both say it."""


def merge_files(config: MergeConfig) -> dict[str, ClickMetrics]:
    """Write one file of all members' logits and their merge; returns the metrics of both on its rows.

    Raises:
        InputError: files of other rows or labels, a column that holds what it cannot, or nothing to fit on.
    """
    for path in config.sources:
        if path.is_dir():
            raise InputError(
                f"{path} is a run, and others are files; `recsys predict {path} --out FILE.parquet` makes it one"
            )
    predictions, facts = _joined(config.sources)
    rule = config.rule or "mean_logit"
    if rule in FITTED and not config.fit_on:
        raise InputError(f"--rule {rule} is fitted; give validation rows of the same members by --fit-on FILE ...")
    fitted_on = predictions
    if rule in FITTED:
        fitted_on, _ = _joined(config.fit_on)
        if fitted_on.names != predictions.names:
            raise InputError(
                f"--fit-on has members {', '.join(fitted_on.names)}, the sources {', '.join(predictions.names)}"
            )
    merge = merge_for(rule, fitted_on)
    logits, _, _ = predictions.tensors
    merged: np.ndarray = merge(logits).numpy()
    predictions.save(config.out, facts | {"merge": rule, "weights": " ".join(map(str, merge.weights))}, merged)
    return member_metrics(predictions, merge)


def _joined(paths: Sequence[Path]) -> tuple[Predictions, dict[str, str]]:
    """Members of several files side by side; a name that is taken gets the file's before it."""
    first, facts, rows = load_predictions(paths[0])
    names, logits = list(first.names), [first.logits_NM]
    for path in paths[1:]:
        other, own, own_rows = load_predictions(path)
        for key in NAMED:
            if key in facts and key in own and facts[key] != own[key]:
                raise InputError(f"{path} is of {key} {own[key]}, {paths[0]} of {facts[key]}")
        if len(rows) != len(own_rows) or (rows != own_rows).any():
            raise InputError(f"{path} has other rows than {paths[0]}: {_difference(rows, own_rows)}")
        wrong = np.flatnonzero(first.labels_N != other.labels_N)
        if len(wrong):
            raise InputError(
                f"{path}, row {own_rows[wrong[0]]}: label {other.labels_N[wrong[0]]:g}, in {paths[0]} "
                f"{first.labels_N[wrong[0]]:g}; they are not predictions of the same rows"
            )
        names += [name if name not in names else f"{path.stem}_{name}" for name in other.names]
        logits.append(other.logits_NM)
    if len(set(names)) < len(names):
        raise InputError(f"members of one name in files of one name: {', '.join(sorted(names))}; rename a file")
    return Predictions(tuple(names), np.concatenate(logits, axis=1), first.labels_N, first.weights_N), facts


def _difference(rows: np.ndarray, other: np.ndarray) -> str:
    only_here, only_there = np.setdiff1d(rows, other), np.setdiff1d(other, rows)
    if len(only_here):
        return f"row {only_here[0]} is missing there (of {len(rows):,}, {len(only_here):,} are)"
    return f"row {only_there[0]} is there alone ({len(only_there):,} are)"
