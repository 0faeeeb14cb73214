"""What backbones cost: parameters and FLOPs a row along their ladders."""

from dataclasses import dataclass

import torch

from recsys.backbones import BACKBONES
from recsys.members import LARGEST_RUNG


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Which rungs to show, for which data."""

    num_fields: int = 27
    """Fields: one a categorical feature, and one for all dense columns."""
    embedding_dim: int = 16
    """Columns of each field's embedding."""
    rungs: tuple[float, ...] = (1, 2, 4)
    """Rungs: along the width, hidden widths times the root of this; along the depth, layers times this."""

    def __post_init__(self) -> None:
        for name in ("num_fields", "embedding_dim"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 2")
        if not self.rungs or not all(1 <= rung <= LARGEST_RUNG for rung in self.rungs):
            raise ValueError(f"rungs {self.rungs} must lie between 1 and {LARGEST_RUNG:,}")


@dataclass(frozen=True)
class Rung:
    """A backbone at one rung."""

    backbone: str
    along: str
    k: float
    num_parameters: int
    flops: int
    """Of one row's forward, without embeddings, head and dense columns."""


def rungs(config: LadderConfig) -> list[Rung]:
    """List every backbone at every rung along its width and its depth; rung 1 is both, and stands once."""
    found = []
    with torch.device("meta"):  # sizes alone
        for name, kind in BACKBONES.items():
            for along in ("width", "depth"):
                for k in config.rungs:
                    if along == "depth" and k == 1:
                        continue
                    sizes = kind.Config().ladder(k, along)
                    backbone = kind(config.num_fields, config.embedding_dim, sizes)
                    found.append(Rung(name, along, k, backbone.num_parameters(), backbone.flops()))
    return found
