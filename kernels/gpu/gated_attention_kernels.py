"""Kernels of the core of gated attention: scores stay on the chip, biases and gate are applied there.

Forward: a block of queries, all keys, running softmax, then the gate. Backward: first the gate, which leaves
the gradient of the attention itself; then queries and keys, each with its own owner; last the pair bias,
where a program owns a block of pairs and walks over the rows of the table. Every number has one writer and a
fixed order of additions. What softmax subtracted and divided by are kept apart: their sum, the log-sum-exp,
would lose the divisor where a whole row is masked by -1e9.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(data, first, row, row_stride, length, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, P] of one head from a table of rows; nothing is 0."""
    at = (first + row).to(tl.int64) * row_stride
    return tl.load(data + at[:, None] + tl.arange(0, HEAD)[None, :], mask=(row < length)[:, None], other=0.0)


@triton.jit
def _store(data, value, first, row, row_stride, length, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    at = (first + row).to(tl.int64) * row_stride
    column = tl.arange(0, HEAD)[None, :]
    tl.store(data + at[:, None] + column, value.to(data.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    q, k, mask, pair, table_row, pair_plane, row, column, queries, keys, scale,
    HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """q k^T * scale + biases, [rows, columns] in fp32; minus infinity past the last key."""
    scores = tl.dot(q, tl.trans(k)) * scale
    if HAS_MASK:
        bias = tl.load(mask + table_row * keys + column, mask=column < keys, other=0.0)
        scores += bias.to(tl.float32)[None, :]
    if HAS_PAIR:
        at = (pair_plane * queries + row).to(tl.int64)[:, None] * keys + column[None, :]
        inside = (row < queries)[:, None] & (column < keys)[None, :]
        scores += tl.load(pair + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where((column < keys)[None, :], scores, float("-inf"))


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q, k, v, gate, gate_bias, mask, pair, out, attended, top, total,
    q_row, k_row, v_row, gate_row, table_rows, queries, keys, scale,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head and table row against all keys."""
    # table rows are neighbours in the grid: they read the same block of the pair bias
    b, h = tl.program_id(2) // HEADS, tl.program_id(2) % HEADS
    table_row = (b * table_rows + tl.program_id(0)).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    query_tile = _tile(q + h * HEAD, table_row * queries, row, q_row, queries, HEAD)
    biggest = tl.full((ROWS,), float("-inf"), tl.float32)
    divisor = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    for start in range(0, keys, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key_tile = _tile(k + h * HEAD, table_row * keys, column, k_row, keys, HEAD)
        scores = _scores(
            query_tile, key_tile, mask, pair, table_row, tl.program_id(2), row, column, queries, keys, scale,
            HAS_MASK, HAS_PAIR,
        )  # fmt: skip
        higher = tl.maximum(biggest, tl.max(scores, 1))
        shrink = tl.exp(biggest - higher)
        weights = tl.exp(scores - higher[:, None])
        value_tile = _tile(v + h * HEAD, table_row * keys, column, v_row, keys, HEAD)
        divisor = divisor * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(value_tile.dtype), value_tile)
        biggest = higher
    acc = acc / divisor[:, None]
    at = (table_row * HEADS + h) * queries + row
    tl.store(top + at, biggest, mask=row < queries)
    tl.store(total + at, divisor, mask=row < queries)
    _store(attended + h * HEAD, acc, table_row * queries, row, HEADS * HEAD, queries, HEAD)
    closed = _tile(gate + h * HEAD, table_row * queries, row, gate_row, queries, HEAD).to(tl.float32)
    closed += tl.load(gate_bias + h * HEAD + tl.arange(0, HEAD)).to(tl.float32)[None, :]
    _store(out + h * HEAD, acc * tl.sigmoid(closed), table_row * queries, row, HEADS * HEAD, queries, HEAD)


@triton.jit
def gate_kernel(  # type: ignore[no-untyped-def]
    grad, attended, gate, gate_bias, grad_attended, grad_gate, delta,
    grad_row, gate_row, queries,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Through the gate: gradients of the gate and of the attention, and the inner product of the latter."""
    table_row, h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = table_row * queries
    d = _tile(grad + h * HEAD, first, row, grad_row, queries, HEAD).to(tl.float32)
    o = _tile(attended + h * HEAD, first, row, HEADS * HEAD, queries, HEAD).to(tl.float32)
    closed = _tile(gate + h * HEAD, first, row, gate_row, queries, HEAD).to(tl.float32)
    closed += tl.load(gate_bias + h * HEAD + tl.arange(0, HEAD)).to(tl.float32)[None, :]
    opened = tl.sigmoid(closed)
    d_o = (d * opened).to(grad_attended.dtype.element_ty)
    _store(grad_attended + h * HEAD, d_o, first, row, HEADS * HEAD, queries, HEAD)
    d_gate = d * o * opened * (1.0 - opened)
    _store(grad_gate + h * HEAD, d_gate, first, row, HEADS * HEAD, queries, HEAD)
    inner = tl.sum(d_o.to(tl.float32) * o, 1)
    tl.store(delta + (table_row * HEADS + h) * queries + row, inner, mask=row < queries)


@triton.jit
def _score_gradients(  # type: ignore[no-untyped-def]
    query_tile, key_tile, value_tile, grad_tile, mask, pair, top, total, delta,
    table_row, pair_plane, at, row, column, queries, keys, scale,
    HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """(weights, gradients of the scores), [rows, columns] in fp32; 0 past the last query and key."""
    scores = _scores(
        query_tile, key_tile, mask, pair, table_row, pair_plane, row, column, queries, keys, scale,
        HAS_MASK, HAS_PAIR,
    )  # fmt: skip
    inside = row < queries
    highest = tl.load(top + at + row, mask=inside, other=0.0)
    divisor = tl.load(total + at + row, mask=inside, other=1.0)
    inner = tl.load(delta + at + row, mask=inside, other=0.0)
    weights = tl.where(inside[:, None], tl.exp(scores - highest[:, None]) / divisor[:, None], 0.0)
    return weights, weights * (tl.dot(grad_tile, tl.trans(value_tile)) - inner[:, None])


@triton.jit
def queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, pair, grad, top, total, delta, grad_q,
    q_row, k_row, v_row, table_rows, queries, keys, scale,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries: walks over the keys."""
    b, h = tl.program_id(2) // HEADS, tl.program_id(2) % HEADS
    table_row = (b * table_rows + tl.program_id(0)).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = (table_row * HEADS + h) * queries
    query_tile = _tile(q + h * HEAD, table_row * queries, row, q_row, queries, HEAD)
    grad_tile = _tile(grad + h * HEAD, table_row * queries, row, HEADS * HEAD, queries, HEAD)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    for start in range(0, keys, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key_tile = _tile(k + h * HEAD, table_row * keys, column, k_row, keys, HEAD)
        value_tile = _tile(v + h * HEAD, table_row * keys, column, v_row, keys, HEAD)
        _, grad_scores = _score_gradients(
            query_tile, key_tile, value_tile, grad_tile, mask, pair, top, total, delta,
            table_row, tl.program_id(2), at, row, column, queries, keys, scale, HAS_MASK, HAS_PAIR,
        )  # fmt: skip
        acc += tl.dot(grad_scores.to(key_tile.dtype), key_tile)
    _store(grad_q + h * HEAD, acc * scale, table_row * queries, row, HEADS * HEAD, queries, HEAD)


@triton.jit
def keys_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, pair, grad, top, total, delta, grad_k, grad_v,
    q_row, k_row, v_row, table_rows, queries, keys, scale,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and their values: walks over the queries."""
    b, h = tl.program_id(2) // HEADS, tl.program_id(2) % HEADS
    table_row = (b * table_rows + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = (table_row * HEADS + h) * queries
    key_tile = _tile(k + h * HEAD, table_row * keys, column, k_row, keys, HEAD)
    value_tile = _tile(v + h * HEAD, table_row * keys, column, v_row, keys, HEAD)
    acc_k = tl.zeros((COLUMNS, HEAD), tl.float32)
    acc_v = tl.zeros((COLUMNS, HEAD), tl.float32)
    for start in range(0, queries, ROWS):
        row = start + tl.arange(0, ROWS)
        query_tile = _tile(q + h * HEAD, table_row * queries, row, q_row, queries, HEAD)
        grad_tile = _tile(grad + h * HEAD, table_row * queries, row, HEADS * HEAD, queries, HEAD)
        weights, grad_scores = _score_gradients(
            query_tile, key_tile, value_tile, grad_tile, mask, pair, top, total, delta,
            table_row, tl.program_id(2), at, row, column, queries, keys, scale, HAS_MASK, HAS_PAIR,
        )  # fmt: skip
        acc_v += tl.dot(tl.trans(weights.to(grad_tile.dtype)), grad_tile)
        acc_k += tl.dot(tl.trans(grad_scores.to(query_tile.dtype)), query_tile)
    _store(grad_k + h * HEAD, acc_k * scale, table_row * keys, column, HEADS * HEAD, keys, HEAD)
    _store(grad_v + h * HEAD, acc_v, table_row * keys, column, HEADS * HEAD, keys, HEAD)


@triton.jit
def pairs_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, pair, grad, top, total, delta, grad_pair,
    q_row, k_row, v_row, table_rows, queries, keys, scale,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of the pair bias: walks over the rows of the table, in their order."""
    b, h = tl.program_id(2) // HEADS, tl.program_id(2) % HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(0, table_rows):
        table_row = (b * table_rows + n).to(tl.int64)
        _, grad_scores = _score_gradients(
            _tile(q + h * HEAD, table_row * queries, row, q_row, queries, HEAD),
            _tile(k + h * HEAD, table_row * keys, column, k_row, keys, HEAD),
            _tile(v + h * HEAD, table_row * keys, column, v_row, keys, HEAD),
            _tile(grad + h * HEAD, table_row * queries, row, HEADS * HEAD, queries, HEAD),
            mask, pair, top, total, delta, table_row, tl.program_id(2), (table_row * HEADS + h) * queries,
            row, column, queries, keys, scale, HAS_MASK, True,
        )  # fmt: skip
        acc += grad_scores
    at = (tl.program_id(2) * queries + row).to(tl.int64)[:, None] * keys + column[None, :]
    inside = (row < queries)[:, None] & (column < keys)[None, :]
    tl.store(grad_pair + at, acc.to(grad_pair.dtype.element_ty), mask=inside)
