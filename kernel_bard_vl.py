"""Attention of slots on a CUDA device, in Triton: no mask, no padding, nothing that the host waits for.

A program holds queries of one slot and all heads that share a key head, and runs over the keys that the slot sees
(flash attention, arXiv 2205.14135; split over keys as in flash decoding). Rows and lengths are read on the device, so
that one launch serves every step, and a CUDA graph can hold it.
"""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch; attention_bard_vl.py then has another way
    triton = None

QUERIES = 64  # of a program, heads of a group included: more of them spill registers
KEYS = 64  # read at a time
PROGRAMS = 264  # two for each multiprocessor of an H100: with fewer, keys are split
MOST_SPLITS = 32

if triton is not None:

    @triton.jit
    def _attend(
        q, k, v, row, begin, count, length, out, partial, weight, scale, q_t, q_h, k_r, k_h, k_c, v_r, v_h, v_c,
        o_t, o_h, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr,
        M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        head, split = tl.program_id(1), tl.program_id(2)
        seen = tl.load(length + slot)
        source = tl.load(row + slot).to(tl.int64)
        first = tl.load(begin + slot).to(tl.int64)
        num_queries = tl.load(count + slot) * GROUP
        share = tl.cdiv(tl.cdiv(seen, N), SPLITS) * N
        start = split * share
        end = tl.minimum(start + share, seen)

        m = tile * M + tl.arange(0, M)
        d = tl.arange(0, PADDED)
        wanted = (m < num_queries)[:, None] & (d < SIZE)[None, :]
        token, own_head = first + m // GROUP, head * GROUP + m % GROUP
        queries = tl.load(q + token[:, None] * q_t + own_head[:, None] * q_h + d[None, :], mask=wanted, other=0.0)
        highest = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        found = tl.zeros([M, PADDED], tl.float32)
        keys, values = k + source * k_r + head * k_h, v + source * v_r + head * v_h
        for place in range(start, end, N):
            n = place + tl.arange(0, N)
            inside = n < end
            cell = inside[:, None] & (d < SIZE)[None, :]
            block = tl.load(keys + n[:, None] * k_c + d[None, :], mask=cell, other=0.0)
            scores = tl.dot(queries, tl.trans(block), input_precision="ieee") * (scale * 1.4426950408889634)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            top = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.math.exp2(scores - top[:, None])
            shrink = tl.math.exp2(highest - top)
            total = total * shrink + tl.sum(weights, 1)
            block = tl.load(values + n[:, None] * v_c + d[None, :], mask=cell, other=0.0)
            found = found * shrink[:, None] + tl.dot(weights.to(block.dtype), block, input_precision="ieee")
            highest = top
        if SPLITS == 1:
            answer = found / total[:, None]
            place = out + token[:, None] * o_t + own_head[:, None] * o_h + d[None, :]
            tl.store(place, answer.to(out.dtype.element_ty), mask=wanted)
        else:
            part = ((slot * TILES + tile) * tl.num_programs(1) + head) * SPLITS + split
            line = part.to(tl.int64) * M + tl.arange(0, M)
            tl.store(partial + line[:, None] * PADDED + d[None, :], found)
            tl.store(weight + line * 2, highest)
            tl.store(weight + line * 2 + 1, total)

    @triton.jit
    def _merge(
        partial, weight, begin, count, out, o_t, o_h,
        GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr,
        PART: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        head, inner = tl.program_id(1), tl.program_id(2) * PART + tl.arange(0, PART)
        d = tl.arange(0, PADDED)
        base = ((slot * TILES + tile) * tl.num_programs(1) + head).to(tl.int64) * SPLITS
        highest = tl.full([PART], float("-inf"), tl.float32)
        total = tl.zeros([PART], tl.float32)
        found = tl.zeros([PART, PADDED], tl.float32)
        for split in range(SPLITS):
            line = (base + split) * M + inner
            top, mass = tl.load(weight + line * 2), tl.load(weight + line * 2 + 1)
            new = tl.maximum(highest, top)
            # The first split always has a key, so that `new` is finite; one without keys has weight zero.
            old, own = tl.math.exp2(highest - new), tl.math.exp2(top - new)
            found = found * old[:, None] + tl.load(partial + line[:, None] * PADDED + d[None, :]) * own[:, None]
            total = total * old + mass * own
            highest = new
        m = tile * M + inner
        wanted = (m < tl.load(count + slot) * GROUP)[:, None] & (d < SIZE)[None, :]
        token, own_head = tl.load(begin + slot).to(tl.int64) + m // GROUP, head * GROUP + m % GROUP
        place = out + token[:, None] * o_t + own_head[:, None] * o_h + d[None, :]
        tl.store(place, (found / total[:, None]).to(out.dtype.element_ty), mask=wanted)


def attend_slots(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: Any, scale: float | None = None
) -> torch.Tensor:
    """Attention of every slot's queries over the first `length` keys of its row.

    Args:
        query: (tokens, heads, head size), slot after slot.
        key, value: (rows, key heads, columns, head size), in any strides but the last.
        slots: row, begin, count and length (slots,) in int32, and the `width` of the widest; see attention_bard_vl.
        scale: of the products, 1 / sqrt(head size) by default.

    Returns:
        (tokens, heads, head size).
    """
    num_slots, (_, heads, size), key_heads = len(slots.row), query.shape, key.shape[1]
    group, out = heads // key_heads, torch.empty_like(query)
    queries, padded = slots.width * group, max(16, triton.next_power_of_2(size))
    m = min(max(16, triton.next_power_of_2(queries)), QUERIES)
    tiles = triton.cdiv(queries, m)
    programs = num_slots * tiles * key_heads
    splits = min(triton.next_power_of_2(max(PROGRAMS // programs, 1)), MOST_SPLITS)
    shape = {"GROUP": group, "SIZE": size, "PADDED": padded, "TILES": tiles, "M": m, "SPLITS": splits}
    partial = weight = out
    if splits > 1:
        partial = query.new_empty(programs * splits * m * padded, dtype=torch.float32)
        weight = query.new_empty(programs * splits * m * 2, dtype=torch.float32)
    _attend[(num_slots * tiles, key_heads, splits)](
        query, key, value, slots.row, slots.begin, slots.count, slots.length, out, partial, weight,
        size**-0.5 if scale is None else scale, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        *out.stride()[:2], **shape, N=KEYS, num_warps=4, num_stages=3 if query.element_size() == 2 else 1,
    )  # fmt: skip
    if splits > 1:
        _merge[(num_slots * tiles, key_heads, m // 16)](
            partial, weight, slots.begin, slots.count, out, *out.stride()[:2], **shape, PART=16, num_warps=4
        )
    return out
