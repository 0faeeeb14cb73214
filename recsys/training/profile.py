"""Profiling a few steps: a trace, a table by phase, and where memory goes."""

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.distributed import World

FOLDER = "profile"
"""In a run folder."""
TRACE, PHASES, MEMORY = "trace-rank0.json.gz", "phases.txt", "memory.txt"
SNAPSHOT = "memory-rank0.pickle"
OPERATORS = 12
"""Rows of the table of single operators."""

# The ranges that TorchRec's pipelines mark: `## forward 7 ##`.
_RANGE = re.compile(r"## (?P<phase>.+?)(?: \d+)? ##")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps to profile, on rank 0."""

    steps: int | None = None
    """Steps to profile; none when not given. OUT/profile gets a trace for Perfetto and a table by phase."""
    wait: int = 10
    """Steps before: those at the start of a job are slow for reasons of their own."""
    memory: bool = False
    """Also where memory goes: a snapshot for pytorch.org/memory_viz on CUDA, a table by phase on a CPU."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.wait < 0:
            raise ValueError(f"wait {self.wait} must not be negative")
        if self.memory and self.steps is None:
            raise ValueError("memory without steps; say how many steps to profile")


class Profile:
    """Counts steps, and records those of the window; without a window it does nothing.

    Args:
        config: the window, or None for no profile.
        folder: to write to.
        on_cuda: whether the job's device is one.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, *, on_cuda: bool) -> None:
        self._config, self._folder, self._on_cuda = config, folder, on_cuda
        self._steps = 0
        self._recorder: Any = None
        if config and not config.wait:
            self._begin()

    def step(self) -> None:
        """End a step of the loop."""
        if self._config is None:
            return
        self._steps += 1
        if self._recorder is not None:
            self._recorder.step()
        if self._steps == self._config.wait:
            self._begin()
        elif self._steps == self._config.wait + (self._config.steps or 0):
            self._end(self._config)

    def close(self) -> None:
        """End the profile of a job that ends within the window."""
        if self._config is None:
            return
        if self._steps > self._config.wait:
            self._end(self._config)
        else:
            _tell(f"profile: the job ended after {self._steps} steps, and --profile.wait is {self._config.wait}")
            self.drop()

    def drop(self) -> None:
        """End the profile, and write nothing."""
        if self._recorder is not None:
            self._recorder.stop()
        self._config = self._recorder = None

    def _begin(self) -> None:
        import torch.profiler as torch_profiler  # noqa: PLC0415  (slow to import, and few jobs are profiled)
        from torch.cuda import memory  # noqa: PLC0415

        assert self._config is not None
        activities = [torch_profiler.ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(torch_profiler.ProfilerActivity.CUDA)
            if self._config.memory:
                memory._record_memory_history(max_entries=1_000_000)
        profile_memory = self._config.memory and not self._on_cuda
        self._recorder = torch_profiler.profile(activities=activities, profile_memory=profile_memory)
        self._recorder.start()

    def _end(self, config: ProfileConfig) -> None:
        steps = self._steps - config.wait
        recorder = self._recorder
        self.drop()
        self._folder.mkdir(parents=True, exist_ok=True)
        recorder.export_chrome_trace(str(self._folder / TRACE))
        text = f"{phase_table(recorder.events(), steps)}\n\n{_operators(recorder, steps, on_cuda=self._on_cuda)}"
        (self._folder / PHASES).write_text(f"{text}\n")
        if config.memory and self._on_cuda:
            from torch.cuda import memory  # noqa: PLC0415

            memory._dump_snapshot(str(self._folder / SNAPSHOT))  # type: ignore[no-untyped-call]
            memory._record_memory_history(enabled=None)
        elif config.memory:
            with gzip.open(self._folder / TRACE) as file:
                (self._folder / MEMORY).write_text(f"{memory_table(json.load(file)['traceEvents'])}\n")
        _tell(f"{text}\n{self._folder}: trace for https://ui.perfetto.dev and this table")


@contextmanager
def profiler(config: ProfileConfig, out: Path, world: World) -> Iterator[Profile]:
    """Yield a Profile of a job, whose `step` the loop calls once a step; rank 0 alone records.

    Args:
        config: the window of steps.
        out: run folder.
        world: the job.
    """
    wanted = config if config.steps is not None and world.is_first else None
    profile = Profile(wanted, out / FOLDER, on_cuda=world.device.type == "cuda")
    try:
        yield profile
    except BaseException:
        profile.drop()  # what failed is to be told, not what was profiled
        raise
    profile.close()


@dataclass
class _Span:
    """One range that a thread was in."""

    name: str
    begin: float
    end: float
    inside: float = field(default=0.0)
    """Time of ranges within it."""


def own_times(spans: Sequence[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """Number and total of ranges (name, begin, end) of one thread, by name; what lies within another is taken out."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    stack: list[_Span] = []

    def leave() -> None:
        span = stack.pop()
        found[span.name].append(span.end - span.begin - span.inside)
        if stack:
            stack[-1].inside += span.end - span.begin

    for name, begin, end in sorted(spans, key=lambda span: (span[1], -span[2])):
        while stack and stack[-1].end <= begin:
            leave()
        stack.append(_Span(name, begin, end))
    while stack:
        leave()
    return {name: (len(times), sum(times)) for name, times in found.items()}


