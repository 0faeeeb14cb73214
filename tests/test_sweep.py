"""Sweeps: real ones of small trainings, and what becomes of trials that fail, are stopped or are killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recsys.cli import main
from recsys.config import InputError, load_file
from recsys.recipes import synthetic
from recsys.studies.sweep import search, trial
from recsys.studies.sweep.config import SweepConfig
from recsys.studies.sweep.search import sweep
from recsys.training.config import TrainConfig
from tests.prepared_folder import SCHEMA

ROOT = Path(__file__).parents[1]
# Stands for `recsys train CONFIG`: its NE falls from 1 to the seed's tenth in `num_steps` validations.
STAND_IN = """
import json, pathlib, signal, sys, time
config = json.loads(pathlib.Path(sys.argv[1]).read_text())
out, seed, steps = pathlib.Path(config["out"]), config["seed"], config["train"]["num_steps"]
signal.signal(signal.SIGTERM, lambda *_: ((out / "stopped").touch(), sys.exit(0)))
out.mkdir(exist_ok=True)
(out / "config.json").write_text("{}")
starts = out / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if config["loss"] == "joint":
    print("Traceback of something", file=sys.stderr)
    sys.exit("recsys: the loss of member dcnv2 is nan at step 0")
pause = json.loads(pathlib.Path(config["data"], "pause.json").read_text())
done = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
with (out / "metrics.jsonl").open("a") as file:
    for step in range(done + 1, steps + 1):
        time.sleep(pause)
        ne = None if seed == 99 and step == steps else 1 - (1 - seed / 10) * step / steps
        file.write(json.dumps({"kind": "train", "step": step}) + "\\\\n")
        file.write(json.dumps({"kind": "valid", "step": step, "merged": {"ne": ne, "auc": 1 - (ne or 0)}}) + "\\\\n")
        file.flush()
""".replace("\\\\n", "\\n")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A recipe of three validations, whose trials are stand-ins."""
    stand_in = tmp_path / "train.py"
    stand_in.write_text(STAND_IN)
    (tmp_path / "pause.json").write_text("0")
    SCHEMA.save(tmp_path)
    monkeypatch.setattr(trial, "_command", lambda _, path: [sys.executable, str(stand_in), str(path)])
    monkeypatch.setattr(trial, "POLL_S", 0.02)
    base = synthetic()
    loop = {**vars(base.train), "num_steps": 3}
    return TrainConfig(**{**vars(base), "data": tmp_path, "train": type(base.train)(**loop)})


def made(out: Path, **options: Any) -> SweepConfig:
    return SweepConfig(**{"out": out, "grid": ("seed=5,3,4",), **options})


