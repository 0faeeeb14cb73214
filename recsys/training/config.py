"""The config of a training run."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from recsys.config import InputError, nearest
from recsys.data.loader import LoaderConfig
from recsys.members import BackboneConfigs, MemberSpec, ModelConfig, parse_members
from recsys.merge.rules import NAMES
from recsys.place import Place
from recsys.sharding.config import ShardingConfig
from recsys.training.optim import OptimizerConfig


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
    """How members' logits become one: mean_logit, mean_probability, confidence, or weighted or stacked, which are
    fitted on the validation rows."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; where there is none, start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    backbones: BackboneConfigs = field(default_factory=BackboneConfigs)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        if self.merge not in NAMES:
            raise ValueError(f"unknown merge rule {self.merge!r}; {nearest(self.merge, NAMES)}")
        self.specs()

    def specs(self) -> tuple[MemberSpec, ...]:
        """Members, read."""
        return parse_members(self.members, self.seed, self.model, self.backbones)


# What a resumed run may do otherwise: how long it goes on, what it reports and where it stands.
MAY_CHANGE = {"data", "out", "resume", "train", "sharding"}


def check_same_job(before: TrainConfig, now: TrainConfig) -> None:
    """Compare the config of a checkpoint with that of a run that goes on from it.

    Raises:
        InputError: something differs that would make another run of it, naming the field.
    """
    fields = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(now)}
    fields = {name: values for name, values in fields.items() if name not in MAY_CHANGE}
    fields["batch_size"] = (before.train.batch_size, now.train.batch_size)
    fields["model"] = (before.model, replace(now.model, batched=before.model.batched, rows=before.model.rows))
    fields["loader"] = (before.loader, replace(now.loader, workers=before.loader.workers))
    for name, (old, new) in fields.items():
        if old != new:
            raise InputError(
                f"{now.out}: cannot go on with {name} {new}, the run has {old}; name another --out to start a new run"
            )
