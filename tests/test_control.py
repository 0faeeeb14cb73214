"""What ranks ask of one another, on one rank; on several: tests/distributed/test_survival.py."""

import os
import signal

import pytest
import torch

from recsys.distributed import World
from recsys.training.control import Control, Stopped

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def test_each_thing_is_told_once() -> None:
    control = Control(ALONE, grace_s=60)
    control.ask("save")
    control.ask("save")
    control.ask("failed")
    assert control.agreed() == {"save", "failed"}
    assert control.agreed() == set()


def test_what_is_asked_for_during_a_validation_is_done_after_it() -> None:
    control = Control(ALONE, grace_s=60)
    seen = []
    for item in control.until_stopped(range(3)):
        seen.append(item)
        if item == 1:
            control.ask("save")
    assert seen == [0, 1, 2]
    assert control.agreed() == {"save"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_item(number: int) -> None:
    control = Control(ALONE, grace_s=60)
    before = signal.getsignal(number)
    with control.listening():
        items = control.until_stopped(range(3))
        assert next(items) == 0
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            next(items)
        assert control.agreed() == {"stop"}
        assert control.signal == number
    assert signal.getsignal(number) is before
