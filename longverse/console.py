"""What longverse shows in a terminal: progress, tables, figures, one-line errors.

Answers go to standard output; progress, figures and errors go to standard error, so that a pipe receives the answer
alone. On a terminal progress is a bar that goes away; elsewhere it is a plain line now and then.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .inference.engine import Stats

LINE_EVERY = 5.0  # seconds between plain progress lines
PIPE_WIDTH = 400  # columns
PATIENCE = 0.7  # seconds before progress is shown at all


def out() -> Console:
    """Standard output. Made anew each time: tests and pipes exchange sys.stdout. Whoever reads a pipe gets every row of
    a table on one line."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, highlight=False, soft_wrap=not terminal, width=None if terminal else PIPE_WIDTH)


def err() -> Console:
    """Standard error."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def error(message: str) -> None:
    """One line on standard error: `longverse: what went wrong`."""
    print(f"longverse: {' '.join(message.split())}", file=sys.stderr)


def prepare_output() -> None:
    """Characters that standard output cannot spell (an ASCII locale, half a surrogate) become ? and stop nothing; what
    is written to a stream that was closed goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def json_line(record: object) -> None:
    """A record for machines, whole in every locale: characters are escaped where the output is not UTF-8."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(record, ensure_ascii=not utf8), flush=True)


def line(text: str = "") -> None:
    """A line on standard output."""
    print(text, flush=True)


def note(message: str, *, quiet: bool = False) -> None:
    """A dim remark on standard error."""
    if not quiet:
        err().print(Text(message, style="dim"))


def write(piece: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


class Task:
    """Progress of one piece of work. Call it as `on_progress(done, total)`, with None where the total is not known; use
    it in a `with`.

    unit     "tokens" (rate in tokens/s) or "bytes" (MB and MB/s)
    at_once  show it from the beginning, before the first call: for work that reports late, such as imports
    """

    def __init__(self, title: str, *, unit: str = "tokens", quiet: bool = False, at_once: bool = False) -> None:
        self.title, self.unit, self.quiet, self.at_once = title, unit, quiet, at_once
        self.console = err()
        self.started = time.monotonic()
        self.first: int | None = None  # done at the first call: what was there already has no speed
        self.said = 0.0
        self.bar: Progress | None = None
        self.row: TaskID | None = None

    def __enter__(self) -> "Task":
        if self.at_once and not self.quiet and self.console.is_terminal:
            self._open(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; harmless when repeated."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __call__(self, done: int, total: int | None) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.said = done, now, now
        if self.console.is_terminal:
            self._draw(done, total, now)
        elif total is not None and done >= total:
            return
        elif now - self.said >= (LINE_EVERY if self.said > self.started else PATIENCE):
            self.said = now
            self.console.print(f"{self.title}: {self._figures(done, total, now)}")

    def _draw(self, done: int, total: int | None, now: float) -> None:
        if total is not None and done >= total:
            self.close()
            return
        assert self.first is not None
        # A long text shows its bar before the first chunk is read; short work shows none.
        long = self.unit == "tokens" and total is not None and total - self.first > 1024
        if self.bar is None and (long or now - self.started > PATIENCE):
            self._open(total)
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=done, total=total, figures=self._figures(done, total, now))

    def _open(self, total: int | None) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, expand=True)
        self.row = self.bar.add_task(self.title, total=total, figures="")
        self.bar.start()

    def _figures(self, done: int, total: int | None, now: float) -> str:
        """`2,048 of 8,192 tokens · 1,340 tok/s · 5 s left`, without the words where the terminal is narrow, and without
        what follows from the total where there is none."""
        assert self.first is not None
        speed = (done - self.first) / (now - self.started) if now > self.started and done > self.first else 0.0
        if total is None:
            parts = [f"{done / 1e6:,.0f} MB" if self.unit == "bytes" else f"{done:,} {self.unit}"]
        elif self.unit == "bytes":
            parts = [f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"]
        elif self.console.is_terminal and self.console.width < 70:
            parts = [f"{done:,}/{total:,}"]
        else:
            parts = [f"{done:,} of {total:,} {self.unit}"]
        if speed:
            if self.unit == "tokens":
                parts.append(f"{speed:,.0f} tok/s")
            if total is not None:
                parts.append(f"{duration((total - done) / speed)} left")
        return " · ".join(parts)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `1 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figures(stats: "Stats") -> str:
    """The line under an answer: tokens read and reused, speeds, memory, and how attention was computed."""
    fresh = stats.fresh_tokens
    reading = f"read {fresh:,} tokens"
    if stats.reused_tokens:
        reading += f" ({stats.reused_tokens:,} reused)"
    reading += f" in {duration(stats.prefill_seconds)}"
    if fresh > 64 and stats.prefill_rate:
        reading += f", {stats.prefill_rate:,.0f} tok/s"
    writing = f"wrote {stats.new_tokens:,}"
    if stats.decode_rate:
        writing += f", {stats.decode_rate:,.1f} tok/s"
    if stats.finish_reason == "length":
        writing += " (cut at --max-new-tokens)"
    elif stats.finish_reason == "cancelled":
        writing += " (stopped)"
    memory = f"memory {stats.peak_memory_bytes / 2**30:.1f} GiB at most"
    rounded = () if stats.weights == "full" else (f"weights {stats.weights}",)  # what the answer was written with
    return " · ".join((reading, writing, memory, f"attention {stats.attention}", *rounded))


def stats_record(stats: "Stats") -> dict[str, object]:
    """The same figures for `--json`."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": stats.new_tokens,
        "prefill_seconds": round(stats.prefill_seconds, 4),
        "decode_seconds": round(stats.decode_seconds, 4),
        "prefill_tokens_per_second": round(stats.prefill_rate, 1),
        "decode_tokens_per_second": round(stats.decode_rate, 1),
        "peak_memory_bytes": stats.peak_memory_bytes,
        "attention": stats.attention,
        "mass_kept": stats.mass_kept,
        "mass_written": stats.mass_written,
        "cache": stats.cache,
        "cache_home": stats.cache_home,
        "weights": stats.weights,
        "kernels": stats.kernels,
        "finish_reason": stats.finish_reason,
        "rope_base": stats.rope_base,
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: Sequence[int] = ()) -> Table:
    """A plain table that folds long cells; `right` are the columns of numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place in right else "left", overflow="fold", no_wrap=place in right)
    for row in rows:
        made.add_row(*row)
    return made


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C only makes the given function true (the answer stops at the next token or chunk); a second
    one interrupts at once. Outside the main thread, where signals cannot be caught, it never becomes true."""
    import signal
    import threading

    pressed = False

    def handler(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
