# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated"
"""Log-sum-exps of scores, a page of keys at a time: what choosing pages of a long past waits for beside its products.

torch goes over such scores six times (to float32, the largest, the difference, exp, sum, log); this does once.
Shapes: R rows of scores, n keys, page keys to a page.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import LAYOUTS, array
from .build import team
from .simd import bf16_to_float, exponentials, largest
from .team import specialise
from .vectors import LANES

BF16 = True  # bound by specialise: whether the scores are bits of bfloat16, else float32


def add_pages(rank, team, counter, scores, page, out):
    """out[r, p] = log of the sum of exp(scores[r, i]) over page p; scores [R, n], out float32 [R, n / page]."""
    buffer = np.empty((1, page), dtype=np.float32)
    rows = scores.shape[0]
    for row in range(rows * rank // team, rows * (rank + 1) // team):
        for number in range(out.shape[1]):
            part = scores[row, number * page : (number + 1) * page]
            for i in range(page):
                buffer[0, i] = bf16_to_float(part[i]) if BF16 else part[i]
            top = largest(buffer, 0, page)
            out[row, number] = top + np.log(exponentials(buffer, 0, page, top))


@lru_cache(maxsize=2)
def page_kernel(bf16: bool) -> Any:
    name = f"add_pages_{'bf16' if bf16 else 'f32'}"
    return specialise(add_pages, name, BF16=bf16)


def fits(scores: Tensor, page: int) -> bool:
    """Whether the kernel can read scores [R, n]: on a CPU, in a layout it knows, pages of whole vectors."""
    return scores.device.type == "cpu" and scores.dtype in LAYOUTS and scores.is_contiguous() and page % LANES == 0


def page_log_sums(scores: Tensor, page: int) -> Tensor:
    """float32 [R, n / page] of finite scores [R, n] that `fits`."""
    out = np.empty((scores.shape[0], scores.shape[1] // page), dtype=np.float32)
    threads = team(torch.get_num_threads())
    threads.run(page_kernel(scores.dtype == torch.bfloat16), array(scores), page, out)
    return torch.from_numpy(out)
