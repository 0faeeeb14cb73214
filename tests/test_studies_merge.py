"""A whole merge study, small: it trains, predicts and reports once, and goes on where it was interrupted."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from recsys import cli
from recsys.config import InputError
from recsys.studies.config import MergeStudyConfig
from recsys.studies.figures import draw_all
from recsys.studies.merge_study import Results, merge_study
from recsys.training.config import TrainConfig
from recsys.training.metrics import ClickMetrics, click_metrics
from recsys.training.predictions import load_predictions
from recsys.training.provenance import data_facts
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config
from tests.test_cli import error_line

pytestmark = pytest.mark.slow  # the study that most tests look at takes ten seconds

STEPS = 6
SMALL: dict[str, Any] = {
    "backbones": ("dcnv2", "rankmixer"),
    "seeds": 2,
    "more_seeds": 2,
    "sizes": (1, 2),
    "rivals": (2,),
    "rival_seeds": 1,
    "ablation_members": 2,
    "ablation_sets": 1,
}
ONE: dict[str, Any] = {**SMALL, "backbones": ("dcnv2",), "seeds": 1, "more_seeds": 1, "sizes": (1,), "rivals": (),
                       "ablation_sets": 0}  # fmt: skip


def recipe(prepared: Path) -> TrainConfig:
    return small_config(prepared, num_steps=STEPS, log_every=2, save_every=2)


def files(out: Path) -> dict[Path, int]:
    """When each file of the runs was written; `results.json` and what comes with it are written every time."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def study(prepared: Path, synthetic_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    truth = synthetic_log.with_name(f"{synthetic_log.name}.truth.parquet")
    config = MergeStudyConfig(out=tmp_path_factory.mktemp("study") / "study", truth=truth, **SMALL)
    results = merge_study(config, recipe(prepared))
    assert results is not None
    return results


def test_every_job_leaves_a_run_and_predictions(study: Results) -> None:
    out = study.study.out
    assert {path.parent.relative_to(out).as_posix() for path in out.glob("*/*/config.json")} == {
        *(f"members/{backbone}_s{seed}" for backbone in ("dcnv2", "rankmixer") for seed in range(2)),
        "rivals/dcnv2_wider2_s0",
        "rivals/dcnv2_deeper2_s0",
        "rivals/dcnv2_bigger2_s0",
        "ablations/dcnv2_shared_0",
        "ablations/dcnv2_joint_0",
    }
    assert len(list(out.glob("*/*/checkpoints/step-00000006"))) == 9
    for job in study.jobs:
        predictions, facts, _ = load_predictions(out / job.kind / job.name / "test.parquet")
        assert predictions.names == job.members
        assert facts["split"] == "test"
        assert facts["schema"] == study.schema_hash
        assert job.seconds is not None
        assert job.rows_per_s == pytest.approx(STEPS * 128 / job.seconds)


def test_results_are_those_of_the_predictions(study: Results) -> None:
    out = study.study.out
    logits = []
    for seed in range(2):
        predictions, _, _ = load_predictions(out / "members" / f"dcnv2_s{seed}" / "test.parquet")
        logits.append(predictions.logits_NM[:, 0].astype(np.float64))
    expected = click_metrics(predictions.labels_N, 1 / (1 + np.exp(-np.mean(logits, axis=0))))
    values = json.loads((out / "results.json").read_text())
    (point,) = (p for p in values["points"] if (p["source"], p["size"]) == ("seeds of dcnv2", 2))
    assert point["merged"]["auc"]["mean"] == pytest.approx(expected.auc)
    assert point["merged"]["auc"]["standard_error"] is None
    assert np.abs(logits[0] - logits[1]).max() > 0
    assert values["study"]["backbones"] == ["dcnv2", "rankmixer"]
    assert {comparison["kind"] for comparison in values["comparisons"]} == {"wider", "deeper", "bigger"}
    assert {comparison["rival_sizes"]["embedding_dim"] for comparison in values["comparisons"]} == {8, 16}
    assert {comparison["verdict"] for comparison in values["comparisons"]} <= {"not decided", "no part"}
    assert 0.75 < values["bayes_optimal"]["auc"] < 0.85


