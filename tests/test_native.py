"""Our lookup and update of tables on a CPU against FBGEMM's, whose place they take."""

import copy
import shutil
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

import recsys.native
from recsys.memory import HUGE_PAGE, zeros_on_huge_pages
from recsys.native import available, instructions
from recsys.sharding import native
from recsys.sharding.native import KINDS, NativeTables, use_native
from recsys.sharding.torchrec import TableOptimizer
from recsys.sharding.workload import STATE_VALUES, OptimizerKind
from recsys.training.table_optim import change, state_shapes

BATCH = 300
TABLES = [(50, 16), (3000, 16), (7, 4), (9_000, 128), (40, 20)]
"""Rows and columns: widths that kernels are compiled for, and others."""
kinds = pytest.mark.parametrize("kind", sorted(KINDS, key=str))


@pytest.fixture(autouse=True)
def built() -> None:
    if not available("tables"):
        pytest.skip("the operators are not built: there was no compiler")


def tables(kind: EmbOptimType, **changes: object) -> SplitTableBatchedEmbeddingBagsCodegen:
    values = {
        "embedding_specs": [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in TABLES],
        # The second table has two features.
        "feature_table_map": [0, 1, 1, 2, 3, 4],
        "optimizer": kind,
        "learning_rate": 0.1,
        "eps": 1e-6,
    }
    made = SplitTableBatchedEmbeddingBagsCodegen(**(values | changes))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in made.split_embedding_weights():
            weight.uniform_(-0.5, 0.5)
    return made


