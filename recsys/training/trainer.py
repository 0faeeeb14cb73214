"""The trainer: builds a sharded task, and takes steps on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchrec.distributed.model_parallel import DMPCollection

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, on_all_alike, on_every, on_first
from recsys.embeddings.dynamic_rows import connect
from recsys.embeddings.init import init_tables
from recsys.progress import progress
from recsys.tasks.click import Outputs
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.load import load
from recsys.training.checkpoint.saver import Saver
from recsys.training.checkpoint.state import state_of
from recsys.training.checkpoint.warm_start import warm_start
from recsys.training.config import TrainConfig
from recsys.training.control import Control
from recsys.training.log import TrainingLog
from recsys.training.loop import Loop
from recsys.training.metrics import ClickMetrics
from recsys.training.opening import open_run
from recsys.training.optim import Optimizer
from recsys.training.predictions import Predictions
from recsys.training.profile import profiler
from recsys.training.sharded import held_out, loader, shard
from recsys.training.share import Share, predict_share
from recsys.training.step import Step, be_deterministic
from recsys.training.stopping import EarlyStopping
from recsys.training.watch import Watch
from recsys.training.workload import dense_flops


class Trainer:
    """Everything of one run on one rank."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        loop = config.train
        if loop.deterministic:
            be_deterministic()  # before anything is multiplied, which is when CUDA's libraries ask
        self.schema, self.loader = on_every(lambda: (Schema.load(config.data), loader(config, "train", world)))
        self.valid_loader = held_out(config, "valid", world)
        self.specs = config.specs()
        # Tables are planned while they are on the meta device, take memory only as shards, and get their values only
        # then; which are data-parallel, and so in the dense optimizer, is known only after sharding.
        self.task, model, self.plan = shard(config, self.schema, self.specs, self.loader.local_batch_size, world)
        init_tables(self.task, model.embedding.table_start)
        self.num_steps = loop.num_steps or loop.num_epochs * self.loader.steps_per_epoch
        self.optimizer = Optimizer(self.task, config.optimizer, self.num_steps, self.specs)
        connect(self.task, model.embedding, self.optimizer.table_state)
        self.members = model.members
        self.one_step = Step(self.task, self.optimizer, config, self.plan, world)
        peak = 1e12 * loop.peak_tflops if loop.peak_tflops else None
        flops = dense_flops(model.members)
        self.log = TrainingLog(config, self.schema, flops, self.one_step.phases, world, peak)
        self.stopping = EarlyStopping(loop.patience, loop.target_auc)
        self.step = 0

    def train(self) -> dict[str, ClickMetrics] | None:
        """Train to the last step, or to where the run is told to stop; rank 0 gets the last validation's metrics.

        Raises:
            SystemExit: a signal stopped the run; it is saved.
        """
        config, world = self.config, self.world
        on_first(config.sinks.check)
        opened = on_first(lambda: open_run(config, self.schema, self.num_steps, world))
        run, newest = opened.run, opened.newest
        if opened.is_complete:
            return None
        with ExitStack() as held:
            on_first(lambda: held.enter_context(checkpoints.taken(config.checkpoint_folder, run.path, run.id)))
            if newest:
                self.load(newest)
                with on_all_alike():
                    if reason := self.stopping.reason():
                        raise InputError(f"{config.out}: the run stopped at step {self.step}: {reason}; evaluate it")
            elif config.warm_start.path:
                with on_all_alike():
                    warm = warm_start(config.warm_start, self.task, self.optimizer, config.data)
                if self.one_step.ema:
                    self.one_step.ema.restart()
                if world.is_first:
                    warm.save(config.out / "warm_start.json")
                    print(f"recsys: {warm}", file=sys.stderr)  # noqa: T201
            if world.is_first:
                if not newest:
                    run.data.unlink(missing_ok=True)  # of an attempt that came to nothing
                run.describe(replace(config, resume="never"), self.schema, self.plan)
            control = Control(world, config.checkpoints.grace_s)
            watch = Watch(world, self.one_step.phases, config.train.hang_timeout_s)
            held.enter_context(control.listening())
            held.enter_context(watch.watching())
            saver = Saver(config.checkpoint_folder, config.checkpoints, world, lambda: control.ask("failed"))
            held.callback(saver.close)
            rows = self.num_steps * config.train.batch_size
            advance = held.enter_context(progress("train", total=rows, unit="rows", show=world.is_first))
            write = held.enter_context(run.writer(self.step, world.is_first, config.sinks))
            loader = self.loader
            tail = {"rows": loader.num_rows, "tail_rows": loader.tail_rows, "tail_share": loader.tail_share}
            write("data", self.step, tail)
            advance(self.step * config.train.batch_size)
            profile = held.enter_context(profiler(config.profile, config.out, world))
            loop = Loop(self, run, control, watch, saver, write, profile)
            return loop.run(advance, validate_first=not opened.is_validated)

    def train_step(self, batches: Iterator[Batch]) -> Outputs:
        """One forward, backward and update."""
        for member in self.members:
            member.reseed(self.world.rank, self.step)
        outputs = self.one_step(batches, self.step)
        self.step += 1
        return outputs

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.loader.steps_per_epoch

    def predict(
        self, loader: Loader, watched: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None
    ) -> Predictions | None:
        """Logits and labels of held-out rows; None on ranks other than 0.

        Args:
            loader: of the rows.
            watched: hands on the batches, and may raise in between.
        """
        return self.share(loader, watched).gathered()

    def share(self, loader: Loader, watched: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None) -> Share:
        """Logits and labels of this rank's held-out rows; see `predict`."""
        self.one_step.detach()
        batches = loader.once()
        names = [spec.name for spec in self.specs]
        return predict_share(self.task, names, watched(batches) if watched else batches, self.world.device)

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on from here; copies of the tables (2-D parallelism) become equal."""
        if isinstance(self.task, DMPCollection):
            self.task.sync()
        return state_of(self.task, self.optimizer, self.step, self._extra())

    def check_finite(self) -> None:
        """See that the last update left the dense layers whole; the loss before it says nothing of that.

        Raises:
            InputError: on all ranks, naming a parameter.
        """
        for name, param in self.optimizer.dense.items():
            if not param.isfinite().all():
                with on_all_alike():  # they are replicas
                    raise InputError(
                        f"parameter {name} is no number after step {self.step}; begin a new run with a lower "
                        f"--optimizer.dense-lr ({self.config.optimizer.dense_lr})"
                    )

    def load(self, path: Path) -> None:
        """Load a checkpoint and go on at its step."""
        extra = self._extra()
        self.step = load(path, self.task, self.optimizer, extra)
        self.stopping.load_state(extra["stopping"].tolist())
        self.one_step.load_state(extra)
        self.log.load_state({name: extra[f"log.{name}"] for name in ("before", "window")})

    def _extra(self) -> dict[str, Tensor]:
        log = {f"log.{name}": values for name, values in self.log.state().items()}
        return {"stopping": self.stopping.state(), **self.one_step.state(), **log}
