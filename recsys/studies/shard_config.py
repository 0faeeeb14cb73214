"""The config of `recsys shard-bench`. It imports no torch, so that help is instant."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.config import nearest
from recsys.sharding.plan import TYPES


@dataclass(frozen=True, kw_only=True)
class ShardBenchConfig:
    """Run sharding plans on what is at hand, and set what was predicted beside what was measured, phase by phase.

    Started alone, it starts ranks itself, as many as --ranks says, one count after another. Started by torchrun or
    torchx, it measures the ranks of that job. A case is one sharding type for all tables, a batch size, pooling factor,
    dimension and number of tables; cases are drawn from the product of all of these in a random order, the same for
    the same seed, as many as --seconds allow. Rates of the hardware profile are fitted to one half of them and judged
    by the other.
    """

    out: Path = Path("shard-bench.json")
    """File for all that was measured and predicted."""
    picture: Path | None = None
    """PNG of predicted against measured; beside `out` if left out."""
    calibrate: Path | None = None
    """Write the hardware profile with fitted rates to this YAML file, which --cluster and --sharding.hardware read."""
    hardware: str | None = None
    """Profile (or a YAML file) by which cases are predicted before it is fitted; that of this machine if left out."""
    seconds: float = 240.0
    """Stop measuring after about so long, all counts of ranks together."""
    types: tuple[str, ...] = TYPES
    """Sharding types."""
    ranks: tuple[int, ...] = (2, 4)
    """Counts of ranks to start. Four and more are also measured as two nodes, by the types that nodes matter to."""
    batch_sizes: tuple[int, ...] = (256, 2048, 8192)
    """Rows of a global batch."""
    poolings: tuple[int, ...] = (1, 10)
    """Ids that a row looks up in each table."""
    dims: tuple[int, ...] = (16, 64, 128)
    """Columns of the tables."""
    num_tables: tuple[int, ...] = (2, 8)
    """Tables of a case."""
    rows: tuple[int, ...] = (1_000, 100_000, 20_000)
    """Rows of the tables, given to them in turn."""
    rounds: int = 2
    """Times that ranks are started anew and all cases measured once more, so that what else the machine does in the
    meantime meets them all alike."""
    repeats: int = 24
    """Steps of a case in all rounds together; turns of plans that are compared."""
    statistic: Literal["median", "low"] = "median"
    """What counts of them: the median, or the quickest, where other processes disturb the machine now and then."""
    case_seconds: float = 3.0
    """Take fewer steps where they would last longer, but at least three in each round."""
    compare_plans: bool = False
    """Also measure steps under plans of our search, priced by the fitted profile, and of TorchRec's own planner."""
    seed: int = 0
    """Of the order of cases, and of which half each is in."""

    def __post_init__(self) -> None:
        for sharding_type in self.types:
            if sharding_type not in TYPES:
                raise ValueError(f"--types: unknown sharding type {sharding_type!r}; {nearest(sharding_type, TYPES)}")
        for name in ("types", "ranks", "batch_sizes", "poolings", "dims", "num_tables", "rows"):
            values = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            if not values:
                raise ValueError(f"{option} is empty; give at least one")
            if name != "types" and min(values) < 1:
                raise ValueError(f"{option} {min(values)} must be at least 1")
        for dim in self.dims:
            if dim % 4:
                raise ValueError(f"--dims {dim} must be a multiple of 4: FBGEMM wants rows of a multiple of 16 bytes")
        if self.repeats < 3:
            raise ValueError(f"--repeats {self.repeats} must be at least 3, else noise decides")
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds} must be at least 1")
        for name in ("seconds", "case_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
