"""What every merge rule owes, what each computes, and what is left of a merge when some members do not answer."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from recsys import config
from recsys.merge.rules import FITTED, NAMES, RULES, Merge, confidence, mean_logit, mean_probability

every_rule = pytest.mark.parametrize("rule", NAMES)
quick = settings(deadline=None, derandomize=True, max_examples=60)


def random_logits(num_members: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(200, num_members, generator=torch.Generator().manual_seed(seed))


def merge_of(rule: str, num_members: int, bias: float = 0.0) -> Merge:
    """A merge with uneven weights, where it has any, that sum to 1."""
    if rule in RULES:
        return Merge(rule=rule)
    total = num_members * (num_members + 1) / 2
    weights = tuple((member + 1) / total for member in range(num_members))
    return Merge(rule=rule, weights=weights, bias=bias if rule == "stacked" else 0.0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits [B, M] and labels [B] in float64."""
    num_rows, num_members = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    logits = st.lists(st.floats(-60, 60), min_size=num_members, max_size=num_members)
    rows = draw(st.lists(st.tuples(logits, st.booleans()), min_size=num_rows, max_size=num_rows))
    logits_BM = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    return logits_BM, torch.tensor([label for _, label in rows], dtype=torch.float64)


def logloss(logits_B: Tensor, labels_B: Tensor) -> float:
    return torch.logaddexp(torch.zeros_like(logits_B), (1 - 2 * labels_B) * logits_B).mean().item()


def test_the_contract_covers_every_rule() -> None:
    assert NAMES == ("mean_logit", "mean_probability", "confidence", "weighted", "stacked")
    assert (*RULES, *FITTED) == NAMES


@every_rule
def test_one_member_is_its_own_merge(rule: str) -> None:
    logits_BM = random_logits(1)
    assert_close(merge_of(rule, 1)(logits_BM), logits_BM[:, 0], rtol=1e-6, atol=1e-6)


@every_rule
def test_members_that_agree_are_left_alone(rule: str) -> None:
    logits_BM = random_logits(1).expand(-1, 5)
    assert_close(merge_of(rule, 5)(logits_BM), logits_BM[:, 0], rtol=1e-6, atol=1e-6)


@every_rule
def test_the_order_of_members_does_not_matter(rule: str) -> None:
    logits_BM = random_logits(4)
    merge = merge_of(rule, 4, bias=0.3)
    for order in itertools.permutations(range(4)):
        permuted = dataclasses.replace(
            merge, weights=tuple(merge.weights[member] for member in order if rule in FITTED)
        )
        assert_close(permuted(logits_BM[:, order]), merge(logits_BM), rtol=1e-5, atol=1e-5)


@every_rule
def test_rows_are_merged_alone(rule: str) -> None:
    logits_BM = random_logits(3)
    merge = merge_of(rule, 3, bias=0.3)
    assert merge(logits_BM).shape == (200,)
    assert_close(merge(logits_BM[17:18]), merge(logits_BM)[17:18])


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite_and_between_the_members(rule: str, dtype: torch.dtype) -> None:
    values = [0.0, 1e-30, -1e-8, 1e-4, -5.0, 30.0, -100.0, 1e4, -1e30]
    logits_BM = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype, requires_grad=True)
    merged_B = merge_of(rule, 3)(logits_BM)
    assert merged_B.isfinite().all()
    assert merged_B.dtype == dtype
    slack_B = 1e-6 * (1.0 + logits_BM.abs().amax(dim=1))
    assert (merged_B >= logits_BM.amin(dim=1) - slack_B).all()
    assert (merged_B <= logits_BM.amax(dim=1) + slack_B).all()
    merged_B.sum().backward()
    assert logits_BM.grad is not None
    assert logits_BM.grad.isfinite().all()


@every_rule
def test_every_member_gets_its_gradient(rule: str) -> None:
    logits_BM = random_logits(3)[:20].double().requires_grad_()
    merge = merge_of(rule, 3, bias=0.3)
    assert torch.autograd.gradcheck(merge, logits_BM)
    merge(logits_BM).sum().backward()
    assert logits_BM.grad is not None
    assert (logits_BM.grad != 0).all()


