"""Work of shards, and what it comes to: seconds by phase, bytes by kind of memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recsys.sharding.cluster import PHASES, Hardware, Rates

MEMORIES = ("device", "host", "ssd")
PARTS = ("weights", "optimizer", "activations", "dense")
"""Of what a rank holds: tables' weights and optimizer state; ids, pooled embeddings and their gradients; the dense part
with its gradients, optimizer and activations."""
CACHED_SHARE = 0.2
"""Share of a table's rows that the caching kernels keep on the device; TorchRec's default load factor."""
CACHE_MISSES = 0.2
"""Share of lookups that miss it: click logs are skewed, so a fifth of the rows answers most of them."""
HELD = {
    "fused": (1.0, 0.0, 0.0),
    "dense": (1.0, 0.0, 0.0),
    "fused_uvm": (0.0, 1.0, 0.0),
    "fused_uvm_caching": (CACHED_SHARE, 1.0, 0.0),
    "key_value": (CACHED_SHARE, 0.0, 1.0),
}
"""Kernel to the share of a table that it keeps in each kind of memory."""

_PHASE = {name: index for index, name in enumerate(PHASES)}


@dataclass
class Cost:
    """Of n shards, each on its rank.

    Args:
        rest: seconds by phase [n, phases] of all but links.
        node: seconds on the links within a node, by phase [n, phases].
        network: seconds on those between nodes.
        bytes: by part and kind of memory [n, parts, memories].
    """

    rest: np.ndarray
    node: np.ndarray
    network: np.ndarray
    bytes: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """By phase [n, phases]."""
        seconds: np.ndarray = self.rest + np.maximum(self.node, self.network)
        return seconds


class Work:
    """Adds up the work of n shards.

    Args:
        hardware: of a rank.
        rates: of each phase.
        count: n.
    """

    def __init__(self, hardware: Hardware, rates: Mapping[str, Rates], count: int) -> None:
        self.hardware, self.rates = hardware, rates
        self.rest, self.node, self.network = (np.zeros((count, len(PHASES))) for _ in range(3))
        self.bytes = np.zeros((count, len(PARTS), len(MEMORIES)))

    def add(
        self, phase: str, *, calls: int = 0, peers: int = 0, fields: int = 0, ids: np.ndarray | float = 0.0
    ) -> None:
        """Add kernels or collectives, other ranks in them, shards that take part, ids and rows' counts of them."""
        rates = self.rates[phase]
        micro = rates.call_us * calls + rates.peer_us * peers + rates.field_us * fields
        self.rest[:, _PHASE[phase]] += micro * 1e-6 + rates.id_ns * ids * 1e-9

    def links(self, phase: str, node_bytes: np.ndarray, network_bytes: np.ndarray) -> None:
        """Send bytes within the node, and between nodes."""
        rates = self.rates[phase]
        node, network = _time(node_bytes, rates.node_gbs), _time(network_bytes, rates.network_gbs)
        if self.hardware.device == "cpu":  # the same cores copy both
            self.rest[:, _PHASE[phase]] += node + network
            return
        self.node[:, _PHASE[phase]] += node
        self.network[:, _PHASE[phase]] += network

    def gather(self, phase: str, kernel: str, table_bytes: np.ndarray, other_bytes: np.ndarray) -> None:
        """Read or write rows where the kernel keeps them, and pooled values on the device."""
        hardware = self.hardware
        on_device = self.rates[phase].memory_gbs
        seconds = _time(other_bytes, on_device)
        if kernel in ("fused", "dense"):
            seconds = seconds + _time(table_bytes, on_device)
        elif kernel == "fused_uvm":
            seconds = seconds + _time(table_bytes, hardware.host_gbs * hardware.gather_share)
        else:
            behind = hardware.host_gbs if kernel == "fused_uvm_caching" else hardware.ssd_gbs
            seconds = seconds + _time(table_bytes, on_device)
            seconds = seconds + CACHE_MISSES * _time(table_bytes, behind * hardware.gather_share)
        self.rest[:, _PHASE[phase]] += seconds

    def hold(self, kernel: str, weights: np.ndarray, state: np.ndarray, activations: np.ndarray) -> None:
        """Hold bytes where the kernel keeps them; activations on the device."""
        shares = np.array(HELD[kernel])
        self.bytes[:, 0] += np.multiply.outer(weights, shares)
        self.bytes[:, 1] += np.multiply.outer(state, shares)
        self.bytes[:, 2, 0] += activations

    def cost(self) -> Cost:
        """What it comes to."""
        return Cost(self.rest, self.node, self.network, self.bytes)


def _time(bytes_: np.ndarray, gbs: float | None) -> np.ndarray:
    return bytes_ / (gbs * 1e9) if gbs else 0.0 * bytes_