def batch(seed: int, *, most: int, skewed: bool, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids and offsets: `most` ids a bag, or up to so many where that is more than one."""
    rng = np.random.default_rng(seed)
    rows = [TABLES[table][0] for table in (0, 1, 1, 2, 3, 4)]
    lengths = rng.integers(0 if most > 1 else 1, most + 1, size=len(rows) * BATCH)
    ids = [
        (num_rows * rng.random(count) ** (6 if skewed else 1)).astype(np.int64)
        for num_rows, count in zip(rows, lengths.reshape(len(rows), BATCH).sum(axis=1), strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(np.concatenate(ids)).to(dtype), torch.from_numpy(offsets).to(dtype)


def train(
    one: SplitTableBatchedEmbeddingBagsCodegen,
    forward: Callable[[Tensor, Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    torch.manual_seed(2)
    for ids, offsets in batches:
        forward(ids, offsets).backward(torch.randn(BATCH, one.total_D))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@kinds
@pytest.mark.parametrize(("most", "skewed"), [(1, False), (1, True), (5, False), (40, True)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_train_as_under_fbgemm(
    kind: EmbOptimType, most: int, skewed: bool, dtype: torch.dtype, threads: int
) -> None:
    theirs, ours = tables(kind), tables(kind)
    forward = NativeTables(ours)
    batches = [batch(seed, most=most, skewed=skewed) for seed in range(3)]
    ids, offsets = batches[0]
    torch.testing.assert_close(forward(ids.to(dtype), offsets.to(dtype)), theirs(ids, offsets), rtol=0, atol=1e-5)
    train(theirs, theirs, batches)
    train(ours, forward, [(ids.to(dtype), offsets.to(dtype)) for ids, offsets in batches])
    for found, expected in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if kind != EmbOptimType.EXACT_SGD:
        for (found,), (expected,) in zip(ours.split_optimizer_states(), theirs.split_optimizer_states(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "avx2", "avx512"])
@kinds
def test_every_instruction_set_trains_alike(kind: EmbOptimType, name: str) -> None:
    widest = instructions()
    if instructions(name) != name:
        pytest.skip(f"this processor has no {name}")
    theirs, ours = tables(kind), tables(kind)
    batches = [batch(seed, most=5, skewed=True) for seed in range(2)]
    train(ours, NativeTables(ours), batches)
    instructions(widest)
    train(theirs, theirs, batches)
    torch.testing.assert_close(ours.weights_host, theirs.weights_host, rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("most", [1, 40])
def test_sums_in_bf16_are_float32_sums_rounded(kind: EmbOptimType, most: int) -> None:
    """And gradients of them are read as they are."""
    whole, halved = tables(kind), tables(kind)
    before, after = NativeTables(whole), NativeTables(halved, torch.bfloat16)
    for seed in range(3):
        ids, offsets = batch(seed, most=most, skewed=True)
        sums, rounded = before(ids, offsets), after(ids, offsets)
        assert rounded.dtype is torch.bfloat16
        assert torch.equal(rounded, sums.bfloat16())
        grad = torch.randn(sums.shape).bfloat16()
        sums.backward(grad.float())
        rounded.backward(grad)
        assert torch.equal(whole.weights_host, halved.weights_host)


def test_no_number_stays_none_in_bf16() -> None:
    made = tables(EmbOptimType.EXACT_SGD)
    with torch.no_grad():
        made.weights_host[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    offsets = torch.arange(6 * BATCH + 1)
    first = NativeTables(made, torch.bfloat16)(torch.zeros_like(offsets[1:]), offsets)[0, :3]
    assert str(first.tolist()) == "[nan, inf, -inf]"


@kinds
def test_gradients_are_clipped_as_under_fbgemm(kind: EmbOptimType) -> None:
    clipped = {"gradient_clipping": True, "max_gradient": 0.3}
    theirs, ours, unclipped = tables(kind, **clipped), tables(kind, **clipped), tables(kind)
    batches = [batch(seed, most=3, skewed=False) for seed in range(2)]
    train(theirs, theirs, batches)
    train(ours, NativeTables(ours), batches)
    train(unclipped, NativeTables(unclipped), batches)
    torch.testing.assert_close(ours.weights_host, theirs.weights_host, rtol=1e-6, atol=1e-6)
    assert (ours.weights_host - unclipped.weights_host).abs().max() > 1e-3


@kinds
def test_any_number_of_threads_gives_the_same_bits(kind: EmbOptimType) -> None:
    made = [tables(kind) for _ in range(2)]
    before = torch.get_num_threads()
    for num_threads, one in zip((1, 2), made, strict=True):
        torch.set_num_threads(num_threads)
        train(one, NativeTables(one), [batch(seed, most=60, skewed=True) for seed in range(2)])
    torch.set_num_threads(before)
    assert torch.equal(made[0].weights_host, made[1].weights_host)


@pytest.mark.parametrize("name", ["plain", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_every_optimizer_follows_the_formulas_of_the_one_after_the_backward(kind: OptimizerKind, name: str) -> None:
    """Of three tables, one of two features, under rates of their own."""
    widest = instructions()
    if instructions(name) != name:
        pytest.skip(f"this processor has no {name}")
    optimizer = TableOptimizer(kind=kind, lr=0.0, eps=1e-3, betas=(0.8, 0.95))
    random = torch.Generator().manual_seed(0)
    sizes, table_of, lrs = [(40, 16), (900, 4), (9, 20)], [0, 1, 1, 2], [0.3, 0.1, 0.2]
    weights = [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    states = [[torch.zeros(shape).double() for shape in state_shapes(kind, *size)] for size in sizes]
    (of_row, of_element), columns = STATE_VALUES[kind], [0, *accumulate(sizes[table][1] for table in table_of)]

    def flat(values: list[Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in values]).float() if values else torch.zeros(0)

    def state_of(index: int) -> list[Tensor]:
        return [state[index] for state in states]

    means = flat(state_of(0)) if of_row + of_element == 2 else torch.zeros(0)
    mine = [flat(weights), means, flat(state_of(-1)) if kind != "sgd" else torch.zeros(0)]
    begins = [0, *accumulate(rows * dim for rows, dim in sizes)]
    places = [0, *accumulate(rows if of_row else rows * dim for rows, dim in sizes)]
    facts = torch.tensor([(begins[t], places[t], *sizes[t], columns[f], t) for f, t in enumerate(table_of)])
    for updates in range(1, 5):
        ids = torch.cat([torch.randint(sizes[table][0], (BATCH,), generator=random) for table in table_of])
        grad = torch.randn(BATCH, columns[-1], generator=random)
        rates = ([lrs[table] for table in table_of], optimizer.eps, float("inf"), *optimizer.betas, updates)
        torch.ops.recsys.update_(*mine, facts, ids, torch.arange(len(ids) + 1), grad, kind, *rates)
        for t, (table, state) in enumerate(zip(weights, states, strict=True)):
            own = torch.zeros_like(table)
            for f in (f for f, of_feature in enumerate(table_of) if of_feature == t):
                own.index_add_(0, ids.view(-1, BATCH)[f], grad[:, columns[f] : columns[f + 1]].double())
            touched = own.ne(0).any(dim=1)
            here = [values[touched] for values in state]
            table[touched] -= change(optimizer, table[touched], own[touched], here, lrs[t], updates)
            for values, new in zip(state, here, strict=True):
                values[touched] = new
    instructions(widest)
    torch.testing.assert_close(mine[0], flat(weights), rtol=1e-4, atol=2e-5)
    if means.numel():
        torch.testing.assert_close(means, flat(state_of(0)), rtol=1e-4, atol=1e-5)
    if kind != "sgd":
        torch.testing.assert_close(mine[2], flat(state_of(-1)), rtol=1e-4, atol=1e-5)


def test_a_row_without_a_gradient_yet_stays_under_lamb() -> None:
    weights, grad = torch.ones(12), torch.zeros(2, 4)
    state = [torch.zeros(12), torch.zeros(12)]
    facts = torch.tensor([(0, 0, 3, 4, 0, 0)])
    rest = ("lamb", [0.1], 1e-8, float("inf"), 0.9, 0.999, 1)
    torch.ops.recsys.update_(weights, *state, facts, torch.tensor([0, 2]), torch.arange(3), grad, *rest)
    assert torch.equal(weights, torch.ones(12))


def test_the_learning_rate_is_that_of_the_moment() -> None:
    made = [tables(EmbOptimType.EXACT_SGD) for _ in range(2)]
    forwards = [made[0], NativeTables(made[1])]
    for one, forward in zip(made, forwards, strict=True):
        one.set_learning_rate(0.02)
        train(one, forward, [batch(0, most=2, skewed=False)])
    torch.testing.assert_close(made[1].weights_host, made[0].weights_host, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_id_without_a_row_is_an_error(wrong: int) -> None:
    made = tables(EmbOptimType.EXACT_SGD)
    ids, offsets = batch(0, most=1, skewed=False)
    ids[3 * BATCH + 5] = wrong
    shown = wrong if wrong > 0 else -1
    with pytest.raises(IndexError, match=rf"feature 3 has id {shown}, its table 7 rows"):
        NativeTables(made)(ids, offsets)


def test_offsets_that_do_not_fit_are_an_error() -> None:
    ids, offsets = batch(0, most=1, skewed=False)
    forward = NativeTables(tables(EmbOptimType.EXACT_SGD))
    with pytest.raises(IndexError, match="offsets do not fit"):
        forward(ids[:-1], offsets)
    with pytest.raises(RuntimeError, match="offsets"):
        forward(ids, offsets[:-1])
    offsets[5], offsets[6] = 9, 5
    with pytest.raises(IndexError, match="offsets do not fit"):
        forward(ids, offsets)


def test_weighted_sums_are_fbgemms() -> None:
    made = tables(EmbOptimType.EXACT_SGD)
    ids, offsets = batch(0, most=3, skewed=False)
    weights = torch.rand(len(ids))
    expected = copy.deepcopy(made)(ids, offsets, weights)
    torch.testing.assert_close(NativeTables(made)(ids, offsets, weights), expected)


def test_no_ids_at_all() -> None:
    made = tables(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    before = made.weights_host.clone()
    offsets = torch.zeros(6 * BATCH + 1, dtype=torch.int64)
    sums = NativeTables(made)(offsets[:0], offsets)
    sums.sum().backward()
    assert not sums.any()
    assert torch.equal(made.weights_host, before)


@pytest.mark.parametrize(
    "unfit",
    [
        {"weights_precision": SparseType.FP16},
        {"pooling_mode": PoolingMode.MEAN},
        {"output_dtype": SparseType.FP16},
        {"weight_decay": 0.1},
    ],
)
def test_what_the_operators_cannot_stays_fbgemms(unfit: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    made = [tables(EmbOptimType.EXACT_ROWWISE_ADAGRAD, **changes) for changes in ({}, unfit)]
    monkeypatch.setattr(native, "batches_of_tables", lambda module: iter(module.parts))
    use_native(SimpleNamespace(parts=made))  # type: ignore[arg-type]
    assert [isinstance(one.forward, NativeTables) for one in made] == [True, False]


def test_without_the_library_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    lines: list[str] = []
    monkeypatch.setattr(recsys.native.log, "warning", lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(recsys.native, "__file__", str(folder / "__init__.py"))
    for damaged in (False, True):
        if damaged:
            (library,) = Path(native.__file__).parents[1].glob("native/tables*.so")
            shutil.copy(library, folder)
            (folder / library.name).write_bytes(b"not a library")
        assert not available.__wrapped__("tables")
        line = lines.pop()
        assert "FBGEMM does their work" in line
        assert ("another torch" in line) == damaged
    assert not lines


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "native"
    shutil.copytree(Path(recsys.native.__file__).parent, folder)
    monkeypatch.setattr(recsys.native, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)  # it is loaded already
    assert available.__wrapped__("tables")
    with (folder / "rows.inl").open("a") as source:
        source.write("// changed\n")
    lines: list[str] = []
    monkeypatch.setattr(recsys.native.log, "warning", lambda line, *values: lines.append(line % values))
    assert not available.__wrapped__("tables")
    assert "was built from other sources" in lines[0]


def test_huge_pages_leave_zeros_zeros_and_neighbours_alone() -> None:
    values = torch.ones(3 * HUGE_PAGE)
    part = values[HUGE_PAGE // 2 : 5 * HUGE_PAGE // 2].zero_()
    zeros_on_huge_pages(part)
    zeros_on_huge_pages(values[:10])
    assert not part.any()
    assert values.sum() == HUGE_PAGE
