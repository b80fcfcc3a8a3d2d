"""The usual masks as column masks (FlashMask, arXiv 2410.01359, figure 1; AnchorAttention, arXiv 2411.13476).

Each function says in its first line which key j a query i sees. `documents` are the document ids of a row of
tokens, int [B, N]; equal neighbours are one document. All masks are square: as many queries as keys.
"""

import torch

from .mask import ColumnMask, MaskError


def full(batch: int, n: int, device: torch.device | None = None) -> ColumnMask:
    """Every key."""
    return _mask(torch.zeros(batch, n, dtype=torch.int32, device=device), causal=False)


def causal(batch: int, n: int, device: torch.device | None = None) -> ColumnMask:
    """j <= i."""
    return _mask(torch.zeros(batch, n, dtype=torch.int32, device=device), causal=True)


def sliding_window(batch: int, n: int, window: int, device: torch.device | None = None) -> ColumnMask:
    """j <= i and i - j < window: itself and the `window - 1` keys before."""
    column = _columns(batch, n, device)
    return _mask(column, causal=True, lts=(column + window).clamp(max=n))


def causal_document(documents: torch.Tensor) -> ColumnMask:
    """j <= i, in the same document."""
    _, end = document_borders(documents)
    return _mask(documents, causal=True, lts=end)


def document(documents: torch.Tensor) -> ColumnMask:
    """Every key of the same document."""
    start, end = document_borders(documents)
    return _mask(documents, causal=False, lts=end, ute=start)


def share_question(documents: torch.Tensor) -> ColumnMask:
    """j <= i, in the same answer or in the question, which is the first document of a row."""
    _, end = document_borders(documents)
    n = documents.shape[1]
    question = _columns_like(documents) < end[:, :1]
    return _mask(documents, causal=True, lts=torch.where(question, n, end))


def global_sliding(
    batch: int, n: int, *, first: int, left: int, right: int, device: torch.device | None = None
) -> ColumnMask:
    """The first keys, for everyone; every key, for the first queries; else i - left <= j <= i + right."""
    column = _columns(batch, n, device)
    lts = torch.where(column < first, n, (column + left + 1).clamp(max=n))
    near = column <= first + right
    return _mask(
        column,
        causal=False,
        lts=lts,
        uts=torch.where(near, 0, first),
        ute=torch.where(near, 0, (column - right).clamp(min=0)),
    )


def causal_blockwise(documents: torch.Tensor) -> ColumnMask:
    """j <= i, in the same block (document); queries of the last block see every block."""
    _, end = document_borders(documents)
    n = documents.shape[1]
    last_start = document_borders(documents)[0][:, -1:]
    in_last = _columns_like(documents) >= last_start
    return _mask(
        documents,
        causal=True,
        lts=torch.where(in_last, n, end),
        lte=torch.where(in_last, n, last_start),
    )


def prefix_lm(batch: int, n: int, prefix: int, device: torch.device | None = None) -> ColumnMask:
    """j <= i, or j in the prefix."""
    column = _columns(batch, n, device)
    return _mask(column, causal=False, ute=torch.where(column < prefix, 0, column))


def prefix_lm_document(documents: torch.Tensor, prefix: torch.Tensor) -> ColumnMask:
    """In the same document: j <= i, or j in its prefix; `prefix` [B, N] is the length of a token's
    document's.
    """
    start, end = document_borders(documents)
    column = _columns_like(documents)
    upper = torch.where(column - start < prefix, start, column)
    return _mask(documents, causal=False, lts=end, ute=upper)


def sparse_ranges(
    batch: int, n: int, ranges: list[tuple[int, int]], device: torch.device | None = None
) -> ColumnMask:
    """j <= i, but for keys of a range [a, b), which the queries before b do not see.

    A query of a range therefore sees only keys before it; where the range begins at 0 it sees nothing.
    """
    column = _columns(batch, n, device)
    lts, lte = torch.full_like(column, n), torch.full_like(column, n)
    for first, last in ranges:
        inside = (column >= first) & (column < last)
        lts, lte = torch.where(inside, first, lts), torch.where(inside, last, lte)
    return _mask(column, causal=True, lts=lts, lte=lte)


