"""Profiles of a few steps of a small job on one rank."""

import gzip
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recsys.distributed import World, process_group
from recsys.training.profile import ProfileConfig, memory_table, own_times, phase_table, profiler
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config

HERE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def work(steps: int, config: ProfileConfig, out: Path, world: World = HERE) -> None:
    """A loop whose steps have two phases, one within the other."""
    with profiler(config, out, world) as profile:
        for step in range(steps):
            with torch.profiler.record_function(f"## forward {step} ##"):
                torch.ones(64, 64) @ torch.ones(64, 64)
                with torch.profiler.record_function("## lookup ##"):
                    torch.zeros(1000).sum()
            profile.step()


def phases(out: Path) -> dict[str, list[str]]:
    lines = (out / "profile" / "phases.txt").read_text().split("\n\n")[0].splitlines()
    return {line.rsplit(maxsplit=4)[0].strip(): line.split()[-4:] for line in lines[1:-1]}


def test_steps_of_a_training_are_traced_and_summed_by_phase(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with process_group() as world:
        trainer = Trainer(small_config(prepared, members=("dcnv2",)), world)
        batches = islice(trainer.loader.stream(), 8)
        with profiler(ProfileConfig(steps=3, wait=2, memory=True), tmp_path, world) as profile:
            for _ in range(8):
                trainer.train_step(batches)
                profile.step()
    assert {"forward", "backward", "optimizer"} <= set(phases(tmp_path))
    for name in ("forward", "backward", "optimizer"):
        calls, milliseconds, _, _ = phases(tmp_path)[name]
        assert float(calls) == 1
        assert float(milliseconds) > 0
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert any(name.startswith("## forward") for name in names)
    assert "aten::addmm" in names
    assert "forward" in (tmp_path / "profile" / "memory.txt").read_text()
    assert "aten::" in capsys.readouterr().err


@pytest.mark.parametrize(("wait", "steps", "of", "profiled"), [(0, 2, 5, 2), (3, 2, 5, 2), (3, 4, 5, 2), (1, 1, 2, 1)])
def test_the_window_is_the_one_asked_for(tmp_path: Path, wait: int, steps: int, of: int, profiled: int) -> None:
    work(of, ProfileConfig(steps=steps, wait=wait), tmp_path)
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert names == {f"## forward {step} ##" for step in range(wait, wait + profiled)} | {"## lookup ##"}
    assert set(phases(tmp_path)) == {"forward", "lookup", "(outside of all)"}
    assert phases(tmp_path)["forward"][0] == "1.0"
    assert not (tmp_path / "profile" / "memory.txt").exists()


def test_off_it_does_nothing(tmp_path: Path) -> None:
    work(3, ProfileConfig(), tmp_path)
    other = World(rank=1, size=2, local_rank=1, local_size=2, device=torch.device("cpu"))
    work(3, ProfileConfig(steps=1, wait=1), tmp_path, other)
    assert not any(tmp_path.iterdir())


def test_a_job_that_ends_before_the_window_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wait in (4, 3):
        work(3, ProfileConfig(steps=1, wait=wait), tmp_path)
        assert capsys.readouterr().err == f"profile: the job ended after 3 steps, and --profile.wait is {wait}\n"
        assert not any(tmp_path.iterdir())
    work(2, ProfileConfig(steps=1, wait=0), tmp_path)  # the profiler of the process is free again


def test_what_failed_is_told_and_not_the_profile(tmp_path: Path) -> None:
    def fail() -> None:
        with profiler(ProfileConfig(steps=5, wait=0), tmp_path, HERE) as profile:
            profile.step()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    work(2, ProfileConfig(steps=1, wait=0), tmp_path)  # the profiler of the process is free again


@pytest.mark.parametrize(
    ("options", "told"),
    [({"steps": 0}, "steps 0 must be"), ({"wait": -1}, "wait -1 must not"), ({"memory": True}, "memory without steps")],
)
def test_a_window_that_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ProfileConfig(**options)


def test_ranges_are_counted_without_those_within_them() -> None:
    spans = [("a", 0.0, 10.0), ("b", 1.0, 4.0), ("c", 2.0, 3.0), ("b", 5.0, 6.0), ("a", 10.0, 12.0), ("d", 20.0, 21.0)]
    assert own_times(spans) == {"a": (2, 8.0), "b": (2, 3.0), "c": (1, 1.0), "d": (1, 1.0)}
    slow = dict.fromkeys("abcd", 0.0)
    for moment in range(210):  # tenths: the range that began last has each
        inside = [span for span in spans if span[1] <= moment / 10 < span[2]]
        if inside:
            slow[max(inside, key=lambda span: span[1])[0]] += 0.1
    assert {name: round(total, 6) for name, (_, total) in own_times(spans).items()} == {
        name: round(total, 6) for name, total in slow.items()
    }


def test_times_of_a_device_stand_beside_those_of_the_host() -> None:
    def event(name: str, device: str, begin: float, end: float, thread: int = 1) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=span, thread=thread)

    events = [
        event("## forward 1 ##", "CPU", 0, 2000),
        event("## forward 1 ##", "CUDA", 1000, 7000),
        event("## forward 2 ##", "CPU", 7500, 10000),
        event("## backward_hook 0 ##", "CPU", 1000, 3000, thread=2),  # of another thread: not within forward
        event("aten::mm", "CPU", 500, 1500),
    ]
    lines = phase_table(events, 2).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["forward", "1.0", "2.250", "45.0%", "3.000"],
        ["(outside", "of", "all)", "1.0", "1.750", "35.0%", "-"],
        ["backward_hook", "0.5", "1.000", "20.0%", "-"],
        ["(a", "step,", "of", "2)", "5.000"],
    ]


def test_memory_is_the_innermost_phase_s() -> None:
    def change(ts: int, mib: int) -> dict[str, Any]:
        return {"name": "[memory]", "ts": ts, "args": {"Device Type": 0, "Bytes": mib * 2**20}}

    ranges = [{"name": "## forward 1 ##", "ph": "X", "ts": 0, "dur": 10}, {"name": "## lookup ##", "ph": "X", "ts": 2, "dur": 3}]  # fmt: skip  # noqa: E501
    lines = memory_table(
        [*ranges, change(1, 4), change(3, 8), change(4, -2), change(8, -5), change(12, -1)]
    ).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [["12.00", "6.00"], ["5.00", "-1.00"], ["4.00", "-1.00"]]
    assert [line.split("  ")[0] for line in lines[1:]] == ["lookup", "forward", "(outside of all)"]
