"""When a run validates, saves and stops."""

import math

import numpy as np
import pytest

from recsys.training import cadence
from recsys.training.cadence import Cadence
from recsys.training.metrics import click_metrics
from recsys.training.stopping import EarlyStopping


def metrics(ne: float, auc: float = 0.7) -> dict:
    import dataclasses

    some = click_metrics(np.array([0.0, 1.0]), np.array([0.4, 0.6]))
    return {"merged": dataclasses.replace(some, ne=ne, auc=auc)}


def test_patience_counts_validations_without_a_better_one() -> None:
    stopping = EarlyStopping(patience=2, target_auc=None)
    told = [stopping.see(metrics(ne), 0.5)[0] for ne in (0.9, 0.8, 0.85, 0.79, 0.8, math.nan)]
    assert told[:-1] == [None] * 5
    assert told[-1] == "NE has not been below 0.79000 for 2 validations (--train.patience)"


def test_a_target_stops_as_soon_as_it_is_reached() -> None:
    stopping = EarlyStopping(patience=None, target_auc=0.8)
    assert stopping.see(metrics(0.9, auc=0.79), 0.5) == (None, None)
    reason, _ = stopping.see(metrics(0.9, auc=0.8), 0.5)
    assert reason == "AUC 0.80000 has reached --train.target-auc 0.8"


def test_what_was_seen_is_gone_on_with() -> None:
    one, other = (EarlyStopping(patience=2, target_auc=None) for _ in range(2))
    for ne in (0.8, 0.9):
        one.see(metrics(ne), 0.5)
    other.load_state(one.state().tolist())
    assert one.see(metrics(0.9), 1.5) == other.see(metrics(0.9), 1.5)
    assert other.reason() == one.reason() is not None


def test_overfitting_after_the_first_epoch_is_told_once() -> None:
    stopping = EarlyStopping(patience=None, target_auc=None)
    told = [stopping.see(metrics(ne), epoch)[1] for ne, epoch in ((0.8, 0.5), (0.81, 1.0), (0.79, 1.5), (0.82, 2.0))]
    assert told[:3] == [None] * 3
    assert told[3] is not None
    assert "validation NE 0.82000 in epoch 2 is above the 0.80000 of the first" in told[3]
    assert stopping.see(metrics(0.9), 2.5)[1] is None


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (Cadence(), []),
        (Cadence(every=4), [4, 8, 12]),
        (Cadence(per_epoch=2, steps_per_epoch=5), [3, 5, 8, 10, 13]),
        (Cadence(every=6, per_epoch=1, steps_per_epoch=4), [4, 6, 8, 12]),
    ],
)
def test_steps_at_which_something_is_due(rule: Cadence, steps: list[int]) -> None:
    assert [step for step in range(1, 14) if rule.due(step)] == steps


def test_the_clock_asks_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cadence.time, "monotonic", lambda: now[0])
    rule = Cadence(minutes=2)
    asked = []
    for second in range(0, 400, 50):
        now[0] = second
        asked.append(rule.overdue())
    assert [50 * i for i, yes in enumerate(asked) if yes] == [150, 300]
    assert not Cadence().overdue()
