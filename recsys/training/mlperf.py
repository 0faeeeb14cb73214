"""MLPerf's log lines, as its training rules and the package mlperf-logging have them.

Written are those that a run knows; what it cannot, such as who submits it, comes from the config.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

POINT, START, END = "POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END"
BENCHMARK = "dlrm_dcnv2"
LAST = "last step"
"""Reason of the record `end` of a run that was not stopped before."""
FROM_CONFIG = {
    "seed": ("seed",),
    "global_batch_size": ("train", "batch_size"),
    "opt_name": ("optimizer", "tables"),
    "opt_base_learning_rate": ("optimizer", "table_lr"),
    "opt_weight_decay": ("optimizer", "weight_decay"),
    "opt_learning_rate_warmup_steps": ("optimizer", "warmup_steps"),
}
"""Keys, and where a run's config has their values."""


class _Log:
    """Follows a run's records, and writes what MLPerf asks of them."""

    def __init__(self, file: Any, config: Mapping[str, Any], step: int) -> None:
        self._file, self._config, self._step = file, config, step
        self._batch_size = int(config.get("train", {}).get("batch_size", 0))
        self._rows, self._epoch, self._in_epoch = 0, 0, False
        self._has_eval_samples = False
        self._target, self._auc = config.get("train", {}).get("target_auc"), 0.0
        self._reason = LAST

    def line(self, kind: str, key: str, value: Any = None, time_ms: float | None = None, **metadata: Any) -> None:
        event = {"namespace": "", "time_ms": int(time.time() * 1e3 if time_ms is None else time_ms), "event_type": kind}
        self._file.write(f":::MLLOG {json.dumps({**event, 'key': key, 'value': value, 'metadata': metadata})}\n")
        self._file.flush()

    def open(self, facts: Sequence[str]) -> None:
        self.line(START, "init_start", time_ms=1e3 * psutil.Process().create_time())
        given = {key: _value(text) for key, _, text in (fact.partition("=") for fact in facts)}
        for key, value in ({"submission_benchmark": BENCHMARK} | given).items():
            self.line(POINT, key, value)
        for key, (*outer, last) in FROM_CONFIG.items():
            values = self._config
            for name in outer:
                values = values.get(name, {})
            if last in values:
                self.line(POINT, key, values[last])
        self.line(END, "init_stop")
        self.line(START, "run_start", samples_count=self._step * self._batch_size)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._step = step
        if kind == "data":
            self._rows = int(values["rows"])
            self.line(POINT, "train_samples", self._rows)
            self._epoch = step // self._steps + 1
            self._enter_epoch()
        elif kind == "train" and self._rows:
            while self._epoch * self._steps <= step:
                self._enter_epoch()
                self._leave_epoch()
                self._epoch += 1
            if step % self._steps:
                self._enter_epoch()
        elif kind == "valid" and "merged" in values:
            merged = values["merged"]
            self._auc = merged["auc"]
            if not self._has_eval_samples:
                self.line(POINT, "eval_samples", merged["num_rows"])
                self._has_eval_samples = True
            share = step * self._batch_size / self._rows if self._rows else 0.0
            self.line(POINT, "eval_accuracy", merged["auc"], epoch_num=share, samples_count=step * self._batch_size)

        elif kind == "end":
            self._reason = values["reason"]

    def close(self, *, came_to_end: bool) -> None:
        """Success is the target where there is one, else the last step."""
        reached = self._reason == LAST if self._target is None else self._auc >= self._target
        status = "success" if came_to_end and reached else "aborted"
        self._leave_epoch()
        self.line(END, "run_stop", status=status, samples_count=self._step * self._batch_size)

    @property
    def _steps(self) -> int:
        """Of an epoch."""
        return max(self._rows // self._batch_size, 1) if self._batch_size else 1

    def _enter_epoch(self) -> None:
        if not self._in_epoch:
            self.line(START, "epoch_start", epoch_num=self._epoch, samples_count=self._step * self._batch_size)
        self._in_epoch = True

    def _leave_epoch(self) -> None:
        if self._in_epoch:
            self.line(END, "epoch_stop", epoch_num=self._epoch, samples_count=self._step * self._batch_size)
        self._in_epoch = False


@contextmanager
def mlperf_lines(path: Path, config: Mapping[str, Any], facts: Sequence[str], step: int) -> Iterator[Any]:
    """Yield `write(kind, step, values)`, which appends a run's lines to a file, or to stdout where it is `-`.

    Args:
        path: of the file.
        config: of the run, as plain values.
        facts: KEY=VALUE of further lines; numbers, true and false are written as what they are, all else as text.
        step: from which the run goes on.
    """
    with ExitStack() as stack:
        file = sys.stdout if str(path) == "-" else stack.enter_context(path.open("a"))
        log = _Log(file, config, step)
        log.open(facts)
        came_to_end = False
        try:
            yield log.write
            came_to_end = True
        finally:
            log.close(came_to_end=came_to_end)


def _value(text: str) -> Any:
    """A number or a truth value as JSON has them, else the text: MLPerf's rules compare values, not letters."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and -math.inf < value < math.inf else text
