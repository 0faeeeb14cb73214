"""What stands between matrix products alone, forward and backward: our operators on a CPU beside PyTorch's.

Both take turns on the same values, at the sizes that backbones of the recipes *_paper have. Where a layer's product is
part of a piece, its input has one column, so that it costs next to nothing.

    python benchmarks/between.py --json between.json
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from facts import facts
from harness import Runner, Summary, Turns, append, measure, result, speedup, summary
from jobs import quieten_libraries
from recsys.backbones.fused import Norm, bias_gelu, cross_layer, linear_relu, mix_norm, transposed, unfused, wukong_norm
from recsys.config import InputError
from recsys.distributed import process_group
from recsys.native import available, instructions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what stands between matrix products."""

    batch_size: int = 8192
    """Rows of a batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of values; parameters are float32."""
    timing: Annotated[Turns, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: Turns(seconds=0.2, least_steps=2, warmup_steps=2)
    )
    json: Path | None = None
    """Append results to this file, one line each; `recsys bench compare` compares two such files."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")


PHASES = ("forward", "backward")
OURS, PYTORCH = "ours", "pytorch"
Piece = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]
"""A function, and the shapes of the values that it takes."""


def pieces(batch_size: int) -> dict[str, Piece]:
    """By name, at a batch size."""
    rows, narrow = batch_size, nn.LayerNorm(16)
    norm, wide = Norm(128), Norm(936)
    bias_TN = nn.Parameter(torch.randn(8, 512))
    cross, dense = nn.Linear(1, 624), nn.Linear(1, 1024)
    return {
        "RankMixer: bias, GELU": (lambda z: bias_gelu(z, bias_TN), ((8, rows, 512),)),
        "RankMixer: mix, add, norm": (lambda x: mix_norm(norm, x), ((8, rows, 128),)),
        "RankMixer: add, norm": (norm, ((8, rows, 128), (8, rows, 128))),
        "Wukong: norm of products": (wide, ((rows, 936),)),
        "Wukong: join, add, norm": (lambda fm, z: wukong_norm(narrow, fm, z, None), ((rows, 256), (rows, 16, 48))),
        "Wukong: transpose": (transposed, ((rows, 39, 16),)),
        "DCNv2: cross layer": (lambda x0, x, h: cross_layer(x0, cross, h, x), ((rows, 624), (rows, 624), (rows, 1))),
        "MLP: bias, ReLU": (lambda x: linear_relu(dense, x), ((rows, 1),)),
    }


def autocast(dtype: torch.dtype) -> torch.autocast:
    """As members have it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


def phase_of(piece: Piece, phase: str, ours: bool, dtype: torch.dtype) -> Runner:
    """Time forward or backward alone."""
    function, shapes = piece
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    with torch.no_grad(), autocast(dtype):
        grad = torch.randn_like(function(*(value.clone() for value in values)))

    def run(steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            inputs = [value.clone().requires_grad_() * 1 for value in values]  # a piece may use its inputs up
            started = time.perf_counter()
            with nullcontext() if ours else unfused(), autocast(dtype):
                out = function(*inputs)
            middle = time.perf_counter()
            out.backward(grad)  # type: ignore[no-untyped-call]
            seconds += middle - started if phase == "forward" else time.perf_counter() - middle
        return seconds

    return run


def main(config: Config) -> list[dict[str, Any]]:
    """Measure every piece; show and keep the results.

    Raises:
        InputError: there is nothing of ours to measure.
    """
    if not available("fused"):
        raise InputError("our operators are not built here; `make setup` builds them")
    load_at_start = os.getloadavg()
    dtype = DTYPES[config.precision]
    found: list[tuple[str, dict[str, Summary], dict[str, Summary]]] = []
    with process_group():
        for name, piece in pieces(config.batch_size).items():
            cases = {
                f"{phase}_{who}": phase_of(piece, phase, who == OURS, dtype)
                for phase in PHASES
                for who in (OURS, PYTORCH)
            }
            seconds = measure(cases, config.timing)
            times = {f"{case}_ms": summary([1e3 * turn for turn in turns]) for case, turns in seconds.items()}
            ratios = {
                f"{phase}_ratio_to_pytorch": speedup(seconds[f"{phase}_{OURS}"], seconds[f"{phase}_{PYTORCH}"])
                for phase in PHASES
            }
            found.append((name, times, ratios))
    origin = facts(__file__, ("torch",), load_at_start)
    results = [
        result(
            "between",
            {"piece": name, "batch_size": config.batch_size, "precision": config.precision},
            times | {"instructions": instructions(), "threads": torch.get_num_threads()},
            ratios,
            origin,
        )
        for name, times, ratios in found
    ]
    Console().print(shown(results))
    if config.json:
        append(config.json, results)
    return results


def shown(results: list[dict[str, Any]]) -> Table:
    """Milliseconds, and how many times as fast ours are."""
    table = Table(title="ours / PyTorch, ms")
    table.add_column("piece", no_wrap=True)
    for phase in PHASES:
        for column in (phase, "ratio"):
            table.add_column(column, justify="right")
    for line in results:
        cells = []
        for phase in PHASES:
            ours, pytorch = (line["metrics"][f"{phase}_{who}_ms"]["median"] for who in (OURS, PYTORCH))
            cells += [f"{ours:.2f} / {pytorch:.2f}", f"{line[f'{phase}_ratio_to_pytorch']:.1f}"]
        table.add_row(line["config"]["piece"], *cells)
    return table


if __name__ == "__main__":
    quieten_libraries()
    try:
        main(tyro.cli(Config))
    except InputError as error:
        print(f"between: {error}", file=sys.stderr)
        sys.exit(2)
