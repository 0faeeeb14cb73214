"""Compressed embeddings train alike on one and two ranks, go on, merge and answer like whole tables."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import load_file
from recsys.data.loader import LoaderConfig
from recsys.distributed import World, process_group
from recsys.embeddings.robe import RobeArray
from recsys.studies.merge_runs import MergeConfig, merge_runs
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig
from recsys.training.optim import Optimizer
from recsys.training.predict import Predictor
from recsys.training.sharded import shard
from recsys.training.trainer import Trainer
from tests.distributed.jobs import Outcome, on_ranks, small_config, train_here, train_on_ranks

KINDS: dict[str, dict[str, Any]] = {
    "robe": {"embeddings": "robe", "compression": 10, "block_size": 8, "sign": True},
    "qr": {"embeddings": "qr", "compression": 3},
    "mixed": {"embeddings": "mixed", "compression": 1.5},
}
# What each of these does to the job: all members of one kind, one that trains tables beside others, and many ids.
JOBS: dict[str, dict[str, Any]] = {
    **{kind: {"members": ("dcnv2", "wukong"), **changes} for kind, changes in KINDS.items()},
    "all kinds": {
        "members": (
            "dcnv2",
            "wukong:embeddings=robe,compression=5,table_lr=0.05,embedding_dim=16",
            "rankmixer:embeddings=qr,compression=2",
            "dcnv2:name=small,seed=3,embeddings=mixed,compression=1.5,dense_lr=0.005",
        )
    },
    "shared robe": {"members": ("dcnv2", "wukong"), "tables": "shared", **KINDS["robe"]},
    "several ids": {
        "members": ("dcnv2:embeddings=robe,compression=4", "wukong:embeddings=qr,combine=add,compression=2"),
        "loader": LoaderConfig(multi_hot="pareto", multi_hot_sizes=tuple(1 + field % 3 for field in range(26))),
    },
}
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-3


def config_of(job: str, data: Path, **more: Any) -> TrainConfig:
    changes = {**JOBS[job], **more}
    tables = changes.pop("tables", "private")
    config = small_config(data, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, tables=tables))


def assert_same(one: Outcome, other: Outcome) -> None:
    np.testing.assert_allclose(one.losses_SM, other.losses_SM, atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(one.logits_NM, other.logits_NM, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def one_rank(prepared: Path) -> dict[str, Outcome]:
    return dict(zip(JOBS, train_here([config_of(job, prepared) for job in JOBS]), strict=True))


@pytest.fixture(scope="module")
def two_ranks(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    configs = [config_of(job, prepared) for job in JOBS]
    return dict(zip(JOBS, train_on_ranks(2, configs, tmp_path_factory.mktemp("ranks")), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_equal_one(job: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]) -> None:
    assert_same(two_ranks[job], one_rank[job])


@pytest.mark.parametrize("job", JOBS)
def test_every_kind_learns(job: str, one_rank: dict[str, Outcome]) -> None:
    losses = one_rank[job].losses_SM
    assert (losses[-5:].mean(axis=0) < losses[:5].mean(axis=0) - 0.01).all()


def test_a_member_trains_beside_others_as_in_a_job_of_its_own(prepared: Path, one_rank: dict[str, Outcome]) -> None:
    alone = train_here([config_of("all kinds", prepared, members=(text,)) for text in JOBS["all kinds"]["members"]])
    for index, outcome in enumerate(alone):
        together = one_rank["all kinds"]
        np.testing.assert_allclose(outcome.losses_SM[:, 0], together.losses_SM[:, index], atol=LOSS_TOLERANCE, rtol=0)


def test_bf16_members_leave_the_array_fp32(prepared: Path, one_rank: dict[str, Outcome]) -> None:
    (outcome,) = train_here([config_of("robe", prepared, precision="bf16")])
    np.testing.assert_allclose(outcome.losses_SM, one_rank["robe"].losses_SM, atol=0.02, rtol=0)
    assert (outcome.losses_SM != one_rank["robe"].losses_SM).any()


# Learning rates and optimizers


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


def optimizer_of(config: TrainConfig, world: World) -> tuple[Optimizer, dict[str, RobeArray]]:
    trainer = Trainer(config, world)
    arrays = {name: module for name, module in trainer.task.named_modules() if isinstance(module, RobeArray)}
    return trainer.optimizer, arrays


def test_arrays_have_the_tables_adagrad_and_layers_the_dense_optimizer(prepared: Path, world: World) -> None:
    optimizer, arrays = optimizer_of(config_of("all kinds", prepared, weight_decay=0.1), world)
    parts = dict(optimizer.combined.optimizers)
    (array_name,) = parts["arrays"].params
    assert array_name.endswith(".by_owner.wukong.array")
    assert [group["lr"] for group in parts["arrays"].param_groups] == [0.05]
    assert [group["weight_decay"] for group in parts["arrays"].param_groups] == [0]
    layers = [name for name in parts["dense"].params if ".by_owner.small.weights." in name]
    assert layers
    small = {id(parameter) for name, parameter in parts["dense"].params.items() if ".small." in name}
    groups = {id(p): index for index, group in enumerate(parts["dense"].param_groups) for p in group["params"]}
    assert len({groups[parameter] for parameter in small}) == 1, "its own dense_lr is theirs too"
    assert optimizer._base_lrs[groups[min(small)] + len(parts["tables"].param_groups)] == 0.005
    (array,) = arrays.values()
    assert array.update is not None, "one rank on a CPU"


def test_the_schedule_holds_for_arrays(prepared: Path, world: World) -> None:
    trainer = Trainer(config_of("robe", prepared, warmup_steps=4, table_lr=0.0), world)
    array = next(module for module in trainer.task.modules() if isinstance(module, RobeArray))
    before = array.array.detach().clone()
    batches = trainer.loader.stream()
    trainer.train_step(batches)
    assert torch.equal(array.array, before)
    trainer.optimizer._base_lrs = [0.1 for _ in trainer.optimizer._base_lrs]
    trainer.train_step(batches)
    assert not torch.equal(array.array, before)


# Runs


def losses(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("job", ["robe", "all kinds"])
def test_resumed_equals_uninterrupted(job: str, prepared: Path, world: World, tmp_path: Path) -> None:
    config = config_of(job, prepared, log_every=1, num_steps=10, embedding_dropout=0.1)
    whole, half = (dataclasses.replace(config, out=tmp_path / name) for name in ("whole", "half"))
    Trainer(whole, world).train()
    Trainer(dataclasses.replace(half, train=dataclasses.replace(half.train, num_steps=6)), world).train()
    Trainer(dataclasses.replace(half, resume="auto"), world).train()
    resumed, uninterrupted = losses(half.out), losses(whole.out)
    assert len(resumed) == len(uninterrupted) >= 10
    for one, other in zip(resumed[-4:], uninterrupted[-4:], strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_a_run_of_one_rank_goes_on_on_two(prepared: Path, world: World, tmp_path: Path) -> None:
    config = config_of("robe", prepared, log_every=1, num_steps=10)
    one, two = (dataclasses.replace(config, out=tmp_path / name) for name in ("one", "two"))
    first = dataclasses.replace(config.train, num_steps=5)
    Trainer(one, world).train()
    Trainer(dataclasses.replace(two, train=first), world).train()
    on_ranks(2, _train, dataclasses.replace(two, resume="auto"))
    for mine, other in zip(losses(two.out)[-5:], losses(one.out)[-5:], strict=True):
        assert mine == pytest.approx(other, abs=LOSS_TOLERANCE)


def _train(world: World, config: TrainConfig) -> None:
    Trainer(config, world).train()


def logits(run: Path, world: World, *members: str) -> np.ndarray:
    predictions = Predictor(run, world, members).predict("valid") if members else Predictor(run, world).predict("valid")
    assert predictions is not None
    return predictions.logits_NM


def test_runs_of_all_kinds_merge_and_go_on(prepared: Path, world: World, tmp_path: Path) -> None:
    texts = JOBS["all kinds"]["members"]
    for name, text in zip("abcd", texts, strict=True):
        Trainer(config_of("all kinds", prepared, members=(text,), out=tmp_path / name, num_steps=5), world).train()
    merge_runs(MergeConfig(sources=tuple(tmp_path / name for name in "abcd"), out=tmp_path / "merged"), world)
    expected = np.concatenate([logits(tmp_path / name, world) for name in "abcd"], axis=1)
    np.testing.assert_allclose(logits(tmp_path / "merged", world), expected, atol=1e-6)
    np.testing.assert_allclose(logits(tmp_path / "merged", world, "wukong"), expected[:, 1:2], atol=1e-6)
    np.testing.assert_allclose(logits(tmp_path / "merged", world, "small", "dcnv2"), expected[:, [3, 0]], atol=1e-6)
    together = config_of("all kinds", prepared, out=tmp_path / "together", num_steps=10, log_every=1)
    Trainer(together, world).train()
    config = load_file(TrainConfig, tmp_path / "merged" / "config.json")
    loop = dataclasses.replace(config.train, num_steps=10, log_every=1)
    Trainer(dataclasses.replace(config, out=tmp_path / "merged", resume="auto", train=loop), world).train()
    for mine, other in zip(losses(tmp_path / "merged")[-5:], losses(tmp_path / "together")[-5:], strict=True):
        assert mine == pytest.approx(other, abs=LOSS_TOLERANCE)


def test_an_array_moves_to_another_name_with_its_accumulators(prepared: Path, world: World, tmp_path: Path) -> None:
    for seed in (0, 7):
        out = tmp_path / str(seed)
        Trainer(config_of("robe", prepared, members=("dcnv2",), seed=seed, out=out, num_steps=3), world).train()
    merge_runs(MergeConfig(sources=(tmp_path / "0", tmp_path / "7"), out=tmp_path / "merged"), world)
    states = []
    for run in ("7", "merged"):
        config = load_file(TrainConfig, tmp_path / run / "config.json")
        trainer = Trainer(config, world)
        newest = checkpoints.newest(tmp_path / run / "checkpoints")
        assert newest
        trainer.load(newest)
        found = dict(trainer.optimizer.combined.optimizers)["arrays"]
        name = next(key for key in found.params if key.endswith("dcnv2.array" if run == "7" else "dcnv2_2.array"))
        array = found.params[name]
        states.append((array.detach(), found.state[array]["sum"]))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
        assert (one != 0).any()


def test_a_plan_needs_no_table(prepared: Path, world: World) -> None:
    config = config_of("robe", prepared)
    trainer = Trainer(config, world)
    assert trainer.plan.tables == {}
    sharded = shard(config, trainer.schema, config.specs(), 64, world)
    sizes = sharded.model.embedding.sizes
    assert sizes["dcnv2"].compression == pytest.approx(10, rel=0.01)
