"""Kernels in Triton for decoding on a GPU: one new token a row beside a cache of keys and values.

    write_cache       the newest keys and values into their column
    attend_to_cache   softmax(q k' scale) v over the columns that a row has used, and no others

The column stands in a tensor, so that a recorded CUDA graph plays for every token. Softmax and sums are in float32.
The module needs triton: import it by `fusing.cache_kernels`, and only where `fusing.kernels_available`.
Source: Dao et al. 2023, pytorch.org/blog/flash-decoding (attention split over the keys).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a cache that attention reads at a time.
COLUMNS = 64
# Programs that keep a GPU busy, for the choice of how often a row's columns are split.
PROGRAMS = 512
# The matrix units take no fewer rows of queries, and no narrower heads.
FEWEST = 16


@triton.jit
def _write_kernel(
    k, v, keys, values, column, k_b, k_h, v_b, v_h, room, heads, DIM: tl.constexpr, DIM_ROOM: tl.constexpr
):
    row = tl.program_id(0)
    b = row // heads
    h = row % heads
    d = tl.arange(0, DIM_ROOM)
    # The column is loaded on the GPU: given as a number it would be frozen into a recorded graph, and every token
    # would be written into the column of the first.
    at = (row.to(tl.int64) * room + tl.load(column)) * DIM + d
    tl.store(keys + at, tl.load(k + b.to(tl.int64) * k_b + h * k_h + d, mask=d < DIM), mask=d < DIM)
    tl.store(values + at, tl.load(v + b.to(tl.int64) * v_b + h * v_h + d, mask=d < DIM), mask=d < DIM)


def write_cache(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, column: Tensor) -> None:
    """Write k and v [B, heads, 1, dim] into column `column` [1] of keys and values [B, heads, room, dim]."""
    rows, heads, room, dim = keys.shape
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("write_cache takes keys and values whose elements of a head lie side by side")
    _write_kernel[(rows * heads,)](
        k, v, keys, values, column, k.stride(0), k.stride(1), v.stride(0), v.stride(1), room, heads,
        DIM=dim, DIM_ROOM=triton.next_power_of_2(dim),
    )  # fmt: skip


@triton.jit
def _attend_kernel(
    q, keys, values, first, column, out, tops, sums, parts, scale, q_b, q_h, room, heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_ROOM: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One row's keys of one head, or a part of its columns, for the GROUP heads of queries that share them."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = row // heads
    h = row % heads
    # Columns before it are a row's padding: they are skipped, and not only masked.
    start = tl.load(first + b)
    end = tl.load(column) + 1
    # Splits share what is used so far, in whole blocks, so that the last ones may have no column at all.
    share = tl.cdiv(tl.cdiv(end - start, SPLITS), SIZE) * SIZE
    begin = start + split * share
    end = tl.minimum(end, begin + share)

    # Rows are the query heads that share these keys; those beyond GROUP only fill up the matrix units.
    g = tl.arange(0, QUERIES)
    d = tl.arange(0, DIM_ROOM)
    real = (g[:, None] < GROUP) & (d[None, :] < DIM)
    # Loaded once, and used for every block of keys.
    x = tl.load(q + b.to(tl.int64) * q_b + (h * GROUP + g[:, None]) * q_h + d[None, :], mask=real, other=0.0)

    # A split without columns keeps the values from here, and weighs exp(-1e30 - top) = 0 in the join.
    # The softmax so far: the largest score, the sum of exponentials relative to it, and the weighted values.
    top = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum_v = tl.zeros([QUERIES, DIM_ROOM], tl.float32)
    store = row.to(tl.int64) * room * DIM
    # The sums so far are scaled down whenever a larger score comes, so that one pass over the keys is enough. (Milakov
    # and Gimelshein 2018, arXiv:1805.02867)
    for n in range(begin, end, SIZE):
        c = n + tl.arange(0, SIZE)
        seen = (c[:, None] < end) & (d[None, :] < DIM)
        at = store + c[:, None] * DIM + d[None, :]
        k = tl.load(keys + at, mask=seen, other=0.0)
        # By default Triton multiplies float32 as TF32, whose ten bits would show beside PyTorch's attention.
        s = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        # Keys past the end were loaded as zeros, and a score of 0 would take its part of the softmax.
        s = tl.where(c[None, :] < end, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        shrink = tl.exp(top - higher)
        v = tl.load(values + at, mask=seen, other=0.0)
        sum_v = sum_v * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = higher

    # One part alone is the result; several go to the join as they are, not yet divided, in float32.
    head = row * GROUP + g
    if SPLITS == 1:
        at = head.to(tl.int64)[:, None] * DIM + d[None, :]
        tl.store(out + at, (sum_v / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        part = head.to(tl.int64) * SPLITS + split
        tl.store(tops + part, top, mask=g < GROUP)
        tl.store(sums + part, total, mask=g < GROUP)
        tl.store(parts + part[:, None] * DIM + d[None, :], sum_v, mask=real)


@triton.jit
def _join_kernel(tops, sums, parts, out, DIM: tl.constexpr, DIM_ROOM: tl.constexpr, SPLITS: tl.constexpr):
    """One head's parts into one: each weighted by what its exponentials are relative to the largest of all."""
    head = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM_ROOM)
    top = tl.load(tops + head * SPLITS + s)
    # Relative to the largest of all, so that no exponential overflows.
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + head * SPLITS + s), 0)
    at = (head * SPLITS + s[:, None]) * DIM + d[None, :]
    sum_v = tl.sum(weight[:, None] * tl.load(parts + at, mask=d[None, :] < DIM, other=0.0), 0)
    tl.store(out + head * DIM + d, (sum_v / total).to(out.dtype.element_ty), mask=d < DIM)


def splits_for(rows: int, room: int) -> int:
    """How often the columns of `rows` rows and heads are split, a power of two: a few rows would leave a GPU idle."""
    splits = 1
    # By the room, not by the tokens so far: a recorded graph plays every token with one and the same grid.
    while rows * splits < PROGRAMS and splits * 2 * COLUMNS <= room:
        splits *= 2
    return splits


def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, column: Tensor, scale: float) -> Tensor:
    """[B, 1, heads, dim]: attention of the newest token of each row, of the queries q [B, heads, 1, dim].

    Args:
        keys, values: [B, heads or fewer, room, dim], contiguous. first: [B] int32, the first column that a row uses.
        column: [1] int32, the last one, alike for all rows.
    """
    rows, kv_heads, room, dim = keys.shape
    heads = q.shape[1]
    if q.stride(3) != 1:
        q = q.contiguous()
    splits = splits_for(rows * kv_heads, room)
    out = q.new_empty(rows, 1, heads, dim)
    # Of one part nothing is kept.
    tops, sums = torch.empty(2, rows * heads * splits if splits > 1 else 1, device=q.device)
    parts = torch.empty(rows * heads * splits * dim if splits > 1 else 1, device=q.device)

    # Query heads that share keys are the rows of one matrix product, and read these keys once. (Ainslie et al. 2023,
    # arXiv:2305.13245)
    group = heads // kv_heads
    sizes = {"DIM": dim, "DIM_ROOM": max(FEWEST, triton.next_power_of_2(dim)), "SPLITS": splits}
    _attend_kernel[(rows * kv_heads, splits)](
        q, keys, values, first, column, out, tops, sums, parts, scale, q.stride(0), q.stride(1), room, kv_heads,
        GROUP=group, QUERIES=max(FEWEST, triton.next_power_of_2(group)), SIZE=COLUMNS, **sizes,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(rows * heads,)](tops, sums, parts, out, **sizes)
    return out
