"""Optimizers and their schedules: settings, updates of rows, and state that can be saved."""

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.distributed import process_group
from recsys.embeddings.dynamic import DynamicGroup
from recsys.embeddings.dynamic_rows import connect
from recsys.embeddings.init import init_tables
from recsys.members import parse_members
from recsys.native import available
from recsys.sharding import native
from recsys.sharding.native import unfused_tables
from recsys.sharding.torchrec import TableOptimizer
from recsys.sharding.workload import FUSED_ON_CPU, STATE_VALUES, WHOLE_ROWS, OptimizerKind
from recsys.training.dense_optim import DenseKind, dense_optimizer
from recsys.training.optim import Optimizer, OptimizerConfig
from recsys.training.schedule import Schedule
from recsys.training.sharded import shard
from recsys.training.table_optim import RowOptimizer
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config

LR, EPS, BETAS = 0.3, 1e-3, (0.8, 0.95)


def test_warmup_grows_to_1_in_equal_steps() -> None:
    schedule = OptimizerConfig(warmup_steps=4).dense_schedule
    assert [schedule.factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays_1() -> None:
    schedule = OptimizerConfig(decay="constant").table_schedule
    assert {schedule.factor(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_decay_goes_from_1_to_0_through_one_half(decay, warmup_steps: int) -> None:
    schedule = OptimizerConfig(decay=decay, warmup_steps=warmup_steps).dense_schedule
    assert schedule.factor(warmup_steps, 100) == 1.0
    assert schedule.factor((100 + warmup_steps) // 2, 100) == pytest.approx(0.5)
    assert 0.0 < schedule.factor(99, 100) < 0.02, "the last step still learns"
    assert schedule.factor(100, 100) == pytest.approx(0.0)


def test_decay_follows_its_formula() -> None:
    linear, cosine = (Schedule(decay=decay) for decay in ("linear", "cosine"))
    assert linear.factor(25, 100) == pytest.approx(0.75)
    assert cosine.factor(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert Schedule(decay="polynomial", power=3.0).factor(25, 100) == pytest.approx(0.75**3)
    assert Schedule(decay="polynomial", power=0.5).factor(101, 100) == 0.0
    steps = Schedule(decay="step", warmup_steps=2, milestones=(3, 5), gamma=0.5)
    assert [steps.factor(step, 100) for step in range(7)] == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    schedule = Schedule(warmup_steps=10, decay="linear")
    assert [schedule.factor(step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_tables_may_have_a_schedule_of_their_own() -> None:
    config = OptimizerConfig(
        warmup_steps=5, decay="linear", table_warmup_steps=0, table_decay="step", decay_milestones=(50,)
    )
    assert config.dense_schedule == Schedule(warmup_steps=5, decay="linear")
    assert config.table_schedule == Schedule(decay="step", milestones=(50,))
    usual = OptimizerConfig(warmup_steps=5, decay="cosine")
    assert usual.table_schedule == usual.dense_schedule == Schedule(warmup_steps=5, decay="cosine")


@pytest.mark.parametrize("name", ["table_lr", "dense_lr", "weight_decay", "warmup_steps", "table_warmup_steps"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_negative_settings_are_named(name: str, value: float) -> None:
    fields: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} {value} must be 0 or more"):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "step"}, "decay step with decay_milestones"),
        ({"decay_milestones": (5,)}, "decay constant with decay_milestones"),
        ({"decay": "step", "decay_milestones": (5, 5)}, "decay_milestones"),
        ({"decay_power": 0.0}, "decay_power 0.0 must be"),
        ({"decay_gamma": 1.5}, "decay_gamma 1.5 must lie"),
        ({"clip_norm": 0.0}, "clip_norm 0.0 must be above 0"),
        ({"clip_table_values": -1.0}, "clip_table_values -1.0 must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay 1.0 must lie"),
        ({"momentum": 1.0}, "momentum 1.0 must lie"),
        ({"table_betas": (0.9, 1.0)}, "table_betas"),
    ],
)
def test_settings_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_tables_get_the_table_settings() -> None:
    tables = OptimizerConfig(tables="adagrad", table_lr=0.5, table_eps=0.25, dense_lr=9.0).table_optimizer
    assert (tables.kind, tables.lr, tables.eps) == ("adagrad", 0.5, 0.25)
    assert "beta1" not in tables.fused_params
    adam = OptimizerConfig(tables="adam", table_betas=BETAS).table_optimizer.fused_params
    assert (adam["optimizer"], adam["beta1"], adam["beta2"]) == (EmbOptimType.ADAM, *BETAS)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_an_epsilon_that_rows_without_gradients_divide_by_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=f"table_eps {value} must be above 0"):
        OptimizerConfig(table_eps=value)


class PlainRow:
    """One row under one kind, in double precision: the formulas as they are written."""

    def __init__(self, kind: OptimizerKind, row: np.ndarray) -> None:
        self.kind, self.w = kind, row.astype(np.float64)
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)

    def step(self, g: np.ndarray, count: int, lr: float) -> None:
        g = g.astype(np.float64)
        (b1, b2), mean_square = BETAS, np.full_like(g, (g**2).sum() / len(g))
        if self.kind == "sgd":
            self.w -= lr * g
        elif self.kind in ("adagrad", "rowwise_adagrad"):
            self.v += g**2 if self.kind == "adagrad" else mean_square
            self.w -= lr * g / (np.sqrt(self.v) + EPS)
        else:
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * (mean_square if self.kind == "partial_rowwise_adam" else g**2)
            r = self.m / (1 - b1**count) / (np.sqrt(self.v / (1 - b2**count)) + EPS)
            scale = np.sqrt((self.w**2).sum() / (r**2).sum()) if self.kind == "lamb" else 1.0
            self.w -= lr * scale * r


def table_optimizer(kind: OptimizerKind) -> TableOptimizer:
    return TableOptimizer(kind=kind, lr=LR, eps=EPS, betas=BETAS)


def gradients(rows: int, dim: int, steps: int) -> list[torch.Tensor]:
    """Of which most rows are zero, and one has elements of zero."""
    random = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        grad = torch.randn(rows, dim, generator=random)
        grad[torch.rand(rows, generator=random) < 0.5] = 0.0
        grad[step % rows, : dim // 2] = 0.0
        found.append(grad)
    return found


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_rows_follow_the_formulas_one_by_one(kind: OptimizerKind) -> None:
    rows, dim = 7, 4
    table = nn.Parameter(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)))
    plain = [PlainRow(kind, row) for row in table.detach().numpy().copy()]
    optimizer = RowOptimizer({"embedding_bags.a/C1.weight": table}, table_optimizer(kind), {})
    for step, grad in enumerate(gradients(rows, dim, 6)):
        optimizer.zero_grad()
        table.grad = grad
        optimizer.count = step
        optimizer.param_groups[0]["lr"] = LR / (step + 1)
        optimizer.step()
        for row, own in zip(plain, grad.numpy(), strict=True):
            if own.any():
                row.step(own, step + 1, LR / (step + 1))
        np.testing.assert_allclose(table.detach(), np.stack([row.w for row in plain]), rtol=2e-5, atol=1e-6)
    state = optimizer.state_dict()["state"]["embedding_bags.a/C1.weight"]
    names = [f"a/C1.{name}" for name in ("momentum1", "exp_avg_sq")]
    assert list(state) == names[: sum(STATE_VALUES[kind])]
    if len(state) == 2:
        np.testing.assert_allclose(state["a/C1.momentum1"], np.stack([row.m for row in plain]), rtol=1e-5, atol=1e-6)
    if state:
        squares = np.stack([row.v for row in plain])
        of_rows = kind in ("rowwise_adagrad", "partial_rowwise_adam")
        last = list(state.values())[-1]
        np.testing.assert_allclose(last, squares[:, 0] if of_rows else squares, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", sorted(FUSED_ON_CPU))
def test_rows_are_updated_as_fbgemm_does(kind: OptimizerKind) -> None:
    rows, dim = 9, 8
    fused = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)], **table_optimizer(kind).fused_params
    )
    start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    fused.split_embedding_weights()[0].copy_(start)
    table = nn.Parameter(start.clone())
    optimizer = RowOptimizer({"embedding_bags.a/C1.weight": table}, table_optimizer(kind), {})
    ids = torch.tensor([1, 3, 1, 8, 3, 3])
    weight = torch.randn(6, dim, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        (fused(ids, torch.arange(7)) * weight).sum().backward()
        table.grad = torch.zeros_like(table).index_add_(0, ids, weight)
        optimizer.step()
        torch.testing.assert_close(table.detach(), fused.split_embedding_weights()[0])


def test_a_table_of_fewer_rows_here_or_none_is_no_error() -> None:
    table = nn.Parameter(torch.zeros(0, 4))
    optimizer = RowOptimizer({"embedding_bags.a/C1.weight": table}, table_optimizer("adam"), {})
    table.grad = torch.zeros(0, 4)
    optimizer.step()


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def learn(optimizer: Any, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x_BK = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        (model(x_BK).squeeze(1) - x_BK.sum(dim=1)).square().mean().backward()
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = step
        optimizer.step()


def make(kind: DenseKind, model: nn.Module) -> Any:
    lr = {"sgd": 0.05, "adagrad": 0.1}.get(kind, 0.02)
    params = dict(model.named_parameters())
    return dense_optimizer(
        kind, params, lambda name: lr * (2.0 if "2." in name else 1.0), weight_decay=0.01, momentum=0.9
    )


@pytest.mark.parametrize("kind", get_args(DenseKind))
def test_dense_optimizers_learn_and_go_on_bit_for_bit(kind: DenseKind, tmp_path: Path) -> None:
    if kind == "lamb":
        pytest.importorskip("pytorch_optimizer")
    model, fresh = layers(), layers()
    start = [param.detach().clone() for param in model.parameters()]
    optimizer = make(kind, model)
    for param, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(param, before), "making the state changes nothing"
    learn(optimizer, model, range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    learn(optimizer, model, range(5, 10))

    other = make(kind, fresh)
    saved = torch.load(tmp_path / "saved.pt")
    assert {key: set(values) for key, values in other.state_dict()["state"].items()} == {
        key: set(values) for key, values in saved["optimizer"]["state"].items()
    }, "all of the state is there before it is loaded"
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    learn(other, fresh, range(5, 10))
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)
    learn(optimizer, model, range(10, 150))
    x_BK = torch.randn(64, 6, generator=torch.Generator().manual_seed(1000))
    untrained = layers()
    error, before = ((net(x_BK).squeeze(1) - x_BK.sum(dim=1)).square().mean() for net in (model, untrained))
    assert error < 0.7 * before


@pytest.mark.parametrize(
    ("kind", "plain", "settings"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_dense_optimizers_begin_as_torch_has_them(
    kind: DenseKind, plain: Callable[..., torch.optim.Optimizer], settings: dict[str, float]
) -> None:
    model, other = layers(), layers()
    lr = make(kind, model).param_groups[0]["lr"]
    params = dict(model.named_parameters())
    made = dense_optimizer(kind, params, lambda _: lr, weight_decay=0.01, momentum=0.9)
    learn(made, model, range(4))
    learn(plain(other.parameters(), lr=lr, weight_decay=0.01, **settings), other, range(4))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_muon_takes_the_matrices_alone() -> None:
    optimizer = make("muon", layers())
    state = optimizer.state_dict()["state"]
    assert {name: "momentum_buffer" in values for name, values in state.items()} == {
        "0.weight": True,
        "0.bias": False,
        "1.weight": False,
        "1.bias": False,
        "2.weight": False,
        "2.bias": False,
    }


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(InputError, match=r"--optimizer.dense lamb: pytorch-optimizer is not installed; pip install"):
        make("lamb", layers())


@pytest.mark.parametrize("kind", ["sgd", "adam", "partial_rowwise_adam"])
def test_arrays_of_robe_are_updated_element_by_element(kind: OptimizerKind, prepared: Path) -> None:
    config = small_config(
        prepared, members=("dcnv2",), embeddings="robe", compression=4.0, table_optimizer=kind, table_lr=0.01
    )
    with process_group() as world:
        trainer = Trainer(config, world)
        (part,) = [part for name, part in trainer.optimizer.combined.optimizers if name == "arrays"]
        ((name, array),) = part.params.items()
        plain = array.detach().double().clone()
        mean, square = torch.zeros_like(plain), torch.zeros_like(plain)
        batches = trainer.loader.stream()
        for count in range(1, 4):
            trainer.train_step(batches)
            g = array.grad.double()
            touched = g != 0
            assert 0 < touched.sum() < len(g)
            mean = torch.where(touched, 0.9 * mean + 0.1 * g, mean)
            square = torch.where(touched, 0.999 * square + 0.001 * g**2, square)
            adam = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
            plain -= 0.01 * torch.where(touched, g if kind == "sgd" else adam, 0.0)
            torch.testing.assert_close(array.detach().double(), plain, rtol=1e-4, atol=1e-6)
    assert name.endswith(".array")


def test_arrays_of_robe_have_no_rows_for_lamb(prepared: Path) -> None:
    config = small_config(prepared, members=("dcnv2",), embeddings="robe", compression=4.0, table_optimizer="lamb")
    with process_group() as world, pytest.raises(InputError, match="arrays of robe have no rows"):
        Trainer(config, world)


def test_rates_of_tables_and_the_rest_follow_their_schedules(prepared: Path) -> None:
    own = "wukong:table_lr=0.3,dense_lr=0.4"
    rates: dict[str, Any] = {"table_lr": 0.1, "dense_lr": 0.2, "decay": "linear", "table_decay": "constant"}
    config = small_config(prepared, members=("dcnv2", own), table_optimizer="adam", warmup_steps=2, **rates)
    assert len(parse_members(config.members, 0)) == 2
    with process_group() as world:
        optimizer = Trainer(config, world).optimizer
        for step, dense, tables in ((0, 0.5, 0.5), (2, 1.0, 1.0), (11, 0.5, 1.0)):
            optimizer.schedule(step)
            found = {
                name: sorted(group["lr"] for group in part.param_groups) for name, part in optimizer.combined.optimizers
            }
            assert found["dense"] == pytest.approx([0.2 * dense, 0.4 * dense])
            assert found["unfused_tables"] == pytest.approx([0.1 * tables, 0.3 * tables])
        optimizer.factor = 0.5
        optimizer.schedule(2)
        groups = itertools.chain(*(part.param_groups for _, part in optimizer.combined.optimizers))
        assert sorted(group["lr"] for group in groups) == pytest.approx([0.05, 0.1, 0.15, 0.2])


UNFUSED = [
    (kind, sharding)
    for kind in sorted(set(get_args(OptimizerKind)) - FUSED_ON_CPU)
    for sharding in ("table_wise", "column_wise", "row_wise")
    if sharding != "column_wise" or kind not in WHOLE_ROWS
]


@pytest.mark.parametrize(("kind", "sharding"), UNFUSED)
def test_what_fbgemm_does_not_fuse_is_updated_in_the_backward_by_the_same_formulas(
    kind: OptimizerKind, sharding: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available("tables"):
        pytest.skip("the operators are not built: there was no compiler")
    members, rates = ("dcnv2", "wukong:table_lr=0.02"), {"table_lr": 0.01, "table_eps": 1e-4, "warmup_steps": 2}
    config = small_config(prepared, members=members, table_optimizer=kind, sharding=sharding, **rates)
    found: list[list[torch.Tensor]] = []
    for is_built in (True, False):
        if not is_built:
            monkeypatch.setattr(native, "available", lambda library: False)
        with process_group() as world:
            trainer = Trainer(config, world)
            assert bool(list(unfused_tables(trainer.task))) == is_built
            predicts, *_ = shard(config, trainer.schema, config.specs(), 128, world)
            assert not any({"means", "squares"} & {*vars(tables)} for tables in unfused_tables(predicts))
            batches = trainer.loader.stream()
            for _ in range(4):
                trainer.train_step(batches)
            tables = {key: value for key, value in trainer.task.state_dict().items() if "embedding_bags" in key}
            found.append([whole(value) for value in tables.values()])
            assert trainer.optimizer.table_state
            for state in trainer.optimizer.table_state.values():
                assert len(state) == 2
                found[-1] += [whole(values) for values in state.values()]
            grads = [param.grad for name, param in trainer.task.named_parameters() if "embedding_bags" in name]
            assert all(grad is None for grad in grads) == is_built
    for mine, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


def whole(values: Any) -> torch.Tensor:
    """What of a table or its state lies here, which is all of it."""
    shards = [shard.tensor for shard in values.local_shards()] if hasattr(values, "local_shards") else [values]
    return torch.cat([shard.flatten() for shard in shards])


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_rows_of_dynamic_tables_start_anew_in_unfused_state_too(sharding: str, prepared: Path) -> None:
    config = small_config(
        prepared,
        members=("dcnv2",),
        embeddings="dynamic",
        table_optimizer="partial_rowwise_adam",
        sharding=sharding,
        rows=500,
    )
    with process_group() as world:
        task, model, _ = shard(config, Schema.load(prepared), config.specs(), 128, world)
        init_tables(task, model.embedding.table_start)
        optimizer = Optimizer(task, config.optimizer, 10, config.specs())
        connect(task, model.embedding, optimizer.table_state)
        tables = {key: value for key, value in task.state_dict().items() if key.endswith("dcnv2/C3.weight")}
        (weight,) = (value.local_shards()[0].tensor for value in tables.values())
        (state,) = (
            [value.local_shards()[0].tensor for value in values.values()]
            for key, values in optimizer.table_state.items()
            if key.endswith("dcnv2/C3.weight")
        )
        before = weight.clone()
        for values in (weight, *state):
            values.fill_(1.0)
        (group,) = (module for module in model.embedding.modules() if isinstance(module, DynamicGroup))
        assert group.maps.reset is not None
        group.maps.reset("C3", np.array([2, 5]))
        for values, fresh in ((weight, before), *((own, torch.zeros_like(own)) for own in state)):
            expected = torch.ones_like(values)
            expected[[2, 5]] = fresh[[2, 5]]
            assert torch.equal(values, expected)
        with pytest.raises(AssertionError, match="of all tables"):
            connect(task, model.embedding, task.fused_optimizer.state_dict()["state"])
