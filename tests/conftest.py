"""Set before torch is imported: waiting threads sleep instead of spinning, so that a busy machine tests as fast."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LONGVERSE_COMPILES", "1")  # kernels are compiled where they are tested, not in a process beside


@pytest.fixture(scope="module")
def no_compiling() -> Iterator[None]:
    """torch computes: the kernels have tests of their own, and compiling them takes longer than these."""
    from longverse.models import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGVERSE_KERNELS", "torch")
        kernels.unavailable.cache_clear()
        yield
    kernels.unavailable.cache_clear()
