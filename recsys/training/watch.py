"""Hang detection: when a job stands still, it says which ranks are missing and what they last did, and ends.

Every rank tells the job's store now and then where it stands, from a thread of its own, and looks at where the others
stand when it has not moved for too long itself. The collective that it waits in would only say that it timed out.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from recsys.distributed import World
from recsys.training.phases import Phases

EXIT_STATUS = 75
"""Of a job that hung: EX_TEMPFAIL, try again."""

SILENT_BEATS = 3
"""Beats without a word of a rank, after which it is silent."""


@dataclass(frozen=True)
class Standing:
    """Where a rank stands."""

    step: int
    phase: str
    beats: int
    """How often the rank has told."""


class Watch:
    """Watches one rank of a job of several.

    Args:
        world: the job.
        phases: of its steps.
        limit_s: how long it may stand still.
    """

    def __init__(self, world: World, phases: Phases, limit_s: float) -> None:
        self._world, self._phases, self._limit_s = world, phases, limit_s
        self._every_s = min(limit_s / 4, 5.0)
        self._moved = time.monotonic()
        self._step = 0
        self._paused = 0
        self._ended = threading.Event()
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def moved(self, step: int) -> None:
        """Tell that this rank has got to a step, or on with it."""
        self._step, self._moved = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do what may take any time, and has limits of its own."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._moved = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        if self._world.size == 1:
            yield
            return
        self._moved = time.monotonic()
        # A connection of its own: the main thread's may be waiting for another rank's word.
        store = _get_default_store().clone()  # type: ignore[attr-defined]
        thread = threading.Thread(target=self._run, args=[store], name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _run(self, store: dist.Store) -> None:
        beats = suspected = 0
        before: dict[int, Standing | None] | None = None
        while not self._ended.wait(self._every_s):
            beats += 1
            try:
                mine = Standing(self._step, self._phases.now, beats)
                store.set(self._key(self._world.rank), json.dumps(asdict(mine)))
                if self._paused or time.monotonic() - self._moved < self._limit_s:
                    before = None
                    continue
                now = {rank: self._of(store, rank) for rank in range(self._world.size)}
            except RuntimeError:  # the store is gone, and with it the job
                return
            if before is None:
                before, suspected = now, beats
            elif beats >= suspected + SILENT_BEATS:
                self._end(now, {rank for rank, one in now.items() if one is None or one == before[rank]})

    def _of(self, store: dist.Store, rank: int) -> Standing | None:
        key = self._key(rank)
        return Standing(**json.loads(store.get(key))) if store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"watch/{self._attempt}/{rank}"

    def _end(self, standings: dict[int, Standing | None], silent: set[int]) -> None:
        if self._world.rank == min(standings.keys() - silent):
            print(f"recsys: {hang(standings, silent, self._limit_s)}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            # A launcher kills all ranks when the first ends: let that be the one that speaks.
            time.sleep(2 * SILENT_BEATS * self._every_s)
        os._exit(EXIT_STATUS)


def hang(standings: dict[int, Standing | None], silent: set[int], limit_s: float) -> str:
    """Name the ranks that the others wait for.

    These are those that are silent, else those at the lowest step, else those that read data.

    Args:
        standings: of all ranks; None of one that never told.
        silent: ranks that have told nothing for a while: killed, stopped, or cut off.
        limit_s: how long the job stood still.
    """
    told = {rank: one for rank, one in standings.items() if one}
    behind = {rank for rank, one in told.items() if one.step == min(each.step for each in told.values())}
    reading = {rank for rank in behind if told[rank].phase == "data"}
    missing = silent or (behind if len(behind) < len(standings) else reading or behind)
    names = []
    for rank in sorted(missing):
        one = standings[rank]
        last = f"last in {one.phase} of step {one.step:,}" if one else "never heard of"
        names.append(f"rank {rank} {'silent, ' if one and rank in silent else ''}{last}")
    return (
        f"no step for {limit_s:.0f} s on {len(standings)} ranks; missing: {'; '.join(names)}; look for its trace, or "
        "raise --train.hang-timeout-s if it is only slow"
    )
