"""What a sweep is asked to try: read strictly, and put into the config's fields."""

from pathlib import Path
from typing import Any

import pytest

from recsys.cli import main
from recsys.config import InputError
from recsys.recipes import synthetic
from recsys.studies.sweep.config import SweepConfig
from recsys.studies.sweep.space import Choice, Range, applied, described, read_space

OUT = Path("sweep")


def space(**options: Any) -> dict[str, Choice | Range]:
    return read_space(SweepConfig(out=OUT, **options))


def test_values_and_ranges_are_read() -> None:
    found = space(
        grid=("optimizer.dense_lr=1e-4, 1e-3", "members=dcnv2;dcnv2:width=2,dense_lr=1e-3 wukong"),
        space=("optimizer.table_lr=log(1e-3,1e-1)", "model.embedding_dim=int(4, 16)"),
    )
    assert found == {
        "optimizer.dense_lr": Choice(("1e-4", "1e-3")),
        "members": Choice(("dcnv2", "dcnv2:width=2,dense_lr=1e-3 wukong")),
        "optimizer.table_lr": Range("log", 1e-3, 1e-1),
        "model.embedding_dim": Range("int", 4, 16),
    }


def test_values_reach_their_fields() -> None:
    recipe = synthetic()
    values: dict[str, str | float | int] = {
        "optimizer.dense_lr": "1e-4",
        "optimizer.table_lr": 0.25,
        "members": "dcnv2*2 wukong",
        "model.embedding_dim": 12,
        "model.head_hidden": "64 32",
        "model.tables": "shared",
        "train.num_steps": "none",
        "merge": "weighted",
        "seed": "7",
    }
    made = applied(recipe, values)
    assert made.optimizer.dense_lr == 1e-4
    assert made.optimizer.table_lr == 0.25
    assert made.members == ("dcnv2*2", "wukong")
    assert made.model.embedding_dim == 12
    assert made.model.head_hidden == (64, 32)
    assert made.model.tables == "shared"
    assert made.train.num_steps is None
    assert (made.merge, made.seed) == ("weighted", 7)
    assert made.data == recipe.data
    assert described({"optimizer.table_lr": 0.123456, "seed": "7"}) == "optimizer.table_lr=0.1235, seed=7"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"grid": ("optimizer.dens_lr=1",)}, "--grid optimizer.dens_lr: unknown field 'dens_lr' of optimizer; did you"),
        ({"grid": ("optimiser.dense_lr=1",)}, "unknown field 'optimiser' of the config; did you mean optimizer"),
        ({"grid": ("seed.more=1",)}, "unknown field 'more' of seed; seed has none"),
        ({"grid": ("optimizer=1",)}, "--grid optimizer: has fields of its own; name one, such as optimizer."),
        ({"grid": ("seed",)}, "--grid 'seed' is no FIELD=..."),
        ({"grid": ("seed=",)}, "--grid 'seed=' is no FIELD=..."),
        ({"grid": ("seed=1,,2",)}, "a value is empty, or named twice"),
        ({"grid": ("seed=1,1",)}, "a value is empty, or named twice"),
        ({"grid": ("seed=1", "seed=2")}, "seed is named twice"),
        ({"grid": ("seed=1.5",)}, "--grid seed: '1.5' is no int"),
        ({"grid": ("optimizer.dense_lr=fast",)}, "--grid optimizer.dense_lr: 'fast' is no float"),
        ({"grid": ("loss=mean",)}, "--grid loss: 'mean' is none of independent, joint"),
        ({"grid": ("out=a",)}, "out is each trial's own"),
        ({"space": ("optimizer.dense_lr=log(0,1)",)}, "log takes a range above 0"),
        ({"space": ("optimizer.dense_lr=uniform(2,1)",)}, "the lower end first"),
        ({"space": ("optimizer.dense_lr=uniform(1,1)",)}, "the lower end first"),
        ({"space": ("seed=int(1,2.5)",)}, "int takes a range of whole numbers"),
        ({"space": ("optimizer.dense_lr=1e-3",)}, "write FIELD=log"),
        ({"space": ("optimizer.dense_lr=log(a,b)",)}, "could not convert string to float"),
        ({"space": ("loss=uniform(0,1)",)}, "is none of independent, joint"),
    ],
)
def test_what_cannot_be_tried_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as refused:
        space(**options)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "nothing to try"),
        ({"grid": ("seed=1",), "trials": 3}, "a grid tries all combinations"),
        ({"space": ("seed=int(1,2)",), "method": "grid"}, "method grid cannot draw"),
        ({"grid": ("seed=1",), "method": "random", "trials": 0}, "trials 0 must be at least 1"),
        ({"grid": ("seed=1",), "grace_s": -1.0}, "grace_s -1.0 must not be negative"),
    ],
)
def test_a_sweep_that_cannot_be_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SweepConfig(out=OUT, **options)


def test_values_that_cannot_be_together_are_told_before_any_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "members=dcnv2,dcn2"]
    assert main(["sweep", "synthetic", "--out", f"{tmp_path}/sweep", *grid]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recsys: sweep, members=dcn2: ")
    assert not (tmp_path / "sweep").exists()


def test_the_command_line_reads_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("recsys.studies.sweep.search.sweep", lambda *parts: asked.extend(parts))
    options = ["--out", f"{tmp_path}", "--grid", "seed=1,2", "--grid", "loss=joint", "--metric", "auc"]
    assert main(["sweep", "synthetic", *options, "--", "--train.num-steps", "7"]) == 0
    config, recipe = asked
    assert config == SweepConfig(out=tmp_path, grid=("seed=1,2", "loss=joint"), metric="auc")
    assert recipe.train.num_steps == 7
