"""Optimizers of tables under every plan, and batches that the guard leaves out, on two ranks as on one."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.distributed import World, mean_over_ranks, process_group
from recsys.training.config import TrainConfig
from recsys.training.guard import GuardConfig
from recsys.training.optim import Optimizer
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:fbgemm..dense_embedding_codegen_lookup_function"),
]

# Each kind under the plans that may have it; those that a CPU fuses, unfused as well.
PLANS: dict[str, tuple[str, ...]] = {
    "rowwise_adagrad": ("row_wise:dense",),
    "adagrad": ("column_wise:dense",),
    "sgd": ("row_wise", "table_wise:dense", "data_parallel"),
    "adam": ("table_wise", "row_wise", "column_wise", "data_parallel"),
    "partial_rowwise_adam": ("row_wise", "data_parallel"),
    "lamb": ("row_wise", "data_parallel"),
}
CASES = [(kind, plan) for kind, plans in PLANS.items() for plan in plans]
BAD = (3, 4)
"""Batches before which a bad one is put, so that it is at step 3 and at step 5."""


def config_of(data: Path, kind: str, plan: str, **changes: Any) -> TrainConfig:
    sharding, _, kernel = plan.partition(":")
    kernels = {"kernels": (kernel,)} if kernel else {}
    rates = {"table_lr": 0.02, "decay": "linear", "clip_table_values": 1e-3, "clip_norm": 0.2} | changes
    return small_config(data, members=("dcnv2",), table_optimizer=kind, sharding=sharding, **kernels, **rates)


def guarded(data: Path, out: Path, action: str, **changes: Any) -> TrainConfig:
    guard = GuardConfig(action=action, max_in_a_row=2, max_saved=2)  # type: ignore[arg-type]
    return small_config(data, members=("dcnv2",), num_steps=12, guard=guard, out=out, **changes)


def with_bad(batches: Iterator[Batch], bad: tuple[int, ...], rank: int) -> Iterator[Batch]:
    """Put batches that only the last rank has no number for before others."""
    for index, batch in enumerate(batches):
        if index in bad:
            broken = copy.copy(batch)
            broken.weights = batch.weights * (torch.nan if rank else 1.0)
            yield broken
        yield batch


def losses_of(config: TrainConfig, world: World, bad: tuple[int, ...], rank: int) -> tuple[list[float], Trainer]:
    """Losses of the steps that count."""
    trainer = Trainer(config, world)
    batches = with_bad(trainer.loader.stream(), bad, rank)
    found = []
    for _ in range(trainer.num_steps):
        outputs = trainer.train_step(batches)
        if trainer.one_step.admitted:
            found.append(float(mean_over_ranks(outputs.losses_M)))
    return found, trainer


def refused(config: TrainConfig, world: World, bad: tuple[int, ...]) -> str:
    """What a run says that ends by bad batches."""
    trainer = Trainer(config, world)
    batches = with_bad(trainer.loader.stream(), bad, world.rank)
    try:
        for _ in range(6):
            trainer.train_step(batches)
        trainer.one_step.guard.check()
    except InputError as error:
        return str(error)
    return ""


def _two_ranks(world: World, data: Path, folder: Path) -> None:
    found: dict[str, Any] = {"plans": {case: train(config_of(data, *case), world) for case in CASES}}
    for kind in ("sgd", "adam", "partial_rowwise_adam"):
        trainer = Trainer(config_of(data, kind, "row_wise"), world)
        found[kind] = {table.kernel for table in trainer.plan.tables.values()}, shapes_of(trainer.optimizer)
    for action in ("skip", "back_off"):
        found[action], trainer = losses_of(guarded(data, folder / action, action), world, BAD, world.rank)
        found[f"{action} skipped"] = int(trainer.one_step.guard.skipped)
    found["first"] = refused(guarded(data, folder / "first", "skip"), world, (0,))
    found["stop"] = refused(guarded(data, folder / "stop", "stop"), world, (2,))
    found["parts"], _ = losses_of(guarded(data, folder / "parts", "stop", accumulate=3), world, (), 0)
    found["fp16"], _ = losses_of(guarded(data, folder / "fp16", "stop", precision="fp16"), world, (), 0)
    if world.is_first:
        torch.save(found, folder / "found.pt")


def shapes_of(optimizer: Optimizer) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        table: {key: tuple(value.size()) for key, value in values.items()}
        for table, values in optimizer.table_state.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def on_two(prepared: Path, folder: Path) -> dict[str, Any]:
    on_ranks(2, _two_ranks, prepared, folder)
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def on_one(prepared: Path) -> dict[str, np.ndarray]:
    found = {}
    with process_group() as world:
        for kind in PLANS:
            outcome = train(config_of(prepared, kind, "table_wise"), world)
            assert outcome is not None
            found[kind] = outcome.losses_SM
        found["guarded"] = np.array(losses_of(guarded(prepared, prepared / "unused", "stop"), world, (), 0)[0])
    return found


@pytest.mark.parametrize(("kind", "plan"), CASES)
def test_tables_are_optimized_alike_under_every_plan(
    kind: str, plan: str, on_two: dict[str, Any], on_one: dict[str, np.ndarray]
) -> None:
    outcome = on_two["plans"][kind, plan]
    assert outcome.sharding_types == {plan.partition(":")[0]}
    np.testing.assert_allclose(outcome.losses_SM, on_one[kind], atol=1e-5, rtol=0)


def test_every_kind_learns_in_a_way_of_its_own(on_one: dict[str, np.ndarray]) -> None:
    for kind in PLANS:
        assert on_one[kind][-5:].mean() < on_one[kind][:5].mean() - 0.01, kind
    last = [on_one[kind][-1, 0] for kind in PLANS]
    assert min(np.diff(np.sort(last))) > 1e-5


def test_a_cpu_takes_the_kernel_dense_for_what_it_cannot_fuse_and_names_state_alike(
    prepared: Path, on_two: dict[str, Any]
) -> None:
    rows = Schema.load(prepared).sparse
    expected: dict[str, tuple[str, Callable[[int], dict[str, tuple[int, ...]]]]] = {
        "sgd": ("fused", lambda _: {}),
        "adam": ("dense", lambda rows: {"momentum1": (rows, 8), "exp_avg_sq": (rows, 8)}),
        "partial_rowwise_adam": ("dense", lambda rows: {"momentum1": (rows, 8), "exp_avg_sq": (rows,)}),
    }
    names = [{key.partition(".")[2] for key in on_two[kind][1]} for kind in expected]
    assert names[0] == names[1] == names[2], "a table has one name, fused or not"
    for kind, (kernel, state) in expected.items():
        kernels, shapes = on_two[kind]
        assert kernels == {kernel}
        assert len(shapes) == len(rows)
        part = "tables" if kernel == "fused" else "unfused_tables"
        for feature, num_ids in rows.items():
            (key,) = [key for key in shapes if key.endswith(f"embedding_bags.dcnv2/{feature}.weight")]
            assert key.startswith(f"{part}.")
            assert shapes[key] == {f"dcnv2/{feature}.{name}": shape for name, shape in state(num_ids).items()}


def test_batches_that_are_skipped_are_as_if_they_had_not_been(
    folder: Path, on_two: dict[str, Any], on_one: dict[str, np.ndarray]
) -> None:
    assert on_two["skip skipped"] == len(BAD)
    np.testing.assert_allclose(on_two["skip"], on_one["guarded"][: -len(BAD)], atol=1e-5, rtol=0)
    assert {path.name for path in (folder / "skip" / "bad_batches").iterdir()} == {
        f"step-{step:08d}-rank-{rank}.pt" for step in (3, 5) for rank in (0, 1)
    }
    saved = torch.load(folder / "skip" / "bad_batches" / "step-00000005-rank-1.pt")
    assert saved["step"] == 5
    assert saved["weights"].isnan().all()
    assert len(saved["lengths"]) == 26 * len(saved["labels"]) == 26 * 64


def test_back_off_lowers_the_rates_after_a_bad_batch(on_two: dict[str, Any], on_one: dict[str, np.ndarray]) -> None:
    assert on_two["back_off skipped"] == len(BAD)
    difference = abs(on_two["back_off"] - on_one["guarded"][: -len(BAD)])
    assert difference[:4].max() < 1e-5, "the batch after the first bad one is learned from at a lower rate"
    assert difference[4] > 1e-4


def test_a_bad_loss_ends_a_run_on_all_ranks_in_one_line(folder: Path, on_two: dict[str, Any]) -> None:
    rates = r"lower --optimizer.dense-lr \(0.01\) or --optimizer.table-lr \(0.1\)"
    assert re.fullmatch(f"the loss of member dcnv2 is nan at step 0; {rates}", on_two["first"])
    assert re.fullmatch(f"the loss of member dcnv2 is nan at step 2; {rates}", on_two["stop"])
    saved = {path.name for path in (folder / "stop" / "bad_batches").iterdir()}
    assert saved == {"step-00000002-rank-1.pt", "step-00000003-rank-0.pt"}, "which has its parameters from rank 1"


def test_a_batch_in_parts_trains_as_a_whole_one_on_two_ranks(
    on_two: dict[str, Any], on_one: dict[str, np.ndarray]
) -> None:
    np.testing.assert_allclose(on_two["parts"], on_one["guarded"], atol=1e-5, rtol=0)


def test_fp16_trains_close_to_fp32_on_two_ranks(on_two: dict[str, Any], on_one: dict[str, np.ndarray]) -> None:
    difference = abs(on_two["fp16"] - on_one["guarded"]).max()
    assert 1e-6 < difference < 2e-3