def test_a_grid_tries_every_combination_and_keeps_the_best(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    found = sweep(made(out, grid=("seed=5,3", "members=dcnv2,dcnv2 wukong")), recipe)
    tried = [(record.values["seed"], record.values["members"]) for record in found.records]
    assert sorted(tried) == [("3", "dcnv2"), ("3", "dcnv2 wukong"), ("5", "dcnv2"), ("5", "dcnv2 wukong")]
    assert found.best.values["seed"] == "3"
    assert found.best.value == pytest.approx(0.3)
    assert all(list(record.validations) == [1, 2, 3] for record in found.records)
    best = load_file(TrainConfig, out / "best.json")
    assert (best.seed, best.out, best.resume) == (3, out / "best", recipe.resume)
    first = load_file(TrainConfig, out / "trials" / "0000.json")
    assert (first.seed, first.out, first.resume) == (5, out / "trials" / "0000", "auto")
    page = (out / "sweep.html").read_text()
    assert "Best: seed=3" in page
    assert page.count("data:image/png") == 1
    told = capsys.readouterr()
    assert "recsys train" in told.out
    assert "sweep: trial 4 of 4, " in told.err
    assert json.loads((out / "results.json").read_text())[0]["state"] == "complete"


def test_the_same_command_again_makes_no_trial_twice(recipe: TrainConfig, tmp_path: Path) -> None:
    config = made(tmp_path / "sweep", method="random", trials=2)
    before = sweep(config, recipe).records
    assert sweep(config, recipe).records == before
    more = made(tmp_path / "sweep", method="random", trials=3)
    assert sweep(more, recipe).records[:2] == before
    assert [path.read_text() for path in sorted((config.out / "trials").glob("*/starts"))] == ["x"] * 3
    with pytest.raises(InputError, match="holds a sweep with metric ne, now it is auc"):
        sweep(made(tmp_path / "sweep", method="random", trials=3, metric="auc"), recipe)
    with pytest.raises(InputError, match="holds a sweep with loss independent, now it is joint"):
        sweep(more, TrainConfig(**{**vars(recipe), "loss": "joint"}))


def test_a_sweep_that_goes_on_does_not_draw_the_same_again(recipe: TrainConfig, tmp_path: Path) -> None:
    drawn: set[Any] = set()
    for trials in (1, 2, 3):
        config = SweepConfig(out=tmp_path / "s", space=("optimizer.dense_lr=log(1e-4,1e-2)",), trials=trials)
        drawn = {record.values["optimizer.dense_lr"] for record in sweep(config, recipe).records}
    assert len(drawn) == 3


def test_auc_is_the_better_the_more_there_is(recipe: TrainConfig, tmp_path: Path) -> None:
    found = sweep(made(tmp_path / "sweep", metric="auc"), recipe)
    assert found.best.value == pytest.approx(max(record.value for record in found.records)) == pytest.approx(0.7)


def test_a_failed_trial_is_told_in_a_line_and_the_others_go_on(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep(made(tmp_path / "sweep", grid=("loss=joint,independent",)), recipe)
    assert [record.state for record in found.records] == ["failed", "complete"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "loss=joint: failed (exit 1: recsys: the loss of member dcnv2 is nan at step 0; see " in line
    assert "Traceback" not in line
    with pytest.raises(InputError, match="no trial came to its end; the last: exit 1: recsys: the loss"):
        sweep(made(tmp_path / "other", grid=("loss=joint",)), recipe)


def test_a_trial_that_ends_in_nan_has_failed_and_is_made_once(recipe: TrainConfig, tmp_path: Path) -> None:
    found = sweep(made(tmp_path / "sweep", grid=("seed=99,3",)), recipe)
    assert [(record.state, record.problem) for record in found.records] == [
        ("failed", "ne is nan at its end"),
        ("complete", None),
    ]
    assert sorted(path.name for path in (tmp_path / "sweep" / "trials").glob("*/")) == ["0000", "0001"]
    first = json.loads((tmp_path / "sweep" / "results.json").read_text(), parse_constant=pytest.fail)[0]
    assert first["validations"]["3"] is None
    with pytest.raises(InputError, match="no trial came to its end; the last: ne is nan at its end"):
        sweep(made(tmp_path / "other", grid=("seed=99",)), recipe)


def test_what_failed_is_tried_again_at_the_next_start(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(tmp_path / "sweep", grid=("seed=5,99,4",))
    assert [record.state for record in sweep(config, recipe).records] == ["complete", "failed", "complete"]
    (tmp_path / "train.py").write_text("import sys; sys.exit('recsys: no room on the disk')")
    with pytest.raises(InputError, match=r"no trial came to its end; the last: exit 1: recsys: no room on the disk"):
        sweep(made(tmp_path / "other", grid=("seed=5,99",)), recipe)
    (tmp_path / "train.py").write_text("import sys; print('Killed as it began'); sys.exit(9)")
    with pytest.raises(InputError, match=r"no trial came to its end; the last: exit 9: Killed as it began; see \S+$"):
        sweep(made(tmp_path / "other", grid=("seed=5,99",)), recipe)
    assert capsys.readouterr().err.count("sweep: tries again what failed: seed=") == 2
    (tmp_path / "train.py").write_text(STAND_IN)
    found = sweep(made(tmp_path / "other", grid=("seed=5,99",)), recipe)
    assert [(record.name, record.state) for record in found.records] == [("0000", "complete"), ("0001", "failed")]
    # What was trained to its end is not: neither the complete nor those that ended in NaN.
    assert sweep(made(tmp_path / "other", grid=("seed=5,99",)), recipe).records == found.records
    assert len(sweep(config, recipe).records) == 3
    starts = [path.read_text() for name in ("sweep", "other") for path in tmp_path.glob(f"{name}/trials/*/starts")]
    assert starts == ["x"] * 5


def test_drawn_values_that_failed_are_tried_again(recipe: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "pause.json").unlink()
    config = SweepConfig(out=tmp_path / "s", space=("optimizer.dense_lr=log(1e-4,1e-2)",), trials=2)
    with pytest.raises(InputError, match="no trial came to its end"):
        sweep(config, recipe)
    drawn = [json.loads(path.read_text())["optimizer"] for path in sorted((config.out / "trials").glob("*.json"))]
    (tmp_path / "pause.json").write_text("0")
    found = sweep(config, recipe)
    assert [record.values["optimizer.dense_lr"] for record in found.records] == [one["dense_lr"] for one in drawn]
    assert [record.state for record in found.records] == ["complete"] * 2


def test_data_that_cannot_be_opened_are_refused_before_the_first_trial(recipe: TrainConfig, tmp_path: Path) -> None:
    grid = made(tmp_path / "sweep", grid=(f"data={tmp_path},{tmp_path}/nope",))
    for config, base in (
        (grid, recipe),
        (made(tmp_path / "sweep"), dataclasses.replace(recipe, data=tmp_path / "nope")),
    ):
        with pytest.raises(InputError, match="nope"):
            sweep(config, base)
        assert not config.out.exists()


def test_trials_with_one_folder_for_checkpoints_are_refused(recipe: TrainConfig, tmp_path: Path) -> None:
    shared = dataclasses.replace(recipe, checkpoints=dataclasses.replace(recipe.checkpoints, folder=tmp_path / "all"))
    with pytest.raises(InputError, match=r"^--checkpoints.folder \S+: all trials would write to it"):
        sweep(made(tmp_path / "sweep"), shared)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("pruner", ["median", "none"])
def test_a_hopeless_trial_is_stopped_on_the_way(recipe: TrainConfig, tmp_path: Path, pruner: Any) -> None:
    (tmp_path / "pause.json").write_text("0.2")
    found = sweep(made(tmp_path / "sweep", grid=("seed=1,2,9",), pruner=pruner, warmup_trials=2), recipe)
    hopeless = next(record for record in found.records if record.values["seed"] == "9")
    folder = tmp_path / "sweep" / "trials" / hopeless.name
    if pruner == "none":
        assert hopeless.state == "complete"
    else:
        assert hopeless.state == "stopped"
        assert max(hopeless.validations) < 3
        assert (folder / "stopped").exists()  # by SIGTERM, which it may answer
    assert [record.state for record in found.records if record is not hopeless] == ["complete"] * 2


def test_tpe_draws_from_ranges(recipe: TrainConfig, tmp_path: Path) -> None:
    ranges = ("seed=int(1,8)", "optimizer.dense_lr=log(1e-4,1e-2)")
    config = SweepConfig(out=tmp_path / "sweep", grid=("loss=independent",), space=ranges, trials=4)
    found = sweep(config, recipe)
    assert len(found.records) == 4
    drawn = [record.values["optimizer.dense_lr"] for record in found.records]
    assert len(set(drawn)) == 4
    assert all(1e-4 <= float(rate) <= 1e-2 for rate in drawn)
    assert all(record.value == pytest.approx(int(record.values["seed"]) / 10) for record in found.records)


def test_a_trial_that_does_not_answer_is_killed(recipe: TrainConfig, tmp_path: Path) -> None:
    deaf = tmp_path / "train.py"
    deaf.write_text(deaf.read_text().replace("signal.signal(signal.SIGTERM, lambda", "(lambda *_: 0)(0, lambda", 1))
    deaf.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + deaf.read_text())
    (tmp_path / "pause.json").write_text("0.2")
    config = made(tmp_path / "sweep", grid=("seed=1,2,9",), warmup_trials=2, grace_s=0.1)
    states = {record.values["seed"]: record.state for record in sweep(config, recipe).records}
    assert states == {"1": "complete", "2": "complete", "9": "stopped"}


KILLED = """
import sys
from recsys.config import load_file
from recsys.studies.sweep import trial
from recsys.studies.sweep.config import SweepConfig
from recsys.studies.sweep.search import sweep
from recsys.training.config import TrainConfig
folder = sys.argv[1]
trial._command = lambda _, path: [sys.executable, f"{folder}/train.py", str(path)]
from pathlib import Path
sweep(SweepConfig(out=Path(folder) / "sweep", grid=("seed=5,3,4",)), load_file(TrainConfig, Path(folder) / "base.json"))
"""


def test_a_killed_sweep_goes_on_with_the_trial_it_was_in(recipe: TrainConfig, tmp_path: Path) -> None:
    from recsys.config import dump

    (tmp_path / "base.json").write_text(json.dumps(dump(recipe)))
    (tmp_path / "pause.json").write_text("0.3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    trials = tmp_path / "sweep" / "trials"
    deadline = time.monotonic() + 60
    while not (trials / "0001" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while not (trials / "0001" / "stopped").exists():  # the trial does not outlive its sweep
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "pause.json").write_text("0")
    found = sweep(made(tmp_path / "sweep"), recipe)
    assert [record.name for record in found.records] == ["0000", "0001", "0003"]  # 0002 is the second try of 0001
    assert [record.values["seed"] for record in found.records] == ["5", "3", "4"]
    assert all(list(record.validations) == [1, 2, 3] for record in found.records)
    assert (trials / "0000" / "starts").read_text() == "x"
    assert (trials / "0001" / "starts").read_text() == "xx"


@pytest.mark.slow
def test_real_trainings_are_swept(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    options = ["--grid", "optimizer.dense_lr=1e-9,1e-3", "--pruner", "none"]
    train = ["--data", f"{prepared}", "--members", "dcnv2", "--train.num-steps", "20", "--train.validate-every", "10"]
    assert main(["sweep", "criteo_kaggle", "--out", f"{out}", *options, "--", *train, "--train.batch-size", "128"]) == 0
    records = json.loads((out / "results.json").read_text())
    assert [record["state"] for record in records] == ["complete"] * 2
    assert [list(record["validations"]) for record in records] == [["10", "20"]] * 2
    best = load_file(TrainConfig, out / "best.json")
    assert best.optimizer.dense_lr == 1e-3
    assert search.steps_of(best, best.data) == 20
