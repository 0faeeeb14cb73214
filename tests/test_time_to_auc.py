"""The benchmark of the time to an AUC stops where it is reached, and runs in miniature; no timing is asserted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from time_to_auc import Config, main, synthetic

from recsys.config import InputError

LIBRARIES = pytest.mark.filterwarnings("ignore")  # of what others tell when they are used as they come


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)  # a job takes all cores


@LIBRARIES
@pytest.mark.parametrize("target", [0.55, 0.99])
def test_runs_end_where_the_auc_is_reached_or_with_the_data(target: float, prepared: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"backbone": "fnn", "batch_size": 500, "validate_every": 2, "num_epochs": 1, "turns": 1}
    config = Config(
        **sizes, data=prepared, target_auc=target, baseline=True, baseline_table_lr=0.05, json=tmp_path / "out.json"
    )
    main(config)
    lines = {line["config"]["case"]: line for line in map(json.loads, (tmp_path / "out.json").read_text().splitlines())}
    assert list(lines) == ["bf16", "fp32", "plain_pytorch"]
    for case, line in lines.items():
        assert {"commit", "machine", "versions", "command", "date", "name"} <= line.keys()
        metrics, rows = line["metrics"], line["metrics"]["rows"]["median"]
        assert metrics["seconds"]["median"] > 0
        if target == 0.99:
            assert (metrics["reached"], line["ratios"]) == (0, {})
            assert rows == 6000  # the epoch, but for its tail
        else:
            assert metrics["reached"] == 1
            assert metrics["auc"]["low"] >= target
            assert rows % 1000 == 0
            assert rows < 6000  # before the end
            others = lines.keys() - {case} if case != "plain_pytorch" else set()
            assert line["ratios"].keys() == {f"ratio_to_{other}" for other in others}
            for other in others:
                expected = lines[other]["metrics"]["seconds"]["median"] / metrics["seconds"]["median"]
                assert line[f"ratio_to_{other}"] == pytest.approx(expected)


def test_a_target_that_nothing_can_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--target-auc 0\.95: the true probabilities have 0\.\d+; ask for less"):
        synthetic(Config(target_auc=0.95, num_rows=2000), tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": "dcnv3"}, "unknown backbone 'dcnv3'"),
        ({"precision": ()}, "precision is empty"),
        ({"turns": 0}, "turns 0"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**values)
