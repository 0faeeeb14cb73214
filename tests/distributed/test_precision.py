"""Tables in fp16 train close to those in fp32, alike on any ranks, in half the memory; what cannot be is refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.init import init_tables
from recsys.embeddings.precision import check_precision, check_replicated, for_inference, fused_params
from recsys.model import RecModel
from recsys.sharding.native import use_native
from recsys.sharding.workload import OptimizerKind
from recsys.training import sharded
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.saver import save_once
from recsys.training.checkpoint.state import state_of
from recsys.training.config import TrainConfig
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.predict import Predictor
from recsys.training.run import RunFolder
from recsys.training.trainer import Trainer
from tests.distributed.jobs import Outcome, on_ranks, small_config, train_here, train_on_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MEMBERS = ("dcnv2", "wukong:table_dtype=fp16")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


@pytest.fixture(scope="module")
def outcomes(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of fp32 and fp16 tables on one rank, and of fp16 tables on two under either plan."""
    low = [
        small_config(prepared, members=("dcnv2",), sharding=sharding, table_dtype="fp16")
        for sharding in ("table_wise", "row_wise")
    ]
    fp32, fp16 = train_here([small_config(prepared, members=("dcnv2",)), low[0]])
    two = train_on_ranks(2, low, tmp_path_factory.mktemp("ranks"))
    return {"fp32": fp32, "fp16": fp16, "table_wise": two[0], "row_wise": two[1]}


@pytest.mark.parametrize("plan", ["table_wise", "row_wise"])
def test_fp16_tables_train_alike_on_two_ranks(outcomes: dict[str, Outcome], plan: str) -> None:
    assert outcomes[plan].sharding_types == {plan}
    np.testing.assert_allclose(outcomes[plan].losses_SM, outcomes["fp16"].losses_SM, atol=1e-5, rtol=0)
    # A value between two of fp16 is rounded either way by the last bit of a sum.
    np.testing.assert_allclose(outcomes[plan].logits_NM, outcomes["fp16"].logits_NM, atol=2e-3, rtol=0)


