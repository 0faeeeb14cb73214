"""Phases of a step: where its time goes, and where a rank that hangs stands."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("data", "input_dist", "forward", "backward", "optimizer")
"""Of a training step. On CUDA they are times of the host, which runs ahead of the device."""


class Phases:
    """Adds up the seconds of each phase, and tells which one is under way; phases within a phase are taken out of it.

    Any thread may read `now`; one thread enters phases.
    """

    def __init__(self) -> None:
        self.now = "other"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a block as the phase `name`."""
        before = self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; what belongs to none is `other`."""
        self._enter(self.now)
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _enter(self, name: str) -> str:
        now = time.perf_counter()
        self.seconds[self.now] += now - self._since
        before, self.now, self._since = self.now, name, now
        return before
