"""The trainer: builds a sharded task and runs the one loop."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recsys.config import InputError, load_file
from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, mean_over_ranks, on_every, on_first
from recsys.embeddings.dynamic_rows import connect
from recsys.embeddings.init import init_tables
from recsys.progress import progress
from recsys.sharding.plan import Plan
from recsys.tasks.click import Outputs
from recsys.training import checkpoint
from recsys.training.config import TrainConfig, check_same_job
from recsys.training.metrics import ClickMetrics
from recsys.training.optim import Optimizer
from recsys.training.predict import predict
from recsys.training.predictions import Predictions, greedy_order, member_metrics, merge_for
from recsys.training.run import RunFolder
from recsys.training.sharded import held_out, loader, shard
from recsys.training.step import Step


class Trainer:
    """Everything of one run on one rank."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        loop = config.train
        self.schema, self.loader = on_every(lambda: (Schema.load(config.data), loader(config, "train", world)))
        self.valid_loader = held_out(config, "valid", world)
        self.specs = config.specs()
        # Tables are planned while they are on the meta device, take memory only as shards, and get their values only
        # then; which are data-parallel, and so in the dense optimizer, is known only after sharding.
        self.task, model, self.plan = shard(config, self.schema, self.specs, self.loader.local_batch_size, world)
        init_tables(self.task, model.embedding.table_start)
        self.num_steps = loop.num_steps or loop.num_epochs * self.loader.steps_per_epoch
        self.optimizer = Optimizer(self.task, config.optimizer, self.num_steps, self.specs)
        connect(self.task, model.embedding, self.task.fused_optimizer.state_dict()["state"])
        self.members = model.members
        self.one_step = Step(self.task, self.optimizer, config, self.plan, world)
        self.step = 0

    def train(self) -> dict[str, ClickMetrics] | None:
        """Train to the last step; rank 0 gets the validation metrics of the end, the others None."""
        config = self.config
        run, newest = on_first(self._open_run)
        if newest:
            self.load(newest)
        if self.world.is_first:
            run.describe(replace(config, resume=False), self.schema, self.plan)
        loop = config.train
        batches = itertools.islice(self.loader.stream(self.step), self.num_steps - self.step)
        started, window = time.perf_counter(), self.step
        with (
            progress("train", total=self.num_steps * loop.batch_size, unit="rows", show=self.world.is_first) as advance,
            run.writer(self.step, self.world.is_first) as write,
        ):
            loader = self.loader
            tail = {"rows": loader.num_rows, "tail_rows": loader.tail_rows, "tail_share": loader.tail_share}
            write("data", self.step, tail)
            advance(self.step * loop.batch_size)
            while self.step < self.num_steps:
                outputs = self.train_step(batches)
                is_last = self.step == self.num_steps
                note = ""
                if self.step % loop.log_every == 0 or is_last:
                    now = time.perf_counter()
                    losses = mean_over_ranks(outputs.losses_M).tolist()
                    self._check_finite(losses)
                    rate = (self.step - window) * loop.batch_size / (now - started)
                    write("train", self.step, {"epoch": self.epoch, "rows_per_s": rate, "loss": self._by_name(losses)})
                    note = "loss " + " ".join(f"{loss:.4f}" for loss in losses)
                    started, window = now, self.step
                advance(loop.batch_size, note)
                if is_last or (loop.save_every and self.step % loop.save_every == 0):
                    checkpoint.save(run.checkpoints, self.step, self.task, self.optimizer, [run.config, run.plan])
                if not is_last and loop.validate_every and self.step % loop.validate_every == 0:
                    self._validate(run, write)
                    started, window = time.perf_counter(), self.step
            return self._validate(run, write)

    def _validate(
        self, run: RunFolder, write: Callable[[str, int, Mapping[str, Any]], None]
    ) -> dict[str, ClickMetrics] | None:
        """Score the validation rows, and keep the merge; None on ranks other than 0."""
        predictions = self.predict(self.valid_loader)
        if predictions is None:
            return None
        merge = merge_for(self.config.merge, predictions)
        metrics = member_metrics(predictions, merge)
        write("valid", self.step, {name: asdict(member) for name, member in metrics.items()})
        run.save_merge(merge, greedy_order(predictions), self.step)
        return metrics

    def _open_run(self) -> tuple[RunFolder, Path | None]:
        """Take the run folder, and find what to go on from; a folder without a checkpoint is begun anew."""
        config = self.config
        run = RunFolder.open(config.out, resume=config.resume)
        newest = checkpoint.newest(run.checkpoints) if config.resume else None
        if newest:
            before = load_file(TrainConfig, newest / "config.json")
            check_same_job(before, config)
            self._check_replicated(newest)
            run.check_schema(self.schema)
            run.check_data(config.data)
            step = checkpoint.step_of(newest)
            # A run that was killed between its last checkpoint and the end of validation only validates.
            if step > self.num_steps or (step == self.num_steps and run.load_merge(step)):
                raise InputError(
                    f"{config.out}: the run has reached step {step} of {self.num_steps}; "
                    "evaluate it, or raise --train.num-epochs or --train.num-steps"
                )
        else:
            run.data.unlink(missing_ok=True)  # of an attempt that came to nothing
        return run, newest

    def _check_replicated(self, path: Path) -> None:
        """See that the same tables are data-parallel, whose optimizer state stands elsewhere in a checkpoint."""
        before, now = (set(plan.replicated) for plan in (Plan.load(path / "plan.json"), self.plan))
        if before != now:
            table = min(before ^ now)
            raise InputError(
                f"{self.config.out}: table {table} {'was' if table in before else 'was not'} data_parallel when the "
                "checkpoint was written, and its optimizer state is kept elsewhere then; go on with the same by "
                f"--sharding.constraints '{table}={'data_parallel' if table in before else 'table_wise'}'"
            )

    def _check_finite(self, losses: list[float]) -> None:
        for spec, loss in zip(self.specs, losses, strict=True):
            if not math.isfinite(loss):
                rates = [
                    f"--optimizer.{name.replace('_', '-')} ({getattr(self.config.optimizer, name)})"
                    if getattr(spec, name) is None
                    else f"its own {name} ({getattr(spec, name)})"
                    for name in ("dense_lr", "table_lr")
                ]
                raise InputError(
                    f"the loss of member {spec.name} is {loss} at step {self.step}; lower {' or '.join(rates)}"
                )

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

    def predict(self, loader: Loader) -> Predictions | None:
        """Logits and labels of held-out rows; None on ranks other than 0."""
        self.one_step.detach()
        return predict(self.task, [spec.name for spec in self.specs], loader.once(), self.world)

    def load(self, path: Path) -> None:
        """Load a checkpoint and go on at its step."""
        self.step = checkpoint.load(path, self.task, self.optimizer)

    def _by_name(self, values: list[float]) -> dict[str, float]:
        return dict(zip((spec.name for spec in self.specs), values, strict=True))
