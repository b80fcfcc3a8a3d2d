"""Context parallelism: one sequence over the ranks of an axis, S / cp tokens on each.

Everything but attention works on tokens one by one and needs nothing of this. Where tokens meet, the core of
a model's attention (`Role.ATTENTION` of its plan) is given the rank's own q, k and v and the mask of the
whole sequence, and one of two things happens:

`ring` (arXiv 2310.01889): keys and values go round, see `parallel/ring.py`. Of 2 cp chunks of the sequence
rank i holds i and 2 cp - 1 - i, so that under a causal mask all have the same to compute. Any number of heads
will do.

`ulysses` (arXiv 2309.14509): an all-to-all gives each rank some heads of the whole sequence, attention runs
as on one rank, and another all-to-all brings the tokens home. A rank holds a contiguous part; cp must divide
the query heads. Where it does not divide the key heads too, each is sent to every rank that has queries for
it, and its gradients are summed there.

What a rank sends for one layer and micro-batch of B sequences; n = S / cp tokens, H query and Hk key heads of
size D, e bytes a number:

    ring     forward   (cp - 1) B n 2 Hk D e
             backward  the same, and cp B n 2 Hk D 4 for the gradients
    ulysses  forward   (cp - 1) / cp B n (2 H + 2 Hk c) D e, with c = cp / gcd(cp, Hk) copies
             backward  the same

Full recompute sends what the forward pass did once more; selective recompute keeps the ring's result, and
repeats the exchanges of Ulysses, which are no products.

A trap of both: rotary positions are those of the whole sequence, so positions are cut like tokens, and
document ids are not cut at all, for the mask is made of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels.config import Path
from ..kernels.flashmask.mask import ColumnMask
from .collectives import all_to_all
from .mesh import Axis, FoldedMesh
from .plan import ModelPlan, PlanError, Role
from .ring import Cuts, Ring, ring_attention

Kind = Literal["ring", "ulysses"]
Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ColumnMask], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ContextSplit:
    """Which tokens of a sequence this rank holds, and what its part of attention sees of a mask."""

    kind: Kind
    axis: Axis
    # by mask, as long as somebody uses it: layers share one, and micro-batches in flight have one each
    _cuts: WeakKeyDictionary[ColumnMask, Cuts] = field(default_factory=WeakKeyDictionary, init=False)

    def index(self, seq_len: int, device: torch.device | None = None) -> torch.Tensor:
        """Places in the whole sequence of the tokens held here, ascending: int64 [S/cp]."""
        return self._index_of(self.axis.rank, seq_len, device)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of something that is there for every token: [B, S, ...] -> [B, S/cp, ...]."""
        return x if self.axis.size == 1 else x.index_select(1, self.index(x.shape[1], x.device))

    def cuts(self, mask: ColumnMask) -> Cuts:
        """What the rows held here see of the keys of each rank of the ring."""
        if mask not in self._cuts:
            places = [self._index_of(rank, mask.nq, mask.lts.device) for rank in range(self.axis.size)]
            parts = [mask.part(places[self.axis.rank], columns) for columns in places]
            # a device is waited for here, once a mask
            hidden = torch.stack([part.hides_all for part in parts]).tolist()
            self._cuts[mask] = tuple(
                None if nothing else part for nothing, part in zip(hidden, parts, strict=True)
            )
        return self._cuts[mask]

    def _index_of(self, rank: int, seq_len: int, device: torch.device | None) -> torch.Tensor:
        size = self.axis.size
        chunks = 2 * size if self.kind == "ring" else size
        assert seq_len % chunks == 0, (
            f"{self.kind} over {size} ranks cuts a sequence into {chunks} equal chunks, and {seq_len} tokens "
            f"do not divide by that; {seq_len // chunks * chunks or chunks} do"
        )
        if self.kind == "ulysses":
            return torch.arange(seq_len, device=device).view(size, -1)[rank]
        return torch.arange(seq_len, device=device).view(chunks, -1)[[rank, chunks - 1 - rank]].flatten()


def apply_context(model: nn.Module, plan: ModelPlan, mesh: FoldedMesh, kind: Kind) -> None:
    """Have the attention cores of `model` work over `mesh.cp`, in place. Raises PlanError if its plan names
    none.
    """
    axis = mesh.cp
    if axis.size == 1:
        return
    if Role.ATTENTION not in plan.modules.values():
        raise PlanError(
            f"cp = {axis.size} splits sequences, and the plan of {type(model).__name__} names no attention "
            "core (Role.ATTENTION), so tokens of different ranks would never meet; use cp = 1, or name it"
        )
    split = ContextSplit(kind, axis)
    for core in plan.modules_with(Role.ATTENTION, model):
        path: Any = core.path
        attend = partial(_ring, split, path) if kind == "ring" else partial(_ulysses, split, core.forward)
        # a compiler stops here: it can neither order the exchanges nor look up the cuts of a mask
        core.forward = torch.compiler.disable(attend)


def _ring(
    split: ContextSplit, path: Path, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask
) -> torch.Tensor:
    """q [B, n, H, D], k and v [B, n, Hk, D] of this rank and the mask of all -> [B, n, H, D]."""
    out, _ = ring_attention(q, k, v, Ring(split.axis, path, partial(split.cuts, mask)), q.shape[-1] ** -0.5)
    return out


def _ulysses(
    split: ContextSplit, attend: Core, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask
) -> torch.Tensor:
    """q [B, n, H, D], k and v [B, n, Hk, D] of this rank and the mask of all -> [B, n, H, D]."""
    axis, heads = split.axis, q.shape[2]
    assert heads % axis.size == 0, (
        f"ulysses gives each of {axis.size} ranks as many heads, and {heads} query heads do not divide by "
        "that; the ring takes any number"
    )
    assert mask.heads == 1, (
        f"ulysses takes a mask that all heads share, this one has {mask.heads}; the ring takes both"
    )
    copies = axis.size // gcd(axis.size, k.shape[2])
    if copies > 1:
        k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    # one exchange for all three: what goes to a rank lies side by side, [B, n, cp, numbers]
    dealt = [x.unflatten(2, (axis.size, -1)).flatten(3) for x in (q, k, v)]
    arrived = all_to_all(torch.cat(dealt, -1), 2, 1, axis).squeeze(2)
    own = arrived.split([x.shape[-1] for x in dealt], -1)
    q, k, v = (part.unflatten(-1, (-1, x.shape[-1])) for part, x in zip(own, (q, k, v), strict=True))
    return all_to_all(attend(q, k, v, mask), 1, 2, axis)
