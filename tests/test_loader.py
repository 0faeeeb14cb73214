"""Every row on one rank once, the same global batches for any number of ranks, in an order of their own each epoch."""

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from recsys.data.groups import Layout, RowGroup
from recsys.data.loader import LoaderConfig
from tests.tiny_log import BATCH, GROUP_ENDS, NUM_ROWS, STEPS, flat, global_batches, loader, rows, write

any_ranks = pytest.mark.parametrize("world_size", [1, 2, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


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
@pytest.mark.parametrize("slots", [12, 48])  # 12 give each of 4 ranks an odd number
def test_a_global_batch_is_the_same_on_any_number_of_ranks(folder: Path, slots: int, tail: str) -> None:
    config = LoaderConfig(slots=slots)
    alone = [sorted(step) for step in global_batches(folder, 1, tail=tail, config=config)]
    for world_size in (2, 4):
        assert [sorted(step) for step in global_batches(folder, world_size, tail=tail, config=config)] == alone


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("world_size", [3, 8])
def test_all_ranks_make_the_same_number_of_equal_steps(
    folder: Path, world_size: int, tail: Literal["drop", "pad"]
) -> None:
    for rank in range(world_size):
        one = loader(folder, rank=rank, world_size=world_size, tail=tail)
        sizes = [len(batch.labels) for batch in one.epoch(0)]
        assert sizes == [BATCH // world_size] * one.steps_per_epoch == [BATCH // world_size] * (STEPS + (tail == "pad"))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_tail_that_is_left_out_is_told(folder: Path, world_size: int) -> None:
    one = loader(folder, world_size=world_size)
    assert one.tail_rows == NUM_ROWS - STEPS * BATCH == NUM_ROWS - len(flat(global_batches(folder, world_size)))
    assert one.tail_share == one.tail_rows / NUM_ROWS
    padded = loader(folder, world_size=world_size, tail="pad")
    assert (padded.tail_rows, padded.tail_share) == (0, 0)


@pytest.mark.parametrize("batch_size", [8_192, 65_536])
def test_of_a_thousand_row_groups_the_tail_is_small(
    folder: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = np.random.default_rng(0).integers(60_000, 70_000, 1_000).tolist()
    groups = [RowGroup(folder, index, size) for index, size in enumerate(sizes)]
    monkeypatch.setattr("recsys.data.loader.row_groups", lambda *_: groups)
    assert 0 < loader(folder, batch_size=batch_size, world_size=16).tail_share < 0.005


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


@pytest.mark.parametrize("slots", [1, 4, 7, 16, 48])
def test_few_groups_are_decoded_once_an_epoch_and_many_at_most_once_more_a_slot(
    folder: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[str, int]] = []
    decode = Layout.decode

    def noted(layout: Layout, group: RowGroup, *others: Any) -> np.ndarray:
        decoded.append((group.path.name, group.index))
        return decode(layout, group, *others)

    monkeypatch.setattr(Layout, "decode", noted)
    assert len(list(loader(folder, tail="pad", config=LoaderConfig(slots=slots)).epoch(0))) == STEPS + 1
    assert len(set(decoded)) == len(GROUP_ENDS)
    again = len(decoded) - len(GROUP_ENDS)
    assert again == 0 if len(GROUP_ENDS) <= 2 * slots else again <= slots - 1


@pytest.mark.parametrize("seed", range(20))
def test_any_sizes_of_files_groups_batches_and_slots_work(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    files = [rng.integers(1, 200, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 6))]
    write(tmp_path, files=files)
    world_size, shares = (int(rng.integers(1, 4)) for _ in range(2))
    options: dict[str, Any] = {
        "batch_size": world_size * int(rng.integers(1, 20)),
        "config": LoaderConfig(slots=world_size * shares, seed=seed, workers=int(rng.integers(1, 4))),
        "tail": "pad",
    }
    monkeypatch.setattr("recsys.data.loader.FILLED_BYTES", int(rng.integers(1, 4_000)))
    steps = global_batches(tmp_path, world_size, **options)
    assert sorted(flat(steps)) == list(range(sum(map(sum, files))))
