"""Clicks and impressions as a feature, as rows, and as weights."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.data.schema import SPLITS, Schema
from recsys.data.verify import verify
from tests.logs import KDD12, in_small_parts, make_rows, read, run, text, write
from tests.slow_prepare import assert_prepared, slow_keys, slow_prepare, slow_splits


def kdd12_rows() -> list[dict[str, str]]:
    """Among them: no impression at all, and more clicks than impressions."""
    return make_rows(300, fmt=KDD12)


def test_impressions_are_a_feature(tmp_path: Path) -> None:
    rows = kdd12_rows()
    run(tmp_path / "out", write(tmp_path / "log.txt", text(rows, KDD12)), fmt="kdd12", threshold=2)
    slow = slow_prepare(KDD12, rows, threshold=2)
    assert next(iter(slow.vocabularies)) == "Impression"
    assert_prepared(tmp_path / "out", slow)
    assert verify(tmp_path / "out", show_progress=False) == []


@pytest.mark.parametrize("split", ["random", "time", "hash:AdID"])
def test_impressions_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    rows = kdd12_rows()
    clicks = [int(row["Click"]) for row in rows]
    others = [max(int(row["Impression"]) - int(row["Click"]), 0) for row in rows]
    in_small_parts(monkeypatch, chunk_bytes=2000)
    log = write(tmp_path / "log.txt", text(rows, KDD12))
    manifest = run(tmp_path / "out", log, fmt="kdd12", threshold=1, split=split, impressions="expand")
    assert manifest["num_rows"] == sum(clicks) + sum(others)
    schema = Schema.load(tmp_path / "out")
    assert (schema.labels, schema.weight) == (("Click",), None)
    assert "Impression" not in schema.sparse

    keys = [slow_keys(KDD12, row, "log1p") for row in rows]
    expanded = [(i, label) for i in range(300) for label in [1] * clicks[i] + [0] * others[i]]
    if split == "time":
        splits = slow_splits("time", 2021, [expanded], [])
    else:  # all rows of an impression count are on one side
        of_raw = slow_splits(split, 2021, [rows], keys)
        splits = [of_raw[i] for i, _ in expanded]
    for at, name in enumerate(SPLITS):
        own = [(label, keys[i]["AdID"]) for (i, label), place in zip(expanded, splits, strict=True) if place == at]
        frame = read(tmp_path / "out", name)
        assert frame["Click"].to_list() == [label for label, _ in own]
        if name == "train":
            known = dict(pl.read_parquet(tmp_path / "out/vocabulary/AdID.parquet").select("id", "key").rows())
            assert [known.get(i) for i in frame["AdID"]] == [key for _, key in own]
    assert verify(tmp_path / "out", show_progress=False) == []


def test_weighted_rows_weigh_as_much_as_expanded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_parts(monkeypatch, chunk_bytes=2000)
    log = write(tmp_path / "log.txt", text(kdd12_rows(), KDD12))
    sums: dict[str, list[tuple[float, float]]] = {}
    for how in ("expand", "weight"):
        out = tmp_path / how
        manifest = run(out, log, fmt="kdd12", threshold=1, split="random", impressions=how)
        keys = pl.read_parquet(out / "vocabulary/AdID.parquet").select(AdID="id", key="key")
        sums[how] = []
        for name in SPLITS:
            frame = read(out, name).join(keys, on="AdID", how="left")
            weight = frame["weight"].to_numpy() if how == "weight" else np.ones(frame.height)
            label = frame["Click"].to_numpy().astype(float)
            probability = (frame["key"].fill_null(0) % 7).to_numpy().astype(float) / 10 + 0.2
            loss = -np.log(np.where(label == 1, probability, 1 - probability))
            sums[how].append((float(weight.sum()), float((weight * loss).sum())))
        assert verify(out, show_progress=False) == []
    assert Schema.load(tmp_path / "weight").weight == "weight"
    assert manifest["num_rows"] < sum(weight for weight, _ in sums["expand"])
    np.testing.assert_allclose(sums["weight"], sums["expand"])
