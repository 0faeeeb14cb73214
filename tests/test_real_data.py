"""Prepare real Criteo rows: pinned numbers, each once found by an independent count in plain Python."""

import os
from pathlib import Path

import pytest

from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.schema import Schema

NAME = "criteo_kaggle_137k.txt.gz"

NUM_IDS = {
    "I1": 27, "I2": 78, "I3": 52, "I4": 22, "I5": 196, "I6": 74, "I7": 54, "I8": 22, "I9": 69, "I10": 5, "I11": 22,
    "I12": 20, "I13": 30,
    "C1": 160, "C2": 439, "C3": 1632, "C4": 2243, "C5": 58, "C6": 10, "C7": 3731, "C8": 88, "C9": 4, "C10": 2955,
    "C11": 2522, "C12": 1681, "C13": 2140, "C14": 26, "C15": 2234, "C16": 1917, "C17": 10, "C18": 1324, "C19": 603,
    "C20": 4, "C21": 1739, "C22": 9, "C23": 15, "C24": 2022, "C25": 41, "C26": 1526,
}  # fmt: skip

# All others have no missing value.
NULL_SHARES = {
    "I1": 0.4509, "I3": 0.2134, "I4": 0.2145, "I5": 0.0263, "I6": 0.2227, "I7": 0.0428, "I8": 0.0005, "I9": 0.0428,
    "I10": 0.4509, "I11": 0.0428, "I12": 0.7652, "I13": 0.2145,
    "C3": 0.0345, "C4": 0.0345, "C6": 0.1218, "C12": 0.0345, "C16": 0.0345, "C19": 0.4418, "C20": 0.4418,
    "C21": 0.0345, "C22": 0.7613, "C24": 0.0345, "C25": 0.4418, "C26": 0.4418,
}  # fmt: skip


@pytest.fixture(scope="module")
def log() -> Path:
    if "RECSYS_REAL_DATA" not in os.environ:
        pytest.skip(f"RECSYS_REAL_DATA names no folder that holds {NAME}")
    return Path(os.environ["RECSYS_REAL_DATA"]) / NAME


@pytest.fixture(scope="module")
def manifest(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of the rule that makes categories of integers too, so that one run shows the vocabularies of all 39 columns."""
    out = tmp_path_factory.mktemp("real") / "out"
    config = PrepareConfig(
        format="criteo_kaggle", paths=(log,), out=out, integers="log_squared_bucket", split="random", seed=2021
    )
    return prepare(config) | {"schema": Schema.load(out)}


def test_rows_and_clicks(manifest: dict) -> None:
    assert manifest["num_rows"] == 137_139
    assert manifest["num_malformed"] == 0
    splits = manifest["splits"]
    assert {name: split["num_rows"] for name, split in splits.items()} == {
        "train": 109_854,
        "valid": 13_709,
        "test": 13_576,
    }
    clicks = sum(split["label_mean"] * split["num_rows"] for split in splits.values())
    assert round(clicks / manifest["num_rows"], 4) == 0.2568


def test_vocabulary_sizes(manifest: dict) -> None:
    assert manifest["schema"].sparse == NUM_IDS


def test_missing_values(manifest: dict) -> None:
    shares = {name: round(share, 4) for name, share in manifest["null_share"].items() if share}
    assert shares == NULL_SHARES
    assert len(manifest["null_share"]) == 40
