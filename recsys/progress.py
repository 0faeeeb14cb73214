"""Progress of long work: a live bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0


@contextmanager
def progress(what: str, *, total: float | None, unit: str, show: bool = True) -> Iterator[Callable[..., None]]:
    """Yield `advance(amount, note="")`, which moves a bar that shows rate and time left.

    Args:
        what: the stage, as a verb form ("ingest").
        total: amount at which the work is done, or None when it is not known.
        unit: what is counted ("rows").
        show: False makes it silent (ranks other than 0).
    """
    if not show:
        yield lambda amount, note="": None
    elif sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        with _lines(what, total, unit) as advance:
            yield advance


@contextmanager
def _bar(what: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console  # noqa: PLC0415  (only long work needs it)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    started = time.perf_counter()
    text = TextColumn("{task.fields[text]}", markup=False)  # a note may be a file's name, brackets and all
    columns = (TextColumn("{task.description}"), BarColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, text="")
        done = 0.0

        def advance(amount: float, note: str = "") -> None:
            nonlocal done
            done += amount
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=amount, text=f"{done:,.0f} {unit}  {rate:,.0f}/s  {note}")

        yield advance


@contextmanager
def _lines(what: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    started = printed = time.perf_counter()
    done = 0.0
    last_note = ""

    def line(now: float, end: str) -> None:
        rate = done / max(now - started, 1e-9)
        of = f" of {total:,.0f}" if total and round(done) < round(total) else ""
        note = f"  {last_note}" if last_note else ""
        print(f"{what}: {done:,.0f}{of} {unit}, {rate:,.0f}/s{end}{note}", file=sys.stderr, flush=True)  # noqa: T201

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, printed, last_note
        done += amount
        last_note = note or last_note
        now = time.perf_counter()
        if now - printed >= LINE_EVERY_S:
            left = f", {(total - done) / done * (now - started):,.0f} s left" if total and done else ""
            line(now, left)
            printed = now

    yield advance
    now = time.perf_counter()
    line(now, f", done in {now - started:,.1f} s")
