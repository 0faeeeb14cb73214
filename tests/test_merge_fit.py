"""Fitted merges are those of scipy and scikit-learn, keep what fit promises, and see rows as they are weighted."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.testing import assert_close

from recsys.merge import fit as fitting
from recsys.merge import rows as reading
from recsys.merge.fit import TOLERANCE, fit
from recsys.merge.rules import FITTED, RULES, Merge

every_fit = pytest.mark.parametrize("rule", FITTED)


def held_out(
    num_rows: int = 3_000, num_members: int = 5, *, noise: float = 0.5, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of members that see one truth through more noise the later they come, clicks, and weights of rows."""
    generator = torch.Generator().manual_seed(seed)
    truth = 1.5 * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64) - 1.5
    spread = noise * torch.linspace(0.5, 3.0, num_members, dtype=torch.float64)
    logits = scale * (truth + spread * torch.randn(num_rows, num_members, generator=generator, dtype=torch.float64))
    labels = torch.bernoulli(torch.sigmoid(truth[:, 0]), generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.1
    return logits, labels, weights


def logloss(logits_N: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    losses = torch.logaddexp(torch.zeros_like(logits_N), (1 - 2 * labels_N) * logits_N)
    weights = torch.ones_like(losses) if weights_N is None else weights_N
    return ((losses * weights).sum() / weights.sum()).item()


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("weighs", [False, True])
def test_weighted_is_scipys_minimum_on_the_simplex(noise: float, weighs: bool) -> None:
    logits, labels, weights = held_out(noise=noise)
    rows = (logits, labels, weights if weighs else None)
    merge = fit("weighted", *rows)

    def loss(candidate: np.ndarray) -> float:
        return logloss(logits @ torch.from_numpy(candidate), *rows[1:])

    expected = minimize(
        loss,
        np.full(5, 0.2),
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda candidate: candidate.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert expected.success
    assert loss(np.array(merge.weights)) <= expected.fun + TOLERANCE
    assert merge.weights == pytest.approx(expected.x, abs=2e-3)
    assert sum(merge.weights) == pytest.approx(1.0, abs=1e-14)
    assert min(merge.weights) >= 0.0


def test_weighted_leaves_out_who_only_hurts() -> None:
    logits, labels, _ = held_out(num_members=3)
    logits[:, 1] *= -1
    weights = fit("weighted", logits, labels).weights
    assert weights[1] == 0.0
    assert weights[0] > weights[2] > 0.0


def test_no_move_within_the_simplex_gains_more_than_the_tolerance() -> None:
    logits, labels, _ = held_out(num_members=40, noise=0.8)
    found = torch.tensor(fit("weighted", logits, labels).weights, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits @ found, labels)
    (gradient,) = torch.autograd.grad(loss, found)
    assert 0 < (found == 0).sum() < 40
    assert (gradient @ found - gradient.min()).item() <= TOLERANCE


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_stacked_without_ridge_is_scikit_learns(monkeypatch: pytest.MonkeyPatch, noise: float, weighs: bool) -> None:
    monkeypatch.setattr(fitting, "RIDGE", 1e-6)
    logits, labels, weights = held_out(noise=noise)
    merge = fit("stacked", logits, labels, weights if weighs else None)
    expected = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=200)
    expected.fit(logits.numpy(), labels.numpy(), weights.numpy() if weighs else None)
    assert merge.weights == pytest.approx(expected.coef_[0], abs=1e-5)
    assert merge.bias == pytest.approx(expected.intercept_[0], abs=1e-5)


def test_the_ridge_is_a_standard_normal_prior_around_the_mean() -> None:
    # scikit-learn's ridge pulls to 0 and spares the intercept: shift by hand, and make the bias a member of ones.
    logits, labels, weights = held_out(num_rows=60, num_members=3)
    merge = fit("stacked", logits, labels, weights)

    def objective(x: np.ndarray) -> float:
        mean_loss = logloss(logits @ torch.from_numpy(x[:3]) + float(x[3]), labels, weights)
        return mean_loss * weights.sum().item() + (np.square(x[:3] - 1 / 3).sum() + x[3] ** 2) / 2

    expected = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-6}).x
    assert [*merge.weights, merge.bias] == pytest.approx(expected, abs=1e-4)


def test_members_that_correlate_do_not_blow_stacked_up() -> None:
    """A hundred rows, correlations of .99: without a ridge the weights follow noise."""
    logits, labels, _ = held_out(num_rows=100, num_members=6, noise=0.08)
    assert torch.corrcoef(logits.T).min() > 0.95
    free = LogisticRegression(C=np.inf, solver="newton-cholesky").fit(logits.numpy(), labels.numpy())
    assert np.abs(free.coef_).max() > 3
    assert max(map(abs, fit("stacked", logits, labels).weights)) < 1


