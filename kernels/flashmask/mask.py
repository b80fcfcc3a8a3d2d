"""Which scores of attention are hidden, said column by column (FlashMask, arXiv 2410.01359).

For key column j up to two intervals of query rows are hidden, and with `causal` all rows above the diagonal,
which is aligned at the bottom right when there are fewer or more queries than keys:

    masked(i, j) = lts[j] <= i < lte[j]  or  uts[j] <= i < ute[j]  or  (causal and i < j - (Nk - Nq))

Four integers a column say what a dense mask says with Nq bits: memory is linear in the sequence. Shapes: B
batch, Hm mask heads (1, or as many as key or query heads), Nq queries, Nk keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .blocks import Bounds, classify, grid
from .plan import encode

BOUNDS = ("lts", "lte", "uts", "ute")


class MaskError(ValueError):
    """Bounds that say no mask, or a mask that does not fit its queries and keys."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnMask:
    """Bounds of the hidden rows of every key column, each int32 [B, Hm, Nk]; rows count from 0 to `nq`.

    "Nothing hidden" is lts = lte = nq and uts = ute = 0. Raises MaskError when shapes or types differ.
    """

    lts: torch.Tensor
    lte: torch.Tensor
    uts: torch.Tensor
    ute: torch.Tensor
    causal: bool
    nq: int
    trivial: frozenset[str] = (
        frozenset()
    )  # "lte", "upper": known to hide nothing more, so a GPU need not look

    def __post_init__(self) -> None:
        shape = self.lts.shape
        for name in BOUNDS:
            bound: torch.Tensor = getattr(self, name)
            if bound.shape != shape or bound.ndim != 3 or bound.dtype != torch.int32:
                raise MaskError(
                    f"{name} is {bound.dtype} {list(bound.shape)}; all four bounds are int32 of one shape "
                    f"[batch, mask heads, keys], as lts {list(shape)} should be"
                )

    @staticmethod
    def from_paddle(indices: torch.Tensor, *, causal: bool, nq: int) -> "ColumnMask":
        """From `startend_row_indices` int32 [B, Hm, Nk, n] of FlashMask's public interface.

        The last dimension holds [LTS] or [LTS, LTE] when causal, [LTS, UTE] or [LTS, LTE, UTS, UTE]
        otherwise. Raises MaskError for any other number, which the two readings of n = 2 make easy to get
        wrong.
        """
        allowed = (1, 2) if causal else (2, 4)
        n = indices.shape[-1]
        if n not in allowed:
            raise MaskError(
                f"the last dimension is {n}; with causal={causal} it has {allowed[0]} or {allowed[1]} bounds"
            )
        given = [bound.contiguous() for bound in indices.clamp(0, nq).to(torch.int32).unbind(-1)]
        none, end = torch.zeros_like(given[0]), torch.full_like(given[0], nq)
        if causal:
            lts, lte, uts, ute = given[0], given[1] if n == 2 else end, none, none
        elif n == 2:
            lts, lte, uts, ute = given[0], end, none, given[1]
        else:
            lts, lte, uts, ute = given
        trivial = {"lte": n < 4 - 2 * causal, "upper": causal}
        known = frozenset(name for name, is_trivial in trivial.items() if is_trivial)
        return ColumnMask(lts=lts, lte=lte, uts=uts, ute=ute, causal=causal, nq=nq, trivial=known)

    @property
    def nk(self) -> int:
        """Number of keys."""
        return self.lts.shape[-1]

    @property
    def heads(self) -> int:
        """Number of mask heads."""
        return self.lts.shape[1]

    def dense(self) -> torch.Tensor:
        """True where a score is hidden: bool [B, Hm, Nq, Nk]. Quadratic: for tests and the plain path."""
        rows = torch.arange(self.nq, device=self.lts.device)[:, None]
        hidden = self.hidden(rows, 0, self.nk)
        return hidden.expand(*self.lts.shape[:2], self.nq, self.nk)

    def hidden(self, rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The same for query `rows` [R, 1] and the columns from `first` to `last`: bool [B, Hm, R, C]."""
        lts, lte, uts, ute = (getattr(self, name)[..., None, first:last] for name in BOUNDS)
        hidden = ((rows >= lts) & (rows < lte)) | ((rows >= uts) & (rows < ute))
        if self.causal:
            columns = torch.arange(first, last, device=rows.device)
            hidden = hidden | (rows < columns - (self.nk - self.nq))
        return hidden

    def part(self, rows: torch.Tensor, columns: torch.Tensor) -> "ColumnMask":
        """The mask of some query rows and some keys: their places [R] and [C], each in ascending order.

        An interval of rows stays one, as the rows that are left keep their order. The diagonal stays where
        `columns is rows`, which are then a square of the whole; elsewhere it becomes the upper interval of
        each column. Raises MaskError where a causal mask has an upper interval of its own already.
        """
        lts, lte, uts, ute = (getattr(self, name)[..., columns] for name in BOUNDS)
        causal, known = self.causal, self.trivial
        if causal and (columns is not rows or self.nq != self.nk):
            if "upper" not in known and bool((ute > uts).any()):
                raise MaskError(
                    "a causal mask with an upper interval of its own cannot be cut off the diagonal; write "
                    "the diagonal into its bounds and drop causal"
                )
            uts, ute = torch.zeros_like(uts), (columns - (self.nk - self.nq)).expand_as(ute)
            causal, known = False, known - {"upper"}
        places = rows.to(torch.int32)
        cut: dict[str, Any] = {
            name: torch.searchsorted(places, bound.to(torch.int32).contiguous(), out_int32=True)
            for name, bound in zip(BOUNDS, (lts, lte, uts, ute), strict=True)
        }
        return ColumnMask(**cut, causal=causal, nq=len(rows), trivial=known)

    @property
    def hides_all(self) -> torch.Tensor:
        """Whether no score can be seen, on the device: bool []. A causal mask's diagonal is not looked at."""
        whole = torch.zeros_like(self.lts, dtype=torch.bool)
        lower, upper = (self.lts, self.lte), (self.uts, self.ute)
        for (start, end), (other, last) in ((lower, upper), (upper, lower)):
            # one interval from the first row on, the other from within it to the last, or nothing
            after = torch.where(other <= end, torch.maximum(end, last), end)
            whole |= (start <= 0) & (after >= self.nq)
        return whole.all()

    def bounds(self, batch: int, head: int) -> Bounds:
        """The bounds of one mask head on the host."""
        host: dict[str, Any] = {name: getattr(self, name)[batch, head].cpu().numpy() for name in BOUNDS}
        return Bounds(**host, causal=self.causal, nq=self.nq)

    def density(self, rows: int = 128, columns: int = 128) -> float:
        """Share of the scores in tiles of rows x columns that hold a visible one: what attention costs."""
        edges = grid(self.nq, rows), grid(self.nk, columns)
        places = [(b, h) for b in range(self.lts.shape[0]) for h in range(self.heads)]
        return sum(classify(self.bounds(*p), *edges).density for p in places) / max(len(places), 1)

    @cached_property
    def plan(self) -> torch.Tensor:
        """What the CPU path computes, made once a mask: int64 [n]; empty beside pretended tensors."""
        if isinstance(self.lts, FakeTensor):
            return self.lts.new_empty(0, dtype=torch.int64)
        return encode((b, h, self.bounds(b, h)) for b in range(self.lts.shape[0]) for h in range(self.heads))

    @property
    def for_device(self) -> tuple[torch.Tensor | None, ...]:
        """(lts, lte, uts, ute) with None for bounds that are known to hide nothing."""
        lte = None if "lte" in self.trivial else self.lte
        upper = (None, None) if "upper" in self.trivial else (self.uts, self.ute)
        return self.lts, lte, *upper

    @cached_property
    def stacked(self) -> torch.Tensor:
        """All bounds: int32 [4, B, Hm, Nk]."""
        return torch.stack([getattr(self, name) for name in BOUNDS])
