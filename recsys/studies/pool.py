"""The pool: predictions of every member of a study on both held-out splits, and the metrics of any merge of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.merge.diversity import ambiguity
from recsys.merge.rows import losses
from recsys.studies.jobs import Job
from recsys.studies.row_errors import auc_influences, logloss_influences
from recsys.studies.running import predictions_of
from recsys.training.metrics import click_metrics
from recsys.training.predictions import Predictions, merge_for
from recsys.training.provenance import data_facts

METRICS = {"auc": 1, "logloss": -1, "ne": -1}
"""Metrics of a study, and whether more or less of each is better."""

Scores = dict[str, float]
"""A number for each of METRICS."""


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """A set of members and their merge by the mean logit, on the test rows."""

    source: str
    size: int
    members: tuple[str, ...]
    merged: Scores
    mean_member: Scores
    best_member: Scores
    """The best by each metric, chosen on the test rows themselves: the merge gets no favour here."""
    over_mean: Scores
    """Gain over the mean of its members, positive where the merge is better."""
    over_best: Scores
    ambiguity: float
    """In nats; equal to the gain in logloss over the mean member, to rounding."""


class Pool:
    """Predictions of all jobs. Whatever is fitted or chosen is so on `valid`; scores are those of `test`."""

    def __init__(self, valid: Predictions, test: Predictions) -> None:
        assert valid.names == test.names
        self.valid, self.test = valid, test
        self._scores: dict[tuple[str, tuple[str, ...]], Scores] = {}

    @property
    def base_rate(self) -> float:
        """Share of clicks among validation rows."""
        return float(np.average(self.valid.labels_N, weights=self.valid.weights_N))

    def merged_logits(self, members: Sequence[str], rule: str = "mean_logit") -> Tensor:
        """Merged logit of every test row."""
        merge = merge_for(rule, self.valid.of(members))
        return merge(torch.from_numpy(self.test.of(members).logits_NM).double())

    def scores(self, members: Sequence[str], rule: str = "mean_logit") -> Scores:
        """Metrics of a merge; they do not depend on the order of members."""
        key = rule, tuple(sorted(members))
        if key not in self._scores:
            probabilities = self.merged_logits(key[1], rule).sigmoid().numpy()
            found = click_metrics(self.test.labels_N, probabilities, self.test.weights_N)
            self._scores[key] = {name: getattr(found, name) for name in METRICS}
        return self._scores[key]

    def set_scores(self, source: str, members: tuple[str, ...]) -> SetScores:
        """Metrics of a set, its members and what the merge gains."""
        merged, alone = self.scores(members), [self.scores((name,)) for name in members]
        mean = {name: float(np.mean([scores[name] for scores in alone])) for name in METRICS}
        best = {name: max((s[name] for s in alone), key=lambda value: sign * value) for name, sign in METRICS.items()}
        found = ambiguity(*self.test.of(members).tensors) if len(members) > 1 else None
        return SetScores(
            source=source,
            size=len(members),
            members=members,
            merged=merged,
            mean_member=mean,
            best_member=best,
            over_mean={name: sign * (merged[name] - mean[name]) for name, sign in METRICS.items()},
            over_best={name: sign * (merged[name] - best[name]) for name, sign in METRICS.items()},
            ambiguity=found.ambiguity if found else 0.0,
        )

    def influences(self, members: Sequence[str]) -> dict[str, np.ndarray]:
        """What every test row adds to each metric of the members' mean logit, beside its expectation [N]."""
        logits_N = self.merged_logits(members)
        labels_N, weights_N = self.test.labels_N, self.test.weights_N.astype(np.float64)
        loss_N = losses(logits_N.unsqueeze(1), self.test.tensors[1]).numpy()[:, 0]
        of_loss_N = logloss_influences(loss_N, weights_N)
        scores = self.scores(members)
        return {
            "auc": auc_influences(labels_N, logits_N.numpy(), weights_N),
            "logloss": of_loss_N,
            "ne": of_loss_N * (scores["ne"] / scores["logloss"]),  # the base rate's own error is left out
        }


def read_pool(jobs: Sequence[Job], schema: Schema) -> Pool:
    """Put the predictions of all jobs side by side.

    Raises:
        InputError: a job's rows are not those of the others.
    """
    manifest = data_facts(jobs[0].config.data)["manifest_sha256"]
    return Pool(*(_side_by_side(jobs, split, schema, manifest) for split in ("valid", "test")))


def _side_by_side(jobs: Sequence[Job], split: str, schema: Schema, manifest: str | None) -> Predictions:
    parts = [predictions_of(job, split, schema, manifest) for job in jobs]
    first = parts[0]
    for job, part in zip(jobs, parts, strict=True):
        same = len(part.labels_N) == len(first.labels_N) and (part.labels_N == first.labels_N).all()
        if not same or (part.weights_N != first.weights_N).any():
            path: Path = job.folder / f"{split}.parquet"
            raise InputError(f"{path}: other rows than those of {jobs[0].folder}; remove the file to predict again")
    names = tuple(name for part in parts for name in part.names)
    return Predictions(names, np.concatenate([part.logits_NM for part in parts], 1), first.labels_N, first.weights_N)
