"""How members differ is counted as slow plain Python counts it, and the ambiguity decomposition is exact."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from recsys.merge import rows as reading
from recsys.merge.diversity import ambiguity, correlations, disagreement

each_decomposition = pytest.mark.parametrize("rule", ["mean_logit", "mean_probability"])
chunk_sizes = pytest.mark.parametrize("chunk_numbers", [13, 2**20])


def random_logits(num_rows: int = 100, num_members: int = 4, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(num_rows, 1, generator=generator)
    return scale * (shared + 0.5 * torch.randn(num_rows, num_members, generator=generator)) - 1.0


def random_labels(num_rows: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.bernoulli(torch.full((num_rows,), 0.3), generator=generator), torch.rand(num_rows, generator=generator)


@chunk_sizes
def test_correlations_are_pearsons(monkeypatch: pytest.MonkeyPatch, chunk_numbers: int) -> None:
    monkeypatch.setattr(reading, "CHUNK_NUMBERS", chunk_numbers)
    logits_NM = random_logits()
    found = correlations(logits_NM)
    assert found.shape == (4, 4)
    columns = logits_NM.T.tolist()
    for i, first in enumerate(columns):
        assert found[i, i] == 1.0
        for j, second in enumerate(columns):
            assert found[i, j].item() == pytest.approx(statistics.correlation(first, second), rel=1e-12)


def test_correlations_hold_at_any_offset_and_scale() -> None:
    logits_NM = random_logits().double()
    moved = logits_NM * torch.tensor([1.0, 1e-6, -1e3, 1.0]).double() + torch.tensor([1e6, 0.0, 5.0, 0.0]).double()
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0]).double()
    assert_close(correlations(moved), correlations(logits_NM) * signs * signs.unsqueeze(1), rtol=1e-7, atol=1e-7)


def test_a_member_that_never_varies_correlates_with_nothing() -> None:
    logits_NM = random_logits(num_members=3)
    logits_NM[:, 1] = 0.1
    found = correlations(logits_NM)
    assert found[1].isnan().all()
    assert found[:, 1].isnan().all()
    assert found[0, 2].isfinite()


@chunk_sizes
@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_disagreement_counts_rows_on_different_sides(
    monkeypatch: pytest.MonkeyPatch, chunk_numbers: int, threshold: float
) -> None:
    monkeypatch.setattr(reading, "CHUNK_NUMBERS", chunk_numbers)
    logits_NM = random_logits()
    logits_NM[::7, 1] = threshold
    found = disagreement(logits_NM, threshold)
    columns = logits_NM.T.tolist()
    for i, first in enumerate(columns):
        for j, second in enumerate(columns):
            apart = sum((a > threshold) != (b > threshold) for a, b in zip(first, second, strict=True))
            assert found[i, j].item() == pytest.approx(apart / 100, abs=1e-15)
    assert 0 < found[0, 1] < 0.5


@chunk_sizes
@pytest.mark.parametrize("weighs", [False, True])
@each_decomposition
def test_ambiguity_is_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, rule: str, weighs: bool, chunk_numbers: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK_NUMBERS", chunk_numbers)
    logits_NM, (labels_N, weights_N) = random_logits(), random_labels()
    if not weighs:
        weights_N = torch.ones(100)
    members, merged, gain = [], [], []
    for logits, label in zip(logits_NM.tolist(), labels_N.tolist(), strict=True):
        right = [1 / (1 + math.exp(-z if label else z)) for z in logits]
        mean = statistics.fmean(logits)
        members.append(statistics.fmean(-math.log(p) for p in right))
        if rule == "mean_logit":
            merged.append(math.log1p(math.exp(-mean if label else mean)))
            gain.append(statistics.fmean(math.log1p(math.exp(z)) for z in logits) - math.log1p(math.exp(mean)))
        else:
            merged.append(-math.log(statistics.fmean(right)))
            gain.append(math.log(statistics.fmean(right)) - statistics.fmean(math.log(p) for p in right))
    found = ambiguity(logits_NM, labels_N, weights_N if weighs else None, rule)
    weights = weights_N.tolist()
    assert found.mean_member_logloss == pytest.approx(statistics.fmean(members, weights), rel=1e-12)
    assert found.merged_logloss == pytest.approx(statistics.fmean(merged, weights), rel=1e-12)
    assert found.ambiguity == pytest.approx(statistics.fmean(gain, weights), rel=1e-12)
    assert found.ambiguity > 0.01


@each_decomposition
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 4).flatmap(
        lambda num_members: st.lists(
            st.tuples(
                st.lists(st.floats(-2000, 2000), min_size=num_members, max_size=num_members),
                st.booleans(),
                st.floats(1e-3, 10),
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_what_members_lose_and_merging_gains_adds_up(rule: str, rows: list) -> None:
    logits, labels, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    found = ambiguity(logits, labels, weights, rule)
    assert found.ambiguity >= 0
    slack = 1e-12 * max(1.0, found.mean_member_logloss)
    assert found.mean_member_logloss - found.merged_logloss == pytest.approx(found.ambiguity, abs=slack)


@each_decomposition
def test_members_that_agree_gain_nothing(rule: str) -> None:
    labels_N, weights_N = random_labels()
    found = ambiguity(random_logits(num_members=1).expand(-1, 3), labels_N, weights_N, rule)
    assert found.ambiguity == pytest.approx(0.0, abs=1e-15)


def test_what_mean_logit_gains_is_free_of_labels() -> None:
    labels_N, _ = random_labels()
    logits_NM = random_logits()
    assert ambiguity(logits_NM, labels_N).ambiguity == ambiguity(logits_NM, 1 - labels_N).ambiguity


def test_a_rule_without_the_decomposition_is_refused() -> None:
    with pytest.raises(ValueError, match="merge rule 'confidence' has no such decomposition; mean_logit and mean_prob"):
        ambiguity(random_logits(), random_labels()[0], rule="confidence")
