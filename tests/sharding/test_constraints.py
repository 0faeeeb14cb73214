"""What each table may have."""

import re

import pytest

from recsys.config import InputError
from recsys.sharding.cluster import HARDWARE
from recsys.sharding.constraints import AUTO_TYPES, Allowed, allowed
from recsys.sharding.workload import FUSED_ON_CPU, OptimizerKind, TableSpec, Workload

NAMES = ("dcnv2/C1", "dcnv2/C2", "dcnv2/C10", "wukong/C1")


def rules(
    *constraints: str,
    types: tuple[str, ...] = (),
    kernels: tuple[str, ...] = ("fused",),
    optimizer: OptimizerKind = "adagrad",
    hardware: str = "h100",
) -> dict[str, Allowed]:
    tables = tuple(TableSpec(name=name, rows=10, dim=8) for name in NAMES)
    workload = Workload(name="w", tables=tables, batch_size=8, optimizer=optimizer)
    return dict(zip(NAMES, allowed(workload, HARDWARE[hardware], types, kernels, constraints), strict=True))


def test_without_constraints_tables_may_have_what_the_planner_chooses_from() -> None:
    assert set(rules().values()) == {Allowed(AUTO_TYPES, ("fused",))}
    whole = rules(optimizer="rowwise_adagrad")["dcnv2/C1"].types
    assert whole == ("table_wise", "row_wise", "table_row_wise"), "row-wise Adagrad wants whole rows"
    assert rules(types=("row_wise",))["dcnv2/C1"] == Allowed(("row_wise",), ("fused",))


def test_a_pattern_binds_the_tables_that_it_names() -> None:
    found = rules("dcnv2/C1=row_wise+table_wise", "wukong/*=:fused_uvm_caching+fused")
    assert found["dcnv2/C1"] == Allowed(("row_wise", "table_wise"), ("fused",))
    assert found["dcnv2/C10"] == Allowed(AUTO_TYPES, ("fused",)), "C1 is not the beginning of C10"
    assert found["wukong/C1"] == Allowed(AUTO_TYPES, ("fused_uvm_caching", "fused"))
    assert set(rules("*=table_wise:fused_uvm").values()) == {Allowed(("table_wise",), ("fused_uvm",))}


def test_the_last_that_names_a_table_counts() -> None:
    found = rules("*=row_wise", "dcnv2/*=table_wise", "dcnv2/C1?=row_wise")
    assert [found[name].types[0] for name in NAMES] == ["table_wise", "table_wise", "row_wise", "row_wise"]
    assert rules("dcnv2/C1=row_wise", "*=table_wise")["dcnv2/C1"].types == ("table_wise",)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("dcnv/C1=row_wise", "no table is called 'dcnv/C1'; did you mean dcnv2/C1"),
        ("dcnv2/C1=rowwise", "unknown sharding type 'rowwise'; did you mean row_wise"),
        ("dcnv2/C1=row_wise:uvm", "unknown kernel 'uvm'"),
        ("dcnv2/C1", "write TABLE=TYPE"),
        ("=row_wise", "write TABLE=TYPE"),
        ("dcnv2/C1=", "write TABLE=TYPE"),
    ],
)
def test_a_constraint_that_cannot_be_is_refused(constraint: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        rules(constraint)
    assert constraint in str(caught.value)


@pytest.mark.parametrize("kind", ["column_wise", "table_column_wise", "grid_shard"])
def test_rowwise_adagrad_refuses_to_split_columns(kind: str) -> None:
    for attempt in ({"types": (kind,)}, {}):
        constraints = () if attempt else (f"dcnv2/C1={kind}",)
        with pytest.raises(InputError, match=rf"{kind} would .* use --optimizer.tables adagrad, or another sharding"):
            rules(*constraints, optimizer="rowwise_adagrad", **attempt)  # type: ignore[arg-type]
        rules(*constraints, optimizer="adagrad", **attempt)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching", "key_value"])
def test_a_cpu_has_nothing_behind_its_memory(kernel: str) -> None:
    for kernels, constraints in (((kernel,), ()), (("fused",), (f"*=:{kernel}",))):
        with pytest.raises(InputError, match=rf"the kernel {kernel} keeps tables .* cpu has none; use fused"):
            rules(*constraints, kernels=kernels, hardware="cpu")
        assert rules(*constraints, kernels=kernels, hardware="h100")["dcnv2/C1"].kernels == (kernel,)


def test_what_a_cpu_cannot_fuse_takes_the_kernel_dense() -> None:
    counting: tuple[OptimizerKind, ...] = ("adam", "partial_rowwise_adam", "lamb")
    for kind in counting:
        assert rules(optimizer=kind, hardware="cpu")["dcnv2/C1"].kernels == ("dense",)
        assert rules(optimizer=kind)["dcnv2/C1"].kernels == ("fused",)
        with pytest.raises(InputError, match=rf"FBGEMM has no fused {kind} on a CPU; use the kernel dense, or --opt"):
            rules("dcnv2/C1=row_wise:fused", optimizer=kind, hardware="cpu")
    for kind in FUSED_ON_CPU:
        assert rules(optimizer=kind, hardware="cpu")["dcnv2/C1"].kernels == ("fused",)
        assert rules(optimizer=kind, kernels=("dense",), hardware="cpu")["dcnv2/C1"].kernels == ("dense",)


@pytest.mark.parametrize("optimizer", ["partial_rowwise_adam", "lamb"])
def test_what_takes_a_mean_or_norm_of_a_row_refuses_to_split_columns(optimizer: OptimizerKind) -> None:
    assert "column_wise" not in rules(optimizer=optimizer)["dcnv2/C1"].types
    with pytest.raises(InputError, match=rf"under {optimizer}, so .* use --optimizer.tables adam, or another sharding"):
        rules(types=("column_wise",), optimizer=optimizer)
    assert rules(types=("column_wise",), optimizer="adam")["dcnv2/C1"].types == ("column_wise",)
