"""One trial: a `recsys train` of its own, which is watched, and stopped where it is not worth its time."""

import ctypes
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recsys.config import dump, write_whole
from recsys.studies.sweep.config import SweepConfig
from recsys.training.config import TrainConfig

POLL_S = 0.25
MERGED = "merged"
"""The merge, among the members of a validation."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    values: dict[int, float]
    """The metric at each validation, by step."""
    pruned: bool
    problem: str | None
    """Why it failed, if it did, in a line."""
    seconds: float


def run_trial(sweep: SweepConfig, train: TrainConfig, hopeless: Callable[[int, float], bool]) -> Outcome:
    """Train until the end, or until a validation makes it hopeless.

    Args:
        sweep: what is minimised, and how long a stopped trial may take to end.
        train: its config; `OUT.json` and `OUT.log` are written beside its `out`.
        hopeless: is told step and metric of every validation but the last.
    """
    started = time.perf_counter()
    path, log = train.out.with_suffix(".json"), train.out.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(dump(train), indent=2) + "\n")
    # A trial that was interrupted has metrics already.
    validations = _Validations(train.out / "metrics.jsonl", sweep.metric)
    with log.open("ab") as file:
        began = file.tell()  # an earlier attempt may have told why it failed
        process = _start(_command(sweep, path), file)
        try:
            pruned = _watch(process, validations, hopeless)
        finally:  # also where the sweep itself is stopped
            _stop(process, sweep.grace_s)
    validations.read()
    problem = None
    if not pruned and process.returncode:
        problem = f"exit {process.returncode}: {_last_line(log, began)}; see {log}"
    elif not pruned and not validations.values:
        problem = f"no validation of it in {validations.path}"
    return Outcome(validations.values, pruned, problem, time.perf_counter() - started)


class _Validations:
    """The metric at each validation, as a run writes them."""

    def __init__(self, path: Path, metric: str) -> None:
        self.path, self._metric = path, metric
        self.values: dict[int, float] = {}

    def read(self) -> dict[int, float]:
        """Look again; what is new."""
        found = {}
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            record: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}  # else half written
            if record.get("kind") == "valid" and record["step"] not in self.values:
                value = record[MERGED][self._metric]
                found[record["step"]] = math.nan if value is None else float(value)
        self.values |= found
        return found


def _command(sweep: SweepConfig, path: Path) -> list[str]:
    launcher = ["-m", "recsys"]
    if sweep.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sweep.ranks)]
        launcher += ["-m", "recsys.cli"]
    return [sys.executable, *launcher, "train", str(path)]


def _start(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec, little is safe
    # A sweep that is killed leaves no trial behind, which the next sweep would find in its folder.
    die = lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # noqa: E731
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die)  # noqa: PLW1509


def _watch(process: subprocess.Popen[bytes], validations: _Validations, hopeless: Callable[[int, float], bool]) -> bool:
    """Wait for the end; True where a validation made the trial hopeless."""
    while process.poll() is None:
        for step, value in validations.read().items():
            if hopeless(step, value):
                return True
        time.sleep(POLL_S)
    return False


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path, began: int) -> str:
    """The reason in what was written after the first `began` bytes."""
    lines = [line for line in log.read_bytes()[began:].decode(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if "recsys: " in line]
    return " ".join((own or lines or ["it said nothing"])[-1].split())[:300]
