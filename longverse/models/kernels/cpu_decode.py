# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated"
"""One new token on a CPU: its attention over a cache of any format, and the whole decoder for it.

Shapes: G key/value heads, h query heads of each, D head size, C hidden size, M MLP width, V vocabulary, S tokens in the
cache (with the new one), P stretches that the keys are split into, R slots of the ring of newest tokens.

The functions here are compiled by `team.specialise`, which binds the names in capitals below to constants; `build.py`
does so, and `one_token.py` prepares what they read. `attend_one` and `decode_one` run on all threads of a team at once,
`rank` of `team`: they divide rows, heads and stretches of keys among each other, and `meet` before reading what others
wrote. Arithmetic is float32 throughout.

The parts of a cache, in one order everywhere; all by layer and head [layers * G, tokens, ...]:
    keys, key_scales, values, value_scales   every token; packed when QUANTISED, else the scales are empty
    first_keys, first_values                 the first tokens in full [.., F, D]; empty when not QUANTISED
    recent_keys, recent_values               the ring of newest tokens in full [.., R, D], token t in slot t % R

Page-sparse writing (SPARSE): every key is scored, a page of TILE tokens at a time, and a page that weighs next to
nothing has its values left out. So what a page weighs is known and not estimated, and `budget` holds for every head:

    budget   float32 [2]: the share of a head's attention that may be left out; and how many times its even share of
             that a single page may weigh
    dropped  float32 [h]: what was left out so far, as weighted as `total`
    lost     float64 [G]: the share that was left out, as the mean over a key/value head's queries, added up over layers
"""

import numpy as np

from .simd import bf16_to_float, dots, exponentials, float_to_bf16, largest, matvec, power_of_two, weighted_sum
from .team import meet
from .vectors import POWER_OF_TWO

# Bound by specialise:
SIZE, HEADS = 64, 1  # D and h
KEPT, KEPT_BF16, KEPT_GROUP = "bf16", True, 64  # layout of tokens kept in full; elements summed at a time
SPARSE = False  # whether pages of values are left out
QUANTISED, PACKED, GROUP = False, "int8", 64  # whether the others are packed, their layout and its group
ROTATED = 1  # elements the Hadamard rotation mixes, a power of two; 1 for none
WEIGHTS, WEIGHT_GROUP, HEAD = "bf16", 32, "bf16"  # layouts of the matrices and of the head, and their group
QK_NORM, QKV_BIAS, OUTPUT_BIAS, MLP_BIAS = False, False, False, False

NOTHING = np.float32(0)
TILE = 64  # keys at a time: their scores stay in the processor's first cache
Q, K, V, O, GATE, UP, DOWN = 0, 1, 2, 3, 4, 5, 6  # columns of `weights`  # noqa: E741


# ---- arithmetic --------------------------------------------------------------------------------------------


def exp_negative(x):
    """exp(x) for x <= 0, to 2e-7 relative; written out because a call of the library is not vectorised."""
    x = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    whole = np.floor(x)
    f = x - whole
    p = np.float32(POWER_OF_TWO[0])
    for coefficient in POWER_OF_TWO[1:]:
        p = p * f + np.float32(coefficient)
    return p * power_of_two(np.int32(whole))


def rms_norm(x, weight, eps, out):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(x.size) + eps)
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]


def hadamard(x):
    """Rotate x [D] in place by the normalised Hadamard matrix of ROTATED elements, block by block. It is its own
    inverse, and spreads an outlier over its block."""
    if ROTATED > 1:
        for block in range(0, SIZE, ROTATED):
            step = 1
            while step < ROTATED:
                for i in range(block, block + ROTATED, 2 * step):
                    for j in range(i, i + step):
                        a, b = x[j], x[j + step]
                        x[j] = a + b
                        x[j + step] = a - b
                step *= 2
        factor = np.float32(1) / np.sqrt(np.float32(ROTATED))
        for i in range(SIZE):
            x[i] *= factor


def rotate_scaled(q):
    """A query head [D] as keys are met: rotated, and divided by the root of D."""
    hadamard(q)
    scale = np.float32(1) / np.sqrt(np.float32(SIZE))
    for i in range(SIZE):
        q[i] *= scale


