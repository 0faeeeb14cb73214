"""What every merge rule owes, and what mean_probability computes."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from recsys.merge.rules import RULES, mean_logit, mean_probability

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def random_logits(num_members: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(200, num_members, generator=torch.Generator().manual_seed(seed))


@every_rule
def test_one_member_is_its_own_merge(rule) -> None:
    logits_BM = random_logits(1)
    assert_close(rule(logits_BM), logits_BM[:, 0], rtol=1e-6, atol=1e-6)


@every_rule
def test_members_that_agree_are_left_alone(rule) -> None:
    logits_BM = random_logits(1).expand(-1, 5)
    assert_close(rule(logits_BM), logits_BM[:, 0], rtol=1e-6, atol=1e-6)


@every_rule
def test_the_order_of_members_does_not_matter(rule) -> None:
    logits_BM = random_logits(4)
    for order in itertools.permutations(range(4)):
        assert_close(rule(logits_BM[:, order]), rule(logits_BM), rtol=1e-5, atol=1e-5)


@every_rule
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_merge_is_at_least_as_good_as_members_are_on_average(rule, scale: float) -> None:
    for seed in range(20):
        logits_BM = random_logits(3, scale, seed)
        labels_B = torch.randint(2, (200,), generator=torch.Generator().manual_seed(seed)).float()
        losses = [binary_cross_entropy_with_logits(logits_B, labels_B) for logits_B in logits_BM.T]
        merged = binary_cross_entropy_with_logits(rule(logits_BM), labels_B)
        assert merged < torch.stack(losses).mean()


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
