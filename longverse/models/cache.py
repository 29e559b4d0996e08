"""Append-only key/value caches. The cache owns attention over the past: the network hands it the new keys and values
of a layer and asks it to attend, and the cache knows its own layout, its kernels and its bytes.

What is written is never written again, and never requantised. A forward pass appends to every layer and then `advance`s
once, so that a pass broken off in the middle leaves the cache as it was.

Formats: "full" keeps keys (after RoPE) and values in one floating-point type. "int8" and "int4" keep them rotated by a
Hadamard matrix, which spreads outliers over a head, and rounded per token and head in groups (`packing.py`); the first
FIRST tokens, which attention leans on, and the newest RECENT ones are in full as well. docs/memory.md has the
measurements behind that choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import kernels, packing
from .attention import causal_attention, chunk_attention, folded_attention, merge
from .compiled import compiled_fits
from .memory import expect_rows
from .sparse import Sparse, sparse_attention

FORMATS = ("full", "int8", "int4")
FIRST = 64  # first tokens kept in full
RECENT = 64  # newest tokens kept in full, in a ring: token t in slot t % RECENT
STRETCH = 4096  # tokens of the past in floating point at a time
# allocate(name, shape, dtype) -> an empty tensor of that shape: where a cache's storage comes from
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class KVCache:
    """Keys and values of one conversation, in one of FORMATS.

    capacity     tokens it can ever hold: the planned length, which also pins the RoPE base
    rope_length  the planned length the keys' angles were computed for; the same for every token in it
    length       tokens held now
    kept         the type of keys and values that are kept in full: `dtype`, the network's, unless told otherwise
    home         where keys and values lie: `device`, unless told otherwise. A cache that a card has no room for may lie
                 in the machine's memory; it comes to the card a stretch at a time, on every pass

    Memory: `bytes_per_token * capacity`, and for int8 and int4 the ends kept in full and, while a prompt is read, one
    stretch of the past in `dtype` (as for a `kept` of another type). On CPU the system hands out pages as they are
    written, so an unused capacity costs address space and no memory.

    Raises UserError for an unknown format, a capacity below one token, and when the machine refuses the memory.
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
        home: torch.device | str | None = None,
        kept: torch.dtype | None = None,
    ) -> None:
        if capacity < 1:
            raise UserError(f"A cache for {capacity} tokens must hold at least 1.")
        if format not in FORMATS:
            raise UserError(f"There is no cache format {format!r}: choose one of {', '.join(FORMATS)}.")
        self.format = format
        self.dtype = dtype
        self.kept = kept or dtype
        self.device = torch.device(device)
        self.home = self.device if home is None else torch.device(home)
        self.capacity = capacity
        self.rope_length = capacity
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.length = 0
        self._recent_begin = 0  # tokens from here on are in the ring
        self._marked: tuple[int, int, dict[str, Tensor]] | None = None  # length, and the ring as it was then
        self._pass_end: int | None = None  # where the pass under way will end
        self._written: set[int] = set()  # the layers that hold its tokens
        self.sparse: Sparse | None = None  # when set, chunks of a prompt leave out most of the past
        self.packing = packing.Packing(format, head_dim) if format != "full" else None
        allocate = allocate or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=self._place(name)))
        shapes = self._shapes()
        try:
            self._storage = {name: allocate(name, shape, kind) for name, (shape, kind) in shapes.items()}
        except (RuntimeError, MemoryError) as error:
            size = self.bytes_per_token * capacity / 2**30
            raise UserError(
                f"A cache for {capacity:,} tokens takes {size:.1f} GiB and the machine refused it:"
                " plan a shorter document, take an int8 or int4 cache, or use a machine with more memory."
            ) from error
        self._kernels: dict[int, Any] = {}  # by the number of query heads
        self.keys, self.values = self._storage["keys"], self._storage["values"]
        if self.packing is not None:
            self._storage["recent_tokens"].fill_(-1)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name to shape and type of every array."""
        lead, size = (self.layers, 1, self.kv_heads), self.head_dim  # [layer, 1, G, ...]
        if self.packing is None:
            full = ((*lead, self.capacity, size), self.kept)
            return {"keys": full, "values": full}
        rows, scales = self.packing.row, self.packing.scales
        packed = ((*lead, self.capacity, *rows), self.packing.dtype)
        steps = ((*lead, self.capacity, *scales), torch.bfloat16)
        first, recent = ((*lead, FIRST, size), self.kept), ((*lead, RECENT, size), self.kept)
        return {
            "keys": packed, "key_scales": steps, "values": packed, "value_scales": steps,
            "first_keys": first, "first_values": first, "recent_keys": recent, "recent_values": recent,
            "recent_tokens": ((1, 1, 1, RECENT), torch.int64),
        }  # fmt: skip

    def _place(self, name: str) -> torch.device:
        """Where an array lies: the ends kept in full are small and stay on the device."""
        return self.home if name in ("keys", "key_scales", "values", "value_scales") else self.device

    @property
    def at_home(self) -> bool:
        """Whether keys and values lie where they are used."""
        return self.home == self.device

    # ---- the network's side --------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v [1, G, T, D] to `layer` and attend q [1, H, T, D] over all its tokens; returns [1, H, T, D]."""
        new, end = k.shape[2], self.length + k.shape[2]
        self.begin_pass(layer, end)
        one = self._kernel(q.shape[1]) if new == 1 else None
        sparse = self.sparse if self.sparse is not None and self.sparse.serves(new, self.length) else None
        if self.packing is None:
            if self.kept != self.dtype:  # a token sees itself as those after it will
                k, v = k.to(self.kept).to(self.dtype), v.to(self.kept).to(self.dtype)
            self.keys[layer, :, :, self.length : end] = k
            self.values[layer, :, :, self.length : end] = v
            self._written.add(layer)
            if one:
                return one.attend(layer, q, self.spans(end), self.sparse_writing())
            if sparse is not None or (new > 1 and self._compiled(q, sparse)):
                return self._attend_chunk(layer, q, k, v, sparse)
            if not self.at_home or self.kept != self.dtype:
                return self._attend_in_stretches(layer, q, k, v)
            return chunk_attention(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end])
        rotated, k, v = (self.packing.rotate(x) for x in (q, k, v))
        if new == 1:
            self._append(layer, k, v)
            if one:
                return one.attend(layer, q, self.spans(end), self.sparse_writing())
            return self.packing.rotate(self._attend_past(layer, rotated, end)[0])
        # The chunk itself is attended in full, and the ring is read before it is written.
        if sparse is not None or self._compiled(rotated, sparse):
            mixed = self._attend_chunk(layer, rotated, k, v, sparse)
        else:
            mixed = self._attend_in_stretches(layer, rotated, k, v)
        self._append(layer, k, v)
        return self.packing.rotate(mixed)

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held, after every layer has appended them."""
        assert self.length + tokens <= self.capacity
        self.length += tokens
        self._recent_begin = max(self._recent_begin, self.length - RECENT)
        self._pass_end = None
        self._written.clear()
        if self.packing is not None:
            newest = torch.arange(max(self.length - min(tokens, RECENT), 0), self.length, device=self.device)
            self._storage["recent_tokens"][0, 0, 0, newest % RECENT] = newest

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length` (another question after the same document)."""
        assert 0 <= length <= self.length
        self._drop_pass()
        if self._marked is not None and length < self._marked[0]:
            self._marked = None
        elif self._marked is not None and length == self._marked[0]:  # what came after it may be half written
            _, self._recent_begin, ring = self._marked
            for name, array in ring.items():
                self._storage[name].copy_(array)
        self.length = length
        self._recent_begin = min(self._recent_begin, length)

    def mark(self) -> None:
        """Remember what is kept in full of the newest tokens, so that after a `truncate` back to here all goes on as if
        nothing had come in between: another question's tokens take their places."""
        if self.packing is not None and (self._marked is None or self._marked[0] != self.length):
            names = ("recent_keys", "recent_values", "recent_tokens")
            ring = {name: self._storage[name].clone() for name in names}
            self._marked = self.length, self._recent_begin, ring

    def restore(self, length: int) -> None:
        """Take the first `length` tokens of the storage, written by a cache of the same shape and format, as held."""
        assert 0 <= length <= self.capacity
        self.length = self._recent_begin = length
        self._pass_end = None
        if self.packing is not None:
            slots = self._storage["recent_tokens"][0, 0, 0].tolist()
            while self._recent_begin > 0 and slots[(self._recent_begin - 1) % RECENT] == self._recent_begin - 1:
                self._recent_begin -= 1

    def sparse_writing(self) -> Sparse | None:
        """What the token that is being read now may leave out; None where it sees everything."""
        return self.sparse if self.sparse is not None and self.sparse.writing else None

    # ---- what others read ----------------------------------------------------------------------------------

    def keys_of(self, layer: int, begin: int, end: int, heads: slice = slice(None)) -> Tensor:
        """The keys of tokens begin .. end - 1 after RoPE, [1, G, end - begin, D], or of some of the key/value heads; a
        view, in `kept`, where it can be, else in `dtype`."""
        assert 0 <= begin <= end <= self.capacity
        if self.packing is None:
            return self._here("keys", layer, begin, end, heads)
        return self.packing.rotate(self._rotated("key", layer, begin, end, heads))

    def values_of(self, layer: int, begin: int, end: int) -> Tensor:
        """The values of tokens begin .. end - 1, as `keys_of`."""
        assert 0 <= begin <= end <= self.capacity
        if self.packing is None:
            return self._here("values", layer, begin, end)
        return self.packing.rotate(self._rotated("value", layer, begin, end))

    def storage(self) -> dict[str, Tensor]:
        """Every array by its name, [layers, 1, G, capacity, ...]; the first L tokens are `[:, :, :, :L]` of each."""
        return dict(self._storage)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers, keys and values together; the ends kept in full not counted."""
        heads = self.layers * self.kv_heads
        if self.packing is None:
            return 2 * heads * self.head_dim * self.kept.itemsize
        return 2 * heads * self.packing.bytes_per_row

    # ---- writing -------------------------------------------------------------------------------------------

    def expect(self, tokens: int) -> None:
        """Prepare memory for the first `tokens` tokens, which will be written soon. Not needed, but faster."""
        for array in self._storage.values():
            if array.shape[3] == self.capacity:
                expect_rows(array, tokens)

    def begin_pass(self, layer: int, end: int) -> None:
        """Check the room, and notice when the pass before this one was broken off."""
        if end > self.capacity:
            raise UserError(
                f"The conversation would hold {end:,} tokens and was planned for {self.capacity:,}:"
                " start a new one with a longer plan."
            )
        if self._pass_end != end or layer in self._written:
            self._drop_pass()
            self._pass_end = end
            if self.packing is not None:  # slots are marked before they are overwritten: a kill may come between
                slots = torch.arange(max(end - RECENT, self.length), end, device=self.device) % RECENT
                self._storage["recent_tokens"][0, 0, 0, slots] = -1

    def spans(self, end: int) -> tuple[int, int, int]:
        """Of tokens 0 .. end - 1, the last of which is being appended: their number, where the first ones in full end,
        and where the ring begins."""
        recent = max(self._recent_begin, end - RECENT)
        return end, min(FIRST, recent), recent

    def _drop_pass(self) -> None:
        """What a broken pass wrote lies after `length`, but its ring slots held tokens before."""
        if self._pass_end is not None:
            self._recent_begin = min(max(self._recent_begin, self._pass_end - RECENT), self.length)
        self._pass_end = None
        self._written.clear()

    def _append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write rotated k, v [1, G, T, D] to every part that holds them."""
        assert self.packing is not None
        self._written.add(layer)
        begin, end = self.length, self.length + k.shape[2]
        newest = torch.arange(max(begin, end - RECENT), end, device=self.device)
        for kind, x in (("key", k), ("value", v)):
            rows, scales = self.packing.quantize(x)
            self._storage[f"{kind}s"][layer, :, :, begin:end] = rows
            self._storage[f"{kind}_scales"][layer, :, :, begin:end] = scales
            if begin < FIRST:
                self._storage[f"first_{kind}s"][layer, :, :, begin:end] = x[:, :, : FIRST - begin]
            self._storage[f"recent_{kind}s"][layer][:, :, newest % RECENT] = x[:, :, -newest.shape[0] :].to(self.kept)

    # ---- reading -------------------------------------------------------------------------------------------

    def _rotated(self, kind: str, layer: int, begin: int, end: int, heads: slice = slice(None)) -> Tensor:
        """Keys or values of a stretch as the network computed them, but rotated: [1, G, n, D] in `dtype`, a copy."""
        assert self.packing is not None
        rows = self._here(f"{kind}s", layer, begin, end, heads)
        scales = self._here(f"{kind}_scales", layer, begin, end, heads)
        x = self.packing.dequantize(rows, scales, self.dtype)
        if begin < FIRST:
            few = min(end, FIRST) - begin
            x[:, :, :few] = self._storage[f"first_{kind}s"][layer, :, heads, begin : begin + few]
        held = self._pass_end if self._pass_end is not None and layer in self._written else self.length
        recent, last = max(begin, self._recent_begin, held - RECENT), min(end, held)
        if recent < last:
            slots = torch.arange(recent, last, device=self.device) % RECENT
            x[:, :, recent - begin : last - begin] = self._storage[f"recent_{kind}s"][layer][:, heads][:, :, slots]
        return x

    def _attend_in_stretches(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, T, D] over the tokens held, a stretch at a time, and its own k, v [1, G, T, D]; all in the
        cache's rotation."""
        mixed, weight = causal_attention(q, k, v)
        return merge(*self._attend_past(layer, q, self.length), mixed, weight) if self.length else mixed

    def _attend_past(self, layer: int, q: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Unmasked attention of q, rotated where keys are, over tokens 0 .. end - 1, a stretch at a time; with
        log-sum-exps."""
        result: tuple[Tensor, Tensor] | None = None
        for start in range(0, end, STRETCH):
            stop = min(start + STRETCH, end)
            mixed, weight = folded_attention(q, *self._stretch(layer, start, stop))
            if result is None:
                result = mixed, weight
            else:
                result = merge(*result, mixed, weight), torch.logaddexp(result[1], weight)
        assert result is not None
        return result

    def _attend_chunk(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sparse: Sparse | None) -> Tensor:
        """q [1, H, T, D] over the tokens held and k, v [1, G, T, D], all rotated; sparsely, or by the CPU kernel."""
        if self._compiled(q, sparse):
            from .kernels import chunk

            return chunk.attend_cache(self, layer, q, k, v, sparse)
        assert sparse is not None
        return sparse_attention(sparse, q, k, v, self.length, lambda begin, end: self._stretch(layer, begin, end))

    def _stretch(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of held tokens in the cache's rotation, [1, G, n, D] each, in `dtype`."""
        if self.packing is None:
            keys, values = self._here("keys", layer, begin, end), self._here("values", layer, begin, end)
            return keys.to(self.dtype), values.to(self.dtype)
        return self._rotated("key", layer, begin, end), self._rotated("value", layer, begin, end)

    def _here(self, name: str, layer: int, begin: int, end: int, heads: slice = slice(None)) -> Tensor:
        """Rows of one array on `device`: a view of it where it lies there."""
        return self._storage[name][layer, :, heads, begin:end].to(self.device)

    def _compiled(self, q: Tensor, sparse: Sparse | None) -> bool:
        """Whether the CPU kernel for many queries runs for this cache's layout, too."""
        keys = self.length + q.shape[2] if sparse is None else None
        return self.device.type == "cpu" and compiled_fits(q, keys) and self._kernel(q.shape[1]) is not None

    def _kernel(self, heads: int) -> Any:
        """The kernel for one query of `heads` heads on this device, or None where there is none that can run."""
        cpu = self.device.type == "cpu"
        if (not cpu and self.device.type != "cuda") or not self.at_home:
            return None
        if cpu and kernels.unavailable():
            return None
        if heads not in self._kernels:
            if cpu:
                from .kernels.one_token import OneQuery

                self._kernels[heads] = OneQuery.of(self, heads)
            else:
                from .kernels.gpu_decode import SplitK

                self._kernels[heads] = SplitK.of(self, heads)
        return self._kernels[heads]
