"""Fit a hardware profile's rates to measured phases.

The seconds of a phase on a rank are linear in its rates (see `Rates`), with amounts of work as coefficients: calls,
tables, ids, bytes. The cost model itself is asked for the amounts, by pricing a plan at one unit of one rate at a time.
What ranks make of it together, see `Cluster.shared`, is linear too once it is known which rank is the busiest, or that
the cores are: that is looked up at the rates so far, rates are fitted, and so on until nothing changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from recsys.sharding.cluster import PHASES, Cluster, Hardware, Rates
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import Plan
from recsys.sharding.quote import quote
from recsys.sharding.workload import Workload

FIELDS = tuple(field.name for field in fields(Rates))
ROUNDS = 100
SETTLED = 1e-4
"""Relative change of all weights at which a fit is done."""
CLOSE = 0.05
"""Distances below this count as this: a case may not draw all weight to itself."""
NEGLIGIBLE = 1e-9
"""Seconds below which a phase is not predicted."""
CACHED = 10
"""How much faster than the profile's memory what lies in caches may be read."""


@dataclass(frozen=True)
class Amounts:
    """Of work in one case.

    Args:
        work: what each rate is multiplied by, by rank and phase [ranks, phases, fields].
        flops: seconds of the dense part at one FLOP a second, by rank [ranks].
        cluster: what ran it.
    """

    work: np.ndarray
    flops: np.ndarray
    cluster: Cluster

    def any(self, phase: str) -> bool:
        """Whether there is any work in a phase."""
        return bool(self.columns(PHASES.index(phase)).any())

    def columns(self, phase: int) -> np.ndarray:
        """Coefficients of a phase's weights [ranks, fields], FLOPs last."""
        flops = self.flops if PHASES[phase] == "dense" else np.zeros_like(self.flops)
        return np.column_stack([self.work[:, phase], flops])

    def busiest(self, phase: int, weights: np.ndarray) -> np.ndarray:
        """Coefficients of what the phase takes [fields]: those of its busiest rank, or of a node's cores' share."""
        columns, cluster = self.columns(phase), self.cluster
        seconds, cores = columns @ weights, cluster.hardware.cores
        busiest: np.ndarray = columns[seconds.argmax()]
        if cores and cluster.ranks_per_node > cores:
            by_node = columns.reshape(cluster.nodes, cluster.ranks_per_node, -1).sum(axis=1) / cores
            fullest = by_node[(by_node @ weights).argmax()]
            if fullest @ weights > busiest @ weights:
                return fullest
        return busiest


def amounts(workload: Workload, plan: Plan, cluster: Cluster) -> Amounts:
    """Ask the cost model what work a plan is."""

    def priced(workload: Workload, rates: Rates, tflops: float) -> np.ndarray:
        hardware = replace(
            cluster.hardware,
            rates=dict.fromkeys(PHASES, rates),
            tflops_fp32=tflops,
            tflops_bf16=tflops,
            flops_share=1.0,
            cores=0,
        )
        alone = quote(plan, CostModel(workload, replace(cluster, hardware=hardware)))
        return alone.seconds

    flops = priced(workload, Rates(), 1e-12)[:, PHASES.index("dense")]
    still = replace(workload, dense_flops=1)  # so few that they take no time, but there they are
    work = [priced(still, Rates(**{name: 1.0}), 1e30) for name in FIELDS]
    rest = priced(still, Rates(), 1e30)
    return Amounts(np.stack(work, axis=-1) - rest[..., None], flops, cluster)


def fit(every: Sequence[Amounts], measured: np.ndarray, phase: str, hardware: Hardware) -> np.ndarray:
    """Weights [fields and FLOPs], none negative, with the least sum of how far predictions are off, as factors.

    Non-negative least squares on (p - m) / sqrt(p m), which twice and half as long are equally far by, p being what was
    predicted by the weights before; each case is then given the less weight the further off it is, so that what is made
    least is the sum of distances and not of their squares, and a case that was disturbed counts no more than another.

    Args:
        every: cases.
        measured: seconds that the phase took in each [cases].
        phase: of `PHASES`.
        hardware: gives the weight of what no case has any of, and bounds speeds: else noise could make bytes free.
    """
    at = PHASES.index(phase)
    known, least = _weights(hardware.rate(phase, across_nodes=True)), np.zeros(len(FIELDS) + 1)
    for index, name in enumerate(FIELDS):
        if name.endswith("_gbs"):
            least[index] = 1 / hardware.memory_gbs / (CACHED if name == "memory_gbs" else 1)
    weights = known
    for _ in range(ROUNDS):
        rows = np.stack([case.busiest(at, weights) for case in every])
        predicted = np.maximum(rows @ weights, NEGLIGIBLE)
        off = np.abs(predicted - measured) / np.sqrt(predicted * measured)
        rows, wanted = (
            (values.T / np.sqrt(predicted * measured * np.maximum(off, CLOSE))).T for values in (rows, measured)
        )
        scale = np.linalg.norm(rows, axis=0)
        seen = scale > 0
        scale[~seen] = 1.0
        above = nnls(rows / scale, np.maximum(wanted - rows @ least, 0.0))[0] / scale
        before, weights = weights, np.where(seen, least + above, known)
        if np.allclose(before, weights, rtol=SETTLED, atol=0.0):
            break
    return weights


def predict(work: Amounts, phase: str, weights: np.ndarray) -> float:
    """Seconds that a phase takes at these weights."""
    at = PHASES.index(phase)
    return float(work.busiest(at, weights) @ weights)


def profile(hardware: Hardware, weights: Mapping[str, np.ndarray]) -> Hardware:
    """The profile with these weights by phase as rates; FLOPs a second come from the dense phase."""
    rates = {phase: _rates(values) for phase, values in weights.items()}
    fitted = replace(hardware, rates={**hardware.rates, **rates})
    dense = weights.get("dense")
    if dense is None or not dense[-1]:
        return fitted
    return replace(fitted, flops_share=_share(hardware, float(dense[-1])))


def _weights(rates: Rates) -> np.ndarray:
    values = [getattr(rates, name) for name in FIELDS]
    speeds = [name.endswith("_gbs") for name in FIELDS]
    return np.array(
        [1 / value if speed and value else value or 0.0 for speed, value in zip(speeds, values, strict=True)] + [0.0]
    )


def _rates(weights: np.ndarray) -> Rates:
    named: dict[str, Any] = {}
    for name, weight in zip(FIELDS, weights.tolist(), strict=False):
        if name.endswith("_gbs"):
            named[name] = _rounded(1 / weight) if weight else None
        else:
            named[name] = _rounded(weight)
    return Rates(**named)


def _share(hardware: Hardware, seconds: float) -> float:
    return min(1.0, _rounded(1 / seconds / (hardware.tflops_fp32 * 1e12)))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def relative_errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """How far predictions are from what was measured, as a share of the latter."""
    errors: np.ndarray = np.abs(predicted - measured) / measured
    return errors
