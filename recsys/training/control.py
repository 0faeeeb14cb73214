"""What ranks agree on between two steps: a signal, a clock or a failure on one of them moves all at the same step."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from recsys.distributed import World

Ask = Literal["stop", "failed", "save", "validate"]
ASKS: tuple[Ask, ...] = ("stop", "failed", "save", "validate")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """All ranks were told to stop, on the way through something that need not be finished."""


class Control:
    """Carries what one rank asks for to all ranks, without making any of them wait.

    Every rank calls `agreed` as often as the others. A call starts a reduction over what has been asked for, which is
    read by the next one: what one rank asks for, all learn two calls later at most.

    Args:
        world: the job.
        grace_s: seconds after a signal when the process ends, whatever it does.
    """

    def __init__(self, world: World, grace_s: float) -> None:
        self._world, self._grace_s = world, grace_s
        self._asked = torch.zeros(len(ASKS), dtype=torch.int32)
        self._sent = torch.zeros_like(self._asked)
        self._work: dist.Work | None = None
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._timer: threading.Timer | None = None
        self.signal: int | None = None

    def ask(self, what: Ask) -> None:
        """Ask all ranks for something; any thread, or a signal's handler, may call it."""
        self._asked[ASKS.index(what)] = 1

    def agreed(self) -> set[Ask]:
        """What all ranks shall do now; each thing is told once."""
        if self._group is None:
            now, self._asked = self._asked, torch.zeros_like(self._asked)
        else:
            now = self._received()
            self._sent, self._asked = self._asked, torch.zeros_like(self._asked)
            self._work = dist.all_reduce(self._sent, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return {ask for ask, wanted in zip(ASKS, now.tolist(), strict=True) if wanted}

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, equally many on every rank, until a rank is told to stop.

        Raises:
            Stopped: one was, on all ranks at the same item.
        """
        for item in items:
            if "stop" in self.agreed():
                raise Stopped
            yield item

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as the wish to save and stop; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            self._received()
            if self._timer:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            self._timer = threading.Timer(self._grace_s, self._end, [number])
            self._timer.daemon = True
            self._timer.start()
        self.ask("stop")

    def _end(self, number: int) -> None:
        name = signal.Signals(number).name
        print(  # noqa: T201
            f"recsys: rank {self._world.rank}: not saved within {self._grace_s:g} s of {name}; the newest whole "
            "checkpoint is as it was",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
