"""Large pages are asked for where they are worth having, and pages of a file can be given back."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longverse.models import memory
from longverse.models.cache import KVCache


def flags_of(address: int) -> list[str]:
    """What Linux notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no large pages"
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_large_arrays_ask_for_large_pages() -> None:
    large = memory.empty(24 << 20)
    assert large.shape == (24 << 20,)
    assert "hg" in flags_of(large.data_ptr() + large.nbytes // 2)
    large.fill_(7)  # and it is ordinary memory
    assert int(large.sum(dtype=torch.int64)) == 7 * large.numel()
    assert memory.empty(5).numel() == 5


@linux
@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_a_cache_takes_no_more_than_is_written(format: str) -> None:
    """Planned for 65,536 tokens, 256 MiB in full; 100 come."""
    cache = KVCache(4, 2, 128, 1 << 16, torch.bfloat16, format=format)
    before = resident()
    cache.expect(100)
    for name in ("keys", "values"):
        cache.storage()[name][:, :, :, :100].zero_()
    assert resident() - before < 8 << 20


@linux
def test_a_cache_has_large_pages_where_it_will_be_filled() -> None:
    cache = KVCache(1, 2, 128, 1 << 16, torch.bfloat16)  # two strips of 16 MiB
    strip = cache.keys[0, 0, 1]
    cache.expect(1 << 15)
    assert "hg" in flags_of(strip.data_ptr() + (4 << 20))
    assert "hg" not in flags_of(strip.data_ptr() + (12 << 20))
    cache.expect(60_000)
    assert "hg" in flags_of(strip.data_ptr() + (12 << 20))


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    np.arange(1 << 16, dtype=np.int64).tofile(tmp_path / "numbers")
    mapped = torch.from_numpy(np.memmap(tmp_path / "numbers", np.int64, "c"))
    mapped[:] = 7  # in this process's copy of the pages, which is what is lost
    memory.drop_pages(mapped[3:-3])
    if sys.platform == "linux":
        assert torch.equal(mapped[1000:-1000], torch.arange(1 << 16)[1000:-1000])
    assert mapped[:3].eq(7).all()
    assert mapped[-3:].eq(7).all()