@pytest.mark.parametrize("rule", ["mean_logit", "mean_probability"])
@quick
@given(batches())
def test_the_merge_is_at_least_as_good_as_members_are_on_average(rule: str, batch: tuple[Tensor, Tensor]) -> None:
    logits_BM, labels_B = batch
    losses = [logloss(logits_B, labels_B) for logits_B in logits_BM.T]
    assert logloss(RULES[rule](logits_BM), labels_B) <= sum(losses) / len(losses) + 1e-12


@quick
@given(batches(), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_weighted_is_at_least_as_good_as_the_weighted_mean_of_members(
    batch: tuple[Tensor, Tensor], numbers: list[float]
) -> None:
    logits_BM, labels_B = batch
    numbers = [number + 1e-3 for number in numbers[: logits_BM.shape[1]]]
    merge = Merge(rule="weighted", weights=tuple(number / sum(numbers) for number in numbers))
    mean = sum(
        weight * logloss(logits_B, labels_B) for weight, logits_B in zip(merge.weights, logits_BM.T, strict=True)
    )
    assert logloss(merge(logits_BM), labels_B) <= mean + 1e-12


def test_mean_logit_is_the_mean_logit() -> None:
    assert_close(mean_logit(torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 1.0]])), torch.tensor([3.0, 0.0]))


@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_mean_probability_is_the_logit_of_the_mean_probability(scale: float) -> None:
    logits_BM = random_logits(3, scale)
    expected_B = torch.logit(torch.sigmoid(logits_BM.double()).mean(dim=1))
    # In float64 the plain formula is itself inexact where the mean nears 1.
    near = expected_B < 15
    assert near.sum() > 150
    assert_close(mean_probability(logits_BM)[near], expected_B[near].float(), rtol=1e-5, atol=1e-5)


def test_mean_probability_keeps_extreme_logits() -> None:
    logits_BM = torch.tensor([[100.0, 100.0], [-100.0, -100.0], [100.0, -100.0], [-100.0, -50.0]])
    # The last: half of p = e^-50, for e^-100 is nothing beside it.
    expected_B = torch.tensor([100.0, -100.0, 0.0, -50.0 - 0.693147])
    assert_close(mean_probability(logits_BM), expected_B)


@pytest.mark.parametrize("scale", [0.3, 3.0, 10.0])
def test_confidence_weighs_by_how_far_a_probability_is_from_a_half(scale: float) -> None:
    logits_BM = random_logits(3, scale).double()
    for logits, merged in zip(logits_BM.tolist(), confidence(logits_BM).tolist(), strict=True):
        weights = []
        for logit in logits:
            p, q = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
            weights.append(1 + (p * math.log(p) + q * math.log(q)) / math.log(2))
        expected = sum(weight * logit for weight, logit in zip(weights, logits, strict=True)) / sum(weights)
        assert merged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-5])
def test_confidence_near_a_half_grows_with_the_square_of_the_logit(scale: float) -> None:
    logits_BM = random_logits(3).clamp(-4, 4) * scale
    expected_B = logits_BM.pow(3).sum(dim=1) / logits_BM.square().sum(dim=1)
    assert_close(confidence(logits_BM), expected_B, rtol=2e-3, atol=1e-4 * scale)


def test_confidence_is_the_mean_where_no_member_has_any() -> None:
    logits_BM = torch.tensor([[0.0, 0.0], [1e-12, 3e-12], [0.0, 2.0]])
    assert_close(confidence(logits_BM), torch.tensor([0.0, 2e-12, 2.0]), rtol=1e-6, atol=0.0)


def test_a_sure_member_outweighs_one_that_knows_nothing() -> None:
    assert_close(confidence(torch.tensor([[8.0, 0.01, -0.01]])), torch.tensor([8.0]), rtol=1e-4, atol=0.0)


def test_weighted_and_stacked_are_linear() -> None:
    logits_BM = torch.tensor([[1.0, 2.0], [-3.0, 5.0]])
    assert_close(Merge(rule="weighted", weights=(0.25, 0.75))(logits_BM), torch.tensor([1.75, 3.0]))
    assert_close(Merge(rule="stacked", weights=(2.0, -0.5), bias=1.0)(logits_BM), torch.tensor([2.0, -7.5]))


