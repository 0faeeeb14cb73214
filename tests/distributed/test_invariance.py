"""Loss depends neither on ranks, nor on the sharding plan, nor on which members train together."""

from pathlib import Path

import numpy as np
import pytest

from recsys.data.loader import LoaderConfig
from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.schema import Schema
from recsys.sharding.plan import TYPES
from recsys.sharding.tiling import COLUMN_TYPES
from recsys.training.config import TrainConfig
from tests.distributed.jobs import Outcome, small_config, train_here, train_on_ranks
from tests.sharding.plans import hand_plan

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
# And types in turn, by constraints.
MIXED = ("dcnv2/*=row_wise", "dcnv2/C?=table_wise", "wukong/*=column_wise", "rankmixer/C1*=data_parallel+row_wise")


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
    configs.append(small_config(prepared, members=MEMBERS, constraints=MIXED, table_optimizer="adagrad"))
    return dict(zip([*PLANS, "mixed"], train_on_ranks(2, configs, tmp_path_factory.mktemp("ranks")), strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_under_every_plan_equal_one_rank(
    plan: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    assert two_ranks[plan].sharding_types == {plan.partition(",")[0]}
    assert_same(two_ranks[plan], one_rank[PLANS[plan]])


def test_types_mixed_by_constraints_on_two_ranks_equal_one_rank(
    one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    assert two_ranks["mixed"].sharding_types >= {"table_wise", "row_wise", "column_wise"}
    assert_same(two_ranks["mixed"], one_rank["adagrad"])


# By hand on two nodes of two ranks: each type for all tables, and all types in turn; columns are cut into 4 and 12,
# into halves and not at all, and neighbouring tables lie on other ranks.
BY_HAND = {**{kind: (kind,) for kind in TYPES}, "all types": TYPES}
ROW_WISE = ("row_wise", "table_row_wise", "grid_shard")


def pinned(data: Path, kinds: tuple[str, ...], nodes: int, ranks_per_node: int, folder: Path) -> TrainConfig:
    """One member under a plan from a file."""
    shapes = {f"dcnv2/{feature}": (rows, 16) for feature, rows in Schema.load(data).sparse.items()}
    path = folder / f"{'-'.join(kinds)}-{nodes}x{ranks_per_node}-{data.name}.json"
    hand_plan(shapes, kinds, nodes, ranks_per_node).save(path)
    whole = not COLUMN_TYPES & set(kinds)
    return small_config(
        data,
        members=("dcnv2",),
        embedding_dim=16,
        plan=path,
        types=(),
        table_optimizer="rowwise_adagrad" if whole else "adagrad",
    )


@pytest.fixture(scope="module")
def few_ids(synthetic_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log again, with tables of one, two and three rows."""
    out = tmp_path_factory.mktemp("few") / "few"
    prepare(PrepareConfig(format="criteo_kaggle", paths=(synthetic_log,), out=out, threshold=1500))
    assert set(Schema.load(out).sparse.values()) == {1, 2, 3}
    return out


@pytest.fixture(scope="module")
def pinned_on_one_rank(
    prepared: Path, few_ids: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Outcome]:
    """By data and optimizer: whole tables, and all types in turn, though one rank has all parts."""
    folder = tmp_path_factory.mktemp("pinned")
    kinds = {"rowwise_adagrad": ("table_wise",), "adagrad": tuple(kind for kind in TYPES if kind != "data_parallel")}
    configs = {
        (data.name, optimizer): pinned(data, kind, 1, 1, folder)
        for data in (prepared, few_ids)
        for optimizer, kind in kinds.items()
    }
    return dict(zip(configs, train_here(list(configs.values())), strict=True))


@pytest.fixture(scope="module")
def pinned_on_four_ranks(
    prepared: Path, few_ids: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Outcome]:
    """By data and types: on two nodes of two ranks."""
    folder = tmp_path_factory.mktemp("four")
    configs = {(prepared.name, name): pinned(prepared, kinds, 2, 2, folder) for name, kinds in BY_HAND.items()}
    # The last ranks have rows of few tables, or of none.
    configs |= {(few_ids.name, name): pinned(few_ids, BY_HAND[name], 2, 2, folder) for name in (*ROW_WISE, "all types")}
    outcomes = train_on_ranks(4, list(configs.values()), folder, ranks_per_node=2)
    return dict(zip(configs, outcomes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_any_plan_from_a_file_on_two_nodes_equals_one_rank(
    name: str,
    prepared: Path,
    pinned_on_one_rank: dict[tuple[str, str], Outcome],
    pinned_on_four_ranks: dict[tuple[str, str], Outcome],
) -> None:
    found = pinned_on_four_ranks[prepared.name, name]
    assert found.sharding_types == set(BY_HAND[name])
    optimizer = "adagrad" if COLUMN_TYPES & set(BY_HAND[name]) else "rowwise_adagrad"
    assert_same(found, pinned_on_one_rank[prepared.name, optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROW_WISE, "all types"])
def test_tables_of_fewer_rows_than_ranks_train_alike(
    name: str,
    few_ids: Path,
    pinned_on_one_rank: dict[tuple[str, str], Outcome],
    pinned_on_four_ranks: dict[tuple[str, str], Outcome],
) -> None:
    optimizer = "adagrad" if COLUMN_TYPES & set(BY_HAND[name]) else "rowwise_adagrad"
    assert_same(pinned_on_four_ranks[few_ids.name, name], pinned_on_one_rank[few_ids.name, optimizer])


def test_the_pinned_references_learn_apart(
    prepared: Path, few_ids: Path, pinned_on_one_rank: dict[tuple[str, str], Outcome]
) -> None:
    for data in (prepared, few_ids):
        one, other = (pinned_on_one_rank[data.name, kind] for kind in ("rowwise_adagrad", "adagrad"))
        assert abs(one.logits_NM - other.logits_NM).max() > 1e-4


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
