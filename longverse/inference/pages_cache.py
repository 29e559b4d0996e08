"""The cache of a document read in linear time: keys before RoPE, values, and summaries of every few keys.

Shapes: G key/value heads, H query heads, D head size, T new tokens.

A chunk of T tokens is read with the first tokens and a local window before it, at positions 0, 1, 2 ... of its own:
so no position passes the trained window however long the document is. Keys are kept unrotated, since a question will
see them at positions that are not known yet. Where the window begins depends on the chunk's place in the document
alone; a document read in any pieces, with any break between them, is the same document.

Values and keys are written once, by `attend`, and never again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.memory import expect_rows
from ..models.rope import RopePlan
from ..models.rowwise import rotate
from .pages_attention import read_attention
from .pages_choice import Far

# allocate(name, shape, dtype) -> Tensor
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class Angles:
    """cos and sin for positions 0 .. reach - 1, in the network's dtype, without the plan's scaling of attention:
    keys and queries that come out of the network at position 0 carry that already."""

    def __init__(self, plan: RopePlan, reach: int, rope_length: int, dtype: torch.dtype, device: Any) -> None:
        cos, sin = plan.cos_sin(torch.arange(reach, device=device)[None], rope_length)  # [1, reach, D]
        self.cos = (cos / plan.attention_scaling).to(dtype)[:, None]  # [1, 1, reach, D]
        self.sin = (sin / plan.attention_scaling).to(dtype)[:, None]
        self.reach = reach

    def rotate(self, x: Tensor, begin: int) -> Tensor:
        """x [1, heads, T, D] rotated to the positions begin .. begin + T - 1."""
        end = begin + x.shape[2]
        assert end <= self.reach, (end, self.reach)
        return rotate(x, self.cos[:, :, begin:end], self.sin[:, :, begin:end])

    def rotate_all_to(self, x: Tensor, position: int) -> Tensor:
        """x [1, heads, T, D] with every token rotated to one position."""
        return rotate(x, self.cos[:, :, position : position + 1], self.sin[:, :, position : position + 1])


class PageCache:
    """Keys before RoPE and values of `capacity` tokens, read chunk by chunk.

    first, window, chunk   the first tokens and the local window a chunk sees; chunks begin at multiples of `chunk`
    block                  keys of a summary; blocks are counted from the end of the first tokens
    dtype                  of what is kept; attention is in the queries' type
    angles                 positions 0 .. at least first + window + chunk - 1
    allocate               where the storage comes from, torch.empty by default

    What a store needs: `storage()` names every array, `rows(length)` says how many entries of axis 3 hold the first
    `length` tokens (keys and values one a token, summaries one a block), and `restore(length)` takes over arrays that
    `allocate` handed out already filled.
    """

    format = "pages"

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        angles: Angles,
        first: int,
        window: int,
        chunk: int,
        block: int,
        bounds: bool = False,
        allocate: Allocate | None = None,
    ) -> None:
        self.capacity, self.angles = capacity, angles
        self.first, self.window, self.chunk, self.block = first, window, chunk, block
        self.length = 0
        blocks = max(0, capacity - first) // block
        names = {"keys": capacity, "values": capacity, "means": blocks}
        names |= {"lows": blocks, "highs": blocks} if bounds else {}
        try:
            self._arrays = {
                name: allocate(name, shape, dtype) if allocate else torch.empty(shape, dtype=dtype, device=device)
                for name, rows in names.items()
                for shape in [(layers, 1, kv_heads, rows, head_dim)]
            }
        except (RuntimeError, MemoryError) as error:
            size = 2 * dtype.itemsize * layers * kv_heads * head_dim * capacity / 2**30
            raise UserError(
                f"A cache for {capacity:,} tokens takes {size:.1f} GiB and the machine refused it:"
                " plan a shorter document or use a machine with more memory."
            ) from error
        self.keys, self.values = self._arrays["keys"], self._arrays["values"]  # [layers, 1, G, capacity, D]
        self.summaries = {name: array for name, array in self._arrays.items() if name not in ("keys", "values")}

    # ---- reading ----------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append unrotated k, v [1, G, T, D] to `layer` and attend unrotated q [1, H, T, D] over the first tokens, the
        local window and the chunk itself: [1, H, T, D]. The T tokens must lie within one chunk."""
        begin, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise UserError(
                f"The conversation would hold {end:,} tokens and was planned for {self.capacity:,}:"
                " start a new one with a longer plan."
            )
        self.keys[layer, :, :, begin:end] = k
        self.values[layer, :, :, begin:end] = v
        self._summarise(layer, begin, end)
        start = begin // self.chunk * self.chunk - self.window  # of the local window
        keys, values = self.keys[layer], self.values[layer]
        if start <= self.first:
            keys, values = keys[:, :, :end], values[:, :, :end]
        else:
            keys = torch.cat((keys[:, :, : self.first], keys[:, :, start:end]), dim=2)
            values = torch.cat((values[:, :, : self.first], values[:, :, start:end]), dim=2)
        seen = keys.shape[2]
        keys = self.angles.rotate(keys.to(q.dtype), 0)
        return read_attention(self.angles.rotate(q, seen - q.shape[2]), keys, values.to(q.dtype))

    def expect(self, tokens: int) -> None:
        """As KVCache.expect."""
        for name, rows in self.rows(tokens).items():
            expect_rows(self._arrays[name], rows)

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held, after every layer has appended them."""
        assert self.length + tokens <= self.capacity
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        assert 0 <= length <= self.length
        self.length = length

    def _summarise(self, layer: int, begin: int, end: int) -> None:
        """Write the summaries of the blocks that the tokens begin .. end complete."""
        one, two = max(0, begin - self.first) // self.block, max(0, end - self.first) // self.block
        if one >= two:
            return
        span = slice(self.first + one * self.block, self.first + two * self.block)
        blocks = self.keys[layer, :, :, span].unflatten(2, (two - one, self.block))  # [1, G, blocks, block, D]
        self.summaries["means"][layer, :, :, one:two] = blocks.mean(3)
        if "lows" in self.summaries:
            self.summaries["lows"][layer, :, :, one:two] = blocks.amin(3)
            self.summaries["highs"][layer, :, :, one:two] = blocks.amax(3)

    # ---- what a question needs --------------------------------------------------------------------------

    def far(self, layer: int, pages: int, page: int) -> Far:
        """The first `pages` pages after the first tokens, as views."""
        blocks = pages * page // self.block
        summaries = {name: array[layer, 0, :, :blocks] for name, array in self.summaries.items()}
        return Far(self.keys, layer, self.first, pages, summaries, page, self.block)

    # ---- what a store needs -----------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> float:
        """Bytes one token takes over all layers, its share of the summaries included."""
        layers, _, kv_heads, _, head_dim = self.keys.shape
        rows = 2 + len(self.summaries) / self.block
        return rows * layers * kv_heads * head_dim * self.keys.element_size()

    def storage(self) -> dict[str, Tensor]:
        """Every array by name, [layers, 1, G, rows, D]; see `rows`."""
        return dict(self._arrays)

    def rows(self, length: int) -> dict[str, int]:
        """How many entries of axis 3 of each array hold the first `length` tokens."""
        blocks = max(0, length - self.first) // self.block
        return {name: length if name in ("keys", "values") else blocks for name in self._arrays}

    def restore(self, length: int) -> None:
        """Count the first `length` tokens as read: their rows stand in the arrays already."""
        assert self.length == 0
        assert length <= self.capacity
        self.length = length
