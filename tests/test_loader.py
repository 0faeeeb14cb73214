"""Every row on one rank once, the same global batches for any number of ranks, resumable, each column in its place."""

import dataclasses
import itertools
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.loader import PREFETCHED_BATCHES, Loader, LoaderConfig, prefetch
from recsys.data.schema import Schema
from tests.batches import batch_of

# Neither the schema nor the files have their columns in alphabetical order, nor both in the same order.
SCHEMA = Schema(name="tiny", dense=("row", "half"), sparse={"c": 1000, "a": 7, "b": 50}, labels=("label",))
FILES = ((40, 40, 40, 13), (40, 7), (40, 40, 40, 40, 40, 3))  # Rows of every row group of every file.
GROUP_ENDS = np.cumsum(list(itertools.chain(*FILES)))
NUM_ROWS = int(GROUP_ENDS[-1])
BATCH = 24  # 16 slots do not divide it, nor do the 48 that are the default.
STEPS = NUM_ROWS // BATCH

any_ranks = pytest.mark.parametrize("world_size", [1, 2, 4])


def columns_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """All columns as a function of the row number, which is one of them."""
    return {
        "b": (rows * rows % 50).astype(np.int32),
        "row": rows.astype(np.float32),
        "c": (rows % 1000).astype(np.int32),
        "label": (rows % 3 == 0).astype(np.int8),
        "a": (rows % 7).astype(np.int32),
        "half": (-rows / 2).astype(np.float32),
    }


def write(folder: Path, split: str, files: Sequence[Sequence[int]] = FILES) -> None:
    (folder / split).mkdir(parents=True)
    SCHEMA.save(folder)
    first = 0
    for index, groups in enumerate(files):
        tables = []
        for size in groups:
            tables.append(pa.table(columns_of(np.arange(first, first + size))))
            first += size
        with pq.ParquetWriter(folder / split / f"part-{index}.parquet", tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path, "train")
    return path


def loader(folder: Path, **options: Any) -> Loader:
    return Loader(folder, "train", **{"batch_size": BATCH} | options)


def rows(batch: Batch) -> list[int]:
    return [int(row) for row in batch.dense[batch.weights > 0, 0]]


def global_batches(folder: Path, world_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """Rows of every step of an epoch, those of rank 0 first."""
    ranks = [loader(folder, rank=rank, world_size=world_size, **options).epoch(epoch) for rank in range(world_size)]
    return [[row for batch in step for row in rows(batch)] for step in zip(*ranks, strict=True)]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain(*lists))


# Which rows


@any_ranks
@pytest.mark.parametrize("shuffle", [True, False])
def test_padding_yields_every_row_once(folder: Path, world_size: int, shuffle: bool) -> None:
    steps = global_batches(folder, world_size, tail="pad", shuffle=shuffle)
    assert len(steps) == STEPS + 1
    assert sorted(flat(steps)) == list(range(NUM_ROWS))


@any_ranks
def test_dropping_loses_less_than_a_batch_and_repeats_no_row(folder: Path, world_size: int) -> None:
    steps = global_batches(folder, world_size)
    assert [len(step) for step in steps] == [BATCH] * STEPS
    assert len(set(flat(steps))) == STEPS * BATCH > NUM_ROWS - BATCH


