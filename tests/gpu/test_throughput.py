"""On a CUDA device: the throughput benchmark as it is, what it measures, and MLPerf's recipe in miniature."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from throughput import Config, main

import workload
from harness import Turns
from jobs import BASELINES
from recsys.data.prepare import prepare
from recsys.data.settings import PrepareConfig
from recsys.distributed import process_group
from recsys.native import available
from recsys.recipes.mlperf import mlperf_dlrm_dcnv2
from recsys.sharding.config import ShardingConfig
from recsys.sharding.native import KINDS, NativeTables
from recsys.sharding.plan import Kernel
from recsys.sharding.torchrec import batches_of_tables
from recsys.training.config import TrainConfig
from recsys.training.pipelines import PipelineName
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config, train_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LIBRARIES = pytest.mark.filterwarnings("ignore")  # of what others tell when they are used as they come
SHORT = Turns(turns=2, seconds=0.0, least_steps=1, warmup_steps=1)
NUM_STEPS = 6


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, and little data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workload, "EPOCH_IDS", 10_000)
    yield tmp_path
    torch.set_num_threads(1)  # a job takes all cores


@LIBRARIES
def test_the_benchmark_runs_unchanged(small: Path) -> None:
    sizes: dict[str, Any] = {"fields": 5, "rows_per_table": (1000,), "dim": (16,), "batch_size": (256, 512)}
    config = Config(sizes="default", **sizes, baselines=True, timing=SHORT, json=small / "out.json")
    assert main(config) == 0
    lines = [json.loads(line) for line in (small / "out.json").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        metrics = line["metrics"]
        assert metrics["device"] == torch.cuda.get_device_name(0)
        assert {"floor_share", *(f"ratio_to_{name}" for name in BASELINES)} <= line.keys()
        assert all(ratio["median"] > 0 for ratio in line["ratios"].values())
        assert metrics["rows_per_s"].keys() == {"ours", *BASELINES}
        assert min(metrics["flops"], metrics["table_bytes"], *metrics["ceilings"].values()) > 0
        # Tensor cores, and memory that is stacked on the device: it was the device that was measured.
        assert metrics["ceilings"]["bf16_square_flops_per_s"] > metrics["ceilings"]["fp32_square_flops_per_s"] > 1e12
        assert metrics["ceilings"]["copy_bytes_per_s"] > 1e11
    assert "ratio_to_first_batch_size_256" in lines[1]


def test_tables_stay_those_of_fbgemm(prepared: Path) -> None:
    with process_group() as world:
        trainer = Trainer(small_config(prepared, members=("dcnv2",)), world)
        batches = list(batches_of_tables(trainer.task))
    assert batches
    assert not any(part.use_cpu or isinstance(part.forward, NativeTables) for part in batches)


@pytest.mark.parametrize("kind", sorted(KINDS, key=str))
def test_our_tables_on_a_cpu_train_as_those_of_fbgemm_on_cuda(kind: EmbOptimType) -> None:
    if not available("tables"):
        pytest.skip("the operators are not built: there was no compiler")
    rows, dim, batch = 500, 16, 64
    there, here = (
        SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[(rows, dim, location, device)] * 2,
            optimizer=kind,
            learning_rate=0.1,
            eps=1e-6,
            stochastic_rounding=False,
        )
        for location, device in (
            (EmbeddingLocation.DEVICE, ComputeDevice.CUDA),
            (EmbeddingLocation.HOST, ComputeDevice.CPU),
        )
    )
    random = torch.Generator().manual_seed(0)
    for one, other in zip(there.split_embedding_weights(), here.split_embedding_weights(), strict=True):
        other.copy_(torch.rand(rows, dim, generator=random) - 0.5)
        one.copy_(other)
    ours = NativeTables(here)
    for _ in range(3):
        ids = torch.randint(rows, (2 * batch * 3,), generator=random)
        offsets = 3 * torch.arange(2 * batch + 1)
        grad = torch.randn(batch, 2 * dim, generator=random)
        found, expected = ours(ids, offsets), there(ids.cuda(), offsets.cuda())
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-5, atol=1e-5)
        found.backward(grad)
        expected.backward(grad.cuda())
    for found, expected in zip(here.split_embedding_weights(), there.split_embedding_weights(), strict=True):
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-5, atol=1e-5)


@LIBRARIES
def test_compiled_backbones_learn_alike(prepared: Path) -> None:
    members = ("dcnv2", "wukong")
    plain, compiled = train_here([small_config(prepared, members=members, compile=each) for each in (False, True)])
    np.testing.assert_allclose(compiled.losses_SM, plain.losses_SM, atol=1e-3, rtol=0)
    np.testing.assert_allclose(compiled.logits_NM, plain.logits_NM, atol=2e-2, rtol=0)


@pytest.fixture(scope="module")
def like_criteo_1tb(synthetic_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That log, prepared as MLPerf's recipe takes it."""
    out = tmp_path_factory.mktemp("criteo_1tb") / "data"
    prepare(PrepareConfig(format="criteo_1tb", paths=(synthetic_log,), out=out, split="random"))
    return out


def mlperf(data: Path, kernel: Kernel, pipeline: PipelineName) -> TrainConfig:
    config = mlperf_dlrm_dcnv2()
    loop = replace(config.train, batch_size=256, num_steps=NUM_STEPS, pipeline=pipeline)
    return replace(config, data=data, train=loop, sharding=ShardingConfig(kernels=(kernel,), types=("table_wise",)))


@pytest.mark.parametrize("pipeline", ["sparse_dist", "prefetch"])
def test_mlperf_in_miniature_trains_behind_a_cache(like_criteo_1tb: Path, pipeline: PipelineName) -> None:
    on_device, cached = train_here(
        [
            mlperf(like_criteo_1tb, "fused", "sparse_dist"),
            mlperf(like_criteo_1tb, "fused_uvm_caching", pipeline),
        ]
    )
    assert np.isfinite(cached.losses_SM).all()
    # bf16, and Adagrad whose first steps are as long as its rate: what differs in a last bit moves apart.
    np.testing.assert_allclose(cached.losses_SM[:2], on_device.losses_SM[:2], rtol=2e-2)
