"""On a CUDA device: FBGEMM's fused optimizers update rows by the formulas of `RowOptimizer`."""

from typing import get_args

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from recsys.sharding.torchrec import TableOptimizer
from recsys.sharding.workload import OptimizerKind
from recsys.training.table_optim import RowOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_rows_are_updated_as_fbgemm_does(kind: OptimizerKind) -> None:
    rows, dim, first = 9, 8, 4
    optimizer = TableOptimizer(kind=kind, lr=0.3, eps=1e-3, betas=(0.8, 0.95))
    fused = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        stochastic_rounding=False,
        **optimizer.fused_params,
    )
    random = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(rows, dim, generator=random, device="cuda")
    fused.split_embedding_weights()[0].copy_(start)
    table = nn.Parameter(start.clone())
    by_row = RowOptimizer({"embedding_bags.a/C1.weight": table}, optimizer, {})
    ids = torch.tensor([1, 3, 1, 8, 3, 3], device="cuda")
    weight = torch.randn(6, dim, generator=random, device="cuda")
    for step in range(first, first + 4):
        fused.iter.fill_(step)
        fused.iter_cpu.fill_(step)
        by_row.count = step
        (fused(ids, torch.arange(7, device="cuda")) * weight).sum().backward()
        table.grad = torch.zeros_like(table).index_add_(0, ids, weight)
        by_row.step()
        torch.testing.assert_close(table.detach(), fused.split_embedding_weights()[0], rtol=1e-4, atol=1e-5)
