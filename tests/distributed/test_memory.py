"""No rank holds more than its shards: not while tables are made and filled, not in steps, not while they are saved."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.training.checkpoint import chunks
from recsys.training.checkpoint.load import load
from recsys.training.checkpoint.saver import save_once
from recsys.training.checkpoint.state import state_of
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

DIM, BATCH, NUM_TABLES = 64, 128, 4
MIB = 2**20
# Beyond its shards: what the batch, the process's heap and reading a checkpoint take, whatever the tables' size.
ALLOWED, CONSTANT = 1.05, 40 * MIB


def big_data(folder: Path, num_ids: int) -> Path:
    """Write a prepared folder of some hundred rows over tables of `num_ids` rows, and a tiny one."""
    schema = Schema(
        name="big",
        dense=("I1",),
        sparse={f"C{index}": num_ids for index in range(NUM_TABLES)} | {"tiny": 10},
        labels=("label",),
    )
    folder.mkdir()
    schema.save(folder)
    rng = np.random.default_rng(0)
    for split, num_rows in (("train", 4 * BATCH), ("valid", BATCH)):
        (folder / split).mkdir()
        columns = {"label": pa.array(rng.integers(2, size=num_rows), pa.uint8())}
        columns["I1"] = pa.array(rng.normal(size=num_rows), pa.float32())
        for feature, num in schema.sparse.items():
            columns[feature] = pa.array(rng.integers(num, size=num_rows), pa.int32())
        pq.write_table(pa.table(columns), folder / split / "part-00000.parquet")
    return folder


def peak() -> int:
    """The most that this process had resident so far, since it began to be itself (which ru_maxrss does not know)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _train_and_save(world: World, config: TrainConfig, out: Path) -> None:
    trainer = Trainer(config, world)
    peaks = {"made and filled": peak()}
    batches = trainer.loader.stream()
    for _ in range(3):
        trainer.train_step(batches)
    peaks["trained"] = peak()
    folder = save_once(out / "checkpoints", world, 3, state_of(trainer.task, trainer.optimizer, 3), [])
    peaks["saved"] = peak()
    assert load(folder, trainer.task, trainer.optimizer) == 3
    peaks["loaded"] = peak()
    tensors = [*trainer.task.state_dict().values()]
    for state in trainer.optimizer.combined.state_dict()["state"].values():
        tensors += state.values()
    shards = sum(
        shard.tensor.nbytes for each in tensors if hasattr(each, "local_shards") for shard in each.local_shards()
    )
    (out / f"rank{world.rank}.json").write_text(json.dumps({"shards": shards, "peaks": peaks}))


def measured(folder: Path, num_ids: int, sharding: str) -> list[dict]:
    """Bytes of shards, and the peaks of each phase, a rank."""
    data = big_data(folder, num_ids)
    try:
        config = small_config(data, members=("dcnv2",), embedding_dim=DIM, batch_size=BATCH, sharding=sharding)
        on_ranks(2, _train_and_save, config, folder)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    finally:
        shutil.rmtree(folder)


def check(folder: Path, sharding: str, whole: int) -> None:
    """Compare a job whose tables have `whole` bytes with one that has none to speak of."""
    num_ids = whole // (NUM_TABLES * DIM * 4)
    tiny, big = (measured(folder / name, num, sharding) for name, num in (("tiny", 100), ("big", num_ids)))
    for rank, (base, found) in enumerate(zip(tiny, big, strict=True)):
        shards = found["shards"]
        assert 0.45 * whole < shards < 0.6 * whole
        for phase, most in found["peaks"].items():
            # A checkpoint is read by chunks, of which a few are there at once.
            more = 6 * chunks.CHUNK_BYTES if phase == "loaded" else 0
            taken = most - base["peaks"][phase]
            assert taken < ALLOWED * shards + CONSTANT + more, (
                f"rank {rank}, {phase}: {taken / MIB:.0f} MiB for shards of {shards / MIB:.0f} MiB"
            )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_a_rank_holds_its_shards_and_no_more(sharding: str, tmp_path: Path) -> None:
    check(tmp_path, sharding, 640 * MIB)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_holds_its_shards_of_8_gb(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available, psutil.disk_usage(str(tmp_path)).free
    if free[0] < 12 * 2**30 or free[1] < 10 * 2**30:
        pytest.skip("needs 12 GiB of memory and 10 GiB of disk")
    check(tmp_path, "row_wise", 8 * 10**9)


# Chunks


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_a_checkpoint_in_chunks_is_read_under_another_plan(prepared: Path, tmp_path: Path, sharding: str) -> None:
    config = small_config(prepared, members=("dcnv2",), sharding=sharding)
    on_ranks(2, _save_in_chunks, config, tmp_path)
    expected = torch.load(tmp_path / "expected.pt")
    with process_group() as world:
        torch.set_num_threads(1)
        trainer = Trainer(small_config(prepared, members=("dcnv2",)), world)
        trainer.load(tmp_path / "checkpoints" / "step-00000003")
        batches = trainer.loader.stream(3)
        for losses_M in expected:
            torch.testing.assert_close(trainer.train_step(batches).losses_M.detach(), losses_M, atol=1e-5, rtol=0)


def _save_in_chunks(world: World, config: TrainConfig, out: Path) -> None:
    from recsys.distributed import mean_over_ranks

    chunks.CHUNK_BYTES = 300  # nine rows of eight columns; a shard is no multiple of that
    trainer = Trainer(config, world)
    batches = trainer.loader.stream()
    for _ in range(3):
        trainer.train_step(batches)
    save_once(out / "checkpoints", world, 3, state_of(trainer.task, trainer.optimizer, 3), [])
    whole = trainer.task.state_dict()
    for key, cut in chunks.in_chunks(whole).items():
        if "embedding_bags" in key:
            _check_chunks(whole[key].local_shards(), cut.local_shards())
    losses = [mean_over_ranks(trainer.train_step(batches).losses_M.detach()) for _ in range(3)]
    if world.is_first:
        torch.save(losses, out / "expected.pt")


def _check_chunks(shards: list, cuts: list) -> None:
    """Chunks are the rows of the shards, in the same memory, under storages that hold nothing else."""
    at = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in shards}
    assert len(cuts) >= len(shards)
    for cut in cuts:
        storage = cut.tensor.untyped_storage()
        assert storage.nbytes() == cut.tensor.nbytes <= 300
        assert list(cut.tensor.shape) == cut.metadata.shard_sizes
        first, tensor = max(item for item in at.items() if item[0][0] <= cut.metadata.shard_offsets[0])
        if cut.tensor.numel():
            begin = cut.metadata.shard_offsets[0] - first[0]
            assert cut.tensor.data_ptr() == tensor[begin:].data_ptr()
