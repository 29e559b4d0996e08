# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated"
"""Attention of training on AMX tiles: documents laid end to end, forward and backward.

Shapes: G key/value heads, h query heads of each, H = G h, D head size, T tokens of all documents. A row is one query
head of one token; rows of a key/value head stand by token, each document's padded to whole GROUPs, R in all. Blocks are
BLOCK keys of one document, B in all. Numbers in bfloat16 are uint16.

    rows       int64 [R]: token * h + head of the row, -1 for padding
    seen       int64 [R]: how many keys of its document the row sees; padding sees what the last row does
    blocks     int64 [B, 2]: first token, tokens
    documents  int64 [n, 4]: first row, rows, first block, blocks

Every sum is added up in an order that depends on the lengths and the number of threads alone, so the same call gives
the same bits.
"""

import numpy as np

from .amx import ITEM_TILES, TILE_ROWS, attend_tile, attend_tiles, begin_tiles, end_tiles
from .amx_training import GROUP, backward_unit
from .bf16 import BLOCK
from .cpu_prefill import clear_row, copy_row, copy_rows, pair_values, take_columns, turn_queries, turn_values
from .simd import arrive, bf16_to_float, float_to_bf16
from .team import meet
from .vectors import transpose_words

SIZE, HEADS, WORDS = 64, 1, 32  # bound by specialise: D, h, words of four bytes in a row


