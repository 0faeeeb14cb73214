"""Prediction within a time: as many members answer as a batch's budget allows, and those that answer are merged."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from recsys.config import InputError
from recsys.data.batch import Batch, to_device
from recsys.training.predict import Predictor
from recsys.training.predictions import Predictions

WARM_UP_BATCHES = 5
SMOOTHING = 0.1
"""Weight of the newest batch in a member's running mean of time."""


@dataclass
class Answers:
    """What a budget gave."""

    budget_ms: float
    seconds: list[float] = field(default_factory=list)
    """Time of each batch, in order."""
    num_members: list[int] = field(default_factory=list)
    """Members that answered in each batch."""

    def facts(self) -> dict[str, object]:
        """Latency percentiles in ms, share of batches above the budget, and by the number of members that answered."""
        milliseconds = np.array(self.seconds) * 1e3
        counts = np.bincount(self.num_members)
        p50, p99 = np.percentile(milliseconds, [50, 99])
        return {
            "budget_ms": self.budget_ms,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "over_budget_share": float((milliseconds > self.budget_ms).mean()),
            "share_by_num_members": {k: float(n / counts.sum()) for k, n in enumerate(counts) if n},
        }


class Timed:
    """Members of a run that answer one after another, each built and sharded alone, until a batch's time is used up.

    A member is asked when the time since the batch began and that member's running mean together stay within the
    budget; the first one always is, so that every row gets an answer. Latency is that of members in turn on one
    machine; on M machines side by side, it would be that of the slowest one.

    Args:
        members: one predictor a member, the one to ask first at the head.
        budget_ms: time for a batch.
    """

    def __init__(self, members: Sequence[Predictor], budget_ms: float) -> None:
        self.members = members
        self.budget = budget_ms / 1e3
        self.means = np.zeros(len(members))
        self.device = members[0].world.device

    @torch.no_grad()
    def predict(self, split: str) -> tuple[Predictions, Answers]:
        """Logits of a split's rows, nan where a member was not asked.

        Raises:
            InputError: no member can answer within the budget.
        """
        for member in self.members:
            member.task.eval()
        loader = self.members[0].held_out(split)
        self._warm_up(loader.once(), loader.batch_size)
        answers = Answers(self.budget * 1e3)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for batch in to_device(loader.once(), self.device):
            parts.append(self._answer(batch, answers))
        logits, labels, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        names = [member.names[0] for member in self.members]
        return Predictions.of_whole_split(names, logits, labels, weights), answers

    def _warm_up(self, batches: Iterator[Batch], batch_size: int) -> None:
        """Learn what each member takes; the first batches pay for allocations, and are not counted."""
        times = [
            [self._ask(member, batch)[1] for member in self.members]
            for batch in to_device(islice(batches, WARM_UP_BATCHES), self.device)
        ]
        self.means = np.median(times[len(times) // 2 :], axis=0)
        if self.means[0] > self.budget:
            fastest = int(self.means.argmin())
            raise InputError(
                f"budget {self.budget * 1e3:g}ms: no member would answer, for {self.members[0].names[0]} takes "
                f"{self.means[0] * 1e3:.1f} ms for {batch_size} rows (the fastest, {self.members[fastest].names[0]}, "
                f"{self.means[fastest] * 1e3:.1f} ms); raise --budget, or lower --batch-size"
            )

    def _answer(self, batch: Batch, answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = np.full((len(batch.labels), len(self.members)), np.nan, dtype=np.float32)
        began, asked = time.perf_counter(), 0
        for index, member in enumerate(self.members):
            if index and time.perf_counter() - began + self.means[index] > self.budget:
                continue
            logits[:, index], seconds = self._ask(member, batch)
            self.means[index] += SMOOTHING * (seconds - self.means[index])
            asked += 1
        answers.seconds.append(time.perf_counter() - began)
        answers.num_members.append(asked)
        return logits, batch.labels.cpu().numpy(), batch.weights.cpu().numpy()

    def _ask(self, member: Predictor, batch: Batch) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        logits_B = member.task(batch)[1].logits_BM[:, 0].float().cpu().numpy()
        return logits_B, time.perf_counter() - began
