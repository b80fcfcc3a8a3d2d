"""FlashMask backward in Triton: dk and dv by key block, dq by row tile, no atomics.

The kernel for dk and dv is why bounds are kept by column: a program owns a key block, reads its bounds once
for a query head and walks over rows. The rows it can skip are known in closed form from four numbers, so
its loops are unbroken too. A second kernel sums dq by rows: adding into dq from many programs would sum in
the order they happen to run. Both recompute the weights from lse; both give the same bits each time.
"""

import triton
import triton.language as tl

from .attention_forward import end_of_keys, hide, hide_columns, load_interval, load_rows, next_run, store_rows


@triton.jit
def attention_delta(out, grad_out, delta, rows, HEAD_V: tl.constexpr, PAD_V: tl.constexpr, BR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (row tiles, Hq, B): delta [B, Hq, Nq] = the products of out and its gradient, summed over Dv."""
    first, head, batch = tl.program_id(0) * BR, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    place = batch * rows * heads * HEAD_V + head * HEAD_V
    o = load_rows(out + place, first, rows, heads * HEAD_V, HEAD_V, PAD_V, BR).to(tl.float32)
    do = load_rows(grad_out + place, first, rows, heads * HEAD_V, HEAD_V, PAD_V, BR).to(tl.float32)
    i = first + tl.arange(0, BR)
    tl.store(delta + (batch * heads + head) * rows + i, tl.sum(o * do, 1), mask=i < rows)


@triton.jit
def load_lse(lse, i, rows):  # type: ignore[no-untyped-def]
    """lse of rows i in powers of two; inf, so weights of 0, for rows that see nothing or are not there."""
    value = tl.load(lse + i, mask=i < rows, other=float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * 1.4426950408889634)


@triton.jit
def hidden_tiles(most, least, rows, BR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row tiles [start, stop) inside the interval [most, least) that masks a whole key block."""
    return tl.cdiv(most, BR), tl.where(least >= rows, tl.cdiv(rows, BR), least // BR)


@triton.jit
def next_rows(m, end, low, low_end, high, high_end):  # type: ignore[no-untyped-def]
    """First unbroken run [start, stop) of row tiles in [m, end) outside of two ranges of hidden ones."""
    m = tl.where((m >= low) & (m < low_end), low_end, m)
    m = tl.where((m >= high) & (m < high_end), high_end, m)
    m = tl.where((m >= low) & (m < low_end), low_end, m)  # the second range may end inside the first
    start = tl.minimum(m, end)
    stop = tl.where(low > start, tl.minimum(end, low), end)
    return start, tl.where(high > start, tl.minimum(stop, high), stop)


@triton.jit
def attention_backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, grad_out, lse, delta, dk, dv, bounds, stats,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    rows, columns, heads, mask_heads, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LTE: tl.constexpr, HAS_UT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, Hk, B): dk [B, Nk, Hk, D], dv [B, Nk, Hk, Dv] of a block; tiles are [keys, rows]."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    group, shift, blocks = heads // kv_heads, columns - rows, tl.cdiv(columns, BC)
    n, width = tl.arange(0, BC)[:, None], blocks * BC
    k_tile = load_rows(k + batch * k_batch + kv_head * k_head, block * BC, columns, k_row, HEAD, PAD, BC)
    v_tile = load_rows(v + batch * v_batch + kv_head * v_head, block * BC, columns, v_row, HEAD_V, PAD_V, BC)
    dk_tile = tl.zeros([BC, PAD], tl.float32)
    dv_tile = tl.zeros([BC, PAD_V], tl.float32)
    log2_scale = scale * 1.4426950408889634
    tiles = tl.cdiv(rows, BR)
    for member in range(group):
        head = kv_head * group + member
        mask_head = (batch * mask_heads + head // (heads // mask_heads)) * (1 + HAS_LTE + 2 * HAS_UT)
        mine = bounds + mask_head * width + block * BC
        low, low_rows = load_interval(mine, n, width, HAS_LTE)
        high, high_rows = low, low_rows
        stat = stats + mask_head * 2 * blocks + block
        low_from, low_all = tl.load(stat), tl.load(stat + blocks)
        low_all_to, low_to = rows, rows
        if HAS_LTE:
            low_all_to, low_to = tl.load(stat + 2 * blocks), tl.load(stat + 3 * blocks)
        hole, hole_end = hidden_tiles(low_all, low_all_to, rows, BR)
        high_from, high_to, hole2, hole2_end = rows, 0, tiles, tiles
        if HAS_UT:
            high, high_rows = load_interval(mine + (1 + HAS_LTE) * width, n, width, True)
            stat += (2 + 2 * HAS_LTE) * blocks
            high_from, high_to = tl.load(stat), tl.load(stat + 3 * blocks)
            hole2, hole2_end = hidden_tiles(tl.load(stat + blocks), tl.load(stat + 2 * blocks), rows, BR)
        m, diagonal = 0, 0  # rows before the diagonal of the last key are masked in part
        if CAUSAL:
            diagonal = (block + 1) * BC - 1 - shift
            m = tl.maximum(block * BC - shift, 0) // BR
        q_mine = q + batch * q_batch + head * q_head
        do_mine = grad_out + batch * rows * heads * HEAD_V + head * HEAD_V
        row = (batch * heads + head) * rows
        while m < tiles:
            start, stop = next_rows(m, tiles, hole, hole_end, hole2, hole2_end)
            for here in tl.range(start, stop):
                first, last = here * BR, tl.minimum(here * BR + BR, rows)
                i = first + tl.arange(0, BR)
                q_tile = load_rows(q_mine, first, rows, q_row, HEAD, PAD, BR)
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                partial = ((last > low_from) & (first < low_to)) | (first < diagonal)
                if partial | ((last > high_from) & (first < high_to)):
                    s = hide(s, i[None, :], low, low_rows)
                    if HAS_UT:
                        s = hide(s, i[None, :], high, high_rows)
                    if CAUSAL:
                        s = tl.where(i[None, :] + (shift - block * BC) < n, float("-inf"), s)
                p = tl.exp2(s * log2_scale - load_lse(lse + row, i, rows)[None, :])
                do = load_rows(do_mine, first, rows, heads * HEAD_V, HEAD_V, PAD_V, BR)
                dv_tile = tl.dot(p.to(do.dtype), do, dv_tile, input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
                ds = p * (dp - tl.load(delta + row + i, mask=i < rows, other=0.0)[None, :])
                dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
            m = stop
    # a block that no row sees comes here with zeros: they have to be written all the same
    keys = batch * columns * kv_heads + kv_head
    store_rows(dk + keys * HEAD, dk_tile * scale, block * BC, columns, kv_heads * HEAD, HEAD, PAD, BC)
    store_rows(dv + keys * HEAD_V, dv_tile, block * BC, columns, kv_heads * HEAD_V, HEAD_V, PAD_V, BC)


@triton.jit
def attention_backward_rows(  # type: ignore[no-untyped-def]
    q, k, v, grad_out, lse, delta, dq, bounds, stats,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    rows, columns, kv_heads, mask_heads, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LTE: tl.constexpr, HAS_UT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, Hq, B): dq [B, Nq, Hq, D] of one tile of rows, walking as the forward does."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    first, shift = block * BR, columns - rows
    last = tl.minimum(first + BR, rows)
    kv_head = head // (heads // kv_heads)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    blocks = tl.cdiv(columns, BC)
    mask_head = (batch * mask_heads + head // (heads // mask_heads)) * (1 + HAS_LTE + 2 * HAS_UT)
    bounds += mask_head * blocks * BC
    stats += mask_head * 2 * blocks

    log2_scale = scale * 1.4426950408889634
    i = first + tl.arange(0, BR)
    q_tile = load_rows(q + batch * q_batch + head * q_head, first, rows, q_row, HEAD, PAD, BR)
    do = grad_out + batch * rows * heads * HEAD_V + head * HEAD_V
    do_tile = load_rows(do, first, rows, heads * HEAD_V, HEAD_V, PAD_V, BR)
    row = (batch * heads + head) * rows
    lse_i = load_lse(lse + row, i, rows)
    delta_i = tl.load(delta + row + i, mask=i < rows, other=0.0)
    dq_tile = tl.zeros([BR, PAD], tl.float32)
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
            p = tl.exp2(s * log2_scale - lse_i[:, None])
            v_tile = load_rows(v, here * BC, columns, v_row, HEAD_V, PAD_V, BC)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta_i[:, None])
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
        n = stop
    dq += batch * rows * heads * HEAD + head * HEAD
    store_rows(dq, dq_tile * scale, first, rows, heads * HEAD, HEAD, PAD, BR)