def phase_table(events: Sequence[Any], steps: int) -> str:
    """Phases of `steps` profiled steps, the longest first.

    Args:
        events: torch.profiler's.
        steps: how many steps they are of.
    """
    marked = [(event, match["phase"]) for event in events if (match := _RANGE.fullmatch(event.name))]
    # On CUDA, the device's spans of the same ranges are events too; the host's are those of CPU threads.
    hosts = [(event, name) for event, name in marked if event.device_type.name == "CPU"]
    threads = {event.thread for event, _ in hosts}
    times: dict[str, tuple[int, float]] = {}
    for thread in threads:
        spans = [
            (name, event.time_range.start, event.time_range.end) for event, name in hosts if event.thread == thread
        ]
        for name, (calls, total) in own_times(spans).items():
            before = times.get(name, (0, 0.0))
            times[name] = (before[0] + calls, before[1] + total)
    devices: defaultdict[str, float] = defaultdict(float)
    for event, name in marked:
        if event.device_type.name != "CPU":
            devices[name] += event.time_range.elapsed_us()
    ends = [event.time_range for event in events if event.device_type.name == "CPU"]
    wall = max((span.end for span in ends), default=0.0) - min((span.start for span in ends), default=0.0)
    times["(outside of all)"] = (steps, max(wall - sum(total for _, total in times.values()), 0.0))
    wide = max(map(len, times)) + 2
    lines = [f"{'phase':<{wide}}{'calls a step':>14}{'host ms a step':>16}{'share':>8}{'device ms a step':>18}"]
    for name, (calls, total) in sorted(times.items(), key=lambda item: -item[1][1]):
        device = f"{devices[name] / 1e3 / steps:.3f}" if name in devices else "-"
        share = total / wall if wall else 0.0
        lines.append(f"{name:<{wide}}{calls / steps:>14.1f}{total / 1e3 / steps:>16.3f}{share:>8.1%}{device:>18}")
    lines.append(f"{f'(a step, of {steps})':<{wide}}{'':>14}{wall / 1e3 / steps:>16.3f}")
    return "\n".join(lines)


def _operators(recorder: Any, steps: int, *, on_cuda: bool) -> str:
    """The operators that take longest by themselves, on the device where there is one."""
    time = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = [row for row in recorder.key_averages() if not _RANGE.fullmatch(row.key)]
    rows.sort(key=lambda row: -getattr(row, time))
    lines = [f"{'operator, by itself':<50}{'calls a step':>14}{'device' if on_cuda else 'host':>10} ms a step"]
    lines += [f"{row.key[:48]:<50}{row.count / steps:>14.1f}{getattr(row, time) / 1e3 / steps:>20.3f}" for row in rows]
    return "\n".join(lines[: OPERATORS + 1])


def memory_table(events: Sequence[dict[str, Any]]) -> str:
    """What a CPU's tensors take, phase by phase: the peak over the start of the window, and what is left behind.

    Args:
        events: of a trace with `[memory]` events.
    """
    ranges = [
        (match["phase"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and (match := _RANGE.fullmatch(event["name"]))
    ]
    peak: defaultdict[str, int] = defaultdict(int)
    left: defaultdict[str, int] = defaultdict(int)
    now = 0
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    for change in sorted(changes, key=lambda event: event["ts"]):
        now += change["args"]["Bytes"]
        # The innermost range began last.
        inside = [span for span in ranges if span[1] <= change["ts"] < span[2]]
        name = max(inside, key=lambda span: span[1])[0] if inside else "(outside of all)"
        peak[name] = max(peak[name], now)
        left[name] += change["args"]["Bytes"]
    wide = max(map(len, peak), default=0) + 2
    lines = [f"{'phase':<{wide}}{'peak MiB over the start':>26}{'left behind MiB':>18}"]
    for name in sorted(peak, key=lambda name: -peak[name]):
        lines.append(f"{name:<{wide}}{peak[name] / 2**20:>26.2f}{left[name] / 2**20:>18.2f}")
    return "\n".join(lines)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  (beside the lines of `progress`)
