"""Kernels and copies of tables that need CUDA devices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.distributed import process_group
from tests.distributed.jobs import small_config, train, train_on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_tables_in_host_memory_train_like_those_on_the_device(prepared: Path, kernel: str) -> None:
    with process_group() as world:
        on_device, behind = (
            train(small_config(prepared, members=("dcnv2",), kernels=(own,)), world) for own in ("fused", kernel)
        )
    assert on_device is not None
    assert behind is not None
    np.testing.assert_allclose(behind.losses_SM, on_device.losses_SM, atol=1e-4, rtol=0)


def test_two_types_of_kernel_share_a_job(prepared: Path) -> None:
    config = small_config(prepared, members=("dcnv2",), constraints=("dcnv2/C1*=:fused_uvm_caching",))
    with process_group() as world:
        mixed, plain = train(config, world), train(small_config(prepared, members=("dcnv2",)), world)
    assert mixed is not None
    assert plain is not None
    np.testing.assert_allclose(mixed.losses_SM, plain.losses_SM, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sync_every", [1, 4])
def test_two_copies_of_the_tables_learn(prepared: Path, sync_every: int, tmp_path: Path) -> None:
    config = small_config(prepared, members=("dcnv2",), replicas=2, sync_every=sync_every)
    (copies,) = train_on_ranks(2, [config], tmp_path)
    losses = copies.losses_SM[:, 0]
    assert np.isfinite(copies.logits_NM).all()
    assert losses[-5:].mean() < losses[:5].mean()
    with process_group() as world:
        alone = train(small_config(prepared, members=("dcnv2",)), world)
    assert alone is not None
    np.testing.assert_allclose(copies.losses_SM[0], alone.losses_SM[0], atol=1e-4, rtol=0, err_msg="before any update")