def rotate_position(x, cos, sin, weight, eps):
    """The query/key norm where there is one, then RoPE, of one head x [D] in place."""
    if QK_NORM:
        rms_norm(x, weight, eps, x)
    half = SIZE // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


def sum_groups(x, group, sums):
    for i in range(sums.size):
        total = np.float32(0)
        for j in range(i * group, (i + 1) * group):
            total += x[j]
        sums[i] = total


# ---- the cache ---------------------------------------------------------------------------------------------


def keep_in_full(x, place):
    for i in range(SIZE):
        place[i] = float_to_bf16(x[i]) if KEPT_BF16 else x[i]


def pack_row(x, place, scales):
    """Round a row to its layout's levels; `cache.quantize` is the same in torch."""
    for part in range(SIZE // GROUP):
        at = part * GROUP
        low, high = x[at], x[at]
        for i in range(at, at + GROUP):
            low, high = min(low, x[i]), max(high, x[i])
        if PACKED == "int8":
            bits = float_to_bf16(max(high, -low) / np.float32(127))
            scale = bf16_to_float(bits)
            scales[part] = bits
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            for i in range(at, at + GROUP):
                level = np.rint(x[i] * inverse)
                place[i] = np.int8(min(max(level, np.float32(-127)), np.float32(127)))
        else:
            low_bits = float_to_bf16(low)
            low = bf16_to_float(low_bits)
            bits = float_to_bf16((high - low) / np.float32(15))
            scale = bf16_to_float(bits)
            scales[2 * part], scales[2 * part + 1] = bits, low_bits
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            for i in range(GROUP // 2):
                a = min(max(np.rint((x[at + i] - low) * inverse), np.float32(0)), np.float32(15))
                b = min(max(np.rint((x[at + i + GROUP // 2] - low) * inverse), np.float32(0)), np.float32(15))
                place[at // 2 + i] = np.uint8(a) | (np.uint8(b) << 4)


def keep(x, head, token, rows, scales, first, recent):
    """Write one key or value x [D], rotated already, of `token` into every part of the cache that holds it."""
    if QUANTISED:
        pack_row(x, rows[head, token], scales[head, token])
        if token < first.shape[1]:
            keep_in_full(x, first[head, token])
        keep_in_full(x, recent[head, token % recent.shape[1]])
    else:
        keep_in_full(x, rows[head, token])


# ---- attention ---------------------------------------------------------------------------------------------


def fold(scores, n, top, total, dropped, acc, most, most_each):
    """Turn n scores of each head into weights and fold their sum into a running softmax (Milakov and Gimelshein 2018,
    arXiv 1805.02867): top and total [h] are the largest score and the sum so far, acc [h, D] the weighted values.

    Returns whether the values of these tokens are to be added. They are not where the tokens weigh at most `most_each`
    of what was seen so far, as the mean over the heads, and all that was left out at most `most`, for every head."""
    together, alone = np.float32(0), np.float32(0)
    whole = (n + 15) // 16 * 16
    for head in range(HEADS):
        for i in range(n, whole):
            scores[head, i] = np.float32(-1e30)
        highest = max(top[head], largest(scores, head, whole))
        if highest > top[head]:
            factor = exp_negative(top[head] - highest)
            total[head] *= factor
            if SPARSE:
                dropped[head] *= factor
            for i in range(SIZE):
                acc[head, i] *= factor
            top[head] = highest
        added = exponentials(scores, head, whole, highest)
        total[head] += added
        if SPARSE:
            seen = total[head] + dropped[head]
            together = max(together, (dropped[head] + added) / seen)
            alone += added / seen
    if SPARSE and together <= most and alone <= most_each * HEADS:
        for head in range(HEADS):
            added = np.float32(0)
            for i in range(n):
                added += scores[head, i]
            total[head] -= added
            dropped[head] += added
        return False
    return True


def attend_kept(q, sums, keys, values, none, base, begin, end, scores, top, total, dropped, acc, most, most_each):
    """Attend to tokens begin .. end - 1 that are kept in full; `base` is the row of token 0."""
    for t in range(begin, end, TILE):
        n = min(TILE, end - t)
        dots(KEPT, SIZE, HEADS, KEPT_GROUP, q, sums, keys, none, base + t, n, scores)
        if not fold(scores, n, top, total, dropped, acc, most if t + TILE < end else NOTHING, most_each):
            continue
        weighted_sum(KEPT, SIZE, HEADS, KEPT_GROUP, scores, values, none, base + t, n, acc)


def attend_packed(
    q, sums, keys, key_scales, values, value_scales, base, begin, end, scores, top, total, dropped, acc, most, most_each
):  # fmt: skip
    """Attend to tokens begin .. end - 1 that are packed."""
    for t in range(begin, end, TILE):
        n = min(TILE, end - t)
        dots(PACKED, SIZE, HEADS, GROUP, q, sums, keys, key_scales, base + t, n, scores)
        if not fold(scores, n, top, total, dropped, acc, most, most_each):
            continue
        weighted_sum(PACKED, SIZE, HEADS, GROUP, scores, values, value_scales, base + t, n, acc)


def attend_stretch(q, head, part, parts, spans, budget, cache, scores, top, total, dropped, acc):
    """Stretch `part` of `parts` of one head's tokens. q [h, D] is rotated and scaled; spans: see `attend_one`."""
    keys, key_scales, values, value_scales, first_keys, first_values, recent_keys, recent_values = cache
    length, first_end, recent_begin = spans[0], spans[1], spans[2]
    for i in range(HEADS):
        top[i], total[i], dropped[i] = np.float32(-3e38), NOTHING, NOTHING
        for j in range(SIZE):
            acc[i, j] = NOTHING
    sums = np.empty((HEADS, SIZE // GROUP if QUANTISED else 1), dtype=np.float32)
    base = head * keys.shape[1]
    if QUANTISED:
        for i in range(HEADS):
            sum_groups(q[i], GROUP, sums[i])
        if part == 0:
            attend_kept(
                q, sums, first_keys, first_values, key_scales, head * first_keys.shape[1], 0, first_end,
                scores, top, total, dropped, acc, NOTHING, NOTHING,
            )  # fmt: skip
            slots = recent_keys.shape[1]
            t = recent_begin
            while t < length:
                run = min(length - t, slots - t % slots)
                slot = t % slots
                attend_kept(
                    q, sums, recent_keys, recent_values, key_scales, head * slots, slot, slot + run,
                    scores, top, total, dropped, acc, NOTHING, NOTHING,
                )  # fmt: skip
                t += run
        middle = recent_begin - first_end
        begin, end = first_end + middle * part // parts, first_end + middle * (part + 1) // parts
        each = budget[1] * budget[0] * np.float32(TILE) / np.float32(max(end - begin, TILE))
        attend_packed(
            q, sums, keys, key_scales, values, value_scales, base, begin, end,
            scores, top, total, dropped, acc, budget[0], each,
        )  # fmt: skip
    else:
        begin, end = length * part // parts, length * (part + 1) // parts
        each = budget[1] * budget[0] * np.float32(TILE) / np.float32(max(end - begin, TILE))
        attend_kept(
            q, sums, keys, values, key_scales, base, begin, end, scores, top, total, dropped, acc, budget[0], each
        )  # fmt: skip


def hand_over(top, total, dropped, acc, place):
    """What a stretch came to, for `merge`: place [h, D + 3]."""
    for i in range(HEADS):
        for j in range(SIZE):
            place[i, j] = acc[i, j]
        place[i, SIZE], place[i, SIZE + 1], place[i, SIZE + 2] = top[i], total[i], dropped[i]


def merge(partial, head, out):
    """Join the stretches of one head: partial [G, P, h, D + 3] to out [h * D] of this head, rotated back. Returns the
    share of the attention that was left out, as the mean over its query heads."""
    lost = np.float32(0)
    for i in range(HEADS):
        highest = np.float32(-3e38)
        for part in range(partial.shape[1]):
            highest = max(highest, partial[head, part, i, SIZE])
        mixed = out[i * SIZE : (i + 1) * SIZE]
        for j in range(SIZE):
            mixed[j] = NOTHING
        total, dropped = np.float32(0), np.float32(0)
        for part in range(partial.shape[1]):
            factor = exp_negative(partial[head, part, i, SIZE] - highest)
            total += factor * partial[head, part, i, SIZE + 1]
            if SPARSE:
                dropped += factor * partial[head, part, i, SIZE + 2]
            for j in range(SIZE):
                mixed[j] += factor * partial[head, part, i, j]
        for j in range(SIZE):
            mixed[j] /= total
        hadamard(mixed)
        if SPARSE:
            lost += dropped / (total + dropped)
    return lost / np.float32(HEADS)


def attend_one(rank, team, counter, queries, layer, spans, budget, lost, cache, partial, out):
    """Attention of one token over its cache, which holds it already.

    queries  float32 [G * h, D] after RoPE
    spans    int64 [3]: S; the end of the first tokens kept in full; the first token of the ring (both only QUANTISED)
    partial  float32 [G, P, h, D + 3], to work in;  out  float32 [G * h * D]
    """
    heads, parts = partial.shape[0], partial.shape[1]
    q = np.empty((HEADS, SIZE), dtype=np.float32)
    scores = np.empty((HEADS, TILE), dtype=np.float32)
    top, total = np.empty(HEADS, dtype=np.float32), np.empty(HEADS, dtype=np.float32)
    dropped = np.empty(HEADS, dtype=np.float32)
    acc = np.empty((HEADS, SIZE), dtype=np.float32)
    items = heads * parts
    for item in range(items * rank // team, items * (rank + 1) // team):
        head, part = item // parts, item % parts
        for i in range(HEADS):
            for j in range(SIZE):
                q[i, j] = queries[head * HEADS + i, j]
            rotate_scaled(q[i])
        attend_stretch(q, layer * heads + head, part, parts, spans, budget, cache, scores, top, total, dropped, acc)
        hand_over(top, total, dropped, acc, partial[head, part])
    meet(counter, team)
    for head in range(heads * rank // team, heads * (rank + 1) // team):
        lost[head] += merge(partial, head, out[head * HEADS * SIZE : (head + 1) * HEADS * SIZE])


# ---- the decoder -------------------------------------------------------------------------------------------


def product(x, sums, weight, scales, rows, rank, team, out):
    """This thread's share of out[i] = row i of a matrix . x; returns the share (begin, end)."""
    begin, end = rows * rank // team, rows * (rank + 1) // team
    if WEIGHTS == "int4":
        sum_groups(x, WEIGHT_GROUP, sums[: x.size // WEIGHT_GROUP])
    matvec(WEIGHTS, WEIGHT_GROUP, x, sums, weight, scales, x.size // WEIGHT_GROUP, begin, end, out)
    return begin, end


def decode_one(
    rank, team, counter, x, cos, sin, eps, spans, budget, lost, cache,
    norms, qk_norms, qkv_bias, output_bias, mlp_bias, weights, scales, head_weight, head_scales,
    qkv, partial, gate, up, down, logits,
):  # fmt: skip
    """The whole decoder for one token, which it appends to the cache of every layer.

    x         float32 [C]: the token's embedding; the hidden state before the last norm afterwards
    cos, sin  float32 [D] of its position; spans as in `attend_one`, with S counting the new token
    norms     float32 [layers + 1, 2, C]: before attention and MLP of each layer; then the last norm
    qk_norms  float32 [layers, 2, D];  qkv_bias [layers, (G * h + 2 * G) * D]; output_bias [layers, C]
    mlp_bias  float32 [layers, 2 * M + C]; all of these empty where the model has none
    weights   int64 [layers, 7]: where each matrix begins, `scales` where its scales do
    qkv, gate, up, down  float32, to work in: [(G * h + 2 * G) * D], [M], [M], [C];  logits float32 [V]
    """
    heads, parts, layers = partial.shape[0], partial.shape[1], weights.shape[0]
    hidden, width, queries = x.size, gate.size, heads * HEADS * SIZE
    keys, key_scales, values, value_scales, first_keys, first_values, recent_keys, recent_values = cache
    token = spans[0] - 1
    normed = np.empty(hidden, dtype=np.float32)
    mixed = np.empty(queries, dtype=np.float32)
    sums = np.empty(max(hidden, width, queries) // WEIGHT_GROUP, dtype=np.float32)
    q = np.empty((HEADS, SIZE), dtype=np.float32)
    row = np.empty(SIZE, dtype=np.float32)
    scores = np.empty((HEADS, TILE), dtype=np.float32)
    top, total = np.empty(HEADS, dtype=np.float32), np.empty(HEADS, dtype=np.float32)
    dropped = np.empty(HEADS, dtype=np.float32)
    acc = np.empty((HEADS, SIZE), dtype=np.float32)
    for layer in range(layers):
        w, s = weights[layer], scales[layer]
        # Queries, keys and values of the token.
        rms_norm(x, norms[layer, 0], eps, normed)
        own = qkv[queries : queries + heads * SIZE]  # [G * D]
        new_values = qkv[queries + heads * SIZE :]
        product(normed, sums, w[Q], s[Q], queries, rank, team, qkv)
        product(normed, sums, w[K], s[K], heads * SIZE, rank, team, own)
        product(normed, sums, w[V], s[V], heads * SIZE, rank, team, new_values)
        meet(counter, team)
        # Attention; whoever has the last stretch of a head appends its key and value first.
        items = heads * parts
        for item in range(items * rank // team, items * (rank + 1) // team):
            head, part = item // parts, item % parts
            for i in range(HEADS):
                at = (head * HEADS + i) * SIZE
                for j in range(SIZE):
                    q[i, j] = qkv[at + j]
                    if QKV_BIAS:
                        q[i, j] += qkv_bias[layer, at + j]
                rotate_position(q[i], cos, sin, qk_norms[layer, 0] if QK_NORM else row, eps)
                rotate_scaled(q[i])
            index = layer * heads + head
            # The newest token is in the ring, which part 0 reads; without a ring it ends the last stretch.
            if part == (0 if QUANTISED else parts - 1):
                for i in range(SIZE):
                    row[i] = own[head * SIZE + i]
                    if QKV_BIAS:
                        row[i] += qkv_bias[layer, queries + head * SIZE + i]
                rotate_position(row, cos, sin, qk_norms[layer, 1] if QK_NORM else row, eps)
                hadamard(row)
                keep(row, index, token, keys, key_scales, first_keys, recent_keys)
                for i in range(SIZE):
                    row[i] = new_values[head * SIZE + i]
                    if QKV_BIAS:
                        row[i] += qkv_bias[layer, queries + heads * SIZE + head * SIZE + i]
                hadamard(row)
                keep(row, index, token, values, value_scales, first_values, recent_values)
            attend_stretch(q, index, part, parts, spans, budget, cache, scores, top, total, dropped, acc)
            hand_over(top, total, dropped, acc, partial[head, part])
        meet(counter, team)
        for head in range(heads):
            left = merge(partial, head, mixed[head * HEADS * SIZE : (head + 1) * HEADS * SIZE])
            if rank == 0:
                lost[head] += left
        begin, end = product(mixed, sums, w[O], s[O], hidden, rank, team, down)
        for i in range(begin, end):
            x[i] += down[i]
            if OUTPUT_BIAS:
                x[i] += output_bias[layer, i]
        meet(counter, team)
        # The MLP.
        rms_norm(x, norms[layer, 1], eps, normed)
        begin, end = product(normed, sums, w[GATE], s[GATE], width, rank, team, gate)
        product(normed, sums, w[UP], s[UP], width, rank, team, up)
        for i in range(begin, end):
            g, u = gate[i], up[i]
            if MLP_BIAS:
                g, u = g + mlp_bias[layer, i], u + mlp_bias[layer, width + i]
            small = exp_negative(-abs(g))
            sigmoid = (np.float32(1) if g >= 0 else small) / (np.float32(1) + small)
            gate[i] = g * sigmoid * u
        meet(counter, team)
        begin, end = product(gate, sums, w[DOWN], s[DOWN], hidden, rank, team, down)
        for i in range(begin, end):
            x[i] += down[i]
            if MLP_BIAS:
                x[i] += mlp_bias[layer, 2 * width + i]
        meet(counter, team)
    rms_norm(x, norms[layers, 0], eps, normed)
    begin, end = logits.size * rank // team, logits.size * (rank + 1) // team
    groups = hidden // WEIGHT_GROUP
    matvec(HEAD, WEIGHT_GROUP, normed, sums, head_weight, head_scales, groups, begin, end, logits)