@every_rule
def test_a_merge_is_written_as_json_and_read_back(rule: str) -> None:
    merge = merge_of(rule, 3, bias=0.1)
    text = json.dumps(dataclasses.asdict(merge))
    assert Merge(**json.loads(text)) == merge
    assert config.load(Merge, json.loads(json.dumps(config.dump(merge)))) == merge
    hash(Merge(**json.loads(text)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "mean_logits"}, "unknown merge rule 'mean_logits'; did you mean mean_logit?"),
        ({"rule": "stack"}, "unknown merge rule 'stack'; did you mean stacked?"),
        ({"rule": "xyz"}, "unknown merge rule 'xyz'; known are mean_logit, mean_probability, confidence, weighted"),
        ({"rule": "weighted"}, "merge rule 'weighted' is fitted on validation rows, see fit"),
        ({"rule": "stacked"}, "merge rule 'stacked' is fitted on validation rows, see fit"),
        ({"rule": "weighted", "weights": (0.5, 1.0, -0.5)}, "weight of member 2 is negative (-0.5); use stacked"),
        ({"rule": "weighted", "weights": (0.5, 0.6)}, "weights of merge rule 'weighted' sum to 1.1 instead of 1"),
        ({"rule": "weighted", "weights": (math.nan, 1.0)}, "merge rule 'weighted' has a weight or bias that is not"),
        ({"rule": "stacked", "weights": (1.0,), "bias": math.inf}, "merge rule 'stacked' has a weight or bias that"),
        (
            {"rule": "mean_logit", "weights": (1.0,)},
            "merge rule 'mean_logit' takes no weights; weighted and stacked do",
        ),
        ({"rule": "weighted", "weights": (1.0,), "bias": 0.1}, "merge rule 'weighted' takes no bias; stacked does"),
    ],
)
def test_a_merge_says_what_is_wrong_with_it(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"weight|rule|bias") as error:
        Merge(**values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", FITTED)
def test_weights_are_one_a_member(rule: str) -> None:
    with pytest.raises(ValueError, match=rf"merge rule '{rule}' has 3 weights, the logits 2 members"):
        merge_of(rule, 3)(random_logits(2))


@every_rule
def test_a_subset_of_all_members_is_the_merge(rule: str) -> None:
    merge = merge_of(rule, 3, bias=0.1)
    logits_BM = random_logits(3)
    assert merge.subset(range(3)) == merge
    assert_close(merge.subset([2, 0, 1])(logits_BM[:, [2, 0, 1]]), merge(logits_BM))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_weights_merges_whoever_answers(rule: str) -> None:
    assert Merge(rule=rule).subset([4, 1]) == Merge(rule=rule)


def test_weighted_renormalises_the_weights_of_who_answers() -> None:
    merge = Merge(rule="weighted", weights=(0.5, 0.0, 0.125, 0.375))
    assert merge.subset([3, 2]) == Merge(rule="weighted", weights=(0.75, 0.25))
    assert merge.subset([1, 0]) == Merge(rule="weighted", weights=(0.0, 1.0))
    assert merge.subset([1]) == Merge(rule="mean_logit")


def test_stacked_without_a_member_is_the_mean() -> None:
    merge = Merge(rule="stacked", weights=(0.7, 0.6, -0.2), bias=0.1)
    assert merge.subset([0, 2]) == Merge(rule="mean_logit")


@every_rule
def test_no_answer_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="no member answers"):
        merge_of(rule, 3).subset([])
    with pytest.raises(ValueError, match=r"a member answers twice: \[1, 1\]"):
        merge_of(rule, 3).subset([1, 1])


@pytest.mark.parametrize("rule", FITTED)
@pytest.mark.parametrize("member", [-1, 3])
def test_an_unknown_member_is_refused(rule: str, member: int) -> None:
    with pytest.raises(ValueError, match=f"member {member} has no weight: members are 0 to 2"):
        merge_of(rule, 3).subset([0, member])
