"""Constraints: which sharding types and kernels each table may have."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from recsys.config import InputError, nearest
from recsys.sharding.cluster import Hardware
from recsys.sharding.plan import KERNELS, TYPES
from recsys.sharding.tiling import COLUMN_TYPES
from recsys.sharding.workload import FUSED_ON_CPU, WHOLE_ROWS, OptimizerKind, Workload

AUTO_TYPES = ("table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard")
"""What the planner chooses from. Not data_parallel: its dense gradients cost 3 to 4 times the step on a CPU, and a run
could not be resumed on other ranks where its tables become data-parallel. Not table_column_wise, which is
column_wise with less freedom."""


@dataclass(frozen=True)
class Allowed:
    """What one table may have."""

    types: tuple[str, ...]
    kernels: tuple[str, ...]


def allowed(
    workload: Workload, hardware: Hardware, types: Sequence[str], kernels: Sequence[str], constraints: Sequence[str]
) -> list[Allowed]:
    """What each table may have, in the workload's order.

    Args:
        workload: the tables, and the optimizer, which decides whether columns may be split.
        hardware: where they will be; a CPU has no UVM.
        types: for all tables; empty for the planner's choice.
        kernels: for all tables.
        constraints: `PATTERN=TYPES`, `PATTERN=TYPES:KERNELS` or `PATTERN=:KERNELS`, several joined by +; the pattern
            is a table's name, or a shell pattern (`dcnv2/C*`); later ones count before earlier ones.

    Raises:
        InputError: an unknown type or kernel, a pattern that no table has, or what the optimizer or hardware rules out.
    """
    for name in types:
        _known("sharding type", name, TYPES, "--sharding.types")
    for name in kernels:
        _known("kernel", name, KERNELS, "--sharding.kernels")
    if tuple(kernels) == ("fused",) and not is_fused(workload.optimizer, hardware):
        kernels = ("dense",)  # the default, where FBGEMM fuses nothing
    check_possible(types, kernels, workload.optimizer, hardware, "--sharding")
    splits_columns = workload.optimizer not in WHOLE_ROWS
    chosen = tuple(types) or tuple(name for name in AUTO_TYPES if splits_columns or name not in COLUMN_TYPES)
    default = Allowed(chosen, tuple(kernels))
    rules = [default] * len(workload.tables)
    names = [table.name for table in workload.tables]
    for text in constraints:
        pattern, own = _read(text, default)
        check_possible(own.types, own.kernels, workload.optimizer, hardware, f"--sharding.constraints {text}")
        matched = [index for index, name in enumerate(names) if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"--sharding.constraints {text}: no table is called {pattern!r}; {nearest(pattern, names[:1000])}"
            )
        for index in matched:
            rules[index] = own
    return rules


def is_fused(optimizer: OptimizerKind, hardware: Hardware) -> bool:
    """Whether FBGEMM updates tables in their backward there."""
    return hardware.device != "cpu" or optimizer in FUSED_ON_CPU


def check_possible(
    types: Sequence[str], kernels: Sequence[str], optimizer: OptimizerKind, hardware: Hardware, where: str
) -> None:
    """See that the optimizer and the hardware can do with these types and kernels.

    Raises:
        InputError: they cannot, with the reason.
    """
    if optimizer in WHOLE_ROWS and COLUMN_TYPES & set(types):
        name = next(name for name in types if name in COLUMN_TYPES)
        rows = "row-wise Adagrad" if optimizer == "rowwise_adagrad" else optimizer
        instead = "adagrad" if optimizer == "rowwise_adagrad" else "adam"
        raise InputError(
            f"{where}: {name} would give each column shard an accumulator of its own under {rows}, so the "
            f"result would depend on the plan; use --optimizer.tables {instead}, or another sharding"
        )
    for kernel in kernels:
        if kernel == "fused" and not is_fused(optimizer, hardware):
            raise InputError(
                f"{where}: FBGEMM has no fused {optimizer} on a CPU; use the kernel dense, or --optimizer.tables "
                f"{', '.join(sorted(FUSED_ON_CPU))}"
            )
        if kernel in ("fused_uvm", "fused_uvm_caching") and not hardware.host_gib:
            raise InputError(
                f"{where}: the kernel {kernel} keeps tables in host memory behind an accelerator, and {hardware.name} "
                "has none; use fused"
            )
        if kernel == "key_value" and not hardware.ssd_gib:
            raise InputError(
                f"{where}: the kernel key_value keeps tables on an SSD, and {hardware.name} has none; use fused"
            )


def _read(text: str, default: Allowed) -> tuple[str, Allowed]:
    pattern, equals, right = text.rpartition("=")
    if not equals or not pattern or not right:
        raise InputError(
            f"--sharding.constraints {text}: write TABLE=TYPE, TABLE=TYPE+TYPE:KERNEL or TABLE=:KERNEL, "
            "as in 'dcnv2/C3=row_wise' or 'dcnv2/*=:fused_uvm_caching'"
        )
    types, _, kernels = right.partition(":")
    for name in filter(None, types.split("+")):
        _known("sharding type", name, TYPES, f"--sharding.constraints {text}")
    for name in filter(None, kernels.split("+")):
        _known("kernel", name, KERNELS, f"--sharding.constraints {text}")
    return pattern, Allowed(
        tuple(filter(None, types.split("+"))) or default.types,
        tuple(filter(None, kernels.split("+"))) or default.kernels,
    )


def _known(what: str, name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        raise InputError(f"{where}: unknown {what} {name!r}; {nearest(name, known)}")
