# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated"
"""Attention of many new tokens over a cache of any format, on a CPU, by bfloat16 products or in float32.

Shapes: G key/value heads, h query heads of each, D head size, T new tokens after P past ones; a row is one query head
of one new token, rows of a key/value head in the order [T, h], padded to whole tiles.

`fold_stretch` folds a stretch of keys into the running softmax of all rows: it lays the stretch's keys and values out
for the inner loop (`bf16.py` or `amx.py`), restoring packed ones on the way, and then the threads take items of rows
one by one. The caller goes through the stretches; so memory beside the cache is one stretch and the running sums,
whatever the length. Choosing blocks takes two floats besides for each sampled row and block of the past.
"""

import numpy as np

from .bf16 import BLOCK, ITEM_TILES, TILE_ROWS, attend_tile, begin_tiles, end_tiles, weigh_tile
from .simd import arrive, bf16_to_float, float_to_bf16
from .team import meet
from .vectors import LANES, copy_words, transpose_words

# Bound by specialise, as in cpu_decode.py:
SIZE, HEADS = 64, 1
QUANTISED, PACKED, GROUP = False, "int8", 64
BF16 = True  # whether everything is multiplied in bfloat16, and comes so; else float32
WORDS = 32  # of four bytes in a row of D numbers
WIDENED = False  # whether a cache in bfloat16 is multiplied in float32
AS_KEPT = True  # whether rows of the cache are multiplied as they are


def rounded(x):
    """A float32 number as it is multiplied."""
    return float_to_bf16(x) if BF16 else x


