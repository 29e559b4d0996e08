"""A process beside this one that compiles kernels, and both ends of the pipe between them.

Why another process: see `team.Kept`. It goes on from kernel to kernel, since numba takes a second to start and what
kernels share is compiled once; and it ends when nothing was asked of it for IDLE seconds, or with this process.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

CHILD = "LONGVERSE_COMPILES"  # set in a process that compiles its kernels itself
IDLE = 30.0  # seconds
DONE = b"done\n"


class Compiler:
    """One child at a time; further callers wait. maker, below: the function of `build` that makes a kernel, by name,
    and its arguments."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._serves: tuple[int, str] | None = None  # whose child it is, and for which folder
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):  # the lock may be held at that moment, by a thread that is not forked
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def compile(self, maker: tuple[Any, ...], types: tuple[Any, ...], folder: str) -> None:
        """Compile a kernel for these types into numba's cache in `folder`. Where that fails nothing is there
        afterwards, and nothing is raised."""
        told = pickle.dumps((maker, types))
        with self._lock, suppress(OSError):
            for _ in range(2):  # a child that had waited long enough may end just as it is asked
                if self._asked(told, folder):
                    return

    def _asked(self, told: bytes, folder: str) -> bool:
        """Whether a child took the kernel up and answered."""
        if self._serves != (os.getpid(), folder):
            self._end()
            self._serves = (os.getpid(), folder)
        if self._child is None:
            program = f"from {__name__} import serve; serve()"
            # longverse without transformers, whose import takes seconds.
            environment = os.environ | {CHILD: "1", "NUMBA_CACHE_DIR": folder, "LONGVERSE_COMMAND": "1"}
            self._child = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(OSError):  # it has ended
                child.stdin.write(told)
                child.stdin.flush()
                if any(line == DONE for line in child.stdout):  # imports may print as well
                    return True
        except BaseException:  # Ctrl-C: what it would answer later is no answer to the next question
            self._end()
            raise
        self._end()
        return False

    def _end(self) -> None:
        """End the child, if it is ours and not the one of the process that we were forked from."""
        child, self._child = self._child, None
        if child is None or self._serves is None or self._serves[0] != os.getpid():
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        child.wait()


def serve() -> None:
    """In the child: compile what is asked for on standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too, and the parent says what it means
    asked, answers = sys.stdin.buffer, _own_output()
    from . import build

    with suppress(EOFError):
        while True:
            idle = threading.Timer(IDLE, os._exit, (0,))
            idle.daemon = True
            idle.start()
            (name, *arguments), types = pickle.load(asked)
            idle.cancel()
            with suppress(Exception):  # the parent finds nothing, compiles it itself, and shows what is wrong
                getattr(build, name)(*arguments).function.compile(types)
            answers.write(DONE)
            answers.flush()


def _own_output() -> IO[bytes]:
    """The pipe to the parent, with whatever else may print sent elsewhere."""
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return answers