def test_the_report_stands_alone(study: Results) -> None:
    page = (study.study.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "<script" not in page
    assert "http" not in page
    assert "With the same FLOPs a merge" in page
    assert "training randomness" in page
    assert f"Merge study: {study.dataset}, synthetic log, {study.num_test_rows:,} test rows" in page
    assert "2 seeds of dcnv2 merged (1 set): logloss" in page
    assert "most FLOPs go into the wider input" in page
    assert "not decided: 1 seed of the model" in page
    assert re.search(r"<td>bigger, at M = 2</td><td>[\d.]+</td><td>0.500</td><td>8</td>", page)
    for path in ("curves", "gains", "correlations", "greedy", "ambiguity"):
        assert (study.study.out / f"{path}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_trains_nothing_and_finds_the_same(study: Results) -> None:
    before = files(study.study.out)
    again = merge_study(study.study, study.recipe)
    assert files(study.study.out) == before
    assert again == study


def test_predictions_that_are_gone_are_made_without_training(study: Results, tmp_path: Path) -> None:
    config = dataclasses.replace(study.study, out=tmp_path / "study")
    shutil.copytree(study.study.out, config.out)
    lost = config.out / "members" / "rankmixer_s1" / "valid.parquet"
    lost.unlink()
    for gone in ("members/dcnv2_s0", "rivals/dcnv2_wider2_s0"):  # whose predictions are there
        shutil.rmtree(config.out / gone / "checkpoints")
    before = files(config.out)
    again = merge_study(config, study.recipe)
    after = files(config.out)
    assert set(after) - set(before) == {lost}
    assert all(after[path] == before[path] for path in before)
    assert again is not None
    assert again.points == study.points
    assert again.greedy == study.greedy


def test_other_settings_are_refused_before_anything_is_trained(study: Results) -> None:
    before = files(study.study.out)
    train = dataclasses.replace(study.recipe.train, num_steps=7)
    with pytest.raises(InputError, match=r"dcnv2_s0: was run with train.num_steps 6, the study wants 7; name another"):
        merge_study(study.study, dataclasses.replace(study.recipe, train=train))
    optimizer = dataclasses.replace(study.recipe.optimizer, dense_lr=0.5)
    with pytest.raises(InputError, match=r"optimizer.dense_lr 0.01, the study wants 0.5"):
        merge_study(study.study, dataclasses.replace(study.recipe, optimizer=optimizer))
    assert files(study.study.out) == before


def test_predictions_of_something_else_are_refused(study: Results, tmp_path: Path) -> None:
    config = dataclasses.replace(study.study, out=tmp_path / "study")
    shutil.copytree(study.study.out, config.out)
    members = config.out / "members"
    shutil.copy(members / "dcnv2_s0" / "test.parquet", members / "dcnv2_s1" / "test.parquet")
    with pytest.raises(
        InputError, match=r"dcnv2_s1/test.parquet: predictions of dcnv2_s0 on test rows .* remove the fi"
    ):
        merge_study(config, study.recipe)


def test_predictions_on_rows_that_were_prepared_otherwise_are_refused(study: Results, tmp_path: Path) -> None:
    config = dataclasses.replace(study.study, out=tmp_path / "study")
    shutil.copytree(study.study.out, config.out)
    path = config.out / "members" / "rankmixer_s1" / "test.parquet"
    predictions, facts, _ = load_predictions(path)
    assert facts["manifest"] == data_facts(study.recipe.data)["manifest_sha256"]
    predictions.save(path, {name: value for name, value in facts.items() if name != "manifest"})
    merge_study(config, study.recipe)  # of a file that does not tell
    predictions.save(path, {**facts, "manifest": "of something else"})
    with pytest.raises(InputError, match=r"rankmixer_s1/test.parquet: predictions on rows .* prepared otherwise than"):
        merge_study(config, study.recipe)


def test_pictures_are_whole_or_as_they_were(study: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(study.study.out / "curves.png", tmp_path)

    def killed(self: Figure, stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        draw_all(study, tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == (study.study.out / "curves.png").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("far", [False, True])
def test_the_best_possible_is_a_line_with_a_break_of_the_axis_where_it_is_far(
    study: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    merged = study.points[0].merged
    near: dict[str, Any] = {name: merged[name].mean for name in ("auc", "logloss", "ne")}
    best = ClickMetrics(**({"auc": 0.99, "logloss": 0.01, "ne": 0.02} if far else near), calibration=1.0, num_rows=9)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_all(dataclasses.replace(study, bayes_optimal=best), tmp_path)
    axes = figures[0].axes
    assert len(axes) == (4 if far else 2)
    dotted = [np.asarray(line.get_ydata()) for panel in axes for line in panel.lines if line.get_linestyle() == ":"]
    assert sorted(y[0] for y in dotted if len(y)) == sorted([best.auc, best.logloss])


def test_a_study_of_members_alone(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MergeStudyConfig(
        out=tmp_path / "study",
        backbones=("dcnv2",),
        seeds=2,
        more_seeds_of=(),
        rivals=(),
        ablation_sets=0,
        sizes=(1, 2),
    )
    results = merge_study(config, recipe(prepared))
    assert results is not None
    assert (results.comparisons, results.ablations) == ([], [])
    assert "No bigger model was trained: the claim was not tested." in capsys.readouterr().out


def test_an_interrupted_job_goes_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MergeStudyConfig(out=tmp_path / "whole", **ONE)
    broken = MergeStudyConfig(out=tmp_path / "broken", **ONE)
    expected = merge_study(whole, recipe(prepared))
    step = Trainer.train_step

    def interrupted(self: Trainer, batches: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_study(broken, recipe(prepared))
    monkeypatch.undo()
    checkpoints = broken.out / "members" / "dcnv2_s0" / "checkpoints"
    before = files(checkpoints.parent.parent.parent)
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000002", "step-00000004"]
    results = merge_study(broken, recipe(prepared))
    after = files(broken.out)
    assert all(after[path] == before[path] for path in before if "step-00000004" in path.parts)
    assert results is not None
    assert expected is not None
    assert results.points[0].merged["logloss"].mean == pytest.approx(
        expected.points[0].merged["logloss"].mean, abs=1e-6
    )


def test_a_dry_run_lists_jobs_and_makes_nothing(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_study(MergeStudyConfig(out=tmp_path / "study", dry_run=True, **SMALL), recipe(prepared)) is None
    told = capsys.readouterr().out
    assert "9 jobs of 6 steps" in told
    assert told.count("to train") == 9
    assert not (tmp_path / "study").exists()


def test_torchx_trains_the_jobs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Results
) -> None:
    config = MergeStudyConfig(
        out=tmp_path / "study", scheduler="local_cwd", **{**ONE, "seeds": 2, "more_seeds": 2, "sizes": (1, 2)}
    )
    results = merge_study(config, recipe(prepared))
    assert results is not None
    expected, found = ({s.members: s.merged for s in r.sets} for r in (study, results))
    for members in (("dcnv2_s0",), ("dcnv2_s1",), ("dcnv2_s0", "dcnv2_s1")):
        assert found[members]["logloss"] == pytest.approx(expected[members]["logloss"], abs=1e-5)


WAITING = """from torchx import specs


def waiting(*arguments: str) -> specs.AppDef:
    \"\"\"Wait.

    Args:
        arguments: of no use
    \"\"\"
    role = specs.Role(name="role", image="", entrypoint="sleep", args=["600"])
    return specs.AppDef(name="waiting", roles=[role])
"""


def test_a_job_that_is_waited_for_no_more_is_cancelled(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchx.runner import Runner

    waited: list[str] = []
    cancelled: list[str] = []
    cancel = Runner.cancel

    def interrupted(self: Runner, handle: str, **_: Any) -> None:
        waited.append(handle)
        raise KeyboardInterrupt

    def noted(self: Runner, handle: str) -> None:
        cancelled.append(handle)
        cancel(self, handle)

    monkeypatch.setattr(Runner, "wait", interrupted)
    monkeypatch.setattr(Runner, "cancel", noted)
    (tmp_path / "component.py").write_text(WAITING)
    component = f"{tmp_path / 'component.py'}:waiting"
    config = MergeStudyConfig(out=tmp_path / "study", scheduler="local_cwd", component=component, torchx_args="", **ONE)
    monkeypatch.chdir(prepared.parent)
    with pytest.raises(KeyboardInterrupt):
        merge_study(config, recipe(Path(prepared.name)))
    assert len(waited) == 1
    assert cancelled == waited
    values = json.loads((config.out / "jobs" / "dcnv2_s0.json").read_text())
    assert values["data"] == str(prepared)  # nodes start elsewhere


FAILING = """from torchx import specs


def failing(*arguments: str) -> specs.AppDef:
    \"\"\"Fail.

    Args:
        arguments: of no use
    \"\"\"
    return specs.AppDef(name="failing", roles=[specs.Role(name="role", image="", entrypoint="false")])
"""


def test_a_job_that_fails_on_a_scheduler_is_named(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "component.py").write_text(FAILING)
    component = f"{tmp_path / 'component.py'}:failing"
    config = MergeStudyConfig(out=tmp_path / "study", scheduler="local_cwd", component=component, torchx_args="", **ONE)
    with pytest.raises(InputError, match=r"^job dcnv2_s0: FAILED on local_cwd \(local_cwd://.*\); logs: file://"):
        merge_study(config, recipe(prepared))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "slurn"}, "unknown scheduler 'slurn'; did you mean slurm"),
        ({"component": "nowhere/train.py:ddp"}, "no such file; start the study in the repository's root"),
        ({"torchx_args": "--nonsense 1"}, "--torchx-args '--nonsense 1': .*unrecognized arguments: --nonsense"),
        ({"torchx_cfg": "log_dir"}, "job dcnv2_s0: local_cwd does not take it"),
    ],
)
def test_what_no_scheduler_takes_is_told(prepared: Path, tmp_path: Path, changes: dict, message: str) -> None:
    config = MergeStudyConfig(**{"out": tmp_path / "study", "scheduler": "local_cwd", **ONE, **changes})
    with pytest.raises(InputError, match=message):
        merge_study(config, recipe(prepared))


def test_help_of_the_study_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom recsys.cli import main\n"
        "try:\n    main(['study', 'merge', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'polars', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert "--more-seeds-of" in done.stdout
    assert "RECIPE may be a config file" in " ".join(done.stdout.replace("│", " ").split())


def test_the_command_line_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a RECIPE first" in error_line(capsys, "study", "merge", "--out", "x")
    assert "unknown backbone 'dcnv'" in error_line(
        capsys, "study", "merge", "synthetic", "--out", "x", "--backbones", "dcnv"
    )
    assert "unknown recipe" in error_line(capsys, "study", "merge", "synthetics", "--out", "x")
    assert "unknown verb 'merg'; did you mean merge?" in error_line(capsys, "study", "merg")
    assert set(cli.STUDY_VERBS) == {"merge", "compression"}