def test_stacked_recalibrates() -> None:
    logits, labels, _ = held_out(num_members=1, noise=0.0, num_rows=20_000)
    merge = fit("stacked", 2.0 * logits + 1.0, labels)
    assert merge.weights[0] == pytest.approx(0.5, abs=0.03)
    assert merge.bias == pytest.approx(-0.5, abs=0.06)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 1_000),
    num_rows=st.integers(10, 200),
    num_members=st.integers(1, 9),
    noise=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 3.0]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0, 300.0]),
    weighs=st.booleans(),
)
def test_fits_keep_their_promises(
    seed: int, num_rows: int, num_members: int, noise: float, scale: float, weighs: bool
) -> None:
    logits, labels, weights = held_out(num_rows, num_members, noise=noise, scale=scale, seed=seed)
    labels[0], labels[1] = 0.0, 1.0
    rows = (labels, weights if weighs else None)
    mean = logloss(logits.mean(dim=1), *rows)
    best = min(logloss(logits_N, *rows) for logits_N in logits.T)
    rounding = 1e-11 * max(1.0, mean)
    weighted = logloss(fit("weighted", logits, *rows)(logits), *rows)
    assert weighted <= mean + rounding
    assert weighted <= best + rounding
    assert logloss(fit("stacked", logits, *rows)(logits), *rows) <= mean + rounding


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_promises_hold_when_passes_run_out(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    monkeypatch.setattr(fitting, "MAX_PASSES", passes)
    logits, labels, _ = held_out(num_members=4)
    logits[:, 1:] *= -1
    alone = logloss(logits[:, 0], labels)
    assert alone < logloss(logits.mean(dim=1), labels)
    assert logloss(fit("weighted", logits, labels)(logits), labels) <= alone + 1e-12
    # Steep and wrong about half the rows: a Newton step from the mean overshoots.
    logits, labels, _ = held_out(num_members=4, noise=3.0, scale=300.0)
    assert logloss(fit("stacked", logits, labels)(logits), labels) <= logloss(logits.mean(dim=1), labels)


def test_losses_keep_their_digits_where_a_member_is_sure() -> None:
    # Right by 25 and 40, wrong by 21 and 100.
    logits = torch.tensor([[25.0, -21.0], [-40.0, 100.0]], dtype=torch.float64)
    found = reading.losses(logits, torch.tensor([1.0, 0.0]))
    exact = [[math.log1p(math.exp(-25)), 21 + math.log1p(math.exp(-21))], [math.log1p(math.exp(-40)), 100.0]]
    assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0.0)


@every_fit
@pytest.mark.parametrize("tolerance", [TOLERANCE, 0.0])
def test_a_fit_takes_few_passes_even_to_the_last_digits(
    monkeypatch: pytest.MonkeyPatch, rule: str, tolerance: float
) -> None:
    """Where a step gains less than rounding, the gradient tells; where it has no digits left either, the fit stops."""
    derivatives, passes = fitting._derivatives, []

    def count(rows: reading.Rows, x: Tensor) -> tuple[float, Tensor, Tensor]:
        passes.append(x)
        return derivatives(rows, x)

    monkeypatch.setattr(fitting, "TOLERANCE", tolerance)
    monkeypatch.setattr(fitting, "_derivatives", count)
    for seed in range(30):
        passes.clear()
        fit(rule, *held_out(num_rows=1_000, seed=seed))
        assert 2 <= len(passes) < 15


