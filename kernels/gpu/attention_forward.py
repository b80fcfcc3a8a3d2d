"""FlashMask forward in Triton, and what its kernels share: loads, classes of tiles, the element mask.

A program owns a tile of query rows of one head and walks over key blocks with an online softmax. It first
asks the statistics of the mask which blocks it can see, many blocks at a time, and then runs over each
unbroken run of them: loops without a branch around their loads are pipelined, loops that test each block are
not. Inside a run only tiles that are partly masked load bounds and compare.

Memory: `bounds` [B, Hm, P, blocks * BC] holds the P in use of (lts, lte, uts, ute), columns past the end
masked in every row; `stats` [B, Hm, P, 2, blocks] their least and most in each key block.
Source: FlashMask, arXiv 2410.01359.
"""

import triton
import triton.language as tl

SCAN = tl.constexpr(128)  # key blocks that one step of the search for visible ones looks at


@triton.jit
def load_rows(source, first, limit, stride, HEAD: tl.constexpr, PAD: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [first, first + N) of one head -> [N, PAD], zeros outside of limit and of HEAD."""
    n, d = tl.arange(0, N), tl.arange(0, PAD)
    # the first row's place may be past 2^31 elements, places inside a tile are not
    places = source + tl.cast(first, tl.int64) * stride + n[:, None] * stride + d[None, :]
    inside = (first + n < limit)[:, None]
    if HEAD != PAD:
        inside = inside & (d < HEAD)[None, :]
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def store_rows(target, tile, first, limit, stride, HEAD: tl.constexpr, PAD: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a tile [N, PAD] to rows [first, first + N) of one head."""
    n, d = tl.arange(0, N), tl.arange(0, PAD)
    places = target + tl.cast(first, tl.int64) * stride + n[:, None] * stride + d[None, :]
    inside = (first + n < limit)[:, None] & (d < HEAD)[None, :]
    tl.store(places, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def next_run(  # type: ignore[no-untyped-def]
    stats, n, end, blocks, first, last, shift,
    CAUSAL: tl.constexpr, HAS_LTE: tl.constexpr, HAS_UT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The next run of key blocks from n on that rows [first, last) may see: [start, stop).

    Those in [clear, edge) are seen whole, the others in part or maybe whole. start = stop says that none was
    among those looked at; the search goes on from stop either way.
    """
    block = n + tl.arange(0, SCAN)
    limit = tl.minimum(n + SCAN, end)
    inside = block < limit
    hidden = first >= tl.load(stats + blocks + block, mask=inside, other=0)  # lts, its maximum
    partial = last > tl.load(stats + block, mask=inside, other=0)  # lts, its minimum
    if HAS_LTE:
        hidden = hidden & (last <= tl.load(stats + 2 * blocks + block, mask=inside, other=0))
        partial = partial & (first < tl.load(stats + 3 * blocks + block, mask=inside, other=0))
    if HAS_UT:
        upper = stats + (2 + 2 * HAS_LTE) * blocks + block
        after = first >= tl.load(upper + blocks, mask=inside, other=0)
        hidden = hidden | (after & (last <= tl.load(upper + 2 * blocks, mask=inside, other=0)))
        touched = last > tl.load(upper, mask=inside, other=0)
        partial = partial | (touched & (first < tl.load(upper + 3 * blocks, mask=inside, other=0)))
    if CAUSAL:
        partial = partial | ((block + 1) * BC - 1 > first + shift)
    start = tl.min(tl.where(hidden, limit, tl.minimum(block, limit)))
    stop = tl.min(tl.where(hidden & (block > start), tl.minimum(block, limit), limit))
    clear = tl.min(tl.where(partial | (block < start), stop, tl.minimum(block, stop)))
    edge = tl.min(tl.where(partial & (block > clear), tl.minimum(block, stop), stop))
    stop = tl.min(tl.where(partial | (block < edge), stop, tl.minimum(block, stop)))
    return start, clear, edge, stop


@triton.jit
def load_interval(bounds, n, width, ENDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One interval of columns n as (first row, number of rows); ends lie `width` elements after starts."""
    first = tl.load(bounds + n)
    count = tl.full(first.shape, 2147483647, tl.int32)
    if ENDS:
        count = tl.maximum(tl.load(bounds + width + n) - first, 0)
    return first, count


@triton.jit
def hide(s, i, first, count):  # type: ignore[no-untyped-def]
    """Scores s with -inf for rows i in an interval; rows before it wrap to large numbers: one test."""
    return tl.where((i - first).to(tl.uint32) < count.to(tl.uint32), float("-inf"), s)


@triton.jit
def hide_columns(  # type: ignore[no-untyped-def]
    s, i, first, bounds, width, shift, CAUSAL: tl.constexpr, HAS_LTE: tl.constexpr, HAS_UT: tl.constexpr
):  # fmt: skip
    """The definition of the mask, for scores s of rows i and columns from `first` on; loads their bounds."""
    # a scalar place and a constant pattern: the addresses of a thread are one register and immediate offsets
    n = tl.arange(0, s.shape[1])[None, :]
    low, rows = load_interval(bounds + first, n, width, HAS_LTE)
    s = hide(s, i[:, None], low, rows)
    if HAS_UT:
        high, rows = load_interval(bounds + (1 + HAS_LTE) * width + first, n, width, True)
        s = hide(s, i[:, None], high, rows)
    if CAUSAL:
        s = tl.where(i[:, None] + (shift - first) < n, float("-inf"), s)
    return s


@triton.jit
def end_of_keys(last, columns, shift, CAUSAL: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Key blocks [0, end) hold every column that rows before `last` may see by causality."""
    if CAUSAL:
        columns = tl.minimum(columns, tl.maximum(last + shift, 0))
    return tl.cdiv(columns, BC)


@triton.jit
def attention_forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, bounds, stats,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    rows, columns, kv_heads, mask_heads, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LTE: tl.constexpr, HAS_UT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, Hq, B): out [B, Nq, Hq, Dv] and lse [B, Hq, Nq] of one tile of rows."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    if CAUSAL:  # the last rows see most: they start first, so that no long program is left at the end
        block = tl.num_programs(0) - 1 - block
    first, shift = block * BR, columns - rows
    last = tl.minimum(first + BR, rows)
    kv_head = head // (heads // kv_heads)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    blocks = tl.cdiv(columns, BC)
    mask_head = (batch * mask_heads + head // (heads // mask_heads)) * (1 + HAS_LTE + 2 * HAS_UT)
    bounds += mask_head * blocks * BC
    stats += mask_head * 2 * blocks

    log2_scale = scale * 1.4426950408889634  # powers of two are what the hardware raises
    i = first + tl.arange(0, BR)
    q_tile = load_rows(q, first, rows, q_row, HEAD, PAD, BR)
    top = tl.full([BR], float("-inf"), tl.float32)  # running maximum, in powers of two
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, PAD_V], tl.float32)
    n, end = 0, end_of_keys(last, columns, shift, CAUSAL, BC)
    while n < end:
        start, clear, edge, stop = next_run(
            stats, n, end, blocks, first, last, shift, CAUSAL, HAS_LTE, HAS_UT, BC
        )
        for here in tl.range(start, stop):
            k_tile = load_rows(k, here * BC, columns, k_row, HEAD, PAD, BC)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if (here < clear) | (here >= edge):
                s = hide_columns(s, i, here * BC, bounds, blocks * BC, shift, CAUSAL, HAS_LTE, HAS_UT)
            new_top = tl.maximum(top, tl.max(s, 1) * log2_scale)
            # a row may have seen nothing yet: -inf less -inf would be NaN, -inf less 0 is a weight of 0
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s * log2_scale - base[:, None])
            keep = tl.exp2(top - base)
            total = total * keep + tl.sum(p, 1)
            v_tile = load_rows(v, here * BC, columns, v_row, HEAD_V, PAD_V, BC)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision="ieee")
            top = new_top
        n = stop

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    out += batch * rows * heads * HEAD_V + head * HEAD_V
    store_rows(out, acc, first, rows, heads * HEAD_V, HEAD_V, PAD_V, BR)
    sums = tl.where(
        nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    )
    tl.store(lse + (batch * heads + head) * rows + i, sums, mask=i < rows)
