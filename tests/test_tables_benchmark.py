"""The benchmark of tables counts what it moves, and runs in miniature; no timing is asserted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from table_cases import FBGEMM, OURS, Case, Sizes, busy, cases, draw, lookups, make_tables, traffic
from tables import Config, fitting, main

import roofline
from harness import Turns
from recsys.native import available

CPU = torch.device("cpu")
SIZES = Sizes(features=3, rows=40, dim=8, members=1, layout="separate", optimizer="rowwise_adagrad")
SHORT: dict[str, Any] = {"turns": 2, "seconds": 0.0, "least_steps": 1, "warmup_steps": 1}
LIBRARIES = pytest.mark.filterwarnings("ignore")  # of what others tell when they are used as they come


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, and ceilings that are quick to measure, if far from true."""
    for name, size in (("COPIED_BYTES", 2**16), ("GATHERED_ROWS", 64), ("SQUARE", 16)):
        monkeypatch.setattr(roofline, name, {"cpu": size})
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    yield tmp_path
    torch.set_num_threads(1)  # a job takes all cores


def test_ids_follow_their_law_and_members_look_up_equal_ones() -> None:
    sizes = replace(SIZES, rows=1000, members=2)
    for law, share in (("uniform", 1 / 1000), ("zipf", 1 / sum(n**-1.05 for n in range(1, 1001)))):
        drawn = draw(sizes, law, 1.05, 2000, 2)  # type: ignore[arg-type]
        assert {each.shape for each in drawn} == {(3, 4000)}
        values = torch.stack(drawn)
        assert 990 < values.max() < 1000
        assert (values == 0).float().mean() == pytest.approx(share, rel=0.3)
    ids, offsets = lookups(sizes, drawn, 2, CPU)[0]
    assert torch.equal(ids.view(2, 3, 4000)[0], drawn[0])
    assert torch.equal(ids.view(2, 3, 4000)[1], drawn[0])
    assert torch.equal(offsets, torch.arange(2 * 3 * 2000 + 1) * 2)
    joined, _ = lookups(replace(sizes, layout="interleaved"), drawn, 2, CPU)[0]
    assert torch.equal(joined, drawn[0].flatten())


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_traffic_is_what_a_slow_count_of_bytes_finds(layout: Any, optimizer: Any) -> None:
    sizes, pooling, bags = replace(SIZES, members=2, layout=layout, optimizer=optimizer), 3, 10
    drawn = draw(sizes, "uniform", 1.0, bags, pooling)[:2]
    state = {"sgd": 0, "adagrad": 4 * sizes.columns, "rowwise_adagrad": 4}[optimizer]
    forward = update = 0
    for ids, offsets in lookups(sizes, drawn, pooling, CPU):
        words = 8 * (len(ids) + len(offsets) - 1)
        sums = 4 * sizes.columns * (len(offsets) - 1)
        rows = sum(len(set(table.tolist())) for table in ids.view(sizes.num_tables, -1))
        forward += words + sums + rows * 4 * sizes.columns
        update += words + sums + 2 * rows * (4 * sizes.columns + state)
    found = traffic(sizes, drawn, pooling)
    assert (found.forward, found.update, found.step) == (forward / 2, update / 2, (forward + update) / 2)
    assert sizes.memory == sizes.num_tables * 40 * (4 * sizes.columns + state)


def test_a_lookup_leaves_tables_as_they_are_and_an_update_does_not() -> None:
    tables = make_tables(SIZES, CPU)
    batches = lookups(SIZES, draw(SIZES, "uniform", 1.0, 8, 1), 1, CPU)
    made = cases(tables, batches, lambda: None)
    assert made.keys() == ({OURS, FBGEMM} if available("tables") else {FBGEMM})
    for case in made.values():
        before = tables.weights_host.detach().clone()
        assert case.lookup(2) > 0
        assert torch.equal(tables.weights_host, before)
        assert case.update(2) > 0
        assert not torch.equal(tables.weights_host, before)


