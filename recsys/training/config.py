"""The config of a training run."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from recsys.config import InputError, differences, dump, nearest
from recsys.data.loader import LoaderConfig
from recsys.members import BackboneConfigs, MemberSpec, ModelConfig, parse_members
from recsys.merge.rules import NAMES
from recsys.place import Place
from recsys.sharding.config import ShardingConfig
from recsys.training.checkpoint.config import CheckpointConfig, WarmStartConfig
from recsys.training.guard import GuardConfig
from recsys.training.optim import OptimizerConfig
from recsys.training.pipelines import PipelineName
from recsys.training.profile import ProfileConfig
from recsys.training.sinks import SinkConfig


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
    validations_per_epoch: int | None = None
    """Passes over the validation rows in each epoch, evenly apart."""
    validate_every_minutes: float | None = None
    """Also validate when this much time has passed since the last time."""
    patience: int | None = None
    """Stop after this many validations without a better NE of the merge."""
    target_auc: float | None = None
    """Stop when a validation finds this AUC of the merge, or a better one."""
    peak_tflops: float | None = None
    """TFLOP/s of one device that MFU is told of; without it, those of a product of two square matrices, measured."""
    hang_timeout_s: float = 300.0
    """Seconds without a step after which a job of several ranks ends, naming the ranks that are missing."""
    save_every: int | None = None
    """Steps between checkpoints; there is always one at the end."""
    accumulate: int = 1
    """Parts that the members take a batch in. Their gradients add up to those of the whole batch, to rounding, and
    tables are updated once for all of it, whatever their optimizer; memory for activations is that of a part, and the
    backward pass computes each part's forward again."""
    pipeline: PipelineName = "auto"
    """Which of TorchRec's training pipelines: sparse_dist sends ids ahead, base does not; prefetch also fetches rows
    for caches, fused_sparse_dist looks up ahead, and semi_sync looks up before the step before has updated all. The
    last three need CUDA devices. auto is sparse_dist where there are tables."""
    deterministic: bool = False
    """Take torch's deterministic algorithms, and fail where there is none: runs on the same devices with the same plan
    are alike bit for bit. FBGEMM's backward on CUDA sums in an order of its own and is not covered; CPU runs are."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_steps", "log_every", "save_every", "patience", "accumulate")
        for name in (*counts, "validate_every", "validations_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        self.check_parts(1)
        for name in ("validate_every_minutes", "hang_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")
        if self.target_auc is not None and not 0.5 < self.target_auc < 1:
            raise ValueError(f"target_auc {self.target_auc} must lie between 0.5 and 1")

    def check_parts(self, num_ranks: int) -> None:
        """See that every part of a rank's batch has rows.

        Raises:
            InputError: there are more parts than rows.
        """
        rows = self.batch_size // num_ranks
        if self.accumulate > rows:
            whose = f"of a batch of {self.batch_size:,}" + (f" on {num_ranks:,} ranks" if num_ranks > 1 else "")
            raise InputError(
                f"accumulate {self.accumulate}: a rank has {rows:,} rows {whose}; at most as many parts can be, so "
                "lower --train.accumulate or raise --train.batch-size"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, whole."""

    data: Place
    """Prepared folder, see `recsys prepare`; may be a URL."""
    out: Path
    """Run folder to make."""
    members: tuple[str, ...] = ("dcnv2", "wukong", "rankmixer")
    """Backbones to train side by side and merge; NAME*COUNT takes that many seeds of one, and options may follow:
    dcnv2:width=2,dense_lr=3e-4 (see the README). package.module:Class is a backbone of your own."""
    seed: int = 0
    """Seed of all that is random in the members; the order of rows has one of its own."""
    loss: Literal["independent", "joint"] = "independent"
    """Each member its own loss, or one loss of the mean logit."""
    merge: str = "mean_logit"
    """How members' logits become one: mean_logit, mean_probability, confidence, or weighted or stacked, which are
    fitted on the validation rows."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the run's newest whole checkpoint; where there is none, start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    backbones: BackboneConfigs = field(default_factory=BackboneConfigs)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    sinks: SinkConfig = field(default_factory=SinkConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        if self.merge not in NAMES:
            raise ValueError(f"unknown merge rule {self.merge!r}; {nearest(self.merge, NAMES)}")
        self.specs()

    @property
    def checkpoint_folder(self) -> Path:
        """Where the run's checkpoints are."""
        return self.checkpoints.folder or self.out / "checkpoints"

    def specs(self) -> tuple[MemberSpec, ...]:
        """Members, read."""
        return parse_members(self.members, self.seed, self.model, self.backbones)


# What a resumed run may do otherwise: how long it goes on, what it reports and where it stands.
MAY_CHANGE = {"data", "out", "resume", "train", "guard", "sharding", "checkpoints", "sinks", "profile", "warm_start"}


def _alike(before: ModelConfig, now: ModelConfig) -> ModelConfig:
    """`now`, but for how it is computed and how many rows dynamic tables have."""
    return replace(now, batched=before.batched, compile=before.compile, rows=before.rows)


def check_same_job(before: TrainConfig, now: TrainConfig) -> None:
    """Compare the config of a checkpoint with that of a run that goes on from it.

    Raises:
        InputError: something differs that would make another run of it, naming the field.
    """
    fields = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(now)}
    fields = {name: values for name, values in fields.items() if name not in MAY_CHANGE}
    fields["train.batch_size"] = (before.train.batch_size, now.train.batch_size)
    fields["model"] = (before.model, _alike(before.model, now.model))
    how = {name: getattr(before.loader, name) for name in ("workers", "on_corrupt")}
    fields["loader"] = (before.loader, replace(now.loader, **how))
    changes = [each for name, (old, new) in fields.items() for each in differences(dump(old), dump(new), name)]
    if changes:
        told = "; ".join(f"{name} {_shown(new)}, the run has {_shown(old)}" for name, old, new in changes)
        raise InputError(f"{now.out}: cannot go on with {told}; name another --out to start a new run")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