def hash_sparse(buckets: torch.Tensor) -> tuple[ColumnMask, torch.Tensor]:
    """j <= i, in the same bucket: the mask of the tokens in the order that is returned with it, [B, N].

    The order keeps that of tokens within a bucket. Gather queries, keys and values by it; the output returns
    to its place by its inverse, `order.argsort(1)`.
    """
    order = buckets.argsort(dim=1, stable=True)
    return causal_document(buckets.gather(1, order)), order


def evicted(rows: torch.Tensor) -> ColumnMask:
    """j <= i < rows[j]: key j is dropped from query row `rows[b, h, j]` on; `rows` [B, Hm, N]."""
    n = rows.shape[-1]
    lts = rows.to(torch.int32).clamp(0, n)
    none = torch.zeros_like(lts)
    return ColumnMask(lts=lts, lte=torch.full_like(lts, n), uts=none, ute=none, causal=True, nq=n)


def packed(documents: torch.Tensor) -> ColumnMask:
    """j <= i, in the same document or in one with a negative id: an anchor, which all after it see."""
    _, end = document_borders(documents)
    return _mask(documents, causal=True, lts=torch.where(documents < 0, documents.shape[1], end))


def anchored(documents: torch.Tensor) -> ColumnMask:
    """j <= i, in the same document or the row's first token, the anchor that all documents share.

    Rotary positions must run through the whole row with this mask (`anchor_positions`), the anchor at 0.
    """
    _, end = document_borders(documents)
    n = documents.shape[1]
    return _mask(documents, causal=True, lts=torch.where(_columns_like(documents) == 0, n, end))


def anchor_positions(documents: torch.Tensor) -> torch.Tensor:
    """Positions that go with `anchored`: int64 [B, N], running through the row whatever the documents."""
    return torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)


def document_borders(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First row of each token's document, and the row behind its last: int32 [B, N] each."""
    if documents.ndim != 2:
        raise MaskError(f"document ids are [batch, tokens], these are {list(documents.shape)}")
    n, column = documents.shape[1], _columns_like(documents)
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(changes, column, 0).cummax(1).values
    ends = torch.full_like(column, n)
    ends[:, :-1] = torch.where(changes[:, 1:], column[:, 1:], n)
    end = ends.flip(1).cummin(1).values.flip(1)
    return start.to(torch.int32), end.to(torch.int32)


def _columns(batch: int, n: int, device: torch.device | None) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32, device=device).expand(batch, n)


def _columns_like(documents: torch.Tensor) -> torch.Tensor:
    return _columns(documents.shape[0], documents.shape[1], documents.device)


def _mask(
    like: torch.Tensor,
    *,
    causal: bool,
    lts: torch.Tensor | None = None,
    lte: torch.Tensor | None = None,
    uts: torch.Tensor | None = None,
    ute: torch.Tensor | None = None,
) -> ColumnMask:
    """One mask head; bounds [B, N] that are not given hide nothing."""
    n = like.shape[1]
    trivial = {"lte": lte is None, "upper": uts is None and ute is None}
    end, none = (torch.full(like.shape, x, dtype=torch.int32, device=like.device) for x in (n, 0))
    bounds = (end if lts is None else lts, end if lte is None else lte, none if uts is None else uts)
    lts, lte, uts, ute = (x.to(torch.int32)[:, None] for x in (*bounds, none if ute is None else ute))
    known = frozenset(name for name, is_trivial in trivial.items() if is_trivial)
    return ColumnMask(lts=lts, lte=lte, uts=uts, ute=ute, causal=causal, nq=n, trivial=known)
