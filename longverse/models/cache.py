"""Append-only key/value caches. The cache owns attention over the past: the network hands it the new keys and values
of a layer and asks it to attend, and the cache knows its own layout and bytes.

What is written is never written again. A forward pass appends to every layer and then `advance`s once, so that a pass
broken off in the middle leaves the cache as it was.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .attention import chunk_attention

FORMATS = ("full",)
# allocate(name, shape, dtype) -> an empty tensor of that shape: where a cache's storage comes from
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class KVCache:
    """Keys (after RoPE) and values in full precision for one conversation.

    format       "full"
    capacity     tokens it can ever hold: the planned length, which also pins the RoPE base
    rope_length  the planned length the keys' angles were computed for; the same for every token in it
    length       tokens held now

    Memory: 2 * layers * kv_heads * head_dim * capacity elements. On CPU the system hands out pages as they are
    written, so an unused capacity costs address space and no memory.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        format: str = "full",
        allocate: Allocate | None = None,
    ) -> None:
        if capacity < 1:
            raise UserError(f"A cache for {capacity} tokens must hold at least 1.")
        if format not in FORMATS:
            raise UserError(f"There is no cache format {format!r}: choose one of {', '.join(FORMATS)}.")
        self.format = format
        self.dtype = dtype
        self.capacity = capacity
        self.rope_length = capacity
        self.length = 0
        shape = (layers, 1, kv_heads, capacity, head_dim)  # [layer, 1, G, capacity, D]
        allocate = allocate or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        try:
            self.keys = allocate("keys", shape, dtype)
            self.values = allocate("values", shape, dtype)
        except (RuntimeError, MemoryError) as error:
            size = 2 * dtype.itemsize * layers * kv_heads * head_dim * capacity / 2**30
            raise UserError(
                f"A cache for {capacity:,} tokens takes {size:.1f} GiB and the machine refused it:"
                " plan a shorter document or use a machine with more memory."
            ) from error

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v [1, G, T, D] to `layer` and attend q [1, H, T, D] over all its tokens; returns [1, H, T, D]."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise UserError(
                f"The conversation would hold {end:,} tokens and was planned for {self.capacity:,}:"
                " start a new one with a longer plan."
            )
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return chunk_attention(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end])

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held, after every layer has appended them."""
        assert self.length + tokens <= self.capacity
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length` (another question after the same document)."""
        assert 0 <= length <= self.length
        self.length = length

    def restore(self, length: int) -> None:
        """Take the first `length` tokens of the storage, written by a cache of the same shape and format, as held."""
        assert 0 <= length <= self.capacity
        self.length = length

    def keys_of(self, layer: int, begin: int, end: int) -> Tensor:
        """The keys of tokens begin .. end - 1 after RoPE, [1, G, end - begin, D] in `dtype`; a view where it can be."""
        assert 0 <= begin <= end <= self.capacity
        return self.keys[layer, :, :, begin:end]

    def values_of(self, layer: int, begin: int, end: int) -> Tensor:
        """The values of tokens begin .. end - 1, as `keys_of`."""
        assert 0 <= begin <= end <= self.capacity
        return self.values[layer, :, :, begin:end]

    def storage(self) -> dict[str, Tensor]:
        """Every array by its name, [layers, 1, G, capacity, ...]; the first L tokens are `[:, :, :, :L]` of each."""
        return {"keys": self.keys, "values": self.values}

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers, keys and values together."""
        layers, _, kv_heads, _, head_dim = self.keys.shape
        return 2 * layers * kv_heads * head_dim * self.keys.element_size()
