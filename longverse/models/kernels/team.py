"""A few threads that run one compiled function together, and the compiling itself.

A decode step is a chain of small parallel pieces. Handing each to a thread pool costs tens of microseconds, a hundred
times a token; so the threads are handed the whole step once, and meet at counters in memory between the pieces.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
from numba.core import config as _config

from ..places import cache_folder
from .compiler import CHILD, Compiler
from .simd import arrive, give_way, look

njit: Any = numba.njit
config: Any = _config
_placing = threading.Lock()
_compiler = Compiler()
SPINS = 20_000  # looks at the counter before giving the processor away, some ten microseconds


@njit(nogil=True)
def meet(counter: np.ndarray, team: int) -> None:
    """Wait until all `team` threads have come here. counter: int64 [1], zero before the first meeting of a run."""
    goal = (arrive(counter) // team + 1) * team
    spins = 0
    while look(counter) < goal:
        spins += 1
        if spins > SPINS:
            give_way()


def specialise(
    function: Callable[..., Any], name: str = "", maker: tuple[Any, ...] = (), **bound: Any
) -> Callable[..., Any]:
    """Compile `function` with some of its global names bound to constants or to other compiled functions.

    The constants shape the machine code: loops of known length, no branches for what a model has not. With a `name`
    the code is kept on disk for later starts; only what Python calls needs one. maker: the function of `build` that
    makes this kernel, by name, and its arguments.

    Every function's name ends in a digest of what it was bound to. numba tells functions apart by name and a count
    within the process, and code from the disk brings the count of the process that compiled it: of two pieces with one
    name and one count the linker would take either, and a kernel would run with another's constants.
    """
    copy = types.FunctionType(function.__code__, {**function.__globals__, **bound}, function.__name__)
    copy.__qualname__ = f"{name or function.__name__}_{_digest(bound)}"
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    if name:
        with _placing:
            before, config.CACHE_DIR = config.CACHE_DIR, config.CACHE_DIR or str(_code_folder())
            try:
                with suppress(RuntimeError):  # no folder can be written: it is compiled at every start
                    return Kept(njit(cache=True, **options)(copy), maker, config.CACHE_DIR)
            finally:
                config.CACHE_DIR = before
        return njit(**options)(copy)
    # Called by compiled code alone: without the entries for Python, which take longer than most of the pieces do.
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(copy)


class Kept:
    """A compiled function whose code is on disk, so that every process runs the very same.

    The process that compiles a function also holds its pieces, each compiled by itself, and the linker takes those for
    the copies that were optimised within it: such code rounds otherwise, in the last bits, than what is kept. So a
    child process compiles (`compiler.py`), and this one loads. Where the child cannot, this process compiles.
    """

    def __init__(self, function: Any, maker: tuple[Any, ...], folder: str) -> None:
        self.function, self.maker, self.folder = function, maker, folder
        self._known: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        self.prepare(*args)
        return self.function(*args)

    def prepare(self, *args: Any) -> None:
        """See that code for arguments like these is there."""
        kinds = tuple(_kind(value) for value in args)
        if kinds not in self._known:
            with self._lock:
                if kinds not in self._known:
                    self._fetch(tuple(self.function.typeof_pyval(value) for value in args))
                    self._known.add(kinds)

    def _fetch(self, types: tuple[Any, ...]) -> None:
        """See that code for these types is on the disk."""
        compiles_here = os.environ.get(CHILD) or not self.maker
        if compiles_here or self.function._cache.load_overload(types, self.function.targetctx) is not None:
            return
        _compiler.compile(self.maker, types, self.folder)


def _kind(value: Any) -> Any:
    """What numba's type of an argument follows from, in a hundredth of the time that numba takes to say the type."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.ndim, value.flags.num
    if isinstance(value, tuple):
        return type(value), *(_kind(part) for part in value)
    return type(value)


def _digest(bound: dict[str, Any]) -> str:
    """12 hex digits of constants and of the names, which hold their own digests, of bound functions."""
    parts = {key: getattr(getattr(value, "py_func", value), "__qualname__", value) for key, value in bound.items()}
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _code_folder() -> Path:
    """Where compiled code is kept. numba notices a change of the file a function stands in, not of the functions it
    calls; so the folder's name follows all of this package's sources."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_folder() / "kernels" / digest.hexdigest()[:16]


class Team:
    """`size` threads: the caller's and size - 1 of its own. One run at a time; further callers wait."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._process = 0
        self._work: list[SimpleQueue[Any]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """function(rank, size, counter, *args) on every thread; returns when all are done."""
        with self._lock:
            if self._process != os.getpid():  # the first run, or a child whose parent's threads are not here
                self._start()
            counter = np.zeros(1, dtype=np.int64)
            if isinstance(function, Kept):  # what takes seconds comes before anybody waits for anybody
                function.prepare(0, self.size, counter, *args)
            ended: list[BaseException | None] = []
            bell: SimpleQueue[None] = SimpleQueue()
            shares = [(function, rank, counter, args, ended, bell) for rank in range(1, self.size)]
            handed: list[None] = []
            try:
                handed.extend(map(SimpleQueue.put, self._work, shares))  # one call: no Ctrl-C falls between two of them
                function(0, self.size, counter, *args)
                for _ in self._work:
                    bell.get()
            except BaseException:
                self._see_out(function, counter, args, ended, len(handed))
                raise
            for error in ended:
                if error is not None:
                    raise error

    def _see_out(
        self, function: Callable[..., Any], counter: np.ndarray, args: tuple[Any, ...], ended: list[Any], handed: int
    ) -> None:
        """Let the others come to their end although something, a Ctrl-C, fell into the caller's share: they write into
        its arrays. Where it fell before the share began, all others stand at the first meeting, and it is done now."""
        while len(ended) < handed:
            with suppress(KeyboardInterrupt):  # the first one is raised in the end
                if counter[0] == self.size - 1:
                    function(0, self.size, counter, *args)
                time.sleep(1e-3)

    def _start(self) -> None:
        self._process = os.getpid()
        self._work = [SimpleQueue() for _ in range(self.size - 1)]
        for queue in self._work:
            threading.Thread(target=self._serve, args=(queue,), daemon=True).start()

    def _serve(self, queue: SimpleQueue[Any]) -> None:
        while True:
            function, rank, counter, args, ended, bell = queue.get()
            try:
                function(rank, self.size, counter, *args)
                ended.append(None)
            except BaseException as error:
                ended.append(error)
            bell.put(None)
            del function, counter, args, ended, bell  # a waiting thread keeps no caches or weights alive
