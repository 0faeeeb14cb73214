"""One training step: forward, backward and update, by TorchRec's pipelines."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import OptimizerWrapper

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.distributed import World
from recsys.model import Members
from recsys.sharding.plan import Plan
from recsys.tasks.click import Outputs
from recsys.training.config import TrainConfig
from recsys.training.ema import Ema
from recsys.training.guard import Guard
from recsys.training.optim import MEMBER, Optimizer
from recsys.training.phases import Phases
from recsys.training.pipelines import make_pipeline
from recsys.training.scaler import LossScaler


class Step:
    """Takes global batches one by one.

    Args:
        task: sharded.
        optimizer: of the task.
        config: of the run.
        plan: by which the task is sharded.
        world: the job.

    Raises:
        InputError: a pipeline that cannot be, or more parts of a batch than it has rows.

    Attributes:
        phases: of a step, with their times.
        guard: looks at every loss; `guard.check()` says what it found.
        ema: averages of parameters, if any.
    """

    def __init__(
        self, task: DistributedModelParallel, optimizer: Optimizer, config: TrainConfig, plan: Plan, world: World
    ) -> None:
        self.task, self.optimizer = task, optimizer
        self.phases = Phases()
        if config.train.pipeline == "semi_sync" and config.guard.action != "stop":
            raise InputError(
                f"--guard.action {config.guard.action}: semi_sync has looked up the next batch by then, and updates "
                "tables on its own; use --guard.action stop, or --train.pipeline sparse_dist"
            )
        members = next(module for module in task.modules() if isinstance(module, Members))
        config.train.check_parts(world.size)
        members.parts = config.train.accumulate
        if config.model.compile:
            for member in members:
                member.backbone.compile()
        rates = config.optimizer
        if rates.clip_table_values is not None:
            # A rank's gradients are of its own mean loss, and are divided by the ranks on their way to the tables.
            members.gradients.limit = rates.clip_table_values * world.size
        self.scaler: LossScaler | None = None
        if config.model.precision == "fp16":
            scaled = [param for name, param in optimizer.dense.items() if MEMBER in name]
            self.scaler = LossScaler(scaled, world.device)
            members.gradients.scale = self.scaler.scale
        self.ema = None if rates.ema_decay is None else Ema(optimizer.dense, rates.ema_decay)
        self.guard = Guard(config.guard, config.specs(), rates, optimizer, world, config.out)
        self._sync_every = config.sharding.sync_every
        self.number, self.admitted = 0, True
        self._batches: _Batches | None = None
        self._pipeline = make_pipeline(
            config.train.pipeline, task, _Forward(self), _Update(self), plan, world.device, self.phases
        )

    def __call__(self, batches: Iterator[Batch], step: int) -> Outputs:
        """Train on the next batch, as step number `step`, counted from 0.

        Raises:
            InputError: the guard leaves out too many batches.
        """
        self.number = step
        self.guard.begin(step)
        self.optimizer.schedule(step)
        if self._batches is None or self._batches.source is not batches:
            self._batches = _Batches(batches, self.phases)
        outputs: Outputs = self._pipeline.progress(self._batches)
        if isinstance(self.task, DMPCollection) and (step + 1) % self._sync_every == 0:
            self.task.sync()  # copies of the tables, which 2-D parallelism trains apart
        return outputs

    def detach(self) -> None:
        """Let the task be called on batches from elsewhere; the next step attaches it again.

        TorchRec's pipeline makes the tables' forward wait for batches of its own.
        """
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()

    def swapped(self) -> AbstractContextManager[None]:
        """Give parameters their averages while a block runs, where they are kept."""
        return self.ema.swapped() if self.ema else nullcontext()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside model and optimizers: plain tensors, equal on all ranks."""
        return {f"{name}.{key}": value for name, part in self._parts() for key, value in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, part in self._parts():
            part.load_state({key: state[f"{name}.{key}"] for key in part.state()})

    def _parts(self) -> list[tuple[str, Guard | LossScaler | Ema]]:
        parts = (("guard", self.guard), ("scaler", self.scaler), ("ema", self.ema))
        return [(name, part) for name, part in parts if part is not None]


class _Batches:
    """Batches, the time of waiting for which is that of the phase data."""

    def __init__(self, source: Iterator[Batch], phases: Phases) -> None:
        self.source, self._phases = source, phases

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._phases("data"):
            return next(self.source)


class _Forward:
    """Forward, and what is learned from: nothing of a batch that the guard leaves out."""

    def __init__(self, step: Step) -> None:
        self._step = step

    @property
    def training(self) -> bool:
        return bool(self._step.task.training)

    def __call__(self, batch: Batch) -> tuple[Tensor, Outputs]:
        step = self._step
        with step.phases("forward"):
            loss, outputs = step.task(batch)
            step.admitted = step.guard.admits(outputs.losses_M, batch, step.number)
        if not step.admitted:
            return torch.zeros_like(loss, requires_grad=True), outputs  # of no parameter
        return loss if step.scaler is None else loss * step.scaler.scale.squeeze(), outputs


class _Update(OptimizerWrapper):
    """All optimizers, and what comes between the gradients and them."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.optimizer.combined)
        self._step = step
        self._clip_norm = step.optimizer.config.clip_norm

    def step(self, closure: Any = None) -> None:
        step = self._step
        with step.phases("optimizer"):
            if not step.admitted:
                return
            finite = step.scaler is None or step.scaler.unscale()
            if self._clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(step.optimizer.dense.values(), self._clip_norm)
            for name, part in step.optimizer.combined.optimizers:
                if finite or name != "dense":
                    part.step()
            if step.ema and finite:
                step.ema.update()


def be_deterministic() -> None:
    """Have torch take deterministic algorithms, and fail where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
