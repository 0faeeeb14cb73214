import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from recsys.config import InputError, dump, load, load_file, nearest, write_whole


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    hidden: tuple[int, ...] = (64, 32)
    kind: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate {self.rate} must be positive")


@dataclass(frozen=True, kw_only=True)
class Outer:
    out: Path
    steps: int | None = None
    resume: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    anything: Any = None
    inner: Inner = field(default_factory=Inner)
    extra: tuple[Inner, ...] = ()
    last: Inner | None = None


FULL = Outer(
    out=Path("runs/a"),
    steps=7,
    resume=True,
    sizes={"C1": 3, "C2": 4},
    shares={"x": 0.5},
    names=["n"],
    anything=[1, {"k": None}],
    inner=Inner(rate=2.0, hidden=(), kind="sgd"),
    extra=(Inner(), Inner(hidden=(1,))),
    last=Inner(rate=3.0),
)


@pytest.mark.parametrize("config", [FULL, Outer(out=Path("runs/b"))])
def test_what_is_dumped_as_json_loads_as_the_same(config: Outer) -> None:
    assert load(Outer, json.loads(json.dumps(dump(config)))) == config


def test_a_dump_holds_plain_values_only() -> None:
    assert dump(FULL)["out"] == "runs/a"
    assert dump(FULL)["extra"][1] == {"rate": 0.1, "hidden": [1], "kind": "adam"}


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    rate = load(Inner, {"rate": 2}).rate
    assert (type(rate), rate) == (float, 2.0)


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "+10E-4", ".1e-2", "1.0e-3", "1e-03"])
def test_yaml_may_leave_the_point_out_of_a_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(f"out: x\ninner:\n  rate: {text}\n")
    assert load_file(Outer, tmp_path / "config.yaml").inner.rate == 0.001


@pytest.mark.parametrize("text", [".nan", "nan", ".NaN"])
def test_yaml_numbers_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(f"out: x\ninner:\n  rate: {text}\n")
    with pytest.raises(InputError, match=r"config\.yaml\.inner\.rate: \.?nan is no number$"):
        load_file(Outer, tmp_path / "config.yaml")


def test_fields_that_are_not_given_keep_their_defaults() -> None:
    assert load(Outer, {"out": "x", "inner": {"rate": 1.5}}) == Outer(out=Path("x"), inner=Inner(rate=1.5))


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ""])
def test_json_and_yaml_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"config{suffix}"
    yaml_text = "out: runs/a\nsteps: 7\nsizes: {C1: 3}\ninner:\n  hidden: [8, 8]\n  rate: 1\n"
    values = {"out": "runs/a", "steps": 7, "sizes": {"C1": 3}, "inner": {"hidden": [8, 8], "rate": 1}}
    path.write_text(yaml_text if suffix.startswith(".y") else json.dumps(values))
    expected = Outer(out=Path("runs/a"), steps=7, sizes={"C1": 3}, inner=Inner(hidden=(8, 8), rate=1.0))
    assert load_file(Outer, path) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"hiden": [1]}}, "config.inner: unknown field 'hiden'; did you mean hidden?"),
        ({"last": {"hiden": [1]}}, "config.last: unknown field 'hiden'; did you mean hidden?"),
        ({1: 2}, "config: unknown field 1; known are anything, extra,"),
        ({"steps": "7"}, "config.steps: expected int, found '7'"),
        ({"steps": True}, "config.steps: expected int, found True"),
        ({"steps": 7.0}, "config.steps: expected int, found 7.0"),
        ({"resume": 1}, "config.resume: expected bool, found 1"),
        ({"resume": None}, "config.resume: expected bool, found None"),
        ({"out": 3}, "config.out: expected Path, found 3"),
        ({"sizes": [1]}, "config.sizes: expected a mapping, found [1]"),
        ({"sizes": {"C1": "3"}}, "config.sizes.C1: expected int, found '3'"),
        ({"sizes": {1: 3}}, "config.sizes, key 1: expected str, found 1"),
        ({"inner": {"rate": True}}, "config.inner.rate: expected float, found True"),
        ({"inner": {"rate": "1.5"}}, "config.inner.rate: expected float, found '1.5'"),
        ({"inner": {"rate": "1e"}}, "config.inner.rate: expected float, found '1e'"),
        ({"inner": {"rate": "nan"}}, "config.inner.rate: nan is no number"),
        ({"inner": {"rate": float("nan")}}, "config.inner.rate: nan is no number"),
        ({"steps": "1e3"}, "config.steps: expected int, found '1e3'"),
        ({"inner": {"hidden": 3}}, "config.inner.hidden: expected a list, found 3"),
        ({"inner": {"hidden": [1, "2"]}}, "config.inner.hidden[1]: expected int, found '2'"),
        ({"inner": {"kind": "adamw"}}, "config.inner.kind: 'adamw' is not one of 'adam', 'sgd'"),
        ({"inner": []}, "config.inner: expected a mapping, found []"),
        ({"extra": [{}, {"rate": 0}]}, "config.extra[1]: rate 0.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(Outer, {"out": "x", **values})
    assert str(caught.value).startswith(message)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InputError, match=r"^somewhere: field 'out' is missing$"):
        load(Outer, {"steps": 1}, "somewhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"out": "x",', "not json: Expecting property name"),
        ("a", b"", "not JSON: Expecting value"),
        ("a.yaml", b"out: [x\nsteps: 1", "not yaml: while parsing a flow sequence"),
        ("a.yml", b"out: \x01", "not yml: unacceptable character"),
        ("a.json", b"\xff\xfe", "not json: 'utf-8' codec can't decode byte 0xff"),
        ("a.yaml", b"\xff\xfe", "not yaml: 'utf-8' codec can't decode byte 0xff"),
        ("a.yaml", b"", "expected a mapping, found None"),
        ("a.json", b'{"out": "x", "stepss": 1}', "unknown field 'stepss'; did you mean steps "),
    ],
)
def test_a_file_that_does_not_fit_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_file(Outer, path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.json: cannot read it \(No such file or directory\)$"):
        load_file(Outer, tmp_path / "no.json")
    with pytest.raises(InputError, match=r": cannot read it \(Is a directory\)$"):
        load_file(Outer, tmp_path)


def test_nearest_gives_the_nearest_names_or_all() -> None:
    known = ["wukong", "dcnv2", "rankmixer", "dcn"]
    assert nearest("dcnv3", known) == "did you mean dcnv2 or dcn?"
    assert nearest("xyz", known) == "known are dcn, dcnv2, rankmixer, wukong"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
