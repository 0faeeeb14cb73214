"""Clusters: what a rank can hold, how fast it reads, sends and multiplies."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from recsys.config import InputError, load_file, nearest

GIB = 2**30

PHASES = ("input_dist", "lookup", "output_dist", "dense", "gradient_dist", "update", "all_reduce")
"""Of a step, in order: ids go to where tables live; are looked up; pooled embeddings come back; forward and backward of
the dense part; gradients go to the tables; tables are updated; dense gradients are averaged."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a phase takes on one rank: the sum of its parts, the slower of both links counting.

    What is None takes no time.

    seconds = call_us calls + peer_us peers + field_us fields + id_ns ids + memory bytes / memory_gbs
              + max(bytes within the node / node_gbs, bytes between nodes / network_gbs)

    On a CPU, whose cores copy what goes over either link, the sum of both takes the place of the slower.
    """

    call_us: float = 0.0
    """A kernel or collective."""
    peer_us: float = 0.0
    """Another rank of a collective."""
    field_us: float = 0.0
    """A shard of a table that takes part."""
    id_ns: float = 0.0
    """An id, or a row's count of ids."""
    memory_gbs: float | None = None
    """Gigabytes a second from and to the memory where tables lie."""
    node_gbs: float | None = None
    """Gigabytes a second between ranks of one node, each way."""
    network_gbs: float | None = None
    """Gigabytes a second between nodes, for each rank and way."""

    def __post_init__(self) -> None:
        for name in ("call_us", "peer_us", "field_us", "id_ns"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        for name in ("memory_gbs", "node_gbs", "network_gbs"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} {rate} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One rank: an accelerator (or a process on a CPU) with its share of the node around it.

    Figures are peaks of data sheets; the shares say how much of them is reached.
    """

    name: str
    memory_gib: float
    """Memory of the accelerator; of a rank's share of the node on a CPU."""
    memory_gbs: float
    node_gbs: float
    """Between ranks of a node, each way, a rank."""
    network_gbs: float
    """Between nodes, each way, a rank."""
    tflops_fp32: float
    """Of fp32 matrix products as torch computes them by default, TF32 left off."""
    tflops_bf16: float
    host_gib: float = 0.0
    """Host memory a rank, for tables under the UVM kernels; 0 where there are none."""
    host_gbs: float = 0.0
    """Between accelerator and host memory, each way."""
    ssd_gib: float = 0.0
    ssd_gbs: float = 0.0
    device: str = "cuda"
    """cuda or cpu, in torch's words."""
    gather_share: float = 0.5
    """Of memory_gbs, when rows are read or written here and there."""
    link_share: float = 0.7
    """Of node_gbs and network_gbs, in all-to-alls of useful size."""
    flops_share: float = 0.4
    call_us: float = 10.0
    """Of a kernel."""
    field_us: float = 0.3
    """Of a table's shard in each phase."""
    collective_us: float = 25.0
    network_us: float = 15.0
    """What a collective takes longer between nodes."""
    cores: int = 0
    """On a CPU: cores of a node; more ranks than cores take turns."""
    rates: dict[str, Rates] = field(default_factory=dict)
    """Measured rates of phases, which count instead of the figures above; see `recsys shard-bench`."""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "memory_gbs", "node_gbs", "network_gbs", "tflops_fp32", "tflops_bf16"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        for name in ("gather_share", "link_share", "flops_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in (0, 1]")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device {self.device!r} must be cuda or cpu")
        for phase in self.rates:
            if phase not in PHASES:
                raise ValueError(f"rates names {phase!r}; {nearest(phase, PHASES)}")

    def rate(self, phase: str, across_nodes: bool) -> Rates:
        """Rates of a phase, measured or from the data sheet."""
        if phase in self.rates:
            return self.rates[phase]
        if phase in ("lookup", "update"):
            gather = self.memory_gbs * self.gather_share
            return Rates(call_us=self.call_us, field_us=self.field_us, memory_gbs=gather)
        if phase == "dense":
            return Rates()
        return Rates(
            call_us=self.collective_us + (self.network_us if across_nodes else 0.0),
            field_us=self.field_us if phase != "all_reduce" else 0.0,
            memory_gbs=self.memory_gbs,
            node_gbs=self.node_gbs * self.link_share,
            network_gbs=self.network_gbs * self.link_share,
        )

    def flops(self, precision: str) -> float:
        """FLOPs a second that are reached."""
        peak = {"bf16": self.tflops_bf16, "fp16": self.tflops_bf16, "tf32": self.tflops_bf16 / 2}
        return peak.get(precision, self.tflops_fp32) * 1e12 * self.flops_share


def _gpu(name: str, **figures: float) -> Hardware:
    return Hardware(name=name, device="cuda", **figures)  # type: ignore[arg-type]


# Peaks of NVIDIA's data sheets (SXM): HBM size and bandwidth, NVLink one way (half of what is advertised), one 200 or
# 400 Gb/s adapter a GPU, dense TFLOPs. Host memory is that of a DGX (1 to 2 TB a node of eight; 240 GB a GPU of a
# GB200), its link PCIe 4 or 5 x16, or NVLink-C2C, a half of a superchip's for each of two GPUs.
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100-40", memory_gib=37.2, memory_gbs=1555, node_gbs=300, network_gbs=25, tflops_fp32=19.5,
             tflops_bf16=312, host_gib=119, host_gbs=32, ssd_gib=1700, ssd_gbs=3),
        _gpu("a100-80", memory_gib=79.2, memory_gbs=2039, node_gbs=300, network_gbs=25, tflops_fp32=19.5,
             tflops_bf16=312, host_gib=238, host_gbs=32, ssd_gib=3500, ssd_gbs=6),
        _gpu("h100", memory_gib=79.2, memory_gbs=3350, node_gbs=450, network_gbs=50, tflops_fp32=67,
             tflops_bf16=989, host_gib=238, host_gbs=64, ssd_gib=3500, ssd_gbs=7),
        _gpu("h200", memory_gib=139.8, memory_gbs=4800, node_gbs=450, network_gbs=50, tflops_fp32=67,
             tflops_bf16=989, host_gib=238, host_gbs=64, ssd_gib=3500, ssd_gbs=7),
        _gpu("b200", memory_gib=178.4, memory_gbs=8000, node_gbs=900, network_gbs=50, tflops_fp32=75,
             tflops_bf16=2250, host_gib=238, host_gbs=64, ssd_gib=3500, ssd_gbs=7),
        _gpu("gb200", memory_gib=184.3, memory_gbs=8000, node_gbs=900, network_gbs=50, tflops_fp32=80,
             tflops_bf16=2500, host_gib=223, host_gbs=225, ssd_gib=3500, ssd_gbs=7),
        # Two cores of an AMD EPYC, 2 and 4 processes over gloo, two nodes played by one machine; rates are fitted by
        # `recsys shard-bench` (benchmarks/README.md).
        Hardware(
            name="cpu", device="cpu", memory_gib=10, memory_gbs=8, node_gbs=1.5, network_gbs=1.0, tflops_fp32=0.2,
            tflops_bf16=0.8, flops_share=0.216, gather_share=0.5, call_us=50, collective_us=300, network_us=300,
            cores=2,
            rates={
                "input_dist": Rates(call_us=754, peer_us=285, field_us=67.9, id_ns=9.33, node_gbs=8, network_gbs=8),
                "lookup": Rates(call_us=909, field_us=6.64, memory_gbs=7.67),
                "output_dist": Rates(call_us=683, peer_us=220, field_us=28.7, id_ns=14, node_gbs=0.914,
                                     network_gbs=0.595),
                "dense": Rates(call_us=1180, memory_gbs=80),
                "gradient_dist": Rates(call_us=556, peer_us=243, id_ns=8.9, node_gbs=0.694, network_gbs=0.324),
                "update": Rates(call_us=482, field_us=5.43, id_ns=8.02, memory_gbs=12.3),
                "all_reduce": Rates(call_us=146, peer_us=403, node_gbs=1.11, network_gbs=1.91),
            },
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks in nodes. A node is the reach of the fast links: eight GPUs of a server, or all 72 of an NVL72 rack."""

    hardware: Hardware
    ranks_per_node: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.nodes < 1:
            raise ValueError(
                f"a cluster of {self.nodes} nodes of {self.ranks_per_node} ranks; it needs at least 1 of each"
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.ranks_per_node * self.nodes

    @property
    def name(self) -> str:
        """As `parse_cluster` reads it."""
        return f"{self.hardware.name}x{self.ranks_per_node}x{self.nodes}"

    def shared(self, seconds: np.ndarray) -> np.ndarray:
        """What phases take [ranks, phases] that would take `seconds` if every rank had a core of its own.

        Ranks that share cores slow one another as far as they work at once: a node ends a phase no sooner than its
        busiest rank would alone, nor than all of its cores could have done all of its work.
        """
        cores = self.hardware.cores
        if not cores or self.ranks_per_node <= cores:
            return seconds
        nodes = seconds.reshape(self.nodes, self.ranks_per_node, -1)
        busiest = nodes.max(axis=1, keepdims=True)
        longer = nodes.sum(axis=1, keepdims=True) / cores / np.maximum(busiest, 1e-30)
        slowed: np.ndarray = (nodes * np.maximum(longer, 1.0)).reshape(seconds.shape)
        return slowed

    def group(self, replicas: int) -> "Cluster":
        """The ranks that hold one copy of the tables, where `replicas` groups hold one each.

        Raises:
            InputError: the ranks cannot be divided so.
        """
        if self.nodes % replicas == 0:
            return replace(self, nodes=self.nodes // replicas)
        if self.nodes == 1 and self.ranks_per_node % replicas == 0:
            return replace(self, ranks_per_node=self.ranks_per_node // replicas)
        raise InputError(
            f"{self.name}: {replicas} replicas cannot share {self.nodes} nodes of {self.ranks_per_node} ranks evenly; "
            "give a divisor of the nodes"
        )


_CLUSTER = re.compile(r"(?P<name>.+?)(?:x(?P<ranks>\d+))?(?:x(?P<nodes>\d+))?", re.ASCII)


def parse_cluster(text: str) -> Cluster:
    """Read NAME, NAMExRANKS or NAMExRANKSxNODES; NAME is a hardware profile, or a YAML or JSON file that holds one.

    Raises:
        InputError: an unknown profile, with the nearest right one; a file that holds none.
    """
    match = _CLUSTER.fullmatch(text)
    assert match, "the pattern takes any text"
    name, ranks, nodes = match["name"], int(match["ranks"] or 1), int(match["nodes"] or 1)
    if name.endswith((".yaml", ".yml", ".json")):
        if not Path(name).exists():
            raise InputError(f"--cluster {text}: no such file as {name}")
        hardware = load_file(Hardware, Path(name))
    elif name in HARDWARE:
        hardware = HARDWARE[name]
    else:
        raise InputError(
            f"--cluster {text}: unknown hardware {name!r}; {nearest(name, HARDWARE)} (or a YAML file of your own, with "
            "ranks a node and nodes after it, as in h200x8x16)"
        )
    try:
        return Cluster(hardware=hardware, ranks_per_node=ranks, nodes=nodes)
    except ValueError as error:
        raise InputError(f"--cluster {text}: {error}") from None
