"""Dynamic tables in training: on any number of ranks, through checkpoints, into other sizes."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.data.prepare import PrepareConfig, prepare
from recsys.distributed import World, mean_over_ranks, process_group
from recsys.embeddings.dynamic import DynamicGroup
from recsys.embeddings.dynamic_map import RESERVED_ROWS
from recsys.embeddings.dynamic_rows import FreshRows, parts_of
from recsys.embeddings.fields import Embeddings
from recsys.embeddings.init import fill_uniform
from recsys.studies.config import MergeConfig
from recsys.studies.merge_runs import merge_runs
from recsys.training.checkpoint.saver import save_once
from recsys.training.config import TrainConfig
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.trainer import Trainer
from tests.distributed.jobs import Outcome, on_ranks, small_config, train, train_here, train_on_ranks

MEMBERS = ("dcnv2", "wukong")
LOSS_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 1e-3
ROOMY: dict[str, Any] = {"rows": 20_000}
CRAMPED: dict[str, Any] = {"rows": 96, "eviction_interval": 3, "admission": 1}


@pytest.fixture(scope="module")
def raw(synthetic_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log with raw ids."""
    out = tmp_path_factory.mktemp("prepared") / "raw"
    prepare(PrepareConfig(format="criteo_kaggle", paths=(synthetic_log,), out=out, vocabulary="raw"))
    return out


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


def config(data: Path, **changes: Any) -> TrainConfig:
    return small_config(data, **({"members": MEMBERS, "embeddings": "dynamic", "sharding": "table_wise"} | changes))


def groups(trainer: Trainer) -> list[DynamicGroup]:
    return [module for module in trainer.task.modules() if isinstance(module, DynamicGroup)]


def losses(trainer: Trainer, num_steps: int) -> np.ndarray:
    batches = islice(trainer.loader.stream(trainer.step), num_steps)
    return torch.stack([mean_over_ranks(trainer.train_step(batches).losses_M) for _ in range(num_steps)]).numpy()


def logits(trainer: Trainer) -> np.ndarray:
    found = trainer.predict(trainer.valid_loader)
    return found.logits_NM if found else np.empty(0)


# ---- on any number of ranks

PLANS: dict[str, dict[str, Any]] = {
    "table_wise": ROOMY,
    "row_wise": ROOMY | {"admission": 2},
    "column_wise": ROOMY | {"table_optimizer": "adagrad", "eviction": "lru"},
    "lfu": CRAMPED,
    "lru": CRAMPED | {"eviction": "lru", "sharding": "row_wise"},
}


