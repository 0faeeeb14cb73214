"""What becomes of checkpoints, and which one a run begins with."""

import re
from dataclasses import dataclass
from typing import Literal

from recsys.place import Place


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go, how they are written, and which are kept; see also --train.save-every."""

    folder: Place | None = None
    """Where they go; may be a URL. Without it, `checkpoints` in the run folder."""
    write: Literal["auto", "async", "sync"] = "auto"
    """Whether training goes on while one is written, from a copy of this rank's part in memory (pinned, of a GPU's);
    auto does so where the machine has the memory."""
    every_minutes: float | None = None
    """Also save when this much time has passed since the last one."""
    keep_last: int | None = 3
    """Keep this many of the newest; all where it is None."""
    keep_best: int = 1
    """Keep this many of the best by validation, beside those."""
    metric: Literal["ne", "logloss", "auc"] = "ne"
    """Of the merged members, by which they are the best."""
    keep_every_hours: float | None = None
    """Keep one from each stretch of this many hours, beside those."""
    grace_s: float = 25.0
    """Seconds from a SIGTERM, SIGUSR1 or SIGINT to the end of the process, saved or not; torchrun kills its ranks after
    30."""

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        for name in ("every_minutes", "keep_every_hours", "grace_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """What a new run begins with."""

    path: Place | None = None
    """A checkpoint, or a folder of checkpoints or a run folder, whose newest one is taken."""
    names: tuple[str, ...] = ()
    """HERE=THERE: what a part of a tensor's name (a member, feature or layer) is called in that checkpoint."""
    optimizer: bool = False
    """Take over the optimizers' state too."""

    def __post_init__(self) -> None:
        for text in self.names:
            if not re.fullmatch(r"[\w:]+=[\w:]+", text):
                raise ValueError(f"names {text!r}: expected HERE=THERE, as in dcnv2=wukong")
