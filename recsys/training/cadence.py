"""When validation and saving are due: by steps, by shares of an epoch, or by the clock of rank 0."""

import time
from dataclasses import dataclass, field


@dataclass
class Cadence:
    """Says when something is due again."""

    every: int | None = None
    """Steps."""
    per_epoch: int | None = None
    """Times an epoch."""
    steps_per_epoch: int = 1
    minutes: float | None = None
    """By the clock, since it was last done."""
    _done_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.done()

    def due(self, step: int) -> bool:
        """Whether a step is one of those at which all ranks do it."""
        if self.every and step % self.every == 0:
            return True
        if not self.per_epoch:
            return False
        before, now = ((at * self.per_epoch) // self.steps_per_epoch for at in (step - 1, step))
        return now > before

    def overdue(self) -> bool:
        """Whether so much time has passed that this rank should ask the others for it; once."""
        if self.minutes is None or time.monotonic() - self._done_at < self.minutes * 60:
            return False
        self.done()
        return True

    def done(self) -> None:
        """Tell that it was done."""
        self._done_at = time.monotonic()