@pytest.fixture(scope="module")
def on_one_and_two(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Outcome]]:
    configs = [
        config(raw, **({"sharding": name if name.endswith("wise") else "table_wise"} | changes))
        for name, changes in PLANS.items()
    ]
    two = train_on_ranks(2, configs, tmp_path_factory.mktemp("ranks"))
    return dict(zip(PLANS, zip(train_here(configs), two, strict=True), strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_equal_one_with_and_without_evictions(
    plan: str, on_one_and_two: dict[str, tuple[Outcome, Outcome]]
) -> None:
    one, two = on_one_and_two[plan]
    np.testing.assert_allclose(two.losses_SM, one.losses_SM, atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(two.logits_NM, one.logits_NM, atol=LOGIT_TOLERANCE, rtol=0)


def test_dynamic_tables_learn(on_one_and_two: dict[str, tuple[Outcome, Outcome]]) -> None:
    found = on_one_and_two["table_wise"][0].losses_SM
    assert (found[-5:].mean(axis=0) < found[:5].mean(axis=0) - 0.02).all()


def test_a_vocabulary_s_ids_do_as_well(prepared: Path, tmp_path: Path) -> None:
    configs = [config(prepared, num_steps=5)]
    (one,), (two,) = train_here(configs), train_on_ranks(2, configs, tmp_path)
    np.testing.assert_allclose(two.losses_SM, one.losses_SM, atol=LOSS_TOLERANCE, rtol=0)


def test_members_of_other_rules_or_kinds_train_as_they_do_alone(prepared: Path, world: World) -> None:
    own = ("dcnv2", "wukong:rows=96,eviction_interval=2", "rankmixer:embeddings=tables")
    together = train(config(prepared, members=own), world)
    for index, member in enumerate(own):
        alone = train(config(prepared, members=(member,)), world)
        assert together
        assert alone
        np.testing.assert_allclose(alone.losses_SM[:, 0], together.losses_SM[:, index], atol=LOSS_TOLERANCE, rtol=0)


# ---- rows that change hands


def optimizer_state(trainer: Trainer) -> dict[str, Any]:
    """Of the tables, by its name."""
    states = trainer.task.fused_optimizer.state_dict()["state"]
    return {name: value for values in states.values() for name, value in values.items()}


def watch_resets(trainer: Trainer) -> list[int]:
    """After every reset, see that rows are as at first, here; returns a list that grows by how many they were."""
    (group,) = groups(trainer)
    weights = {key.split("embedding_bags.")[-1]: value for key, value in trainer.task.state_dict().items()}
    states = optimizer_state(trainer)
    start = next(part for part in trainer.task.modules() if isinstance(part, Embeddings)).table_start
    reset, seen = group.maps.reset, []
    assert isinstance(reset, FreshRows)

    def watched(feature: str, rows: np.ndarray) -> None:
        assert (rows >= RESERVED_ROWS).all()
        reset(feature, rows)
        for owner in group.owners:
            table = f"{owner}/{feature}"
            for part in parts_of(weights[f"{table}.weight"]):
                fresh = torch.empty(group.maps.num_rows[feature], part.num_columns)
                fill_uniform(fresh, *start(table), first=(0, 0), num_columns=part.num_columns)
                fresh = fresh[part.first[0] :][: len(part.values)]
                here = rows[(rows >= part.first[0]) & (rows < part.first[0] + len(part.values))] - part.first[0]
                assert torch.equal(part.values[here], fresh[here])
                others = np.setdiff1d(np.arange(len(part.values)), here)
                assert not torch.equal(part.values[others], fresh[others]), "and no others"
                seen.append(len(here))
            state = states.get(f"{table}.momentum1")
            for part in parts_of(state) if state is not None else []:
                here = rows[(rows >= part.first[0]) & (rows < part.first[0] + len(part.values))] - part.first[0]
                assert not part.values[here].any()
                assert part.values.any()

    group.maps.reset = watched
    return seen


def _watch(world: World, configs: list[TrainConfig]) -> None:
    for each in configs:
        trainer = Trainer(each, world)
        seen = watch_resets(trainer)
        losses(trainer, 10)
        assert sum(seen) > 50


def test_rows_that_change_hands_are_as_at_first(raw: Path, world: World) -> None:
    _watch(world, [config(raw, **CRAMPED), config(raw, table_optimizer="adagrad", **CRAMPED)])


def test_rows_that_change_hands_are_as_at_first_on_every_rank(raw: Path) -> None:
    on_ranks(2, _watch, [config(raw, **CRAMPED), config(raw, sharding="row_wise", **CRAMPED)])


def test_evaluation_leaves_the_map_as_it_is(raw: Path, world: World) -> None:
    trainer = Trainer(config(raw, **CRAMPED), world)
    losses(trainer, 4)
    before = {name: own.entries.clone() for name, own in groups(trainer)[0].maps.by_feature.items()}
    one, other = logits(trainer), logits(trainer)
    np.testing.assert_array_equal(one, other)
    maps = groups(trainer)[0].maps
    assert maps.step == 4
    assert all(torch.equal(own.entries, before[name]) for name, own in maps.by_feature.items())


# ---- checkpoints


def _save(world: World, each: TrainConfig, folder: Path, out: Path) -> None:
    trainer = Trainer(each, world)
    losses(trainer, 10)
    if world.is_first:
        (folder / "config.json").write_text("{}")
    save_once(folder, world, trainer.step, trainer.state(), [folder / "config.json"])
    found = logits(trainer), losses(trainer, 10), logits(trainer)
    if world.is_first:
        torch.save(found, out)


def _load(world: World, each: TrainConfig, folder: Path, out: Path) -> None:
    trainer = Trainer(each, world)
    trainer.load(folder / "step-00000010")
    found = logits(trainer), losses(trainer, 10), logits(trainer)
    if world.is_first:
        torch.save(found, out)


@pytest.fixture(scope="module")
def saved(raw: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one and of two ranks at step 10 of 20, and what followed."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("one", "two"):
        (folder / name).mkdir()
    _save(world, config(raw, **CRAMPED), folder / "one", folder / "one.pt")
    on_ranks(2, _save, config(raw, **CRAMPED), folder / "two", folder / "two.pt")
    return folder


def outcome(path: Path) -> list[np.ndarray]:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("source", ["one", "two"])
def test_a_run_goes_on_where_it_was_saved_bit_for_bit(raw: Path, world: World, saved: Path, source: str) -> None:
    _load(world, config(raw, **CRAMPED), saved / source, saved / "loaded.pt")
    for found, expected in zip(outcome(saved / "loaded.pt"), outcome(saved / f"{source}.pt"), strict=True):
        np.testing.assert_allclose(found, expected, atol=0 if source == "one" else 1e-5, rtol=0)


def test_one_rank_s_checkpoint_goes_on_on_two(raw: Path, saved: Path) -> None:
    on_ranks(2, _load, config(raw, sharding="row_wise", **CRAMPED), saved / "one", saved / "loaded.pt")
    for found, expected in zip(outcome(saved / "loaded.pt"), outcome(saved / "one.pt"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_more_rows_keep_every_id_s_vector(raw: Path, world: World, saved: Path) -> None:
    expected, losses_after, _ = outcome(saved / "one.pt")
    for rows in (98, 5000):
        _load(world, config(raw, **(CRAMPED | {"rows": rows})), saved / "one", saved / "loaded.pt")
        found, after, _ = outcome(saved / "loaded.pt")
        np.testing.assert_array_equal(found, expected)
        assert abs(after - losses_after).max() > 1e-5


def test_more_rows_on_two_ranks_are_those_on_one(raw: Path, world: World, saved: Path) -> None:
    larger = CRAMPED | {"rows": 190}
    _load(world, config(raw, **larger), saved / "one", saved / "loaded.pt")
    on_ranks(2, _load, config(raw, sharding="row_wise", **larger), saved / "two", saved / "on_two.pt")
    for found, expected in zip(outcome(saved / "on_two.pt"), outcome(saved / "loaded.pt"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_fewer_rows_keep_the_vectors_of_the_most_used(raw: Path, world: World, saved: Path) -> None:
    large, small = Trainer(config(raw, **CRAMPED), world), Trainer(config(raw, **(CRAMPED | {"rows": 48})), world)
    for trainer in (large, small):
        trainer.load(saved / "one" / "step-00000010")
    tables = [
        {key.split("embedding_bags.")[-1]: value for key, value in trainer.task.state_dict().items()}
        for trainer in (large, small)
    ]
    states = [optimizer_state(trainer) for trainer in (large, small)]
    num_kept = 0
    for feature, own in groups(large)[0].maps.by_feature.items():
        other = groups(small)[0].maps.by_feature[feature]
        ids = own.entries[..., 0].unique().numpy()
        old, new = (np.empty(len(ids), dtype=np.int32) for _ in range(2))
        own.find(ids, old)
        other.find(ids, new)
        kept = new >= RESERVED_ROWS
        num_kept += int(kept.sum())
        before, after = (part[f"wukong/{feature}.weight"].local_shards()[0].tensor for part in tables)
        assert torch.equal(after[new[kept]], before[old[kept]])
        assert torch.equal(after[:RESERVED_ROWS], before[:RESERVED_ROWS])
        before, after = (part[f"wukong/{feature}.momentum1"].local_shards()[0].tensor for part in states)
        assert torch.equal(after[new[kept]], before[old[kept]])
        assert after[new[kept]].any()
    assert num_kept > 26 * 30


def test_a_run_of_other_rows_is_resumed_and_predicts(raw: Path, world: World, tmp_path: Path) -> None:
    whole = config(raw, out=tmp_path / "run", log_every=1, num_steps=6, **CRAMPED)
    Trainer(whole, world).train()
    before = evaluate(EvaluateConfig(run=whole.out, split="valid"), world)
    more = dataclasses.replace(
        whole,
        resume="auto",
        model=dataclasses.replace(whole.model, rows=190),
        train=dataclasses.replace(whole.train, num_steps=8),
    )
    Trainer(more, world).train()
    after = evaluate(EvaluateConfig(run=whole.out, split="valid"), world)
    assert before
    assert after
    assert abs(before.metrics["merged"].auc - after.metrics["merged"].auc) < 0.1
    with pytest.raises(InputError, match="cannot go on with model"):
        Trainer(dataclasses.replace(more, model=dataclasses.replace(more.model, admission=2)), world).train()


# ---- what is refused


def test_raw_ids_need_dynamic_tables(raw: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"ids of feature C1 are raw.*'tables' of dcnv2.*--embeddings dynamic"):
        Trainer(config(raw, embeddings="tables"), world)
    with pytest.raises(InputError, match="'tables' of wukong"):
        Trainer(config(raw, members=("dcnv2", "wukong:embeddings=tables")), world)


def test_data_parallel_is_refused(raw: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"table dcnv2/C1 of dynamic ids is data_parallel.*another sharding type"):
        Trainer(config(raw, sharding="data_parallel", **CRAMPED), world)


def _refused_buckets(world: World, each: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"9 buckets cannot be shared by 2 ranks equally.*--model.map-buckets 10"):
        Trainer(each, world)


def test_buckets_that_ranks_cannot_share_are_refused(raw: Path) -> None:
    on_ranks(2, _refused_buckets, config(raw, map_buckets=9))


def test_runs_with_maps_of_their_own_are_not_merged(raw: Path, world: World, tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / f"run{seed}")
        Trainer(config(raw, out=runs[-1], members=("dcnv2",), seed=seed, num_steps=1), world).train()
    with pytest.raises(InputError, match=r"run0: its members have dynamic embeddings.*merge files of predictions"):
        merge_runs(MergeConfig(sources=tuple(runs), out=tmp_path / "merged"), world)
