"""A schema that is saved and loaded, and every way in which one cannot work."""

import json
from pathlib import Path
from typing import Any

import pytest

from recsys.config import InputError
from recsys.data.schema import Schema

SCHEMA = Schema(name="criteo_kaggle", dense=("I1",), sparse={"C2": 3, "C1": 5}, labels=("label",))


def test_a_schema_loads_as_it_was_saved(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    loaded = Schema.load(tmp_path)
    assert loaded == SCHEMA
    assert list(loaded.sparse) == ["C2", "C1"]
    assert loaded.hash == SCHEMA.hash


@pytest.mark.parametrize(
    "change", [{"sparse": {"C2": 3, "C1": 6}}, {"sparse": {"C1": 5, "C2": 3}}, {"dense": ("I2",)}, {"labels": ("y",)}]
)
def test_the_hash_tells_schemas_apart(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "name": SCHEMA.name,
        "dense": SCHEMA.dense,
        "sparse": SCHEMA.sparse,
        "labels": SCHEMA.labels,
    }
    assert Schema(**fields | change).hash != SCHEMA.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dnese": []}, "unknown field 'dnese'; did you mean dense or hotness?"),
        ({"sparse": {"C1": 0}}, "sparse feature 'C1' has 0 ids; it needs at least id 0"),
        ({"sparse": {"C1": "5"}}, "expected int, found '5'"),
        ({"sparse": {}}, "sparse is empty; a model needs at least one sparse feature"),
        ({"labels": []}, "labels is empty; a model needs a column to predict"),
        ({"dense": ["C1"]}, "column 'C1' stands twice; every column needs a name of its own"),
        ({"dense": ["I1", "I1"]}, "column 'I1' stands twice; every column needs a name of its own"),
        ({"labels": None}, "expected a list, found None"),
    ],
)
def test_a_schema_that_cannot_work_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    SCHEMA.save(tmp_path)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        Schema.load(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("content", [b'{"name": "crit', b"", b"\xff\xfe"])
def test_a_schema_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Schema.load(tmp_path)
    assert str(caught.value).startswith(f"{path}: not json: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Schema.load(tmp_path / "no")
    assert str(caught.value) == (
        f"{tmp_path / 'no'}: no such folder; `recsys prepare FORMAT FILE --out {tmp_path / 'no'}` makes it"
    )
    with pytest.raises(InputError) as caught:
        Schema.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: no schema.json in it")
