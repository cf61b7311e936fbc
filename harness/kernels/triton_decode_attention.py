# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernels for a few queries on many keys: partial softmaxes over parts of the keys, and their sum.

A program has the queries of one head of keys and a part of its keys. One query is multiplied element by
element, and every row of a block of keys keeps a softmax of its own, so that threads meet only at the end;
several queries go through tensor cores. Where there is one part, it is the result; else a second kernel adds
the parts up, in their order: the same input gives the same bits.

Flash-decoding: Dao, Haziza, Massa and Sizov (2023); the running softmax: Milakov and Gimelshein (2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["decode_attention", "parts_of"]

_PROGRAMS = 576  # a good four for each of an H100's processors, where there are keys enough
_FEWEST_KEYS = 32  # that are worth a program
_MOST_PARTS = 128  # that a program can add up
_ONE_QUERY_BLOCK, _BLOCK = 32, 64  # keys of a step
_WARPS = 2
_LOG2_E = 1.4426950408889634


@triton.jit
def _scores_masked(scores, mask_ptrs, inside, MASK: tl.constexpr):
    """Scores with base 2, minus infinity where a key may not be seen or is not there."""
    if MASK == 1:
        seen = tl.load(mask_ptrs, mask=inside, other=0)
        return tl.where(seen != 0, scores, float("-inf"))
    if MASK == 2:
        added = tl.load(mask_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
        # The least number of a type means "not seen" too, and must stay above minus infinity.
        lifted = tl.maximum(added, -2e38) * 1.4426950408889634
        return tl.where(added == float("-inf"), added, scores + lifted)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _finite(largest):
    """What is taken off before the exponential: nothing where no key has been seen."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, largest_ptr, sum_ptr, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_key,
    heads, keys, part,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Grid [batch * heads, parts]; `part` keys each. `scale` has base 2.

    MASK: 0 none, 1 bool, 2 added. With one part `out` is the result; else float32 sums
    [batch * heads, parts, queries, values], and for each `largest` and `sum`.
    """
    pair = tl.program_id(0)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, keys)
    columns = tl.arange(0, BLOCK_WIDTH)
    value_columns = tl.arange(0, BLOCK_VALUES)
    in_width, in_values = columns < WIDTH, value_columns < VALUES
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    mask_ptr += batch * mask_batch + head * mask_head
    at = (pair * PARTS + tl.program_id(1)).to(tl.int64) * QUERIES
    steps = tl.arange(0, BLOCK)
    if ROWS == 1:
        q = tl.load(q_ptr + columns, mask=in_width, other=0.0).to(tl.float32) * scale
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_VALUES), tl.float32)
        for start in range(first, end, BLOCK):
            row = start + steps
            inside = row < end
            rows = row.to(tl.int64)[:, None]
            k = tl.load(k_ptr + rows * k_row + columns, mask=inside[:, None] & in_width, other=0.0)
            v = tl.load(v_ptr + rows * v_row + value_columns, mask=inside[:, None] & in_values, other=0.0)
            scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
            scores = _scores_masked(scores, mask_ptr + row * mask_key, inside, MASK)
            new = tl.maximum(largest, scores)
            kept = tl.exp2(largest - _finite(new))
            weight = tl.exp2(scores - _finite(new))
            total = total * kept + weight
            acc = acc * kept[:, None] + v.to(tl.float32) * weight[:, None]
            largest = new
        top = tl.max(largest, 0)
        kept = tl.exp2(largest - _finite(top))
        whole = tl.sum(total * kept, 0)
        y = tl.sum(acc * kept[:, None], 0)
        if PARTS == 1:
            y = y / tl.where(whole == 0.0, 1.0, whole)
        else:
            tl.store(largest_ptr + at, top)
            tl.store(sum_ptr + at, whole)
        tl.store(out_ptr + at * VALUES + value_columns, y.to(out_ptr.dtype.element_ty), mask=in_values)
    else:
        query = tl.arange(0, ROWS)
        in_queries = query < QUERIES
        q = tl.load(q_ptr + query[:, None] * q_row + columns, mask=in_queries[:, None] & in_width, other=0.0)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_VALUES), tl.float32)
        for start in range(first, end, BLOCK):
            row = start + steps
            inside = row < end
            rows = row.to(tl.int64)
            k = tl.load(
                k_ptr + rows[None, :] * k_row + columns[:, None],
                mask=inside[None, :] & in_width[:, None], other=0.0,
            )  # fmt: skip
            v = tl.load(
                v_ptr + rows[:, None] * v_row + value_columns, mask=inside[:, None] & in_values, other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee") * scale
            both = in_queries[:, None] & inside[None, :]
            places = mask_ptr + query[:, None] * mask_row + row[None, :] * mask_key
            scores = _scores_masked(scores, places, both, MASK)
            new = tl.maximum(largest, tl.max(scores, 1))
            kept = tl.exp2(largest - _finite(new))
            weight = tl.exp2(scores - _finite(new)[:, None])
            total = total * kept + tl.sum(weight, 1)
            acc = acc * kept[:, None]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            largest = new
        if PARTS == 1:
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        else:
            tl.store(largest_ptr + at + query, largest, mask=in_queries)
            tl.store(sum_ptr + at + query, total, mask=in_queries)
        places = out_ptr + (at + query)[:, None] * VALUES + value_columns
        tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=in_queries[:, None] & in_values)


