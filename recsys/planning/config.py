"""What `recsys plan` is asked for. It imports no torch, so that help is instant."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from recsys.config import InputError
from recsys.place import Place
from recsys.sharding.config import ShardingConfig
from recsys.sharding.workload import OptimizerKind


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What to plan for otherwise than the recipe has it."""

    data: Place | None = None
    """Prepared folder; its schema says which tables there are."""
    members: tuple[str, ...] = ()
    """Members, as `recsys train` takes them; each has tables of its own."""
    batch_size: int | None = None
    """Rows of a global batch."""
    embedding_dim: int | None = None
    """Columns of every table."""
    table_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """What tables hold their values in."""
    optimizer: OptimizerKind | None = None
    """Of the tables."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "embedding_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Changes):
    """Which cluster to plan for, and what to write."""

    cluster: str
    """HARDWARExRANKSxNODES: h200x8x16 are 16 nodes of 8. Hardware is a100-40, a100-80, h100, h200, b200, gb200, cpu, or
    a YAML file of your own."""
    out: Path | None = None
    """Write the plan, for `--sharding.plan` of `recsys train`, to read or to change by hand."""
    json: Path | None = None
    """Write all figures, rank by rank."""
    heat: Path | None = None
    """Draw ranks x tables: a PNG or HTML file."""
    show: int = 12
    """Tables and ranks to list."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heat and self.heat.suffix not in (".png", ".html"):
            raise ValueError(f"heat {self.heat} must end in .png or .html")

    def check_places(self) -> None:
        """See that what is to be written has a folder.

        Raises:
            InputError: it has none.
        """
        for name in ("out", "json", "heat"):
            path: Path | None = getattr(self, name)
            if path and not path.absolute().parent.is_dir():
                raise InputError(f"--{name} {path}: no such folder to write it to")


@dataclass(frozen=True, kw_only=True)
class DiffConfig(Changes):
    """Two plans to compare."""

    before: Positional[Path]
    """Plan, of `recsys plan --out` or a run's plan.json."""
    after: Positional[Path]
    """Another, of the same tables."""
    recipe: str | None = None
    """Price both for this recipe."""
    cluster: str | None = None
    """On this cluster."""
    show: int = 20
    """Tables to list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recipe is None) != (self.cluster is None):
            raise ValueError("recipe and cluster: give both to have the plans priced, or none")
