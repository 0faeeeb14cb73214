"""What embeddings are made of, and whose they are."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

EmbeddingKind = Literal["tables"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How ids become vectors."""

    embeddings: Annotated[EmbeddingKind, arg(aliases=["--embeddings"])] = "tables"
    """tables: one vector an id, as TorchRec shards them."""
    embedding_dim: int = 16
    """Columns of every table; a multiple of 4."""
    init_scale: float = 0.01
    """Tables start uniform in [-init_scale, init_scale)."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            right = max(4, -(-self.embedding_dim // 4) * 4)
            raise ValueError(f"embedding_dim {self.embedding_dim} must be a multiple of 4; {right} is")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale {self.init_scale} must be a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose embeddings: a member, or all members together."""

    name: str
    seed: str
    """What initial values are drawn from, with the table's name after it."""
    config: EmbeddingConfig
