"""The best possible predictions: which files are no truth of a log, told in a line."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys.config import InputError
from recsys.training.evaluate import bayes_optimal

COLUMNS: dict[str, Any] = {"label": [0, 1], "probability": [0.1, 0.9]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row": [0], "weight": [1.0]}, "it has no column label and no probability$"),
        ({"row": [0], "label": [1], "dcnv2": [0.3]}, "it has no column probability$"),
        ({**COLUMNS, "row": [0, 1]}, r"\(cannot add row_index with name 'row'"),
        (None, r"\(parquet: File out of specification"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(tmp_path: Path, columns: dict[str, Any] | None, message: str) -> None:
    manifest = {"config": {"split": "time", "seed": 0}, "num_rows": 2}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    truth = tmp_path / "wrong.parquet"
    if columns is None:
        truth.write_text("no Parquet")
    else:
        pl.DataFrame(columns).write_parquet(truth)
    with pytest.raises(InputError, match=rf"^{truth}: not a truth file of `recsys synth`:? {message}") as caught:
        bayes_optimal(truth, tmp_path, "test", 1, 1)
    assert "\n" not in str(caught.value)
