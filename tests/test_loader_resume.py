"""An epoch goes on at any step, on any number of ranks, with any number of threads, and ends its threads."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.groups import Layout
from recsys.data.loader import PREFETCHED_BATCHES, LoaderConfig, prefetch
from tests.batches import batch_of
from tests.tiny_log import STEPS, flat, global_batches, loader, rows, write

EARLIER: set[threading.Thread] = set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


@pytest.mark.parametrize("filled_bytes", [1, 4_000, 8_000_000])
def test_an_epoch_resumes_at_any_step(folder: Path, filled_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.loader.FILLED_BYTES", filled_bytes)
    one = loader(folder, rank=1, world_size=2)
    whole = [rows(batch) for batch in one.epoch(3)]
    for step in range(STEPS + 1):
        assert [rows(batch) for batch in one.epoch(3, step)] == whole[step:]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_an_epoch_resumes_on_another_number_of_ranks(folder: Path, world_size: int) -> None:
    whole = [sorted(step) for step in global_batches(folder, 2)]
    for step in range(STEPS + 1):
        ranks = [loader(folder, rank=rank, world_size=world_size).epoch(0, step) for rank in range(world_size)]
        resumed = [sorted(flat([rows(batch) for batch in together])) for together in zip(*ranks, strict=True)]
        assert resumed == whole[step:]


@pytest.mark.parametrize("filled_bytes", [1, 4_000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_do_not_depend_on_how_many_are_filled_at_once(
    folder: Path, filled_bytes: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [rows(batch) for batch in loader(folder, shuffle=shuffle, tail="pad").epoch(0)]
    monkeypatch.setattr("recsys.data.loader.FILLED_BYTES", filled_bytes)
    assert [rows(batch) for batch in loader(folder, shuffle=shuffle, tail="pad").epoch(0)] == whole


def test_two_epochs_of_one_loader_may_be_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.loader.FILLED_BYTES", 1)
    one = loader(folder)
    whole = [[rows(batch) for batch in one.epoch(epoch)] for epoch in (0, 1)]
    for first, second, *expected in zip(one.epoch(0), one.epoch(1), *whole, strict=True):
        assert [rows(first), rows(second)] == expected


@pytest.mark.parametrize("step", [0, 1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS - 2])
def test_a_stream_resumes_at_any_step_and_goes_on_over_epochs(folder: Path, step: int) -> None:
    whole = [rows(batch) for epoch in range(3) for batch in loader(folder).epoch(epoch)]
    resumed = itertools.islice(loader(folder).stream(step), 4)
    assert [rows(batch) for batch in resumed] == whole[step : step + 4]


def test_once_is_epoch_0(folder: Path) -> None:
    one = loader(folder, tail="pad")
    assert [rows(batch) for batch in one.once()] == [rows(batch) for batch in one.epoch(0)]


# Threads


@pytest.mark.parametrize("slots", [2, 16])
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, slots: int) -> None:
    alone, many = (
        list(loader(folder, config=LoaderConfig(slots=slots, workers=workers)).epoch(1)) for workers in (1, 5)
    )
    for one, other in zip(alone, many, strict=True):
        assert torch.equal(one.dense, other.dense)
        assert torch.equal(one.sparse.values(), other.sparse.values())


def test_an_error_of_a_worker_arrives_and_ends_all_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Layout.decode

    def failing(layout: Layout, group: object, *others: object) -> np.ndarray:
        if len(decoded) == 5:
            raise InputError("the disk is gone")
        decoded.append(group)
        return decode(layout, group, *others)  # type: ignore[arg-type]

    decoded: list[object] = []
    monkeypatch.setattr(Layout, "decode", failing)
    with pytest.raises(InputError, match="the disk is gone"):
        list(loader(folder, config=LoaderConfig(slots=2)).stream())
    assert not loader_threads()


def counted(num: int, error: Exception | None = None) -> Iterator[Batch]:
    for number in range(num):
        yield batch_of(torch.tensor([[float(number)]]), {"a": torch.tensor([0])}, torch.tensor([0.0]))
    if error:
        raise error


@pytest.fixture(autouse=True)
def earlier() -> None:
    """Note the threads of loaders that other tests left to be collected."""
    EARLIER.clear()
    EARLIER.update(threading.enumerate())


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))} - EARLIER


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
    assert 1 <= len(loader_threads()) <= 2
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


LEFT_OPEN = """
import sys, torch
from recsys.data.loader import prefetch

def products():
    while True:
        yield torch.randn(512, 512) @ torch.randn(512, 512)

sys.left_open = prefetch(products())
next(sys.left_open)
"""


def test_a_process_ends_well_while_batches_are_still_made() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
