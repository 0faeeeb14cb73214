import io
import sys
from types import SimpleNamespace

import pytest

from recsys import progress as module
from recsys.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test sets."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_lines_where_there_is_no_terminal(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ingest", total=4_000, unit="rows") as advance:
        clock.now += 5
        advance(500, "a.gz")
        assert capsys.readouterr().err == ""
        clock.now += 5
        advance(500)
        assert capsys.readouterr().err == "ingest: 1,000 of 4,000 rows, 100/s, 30 s left  a.gz\n"
        clock.now += 2
        advance(3_000, "b.gz")
        assert capsys.readouterr().err == ""
        clock.now += 8
    out, err = capsys.readouterr()
    assert (out, err) == ("", "ingest: 4,000 rows, 200/s, done in 20.0 s  b.gz\n")


def test_lines_without_a_total(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ingest", total=None, unit="rows") as advance:
        clock.now += module.LINE_EVERY_S
        advance(1_000)
    assert capsys.readouterr().err == "ingest: 1,000 rows, 100/s\ningest: 1,000 rows, 100/s, done in 10.0 s\n"


def test_work_of_nothing_in_no_time(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ingest", total=0, unit="rows"):
        pass
    assert capsys.readouterr().err == "ingest: 0 rows, 0/s, done in 0.0 s\n"


def test_work_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="disk"), progress("ingest", total=1, unit="rows"):
        raise RuntimeError("disk")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_silent_where_it_is_not_to_be_shown(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stderr = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("ingest", total=2, unit="rows", show=False) as advance:
        advance(1)
        advance(1, note="a.gz")
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("total", [2_000, None])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, total: float | None) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress("ingest", total=total, unit="rows") as advance:
        advance(500)
        advance(1_500, "day[0].gz [/x]")
    shown = terminal.getvalue()
    assert "ingest" in shown
    assert "2,000 rows" in shown
    assert "day[0].gz [/x]" in shown
