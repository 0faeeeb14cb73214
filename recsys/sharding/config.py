"""What a run may say about its sharding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.sharding.plan import Kernel, ShardingType
from recsys.sharding.quote import RESERVE

Comms = Literal["fp32", "fp16", "bf16", "int8"]
Proposer = Literal["search", "greedy", "uniform", "grid_search", "dynamic_programming", "memory_balanced"]


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where tables live: chosen within these bounds, or a plan from a file."""

    types: tuple[ShardingType, ...] = ()
    """Sharding types that the planner may choose from; it has its own list if empty."""
    kernels: tuple[Kernel, ...] = ("fused",)
    """Compute kernels that it may choose from: fused keeps tables on the device, fused_uvm in host memory,
    fused_uvm_caching in host memory with a cache on the device, key_value on an SSD."""
    constraints: tuple[str, ...] = ()
    """Of single tables: TABLE=TYPE+TYPE:KERNEL, such as 'dcnv2/C3=row_wise' or 'dcnv2/*=:fused_uvm_caching'; the
    last that names a table counts."""
    plan: Path | None = None
    """Use this plan, of `recsys plan` or changed by hand, and look for no other."""
    proposer: Proposer = "search"
    """Who looks for a plan: our own search, or one of TorchRec's proposers with our prices."""
    proposer_minutes: float = 10.0
    """What one of TorchRec's proposers may take, by estimate; those that would take longer do not begin."""
    hardware: str | None = None
    """Hardware profile (or a YAML file) by which plans are priced; that of this machine if left out."""
    reserve: float = RESERVE
    """Share of device memory that plans leave free."""
    comms: Comms = "fp32"
    """What pooled embeddings are sent as."""
    gradient_comms: Comms = "fp32"
    """What their gradients are sent as."""
    replicas: int = 1
    """2-D parallelism: groups of ranks that hold a copy of all tables each, averaged every `sync_every` steps. More
    than 1 needs CUDA devices, and trains another model than 1 does, since copies learn apart between averages."""
    sync_every: int = 1
    """Steps between averages of the copies."""

    def __post_init__(self) -> None:
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve {self.reserve} must lie in [0, 1)")
        if not self.proposer_minutes > 0:
            raise ValueError(f"proposer_minutes {self.proposer_minutes} must be above 0")
        for name in ("replicas", "sync_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.kernels:
            raise ValueError("kernels is empty; fused is the usual one")
