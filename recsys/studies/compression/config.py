"""The config of a compression study. It imports no torch, so that help is instant."""

from dataclasses import dataclass
from typing import Literal, get_args

from recsys.studies.config import StudyConfig

CompressedKind = Literal["robe", "qr", "mixed"]


@dataclass(frozen=True, kw_only=True)
class CompressionStudyConfig(StudyConfig):
    """Which embeddings a compression study trains beside whole tables, and how small.

    Every job is trained as RECIPE says, but for its one member and its embeddings. The same command goes on with a
    study that was interrupted, and makes the report of a finished one anew.
    """

    backbone: str = "dcnv2"
    """Backbone of all jobs."""
    kinds: tuple[CompressedKind, ...] = ("robe", "qr", "mixed")
    """Kinds of embeddings."""
    compressions: tuple[float, ...] = (10, 100, 1000, 10000)
    """How many times fewer floats they have than whole tables. What a kind cannot reach on these data is left out, and
    said."""
    block_sizes: tuple[int, ...] = (32,)
    """Of robe: floats that stay together."""
    sign: bool = False
    """Whether a robe's blocks have signs."""
    seeds: int = 3
    """Runs of each, with seeds of their own; fewer than 3 decide nothing."""
    table_lrs: tuple[float, ...] = ()
    """Learning rates of embeddings to try with the first seed; each kind at each compression goes on with the one that
    has the lowest validation logloss, whole tables too. The recipe's alone if empty."""
    batch_size: int = 4096
    """Rows of a batch when inference is timed."""

    def __post_init__(self) -> None:
        from recsys.backbones import BACKBONES  # noqa: PLC0415  (help does not need it, and it imports torch)
        from recsys.config import nearest  # noqa: PLC0415

        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; {nearest(self.backbone, BACKBONES)}")
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("kinds", "compressions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name one at least")
        for name in ("kinds", "compressions", "block_sizes", "table_lrs"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names one twice")
        for kind in self.kinds:
            if kind not in get_args(CompressedKind):
                raise ValueError(f"kinds names {kind!r}; known are {', '.join(get_args(CompressedKind))}")
        if any(not compression > 1 for compression in self.compressions):
            raise ValueError(f"compressions {self.compressions} must be above 1; whole tables are trained anyway")
        if any(block < 1 for block in self.block_sizes) or ("robe" in self.kinds and not self.block_sizes):
            raise ValueError(f"block_sizes {self.block_sizes} must be at least 1, and name one for robe")
        if any(not lr > 0 for lr in self.table_lrs):
            raise ValueError(f"table_lrs {self.table_lrs} must be above 0")
