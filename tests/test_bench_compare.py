"""`recsys bench compare`: what it matches, what it compares where machines differ, and when it fails."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from recsys.cli import main
from recsys.config import InputError
from recsys.reporting.bench import compare

HERE = {"cpu": "one", "cores": 2, "memory": 7, "load_at_start": [0.5, 0.5, 0.5]}


def line(config: Mapping[str, Any] | None = None, machine: Mapping[str, Any] = HERE, **changes: Any) -> dict[str, Any]:
    values = {"rows": 100.0, "share": 0.5} | changes
    return {
        "name": "speed",
        "config": dict(config or {"batch": 4}),
        "share": values["share"],
        "metrics": {"rows_per_s": {"ours": {"median": values["rows"], "low": 1.0, "high": 9.0}}, "device": "cpu"},
        "ratios": {"share": {"median": values["share"], "low": 0.1, "high": 0.9, "spread": 0.2}},
        "machine": dict(machine),
    }


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_medians_of_equal_name_and_config_are_compared(tmp_path: Path) -> None:
    other = line({"batch": 8}, share=0.3)
    a = write(tmp_path / "a.json", [line(), other])
    b = write(tmp_path / "b.json", [line({"batch": 16}), line(rows=1.0), line(rows=150.0, share=0.4)])
    found = compare(a, b)
    assert [(change.key, change.a, change.b, change.is_ratio) for change in found.changes] == [
        ("share", 0.5, 0.4, True),
        ("rows_per_s ours", 100.0, 150.0, False),
    ]
    assert [change.share for change in found.changes] == [pytest.approx(0.8), 1.5]
    assert found.notes == [f"only in {a}: speed: batch=8", f"only in {b}: speed: batch=16"]


def test_a_ratio_that_is_no_longer_measured_is_told(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", [line()]), write(tmp_path / "b.json", [line() | {"ratios": {}}])
    assert compare(a, b).notes == [f"only in {a}: share of speed: batch=4"]


@pytest.mark.parametrize("now", [{}, {"share": {"median": float("nan")}}])
def test_a_ratio_that_is_gone_or_no_number_has_fallen(now: dict[str, Any], tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", [line()]), write(tmp_path / "b.json", [line() | {"ratios": now}])
    (fallen,) = compare(a, b).fallen(0.5)
    assert "share" in fallen


def test_order_of_a_config_does_not_matter(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [line({"batch": 4, "dim": 8})])
    b = write(tmp_path / "b.json", [line({"dim": 8, "batch": 4})])
    assert len(compare(a, b).changes) == 2


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"cores": 4}])
def test_only_ratios_hold_on_another_machine(change: dict[str, Any], tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [line()])
    b = write(tmp_path / "b.json", [line(machine=HERE | change, rows=1e9)])
    found = compare(a, b)
    assert [change.key for change in found.changes] == ["share"]
    assert len(found.notes) == 1
    assert "machines differ" in found.notes[0]


def test_load_and_memory_do_not_make_another_machine(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [line()])
    b = write(tmp_path / "b.json", [line(machine=HERE | {"load_at_start": [9, 9, 9], "memory": 8})])
    assert not compare(a, b).notes


def test_another_device_is_another_machine(tmp_path: Path) -> None:
    gpu = line()
    gpu["metrics"]["device"] = "NVIDIA H100"
    found = compare(write(tmp_path / "a.json", [line()]), write(tmp_path / "b.json", [gpu]))
    assert "NVIDIA H100" in found.notes[0]


def test_fallen_ratios_fail_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", [line()])
    b = write(tmp_path / "b.json", [line(share=0.44, rows=1.0)])
    command = ["bench", "compare", str(a), str(b)]
    assert main(command) == 0
    assert "0.880" in capsys.readouterr().out
    assert main([*command, "--fail-below", "0.88"]) == 0
    assert main([*command, "--fail-below", "0.9"]) == 1
    assert capsys.readouterr().err == "speed: batch=4: share is 0.880 of what it was (0.5, now 0.44)\n"
    assert main(["bench", "compare", str(b), str(a), "--fail-below", "1"]) == 0


def test_a_ratio_of_zero_has_no_share(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [line(share=0.0)])
    found = compare(a, a)
    assert found.changes[0].share is None
    assert not found.fallen(0.9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no result in it"),
        ("{\n", "line 1: no result of a benchmark"),
        ("[1]\n", "line 1: no result of a benchmark"),
        (json.dumps(line()) + "\n" + json.dumps({"name": "x"}) + "\n", "line 2: no result of a benchmark"),
        (json.dumps(line() | {"ratios": 3}) + "\n", "ratios is no object"),
        ("\x00\x81", "no result of a benchmark"),
    ],
)
def test_bad_files_are_told_in_one_line(text: str, words: str, tmp_path: Path, capsys) -> None:
    good, bad = write(tmp_path / "good.json", [line()]), tmp_path / "bad.json"
    bad.write_text(text)
    assert main(["bench", "compare", str(good), str(bad)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(bad) in told
    assert words in told


def test_other_bad_input_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.json", [line()])
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for other, words in ((tmp_path / "none.json", "cannot read it"), (binary, "not text"), (tmp_path, "directory")):
        assert main(["bench", "compare", str(good), str(other)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert words in told
    foreign = write(tmp_path / "foreign.json", [line({"batch": 5})])
    with pytest.raises(InputError, match="no result of one name and config in common"):
        compare(good, foreign)
    assert main(["bench", "compare", str(good), str(good), "--fail-below", "0"]) == 2
    assert "fail_below 0.0 must be above 0" in capsys.readouterr().err
    assert main(["bench", "compares"]) == 2
    assert main(["bench", "--help"]) == 0
