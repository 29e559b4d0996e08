"""Worker processes for tokenising. This file and what it imports stay free of torch: a worker holds about 100 MB."""

from __future__ import annotations

import collections
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from longverse.data.dedup import signature
from longverse.data.tokenise import LinearEncoder
from longverse.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")

# One document's (exact hash, signature [SLOTS], ids as bytes).
Tokenised = tuple[int, np.ndarray, bytes]
_own: list[LinearEncoder] = []  # a worker's encoder


def start_tokenising(tokenizer_json: str) -> None:
    """Initialise a worker: its own encoder, with its own dictionary of units."""
    _own[:] = [LinearEncoder(tokenizer_json)]


def tokenise(texts: list[tuple[str, str]]) -> list[Tokenised]:
    """(text, language) pairs to what the builder stores."""
    [encoder] = _own
    return [(*signature(text, language), encoder.encode_bytes(text)) for text, language in texts]


def ordered(
    jobs: Iterable[In],
    work: Callable[[In], Out],
    processes: int,
    initializer: Callable[..., None],
    arguments: tuple[Any, ...],
    ahead: int = 2,
) -> Iterator[tuple[In, Out]]:
    """`(job, work(job))` in the order of the jobs, from `processes` workers (1: in this process).

    At most `processes * ahead` jobs are in flight, which bounds memory. Workers are spawned, not forked: a fork of a
    process that runs threads can hang. UserError when a worker dies (usually for want of memory).
    """
    if processes <= 1:
        initializer(*arguments)
        for job in jobs:
            yield job, work(job)
        return
    waiting: collections.deque[tuple[In, Future[Out]]] = collections.deque()
    previous = os.environ.get("LONGVERSE_COMMAND")
    os.environ["LONGVERSE_COMMAND"] = "1"  # a spawned worker imports the package without transformers and torch
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=initializer, initargs=arguments
    )
    try:
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) >= processes * ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most likely for want of memory; set fewer processes and run again to resume."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if previous is None:
            os.environ.pop("LONGVERSE_COMMAND", None)
        else:
            os.environ["LONGVERSE_COMMAND"] = previous
