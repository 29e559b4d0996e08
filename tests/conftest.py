"""Set before torch is imported: waiting threads sleep instead of spinning, so that a busy machine tests as fast."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LONGVERSE_COMPILES", "1")  # kernels are compiled where they are tested, not in a process beside


# Files that take a minute or near it. They are begun first, so that no process waits for another at the end.
LONGEST = (
    "test_readme.py", "test_kernels.py", "test_parallel.py", "test_run.py", "test_second_look.py", "test_cli.py",
    "test_process.py", "test_smol.py", "test_probe.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def sigint_as_before() -> Iterator[None]:
    """A command that was stopped here ignores further Ctrl-Cs, and the processes of later tests would inherit that."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) != before:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def no_compiling() -> Iterator[None]:
    """torch computes: the kernels have tests of their own, and compiling them takes longer than these."""
    from longverse.models import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGVERSE_KERNELS", "torch")
        kernels.unavailable.cache_clear()
        yield
    kernels.unavailable.cache_clear()