@every_fit
def test_a_fit_ends_within_the_tolerance(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    descend, gaps = fitting._descend, []

    def watch(*arguments: Any) -> Any:
        end = descend(*arguments)
        gaps.append(end.gap)
        return end

    monkeypatch.setattr(fitting, "_descend", watch)
    for seed in range(100):
        logits, labels, _ = held_out(num_rows=1_000, noise=0.4, seed=seed)
        fit(rule, logits, labels)
    assert len(gaps) == 100
    assert max(gaps) <= TOLERANCE


@every_fit
def test_chunks_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    rows = held_out(num_rows=500)
    whole = fit(rule, *rows)
    for numbers in (1, 37, 64 * 5):
        monkeypatch.setattr(reading, "CHUNK_NUMBERS", numbers)
        chunked = fit(rule, *rows)
        assert chunked.weights == pytest.approx(whole.weights, abs=1e-9)
        assert chunked.bias == pytest.approx(whole.bias, abs=1e-9)


def test_a_chunk_is_as_small_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_NUMBERS", 37)
    logits, labels, weights = held_out(num_rows=500)
    chunks = list(reading.Rows(logits.float(), labels, weights).chunks())
    assert {len(chunk) for chunk, _, _ in chunks[:-1]} == {7}
    assert_close(torch.cat([chunk for chunk, _, _ in chunks]), logits.float().double())
    assert torch.cat([shares for _, _, shares in chunks]).sum().item() == pytest.approx(1.0)


@every_fit
def test_a_fit_is_deterministic_and_in_float64(rule: str) -> None:
    logits, labels, weights = held_out()
    narrow = (logits.float(), labels.float(), weights.float())
    assert fit(rule, *narrow) == fit(rule, *narrow)
    assert fit(rule, *narrow) == fit(rule, *(values.double() for values in narrow))


@every_fit
def test_a_weight_counts_as_so_many_rows(rule: str) -> None:
    logits, labels, _ = held_out(num_rows=300)
    times = torch.arange(300) % 4
    weighted = fit(rule, logits, labels, times)
    repeated = fit(rule, logits.repeat_interleave(times, dim=0), labels.repeat_interleave(times))
    assert weighted.weights == pytest.approx(repeated.weights, abs=1e-6)
    assert weighted.bias == pytest.approx(repeated.bias, abs=1e-6)


@every_fit
def test_the_order_of_members_does_not_matter(rule: str) -> None:
    logits, labels, weights = held_out()
    order = [3, 0, 4, 1, 2]
    merge, permuted = fit(rule, logits, labels, weights), fit(rule, logits[:, order], labels, weights)
    assert permuted.weights == pytest.approx([merge.weights[member] for member in order], abs=1e-6)


@every_fit
def test_members_that_are_copies_get_equal_weights(rule: str) -> None:
    logits, labels, _ = held_out(num_members=1)
    merge = fit(rule, logits.expand(-1, 4), labels)
    assert merge.weights == pytest.approx([merge.weights[0]] * 4, abs=1e-9)
    # Copies among others: as one member that counts twice.
    logits, labels, _ = held_out(num_members=3)
    merge = fit(rule, logits[:, [0, 0, 1, 2]], labels)
    assert merge.weights[0] == pytest.approx(merge.weights[1], abs=1e-6)


def test_one_member_has_all_the_weight() -> None:
    logits, labels, _ = held_out(num_members=1)
    assert fit("weighted", logits, labels) == Merge(rule="weighted", weights=(1.0,))


@pytest.mark.parametrize("rule", RULES)
def test_what_needs_no_fit_comes_back_as_it_is(rule: str) -> None:
    assert fit(rule, *held_out()) == Merge(rule=rule)


def test_a_fitted_merge_is_plain_json() -> None:
    merge = fit("stacked", *held_out())
    assert {type(number) for number in (*merge.weights, merge.bias)} == {float}
    assert Merge(**dataclasses.asdict(merge)) == merge


@every_fit
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_that_all_agree_are_refused(rule: str, label: float) -> None:
    logits, labels, weights = held_out()
    with pytest.raises(ValueError, match=f"all labels are {label:.0f}: no fit is possible"):
        fit(rule, logits, torch.full_like(labels, label), weights)
    with pytest.raises(ValueError, match=f"all labels are {label:.0f}: no fit is possible"):
        fit(rule, logits, labels, (labels == label).double())


@every_fit
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_member_with_logits_that_are_not_finite_is_named(rule: str, value: float) -> None:
    logits, labels, weights = held_out()
    logits[-1, 3] = value
    with pytest.raises(ValueError, match="member 3 has logits that are not finite"):
        fit(rule, logits, labels, weights)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown merge rule 'weigthed'; did you mean weighted"):
        fit("weigthed", *held_out())


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    logits, labels, weights = held_out(num_rows=10)
    return {"logits_NM": logits, "labels_N": labels, "weights_N": weights} | {name: value}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            changed("logits_NM", torch.zeros(10)),
            r"logits are \[rows, members\], at least one of each; these are \[10\]",
        ),
        (changed("logits_NM", torch.zeros(0, 5)), r"at least one of each; these are \[0, 5\]"),
        (changed("labels_N", torch.zeros(9)), r"labels are \[9\], not one for each of 10 rows"),
        (changed("weights_N", torch.ones(10, 1)), r"weights are \[10, 1\], not one for each of 10 rows"),
        (changed("labels_N", torch.full((10,), 0.5)), "labels are 0 or 1; some are neither"),
        (changed("weights_N", torch.full((10,), -1.0)), "weights are 0 or more and finite; some are not"),
        (changed("weights_N", torch.full((10,), torch.nan)), "weights are 0 or more and finite; some are not"),
        (changed("weights_N", torch.zeros(10)), "all weights are 0: no row counts"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("weighted", **rows)
