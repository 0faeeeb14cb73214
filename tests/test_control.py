"""What ranks ask of one another, on one rank; on several: tests/distributed/test_survival.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recsys.distributed import World
from recsys.training.checkpoint import folder as checkpoints
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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a shell's foreground, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
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


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_that_comes_twice_at_once_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    control = Control(ALONE, grace_s=60)
    with control.listening():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert control.agreed() == {"stop"}
        assert control.signal == signal.SIGINT
    assert capfd.readouterr().err == "\nrecsys: stops after this step, and saves; a second Ctrl-C ends at once\n"


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_that_cannot_be_told_stops_all_the_same() -> None:
    reader, writer = os.pipe()
    before = os.dup(2)
    os.close(reader)
    os.dup2(writer, 2)
    try:
        control = Control(ALONE, grace_s=60)
        with control.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert control.agreed() == {"stop"}
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writer)


def test_a_job_in_the_background_ignores_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        control = Control(ALONE, grace_s=60)
        with control.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert control.agreed() == set()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


SLOW = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
from recsys.distributed import World
from recsys.training import control
control.SECOND_AFTER_S = 0.1
alone = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
with control.Control(alone, grace_s=60).listening():
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""


def test_a_second_ctrl_c_ends_at_once() -> None:
    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.endswith("rank 0: not saved before a second SIGINT; the newest whole checkpoint is as it was\n")


def test_ctrl_c_of_a_training_saves_and_says_so(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from recsys.cli import main; "
        "raise SystemExit(main())"
    )
    options = ["--train.batch-size", "32", "--train.log-every", "1", "--train.num-epochs", "1000"]
    command = [sys.executable, "-c", code, "train", "synthetic", "--data", str(prepared), "--out", str(out)]
    with subprocess.Popen([*command, "--members", "fnn", *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(1200):
                if process.poll() is not None or '"step": 2' in _text(out / "metrics.jsonl"):
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    newest = checkpoints.newest(out / "checkpoints")
    assert newest is not None, err
    assert process.returncode == 130
    assert f"stopped by a signal at step {checkpoints.step_of(newest):,}, which is saved; go on by --resume auto" in err
    assert "Traceback" not in err


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
