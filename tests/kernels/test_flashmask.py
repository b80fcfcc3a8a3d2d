"""Column masks say what their definitions say; tiles are classified without losing a visible score."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rayfold.kernels.flashmask import kinds
from rayfold.kernels.flashmask.blocks import (
    MASKED,
    PARTIAL,
    VISIBLE,
    Bounds,
    classify,
    grid,
    own_edges,
    steps,
)
from rayfold.kernels.flashmask.mask import ColumnMask, MaskError
from rayfold.kernels.flashmask.plan import decode

Seen = torch.Tensor
SIZES = (1, 7, 16, 96, 257)


def some_documents(n: int) -> torch.Tensor:
    """Two rows of documents of uneven lengths, [2, N]."""
    cuts = [{n // 5, n // 2, n - 1}, {n // 3}]
    rows = [torch.tensor([sum(place >= cut > 0 for cut in row) for place in range(n)]) for row in cuts]
    return torch.stack(rows)


def same(documents: torch.Tensor) -> Seen:
    return documents[:, :, None] == documents[:, None, :]


def case(name: str, n: int) -> tuple[ColumnMask, Seen]:
    """A mask of every kind, and what its definition sees: bool [B, N, N]."""
    docs = some_documents(n)
    i, j = torch.arange(n)[None, :, None], torch.arange(n)[None, None, :]
    past = j <= i
    start, _ = kinds.document_borders(docs)
    first, window = min(3, n), 4
    prefix = torch.full_like(docs, 2)
    prefix_seen = (j - start[:, None, :].long()) < 2
    last = docs == docs[:, -1:]
    ranges = [(n // 4, n // 2), (n // 2, n // 2 + n // 8)]
    inside = torch.zeros(1, n, n, dtype=torch.bool)
    for a, b in ranges:
        inside |= (j >= a) & (j < b) & (i < b)
    rows = (torch.arange(n) * 7 % 11 + torch.arange(n) + 1)[None, None]
    cases: dict[str, Callable[[], tuple[ColumnMask, Seen]]] = {
        "full": lambda: (kinds.full(2, n), torch.ones(2, n, n, dtype=torch.bool)),
        "causal": lambda: (kinds.causal(2, n), past),
        "sliding window": lambda: (kinds.sliding_window(2, n, window), past & (i - j < window)),
        "causal document": lambda: (kinds.causal_document(docs), past & same(docs)),
        "document": lambda: (kinds.document(docs), same(docs)),
        "share question": lambda: (
            kinds.share_question(docs),
            past & (same(docs) | (docs[:, None, :] == docs[:, :1, None])),
        ),
        "global sliding": lambda: (
            kinds.global_sliding(2, n, first=first, left=4, right=2),
            (j < first) | (i < first) | ((i - 4 <= j) & (j <= i + 2)),
        ),
        "causal blockwise": lambda: (
            kinds.causal_blockwise(docs),
            past & (same(docs) | last[:, :, None]),
        ),
        "prefix": lambda: (kinds.prefix_lm(2, n, first), past | (j < first)),
        "prefix document": lambda: (
            kinds.prefix_lm_document(docs, prefix),
            same(docs) & (past | prefix_seen),
        ),
        "sparse ranges": lambda: (kinds.sparse_ranges(2, n, ranges), past & ~inside),
        "evicted": lambda: (kinds.evicted(rows), past & (i < rows[0, 0][None, None, :])),
        "anchored": lambda: (kinds.anchored(docs), past & (same(docs) | (j == 0))),
    }
    return cases[name]()


KINDS = (
    *("full", "causal", "sliding window", "causal document", "document", "share question", "global sliding"),
    *("causal blockwise", "prefix", "prefix document", "sparse ranges", "evicted", "anchored"),
)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_a_mask_sees_what_its_definition_sees(name: str, n: int) -> None:
    """Encoding a mask by columns must lose nothing of it."""
    mask, seen = case(name, n)
    assert torch.equal(~mask.dense()[:, 0], seen.expand(mask.lts.shape[0], n, n))


@pytest.mark.parametrize("n", SIZES)
def test_hash_sparse_attends_within_buckets_in_the_order_of_tokens(n: int) -> None:
    """Sorted by bucket and back, a token sees the earlier tokens of its bucket and no other."""
    buckets = (torch.arange(2 * n).view(2, n) * 31) % 5
    mask, order = kinds.hash_sparse(buckets)
    back = order.argsort(1)
    for row in range(2):
        seen = ~mask.dense()[row, 0][back[row]][:, back[row]]
        past = torch.arange(n)[None, :] <= torch.arange(n)[:, None]
        assert torch.equal(seen, past & (buckets[row][:, None] == buckets[row][None, :]))


def random_bounds(rng: np.random.Generator, nq: int, nk: int, *, causal: bool) -> Bounds:
    """Intervals anywhere, empty ones at both ends among them; some columns alike, as documents are."""
    ends = np.sort(rng.integers(0, nq + 1, size=(2, 2, nk)), axis=1)
    if rng.random() < 0.5:
        ends = np.repeat(ends[..., ::8], 8, axis=-1)[..., :nk]
    kind = rng.integers(0, 4, size=nk)
    ends[0][:, kind == 0] = nq  # [N, N)
    ends[1][:, kind == 1] = 0  # [0, 0)
    (lts, lte), (uts, ute) = ends
    return Bounds(lts, lte, uts, ute, causal=causal, nq=nq)


def dense(bounds: Bounds) -> np.ndarray:
    i, j = np.arange(bounds.nq)[:, None], np.arange(bounds.nk)[None]
    hidden = ((i >= bounds.lts) & (i < bounds.lte)) | ((i >= bounds.uts) & (i < bounds.ute))
    return hidden | (i < j - (bounds.nk - bounds.nq)) if bounds.causal else hidden


@pytest.mark.parametrize("seed", range(10))
def test_no_tile_with_a_visible_score_is_skipped_and_none_with_a_hidden_one_goes_unmasked(seed: int) -> None:
    """A thousand random masks: the two claims that skipping stands on, with plain and own edges."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        nq, nk = (int(n) for n in rng.integers(1, 90, size=2))
        bounds = random_bounds(rng, nq, nk, causal=bool(rng.integers(2)))
        hidden = dense(bounds)
        for edges in ((grid(nq, 16), grid(nk, 8)), own_edges(bounds)):
            tiles = classify(bounds, *edges)
            for (row, column), kind in np.ndenumerate(tiles.classes):
                part = hidden[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
                assert part.all() or kind != MASKED
                assert not part.any() or kind != VISIBLE


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_of_a_plan_cover_every_visible_score_once(seed: int) -> None:
    """What travels as integers is what was classified: no row twice, no visible column left out."""
    rng = np.random.default_rng(100 + seed)
    bounds = [random_bounds(rng, 70, 70, causal=False) for _ in range(2)]
    stacked = {
        name: torch.tensor(np.stack([getattr(b, name) for b in bounds]), dtype=torch.int32)[None]
        for name in ("lts", "lte", "uts", "ute")
    }
    mask = ColumnMask(**stacked, causal=False, nq=70)
    computed = np.zeros((2, 70, 70), dtype=int)
    unmasked = np.zeros((2, 70, 70), dtype=bool)
    for step in decode(mask.plan):
        for first, last, partial in step.ranges:
            computed[step.head, step.first : step.last, first:last] += 1
            unmasked[step.head, step.first : step.last, first:last] = not partial
    hidden = np.stack([dense(b) for b in bounds])
    assert computed.max() <= 1
    assert (computed[~hidden] == 1).all()
    assert not unmasked[hidden].any()


def test_documents_cut_tiles_at_their_own_borders() -> None:
    """Long documents leave no tile half visible but on the diagonal, so only those are masked."""
    docs = torch.tensor([[0] * 300 + [1] * 212])
    bounds = kinds.causal_document(docs).bounds(0, 0)
    tiles = classify(bounds, *own_edges(bounds))
    assert 300 in tiles.row_edges
    for first, last, ranges in steps(tiles):
        partial = [(a, b) for a, b, kind in ranges if kind == PARTIAL]
        assert all(b > first and a < last for a, b in partial)


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (7, 16), (96, 96), (40, 257)])
def test_causal_is_aligned_at_the_bottom_right(nq: int, nk: int) -> None:
    """The last query sees every key, however many more keys there are than queries."""
    nothing = torch.zeros(1, 1, nk, dtype=torch.int32)
    end = torch.full_like(nothing, nq)
    mask = ColumnMask(lts=end, lte=end, uts=nothing, ute=nothing, causal=True, nq=nq)
    expected = torch.ones(nq, nk).triu(nk - nq + 1).bool()
    assert torch.equal(mask.dense()[0, 0], expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_part_of_a_mask_is_that_of_its_dense_form(name: str) -> None:
    """Context parallelism gives a rank some rows and some keys, each in several stretches."""
    mask, _ = case(name, 96)
    whole = mask.dense()
    places = torch.arange(96)
    some = {
        "chunks": torch.cat((places[8:16], places[80:88])),
        "odd": places[1::2],
        "one": places[41:42],
        "all": places,
    }
    for rows in some.values():
        for columns in some.values():
            part = mask.part(rows, columns)
            assert part.causal == (mask.causal and rows is columns)
            assert torch.equal(part.dense(), whole[:, :, rows][..., columns])


def test_a_diagonal_and_an_upper_interval_do_not_fit_into_one() -> None:
    """Off the diagonal, it takes the place of an upper interval: one that is there is told of, not lost."""
    lts, uts, ute = (torch.full((1, 1, 9), row, dtype=torch.int32) for row in (9, 5, 7))
    mask = ColumnMask(lts=lts, lte=lts, uts=uts, ute=ute, causal=True, nq=9)
    rows = torch.arange(9)
    assert torch.equal(mask.part(rows, rows).dense(), mask.dense())
    with pytest.raises(MaskError, match="drop causal"):
        mask.part(rows, rows[:5])


def test_a_mask_that_hides_everything_is_known_by_its_bounds() -> None:
    """A step of a ring that sees nothing is passed over: exactly those steps."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        bounds = random_bounds(rng, int(rng.integers(1, 4)), 2, causal=False)
        stacked = {
            n: torch.tensor(getattr(bounds, n))[None, None].int() for n in ("lts", "lte", "uts", "ute")
        }
        mask = ColumnMask(**stacked, causal=False, nq=bounds.nq)
        assert bool(mask.hides_all) == bool(mask.dense().all())


@pytest.mark.parametrize("causal", [True, False])
def test_two_numbers_a_column_mean_different_things_with_and_without_causal(causal: bool) -> None:
    """[LTS, LTE] when causal, [LTS, UTE] otherwise: read the wrong way, a mask silently hides other keys."""
    indices = torch.tensor([[[[5, 8]] * 9]])
    mask = ColumnMask.from_paddle(indices, causal=causal, nq=9)
    column = mask.dense()[0, 0, :, 0].tolist()
    assert column == ([i in (5, 6, 7) for i in range(9)] if causal else [True] * 9)
    for wrong in (3, 4 if causal else 1):
        with pytest.raises(MaskError, match="last dimension"):
            ColumnMask.from_paddle(indices[..., :1].expand(1, 1, 9, wrong), causal=causal, nq=9)


def test_density_counts_the_tiles_that_are_computed() -> None:
    """A causal mask of n x n tiles computes n (n + 1) / 2 of them."""
    assert kinds.causal(1, 512).density(128, 128) == pytest.approx(10 / 16)
    assert kinds.full(1, 512).density(128, 128) == 1.0
    assert kinds.document(some_documents(512)).density(1, 1) == pytest.approx(
        float(same(some_documents(512)).float().mean())
    )


def test_bounds_of_different_shapes_or_types_are_refused() -> None:
    """A mask of int64 bounds would be read as nonsense by a kernel that loads 32 bits."""
    good = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(MaskError, match="lte"):
        ColumnMask(lts=good, lte=good.long(), uts=good, ute=good, causal=True, nq=4)
    with pytest.raises(MaskError, match="ute"):
        ColumnMask(lts=good, lte=good, uts=good, ute=good[..., :3], causal=True, nq=4)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_kernel_is_told_to_leave_out_hides_nothing(name: str) -> None:
    """A bound that is passed over makes no difference, or keys would show that should not."""
    mask, _ = case(name, 96)
    lts, lte, uts, ute = mask.for_device
    nothing, end = torch.zeros_like(mask.lts), torch.full_like(mask.lts, mask.nq)
    told = ColumnMask(
        lts=mask.lts,
        lte=end if lte is None else lte,
        uts=nothing if uts is None else uts,
        ute=nothing if ute is None else ute,
        causal=mask.causal,
        nq=mask.nq,
    )
    assert lts is mask.lts
    assert torch.equal(told.dense(), mask.dense())


def test_documents_need_one_bound_of_four() -> None:
    """The most common mask costs a kernel one load a column."""
    assert [bound is None for bound in kinds.packed(some_documents(96)).for_device] == [
        False,
        True,
        True,
        True,
    ]
