"""What a person sees: durations, figures, plain progress lines, bars on a terminal, Ctrl-C turned into a question."""

import io
import os
import signal
import sys

import pytest
from rich.console import Console

from longverse import console
from longverse.inference.engine import Stats


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("a\nlong   sentence")
    assert capsys.readouterr() == ("", "longverse: a long sentence\n")


def test_figures_say_what_was_read_and_reused() -> None:
    stats = Stats(1200, 1000, 11, 0.5, 2.0, 2**30, attention="exact", weights="int4", finish_reason="length")
    line = console.figures(stats)
    assert "read 200 tokens (1,000 reused) in 0.5 s, 400 tok/s" in line
    assert "wrote 11, 5.0 tok/s (cut at --max-new-tokens)" in line
    assert "memory 1.0 GiB" in line
    assert line.endswith("attention exact · weights int4")
    assert "weights" not in console.figures(Stats(attention="exact"))
    assert console.stats_record(stats)["reused_tokens"] == 1000


def test_markup_in_text_stays_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("[bold]not bold[/bold]")
    assert capsys.readouterr().err == "[bold]not bold[/bold]\n"


class Clock:
    """time.monotonic under the test's control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def test_plain_lines_when_not_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with console.Task("Reading a.txt") as task:
        for done in range(0, 8192, 512):
            task(done, 8192)
            clock.now += 1.0
        task(8192, 8192)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reading a.txt: 512 of 8,192 tokens · 512 tok/s · 15 s left"
    assert 3 <= len(lines) <= 5
    assert all("\x1b" not in line for line in lines)


def test_short_work_and_quiet_work_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with console.Task("Reading") as task:
        task(0, 100)
        clock.now += 0.2
        task(50, 100)
        task(100, 100)
    with console.Task("Reading", quiet=True) as task:
        task(0, 100)
        clock.now += 60
        task(50, 100)
    assert capsys.readouterr() == ("", "")


def test_tokens_found_in_the_cache_have_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with console.Task("Reading") as task:
        task(6000, 8000)
        clock.now += 2.0
        task(7000, 8000)
    assert "7,000 of 8,000 tokens · 500 tok/s · 2.0 s left" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 50])
def test_a_bar_on_a_terminal_fits_and_goes_away(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    clock = Clock(monkeypatch)
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", lambda: Console(file=screen, force_terminal=True, width=width, highlight=False))
    with console.Task("Reading 年报.txt") as task:
        task(0, 8192)
        clock.now += 2.0
        task(2048, 8192)
        assert task.bar is not None
        task.bar.refresh()
        task(8192, 8192)
        assert task.bar is None
    shown = screen.getvalue()
    assert ("2,048 of 8,192 tokens" if width == 80 else "2,048/8,192") in shown
    assert "tok/s" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the last thing done is to wipe the bar's line


def test_the_first_interrupt_asks_and_the_second_one_stops() -> None:
    with console.interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_output_follows_a_changed_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    console.out().print("here")
    console.write("there")
    assert other.getvalue() == "here\nthere"