def test_fp16_tables_train_close_to_fp32(outcomes: dict[str, Outcome]) -> None:
    one, other = outcomes["fp32"].losses_SM, outcomes["fp16"].losses_SM
    assert 0 < abs(one - other).max() < 2e-3
    assert abs(outcomes["fp32"].logits_NM - outcomes["fp16"].logits_NM).mean() < 0.01


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("tables", "rowwise_adagrad"),
        ("tables", "adam"),
        ("mixed,compression=1.5", "rowwise_adagrad"),
        ("qr,compression=2", "rowwise_adagrad"),
    ],
)
def test_tables_that_give_bf16_train_as_those_whose_vectors_are_cast(
    kind: str, optimizer: OptimizerKind, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank members of bf16 get bf16 at once, where nothing else is computed before: the same bits as a cast."""
    members = (f"dcnv2:embeddings={kind}",)
    config = small_config(prepared, members=members, precision="bf16", table_optimizer=optimizer)
    given: list[torch.dtype] = []

    def cast_on_the_way(module: torch.nn.Module, dtype: torch.dtype, unfused: OptimizerKind) -> None:
        given.append(dtype)
        use_native(module, unfused=unfused)

    (at_once,) = train_here([config])
    monkeypatch.setattr(sharded, "use_native", cast_on_the_way)
    (cast,) = train_here([config])
    assert set(given) == {torch.bfloat16 if kind == "tables" else torch.float32}
    np.testing.assert_array_equal(at_once.losses_SM, cast.losses_SM)
    np.testing.assert_array_equal(at_once.logits_NM, cast.logits_NM)


@pytest.mark.parametrize(
    ("ranks", "types", "changes", "expected"),
    [
        (1, ["row_wise"], {}, torch.bfloat16),
        (2, ["table_wise", "column_wise"], {}, torch.bfloat16),
        (2, ["table_wise", "row_wise"], {}, torch.float32),  # sums of parts
        (3, ["table_wise"], {}, torch.float32),  # gradients are divided by 3
        (2, ["table_wise"], {"comms": "fp16"}, torch.float32),
        (1, ["table_wise"], {"clip_table_values": 0.1}, torch.float32),
        (1, ["table_wise"], {"precision": "fp32"}, torch.float32),
    ],
)
def test_bf16_leaves_tables_only_where_no_bit_changes(
    ranks: int, types: list[str], changes: dict[str, Any], expected: torch.dtype, prepared: Path
) -> None:
    config = small_config(prepared, members=("dcnv2",), **{"precision": "bf16"} | changes)
    model = RecModel(Schema.load(prepared), config.specs())
    plan: Any = SimpleNamespace(tables={kind: SimpleNamespace(sharding_type=kind) for kind in types})
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=CPU)
    assert sharded._fields_dtype(config, model, plan, world) is expected


def test_bf16_trains_alike_on_two_ranks(prepared: Path, tmp_path: Path) -> None:
    """Whether vectors travel as bf16 (table-wise) or as float32 (row-wise)."""
    configs = [
        small_config(prepared, members=("dcnv2",), sharding=sharding, precision="bf16")
        for sharding in ("table_wise", "row_wise")
    ]
    (alone,) = train_here(configs[:1])
    for outcome in train_on_ranks(2, configs, tmp_path):
        np.testing.assert_allclose(outcome.losses_SM, alone.losses_SM, atol=2e-3, rtol=0)


def table_shards(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {key: value for key, value in trainer.task.state_dict().items() if "embedding_bags" in key}
    return {key.split("embedding_bags.")[1]: value.local_shards()[0].tensor for key, value in state.items()}


def test_initial_values_are_those_of_fp32_rounded(prepared: Path, world: World) -> None:
    one, other = (
        table_shards(Trainer(small_config(prepared, members=("dcnv2",), table_dtype=dtype), world))
        for dtype in ("fp32", "fp16")
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert other[name].dtype is torch.float16
        assert torch.equal(other[name], weight.half()), name


def test_a_member_has_a_precision_of_its_own_and_fields_in_fp32(prepared: Path, world: World) -> None:
    trainer = Trainer(small_config(prepared, members=MEMBERS), world)
    for name, weight in table_shards(trainer).items():
        assert weight.dtype is (torch.float16 if name.startswith("wukong/") else torch.float32), name
    batch = next(trainer.loader.epoch(0))
    tables = trainer.task.module.model.embedding
    assert [x_BFD.dtype for x_BFD in tables(batch.sparse)] == [torch.float32] * 2


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


def test_memory_and_checkpoints_halve(prepared: Path, world: World, tmp_path: Path) -> None:
    sizes, files = [], []
    for dtype in ("fp32", "fp16"):
        config = small_config(
            prepared, out=tmp_path / dtype, members=("dcnv2",), embedding_dim=64, num_steps=2, table_dtype=dtype
        )
        trainer = Trainer(config, world)
        trainer.train()
        sizes.append(sum(weight.nbytes for weight in table_shards(trainer).values()))
        files.append(size_of(checkpoints.newest(config.out / "checkpoints") or tmp_path))
    assert sizes[1] * 2 == sizes[0]
    assert 0.95 * sizes[1] < files[0] - files[1] < 1.05 * sizes[1]


def test_resumed_equals_uninterrupted(prepared: Path, world: World, tmp_path: Path) -> None:
    whole = small_config(prepared, out=tmp_path / "whole", members=MEMBERS, num_steps=10)
    half = dataclasses.replace(whole, out=tmp_path / "half", train=dataclasses.replace(whole.train, num_steps=5))
    Trainer(half, world).train()
    again = Trainer(dataclasses.replace(whole, out=half.out, resume="auto"), world)
    again.train()
    straight = Trainer(whole, world)
    straight.train()
    for name, weight in table_shards(straight).items():
        assert torch.equal(table_shards(again)[name], weight), name


def test_a_checkpoint_of_two_ranks_is_evaluated_on_one(prepared: Path, world: World, tmp_path: Path) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=MEMBERS, num_steps=5, sharding="row_wise")
    on_ranks(2, _train, config)
    found = evaluate(EvaluateConfig(run=config.out), world)
    assert found is not None
    assert 0.3 < found.metrics["merged"].logloss < 0.7


def _train(world: World, config: TrainConfig) -> None:
    Trainer(config, world).train()


def test_bf16_tables_are_read_as_fp32_on_a_cpu(
    prepared: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a GPU: its tables are made and saved here, where nothing could train them."""
    monkeypatch.setattr("recsys.training.sharded.check_precision", lambda *_: None)
    monkeypatch.setattr("recsys.training.sharded.fused_params", lambda params, *_: params)
    config = small_config(
        prepared, out=tmp_path, members=("dcnv2",), table_dtype="bf16", stochastic_rounding=True, num_steps=1
    )
    trainer = Trainer(config, world)
    run = RunFolder(tmp_path)
    run.describe(config, trainer.schema, trainer.plan)
    save_once(run.checkpoints, world, 1, state_of(trainer.task, trainer.optimizer, 1), [run.config])
    monkeypatch.undo()
    predictor = Predictor(tmp_path, world)
    expected = table_shards(trainer)
    assert {weight.dtype for weight in expected.values()} == {torch.bfloat16}
    for key, value in predictor.task.state_dict().items():
        if "embedding_bags" in key:
            weight = value.local_shards()[0].tensor
            assert weight.dtype is torch.float32
            assert torch.equal(weight, expected[key.split("embedding_bags.")[1]].float())
    assert predictor.predict("valid") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_dtype": "bf16"}, "no bf16 tables on a CPU; use fp16 here, or bf16 on a CUDA device"),
        ({"members": ("dcnv2", "wukong:table_dtype=bf16")}, "no bf16 tables on a CPU"),
        ({"table_dtype": "fp16", "stochastic_rounding": True}, "ignores it on a CPU and rounds to the nearest value"),
        ({"stochastic_rounding": True}, "all tables are fp32, and are not rounded; use it with --model.table-dtype"),
        (
            {"table_dtype": "fp16", "sharding": "data_parallel"},
            "is fp16 and data_parallel, .* use --model.table-dtype fp32, or another",
        ),
        ({"members": ("dcnv2:table_dtype=fp8",)}, "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        ({"members": ("dcnv2:stochastic_rounding=true",)}, "the whole job has one stochastic_rounding"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(
    prepared: Path, world: World, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(small_config(prepared, **changes), world)


def test_a_cuda_device_may_do_all_of_it() -> None:
    for low in (EmbeddingConfig(table_dtype="fp16"), EmbeddingConfig(table_dtype="bf16")):
        check_precision([dataclasses.replace(low, stochastic_rounding=True), EmbeddingConfig()], CUDA)
    with pytest.raises(InputError, match="all tables are fp32"):
        check_precision([EmbeddingConfig(stochastic_rounding=True)], CUDA)


def test_rounding_is_said_to_fbgemm_which_would_else_choose_it() -> None:
    low = EmbeddingConfig(table_dtype="fp16")
    assert fused_params({"eps": 1.0}, [low], CUDA) == {"eps": 1.0, "stochastic_rounding": False}
    rounds = dataclasses.replace(low, stochastic_rounding=True)
    assert fused_params({}, [rounds], CUDA) == {"stochastic_rounding": True}


@pytest.mark.parametrize(("name", "value"), [("weight_decay", 0.01), ("max_norm", 1.0)])
def test_what_a_cpu_ignores_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} {value} of tables: FBGEMM ignores it on a CPU"):
        fused_params({name: value}, [EmbeddingConfig()], CPU)
    assert fused_params({name: value}, [EmbeddingConfig()], CUDA)[name] == value
    assert fused_params({name: 0.0}, [EmbeddingConfig()], CPU)[name] == 0


def test_replicated_tables_of_other_owners_may_be_in_the_plan() -> None:
    configs = {"a": EmbeddingConfig(), "b": EmbeddingConfig(table_dtype="fp16")}
    owners = {name: Owner(name=name, seed="", config=config) for name, config in configs.items()}
    check_replicated({"a/x": "data_parallel", "b/x": "row_wise"}, owners)
    with pytest.raises(InputError, match="table b/x is fp16 and data_parallel"):
        check_replicated({"b/x": "data_parallel"}, owners)


def test_nothing_is_rounded_where_nothing_is_trained() -> None:
    trained = EmbeddingConfig(table_dtype="bf16", stochastic_rounding=True)
    assert for_inference(trained, CPU) == EmbeddingConfig(table_dtype="fp32")
    assert for_inference(trained, CUDA) == EmbeddingConfig(table_dtype="bf16")
    assert for_inference(EmbeddingConfig(table_dtype="fp16"), CPU) == EmbeddingConfig(table_dtype="fp16")


def test_shared_tables_have_one_precision(prepared: Path) -> None:
    with pytest.raises(InputError, match="members that share tables need one table_dtype"):
        TrainConfig(
            data=prepared,
            out=prepared,
            members=MEMBERS,
            model=dataclasses.replace(small_config(prepared).model, tables="shared"),
        )


def test_fp16_weights_of_unsharded_tables_start_alike(prepared: Path) -> None:
    from recsys.embeddings.tables import Tables

    configs = EmbeddingConfig(), EmbeddingConfig(table_dtype="fp16")
    owners = [Owner(name="m", seed="s", config=config) for config in configs]
    one, other = (Tables(Schema.load(prepared).sparse, [owner]).to_empty(device="cpu") for owner in owners)
    for tables in (one, other):
        init_tables(tables, lambda table: (table, 0.1))
    for (name, weight), rounded in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(weight.half(), rounded), name
