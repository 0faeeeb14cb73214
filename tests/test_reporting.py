"""Reports hold what run folders tell, of finished runs and of others, and need nothing beside themselves."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.cli import main
from recsys.config import InputError, dump
from recsys.metrics.click import click_metrics
from recsys.recipes import find_recipe
from recsys.reporting.config import ReportConfig
from recsys.reporting.differences import differences, from_nearest_recipe
from recsys.reporting.figures import FILLS
from recsys.reporting.records import read_runs
from recsys.reporting.report import report
from recsys.training.phases import PHASES
from recsys.training.sinks import SinkConfig, open_sinks

MEMBERS = ("dcnv2", "wukong")
STEPS, EVERY = 40, 10


def make_run(folder: Path, last: int = STEPS, changes: dict[str, Any] | None = None) -> Path:
    """A run of the recipe criteo_kaggle for 40 steps that came to step `last`, and validated every 20."""
    folder.mkdir()
    recipe = find_recipe("criteo_kaggle")
    loop = dataclasses.replace(recipe.train, num_steps=STEPS, **(changes or {}))
    (folder / "config.json").write_text(json.dumps(dump(dataclasses.replace(recipe, members=MEMBERS, train=loop))))
    rng = np.random.default_rng(0)
    p = rng.beta(1, 3, 2_000)
    metrics = dataclasses.asdict(click_metrics((rng.random(2_000) < p).astype(np.float32), p))
    with open_sinks(folder, 0, SinkConfig(tensorboard=False)) as write:
        write("data", 0, {"rows": 6_400, "tail_rows": 0, "tail_share": 0.0})
        for step in range(EVERY, last + 1, EVERY):
            by_member = dict.fromkeys(MEMBERS, 0.6 - step / 1000.0)
            window = {name: {"logloss": loss, "ne": loss / 0.55, "auc": 1 - loss} for name, loss in by_member.items()}
            speed = {"rows_per_s": 640.0, "ids_per_s": 16_640.0, "mfu": 0.125}
            phases = {"data": 2.0, "forward": 30.0, "backward": 60.0 + step, "other": 8.0}
            write("train", step, {**speed, "loss": by_member, "window": window, "phase_ms": phases})
            if step % 20 == 0:
                write("valid", step, dict.fromkeys([*MEMBERS, "merged"], metrics))
    return folder


def text_of(path: Path) -> str:
    """The page without its pictures and its style."""
    return re.sub(r'base64,[^"]*', "", re.sub(r"<style>.*</style>", "", path.read_text(), flags=re.DOTALL))


def test_a_finished_run_has_one_page_that_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = text_of(run / "report.html")
    assert "finished at step 40" in text
    assert "2,560</td><td>640</td><td>4<" in text  # 40 steps of 64 rows at 640 a second
    assert "last 16,640 ids/s, 12.50% MFU" in text
    found = read_runs([run])[0].valid[-1]["merged"]
    low, high = found["auc_ci"]
    assert f"{found['auc']:.5f} [{low:.5f}, {high:.5f}]" in text
    assert "recipe criteo_kaggle" in text
    assert "<td>train.num_steps</td><td>none</td><td>40</td>" in text
    assert "<td>members</td><td>dcnv2, wukong, rankmixer</td><td>dcnv2, wukong</td>" in text


def test_phases_are_means_over_steps(tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "first")])[0]
    assert run.phases() == pytest.approx({"data": 2.0, "forward": 30.0, "backward": 60.0 + 25.0, "other": 8.0})


def ended(run: Path, step: int, reason: str) -> str:
    """State of a run that wrote how it ended."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "end", "step": step, "reason": reason}) + "\n")
    return read_runs([run])[0].state


def test_a_run_tells_how_it_ended(tmp_path: Path) -> None:
    assert ended(make_run(tmp_path / "early", last=20), 20, "AUC 0.8") == "stopped early at step 20 of 40: AUC 0.8"
    assert ended(make_run(tmp_path / "whole"), 40, "last step") == "finished at step 40"
    assert ended(make_run(tmp_path / "longer", last=30), 20, "NE") == "step 30 of 40: not finished"  # it went on


