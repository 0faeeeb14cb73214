"""Files of predictions, of `recsys predict` and of other frameworks, merge by their rows."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import InputError
from recsys.studies.merge_files import merge_files
from recsys.studies.merge_runs import MergeConfig
from recsys.training.predictions import Predictions, load_predictions


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_files_of_other_frameworks_merge_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    first, second = rng.normal(labels, 1), rng.normal(labels, 2)
    order = rng.permutation(200)
    one = write(tmp_path / "one.parquet", row=np.arange(200), label=labels, ours=first)
    two = write(tmp_path / "two.parquet", row=order, label=labels[order].astype(float), ours=second[order])
    metrics = merge_files(MergeConfig(sources=(one, two), out=tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["row", "label", "weight", "ours", "two_ours", "merged"]
    np.testing.assert_allclose(table["merged"].to_numpy(), (first + second) / 2, atol=1e-5)
    assert set(metrics) == {"ours", "two_ours", "merged"}
    fitted = MergeConfig(sources=(one, two), out=tmp_path / "w.parquet", rule="weighted", fit_on=(one, two))
    # Fitted on the very rows that it is scored on: at most the plain mean.
    assert merge_files(fitted)["merged"].logloss <= metrics["merged"].logloss


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows, labels, logit = np.arange(4), np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    good = write(tmp_path / "good.parquet", row=rows, label=labels, m=logit)

    def refused(message: str, rule: str | None = None, **columns: Any) -> None:
        bad = write(tmp_path / "bad.parquet", **columns)
        with pytest.raises(InputError, match=message):
            merge_files(MergeConfig(sources=(good, bad), out=tmp_path / "out.parquet", rule=rule))
        assert not (tmp_path / "out.parquet").exists()

    refused("bad.parquet: no column 'row'", label=labels, m=logit)
    refused("bad.parquet: no column 'label'", row=rows, m=logit)
    refused("no column of logits beside row, label", row=rows, label=labels)
    refused("row 3 is missing there", row=rows[:3], label=labels[:3], m=logit[:3])
    refused("row 4 is there alone", row=np.arange(5), label=np.append(labels, 0), m=np.append(logit, 0))
    refused("row 1: label 0, in .*good.parquet 1", row=rows, label=np.zeros(4), m=logit)
    refused("column 'label', row 2: 0.5 is neither 0 nor 1", row=rows, label=labels / 2, m=logit)
    refused("column 'row' does not give every row", row=np.zeros(4), label=labels, m=logit)
    refused("column 'm', row 3: nan is no finite number", row=rows, label=labels, m=np.where(rows == 2, np.nan, logit))
    refused("column 'm' is string, not numbers", row=rows, label=labels, m=["a", "b", "c", "d"])
    refused("--rule stacked is fitted; give validation rows", rule="stacked", row=rows, label=labels, m=logit)
    (tmp_path / "bad.parquet").write_text("row,label,m")
    with pytest.raises(InputError, match=r"bad\.parquet: cannot read it as Parquet"):
        load_predictions(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="unknown merge rule 'mean'; did you mean"):
        MergeConfig(sources=(good,), out=tmp_path / "out", rule="mean")


def test_what_else_a_file_cannot_hold(tmp_path: Path) -> None:
    rows, labels, logit = np.arange(4), np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    path = tmp_path / "bad.parquet"

    def refused(message: str, table: pa.Table) -> None:
        pq.write_table(table, path)
        with pytest.raises(InputError, match=rf"bad\.parquet.*{message}"):
            load_predictions(path)

    whole = pa.table({"row": rows, "label": labels, "m": logit})
    refused("no row in it", whole.slice(0, 0))
    refused("column 'm' stands twice", whole.append_column("m", pa.array(logit)))
    refused("'weight', row 2: -1 is below 0", whole.append_column("weight", pa.array([1.0, -1.0, 1.0, 1.0])))
    refused("column 'weight' is 0 in every row", whole.append_column("weight", pa.array(np.zeros(4))))
    refused("column 'm', row 4: 1e.60 is no finite", whole.set_column(2, "m", pa.array([0.1, 0.2, 0.3, 1e60])))
    for metadata, message in (
        (b"{", "metadata 'recsys': not JSON"),
        (b"\xff", "metadata 'recsys': not JSON"),
        (b"[]", "metadata 'recsys': expected a mapping"),
        (b'{"split": 3}', r"metadata 'recsys'\.split: expected str, found 3"),
    ):
        refused(message, whole.replace_schema_metadata({b"recsys": metadata}))
    weighted = write(tmp_path / "weighted.parquet", row=rows, label=labels, weight=[1.0, 0.0, 2.0, 1.0], m=logit)
    pq.write_table(whole, path)
    with pytest.raises(InputError, match=r"bad\.parquet, row 1: weight 1, in .*weighted.parquet 0; .*counts once"):
        merge_files(MergeConfig(sources=(weighted, path), out=tmp_path / "out.parquet"))


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "one.parquet", row=[30, 10, 20], label=[0, 1, 0], weight=[1.0, 2.0, 0.0], m=[3.0, 1.0, 2.0])
    merge_files(MergeConfig(sources=(path,), out=tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == [10, 20, 30]
    assert table["weight"].to_pylist() == [2.0, 0.0, 1.0]
    assert table["m"].to_pylist() == [1.0, 2.0, 3.0]


def test_members_keep_names_of_their_own(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"row": [0, 1], "label": [0, 1], "ours": [0.1, 0.2]}
    one = write(tmp_path / "one.parquet", **columns, two_ours=[0.3, 0.4])
    two = write(tmp_path / "two.parquet", **columns)
    with pytest.raises(InputError, match=r"two\.parquet: two members would be called two_ours.*rename the file"):
        merge_files(MergeConfig(sources=(one, two), out=tmp_path / "out.parquet"))
    for name in ("row", "label", "weight", "merged"):
        predictions = Predictions((name,), np.zeros((2, 1)), np.zeros(2), np.ones(2))
        with pytest.raises(AssertionError, match="names of their own"):
            predictions.save(tmp_path / "out.parquet", {})
    assert not (tmp_path / "out.parquet").exists()


def predicted(path: Path, columns: Sequence[str] = ("logit",), seed: int = 0, **facts: str) -> Path:
    """A file of 200 rows and noisy logits, as `recsys predict` writes it."""
    rng = np.random.default_rng(seed)
    labels = np.arange(200) % 2
    logits = labels[:, None] + rng.normal(0, 1 + seed, (200, len(columns)))
    Predictions(tuple(columns), logits, labels.astype(np.float32), np.ones(200, np.float32)).save(path, facts)
    return path


def test_fit_on_files_stand_for_the_sources_in_their_order(tmp_path: Path) -> None:
    of_test: dict[str, Any] = {"schema": "s", "split": "test", "manifest": "m"}
    of_valid: dict[str, Any] = {"schema": "s", "split": "valid", "data": "elsewhere"}
    ours = predicted(tmp_path / "ours_test.parquet", **of_test)
    theirs = predicted(tmp_path / "theirs_test.parquet", seed=2)
    fit_on = (
        predicted(tmp_path / "ours_valid.parquet", **of_valid),
        predicted(tmp_path / "theirs_valid.parquet", seed=2),
    )
    config = MergeConfig(sources=(ours, theirs), out=tmp_path / "out.parquet", rule="weighted", fit_on=fit_on)
    merge_files(config)
    _, facts, _ = load_predictions(config.out)
    assert {key: facts[key] for key in of_test} == of_test
    first, second = map(float, facts["weights"].split())
    assert first > 0.6 > second
    turned = dataclasses.replace(config, sources=(theirs, ours), fit_on=fit_on[::-1])
    merge_files(turned)
    _, facts, _ = load_predictions(config.out)
    assert list(map(float, facts["weights"].split())) == pytest.approx([second, first], abs=1e-6)
    wide = predicted(tmp_path / "wide.parquet", ("b", "a"), seed=3)
    swapped = predicted(tmp_path / "swapped.parquet", ("a", "b"), seed=3)  # a is here what b is there
    merge_files(MergeConfig(sources=(wide,), out=config.out, rule="stacked", fit_on=(swapped,)))
    _, facts, _ = load_predictions(config.out)
    merge_files(MergeConfig(sources=(swapped,), out=config.out, rule="stacked", fit_on=(swapped,)))
    _, straight, _ = load_predictions(config.out)
    weights, reversed_weights = (list(map(float, each["weights"].split())) for each in (facts, straight))
    assert weights == pytest.approx(reversed_weights[::-1])


def test_what_cannot_be_fitted_on_is_refused(tmp_path: Path) -> None:
    source = predicted(tmp_path / "source.parquet", schema="s", manifest="m", split="test")
    config = MergeConfig(sources=(source,), out=tmp_path / "out.parquet", rule="weighted")
    other = tmp_path / "other.parquet"

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            merge_files(dataclasses.replace(config, **{"fit_on": (other,), **changes}))
        assert not config.out.exists()

    predicted(other, split="test")
    refused("--fit-on .*other.parquet is of split test; fit on predictions of the validation rows")
    predicted(other, split="valid", schema="t")
    refused("other.parquet is of schema t, .*source.parquet of s")
    predicted(other, split="valid", schema="s", manifest="n")
    refused("other.parquet is of manifest n, .*source.parquet of m")
    predicted(other, ("logit", "more"))
    refused("--fit-on .*other.parquet has members logit, more, .*source.parquet at the same place logit")
    predicted(other)
    refused("--fit-on names 2 files, the sources are 1; name one for each source", fit_on=(other, other))
    refused("--fit-on: --rule mean_logit is not fitted; weighted and stacked are", rule=None)
    refused("--data is for runs", data=tmp_path)


def test_files_of_other_data_are_refused_wherever_it_lies(tmp_path: Path) -> None:
    silent = predicted(tmp_path / "silent.parquet", seed=1)
    one = predicted(tmp_path / "one.parquet", schema="s", split="test", manifest="m", data="here")
    two = predicted(tmp_path / "two.parquet", seed=2, schema="s", split="test", manifest="m", data="/there")
    out = tmp_path / "out.parquet"
    assert set(merge_files(MergeConfig(sources=(silent, one, two), out=out))) == {
        "logit",
        "one_logit",
        "two_logit",
        "merged",
    }
    for key, value in (("schema", "t"), ("split", "valid"), ("manifest", "n")):
        facts: dict[str, Any] = {"schema": "s", "split": "test", "manifest": "m", key: value}
        predicted(two, **facts)
        with pytest.raises(InputError, match=rf"two\.parquet is of {key} {value}, .*one\.parquet of"):
            merge_files(MergeConfig(sources=(silent, one, two), out=out))


def test_a_place_where_nothing_can_be_written_is_told_first(tmp_path: Path) -> None:
    source, fit_on = predicted(tmp_path / "source.parquet"), predicted(tmp_path / "fit_on.parquet")
    before = source.read_bytes()
    (tmp_path / "link.parquet").symlink_to(source)
    for out, message in (
        (tmp_path / "none" / "out.parquet", "no such folder to write it to"),
        (tmp_path, "is a folder; name a file in it"),
        (source, "is a file to read; name another"),
        (tmp_path / "link.parquet", "is a file to read; name another"),
        (fit_on, "is a file to read; name another"),
    ):
        config = MergeConfig(sources=(source,), out=out, rule="weighted", fit_on=(fit_on,))
        with pytest.raises(InputError, match=message):
            merge_files(config)
    assert source.read_bytes() == before
    out = tmp_path / "out.parquet"
    for _ in range(2):  # predictions may be written anew
        merge_files(MergeConfig(sources=(source,), out=out))
