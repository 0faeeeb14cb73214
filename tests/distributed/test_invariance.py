"""Loss depends neither on ranks, nor on the sharding plan, nor on which members train together."""

from pathlib import Path

import numpy as np
import pytest

from recsys.data.loader import LoaderConfig
from tests.distributed.jobs import Outcome, small_config, train_here, train_on_ranks

MEMBERS = ("dcnv2", "wukong", "rankmixer")
LOSS_TOLERANCE = 1e-5
# Adam's first steps are those of the gradients' signs, so the rounding of one gradient near 0 can show in one logit.
LOGIT_TOLERANCE = 1e-3
# Each of these on one and two ranks: sharding type, and optimizer of the tables.
PLANS = {
    "table_wise": "rowwise_adagrad",
    "row_wise": "rowwise_adagrad",
    "data_parallel": "rowwise_adagrad",
    "column_wise": "adagrad",
    "data_parallel, adagrad": "adagrad",
}


def assert_same(one: Outcome, other: Outcome) -> None:
    np.testing.assert_allclose(one.losses_SM, other.losses_SM, atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(one.logits_NM, other.logits_NM, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def one_rank(prepared: Path) -> dict[str, Outcome]:
    """Table-wise on one rank, with either optimizer."""
    optimizers = ["rowwise_adagrad", "adagrad"]
    configs = [small_config(prepared, members=MEMBERS, table_optimizer=optimizer) for optimizer in optimizers]
    return dict(zip(optimizers, train_here(configs), strict=True))


@pytest.fixture(scope="module")
def two_ranks(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every plan on two ranks."""
    configs = [
        small_config(prepared, members=MEMBERS, sharding=plan.partition(",")[0], table_optimizer=optimizer)
        for plan, optimizer in PLANS.items()
    ]
    return dict(zip(PLANS, train_on_ranks(2, configs, tmp_path_factory.mktemp("ranks")), strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_under_every_plan_equal_one_rank(
    plan: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    assert two_ranks[plan].sharding_types == {plan.partition(",")[0]}
    assert_same(two_ranks[plan], one_rank[PLANS[plan]])


def test_features_of_several_ids_train_alike_on_two_ranks(prepared: Path, tmp_path: Path) -> None:
    loader = LoaderConfig(multi_hot="pareto", multi_hot_sizes=tuple(1 + field % 3 for field in range(26)))
    configs = [
        small_config(prepared, members=("dcnv2",), num_steps=5, sharding=sharding, loader=loader)
        for sharding in ("table_wise", "row_wise")
    ]
    for one, two in zip(train_here(configs), train_on_ranks(2, configs, tmp_path), strict=True):
        assert_same(one, two)


def test_the_reference_learns(one_rank: dict[str, Outcome]) -> None:
    losses = one_rank["rowwise_adagrad"].losses_SM
    assert (losses[-5:].mean(axis=0) < losses[:5].mean(axis=0) - 0.02).all()
    assert abs(one_rank["rowwise_adagrad"].logits_NM - one_rank["adagrad"].logits_NM).max() > 1e-3


def test_three_members_in_one_job_equal_three_jobs_of_one(prepared: Path, one_rank: dict[str, Outcome]) -> None:
    alone = train_here([small_config(prepared, members=(member,)) for member in MEMBERS])
    together = one_rank["rowwise_adagrad"]
    for index, outcome in enumerate(alone):
        np.testing.assert_allclose(outcome.losses_SM[:, 0], together.losses_SM[:, index], atol=LOSS_TOLERANCE, rtol=0)
        np.testing.assert_allclose(outcome.logits_NM[:, 0], together.logits_NM[:, index], atol=LOGIT_TOLERANCE, rtol=0)


def test_members_do_not_share_a_random_stream(prepared: Path) -> None:
    dropout = {"embedding_dropout": 0.3, "num_steps": 5}
    alone, together = train_here(
        [
            small_config(prepared, members=("wukong",), **dropout),
            small_config(prepared, members=("dcnv2", "wukong"), **dropout),
        ]
    )
    np.testing.assert_allclose(alone.losses_SM[:, 0], together.losses_SM[:, 1], atol=LOSS_TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore:fbgemm..dense_embedding_codegen_lookup_function")
@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_a_member_with_sizes_and_rates_of_its_own_trains_as_in_a_job_that_has_them(
    prepared: Path, sharding: str
) -> None:
    own = "wukong:dense_lr=0.003,table_lr=0.02,embedding_dim=16,head_hidden=8,init_scale=0.2,seed=5"
    job = {"dense_lr": 0.003, "table_lr": 0.02, "embedding_dim": 16, "head_hidden": (8,), "init_scale": 0.2, "seed": 5}
    together, alone, usual = train_here(
        [
            small_config(prepared, members=("dcnv2", own), sharding=sharding),
            small_config(prepared, members=("wukong",), sharding=sharding, **job),
            small_config(prepared, members=("dcnv2",), sharding=sharding),
        ]
    )
    np.testing.assert_allclose(together.losses_SM[:, 1], alone.losses_SM[:, 0], atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(together.losses_SM[:, 0], usual.losses_SM[:, 0], atol=LOSS_TOLERANCE, rtol=0)
    assert abs(together.losses_SM[-1, 1] - together.losses_SM[-1, 0]) > 1e-3


def test_seeds_of_one_backbone_differ(prepared: Path) -> None:
    (outcome,) = train_here([small_config(prepared, members=("dcnv2*2",), num_steps=5)])
    assert abs(outcome.logits_NM[:, 0] - outcome.logits_NM[:, 1]).max() > 1e-3