def test_null_is_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-2]["window"]["dcnv2"]["auc"] = lines[-2]["rows_per_s"] = None
    lines[-1]["merged"] |= {"auc": None, "auc_ci": [None, None], "ne": None}
    lines[-1]["merged"]["reliability"][0] = [None, None, 0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(ReportConfig(runs=(run,)))
    assert "nan [nan, nan]" in text_of(run / "report.html")
    steps, values = read_runs([run])[0].series("valid", "merged", "auc")
    assert steps == [20, 40]
    assert np.isnan(values).tolist() == [False, True]


def test_runs_of_other_data_are_not_alike(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"data": "data/other"}))
    report(ReportConfig(runs=runs, out=tmp_path / "both.html"))
    assert f"<td>data</td><td>{config['data']}</td><td>data/other</td>" in text_of(tmp_path / "both.html")


def test_every_phase_of_a_bar_has_a_colour_of_its_own() -> None:
    assert len(set(FILLS)) >= len(PHASES) + len(("validation", "other"))


def test_a_run_that_was_killed_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "killed", last=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 20, "lo')
    report(ReportConfig(runs=(run,), out=tmp_path / "page.html"))
    text = text_of(tmp_path / "page.html")
    assert "step 10 of 40: not finished" in text
    assert "No validation yet." in text
    assert 'alt="curves"' in text
    assert 'alt="calibration"' not in text


def test_a_run_of_which_less_was_written_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("window", "phase_ms", "ids_per_s", "mfu"):
            line.pop(name, None)
        if line["kind"] == "valid":
            kept = ("auc", "logloss", "ne", "calibration", "num_rows")
            line |= {member: {name: line[member][name] for name in kept} for member in (*MEMBERS, "merged")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(ReportConfig(runs=(run,)))
    text = text_of(run / "report.html")
    assert 'alt="speed"' in text
    assert 'alt="calibration"' not in text


def test_several_runs_are_put_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", last=20, changes={"batch_size": 128})
    report(ReportConfig(runs=(first, second), out=tmp_path / "both.html"))
    text = text_of(tmp_path / "both.html")
    assert "<th>field</th><th>first</th><th>second</th>" in text
    assert "<td>train.batch_size</td><td>64</td><td>128</td>" in text
    assert "train.num_steps" not in text
    assert re.search(r"<td>second</td><td>merged</td><td>20</td>", text)


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    runs = (make_run(tmp_path / "run"), make_run(tmp_path / "other" / "run"))
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]


def test_only_fields_that_differ_are_told() -> None:
    configs = [{"a": 1, "b": {"c": [1, 2], "d": None}, "out": "x"}, {"a": 1, "b": {"c": [1], "e": 2}, "out": "y"}]
    assert differences(configs) == [("b.c", ["1, 2", "1"]), ("b.d", ["none", ""]), ("b.e", ["", "2"])]


@pytest.mark.parametrize("recipe", ["criteo_kaggle", "mlperf_dlrm_dcnv2", "avazu_paper"])
def test_a_recipe_is_nearest_to_itself(recipe: str) -> None:
    assert from_nearest_recipe(dump(find_recipe(recipe))) == (recipe, [])


def refused(runs: tuple[Path, ...], out: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        report(ReportConfig(runs=runs, out=out))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_reported_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "no run named" in refused(())
    assert "no run folder" in refused((tmp_path,))
    assert "name its file by --out" in refused((run, run))
    assert "no such folder" in refused((run,), tmp_path / "missing" / "page.html")
    assert "is a folder" in refused((run,), tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    assert f"{run / 'metrics.jsonl'}, line 8: not a record" in refused((run,))
    (run / "metrics.jsonl").unlink()
    assert "has not logged a step" in refused((run,))
    (run / "config.json").write_text("[]")
    assert refused((run,))