def test_each_epoch_drops_other_rows(folder: Path) -> None:
    first, second = (set(flat(global_batches(folder, 1, epoch))) for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(folder: Path, tail: str) -> None:
    alone = [sorted(step) for step in global_batches(folder, 1, tail=tail)]
    for world_size in (2, 4):
        assert [sorted(step) for step in global_batches(folder, world_size, tail=tail)] == alone


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("world_size", [3, 8])
def test_all_ranks_make_the_same_number_of_equal_steps(
    folder: Path, world_size: int, tail: Literal["drop", "pad"]
) -> None:
    for rank in range(world_size):
        one = loader(folder, rank=rank, world_size=world_size, tail=tail)
        sizes = [len(batch.labels) for batch in one.epoch(0)]
        assert sizes == [BATCH // world_size] * one.steps_per_epoch == [BATCH // world_size] * (STEPS + (tail == "pad"))


def test_the_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return flat(global_batches(folder, 1, epoch, config=LoaderConfig(seed=seed)))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)


def test_groups_and_rows_within_groups_are_shuffled_anew_by_seed_and_epoch(folder: Path) -> None:
    groups, within_one = [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        # With one slot the groups come one after the other.
        steps = global_batches(folder, 1, epoch, tail="pad", config=LoaderConfig(slots=1, seed=seed))
        group_of = {row: int(np.searchsorted(GROUP_ENDS, row, side="right")) for row in flat(steps)}
        groups.append([group for group, _ in itertools.groupby(group_of.values())])
        within_one.append([row for row, group in group_of.items() if group == 1])
        assert sorted(groups[-1]) == list(range(len(GROUP_ENDS)))
    in_file_order = [list(range(len(GROUP_ENDS))), list(range(40, 80))]
    for orders, unshuffled in zip((groups, within_one), in_file_order, strict=True):
        assert all(first != second for first, second in itertools.combinations([*orders, unshuffled], 2))


def test_a_batch_has_rows_of_many_groups(folder: Path) -> None:
    def groups_per_batch(slots: int) -> list[int]:
        steps = global_batches(folder, 1, config=LoaderConfig(slots=slots))
        return [len(set(np.searchsorted(GROUP_ENDS, step, side="right"))) for step in steps]

    assert max(groups_per_batch(slots=1)) <= 4
    assert min(groups_per_batch(slots=8)) >= 5
    assert min(groups_per_batch(slots=16)) >= 7


@any_ranks
def test_without_shuffle_ranks_one_after_the_other_keep_the_order_of_the_files(folder: Path, world_size: int) -> None:
    ranks = [
        loader(folder, rank=rank, world_size=world_size, shuffle=False, tail="pad").epoch(0)
        for rank in range(world_size)
    ]
    assert [row for rank in ranks for batch in rank for row in rows(batch)] == list(range(NUM_ROWS))


@pytest.mark.parametrize("slots", [2, 6, 40])
def test_any_number_of_slots_works(folder: Path, slots: int) -> None:
    steps = global_batches(folder, 2, tail="pad", config=LoaderConfig(slots=slots))
    assert sorted(flat(steps)) == list(range(NUM_ROWS))


# Where to go on


def test_an_epoch_resumes_at_any_step(folder: Path) -> None:
    one = loader(folder, rank=1, world_size=2)
    whole = [rows(batch) for batch in one.epoch(3)]
    for step in range(STEPS + 1):
        assert [rows(batch) for batch in one.epoch(3, step)] == whole[step:]


@pytest.mark.parametrize("step", [0, 1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS - 2])
def test_a_stream_resumes_at_any_step_and_goes_on_over_epochs(folder: Path, step: int) -> None:
    whole = [rows(batch) for epoch in range(3) for batch in loader(folder).epoch(epoch)]
    resumed = itertools.islice(loader(folder).stream(step), 4)
    assert [rows(batch) for batch in resumed] == whole[step : step + 4]


def test_once_is_epoch_0(folder: Path) -> None:
    one = loader(folder, tail="pad")
    assert [rows(batch) for batch in one.once()] == [rows(batch) for batch in one.epoch(0)]


# What a batch holds


@any_ranks
def test_every_column_arrives_in_its_place(folder: Path, world_size: int) -> None:
    for batch in loader(folder, rank=world_size - 1, world_size=world_size).epoch(0):
        expected = columns_of(np.array(rows(batch)))
        sparse = batch.sparse.to_dict()
        np.testing.assert_array_equal(batch.dense, np.stack([expected["row"], expected["half"]], axis=1))
        np.testing.assert_array_equal(batch.labels, expected["label"])
        for name in SCHEMA.sparse:
            np.testing.assert_array_equal(sparse[name].values(), expected[name])
        assert batch.dense.dtype == batch.labels.dtype == batch.weights.dtype == torch.float32


def test_features_come_in_schema_order_with_one_id_a_row(folder: Path) -> None:
    sparse = next(loader(folder, world_size=2).epoch(0)).sparse
    assert sparse.keys() == list(SCHEMA.sparse)
    assert sparse.stride() == BATCH // 2
    assert sparse.lengths().tolist() == [1] * (3 * BATCH // 2)
    assert sparse.offsets().tolist() == list(range(3 * BATCH // 2 + 1))
    assert sparse.length_per_key() == [BATCH // 2] * 3


def test_padding_has_weight_0_and_harmless_values(folder: Path) -> None:
    batches = list(loader(folder, tail="pad").epoch(0))
    padding = torch.cat([batch.weights == 0 for batch in batches])
    assert padding.sum() == (STEPS + 1) * BATCH - NUM_ROWS
    assert not torch.cat([batch.dense for batch in batches])[padding].any()
    assert not torch.cat([batch.labels for batch in batches])[padding].any()
    for name in SCHEMA.sparse:
        assert not torch.cat([batch.sparse[name].values() for batch in batches])[padding].any()


def test_columns_of_other_number_types_are_converted(tmp_path: Path) -> None:
    write(tmp_path, "train")
    for path in (tmp_path / "train").iterdir():
        wide = {"row": pa.float64(), "half": pa.int64(), "a": pa.int64(), "b": pa.uint8(), "label": pa.float32()}
        table = pq.read_table(path)
        for name, kind in wide.items():
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind, safe=False))
        pq.write_table(table, path)
    for batch in loader(tmp_path).epoch(0):
        expected = columns_of(np.array(rows(batch)))
        np.testing.assert_array_equal(batch.dense[:, 1], np.trunc(expected["half"]))
        np.testing.assert_array_equal(batch.sparse["a"].values(), expected["a"])
        np.testing.assert_array_equal(batch.sparse["b"].values(), expected["b"])
        np.testing.assert_array_equal(batch.labels, expected["label"])


def test_a_log_without_dense_columns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folder / "train")
    Schema(name="tiny", dense=(), sparse={"c": 1000}, labels=("label",)).save(tmp_path)
    batches = list(loader(tmp_path, tail="pad").epoch(0))
    assert {tuple(batch.dense.shape) for batch in batches} == {(BATCH, 0)}
    ids = [int(row) for batch in batches for row in batch.sparse["c"].values()[batch.weights > 0]]
    assert sorted(ids) == list(range(NUM_ROWS))


def test_a_moved_batch_keeps_everything(folder: Path) -> None:
    batch = list(loader(folder, tail="pad").epoch(0))[-1]
    for moved, device in ((batch.to(torch.device(name)), name) for name in ("cpu", "meta")):
        assert moved.sparse.keys() == batch.sparse.keys()
        pairs = [(getattr(moved, name), getattr(batch, name)) for name in ("dense", "labels", "weights")]
        pairs += [(getattr(moved.sparse, name)(), getattr(batch.sparse, name)()) for name in ("values", "lengths")]
        for there, here in pairs:
            assert there.device.type == device
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
            assert device == "meta" or torch.equal(there, here)


def test_batch_of_lays_out_ids_as_the_loader_does(folder: Path) -> None:
    batch = next(loader(folder).epoch(0))
    ids = {name: batch.sparse[name].values() for name in SCHEMA.sparse}
    made = batch_of(batch.dense, ids, batch.labels)
    assert made.sparse.keys() == batch.sparse.keys()
    assert torch.equal(made.sparse.values(), batch.sparse.values())
    assert torch.equal(made.sparse.lengths(), batch.sparse.lengths())
    assert torch.equal(made.weights, batch.weights)


# What cannot work


def test_a_missing_split_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="valid: no Parquet file in it"):
        Loader(folder, "valid", batch_size=BATCH)


def test_a_column_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train")
    path = tmp_path / "train" / "part-1.parquet"
    pq.write_table(pq.read_table(path).drop_columns("a"), path)
    with pytest.raises(InputError, match=r"part-1.parquet: column 'a' of schema.json is not in it"):
        loader(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train")
    path = tmp_path / "train" / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"part-2.parquet: not a whole Parquet file"):
        loader(tmp_path)


@pytest.mark.parametrize(("batch_size", "world_size", "right"), [(25, 4, 24), (3, 4, 4), (0, 2, 2), (1, 3, 3)])
def test_a_batch_that_ranks_cannot_share_equally(folder: Path, batch_size: int, world_size: int, right: int) -> None:
    with pytest.raises(InputError, match=rf"batch size {batch_size} .* {world_size} ranks equally; {right} can"):
        loader(folder, batch_size=batch_size, world_size=world_size)
    loader(folder, batch_size=right, world_size=world_size)


def test_fewer_rows_than_a_batch(folder: Path) -> None:
    with pytest.raises(InputError, match=f"has {NUM_ROWS} rows, fewer than one global batch of {NUM_ROWS + 1}"):
        loader(folder, batch_size=NUM_ROWS + 1)
    assert loader(folder, batch_size=NUM_ROWS).steps_per_epoch == 1
    assert loader(folder, batch_size=NUM_ROWS + 1, tail="pad").steps_per_epoch == 1


def test_slots_that_ranks_cannot_share_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"48 slots cannot be shared by 5 ranks .* --loader.slots 50"):
        Loader(folder, "train", batch_size=25, world_size=5)


def test_an_id_beyond_the_schema_is_named(folder: Path) -> None:
    schema = Schema.load(folder)
    feature = next(iter(schema.sparse))
    dataclasses.replace(schema, sparse=schema.sparse | {feature: 2}).save(folder)
    with pytest.raises(InputError, match=rf"row group 0: column {feature} holds ids \d+ to \d+, but .* gives it 2 ids"):
        Loader(folder, "train", batch_size=BATCH)
    schema.save(folder)


@pytest.mark.parametrize(("fields", "message"), [({"slots": 0}, "slots 0"), ({"seed": -1}, "seed -1")])
def test_loader_config_names_the_field(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**fields)


# Prefetching


def counted(num: int, error: Exception | None = None) -> Iterator[Batch]:
    for number in range(num):
        yield batch_of(torch.tensor([[float(number)]]), {"a": torch.tensor([0])}, torch.tensor([0.0]))
    if error:
        raise error


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_prefetch_yields_everything_in_order_and_ends() -> None:
    assert flat([rows(batch) for batch in prefetch(counted(20))]) == list(range(20))
    assert not loader_threads()


def test_prefetch_hands_over_exceptions_after_what_came_before() -> None:
    batches = prefetch(counted(2, error=InputError("the disk is gone")))
    assert [rows(next(batches)), rows(next(batches))] == [[0], [1]]
    with pytest.raises(InputError, match="the disk is gone"):
        next(batches)
    assert not loader_threads()


@pytest.mark.parametrize("taken", [1, 3])
def test_prefetch_ends_its_thread_when_closed_early(folder: Path, taken: int) -> None:
    stream = loader(folder).stream()
    for _ in range(taken):
        next(stream)
    assert len(loader_threads()) == 1
    assert isinstance(stream, Generator)
    stream.close()
    assert not loader_threads()


def test_prefetch_works_ahead_but_not_without_bound() -> None:
    made, far_enough = [], threading.Event()

    def watched() -> Iterator[Batch]:
        for batch in counted(100):
            made.append(batch)
            if len(made) == 1 + PREFETCHED_BATCHES:
                far_enough.set()
            yield batch

    batches = prefetch(watched())
    next(batches)
    assert far_enough.wait(timeout=10)
    # One is taken, PREFETCHED_BATCHES wait, one more is in the thread's hands.
    assert len(made) <= 2 + PREFETCHED_BATCHES
    assert isinstance(batches, Generator)
    batches.close()
