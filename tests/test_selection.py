"""Greedy selection is the slow plain one."""

import math

import pytest
import torch
from torch import Tensor

from recsys.merge import rows as reading
from recsys.merge.selection import greedy_selection


def held_out(num_rows: int = 60, num_members: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(num_rows, 1, generator=generator)
    logits = truth + torch.linspace(1.5, 0.5, num_members) * torch.randn(num_rows, num_members, generator=generator)
    labels = torch.bernoulli(torch.sigmoid(truth[:, 0]), generator=generator)
    return logits, labels, torch.rand(num_rows, generator=generator)


def slow_logloss(members: list[int], logits: list, labels: list, weights: list) -> float:
    total = 0.0
    for row, label, weight in zip(logits, labels, weights, strict=True):
        merged = sum(row[member] for member in members) / len(members)
        total += weight * math.log1p(math.exp(-merged if label else merged))
    return total / sum(weights)


def slow_selection(max_members: int, *rows: list) -> tuple[tuple[int, ...], list[float]]:
    taken: list[int] = []
    losses = []
    while len(taken) < max_members:
        loss, member = min(
            (slow_logloss([*taken, member], *rows), member) for member in range(len(rows[0][0])) if member not in taken
        )
        taken.append(member)
        losses.append(loss)
    return tuple(taken), losses


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("chunk_numbers", [13, 2**20])
def test_selection_is_the_slow_one(monkeypatch: pytest.MonkeyPatch, weighs: bool, chunk_numbers: int) -> None:
    monkeypatch.setattr(reading, "CHUNK_NUMBERS", chunk_numbers)
    logits, labels, weights = held_out()
    if not weighs:
        weights = torch.ones_like(weights)
    members, losses = slow_selection(5, logits.tolist(), labels.tolist(), weights.tolist())
    assert members != tuple(
        sorted(range(5), key=lambda member: slow_logloss([member], *map(Tensor.tolist, held_out())))
    )
    selection = greedy_selection(logits, labels, weights if weighs else None, max_members=5)
    assert selection.members == members
    assert selection.loglosses == pytest.approx(losses, rel=1e-12)


def test_fewer_members_are_the_first_of_more() -> None:
    rows = held_out()
    all_of_them = greedy_selection(*rows, max_members=9)
    assert sorted(all_of_them.members) == [0, 1, 2, 3, 4]
    two = greedy_selection(*rows, max_members=2)
    assert two.members == all_of_them.members[:2]
    assert two.loglosses == all_of_them.loglosses[:2]


def test_the_first_is_the_best_alone_and_a_bad_one_comes_last() -> None:
    logits, labels, _ = held_out()
    logits[:, 2] *= -3
    selection = greedy_selection(logits, labels, max_members=5)
    rows = (logits.tolist(), labels.tolist(), [1.0] * len(labels))
    assert selection.loglosses[0] == pytest.approx(min(slow_logloss([member], *rows) for member in range(5)))
    assert selection.members[-1] == 2
    assert selection.loglosses[-1] > selection.loglosses[-2]


def test_of_equals_the_first_is_taken() -> None:
    logits, labels, _ = held_out(num_members=1)
    assert greedy_selection(logits.expand(-1, 4), labels, max_members=4).members == (0, 1, 2, 3)


def test_the_rows_are_left_as_they_were() -> None:
    rows = held_out()
    before = [values.clone() for values in rows]
    greedy_selection(*rows, max_members=3)
    assert all(torch.equal(now, then) for now, then in zip(rows, before, strict=True))


def test_what_cannot_be_selected_is_refused() -> None:
    logits, labels, _ = held_out()
    with pytest.raises(ValueError, match="max_members is 0; at least 1 member is taken"):
        greedy_selection(logits, labels, max_members=0)
    logits[3, 1] = torch.nan
    with pytest.raises(ValueError, match="member 1 has logits that are not finite"):
        greedy_selection(logits, labels, max_members=2)
