"""The Triton kernel of `gpu_decode.py`, which says what it does; imported where Triton is installed.

Tested in Triton's interpreter, which runs the same code on a CPU. Triton reads a kernel's globals and annotations as
they stand, so this module keeps to what it knows.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    rows, scales, first_rows, recent_rows, head, tokens, columns, inside, end, first, recent, capacity,
    FORM: tl.constexpr, SIZE: tl.constexpr, SCALED: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Keys or values of `tokens` of one head in floating point: [BLOCK, PADDED]."""
    at = head * capacity + tokens
    held = (tokens < end) & (tokens >= first) & (tokens < recent)
    mask = held[:, None] & inside[None, :]
    groups: tl.constexpr = SIZE // SCALED
    if FORM == 0:
        x = tl.load(rows + at[:, None] * SIZE + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    elif FORM == 1:
        level = tl.load(rows + at[:, None] * SIZE + columns[None, :], mask=mask, other=0).to(tl.float32)
        x = level * tl.load(scales + at[:, None] * groups + (columns // SCALED)[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    else:
        # byte j of a group: element j in its low half, element j + SCALED / 2 in its high half
        half: tl.constexpr = SCALED // 2
        place = columns // SCALED * half + columns % half
        shift = columns % SCALED // half * 4
        byte = tl.load(rows + at[:, None] * (SIZE // 2) + place[None, :], mask=mask, other=0).to(tl.int32)
        level = ((byte >> shift[None, :]) & 15).to(tl.float32)
        grid = scales + (at[:, None] * groups + (columns // SCALED)[None, :]) * 2
        scale = tl.load(grid, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(grid + 1, mask=mask, other=0.0).to(tl.float32) + level * scale
    if FORM != 0:
        early = (tokens < first)[:, None] & inside[None, :]
        late = ((tokens >= recent) & (tokens < end))[:, None] & inside[None, :]
        x += tl.load(first_rows + (head * FIRST + tokens)[:, None] * SIZE + columns[None, :], mask=early, other=0.0).to(
            tl.float32
        )
        slot = head * RING + tokens % RING
        x += tl.load(recent_rows + slot[:, None] * SIZE + columns[None, :], mask=late, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["end", "first", "recent", "per_stretch"])
def split_k(  # type: ignore[no-untyped-def]
    q, keys, key_scales, values, value_scales, first_keys, first_values, recent_keys, recent_values,
    mixed, weight, end, first, recent, per_stretch, capacity, scale,
    FORM: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """A program's stretch of one head: the normalised mix of values and the log-sum-exp of its scores."""
    head = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    queries = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    real = (queries < GROUP)[:, None] & inside[None, :]
    query = tl.load(q + (head * GROUP + queries)[:, None] * SIZE + columns[None, :], mask=real, other=0.0)
    query = query.to(tl.float32) * scale
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    for block in range(per_stretch):
        begin = (stretch * per_stretch + block) * BLOCK
        tokens = begin + tl.arange(0, BLOCK)
        if begin < end:
            k = _tile(
                keys, key_scales, first_keys, recent_keys, head, tokens, columns, inside, end, first, recent,
                capacity, FORM, SIZE, SCALED, FIRST, RING,
            )  # fmt: skip
            scores = tl.dot(query, tl.trans(k), input_precision="tf32x3")
            scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
            peak = tl.maximum(highest, tl.max(scores, 1))
            part = tl.exp(scores - peak[:, None])
            old = tl.exp(highest - peak)
            v = _tile(
                values, value_scales, first_values, recent_values, head, tokens, columns, inside, end, first,
                recent, capacity, FORM, SIZE, SCALED, FIRST, RING,
            )  # fmt: skip
            sums = sums * old[:, None] + tl.dot(part, v, input_precision="tf32x3")
            total = total * old + tl.sum(part, 1)
            highest = peak
    place = (head * tl.num_programs(1) + stretch) * GROUP + queries
    share = tl.where(total > 0, total, 1.0)
    tl.store(mixed + place[:, None] * SIZE + columns[None, :], sums / share[:, None], mask=real)
    tl.store(weight + place, highest + tl.log(share), mask=queries < GROUP)
