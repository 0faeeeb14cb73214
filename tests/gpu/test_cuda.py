"""On a CUDA device: the same numbers as on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.data.loader import Loader
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


def test_batches_are_pinned(prepared: Path) -> None:
    batch = next(Loader(prepared, "train", batch_size=64).epoch(0))
    assert batch.dense.is_pinned()
    assert batch.sparse.values().is_pinned()


def test_bf16_trains_on_cuda(prepared: Path) -> None:
    with process_group() as world:
        trainer = Trainer(small_config(prepared, members=MEMBERS, precision="bf16"), world)
        batches = trainer.loader.stream()
        losses = [trainer._step(batches).losses_M.cpu().numpy() for _ in range(trainer.num_steps)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
