"""TorchRec's training pipelines by name, with their phases told apart."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineFusedSparseDist, TrainPipelineSemiSync
from torchrec.optim.keyed import KeyedOptimizer

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.sharding.plan import Plan
from recsys.tasks.click import Outputs
from recsys.training.phases import Phases

PipelineName = Literal["auto", "base", "sparse_dist", "prefetch", "semi_sync", "fused_sparse_dist"]
Forward = Callable[[Batch], tuple[Tensor, Outputs]]
ON_CUDA = ("prefetch", "semi_sync", "fused_sparse_dist")


class Base(TrainPipelineBase):
    """One batch after another."""

    phases: Phases

    def _backward(self, losses: Tensor) -> None:
        with self.phases("backward"):
            super()._backward(losses)


class _Timed(TrainPipelineSparseDist):
    """Tells phases apart: ids are sent while another batch is worked on."""

    phases: Phases

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        with self.phases("input_dist"):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: Any) -> None:
        with self.phases("input_dist"):
            super().wait_sparse_data_dist(context)

    def _backward(self, losses: Tensor) -> None:
        with self.phases("backward"):
            super()._backward(losses)


class SparseDist(_Timed):
    """Ids are sent one batch ahead."""


class FusedSparseDist(_Timed, TrainPipelineFusedSparseDist):
    """And looked up while the step before updates the rest."""


class SemiSync(_Timed, TrainPipelineSemiSync):
    """And looked up before the step before has updated all."""


class Prefetch(_Timed, PrefetchTrainPipelineSparseDist):
    """And their rows fetched into caches."""

    def progress(self, dataloader_iter: Iterator[Batch]) -> Outputs:
        """Train on the next batch."""
        if not self._model_attached:  # which the other pipelines see to themselves
            self.attach(self._model)
        return super().progress(dataloader_iter)


PIPELINES: dict[str, type] = {
    "base": Base,
    "sparse_dist": SparseDist,
    "prefetch": Prefetch,
    "semi_sync": SemiSync,
    "fused_sparse_dist": FusedSparseDist,
}
assert {"auto", *PIPELINES} == set(get_args(PipelineName)), "of every name"


def make_pipeline(
    name: PipelineName,
    task: torch.nn.Module,
    forward: Forward,
    optimizer: KeyedOptimizer,
    plan: Plan,
    device: torch.device,
    phases: Phases,
) -> Base | _Timed:
    """Make a pipeline.

    Args:
        name: of it.
        task: sharded.
        forward: runs it, with a property `training`.
        optimizer: of all parameters.
        plan: by which the task is sharded.
        device: of this rank.
        phases: told of what is under way.

    Raises:
        InputError: the device, or the plan, is not for it.
    """
    if name == "auto":
        name = "sparse_dist" if plan.tables else "base"
    if name != "base" and not plan.tables:
        raise InputError(f"--train.pipeline {name}: no embedding is sharded, so there are no ids to send; use base")
    if name in ON_CUDA and device.type == "cpu":
        raise InputError(f"--train.pipeline {name} needs CUDA devices; use sparse_dist here")
    if name == "prefetch" and not any(table.kernel == "fused_uvm_caching" for table in plan.tables.values()):
        raise InputError(
            "--train.pipeline prefetch: no table has a cache to fetch rows into; use sparse_dist, or "
            "--sharding.kernels fused_uvm_caching"
        )
    if name == "base":
        # It calls what it takes for the model.
        pipeline: Base | _Timed = Base(forward, optimizer, device)
    else:
        pipeline = PIPELINES[name](task, optimizer, device, custom_model_fwd=forward)
        # Copies of the tables (2-D parallelism) are averaged where steps are counted, not after every batch.
        pipeline._dmp_collection_sync_interval_batches = None
    pipeline.phases = phases
    return pipeline
