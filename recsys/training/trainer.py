"""The trainer: builds a sharded task and runs the one loop."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys.config import InputError, load_file, nearest
from recsys.data.batch import Batch
from recsys.data.loader import Loader, LoaderConfig
from recsys.data.schema import Schema
from recsys.distributed import World, mean_over_ranks, on_every, on_first
from recsys.embeddings.init import init_tables
from recsys.embeddings.sharding import ShardingType, TableSharder, allowed_types, describe_plan, make_plan
from recsys.members import BackboneConfigs, ModelConfig, parse_members
from recsys.merge.rules import RULES
from recsys.model import RecModel
from recsys.place import Place
from recsys.progress import progress
from recsys.tasks.click import ClickTask, Outputs
from recsys.training import checkpoint
from recsys.training.metrics import ClickMetrics
from recsys.training.optim import Optimizer, OptimizerConfig, own_table_lrs
from recsys.training.predict import Predictions, member_metrics, predict
from recsys.training.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and what happens on the way."""

    batch_size: int = 4096
    """Rows of a global batch, over all ranks."""
    num_epochs: int = 1
    """Passes over the training rows."""
    num_steps: int | None = None
    """Stop after this many steps instead of num_epochs."""
    log_every: int = 50
    """Steps between lines of training loss and throughput."""
    validate_every: int | None = None
    """Steps between passes over the validation rows; there is always one at the end."""
    save_every: int | None = None
    """Steps between checkpoints; there is always one at the end."""
    sharding: ShardingType = "auto"
    """Sharding type of all tables; auto lets the planner choose."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_epochs", "num_steps", "log_every", "validate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, whole."""

    data: Place
    """Prepared folder, see `recsys prepare`; may be a URL."""
    out: Path
    """Run folder to make."""
    members: tuple[str, ...] = ("dcnv2", "wukong", "rankmixer")
    """Backbones to train side by side and merge; NAME*COUNT takes that many seeds of one, and options may follow:
    dcnv2:width=2,dense_lr=3e-4 (see the README)."""
    seed: int = 0
    """Seed of all that is random in the members; the order of rows has one of its own."""
    loss: Literal["independent", "joint"] = "independent"
    """Each member its own loss, or one loss of the mean logit."""
    merge: str = "mean_logit"
    """How members' logits become one: mean_logit or mean_probability."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; where there is none, start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    backbones: BackboneConfigs = field(default_factory=BackboneConfigs)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.merge not in RULES:
            raise ValueError(f"unknown merge rule {self.merge!r}; {nearest(self.merge, RULES)}")
        parse_members(self.members, self.seed, self.model, self.backbones)


# What a resumed run may do otherwise: how long it goes on, what it reports and where it stands.
MAY_CHANGE = {"data", "out", "resume", "train"}


def check_same_job(before: TrainConfig, now: TrainConfig) -> None:
    """Compare the config of a checkpoint with that of a run that goes on from it.

    Raises:
        InputError: something differs that would make another run of it, naming the field.
    """
    fields = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(now)}
    fields = {name: values for name, values in fields.items() if name not in MAY_CHANGE}
    fields["batch_size"] = (before.train.batch_size, now.train.batch_size)
    fields["loader"] = (before.loader, replace(now.loader, workers=before.loader.workers))
    for name, (old, new) in fields.items():
        if old != new:
            raise InputError(
                f"{now.out}: cannot go on with {name} {new}, the run has {old}; name another --out to start a new run"
            )
    if (before.train.sharding == "data_parallel") != (now.train.sharding == "data_parallel"):
        raise InputError(
            f"{now.out}: cannot go on with sharding {now.train.sharding} from {before.train.sharding}: data-parallel "
            "tables keep their optimizer state elsewhere"
        )


class Trainer:
    """Everything of one run on one rank."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        loop = config.train
        self.schema, self.loader = on_every(lambda: (Schema.load(config.data), self._loader("train")))
        self.valid_loader = self.held_out("valid")
        self.specs = parse_members(config.members, config.seed, config.model, config.backbones)

        # The order matters: tables are planned while they are on the meta device, take memory only as shards, and get
        # their values only then; what is data-parallel is known only after sharding.
        torch.manual_seed(config.seed)
        model = RecModel(self.schema, self.specs)
        own_table_lrs(model.embedding, self.specs)
        sharder = TableSharder(fused_params=config.optimizer.table_optimizer.fused_params)
        task = ClickTask(model, config.loss)
        plan = make_plan(
            task,
            sharder,
            allowed=allowed_types(loop.sharding, config.optimizer.table_optimizer, world.device),
            local_batch_size=self.loader.local_batch_size,
            device=world.device,
            local_world_size=world.local_size,
        )
        self.plan = describe_plan(plan)
        self.task = DistributedModelParallel(task, device=world.device, plan=plan, sharders=[sharder])
        init_tables(self.task, model.table_start)
        self.num_steps = loop.num_steps or loop.num_epochs * self.loader.steps_per_epoch
        self.optimizer = Optimizer(self.task, config.optimizer, self.num_steps, self.specs)
        self.members = model.members
        self.pipeline = TrainPipelineSparseDist(self.task, self.optimizer.combined, world.device)
        self.step = 0

    def held_out(self, split: str) -> Loader:
        """Every row of a split once, in the order of its files."""
        return on_every(lambda: self._loader(split))

    def _loader(self, split: str) -> Loader:
        return Loader(
            self.config.data,
            split,
            batch_size=self.config.train.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            config=self.config.loader,
            shuffle=split == "train",
            tail="drop" if split == "train" else "pad",
        )

    def train(self) -> dict[str, ClickMetrics] | None:
        """Train to the last step; rank 0 gets the validation metrics of the end, the others None."""
        config = self.config
        run, newest = on_first(self._open_run)
        if newest:
            self.load(newest)
        if self.world.is_first:
            run.describe(replace(config, resume=False), self.schema, self.plan)
        loop, metrics = config.train, None
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
                outputs = self._step(batches)
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
                    checkpoint.save(run.checkpoints, self.step, self.task, self.optimizer, run.config)
                if is_last or (loop.validate_every and self.step % loop.validate_every == 0):
                    predictions = self.predict(self.valid_loader)
                    if predictions:
                        metrics = self.metrics(predictions)
                        write("valid", self.step, {name: asdict(member) for name, member in metrics.items()})
                    started, window = time.perf_counter(), self.step
        return metrics

    def _open_run(self) -> tuple[RunFolder, Path | None]:
        """Take the run folder, and find what to go on from; a folder without a checkpoint is begun anew."""
        config = self.config
        run = RunFolder.open(config.out, resume=config.resume)
        newest = checkpoint.newest(run.checkpoints) if config.resume else None
        if newest:
            before = load_file(TrainConfig, newest / "config.json")
            check_same_job(before, config)
            run.check_schema(self.schema)
            if checkpoint.step_of(newest) >= self.num_steps:
                raise InputError(
                    f"{config.out}: the run has reached step {checkpoint.step_of(newest)} of {self.num_steps}; "
                    "evaluate it, or raise --train.num-epochs or --train.num-steps"
                )
        return run, newest

    def _check_finite(self, losses: list[float]) -> None:
        for spec, loss in zip(self.specs, losses, strict=True):
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of member {spec.name} is {loss} at step {self.step}; lower --optimizer.dense-lr "
                    f"({self.config.optimizer.dense_lr}) or --optimizer.table-lr ({self.config.optimizer.table_lr})"
                )

    def _step(self, batches: Iterator[Batch]) -> Outputs:
        """One forward, backward and update."""
        self.optimizer.schedule(self.step)
        for member in self.members:
            member.reseed(self.world.rank, self.step)
        outputs: Outputs = self.pipeline.progress(batches)
        self.step += 1
        return outputs

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.loader.steps_per_epoch

    def predict(self, loader: Loader) -> Predictions | None:
        """Logits and labels of held-out rows; None on ranks other than 0."""
        # The pipeline has made the tables' forward wait for batches of its own; its next progress() attaches it again.
        self.pipeline.detach()
        return predict(self.task, loader.once(), self.world)

    def metrics(self, predictions: Predictions) -> dict[str, ClickMetrics]:
        """Metrics of each member and of the merge."""
        return member_metrics(predictions, [spec.name for spec in self.specs], RULES[self.config.merge])

    def load(self, path: Path, *, with_optimizer: bool = True) -> None:
        """Load a checkpoint and go on at its step."""
        self.step = checkpoint.load(path, self.task, self.optimizer if with_optimizer else None)

    def _by_name(self, values: list[float]) -> dict[str, float]:
        return dict(zip((spec.name for spec in self.specs), values, strict=True))
