"""Ring attention: every rank keeps its queries; keys and values go round (arXiv 2310.01889).

At each of `cp` steps a rank attends from its own rows to the keys that have come to it, and merges what it
finds by the log-sum-exp: for parts a and b of the keys, out = out_a + share * (out_b - out_a), where share =
sigmoid(lse_b - lse_a) is the part of the whole softmax that lies in b. Sums are fp32 (fp64 for fp64) whatever
the inputs are, and the steps are taken in one order, so the same inputs give the same bits.

The backward pass needs the final out and log-sum-exp alone: with them the gradients of one set of keys are
those of the whole softmax (`kernels.attention.attention_gradients`). Keys and values go round again, and
their gradients with them: what the ranks add on the way arrives home after `cp` shifts.

Memory of a rank with n = S / cp tokens; Q, K, V and O are the bytes of its queries, keys, values and outputs,
Q', K', V' and O' those of as many numbers in fp32:

    kept for the backward pass  Q + K + V + O, and 4 n H of the log-sum-exp
    forward, beside q, k, v     2 (K + V) the keys at hand and those that arrive, O' merged, O + O' of a step
                                (O alone where O is fp32), K' + V' in which the kernel turns keys heads first
    backward, beside the kept   O the gradient that comes, Q' + Q' of the queries and a step's part of it,
                                2 (K + V) as above, 2 (K' + V') the sum that leaves and the one that arrives,
                                3 (K' + V') in the kernel: keys, their gradients, and these turned back

That is O(S / cp), in fp32 at most 5 Q + 8 (K + V) in all, and K + V more on a rank that runs ahead of the
next one, for the pair that is still leaving. What is O(S) are the bounds of the whole mask and
of its cuts, 16 bytes a token each.

Traps. A row may see nothing at a step, or at all: its log-sum-exp is -inf, and -inf - (-inf) is no number. A
step of which the mask hides everything computes nothing, but passes on all the same, or the ring breaks. The
gradients travel in fp32: rounded to bf16 at each rank they would lose what late ranks add. Two rings are
under way at once in the backward pass, between the same neighbours; they stay apart because each rank starts
them in the same order.

It is an operator of torch's library rather than a plain autograd function, so that selective recompute can
keep its result: of a function it would keep the inner products one by one, `cp` times the output. The
operator is given the ring as an object that torch does not look into.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from ..kernels.attention import attention_gradients, flashmask_attention
from ..kernels.config import Path
from ..kernels.dispatch import at_least_fp32
from ..kernels.flashmask.mask import ColumnMask
from .collectives import Shift, ring_shift
from .mesh import Axis

Cuts = tuple[ColumnMask | None, ...]  # by rank: what the own rows see of its keys; None where that is nothing


class Ring(OpaqueBase):
    """What ring attention needs beside tensors; the mask is cut when it first computes something."""

    def __init__(self, axis: Axis, path: Path, cuts: Callable[[], Cuts]) -> None:
        self.axis, self.path, self._cuts = axis, path, cuts

    def cut(self, step: int) -> ColumnMask | None:
        """The mask of the keys that are here at `step`."""
        return self._cuts()[(self.axis.rank - step) % self.axis.size]


register_opaque_type(Ring, typ="reference")


@torch.library.custom_op("rayfold::ring_attention", mutates_args=())
def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, n, H, D], k and v [B, n, Hk, D] of this rank -> out as q, and its log-sum-exp fp32 [B, H, n]."""
    wide, last = at_least_fp32(q.dtype), ring.axis.size - 1
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=wide, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide, device=q.device)
    for step in range(ring.axis.size):
        # sent before anything is computed, so that they travel meanwhile
        coming = ring_shift([k, v], ring.axis) if step < last else None
        if (cut := ring.cut(step)) is not None:
            found = flashmask_attention(q, k, v, cut, scale, return_lse=True, path=ring.path)
            _merge(out, lse, *found)
            del found
        if coming is not None:
            k, v = coming.wait()
        del coming  # and with it what has left
    return out.to(q.dtype), lse


def _merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Take the attention to more keys into `out` and `lse`."""
    share = torch.sigmoid(more_lse - lse).nan_to_num_(0.0)  # nan: neither part has seen a key
    out.lerp_(more.to(out.dtype), share.transpose(1, 2)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


@ring_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=at_least_fp32(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


@torch.library.custom_op("rayfold::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ring: Ring,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of this rank's q, k and v, in their dtype."""
    axis, wide = ring.axis, at_least_fp32(q.dtype)
    grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    passing: Shift | None = None
    for step in range(axis.size):
        coming = ring_shift([k, v], axis) if step < axis.size - 1 else None
        own: list[torch.Tensor] | None = None
        if (cut := ring.cut(step)) is not None:
            rows, *own = attention_gradients(grad_out, q, k, v, out, lse, cut, scale, path=ring.path)
            grad_q += rows
            del rows
        sums = _added(passing, own, [k, v], wide)
        del own, passing
        # the next rank has these keys at its next step; after the last step it is the one that they belong to
        passing = ring_shift(sums, axis)
        del sums
        if coming is not None:
            k, v = coming.wait()
        del coming
    assert passing is not None, "an axis has a rank"
    grad_k, grad_v = passing.wait()
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@ring_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ring: Ring,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _added(
    passing: Shift | None, own: list[torch.Tensor] | None, like: list[torch.Tensor], wide: torch.dtype
) -> list[torch.Tensor]:
    """The gradients that have come from the rank before, where there was one, with this rank's added."""
    if passing is None:
        return own or [torch.zeros(x.shape, dtype=wide, device=x.device) for x in like]
    sums = passing.wait()
    for total, part in zip(sums, own or (), strict=own is not None):
        total += part
    return sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.ring, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    assert grad_lse is None, "the log-sum-exp of ring attention is given without a gradient"
    return *ring_attention_backward(grad_out, *ctx.saved_tensors, ctx.ring, ctx.scale), None, None


ring_attention.register_autograd(_backward, setup_context=_save)
