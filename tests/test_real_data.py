"""Prepare real rows of public logs: pinned numbers, each once found by an independent count in plain Python."""

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys.data.formats import MLPERF_NUM_IDS
from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.schema import SPLITS, Schema
from recsys.data.verify import verify
from tests.logs import read

KAGGLE, TERABYTE, AVAZU = "criteo_kaggle_137k.txt.gz", "criteo_terabyte_day0_10k.tsv.gz", "avazu_14k.csv.gz"

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

TERABYTE_NUM_IDS = {
    "C1": 2263, "C2": 1574, "C3": 2392, "C4": 643, "C5": 1265, "C6": 3, "C7": 1738, "C8": 484, "C9": 20, "C10": 2115,
    "C11": 1231, "C12": 2606, "C13": 10, "C14": 326, "C15": 1010, "C16": 29, "C17": 4, "C18": 150, "C19": 13,
    "C20": 2297, "C21": 1768, "C22": 2211, "C23": 1075, "C24": 1902, "C25": 29, "C26": 24,
}  # fmt: skip
TERABYTE_NULL_SHARES = {
    "I1": 0.2385, "I2": 0.1017, "I3": 0.2538, "I4": 0.4927, "I5": 0.4652, "I6": 0.0916, "I7": 0.0315, "I10": 0.0916,
    "I11": 0.4652, "I12": 0.0155, "I13": 0.2538, "C1": 0.0258, "C10": 0.0258, "C11": 0.0258, "C14": 0.4667,
    "C16": 0.4667, "C17": 0.4667, "C20": 0.0258, "C21": 0.0258, "C22": 0.0258, "C23": 0.4667,
}  # fmt: skip
# Of hashed ids: how many occur, the least, the greatest, the sum over rows.
TERABYTE_HASHED = {
    "C1": (2756, 0, 39_999_111, 215_810_069_934),
    "C2": (1762, 53, 39_047, 228_537_492),
    "C6": (2, 1, 2, 18_782),
    "C26": (18, 1, 33, 238_542),
}
AVAZU_NUM_IDS = {
    "hour": 5, "weekday": 4, "is_weekend": 2, "C1": 7, "banner_pos": 5, "site_id": 271, "site_domain": 225,
    "site_category": 14, "app_id": 184, "app_domain": 26, "app_category": 14, "device_id": 85, "device_ip": 1023,
    "device_model": 712, "device_type": 5, "device_conn_type": 5, "C14": 321, "C15": 5, "C16": 6, "C17": 162, "C18": 5,
    "C19": 39, "C20": 99, "C21": 37,
}  # fmt: skip


def raw_log(name: str) -> Path:
    if "RECSYS_REAL_DATA" not in os.environ:
        pytest.skip(f"RECSYS_REAL_DATA names no folder that holds {name}")
    return Path(os.environ["RECSYS_REAL_DATA"]) / name


def prepared(out: Path, name: str, **settings: Any) -> dict:
    """Prepare and verify every byte; returns the manifest and the schema."""
    manifest = prepare(PrepareConfig(paths=(raw_log(name),), out=out, split="random", seed=2021, **settings))
    assert verify(out, show_progress=False, decode=True) == []
    assert manifest["num_malformed"] == 0
    return manifest | {"schema": Schema.load(out)}


def num_rows(manifest: dict) -> list[int]:
    return [manifest["splits"][name]["num_rows"] for name in SPLITS]


def label_mean(manifest: dict) -> float:
    clicks = sum(split["label_mean"] * split["num_rows"] for split in manifest["splits"].values())
    return round(clicks / manifest["num_rows"], 4)


def null_shares(manifest: dict) -> dict[str, float]:
    return {name: round(share, 4) for name, share in manifest["null_share"].items() if share}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of the rule that makes categories of integers too, so that one run shows the vocabularies of all 39 columns."""
    out = tmp_path_factory.mktemp("real") / "out"
    return prepared(out, KAGGLE, format="criteo_kaggle", integers="log_squared_bucket")


def test_rows_and_clicks(manifest: dict) -> None:
    assert manifest["num_rows"] == 137_139
    assert num_rows(manifest) == [109_854, 13_709, 13_576]
    assert label_mean(manifest) == 0.2568


def test_vocabulary_sizes(manifest: dict) -> None:
    assert manifest["schema"].sparse == NUM_IDS


def test_missing_values(manifest: dict) -> None:
    assert null_shares(manifest) == NULL_SHARES
    assert len(manifest["null_share"]) == 40


@pytest.mark.parametrize("vocabulary", ["count", "hash"])
def test_a_day_of_terabyte(tmp_path: Path, vocabulary: str) -> None:
    manifest = prepared(tmp_path / "out", TERABYTE, format="criteo_1tb", vocabulary=vocabulary)
    assert manifest["num_rows"] == 10_000
    assert num_rows(manifest) == [7987, 1041, 972]
    assert label_mean(manifest) == 0.0265
    assert null_shares(manifest) == TERABYTE_NULL_SHARES
    if vocabulary == "count":
        assert manifest["schema"].sparse == TERABYTE_NUM_IDS
        return
    assert tuple(manifest["schema"].sparse.values()) == MLPERF_NUM_IDS
    log = pl.concat([read(tmp_path / "out", name) for name in SPLITS])
    for name, expected in TERABYTE_HASHED.items():
        ids = log[name].cast(pl.Int64)
        assert (ids.n_unique(), ids.min(), ids.max(), ids.sum()) == expected


def test_avazu(tmp_path: Path) -> None:
    manifest = prepared(tmp_path / "out", AVAZU, format="avazu")
    assert manifest["num_rows"] == 14_077
    assert num_rows(manifest) == [11_246, 1441, 1390]
    assert label_mean(manifest) == 0.1731
    assert null_shares(manifest) == {}
    assert manifest["schema"].dense == ()
    assert manifest["schema"].sparse == AVAZU_NUM_IDS