def gather_rows(source, head, rows, first, out):
    """Rows `first` .. of one key/value head of source [T, H, D] to out [n, D]; padding is zero."""
    flat, heads = source.reshape(-1, SIZE), source.shape[1] // HEADS
    for i in range(out.shape[0]):
        row = rows[first + i]
        if row < 0:
            clear_row(out[i])
        else:
            copy_row(flat[(row // HEADS * heads + head) * HEADS + row % HEADS], out[i])


def gather_keys(source, head, block, out):
    """A block of one head of source [T, G, D] to out [BLOCK, D]; zeros after the document's end."""
    for i in range(BLOCK):
        if i < block[1]:
            copy_row(source[block[0] + i, head], out[i])
        else:
            clear_row(out[i])


def lay_rows(gathered, first, out):
    """GROUP rows to tiles of 16 of int32 [D / 2, 16]."""
    for at in range(0, GROUP, TILE_ROWS):
        begin = (first + at) * WORDS
        turn_queries(gathered[at : at + TILE_ROWS], out[begin : begin + TILE_ROWS * WORDS])


def attend_documents(
    rank, team, counter, work, rows, seen, blocks, documents, items, down, q, k, v, queries, keys, values, out, log_sums
):
    """Every row over the keys that it sees.

    work      int64 [1], zero: the next item
    items     int64 [m, 3]: document, first row, rows (ITEM_TILES tiles at most), the dearest first
    down      what scores are multiplied by, 1 / sqrt(head size)
    q, out    [T, H, D];  k, v [T, G, D]
    queries   int32 [G, R * WORDS];  keys, values int32 [G, B * BLOCK * WORDS]: to work in
    log_sums  float32 [G, R], written: log2 of the sum of e ** score
    """
    heads, laid = queries.shape[0], BLOCK * WORDS
    groups = rows.size // GROUP
    gathered = np.empty((GROUP, SIZE), dtype=q.dtype)
    for index in range(rank, heads * groups, team):
        head, first = index // groups, index % groups * GROUP
        gather_rows(q, head, rows, first, gathered)
        lay_rows(gathered, first, queries[head])
    block_rows = np.empty((BLOCK, SIZE), dtype=q.dtype)
    for index in range(rank, heads * len(blocks), team):
        head, block = index // len(blocks), index % len(blocks)
        gather_keys(k, head, blocks[block], block_rows)
        copy_rows(block_rows, keys[head, block * laid : (block + 1) * laid])
        gather_keys(v, head, blocks[block], block_rows)
        turn_values(block_rows, values[head, block * laid : (block + 1) * laid])
    meet(counter, team)
    scale = np.float32(1.4426950408889634) * down
    most = ITEM_TILES * TILE_ROWS
    top, total = np.empty(most, dtype=np.float32), np.empty(most, dtype=np.float32)
    acc, tile = np.empty(most * SIZE, dtype=np.float32), np.empty(TILE_ROWS * SIZE, dtype=np.float32)
    weights, limits = np.empty(TILE_ROWS, dtype=np.float32), np.empty(TILE_ROWS, dtype=np.int32)
    longest = np.int64(0)
    for document in range(len(documents)):
        longest = max(longest, documents[document, 3])
    list_rows, list_blocks = np.empty(longest * ITEM_TILES, np.int64), np.empty(longest * ITEM_TILES, np.int64)
    flat = out.reshape(-1, SIZE)
    begin_tiles()
    while True:
        index = arrive(work)
        if index >= heads * len(items):
            break
        head, item = index % heads, items[index // heads]
        first, count = item[1], item[2]
        first_block, whole = documents[item[0], 2], documents[item[0], 3]
        own = queries[head, first * WORDS : (first + count) * WORDS]
        here = slice(first_block * laid, (first_block + whole) * laid)
        for i in range(count):
            top[i], total[i] = np.float32(-3e38), np.float32(0)
        for i in range(count * SIZE):
            acc[i] = np.float32(0)
        listed = 0
        for block in range(whole):
            at = block * BLOCK
            for row in range(0, count, TILE_ROWS):
                least, greatest = seen[first + row], seen[first + row + TILE_ROWS - 1]
                if least >= at + BLOCK and (listed == 0 or list_rows[listed - 1] != row):
                    list_rows[listed], list_blocks[listed] = row, block
                    listed += 1
                elif greatest > at:
                    for r in range(TILE_ROWS):
                        limits[r] = seen[first + row + r] - at
                    attend_tile(
                        SIZE, 1, scale, own, row, keys[head, here], values[head, here], block, limits, top, total, acc
                    )
        attend_tiles(
            SIZE, scale, own, keys[head, here], values[head, here], list_rows, list_blocks, listed, top, total, acc
        )
        for row in range(0, count, TILE_ROWS):
            take_columns(total, acc, row, weights, tile)
            for r in range(TILE_ROWS):
                log_sums[head, first + row + r] = top[row + r] + np.log2(weights[r])
                place = rows[first + row + r]
                if place >= 0:
                    target = flat[(place // HEADS * heads + head) * HEADS + place % HEADS]
                    share = np.float32(1) / weights[r]
                    for i in range(SIZE):
                        target[i] = float_to_bf16(tile[r * SIZE + i] * share)
    end_tiles()


def attend_backward(
    rank, team, counter, rows, seen, blocks, documents, items, slots, down, q, k, v, out, slope, log_sums,
    queries, slopes, query_pairs, slope_pairs, keys, values, turned, means, sums, dq, dk, dv,
):  # fmt: skip
    """The slopes of q, k and v from `slope`, that of out.

    items     int64 [m, 4]: head, document, block of it, and in which of sums its rows are added up
    slots     int64 [n, 2]: of each of sums its head and its thread
    queries, slopes, query_pairs, slope_pairs  int32 [G, R * WORDS];  keys, values, turned int32 [G, B * BLOCK * WORDS];
    means     float32 [G, R];  sums float32 [n, R * D]: to work in
    dq, dk, dv  as q, k and v, written
    """
    heads, laid = queries.shape[0], BLOCK * WORDS
    groups = rows.size // GROUP
    gathered, other = np.empty((GROUP, SIZE), dtype=q.dtype), np.empty((GROUP, SIZE), dtype=q.dtype)
    for index in range(rank, heads * groups, team):
        head, first = index // groups, index % groups * GROUP
        here = slice(first * WORDS, (first + GROUP) * WORDS)
        gather_rows(out, head, rows, first, gathered)
        gather_rows(slope, head, rows, first, other)
        for r in range(GROUP):
            mean = np.float32(0)
            for i in range(SIZE):
                mean += bf16_to_float(gathered[r, i]) * bf16_to_float(other[r, i])
            means[head, first + r] = mean
        lay_rows(other, first, slopes[head])
        pair_values(other, slope_pairs[head, here])
        gather_rows(q, head, rows, first, gathered)
        lay_rows(gathered, first, queries[head])
        pair_values(gathered, query_pairs[head, here])
    block_rows = np.empty((BLOCK, SIZE), dtype=q.dtype)
    for index in range(rank, heads * len(blocks), team):
        head, block = index // len(blocks), index % len(blocks)
        here = slice(block * laid, (block + 1) * laid)
        gather_keys(v, head, blocks[block], block_rows)
        copy_rows(block_rows, values[head, here])
        gather_keys(k, head, blocks[block], block_rows)
        copy_rows(block_rows, keys[head, here])
        turn_values(block_rows, turned[head, here])
    for slot in range(len(slots)):
        if slots[slot, 1] == rank:
            for i in range(sums.shape[1]):
                sums[slot, i] = np.float32(0)
    meet(counter, team)
    scale = np.float32(1.4426950408889634) * down
    key_sums, value_sums = np.empty(BLOCK * SIZE, dtype=np.float32), np.empty(BLOCK * SIZE, dtype=np.float32)
    limits = np.empty(GROUP, dtype=np.int32)
    begin_tiles()
    for index in range(len(items)):
        head, slot = items[index, 0], items[index, 3]
        if slots[slot, 1] == rank:
            document = documents[items[index, 1]]
            block, at = document[2] + items[index, 2], items[index, 2] * BLOCK
            for i in range(BLOCK * SIZE):
                key_sums[i] = value_sums[i] = np.float32(0)
            # The first row that sees the block is its first token's own; the group that it is in begins before it.
            for row in range(document[0] + at * HEADS // GROUP * GROUP, document[0] + document[1], GROUP):
                if seen[row] >= at + BLOCK:
                    backward_unit(
                        SIZE, 0, scale, queries[head], slopes[head], query_pairs[head], slope_pairs[head], row,
                        keys[head], values[head], turned[head], block, limits, log_sums[head], means[head],
                        sums[slot], key_sums, value_sums,
                    )  # fmt: skip
                else:
                    for r in range(GROUP):
                        limits[r] = seen[row + r] - at
                    backward_unit(
                        SIZE, 1, scale, queries[head], slopes[head], query_pairs[head], slope_pairs[head], row,
                        keys[head], values[head], turned[head], block, limits, log_sums[head], means[head],
                        sums[slot], key_sums, value_sums,
                    )  # fmt: skip
            for r in range(blocks[block, 1]):
                key, value = dk[blocks[block, 0] + r, head], dv[blocks[block, 0] + r, head]
                for i in range(SIZE):
                    key[i] = float_to_bf16(key_sums[r * SIZE + i] * down)
                    value[i] = float_to_bf16(value_sums[r * SIZE + i])
    end_tiles()
    meet(counter, team)
    flat = dq.reshape(-1, SIZE)
    tile, held = np.empty(16 * SIZE, dtype=np.float32), np.empty(16 * SIZE, dtype=np.float32)
    for index in range(rank, heads * groups * (GROUP // 16), team):
        head, first = index // (groups * (GROUP // 16)), index % (groups * (GROUP // 16)) * 16
        for i in range(16 * SIZE):
            held[i] = np.float32(0)
        for slot in range(len(slots)):
            if slots[slot, 0] == head:
                for i in range(16 * SIZE):
                    held[i] += sums[slot, first * SIZE + i]
        for i in range(0, SIZE, 16):
            transpose_words(held.reshape(-1, 16), i, 0, tile, i, SIZE)
        for r in range(16):
            place = rows[first + r]
            if place >= 0:
                target = flat[(place // HEADS * heads + head) * HEADS + place % HEADS]
                for i in range(SIZE):
                    target[i] = float_to_bf16(tile[r * SIZE + i] * down)
