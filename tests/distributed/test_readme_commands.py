"""The README's commands of merging run, as they stand there but for fewer steps."""

import re
import shlex
from pathlib import Path

import pytest

from recsys.cli import main
from recsys.config import load_file
from recsys.studies.config import MergeStudyConfig
from recsys.training.config import TrainConfig
from recsys.training.predictions import load_predictions

TEXT = (Path(__file__).parents[2] / "README.md").read_text()


def commands() -> list[list[str]]:
    """Arguments of each `recsys` line of the section on merging."""
    (block,) = re.findall(r"## Merge\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def test_merging_works_as_the_readme_says(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/criteo_kaggle").symlink_to(prepared)
    verbs = []
    for verb, *arguments in commands():
        verbs.append(verb)
        if verb == "study":
            assert main([verb, *arguments, "--dry-run"]) == 0
            continue
        few = ["--train.num-steps", "3"] if verb == "train" else []
        budget = [argument.replace("3ms", "30s") for argument in arguments]  # a busy machine answers late
        assert main([verb, *budget, *few]) == 0
    assert verbs == ["train", "train", "merge", "predict", "predict", "study"]
    merged = load_file(TrainConfig, Path("runs/ab/config.json"))
    names = [spec.name for spec in merged.specs()]
    assert names == ["dcnv2", "dcnv2_2", "wukong", "finalmlp", "wide"]
    assert merged.merge == "weighted"
    assert set(load_predictions(Path("test.parquet"))[0].names) == set(names)
    told = capsys.readouterr().out
    assert all(name in told for name in (*names, "share_by_num_members"))
    assert MergeStudyConfig(out=Path("study")).main in told
