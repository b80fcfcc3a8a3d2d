"""Tiles of the score matrix by class, from the bounds of a column mask alone (FlashMask, arXiv 2410.01359,
3.2).

A tile whose scores are all hidden is never computed; one with none hidden needs no mask. Both tests look only
at the smallest and largest bound of a column block. They are exact for one interval and careful for the union
of two: such a tile may be computed though all of it is hidden, never the other way round.
"""

from dataclasses import dataclass

import numpy as np

MASKED, PARTIAL, VISIBLE = 0, 1, 2

ROWS = 288  # taller is faster to multiply, and wastes more of a causal diagonal: half a tile each time
COLUMNS = 32  # ranges of columns are glued together, so narrow blocks cost nothing but their tests
EVEN = 16  # rows (and columns up to a diagonal) fill whole registers: softmax is up to a third faster
FEWEST_ROWS = 32  # edges are cut at a mask's own borders while tiles stay this tall on average

Array = np.ndarray


@dataclass(frozen=True)
class Bounds:
    """One head's bounds on the host, each int [Nk]."""

    lts: Array
    lte: Array
    uts: Array
    ute: Array
    causal: bool
    nq: int

    @property
    def nk(self) -> int:
        """Number of keys."""
        return len(self.lts)


@dataclass(frozen=True)
class Tiles:
    """Classes [rows, columns] of the tiles between row and column edges."""

    row_edges: Array
    column_edges: Array
    classes: Array

    @property
    def density(self) -> float:
        """Share of all scores that lie in tiles which are computed."""
        area = np.diff(self.row_edges)[:, None] * np.diff(self.column_edges)[None, :]
        return float((area * (self.classes != MASKED)).sum() / max(area.sum(), 1))


def grid(size: int, step: int) -> Array:
    """Edges of equal blocks over `size`: 0, step, 2 step, ..., size."""
    return np.append(np.arange(0, size, step), size) if size else np.zeros(1, dtype=np.int64)


def classify(bounds: Bounds, row_edges: Array, column_edges: Array) -> Tiles:
    """The class of every tile between the edges."""
    starts = column_edges[:-1]
    if not len(starts) or len(row_edges) < 2:
        shape = (len(row_edges) - 1, len(starts))
        return Tiles(row_edges, column_edges, np.zeros(shape, dtype=np.int8))
    r0, r1 = row_edges[:-1, None], row_edges[1:, None]
    masked = np.zeros((len(r0), len(starts)), dtype=bool)
    touched = masked.copy()
    for start, end in ((bounds.lts, bounds.lte), (bounds.uts, bounds.ute)):
        last_start, first_start = np.maximum.reduceat(start, starts), np.minimum.reduceat(start, starts)
        last_end, first_end = np.maximum.reduceat(end, starts), np.minimum.reduceat(end, starts)
        masked |= (r0 >= last_start) & (r1 <= first_end)
        touched |= (r1 > first_start) & (r0 < last_end)
    if bounds.causal:
        shift = bounds.nk - bounds.nq
        masked |= starts > r1 - 1 + shift
        touched |= column_edges[1:] - 1 > r0 + shift
    classes = np.where(masked, MASKED, np.where(touched, PARTIAL, VISIBLE)).astype(np.int8)
    return Tiles(row_edges, column_edges, classes)


def own_edges(bounds: Bounds) -> tuple[Array, Array]:
    """Row and column edges that follow the mask's own borders (documents, say) where these are few."""
    values = np.unique(np.concatenate([bounds.lts, bounds.lte, bounds.uts, bounds.ute]))
    rows = values[(values > 0) & (values < bounds.nq)]
    if len(rows) * FEWEST_ROWS > bounds.nq:
        rows = rows[:0]
    together = np.stack([bounds.lts, bounds.lte, bounds.uts, bounds.ute])
    columns = np.flatnonzero((together[:, 1:] != together[:, :-1]).any(0)) + 1
    if len(columns) * COLUMNS > bounds.nk:
        columns = columns[:0]
    row_edges = _subdivided(rows, bounds.nq, ROWS)
    column_edges = np.union1d(columns, grid(bounds.nk, COLUMNS))
    if bounds.causal:  # the diagonal's tile ends where its rows do
        diagonal = row_edges + (bounds.nk - bounds.nq)
        column_edges = np.union1d(column_edges, diagonal[(diagonal > 0) & (diagonal < bounds.nk)])
    return row_edges, column_edges


def _subdivided(inner: Array, size: int, most: int) -> Array:
    """Edges at 0, `inner` and `size`, between them like parts of at most `most`, multiples of EVEN."""
    edges = np.concatenate([[0], inner, [size]]).astype(np.int64)
    parts = [
        a + np.ceil(np.linspace(0, b - a, -(-(b - a) // most) + 1)[:-1] / EVEN).astype(np.int64) * EVEN
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if b > a
    ]
    return np.append(np.concatenate(parts), size) if parts else np.zeros(1, dtype=np.int64)


def steps(tiles: Tiles) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """What to compute, row block by row block: (first row, last row, [(first column, last column, class)]).

    Neighbouring columns of one class are one range; a row block that sees nothing has no ranges.
    """
    found = []
    edges = tiles.column_edges.tolist()
    for row, classes in enumerate(tiles.classes):
        changes = np.flatnonzero(np.diff(classes)) + 1
        starts = [0, *changes.tolist()] if len(classes) else []
        ends = [*starts[1:], len(classes)]
        ranges = [
            (edges[a], edges[b], int(classes[a]))
            for a, b in zip(starts, ends, strict=True)
            if classes[a] != MASKED
        ]
        found.append((int(tiles.row_edges[row]), int(tiles.row_edges[row + 1]), ranges))
    return found