def test_every_batch_has_its_turn() -> None:
    seen: list[int] = []

    def forward(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(int(ids))
        return torch.zeros(1, requires_grad=True) * 1

    case = Case(forward, [(torch.tensor(i), torch.tensor(0)) for i in range(3)], lambda: None)
    seen.clear()
    case.lookup(2)
    case.update(2)
    assert seen == [0, 1, 2, 0]


def test_busy_processes_end() -> None:
    with busy(2):
        spinning = [child for child in psutil.Process().children() if "getppid" in " ".join(child.cmdline())]
        assert len(spinning) == 2
    assert not any(child.is_running() for child in spinning)


def test_tables_that_do_not_fit_are_fewer_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = fitting(Config(fields=4), 16, 1000)
    assert whole.features == 4
    assert capsys.readouterr().err == ""
    room = 2.5 * 1000 * (64 + 4) / 2**30
    (fewer,) = fitting(Config(fields=4, memory_gib=room), 16, 1000)
    assert (fewer.features, fewer.memory) == (2, 2 * 1000 * 68)
    assert "2 features are measured" in capsys.readouterr().err
    assert fitting(Config(fields=4, memory_gib=room), 128, 1000) == []
    told = capsys.readouterr().err
    assert "they are left out" in told
    assert told.count("\n") == 1
    # Two layouts are held at once.
    both = fitting(Config(fields=4, members=2, memory_gib=4 * room, layout=("separate", "interleaved")), 16, 1000)
    assert [sizes.features for sizes in both] == [2, 2]


@LIBRARIES
@pytest.mark.skipif(not available("tables"), reason="the operators are not built: there was no compiler")
def test_tables_are_measured_side_by_side_and_drawn(small: Path) -> None:
    config = Config(
        dim=(4,),
        rows=(20, 50),
        ids=("uniform", "zipf"),
        fields=2,
        batch_size=16,
        members=2,
        layout=("separate", "interleaved"),
        busy=1,
        timing=Turns(**SHORT),
        json=small / "out.json",
        plot=small / "rows.png",
    )
    main(config)
    lines = [json.loads(line) for line in (small / "out.json").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 * 2
    keys = {
        f"{phase}_{what}" for phase in ("forward", "update", "step") for what in ("bandwidth_share", "ratio_to_fbgemm")
    }
    of_layout = {f"{phase}_ratio_to_separate" for phase in ("forward", "update", "step")}
    for line in lines:
        assert {"commit", "machine", "versions", "command", "date", "name", "config"} <= line.keys()
        sizes, metrics = line["config"], line["metrics"]
        assert line["ratios"].keys() == keys | (of_layout if sizes["layout"] == "interleaved" else set())
        ms = metrics["ms"]
        assert ms["ours"]["step"]["high"] <= ms["ours"]["forward"]["high"] + ms["ours"]["update"]["high"]
        for phase in ("forward", "update", "step"):
            ours, theirs = ms["ours"][phase], ms["fbgemm"][phase]
            assert theirs["low"] / ours["high"] <= line[f"{phase}_ratio_to_fbgemm"] <= theirs["high"] / ours["low"]
            share = metrics["bytes"][phase] / metrics["ceilings"]["copy_bytes_per_s"]
            assert line["ratios"][f"{phase}_bandwidth_share"]["high"] == pytest.approx(1e3 * share / ours["low"])
        assert metrics["lookups"] == 2 * 16 * (2 if sizes["layout"] == "separate" else 1)
    assert {line["config"]["busy"] for line in lines} == {0, 1}
    assert (small / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layout": ("interleaved",)}, "interleaved needs members of 2 or more"),
        ({"optimizer": "adam"}, "optimizer adam is in no fused update"),
        ({"plot": Path("x.png")}, "nothing to draw"),
        ({"dim": ()}, "dim is empty"),
        ({"layout": ("separate", "separate")}, "names one twice"),
        ({"busy": -1}, "busy -1"),
        ({"memory_gib": 0}, "memory_gib 0 must be above 0"),
        ({"rows": (5, 0)}, "must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**values)
