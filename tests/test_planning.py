"""`recsys plan` from its arguments to what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.cli import main
from recsys.config import dump
from recsys.planning.config import Changes
from recsys.planning.workloads import workload_of
from recsys.recipes.table_sets import SCHEMAS, synthetic_10k
from recsys.sharding.cluster import HARDWARE, Cluster
from recsys.sharding.plan import Plan
from recsys.sharding.work import PARTS
from recsys.sharding.workload import TableSpec, Workload

RECIPE = "mlperf_dlrm_dcnv2"


def small(**changes: object) -> Workload:
    tables = tuple(TableSpec(name=f"t{index}", rows=1000 * 10**index, dim=16, pooling=2.0) for index in range(4))
    return Workload(**{"name": "small", "tables": tables, "batch_size": 512, "dense_parameters": 1000} | changes)  # type: ignore[arg-type]


@pytest.fixture
def workload(tmp_path: Path) -> str:
    small().save(tmp_path / "small.json")
    return str(tmp_path / "small.json")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_mlperf_on_eight_h200_says_what_a_hand_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plan = tmp_path / "figures.json", tmp_path / "plan.json"
    arguments = ["plan", RECIPE, "--cluster", "h200x8", "--json", str(figures), "--out", str(plan)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    values = json.loads(figures.read_text())
    # 204,184,588 rows of 128 values of 4 bytes: 104.5 GB; Adagrad keeps another value for each.
    weights = 204_184_588 * 128 * 4
    assert round(weights / 1e9, 1) == 104.5
    assert values["weight_bytes"] == values["optimizer_bytes"] == weights
    for part in ("weights", "optimizer"):
        assert sum(rank["bytes"]["device"][part] for rank in values["ranks"]) == pytest.approx(weights, rel=1e-9)
    assert values["fits"]
    assert len(values["ranks"]) == 8
    slowest = {name: max(rank["seconds"][name] for rank in values["ranks"]) for name in values["phase_seconds"]}
    assert slowest == values["phase_seconds"]
    assert values["step_seconds"] == pytest.approx(sum(slowest.values()))
    for text in ("104.5 GB of weights", "input dist", "all reduce", "dlrm_dcn/C21", "rows/s", "optimizer"):
        assert text in printed
    assert set(Plan.load(plan).tables) == {f"dlrm_dcn/C{index}" for index in range(1, 27)}


def test_row_wise_adagrad_keeps_a_value_a_row(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["plan", RECIPE, "--cluster", "h200x8", "--optimizer", "rowwise_adagrad", "--json", str(figures)]
    assert main(arguments) == 0
    values = json.loads(figures.read_text())
    assert values["optimizer_bytes"] == 204_184_588 * 4
    held = sum(rank["bytes"]["device"]["optimizer"] for rank in values["ranks"])
    assert held == pytest.approx(204_184_588 * 4, rel=1e-9)


def test_changes_reach_the_workload() -> None:
    changes = Changes(members=("dcnv2*2",), batch_size=1024, embedding_dim=64, table_dtype="fp16", optimizer="adagrad")
    found = workload_of(RECIPE, changes)
    assert len(found.tables) == 52
    assert {(table.dim, table.dtype) for table in found.tables} == {(64, "fp16")}
    assert (found.batch_size, found.optimizer) == (1024, "adagrad")
    assert found.tables[20].pooling == 100
    assert found.tables[20].rows == SCHEMAS[RECIPE]().sparse["C21"]


def test_a_recipe_is_planned_by_the_schema_of_its_data(prepared: Path) -> None:
    found = workload_of("criteo_kaggle", Changes(data=prepared, members=("dlrm",)))
    sizes = json.loads((prepared / "schema.json").read_text())["sparse"]
    assert {table.name: table.rows for table in found.tables} == {f"dlrm/{name}": size for name, size in sizes.items()}
    assert found.dense_parameters > 1000
    assert found.dense_flops > 2000


def test_ten_thousand_tables_are_the_same_every_time() -> None:
    one, other = synthetic_10k(), synthetic_10k()
    assert len(one.tables) == 10_000
    assert one == other


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_the_heat_map_is_a_whole_file(workload: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"heat.{suffix}"
    assert main(["plan", workload, "--cluster", "h100x4", "--heat", str(path)]) == 0
    begins = {"png": b"\x89PNG", "html": b"<!doctype html>"}
    assert path.read_bytes().startswith(begins[suffix])
    if suffix == "html":
        page = path.read_text()
        assert all(f"<th>t{index}</th>" in page for index in range(4))
        assert "http://" not in page
        assert "https://" not in page
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_plan_of_ones_own_is_priced(workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "plan.json", tmp_path / "other.json"
    one = ["plan", workload, "--cluster", "h100x4", "--sharding.types", "table_wise"]
    assert main([*one, "--out", str(path)]) == 0
    text = path.read_text()
    rank = Plan.load(path).tables["t3"].shards[0].rank
    path.write_text(text.replace(f"[[{rank}, 0, 0, 1000000, 16]]", f"[[{(rank + 1) % 4}, 0, 0, 1000000, 16]]"))
    assert main(["plan", workload, "--cluster", "h100x4", "--sharding.plan", str(path), "--out", str(other)]) == 0
    assert Plan.load(other) == Plan.load(path)
    capsys.readouterr()
    (tmp_path / "before.json").write_text(text)
    before = str(tmp_path / "before.json")
    assert main(["plan", "diff", before, str(path), "--recipe", workload, "--cluster", "h100x4"]) == 0
    printed = capsys.readouterr().out
    assert f"ranks {rank} became {(rank + 1) % 4}" in printed
    assert "16,000,000" in printed
    assert "gradient_dist" in printed
    assert main(["plan", "diff", before, before]) == 0
    assert "all 4 tables lie alike" in capsys.readouterr().out


def test_replicas_hold_a_copy_each(workload: str, tmp_path: Path) -> None:
    figures, plan = tmp_path / "figures.json", tmp_path / "plan.json"
    arguments = ["--cluster", "h100x4x2", "--sharding.replicas", "2", "--json", str(figures), "--out", str(plan)]
    assert main(["plan", workload, *arguments]) == 0
    made = Plan.load(plan)
    assert (made.world_size, made.replicas) == (4, 2)
    assert json.loads(figures.read_text())["phase_seconds"]["all_reduce"] > 0


def test_a_cluster_of_ones_own(workload: str, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(json.dumps(dump(HARDWARE["h100"]) | {"name": "mine", "memory_gib": 10.0}))
    figures = tmp_path / "figures.json"
    assert main(["plan", workload, "--cluster", f"{own}x4", "--json", str(figures)]) == 0
    values = json.loads(figures.read_text())
    assert values["cluster"] == "minex4x1"
    assert values["capacity_bytes"]["device"] == pytest.approx(9 * 2**30)


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, RECIPE, "--cluster", "a100-40x4")
    assert "nothing fits: the tables need" in told
    for remedy in ("--optimizer rowwise_adagrad (", "fused_uvm_caching (", "--cluster a100-40x4x2 ("):
        assert remedy in told
    assert "--table-dtype fp16" not in told  # half of the weights, but not of Adagrad's state: too much still


def test_every_remedy_is_one(tmp_path: Path) -> None:
    for change in (["--optimizer", "rowwise_adagrad"], ["--sharding.kernels", "fused", "fused_uvm_caching"]):
        assert main(["plan", RECIPE, "--cluster", "a100-40x4", *change]) == 0
    assert main(["plan", RECIPE, "--cluster", "a100-40x4x2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cluster", "h20x8"], "unknown hardware 'h20'; did you mean h200"),
        (["--cluster", "missing.yamlx8"], "no such file as missing.yaml"),
        (["--cluster", "h100x0"], "it needs at least 1 of each"),
        (["--cluster", "h100x8", "--sharding.constraints", "t9=row_wise"], "no table is called 't9'"),
        (["--cluster", "h100x8", "--sharding.constraints", "t1=rowwise"], "did you mean row_wise"),
        (["--cluster", "h100x8", "--sharding.constraints", "t1"], "write TABLE=TYPE"),
        (["--cluster", "h100x8", "--sharding.types", "column_wise"], "--optimizer.tables adagrad"),
        (["--cluster", "cpux2", "--sharding.kernels", "fused_uvm"], "cpu has none; use fused"),
        (["--cluster", "h100x8", "--sharding.replicas", "3"], "3 replicas cannot share"),
        (["--cluster", "h100x8", "--members", "dcnv2"], "a set of tables, without data or members"),
        (["--cluster", "h100x8", "--heat", "heat.pdf"], "must end in .png or .html"),
        (["--cluster", "h100x8", "--json", "nowhere/figures.json"], "no such folder"),
        (["--cluster", "h100x8", "--sharding.plan", "missing.json"], "missing.json: cannot read it"),
    ],
)
def test_bad_input_is_one_line(
    workload: str, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in refused(capsys, workload, *arguments)


def test_a_plan_for_others_is_refused(workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", workload, "--cluster", "h100x4", "--out", str(path)]) == 0
    capsys.readouterr()
    assert "planned for 4 ranks, the job has 8" in refused(
        capsys, workload, "--cluster", "h100x8", "--sharding.plan", str(path)
    )
    small(tables=small().tables[:3]).save(tmp_path / "fewer.json")
    told = refused(capsys, str(tmp_path / "fewer.json"), "--cluster", "h100x4", "--sharding.plan", str(path))
    assert "table t3 is none of the model's" in told
    wide = ["--embedding-dim", "32", "--cluster", "h100x4", "--sharding.plan", str(path)]
    assert "1000 rows of 16 columns in the plan and 1000 rows of 32" in refused(capsys, workload, *wide)


def test_a_workload_without_recipe_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a RECIPE first" in refused(capsys, "--cluster", "h100x8")
    assert "unknown recipe 'mlperf'" in refused(capsys, "mlperf", "--cluster", "h100x8")


def test_help_imports_no_torch() -> None:
    code = "import sys; from recsys.cli import main\ntry:\n main(['plan', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_parts_of_memory_have_names() -> None:
    assert PARTS == ("weights", "optimizer", "activations", "dense")
    assert Cluster(hardware=HARDWARE["h200"], ranks_per_node=8, nodes=16).name == "h200x8x16"
