"""What a run gets out of its machine: rows, ids and model FLOPs a second, and where the time of a step goes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

MATRICES = {"cpu": 512, "cuda": 8192}
REPEATS = 5
BACKWARD_TOO = 3
"""Training takes twice the forward's FLOPs again: the gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Turns steps and seconds into rates.

    MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022, appendix B) counts the matrix products of the dense
    layers alone, forward and backward, over what all devices could do. Looking up and updating tables, which often
    bounds a recommender, has no FLOPs in it: a low MFU need not mean a bad one.
    """

    batch_size: int
    """Rows of a global batch."""
    ids_per_row: float
    """Ids of a row, over all features; each member looks all of them up."""
    dense_flops: float
    """Of one row's forward, over all members; see recsys.training.workload."""
    num_devices: int
    peak_flops: float
    """FLOP/s of one device: a data sheet's, or `measured_peak`."""

    def record(self, steps: int, seconds: float, phases: Mapping[str, float]) -> dict[str, object]:
        """What a log line says of some steps.

        Args:
            steps: how many.
            seconds: that they took.
            phases: seconds of each phase within them, on this rank.
        """
        rows_per_s = steps * self.batch_size / seconds
        flops_per_s = BACKWARD_TOO * self.dense_flops * rows_per_s
        return {
            "rows_per_s": rows_per_s,
            "ids_per_s": rows_per_s * self.ids_per_row,
            "mfu": flops_per_s / (self.peak_flops * self.num_devices),
            "step_ms": 1e3 * seconds / steps,
            "phase_ms": {name: 1e3 * spent / steps for name, spent in phases.items()},
        }


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, the best of five: of 8,192 on CUDA, 512 on a CPU with its threads.

    It is what a big dense layer can reach here and no data sheet's peak, so an MFU over it is the higher one.
    """
    size = MATRICES[device.type]
    square = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        product = square @ square
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
