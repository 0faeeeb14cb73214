"""A whole compression study, small: whole tables beside smaller embeddings, each at its best learning rate."""

import json
from pathlib import Path
from typing import Any

import pytest

from recsys import cli
from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.studies.compression.config import CompressionStudyConfig
from recsys.studies.compression.jobs import WHOLE, Variant, possible, size_of, train_config, variants
from recsys.studies.compression.results import Results
from recsys.studies.compression.study import compression_study
from recsys.training.config import TrainConfig
from recsys.training.metrics import click_metrics
from recsys.training.predictions import load_predictions
from tests.distributed.jobs import small_config
from tests.test_cli import error_line

STEPS = 6
SMALL: dict[str, Any] = {
    "kinds": ("robe", "qr"),
    "compressions": (4, 20, 1e9),
    "block_sizes": (8,),
    "seeds": 2,
    "table_lrs": (0.1, 1e-9),
    "batch_size": 64,
}


def recipe(prepared: Path) -> TrainConfig:
    return small_config(prepared, num_steps=STEPS, log_every=2)


@pytest.fixture(scope="module")
def study(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    config = CompressionStudyConfig(out=tmp_path_factory.mktemp("compression") / "study", **SMALL)
    results = compression_study(config, recipe(prepared))
    assert results is not None
    return results


def runs(results: Results) -> set[str]:
    return {path.parent.name for path in results.study.out.glob("runs/*/config.json")}


@pytest.mark.slow
def test_every_variant_tries_all_rates_with_one_seed_and_goes_on_with_the_best(study: Results) -> None:
    names = [point.variant.name for point in study.points]
    assert names[:3] == ["tables", "robe_x4_z8", "robe_x20_z8"]
    assert runs(study) == {
        f"{name}_lr{lr}_s{seed}"
        for name in names
        for lr, seed in (("0.1", 0), ("1e-09", 0), (f"{_chosen(study, name):g}", 1))
    }
    for point in study.points:
        losses = {}
        for lr in ("0.1", "1e-09"):
            found, _, _ = load_predictions(
                study.study.out / "runs" / f"{point.variant.name}_lr{lr}_s0" / "valid.parquet"
            )
            logits, labels, weights = found.tensors
            losses[float(lr)] = click_metrics(labels.numpy(), logits[:, 0].sigmoid().numpy(), weights.numpy()).logloss
        assert point.table_lr == min(losses, key=lambda lr: losses[lr])


def _chosen(study: Results, name: str) -> float:
    return next(point.table_lr for point in study.points if point.variant.name == name)


@pytest.mark.slow
def test_points_hold_what_the_predictions_say(study: Results) -> None:
    for point in study.points:
        scores = []
        for seed in range(2):
            run = study.study.out / "runs" / f"{point.variant.name}_lr{point.table_lr:g}_s{seed}"
            found, _, _ = load_predictions(run / "test.parquet")
            logits, labels, weights = found.tensors
            scores.append(click_metrics(labels.numpy(), logits[:, 0].sigmoid().numpy(), weights.numpy()).auc)
        assert point.test["auc"].mean == pytest.approx(sum(scores) / 2)
        assert point.test["auc"].count == 2
        assert point.speed.step_ms > 0
        assert point.speed.lookup_rows_per_s > 0
        assert point.speed.rows_per_s > 0
    whole, *others = study.points
    assert whole.variant.kind == WHOLE
    assert whole.compression == 1
    assert whole.against_whole["auc"].mean == 0
    for point in others:
        assert point.against_whole["auc"].mean == pytest.approx(point.test["auc"].mean - whole.test["auc"].mean)
        assert point.compression == pytest.approx(whole.size.floats / point.size.floats)


@pytest.mark.slow
def test_what_cannot_be_is_left_out_and_said(study: Results) -> None:
    assert {name for name in study.left_out if name.startswith("robe")} == {"robe_x1e+09_z8"}
    assert "compression" in study.left_out["robe_x1e+09_z8"]


@pytest.mark.slow
def test_the_report_stands_alone(study: Results) -> None:
    out = study.study.out
    page = (out / "report.html").read_text()
    for text in ("whole tables", "robe, Z = 8", "20x", "data:image/png;base64,", "Left out"):
        assert text in page
    assert "http://" not in page
    assert (out / "compression.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((out / "results.json").read_text())
    assert len(values["points"]) == len(study.points)


@pytest.mark.slow
def test_a_finished_study_only_reports(study: Results, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.study.out.glob("runs/*/**/*") if path.is_file()}
    again = compression_study(study.study, recipe(prepared))
    assert again is not None
    assert [point.test for point in again.points] == [point.test for point in study.points]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_sizes_are_those_of_the_parameters(prepared: Path, tmp_path: Path) -> None:
    schema, config = Schema.load(prepared), CompressionStudyConfig(out=tmp_path, **SMALL)
    whole = size_of(train_config(config, recipe(prepared), Variant(kind=WHOLE), 0.1, 0), schema)
    assert whole.floats == sum(schema.sparse.values()) * 8
    assert whole.bytes == whole.floats * 4
    sizes, _ = possible(config, recipe(prepared), schema)
    for variant, size in sizes.items():
        if variant.kind == "robe":
            assert size.floats == pytest.approx(whole.floats / variant.compression, rel=0.01)


def test_each_kind_comes_from_its_largest_to_its_smallest(tmp_path: Path) -> None:
    config = CompressionStudyConfig(
        out=tmp_path, kinds=("mixed", "robe"), compressions=(100, 10), block_sizes=(8, 32), sign=True
    )
    names = ["tables", "mixed_x10", "mixed_x100"]
    names += [f"robe_x{compression}_z{block}_sign" for block in (8, 32) for compression in (10, 100)]
    assert [variant.name for variant in variants(config)] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressions": (1.0,)}, "must be above 1"),
        ({"compressions": (10, 10)}, "names one twice"),
        ({"kinds": ()}, "kinds is empty"),
        ({"kinds": ("robe",), "block_sizes": ()}, "name one for robe"),
        ({"table_lrs": (0.0,)}, "must be above 0"),
        ({"seeds": 0}, "must be at least 1"),
        ({"backbone": "dcnv3"}, "did you mean dcnv2"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionStudyConfig(out=tmp_path, **changes)


def test_nothing_left_to_compare_is_refused(prepared: Path, tmp_path: Path) -> None:
    config = CompressionStudyConfig(out=tmp_path / "study", kinds=("robe",), compressions=(1e9,))
    with pytest.raises(InputError, match="none of the study's embeddings can be"):
        compression_study(config, recipe(prepared))
    assert not (tmp_path / "study").exists()


def test_the_command_lists_jobs_and_refuses(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", "compression", "criteo_kaggle", "--data", str(prepared), "--out", str(tmp_path / "study")]
    assert cli.main([*arguments, "--dry-run", "--kinds", "robe", "--compressions", "10"]) == 0
    printed = capsys.readouterr().out
    assert "6 jobs of" in printed
    assert "robe_x10_z32_lr0.1_s0" in printed
    assert "compressions (0.5,) must be above 1" in error_line(capsys, *arguments, "--compressions", "0.5")
