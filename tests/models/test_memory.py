"""Large pages are asked for where they are worth having, and pages of a file can be given back."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longverse.models import memory


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_arrays_ask_for_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no large pages")
    large = memory.empty((3, 8 << 20), torch.uint8)
    assert large.shape == (3, 8 << 20)
    assert "hg" in flags_of(large.data_ptr() + large.nbytes // 2)
    large.fill_(7)  # and it is ordinary memory
    assert int(large.sum(dtype=torch.int64)) == 7 * large.numel()


def test_small_arrays_and_other_devices_are_torchs_own() -> None:
    assert memory.empty([5, 2], torch.bfloat16).shape == (5, 2)
    assert memory.empty((0,), torch.float32).numel() == 0
    assert memory.empty((1 << 24,), torch.float32, "meta").is_meta


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    np.arange(1 << 16, dtype=np.int64).tofile(tmp_path / "numbers")
    mapped = torch.from_numpy(np.memmap(tmp_path / "numbers", np.int64, "c"))
    whole = int(mapped.sum())
    memory.drop_pages(mapped[3:-3])
    assert int(mapped.sum()) == whole
