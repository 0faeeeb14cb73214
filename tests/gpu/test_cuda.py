"""On a CUDA device: the same numbers as on a CPU."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from recsys.data.batch import Batch, to_device
from recsys.data.loader import Loader, LoaderConfig
from recsys.distributed import World, process_group
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MEMBERS = ("dcnv2", "wukong", "rankmixer")


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_cuda_trains_to_what_a_cpu_trains_to(prepared: Path, sharding: str) -> None:
    config = small_config(prepared, members=MEMBERS, sharding=sharding)
    with process_group() as world:
        assert world.device.type == "cuda"
        on_cuda = train(config, world)
        on_cpu = train(config, World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")))
    assert on_cuda is not None
    assert on_cpu is not None
    np.testing.assert_allclose(on_cuda.losses_SM, on_cpu.losses_SM, atol=1e-4, rtol=0)


def tensors(batch: Batch) -> list[torch.Tensor]:
    ids = batch.sparse
    return [batch.dense, batch.labels, batch.weights, ids.values(), ids.lengths(), ids.offsets()]


@pytest.mark.parametrize("multi_hot", ["none", "uniform"])
def test_batches_are_pinned(prepared: Path, multi_hot: Literal["none", "uniform"]) -> None:
    batch = next(Loader(prepared, "train", batch_size=64, config=LoaderConfig(multi_hot=multi_hot)).epoch(0))
    assert all(tensor.is_pinned() for tensor in tensors(batch))


def test_batches_are_copied_while_the_one_before_is_worked_on(prepared: Path) -> None:
    loader, device = Loader(prepared, "valid", batch_size=64, shuffle=False, tail="pad"), torch.device("cuda", 0)
    found = []
    for batch in to_device(loader.once(), device):
        assert {tensor.device for tensor in tensors(batch)} == {device}
        torch.cuda._sleep(1_000_000)  # work that the next copy does not wait for
        found.append([tensor.clone() for tensor in tensors(batch)])
    expected = [tensors(batch) for batch in loader.epoch(0)]
    assert len(found) == len(expected) == loader.steps_per_epoch
    for there, here in zip(found, expected, strict=True):
        assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


def test_bf16_trains_on_cuda(prepared: Path) -> None:
    with process_group() as world:
        trainer = Trainer(small_config(prepared, members=MEMBERS, precision="bf16"), world)
        batches = trainer.loader.stream()
        losses = [trainer.train_step(batches).losses_M.cpu().numpy() for _ in range(trainer.num_steps)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
