"""A whole prepared folder verifies; whatever is broken in one is told, and nothing besides."""

import shutil
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.cli import main
from recsys.config import InputError
from recsys.data import verify as verifying
from recsys.data.manifest import MANIFEST
from recsys.data.verify import verify
from recsys.place import place
from tests.prepared_folder import (
    PART,
    SCHEMA,
    Change,
    break_page,
    change_json,
    flip_bit,
    in_manifest,
    lie_in_statistics,
    make_folder,
    replace_text,
    truncate,
    with_table,
    with_type,
    with_value,
    write_manifest,
    write_table,
)

C1, C2 = "vocabulary/C1.parquet", "vocabulary/C2.parquet"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def problems_of(folder: Path, *, decode: bool = True) -> list[str]:
    return verify(folder, show_progress=False, decode=decode)


def assert_told(found: list[str], expected: list[str]) -> None:
    """Compare problems with their beginnings."""
    begin = [problem[: len(start)] for problem, start in zip_longest(found, expected, fillvalue="")]
    assert begin == expected, found


def test_a_whole_folder_has_no_problem(whole: Path) -> None:
    assert problems_of(whole) == []
    assert problems_of(whole, decode=False) == []


# What befalls a finished folder: the manifest knows better.
DAMAGES: dict[str, tuple[Change, list[str]]] = {
    "missing": (lambda folder: (folder / PART).unlink(), [f"{PART}: missing; the manifest lists it"]),
    "extra": (lambda folder: (folder / "valid/x").touch(), ["valid/x: not expected; the manifest does not list it"]),
    "flipped bit": (lambda folder: flip_bit(folder / PART), [f"{PART}: sha256 is "]),
    "empty": (
        lambda folder: (folder / PART).write_bytes(b""),
        [f"{PART}: 0 bytes, expected ", f"{PART}: cannot read it (Parquet file size is 0 bytes"],
    ),
    "truncated": (lambda folder: truncate(folder / PART), [f"{PART}: ", f"{PART}: cannot read it (Parquet magic"]),
    "another schema": (
        lambda folder: replace_text(folder / "schema.json", "small", "smell"),
        ["schema.json: its hash is ", "schema.json: sha256 is "],
    ),
    "schema hash": (
        in_manifest(lambda manifest: manifest.update(schema_hash="0")),
        [f"schema.json: its hash is {SCHEMA.hash}, expected 0 of the manifest"],
    ),
    "schema not listed": (
        in_manifest(lambda manifest: manifest["files"].pop("schema.json")),
        [f"{MANIFEST}: schema.json is not among its files"],
    ),
    "rows in all": (
        in_manifest(lambda manifest: manifest.update(num_rows=41)),
        [f"{MANIFEST}: 41 rows in all, expected 40, the sum of its splits"],
    ),
    "splits": (
        in_manifest(lambda manifest: manifest["splits"].update(dev={"num_rows": 0, "label_mean": 0.0})),
        [f"{MANIFEST}: splits are train, valid, test, dev, expected train, valid, test"],
    ),
    "label mean": (
        in_manifest(lambda manifest: manifest["splits"]["valid"].update(label_mean=0.75)),
        [f"{MANIFEST}: label mean of valid is 0.75, expected "],
    ),
    "rows of a file": (
        in_manifest(lambda manifest: manifest["files"][PART].update(num_rows=9)),
        [f"{MANIFEST}: train has 20 rows, expected 19, the sum of its files", f"{PART}: 10 rows, expected 9"],
    ),
    "label sum": (
        in_manifest(lambda manifest: manifest["files"][PART].update(label_sum=0)),
        [f"{MANIFEST}: label mean of train is ", f"{PART}, column label: sums to "],
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told(folder: Path, damage: Change, expected: list[str]) -> None:
    damage(folder)
    assert_told(problems_of(folder), expected)


# What a faulty writer makes: the manifest agrees with the files, the schema does not. Footers tell of it.
GROUP = f"{PART}, row group"
FAULTS: dict[str, tuple[Change, list[str]]] = {
    "column missing": (with_table(lambda rows: rows.drop_columns(["I2"])), [f"{PART}: column I2 is missing"]),
    "column added": (
        with_table(lambda rows: rows.append_column("I3", rows["I1"])),
        [f"{PART}: column I3 is one too many; expected label, weight, I1, I2, C1, C2, C3"],
    ),
    "column doubled": (
        with_table(lambda rows: rows.append_column(rows.schema.field("I1"), rows["I1"])),
        [f"{PART}: column I1 is one too many; expected label"],
    ),
    "float64": (with_type("I1", pa.float64()), [f"{PART}: column I1 is double, expected float"]),
    "int64": (with_type("C1", pa.int64()), [f"{PART}: column C1 is int64, expected int32"]),
    "list": (
        with_type("C3", pa.list_(pa.int32())),
        [f"{PART}: column C3 is list<element: int32>, expected fixed_size_list<element: int32 not null>[2] or "],
    ),
    "null": (
        with_type("C1", pa.int32(), nullable=True),
        [f"{PART}: column C1 is nullable, expected not null", f"{GROUP} 0, column C1: nulls: 1"],
    ),
    "null in a list": (
        with_type("C3", pa.list_(pa.field("element", pa.int32()), 2), first=[None, 1]),
        [f"{GROUP} 0, column C3: nulls: 1"],
    ),
    "id": (with_value("C1", 7, 6), [f"{GROUP} 1, column C1: "]),
    "negative id": (with_value("C2", 0, -1), [f"{GROUP} 0, column C2: "]),
    "id in a list": (with_value("C3", 1, [5, 200_000]), [f"{GROUP} 0, column C3: "]),
    "infinite": (with_value("I1", 3, np.inf), [f"{GROUP} 0, column I1: "]),
    "label": (with_value("label", 9, 2), [f"{GROUP} 1, column label: "]),
    "negative weight": (with_value("weight", 9, -0.5), [f"{GROUP} 1, column weight: "]),
    "infinite weight": (with_value("weight", 9, np.inf), [f"{GROUP} 1, column weight: "]),
    "statistics that lie": (
        lambda folder: lie_in_statistics(folder / PART),
        [f"{GROUP} {group}, column C3: ids outside [0, 200,000) by its statistics" for group in (0, 1)],
    ),
    "vocabulary too short": (
        with_table(lambda rows: rows.slice(0, 4), C1),
        [f"{C1}: 4 keys and id 0, expected 6 ids in all by schema.json"],
    ),
    "vocabulary's column": (
        with_table(lambda rows: rows.drop_columns(["count"]), C1),
        [f"{C1}: column count is missing"],
    ),
    "vocabulary's last id": (with_value("id", 4, 6, C1), [f"{C1}, row group 0, column id: "]),
    "vocabulary's null": (with_value("id", 4, None, C1), [f"{C1}, row group 0, column id: nulls: 1"]),
    "vocabulary's count": (with_value("count", 4, 0, C1), [f"{C1}, row group 0, column count: counts less than 1 by"]),
    "no such feature": (
        lambda folder: shutil.copy(folder / C1, folder / "vocabulary/C9.parquet"),
        ["vocabulary/C9.parquet: not expected; neither a part of a split nor the vocabulary of a sparse feature"],
    ),
}


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_by_footers_too(folder: Path, fault: Change, expected: list[str], decode: bool) -> None:
    fault(folder)
    write_manifest(folder)
    assert_told(problems_of(folder, decode=decode), expected)


# What the values alone tell: sizes, footers and statistics are as they should be, or there are none.
HIDDEN: dict[str, tuple[Change, str]] = {
    "id": (
        with_value("C1", 7, 6, write_statistics=False),
        f"{GROUP} 1, column C1: ids outside [0, 6): 1, the first is 6 at 2",
    ),
    "id in a list": (
        with_value("C3", 1, [5, -2], write_statistics=False),
        f"{GROUP} 0, column C3: ids outside [0, 200,000): 1, the first is -2 at 3",
    ),
    "null in a list": (
        with_type("C3", pa.list_(pa.field("element", pa.int32()), 2), first=[None, 1], write_statistics=False),
        f"{GROUP} 0, column C3: nulls: 1, expected none",
    ),
    "not a number": (
        with_value("I1", 3, np.nan),
        f"{GROUP} 0, column I1: values that are not finite: 1, the first is nan at 3",
    ),
    "weight": (
        with_value("weight", 9, np.nan),
        f"{GROUP} 1, column weight: weights that are negative or not finite: 1, the first is nan at 4",
    ),
    "label": (
        with_value("label", 9, 2, write_statistics=False),
        f"{GROUP} 1, column label: labels other than 0 and 1: 1, the first is 2 at 4",
    ),
    "page": (lambda folder: break_page(folder / PART), f"{GROUP} 0, column I1: cannot decode it ("),
    "vocabulary's ids": (
        with_value("id", 1, 1, C1),
        f"{C1}, row group 0, column id: 1 stands in row 1, expected 2 (1, 2",
    ),
    "vocabulary's counts": (
        with_value("count", 4, 3, C1),
        f"{C1}, row group 0, column count: 3 of id 5, expected no more than the id before has",
    ),
    "null key": (with_value("key", 4, None, C1, write_statistics=False), f"{C1}, column key: nulls: 1, expected none"),
    "number key": (
        with_value("key", 4, 0xBE589B51, C1),
        f"{C1}, column key: keys that stand more than once: 1, the first is",
    ),
    "text key": (with_value("key", 2, "b", C2), f"{C2}, column key: keys that stand more than once: 1, the first is b"),
}


@pytest.mark.parametrize(("fault", "expected"), HIDDEN.values(), ids=HIDDEN)
def test_decoding_tells_what_footers_do_not(folder: Path, fault: Change, expected: str) -> None:
    fault(folder)
    write_manifest(folder)
    assert problems_of(folder, decode=False) == []
    assert_told(problems_of(folder), [expected])


def test_an_order_is_checked_beyond_a_row_group(folder: Path) -> None:
    ids = range(1, 12)
    rows = pa.table({"key": ids, "id": pa.array(ids, pa.int32()), "count": [9, 8, 7, 6, 5, 6, 4, 3, 2, 1, 1]})
    write_table(rows, folder / C1)
    replace_text(folder / "schema.json", '"C1": 6', '"C1": 12')
    write_manifest(folder)
    assert_told(problems_of(folder), [f"{C1}, row group 1, column count: 6 of id 6, expected no more than"])


def test_a_file_tells_its_first_problems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "MAX_PROBLEMS_A_FILE", 3)
    for row in range(10):
        with_value("I1", row, np.nan)(folder)
        with_value("I2", row, np.nan)(folder)
    write_manifest(folder)
    assert len(problems_of(folder)) == 3


def test_an_object_store_is_verified_as_a_disk_is(folder: Path) -> None:
    flip_bit(folder / PART)
    stored = place("memory://verify/data")
    for path in folder.rglob("*"):
        if path.is_file():
            copy = stored / path.relative_to(folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert_told(problems_of(stored), [f"{PART}: sha256 is "])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: change_json(path, lambda values: values.pop("files")), "it lists no files, so an older version"),
        (lambda path: change_json(path, lambda values: values.pop("splits")), "field 'splits' is missing"),
        (lambda path: path.write_text("{"), "not JSON: "),
        (lambda path: path.write_text("[]"), "expected a mapping, found []"),
        (lambda path: path.unlink(), "cannot read it (No such file or directory); prepare again"),
    ],
)
def test_a_manifest_that_says_nothing_is_named(folder: Path, change: Change, message: str) -> None:
    change(folder / MANIFEST)
    with pytest.raises(InputError) as caught:
        problems_of(folder)
    assert str(caught.value).startswith(f"{folder / MANIFEST}: {message}")


def test_the_verb_says_what_was_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder}: 40 rows in 7 files verified: ")
    assert "verify: 48 rows" in err
    assert main(["data", "verify", str(folder), "--no-decode"]) == 0
    assert capsys.readouterr().out != out


def test_the_verb_tells_the_first_problems_and_counts_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(23):
        (folder / f"extra-{number:02d}").touch()
    assert main(["data", "verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()[1:]  # after the progress
    assert len(lines) == 21
    assert lines[0] == "extra-00: not expected; the manifest does not list it"
    assert lines[-1] == f"{folder}: problems found: 23, of which these are the first 20"
