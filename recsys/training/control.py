"""What ranks agree on between two steps: a signal, a clock or a failure on one of them moves all at the same step."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from recsys.distributed import World

Ask = Literal["stop", "failed", "save", "validate"]
ASKS: tuple[Ask, ...] = ("stop", "failed", "save", "validate")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECOND_AFTER_S = 1.0
"""A SIGINT this long after the first is another Ctrl-C; before, it is the same one that came twice, as from timeout."""
STDERR = 2
SHOW_CURSOR = "\x1b[?25h"

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
        self._asked: deque[Ask] = deque()  # which threads and handlers may add to at any moment
        self._kept: set[Ask] = set()
        self._sent = torch.zeros(len(ASKS), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._timer: threading.Timer | None = None
        self.signal: int | None = None
        self._interrupted_at: float | None = None

    def ask(self, what: Ask) -> None:
        """Ask all ranks for something; any thread, or a signal's handler, may call it."""
        self._asked.append(what)

    def agreed(self) -> set[Ask]:
        """What all ranks shall do now; each thing is told once."""
        now, self._kept = self._kept | self._exchange(), set()
        return now

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, equally many on every rank, until a rank is told to stop.

        Raises:
            Stopped: one was, on all ranks at the same item.
        """
        for item in items:
            self._kept |= self._exchange()
            if "stop" in self._kept:
                raise Stopped
            yield item

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, SIGUSR1 and SIGINT as the wish to save and stop, in the main thread, which alone can.

        A second SIGINT ends the process at once. Jobs in the background of a shell ignore SIGINT, and still do.
        """
        is_main = threading.current_thread() is threading.main_thread()
        taken = SIGNALS if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else SIGNALS[:-1]
        before = {number: signal.signal(number, self._on_signal) for number in taken} if is_main else {}
        try:
            yield
        finally:
            if self._timer:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
        # Not after an exception: the others may never send what this rank would wait for.
        if self._work is not None:
            self._work.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _exchange(self) -> set[Ask]:
        """Send what was asked for here since the last call, and take what was sent then from all ranks."""
        mine = {self._asked.popleft() for _ in range(len(self._asked))}
        if self._group is None:
            return mine
        if self._work is not None:
            self._work.wait()
        found = {ask for ask, wanted in zip(ASKS, self._sent.tolist(), strict=True) if wanted}
        self._sent = torch.tensor([ask in mine for ask in ASKS], dtype=torch.int32)
        self._work = dist.all_reduce(self._sent, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return found

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            late = f"not saved within {self._grace_s:g} s of"
            self._timer = threading.Timer(self._grace_s, self._end, [number, late])
            self._timer.daemon = True
            self._timer.start()
        if number == signal.SIGINT:
            self._on_interrupt()
        self.ask("stop")

    def _on_interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._world.is_first:
                _tell("\nrecsys: stops after this step, and saves; a second Ctrl-C ends at once\n")
        elif now - self._interrupted_at > SECOND_AFTER_S:
            self._end(signal.SIGINT, "not saved before a second")

    def _end(self, number: int, why: str) -> None:
        shown = SHOW_CURSOR if os.isatty(STDERR) else ""  # the bar of `progress` hides it
        _tell(
            f"{shown}recsys: rank {self._world.rank}: {why} {signal.Signals(number).name}; the newest whole checkpoint "
            "is as it was\n"
        )
        os._exit(128 + number)


def _tell(text: str) -> None:
    """Write to stderr, also where a signal has interrupted a print."""
    with suppress(OSError):  # Ctrl-C ends the `tee` that reads it too, and what is trained is to be saved all the same
        os.write(STDERR, text.encode())