def restore_row(rows, scales, out):
    """A packed row to [D]."""
    for part in range(SIZE // GROUP):
        target = out[part * GROUP : (part + 1) * GROUP]
        if PACKED == "int8":
            levels = rows[part * GROUP : (part + 1) * GROUP]
            scale = bf16_to_float(scales[part])
            for i in range(GROUP):
                target[i] = rounded(np.float32(levels[i]) * scale)
        else:
            half = GROUP // 2
            raw = rows[part * half : (part + 1) * half]
            scale, low = bf16_to_float(scales[2 * part]), bf16_to_float(scales[2 * part + 1])
            for i in range(half):
                target[i] = rounded(np.float32(np.int32(raw[i]) & 15) * scale + low)
                target[half + i] = rounded(np.float32(np.int32(raw[i]) >> 4) * scale + low)


def gather_block(head, kv_head, begin, past, end, spans, rows, scales, first, recent, own, out):
    """[BLOCK, D] of tokens begin .. of one head, from wherever they are; zeros after `end`.

    Tokens from `past` on are the new ones, own [G, T, D]; spans: where the first tokens in full end, where the ring
    begins.
    """
    for i in range(BLOCK):
        token = begin + i
        if token >= end:
            clear_row(out[i])
        elif token >= past:
            copy_row(own[kv_head, token - past], out[i])
        elif QUANTISED:
            if token < spans[1]:
                take_kept(first[head, token], out[i])
            elif token >= spans[2]:
                take_kept(recent[head, token % recent.shape[1]], out[i])
            else:
                restore_row(rows[head, token], scales[head, token], out[i])
        else:
            take_kept(rows[head, token], out[i])


def copy_row(row, out):
    for i in range(SIZE):
        out[i] = row[i]


def clear_row(out):
    for i in range(SIZE):
        out[i] = 0


def take_kept(row, out):
    """A row that is kept in full, as it is multiplied."""
    for i in range(SIZE):
        out[i] = bf16_to_float(row[i]) if WIDENED else row[i]


def copy_rows(rows, out):
    """[n, D] as it is: into int32 [n * WORDS]."""
    for i in range(rows.shape[0]):
        copy_words(rows, i, out, i * WORDS, WORDS)


def turn_keys(rows, out):
    """float32 [BLOCK, D] to float32 [D, BLOCK] in int32."""
    for i in range(0, BLOCK, 16):
        for element in range(0, SIZE, 16):
            transpose_words(rows, i, element, out, element * BLOCK + i, BLOCK)


def pair_keys(rows, out):
    """bf16 [BLOCK, D] to int32 [D / 2, BLOCK]."""
    if SIZE % 32 == 0:
        for i in range(0, BLOCK, 16):
            for pair in range(0, SIZE // 2, 16):
                transpose_words(rows, i, pair, out, pair * BLOCK + i, BLOCK)
        return
    for pair in range(SIZE // 2):
        for i in range(BLOCK):
            out[pair * BLOCK + i] = np.int32(rows[i, 2 * pair]) | (np.int32(rows[i, 2 * pair + 1]) << np.int32(16))


def pair_values(rows, out):
    """bf16 [BLOCK, D] to int32 [BLOCK / 2, D]."""
    for pair in range(BLOCK // 2):
        low, high, target = rows[2 * pair], rows[2 * pair + 1], out[pair * SIZE : (pair + 1) * SIZE]
        for i in range(SIZE):
            target[i] = np.int32(low[i]) | (np.int32(high[i]) << np.int32(16))


def turn_values(rows, out):
    """bf16 [BLOCK, D] to bf16 [D, BLOCK] in int32 [D, BLOCK / 2], for AMX."""
    pairs = np.empty((BLOCK // 2, SIZE), dtype=np.int32)
    pair_values(rows, pairs.reshape(-1))
    for pair in range(0, BLOCK // 2, 16):
        for i in range(0, SIZE, 16):
            transpose_words(pairs, pair, i, out, i * (BLOCK // 2) + pair, BLOCK // 2)


def turn_queries(rows, out):
    """bf16 [TILE_ROWS, D] to int32 [TILE_ROWS / 16, D / 2, 16], for AMX."""
    for r in range(0, TILE_ROWS, 16):
        for pair in range(0, SIZE // 2, 16):
            transpose_words(rows, r, pair, out, r * (SIZE // 2) + pair * 16, 16)


def take_rows(total, acc, first, weights, tile):
    """Of TILE_ROWS rows from `first` on: weights [TILE_ROWS], the sums of their weights; tile [TILE_ROWS * D], their
    weighted values."""
    for r in range(TILE_ROWS):
        weights[r] = np.float32(0)
        for i in range(LANES):
            weights[r] += total[(first + r) * LANES + i]
    for i in range(TILE_ROWS * SIZE):
        tile[i] = acc[first * SIZE + i]


def take_columns(total, acc, first, weights, tile):
    """`take_rows` for AMX, of tiles of 16 rows that lie as [D, 16]."""
    for r in range(TILE_ROWS):
        weights[r] = total[first + r]
    held = acc[first * SIZE : (first + TILE_ROWS) * SIZE].reshape(-1, 16)
    for r in range(0, TILE_ROWS, 16):
        for i in range(0, SIZE, 16):
            transpose_words(held, r // 16 * SIZE + i, 0, tile, r * SIZE + i, SIZE)


# Bound by specialise to what f32.py, bf16.py or amx.py wants:
lay_keys, lay_values, lay_tile, take_tile = pair_keys, pair_values, copy_rows, take_rows


def attend_tiles(size, scale, queries, keys, values, rows, blocks, count, top, total, acc):
    """`attend_tile` for the queries from rows[i] on and block blocks[i], i < count. In place of amx.attend_tiles, whose
    arguments it takes, and which wants no two neighbours in `rows` alike."""
    limits = np.empty(TILE_ROWS, dtype=np.int32)
    for i in range(count):
        attend_tile(size, 0, scale, queries, rows[i], keys, values, blocks[i], limits, top, total, acc)


def lay_block(head, kv_head, at, past, end, spans, rows, scales, first, recent, own, gathered, kind, out):
    """Lay one block out for the inner loop; kind 0 for keys, 1 for values."""
    block = gathered
    if AS_KEPT and at + BLOCK <= past:
        block = rows[head, at : at + BLOCK]
    else:
        gather_block(head, kv_head, at, past, end, spans, rows, scales, first, recent, own, gathered)
    if kind == 0:
        lay_keys(block, out)
    else:
        lay_values(block, out)


def lay_queries(rank, team, q, out):
    """q [T, H, D] to the rows that the inner loop wants: out int32 [G, rows * WORDS], zeros after the last."""
    tokens, heads = q.shape[0], q.shape[1] // HEADS
    flat = q.reshape(-1, SIZE)
    rows = out.shape[1] // WORDS
    tiles = rows // TILE_ROWS
    gathered = np.empty((TILE_ROWS, SIZE), dtype=q.dtype)
    for index in range(rank, heads * tiles, team):
        head, tile = index // tiles, index % tiles
        for r in range(TILE_ROWS):
            token, of_head = (tile * TILE_ROWS + r) // HEADS, (tile * TILE_ROWS + r) % HEADS
            if token < tokens:
                copy_row(flat[token * heads * HEADS + head * HEADS + of_head], gathered[r])
            else:
                clear_row(gathered[r])
        lay_tile(gathered, out[head, tile * TILE_ROWS * WORDS : (tile + 1) * TILE_ROWS * WORDS])


def give_results(rank, team, total, acc, out):
    """The rows' sums by their weights: total, acc as in `fold_stretch`, out [T, H, D]."""
    tokens, heads = out.shape[0], out.shape[1] // HEADS
    rows = acc.shape[1] // SIZE
    flat = out.reshape(-1, SIZE)
    tile = np.empty(TILE_ROWS * SIZE, dtype=np.float32)
    weights = np.empty(TILE_ROWS, dtype=np.float32)
    for index in range(rank, heads * (rows // TILE_ROWS), team):
        head, first = index // (rows // TILE_ROWS), index % (rows // TILE_ROWS) * TILE_ROWS
        take_tile(total[head], acc[head], first, weights, tile)
        for r in range(TILE_ROWS):
            token, of_head = (first + r) // HEADS, (first + r) % HEADS
            if token < tokens:
                target, share = flat[token * heads * HEADS + head * HEADS + of_head], np.float32(1) / weights[r]
                for i in range(SIZE):
                    target[i] = rounded(tile[r * SIZE + i] * share)


def anyone_keeps(kept, block):
    """Whether some query block of kept [query blocks, past blocks] attends to this block of the past."""
    count = 0
    for query in range(kept.shape[0]):
        count += kept[query, block]
    return count > 0


def fold_stretch(
    rank, team, counter, work, layer, begin, end, past, spans, cache, own_keys, own_values,
    kept, query_rows, q, queries, keys, values, top, total, acc, out,
):  # fmt: skip
    """Fold tokens begin .. end - 1 (begin a multiple of BLOCK) into every row that sees them.

    work      int64 [1], zero: the next item
    spans     int64 [3]: P, the end of the first tokens in full, the beginning of the ring (the last two if QUANTISED)
    own_*     [G, T, D], rotated as the cache's: float32, or as all that is bfloat16 uint16
    q, out    [T, H, D]: the queries; the result, written with the last stretch
    queries   int32 [G, rows * WORDS], written with the first stretch as f32.py, bf16.py or amx.py wants them
    kept      uint8 [G, query blocks, past blocks]: which blocks wholly in the past are attended to by each
              query block, which has query_rows rows; [0, 0, 0] for all
    keys, values  int32 [G, a stretch * WORDS], to work in
    top, total, acc  float32 [G, rows], [G, rows * LANES] or for AMX [G, rows], [G, rows * D]: the running softmax; at
              first -3e38, 0, 0
    """
    heads, rows = top.shape
    tokens = own_keys.shape[1]
    blocks = (end - begin + BLOCK - 1) // BLOCK
    whole_past = past // BLOCK if kept.shape[0] else 0  # blocks before this one may be left out
    gathered = np.empty((BLOCK, SIZE), dtype=own_keys.dtype)
    laid = WORDS * BLOCK
    if begin == 0:
        lay_queries(rank, team, q, queries)
    for index in range(rank, heads * blocks, team):
        head, block = index // blocks, index % blocks
        at, which = begin + block * BLOCK, layer * heads + head
        if at // BLOCK < whole_past and not anyone_keeps(kept[head], at // BLOCK):
            continue
        place = slice(block * laid, (block + 1) * laid)
        lay_block(
            which, head, at, past, end, spans, cache[0], cache[1], cache[4], cache[6], own_keys, gathered, 0,
            keys[head, place],
        )  # fmt: skip
        lay_block(
            which, head, at, past, end, spans, cache[2], cache[3], cache[5], cache[7], own_values, gathered, 1,
            values[head, place],
        )  # fmt: skip
    meet(counter, team)
    limits = np.empty(TILE_ROWS, dtype=np.int32)
    scale = np.float32(1.4426950408889634 / np.sqrt(SIZE))
    item_rows = ITEM_TILES * TILE_ROWS
    list_rows, list_blocks = (
        np.empty(blocks * ITEM_TILES, dtype=np.int64),
        np.empty(blocks * ITEM_TILES, dtype=np.int64),
    )
    items = (rows + item_rows - 1) // item_rows
    begin_tiles()
    while True:
        item = arrive(work)
        if item >= heads * items:
            break
        # Head by head, whose stretch stays in the second cache; and the last rows, which see most, first, so that no
        # thread is left with a long one at the end.
        head, first_row = item // items, (items - 1 - item % items) * item_rows
        last_row = min(first_row + item_rows, rows)
        count = 0
        for block in range(blocks):
            at = begin + block * BLOCK
            if at // BLOCK < whole_past and not kept[head, first_row // query_rows, at // BLOCK]:
                continue
            for row in range(first_row, last_row, TILE_ROWS):
                sees_first = past + min(row // HEADS, tokens - 1)  # the last key of the tile's first row
                sees_last = past + min((row + TILE_ROWS - 1) // HEADS, tokens - 1)
                if sees_first >= at + BLOCK - 1 and (count == 0 or list_rows[count - 1] != row):
                    list_rows[count], list_blocks[count] = row, block
                    count += 1
                elif sees_first >= at + BLOCK - 1:
                    attend_tile(
                        SIZE, 0, scale, queries[head], row, keys[head], values[head], block,
                        limits, top[head], total[head], acc[head],
                    )  # fmt: skip
                elif sees_last >= at:
                    for r in range(TILE_ROWS):
                        limits[r] = past + min((row + r) // HEADS, tokens - 1) + 1 - at
                    attend_tile(
                        SIZE, 1, scale, queries[head], row, keys[head], values[head], block,
                        limits, top[head], total[head], acc[head],
                    )  # fmt: skip
        attend_tiles(
            SIZE, scale, queries[head], keys[head], values[head], list_rows, list_blocks, count,
            top[head], total[head], acc[head],
        )  # fmt: skip
    end_tiles()
    if end == past + tokens:
        meet(counter, team)
        give_results(rank, team, total, acc, out)


def weigh_blocks(
    rank, team, counter, work, layer, end, past, spans, cache, own_keys, places, q, queries, keys, top, total
):  # fmt: skip
    """How much every block of tokens 0 .. end - 1 weighs for some queries.

    places   int64 [rows]: which new token each row is of;  rows whole tiles
    q        [their tokens, H, D]
    keys     int32 [team, a block * WORDS], to work in
    top, total  float32 [G, rows, blocks]: `weigh_tile`'s, 2 ** -inf where a block is not seen
    The rest as in `fold_stretch`.
    """
    heads, rows = top.shape[:2]
    blocks = (end + BLOCK - 1) // BLOCK
    gathered = np.empty((BLOCK, SIZE), dtype=own_keys.dtype)
    limits = np.empty(TILE_ROWS, dtype=np.int32)
    scale = np.float32(1.4426950408889634 / np.sqrt(SIZE))
    lay_queries(rank, team, q, queries)
    meet(counter, team)
    begin_tiles()
    while True:
        index = arrive(work)
        if index >= heads * blocks:
            break
        head, block = index // blocks, index % blocks
        at = block * BLOCK
        lay_block(
            layer * heads + head, head, at, past, end, spans, cache[0], cache[1], cache[4], cache[6], own_keys,
            gathered, 0, keys[rank],
        )  # fmt: skip
        for row in range(0, rows, TILE_ROWS):
            least = past + places[row]
            for r in range(1, TILE_ROWS):
                least = min(least, past + places[row + r])
            if least >= at + BLOCK - 1:
                weigh_tile(SIZE, 0, scale, queries[head], row, keys[rank], 0, limits, top[head], total[head], block)
            else:
                for r in range(TILE_ROWS):
                    limits[r] = past + places[row + r] + 1 - at
                weigh_tile(SIZE, 1, scale, queries[head], row, keys[rank], 0, limits, top[head], total[head], block)
    end_tiles()


def choose_blocks(rank, team, counter, past, mass, most, samples, top, total, kept, kept_share):
    """Choose, for the rows of each query block, the fewest blocks of the past that hold a share `mass` of the attention
    of the samples, on average, or the heaviest `most` of them beside the first; what is not past is all kept.

    samples  rows of each query block in top and total; the last `HEADS` of them only measure
    kept     uint8 [G, query blocks, past blocks], written;  kept_share  float64 [G, query blocks], written: the share
             of the measuring rows' attention that the choice holds
    """
    heads, queries, past_blocks = kept.shape
    blocks = top.shape[2]
    weight = np.empty(blocks, dtype=np.float32)
    mean = np.empty(past_blocks, dtype=np.float32)
    for index in range(rank, heads * queries, team):
        head, query = index // queries, index % queries
        for block in range(past_blocks):
            mean[block] = np.float32(0)
        own = np.float32(0)
        choosing = samples - HEADS
        for sample in range(choosing):
            row_mass(top[head, query * samples + sample], total[head, query * samples + sample], weight)
            for block in range(past_blocks):
                mean[block] += weight[block]
            for block in range(past_blocks, blocks):
                own += weight[block]
        for block in range(past_blocks):
            mean[block] /= np.float32(choosing)
        need = np.float32(mass) - own / np.float32(choosing) - mean[0]
        # The threshold whose blocks hold what is needed, by halving: no sorting of thousands of blocks. At `low` they
        # do or are too many, at `high` neither.
        low, high = np.float32(0), np.float32(1)
        count_low, count_high = np.int64(past_blocks - 1), np.int64(0)
        for _ in range(24):
            middle = np.float32(0.5) * (low + high)
            held, count = np.float32(0), np.int64(0)
            for block in range(1, past_blocks):
                held += mean[block] if mean[block] >= middle else np.float32(0)
                count += np.int64(mean[block] >= middle)
            if held >= need or count > most:
                low, count_low = middle, count
            else:
                high, count_high = middle, count
        room = most - count_high if count_low > most else count_low  # for those between the two, which weigh alike
        for block in range(past_blocks):
            between = low <= mean[block] < high and room > 0
            kept[head, query, block] = block == 0 or (need > 0 and (mean[block] >= high or between))
            if block > 0 and between:
                room -= 1
        share = np.float64(0)
        for sample in range(choosing, samples):
            row_mass(top[head, query * samples + sample], total[head, query * samples + sample], weight)
            for block in range(blocks):
                share += weight[block] if block >= past_blocks or kept[head, query, block] else np.float32(0)
        kept_share[head, query] = share / HEADS


def row_mass(top, total, weight):
    """Each block's share of one row's attention."""
    highest, whole = top[0], np.float32(0)
    for block in range(1, top.size):
        highest = max(highest, top[block])
    for block in range(top.size):
        weight[block] = total[block] * np.exp2(max(top[block] - highest, np.float32(-126.0)))
        whole += weight[block]
    for block in range(top.size):
        weight[block] /= whole
