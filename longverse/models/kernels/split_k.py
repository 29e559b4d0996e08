"""The Triton kernel of `gpu_decode.py`, which says what it does; imported where Triton is installed.

Tested in Triton's interpreter, which runs the same code on a CPU. Triton reads a kernel's globals and annotations as
they stand, so this module keeps to what it knows.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(columns, FORM: tl.constexpr, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which element of a head's vector stands in each column of a tile. Of int4, a byte's two halves become neighbours
    in the tile: that keeps the unpacking within a thread, and queries and results are put in the same order instead."""
    if FORM == 2:
        half: tl.constexpr = SCALED // 2
        within = columns % SCALED
        return columns // SCALED * SCALED + within % 2 * half + within // 2
    return columns


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    rows, scales, tokens, held,
    FORM: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys or values of `tokens` of one head, whose arrays begin at `rows` and `scales`: [BLOCK, PADDED]."""
    columns = tl.arange(0, PADDED)
    mask = held[:, None] & (columns < SIZE)[None, :]
    groups: tl.constexpr = SIZE // SCALED
    padded: tl.constexpr = PADDED // SCALED if FORM else 1
    group = tl.arange(0, padded)
    real = held[:, None] & (group < groups)[None, :]
    if FORM == 0:
        x = tl.load(rows + tokens[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    elif FORM == 1:
        level = tl.load(rows + tokens[:, None] * SIZE + columns[None, :], mask=mask, other=0).to(tl.float32)
        scale = tl.load(scales + tokens[:, None] * groups + group[None, :], mask=real, other=0.0).to(tl.float32)
        x = tl.reshape(tl.reshape(level, (BLOCK, padded, SCALED)) * scale[:, :, None], (BLOCK, PADDED))
    else:
        pairs = tl.arange(0, PADDED // 2)
        mask = held[:, None] & (pairs < SIZE // 2)[None, :]
        byte = tl.load(rows + tokens[:, None] * (SIZE // 2) + pairs[None, :], mask=mask, other=0)
        level = tl.join((byte & 15).to(tl.float32), (byte >> 4).to(tl.float32))  # [BLOCK, PADDED / 2, 2]
        grid = scales + (tokens[:, None] * groups + group[None, :]) * 2
        scale = tl.load(grid, mask=real, other=0.0).to(tl.float32)
        low = tl.load(grid + 1, mask=real, other=0.0).to(tl.float32)
        x = tl.reshape(level, (BLOCK, padded, SCALED)) * scale[:, :, None] + low[:, :, None]
        x = tl.reshape(x, (BLOCK, PADDED))
    return x


@triton.jit
def _end_tile(rows, slots, held, elements, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys or values that are kept in full, in a tile's order of columns."""
    mask = held[:, None] & (elements < SIZE)[None, :]
    return tl.load(rows + slots[:, None] * SIZE + elements[None, :], mask=mask, other=0.0)


@triton.jit
def _join(query, k, v, held, highest, total, sums, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The running softmax (base 2) and mix after one more tile."""
    if EXACT:
        scores = tl.dot(query, tl.trans(k.to(tl.float32)), input_precision="tf32x3")
    else:
        scores = tl.dot(query, tl.trans(k.to(query.dtype)))
    scores = tl.where(held[None, :], scores, float("-inf"))
    peak = tl.maximum(highest, tl.max(scores, 1))
    part = tl.exp2(scores - peak[:, None])
    old = tl.exp2(highest - peak)
    if EXACT:
        sums = sums * old[:, None] + tl.dot(part, v.to(tl.float32), input_precision="tf32x3")
    else:
        sums = sums * old[:, None] + tl.dot(part.to(query.dtype), v.to(query.dtype))
    return peak, total * old + tl.sum(part, 1), sums


@triton.jit(do_not_specialize=["end", "first", "recent", "per_stretch"])
def split_k(  # type: ignore[no-untyped-def]
    q, keys, key_scales, values, value_scales, first_keys, first_values, recent_keys, recent_values,
    mixed, weight, end, first, recent, per_stretch, capacity, scale,
    FORM: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program's stretch of one head: the normalised mix of values and the log-sum-exp (base 2) of its scores. The
    last program of a head takes the ends that are kept in full, the others the tokens between, `per_stretch` each."""
    head = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    queries = tl.arange(0, ROWS)
    elements = _elements(tl.arange(0, PADDED), FORM, SCALED)
    real = (queries < GROUP)[:, None] & (elements < SIZE)[None, :]
    query = tl.load(q + (head * GROUP + queries)[:, None] * SIZE + elements[None, :], mask=real, other=0.0)
    query = (query.to(tl.float32) * (scale * 1.4426950408889634)).to(query.dtype)
    highest = tl.full([ROWS], -1e30, tl.float32)  # finite: a tile without a token leaves everything as it is
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    within = tl.arange(0, BLOCK)
    last = tl.num_programs(1) - 1
    if (FORM == 0) | (stretch < last):
        groups: tl.constexpr = SIZE // SCALED
        row: tl.constexpr = SIZE // 2 if FORM == 2 else SIZE
        grid: tl.constexpr = groups * 2 if FORM == 2 else groups
        keys += head * capacity * row
        values += head * capacity * row
        key_scales += head * capacity * grid
        value_scales += head * capacity * grid
        begin = first + stretch * per_stretch
        stop = tl.minimum(begin + per_stretch, recent)
        for at in tl.range(begin, stop, BLOCK):
            tokens = at + within
            held = tokens < stop
            k = _tile(keys, key_scales, tokens, held, FORM, SIZE, PADDED, SCALED, BLOCK)
            v = _tile(values, value_scales, tokens, held, FORM, SIZE, PADDED, SCALED, BLOCK)
            highest, total, sums = _join(query, k, v, held, highest, total, sums, EXACT)
    else:
        for at in tl.range(0, first, BLOCK):
            held = at + within < first
            slots = head * FIRST + at + within
            k = _end_tile(first_keys, slots, held, elements, SIZE)
            v = _end_tile(first_values, slots, held, elements, SIZE)
            highest, total, sums = _join(query, k, v, held, highest, total, sums, EXACT)
        for at in tl.range(recent, end, BLOCK):
            held = at + within < end
            slots = head * RING + (at + within) % RING
            k = _end_tile(recent_keys, slots, held, elements, SIZE)
            v = _end_tile(recent_values, slots, held, elements, SIZE)
            highest, total, sums = _join(query, k, v, held, highest, total, sums, EXACT)
    place = (head * tl.num_programs(1) + stretch) * GROUP + queries
    share = tl.where(total > 0, total, 1.0)
    tl.store(mixed + place[:, None] * SIZE + elements[None, :], sums / share[:, None], mask=real)
    tl.store(weight + place, tl.where(total > 0, highest + tl.log2(share), float("-inf")), mask=queries < GROUP)
