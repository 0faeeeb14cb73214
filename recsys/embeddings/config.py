"""What embeddings are made of, and whose they are."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

from tyro.conf import arg

from recsys.config import nearest

MAX_ROWS = 2**31 - 3
TABLE_SEPARATOR = "/"
"""Between the names of an owner and a feature in that of a table."""

Eviction = Literal["lfu", "lru", "none"]
EmbeddingKind = Literal["tables", "dynamic", "robe", "qr", "mixed"]
COMPRESSED = ("robe", "qr", "mixed")
"""Kinds that `compression` is for."""
TableDtype = Literal["fp32", "fp16", "bf16"]
ServedDtype = Literal["fp32", "fp16", "int8", "int4", "int2"]
"""What tables can be turned into for inference."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How ids become vectors."""

    embeddings: Annotated[EmbeddingKind, arg(aliases=["--embeddings"])] = "tables"
    """tables: one vector an id, as TorchRec shards them. dynamic: vectors go to the ids that are used, as they come.
    The others have `compression` times fewer floats. robe: all vectors lie in one array, where a hash of the id says.
    qr: a vector is made of one of the id's quotient and one of its remainder. mixed: the more ids a feature has, the
    shorter its vectors, which a layer brings to embedding_dim."""
    embedding_dim: int = 16
    """Columns of every table; a multiple of 4."""
    init_scale: float = 0.01
    """Tables start uniform in [-init_scale, init_scale)."""
    compression: Annotated[float, arg(aliases=["--compression"])] = 1.0
    """How many times fewer floats than whole tables robe, qr and mixed have, over all features."""
    block_size: int = 32
    """Floats of a robe that stay together, which is fast; fewer mix better, down to 1."""
    sign: bool = False
    """Whether a robe's blocks count positive or negative, as a hash of the id says, so that those that share floats do
    not all push the same way."""
    combine: Literal["multiply", "add"] = "multiply"
    """How qr makes one vector of two; multiply is exact only for features of one id a row."""
    rows: int = 100_000
    """Of each dynamic table: as many ids can have a vector of their own at a time. May change when a run goes on."""
    admission: int = 0
    """How often a dynamic table must have seen an id before it gets a vector of its own; ids without share one."""
    eviction: Eviction = "lfu"
    """Whose vector of a full dynamic table goes to a new id: lfu, the id's that was seen least often, lru, the id's
    that was not seen for longest, or none."""
    eviction_interval: int = 100
    """Steps between evictions."""
    map_buckets: int = 48
    """Parts of the map from ids to rows, with as many rows each; a multiple of the ranks."""
    table_dtype: TableDtype = "fp32"
    """What tables hold their values in; fp16 and bf16 take half the memory, and bf16 needs a CUDA device. Optimizers
    and members compute in fp32."""
    stochastic_rounding: bool = False
    """Round updates of fp16 and bf16 tables up or down at random, so that small ones are not lost on average; needs a
    CUDA device."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            right = max(4, -(-self.embedding_dim // 4) * 4)
            raise ValueError(f"embedding_dim {self.embedding_dim} must be a multiple of 4; {right} is")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale {self.init_scale} must be a finite number above 0")
        self._check_compression()
        for name, least in (("map_buckets", 1), ("eviction_interval", 1), ("admission", 0), ("rows", self.map_buckets)):
            if getattr(self, name) < least:
                why = ", one a map_bucket" if name == "rows" else ""
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}{why}")
        for name in ("rows", "admission"):
            if getattr(self, name) > MAX_ROWS:
                raise ValueError(f"{name} {getattr(self, name)} must be at most {MAX_ROWS:,}")
        if self.eviction not in get_args(Eviction):
            raise ValueError(f"unknown eviction {self.eviction!r}; {nearest(self.eviction, get_args(Eviction))}")

    def _check_compression(self) -> None:
        if not 1 <= self.compression < math.inf:
            raise ValueError(f"compression {self.compression:g} must be a finite number of at least 1")
        if self.compression != 1 and self.embeddings not in COMPRESSED:
            raise ValueError(
                f"compression {self.compression:g} is not for embeddings {self.embeddings}; use {', '.join(COMPRESSED)}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} must be at least 1; 32 is fast")
        if self.embeddings == "robe" and self.table_dtype != "fp32":
            raise ValueError(f"table_dtype {self.table_dtype} is not for embeddings robe, whose array is fp32")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose embeddings: a member, or all members together."""

    name: str
    seed: str
    """What initial values are drawn from, with the table's name after it."""
    config: EmbeddingConfig


def served_dtype(text: str) -> ServedDtype:
    """Read a `ServedDtype`.

    Raises:
        ValueError: there is no such one, with those that there are.
    """
    known = get_args(ServedDtype)
    if text not in known:
        raise ValueError(f"tables {text!r} cannot be: {nearest(text, known)}")
    return cast(ServedDtype, text)