@triton.jit
def _decode_attention_sum_kernel(
    part_ptr, largest_ptr, sum_ptr, out_ptr,
    QUERIES: tl.constexpr, VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Grid [batch * heads * queries]: the parts of a query, weighed by their sums."""
    pid = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    columns = tl.arange(0, BLOCK_VALUES)
    inside = part < PARTS
    at = (pid // QUERIES * PARTS + part) * QUERIES + pid % QUERIES
    largest = tl.load(largest_ptr + at, mask=inside, other=float("-inf"))
    kept = tl.exp2(largest - _finite(tl.max(largest, 0)))
    whole = tl.sum(tl.load(sum_ptr + at, mask=inside, other=0.0) * kept, 0)
    mask = inside[:, None] & (columns < VALUES)
    parts = tl.load(part_ptr + at[:, None] * VALUES + columns, mask=mask, other=0.0)
    y = tl.sum(parts * kept[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out_ptr + pid * VALUES + columns, y.to(out_ptr.dtype.element_ty), mask=columns < VALUES)


def parts_of(pairs: int, keys: int, block: int) -> tuple[int, int]:
    """How many parts the keys of each of `pairs` heads are cut into, and the keys of one."""
    wanted = min(-(-keys // _FEWEST_KEYS), max(1, _PROGRAMS // pairs), _MOST_PARTS)
    part = -(-keys // wanted)
    part = -(-part // block) * block
    return -(-keys // part), part


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """``softmax(scale * query @ key.T + mask) @ value``.

    Args:
        query: [batch, heads, queries, width], at most 64 queries; its type is that of key and value.
        key: [batch, heads, keys, width].
        value: [batch, heads, keys, value width].
        mask: bool or of the query's type, broadcast to [batch, heads, queries, keys].

    Returns:
        [batch, heads, queries, value width], contiguous.
    """
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    batch, heads, queries, width = query.shape
    keys, values = value.shape[2:]
    rows = 1 if queries == 1 else max(16, triton.next_power_of_2(queries))
    block = _ONE_QUERY_BLOCK if queries == 1 else _BLOCK
    parts, part = parts_of(batch * heads, keys, block)
    out = query.new_empty(batch, heads, queries, values)
    sums, largest, total = out, out, out
    if parts > 1:
        sums = query.new_empty(batch * heads, parts, queries, values, dtype=torch.float32)
        largest, total = query.new_empty(2, batch * heads, parts, queries, dtype=torch.float32).unbind()
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    seen = query if mask is None else mask.expand(batch, heads, queries, keys)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen.view(torch.uint8)
    block_width = max(16, triton.next_power_of_2(width))
    block_values = max(16, triton.next_power_of_2(values))
    with torch.cuda.device_of(query):
        _decode_attention_kernel[(batch * heads, parts)](
            query, key, value, seen, sums, largest, total, scale * _LOG2_E,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *seen.stride(),
            heads, keys, part,
            QUERIES=queries, ROWS=rows, WIDTH=width, BLOCK_WIDTH=block_width, VALUES=values,
            BLOCK_VALUES=block_values, BLOCK=block, MASK=kind, PARTS=parts, num_warps=_WARPS,
        )  # fmt: skip
        if parts > 1:
            _decode_attention_sum_kernel[(batch * heads * queries,)](
                sums, largest, total, out,
                QUERIES=queries, VALUES=values, BLOCK_VALUES=block_values, PARTS=parts,
                BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=4 if parts * block_values <= 4096 else 8,
            )  # fmt: skip
    return out
