"""Cases that take turns: warm-up, interleaved repeats, and ratios of turns that stand next to one another.

What a shared machine does to one turn it mostly does to the next as well, so cases take turns (A B C A B C ...), and a
ratio is taken within each round before its median is. `measure` times; all else here is bookkeeping without a clock.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.config import InputError

Step = Callable[[], object]
Runner = Callable[[int], float]
"""Takes that many steps; returns their seconds."""
Summary = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How long cases are timed."""

    turns: int = 7
    """Turns of each case."""
    seconds: float = 2.0
    """About what a turn of each case takes; how many steps that is, the warm-up tells."""
    least_steps: int = 3
    """Steps of a turn at least."""
    warmup_steps: int = 5
    """Steps of each case before its first turn."""
    settling_steps: int = 1
    """Steps at the beginning of each turn that are not timed: caches are full of another case's data."""

    def __post_init__(self) -> None:
        for name, least in (("turns", 1), ("least_steps", 1), ("warmup_steps", 1), ("settling_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds {self.seconds} must be a finite number, and not negative")

    def steps(self, step_seconds: float) -> int:
        """Steps of a turn of a case whose step takes so long."""
        return max(self.least_steps, math.ceil(self.seconds / max(step_seconds, 1e-9)))


def runner(step: Step, synchronize: Callable[[], None] = lambda: None) -> Runner:
    """Time calls of `step`.

    Args:
        step: takes one.
        synchronize: waits for what runs elsewhere: a CUDA device, other ranks. Called before the clock starts and
            before it stops, so that steps within a turn overlap as they would in training.
    """

    def run(steps: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        return time.perf_counter() - started

    return run


def measure(cases: Mapping[str, Runner], turns: Turns) -> dict[str, list[float]]:
    """Let cases take turns; returns the seconds of a step in each turn, by case, in the order of the turns."""
    steps = {}
    for name, run in cases.items():
        run(turns.warmup_steps)
        steps[name] = turns.steps(run(turns.least_steps) / turns.least_steps)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(turns.turns):
        for name, run in cases.items():
            if turns.settling_steps:
                run(turns.settling_steps)
            seconds[name].append(run(steps[name]) / steps[name])
    return seconds


def summary(values: Sequence[float]) -> Summary:
    """Median, lowest, highest, and the spread: how far the middle half reaches, as a share of the median."""
    median = statistics.median(values)
    low, high = (
        (statistics.quantiles(values, n=4, method="inclusive")[i] for i in (0, 2)) if len(values) > 1 else (0, 0)
    )
    return {
        "median": median,
        "low": min(values),
        "high": max(values),
        "spread": (high - low) / abs(median) if median else 0.0,
    }


def rates(units: float, seconds: Sequence[float]) -> Summary:
    """Units a second, where a step takes `units` of them: rows, bytes, FLOPs."""
    return summary([units / turn for turn in seconds])


def speedup(seconds: Sequence[float], other: Sequence[float]) -> Summary:
    """How many times as fast a case is as another one, turn by turn: above 1, `seconds` are the lesser ones."""
    return summary([theirs / ours for ours, theirs in zip(seconds, other, strict=True)])


def result(
    name: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    ratios: Mapping[str, Summary],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """One result, as its line of JSON has it; `recsys bench compare` reads it.

    Args:
        name: of the benchmark; with `config`, what is compared with what.
        config: all that decides what was measured, and nothing about how long.
        metrics: numbers, summaries, or mappings of them; good on one machine alone.
        ratios: taken within the run, the higher the better; good on any machine. Each one's median also stands by
            itself under its name.
        facts: commit, machine, versions, command and date.
    """
    medians = {key: ratio["median"] for key, ratio in ratios.items()}
    return {
        "name": name,
        "config": dict(config),
        **medians,
        "metrics": dict(metrics),
        "ratios": dict(ratios),
        **facts,
    }


def append(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Add results to a file, one line each."""
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in results)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The least that a benchmark's ratios may be, and where they are measured; read from a file."""

    setting: dict[str, Any]
    """What differs from the benchmark's default."""
    turns: dict[str, Any]
    """How long to measure, where not by default."""
    least: dict[str, float]
    """By ratio."""

    def failures(self, ratios: Mapping[str, Summary]) -> list[str]:
        """One line a ratio that is too low.

        Raises:
            InputError: a ratio that was not measured.
        """
        for key in self.least:
            if key not in ratios:
                raise InputError(f"gate: no ratio {key!r} was measured; there are {', '.join(sorted(ratios))}")
        found = {key: (ratios[key]["median"], least) for key, least in self.least.items()}
        return [f"{key} {got:.3g} is below {least:.3g}" for key, (got, least) in found.items() if not got >= least]
