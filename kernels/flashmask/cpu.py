"""Attention under a column mask on the CPU: row block by row block, one softmax over the columns that it
sees.

A row block gathers the columns of its computed tiles, so there is nothing to merge: scores, softmax, product
with the values. The backward pass computes the scores again. Memory is linear in the sequence: no more than
ROWS rows of scores of one key head exist at a time.

Scores and softmax are fp32 (fp64 stays fp64); the factors of the other products are bf16 when the inputs are
and the processor multiplies bf16. Made of products, this is faster than torch's fused attention for the CPU,
which walks 512 columns at a time and so computes the hidden half of short causal rows.

The two passes are operators of torch's library, so that recompute can keep the result of the first instead of
every score in it, and a compiler passes around both.
"""

from dataclasses import dataclass
from math import inf

import torch

from ..linear import dense_product
from .plan import Step, decode


@dataclass(frozen=True)
class _Heads:
    """Query heads that one mask head covers and one key head serves."""

    query: slice
    key: int


def _heads_of(head: int, mask_heads: int, query_heads: int, key_heads: int) -> list[_Heads]:
    group = query_heads // key_heads
    if mask_heads == query_heads and group > 1:
        return [_Heads(slice(head, head + 1), head // group)]
    per_mask = key_heads // min(mask_heads, key_heads)
    keys = range(head * per_mask, (head + 1) * per_mask)
    return [_Heads(slice(key * group, (key + 1) * group), key) for key in keys]


def _work_type(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _product_type(q: torch.Tensor) -> torch.dtype:
    """Type of the factors of all products but the scores: bf16 where the processor multiplies it."""
    if q.dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return _work_type(q)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return dense_product(a, b) if a.dtype == torch.float32 else a @ b


def _heads_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, N, H, D] -> [B, H, N, D], contiguous."""
    return x.transpose(1, 2).to(dtype).contiguous()


def _rows(x: torch.Tensor, step: Step, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a step, heads first: [B, N, H, D] -> [H, R, D], contiguous."""
    return x[step.batch, step.first : step.last].transpose(0, 1).to(dtype).contiguous()


def _columns(x: torch.Tensor, step: Step) -> tuple[torch.Tensor, ...]:
    """The columns of a step, head by head: [B, H, N, D] -> H times [C, D]."""
    spans: list[list[int]] = []
    for first, last, _ in step.ranges:
        if spans and spans[-1][1] == first:
            spans[-1][1] = last
        else:
            spans.append([first, last])
    parts = [x[step.batch, :, first:last] for first, last in spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).unbind(0)


@dataclass(frozen=True)
class _Hidden:
    """What a step hides: masks [R, c] of columns of its scores, and the rows [R, 1] that see nothing."""

    masks: list[tuple[int, torch.Tensor]]  # (first column among those of the step, mask)
    blind: torch.Tensor | None


def _hidden(step: Step, bounds: torch.Tensor, shift: int | None) -> _Hidden:
    """`bounds` [4, Nk] are lts, lte, uts, ute; `shift` is Nk - Nq of a causal mask."""
    rows = torch.arange(step.first, step.last, dtype=torch.int32)[:, None]
    blind = torch.ones_like(rows, dtype=torch.bool)
    masks, at = [], 0
    for first, last, partial in step.ranges:
        if partial:
            lts, lte, uts, ute = bounds[:, first:last]
            mask = ((rows >= lts) & (rows < lte)) | ((rows >= uts) & (rows < ute))
            if shift is not None:
                mask |= rows < torch.arange(first - shift, last - shift, dtype=torch.int32)
            masks.append((at, mask))
            blind &= mask.all(-1, keepdim=True)
        else:
            blind.zero_()
        at += last - first
    return _Hidden(masks, blind if bool(blind.any()) else None)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, hidden: _Hidden, lse: torch.Tensor | None
) -> torch.Tensor:
    """Scaled queries [G, R, D] and keys [C, D] -> probabilities [G * R, C]; fills `lse` [G, R] if given."""
    scores = _matmul(q.flatten(0, 1), k.t()).view(*q.shape[:2], -1)
    for at, mask in hidden.masks:
        scores[..., at : at + mask.shape[1]].masked_fill_(mask, -inf)
    if hidden.blind is not None:
        scores.masked_fill_(hidden.blind, 0.0)  # any finite row: its probabilities are set to zero below
    if lse is not None:
        lse.copy_(scores.amax(-1))
    probabilities = torch.softmax(
        scores, -1, out=scores
    )  # in place: two of them would not fit a core's cache
    if lse is not None:
        lse -= probabilities.amax(-1).log_()  # the largest probability is exp(largest score - log-sum-exp)
    if hidden.blind is not None:
        probabilities.masked_fill_(hidden.blind, 0.0)
        if lse is not None:
            lse.masked_fill_(hidden.blind[:, 0], -inf)
    return probabilities.flatten(0, 1)


@torch.library.custom_op("rayfold::masked_attention", mutates_args=())
def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    plan: torch.Tensor,
    causal: bool,
    scale: float,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Nq, H, D], k, v [B, Nk, Hk, D], bounds int32 [4, B, Hm, Nk] -> out, lse fp32 [B, H, Nq].

    The log-sum-exp is empty, [B, H, 0], where it is not wanted.
    """
    work, narrow = _work_type(q), _product_type(q)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1] if want_lse else 0), -inf, dtype=work)
    keys, values = _heads_first(k, work), _heads_first(v, narrow)
    shift = k.shape[1] - q.shape[1] if causal else None
    for step in decode(plan):
        if not step.ranges:
            continue
        queries = _rows(q, step, work) * scale  # not in place: it may be a view of q
        hidden = _hidden(step, bounds[:, step.batch, step.head], shift)
        own_keys, own_values = _columns(keys, step), _columns(values, step)
        rows = slice(step.first, step.last)
        for heads in _heads_of(step.head, bounds.shape[2], q.shape[2], k.shape[2]):
            own_q = queries[heads.query]
            own_lse = lse[step.batch, heads.query, rows] if want_lse else None
            probabilities = _probabilities(own_q, own_keys[heads.key], hidden, own_lse)
            mixed = _matmul(probabilities.to(narrow), own_values[heads.key]).view(*own_q.shape[:2], -1)
            out[step.batch, rows, heads.query] = mixed.transpose(0, 1)
    return out, lse


@masked_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    plan: torch.Tensor,
    causal: bool,
    scale: float,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1] if want_lse else 0, dtype=_work_type(q))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


@torch.library.custom_op("rayfold::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    plan: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, summed over row blocks in the working type and in the order of the plan."""
    work, narrow = _work_type(q), _product_type(q)
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    keys, values = _heads_first(k, work), _heads_first(v, narrow)
    narrow_keys = keys if narrow == work else _heads_first(k, narrow)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values, dtype=work)
    shift = k.shape[1] - q.shape[1] if causal else None
    for step in decode(plan):
        if not step.ranges:
            continue
        queries, grads = _rows(q, step, work) * scale, _rows(grad_out, step, narrow)
        hidden = _hidden(step, bounds[:, step.batch, step.head], shift)
        own_keys, own_values, factors = (_columns(x, step) for x in (keys, values, narrow_keys))
        rows = slice(step.first, step.last)
        for heads in _heads_of(step.head, bounds.shape[2], q.shape[2], k.shape[2]):
            own_q, grad = queries[heads.query], grads[heads.query].flatten(0, 1)
            probabilities = _probabilities(own_q, own_keys[heads.key], hidden, None)
            grad_p = _matmul(grad, own_values[heads.key].t()).to(work)
            # p * (grad_p - sum(p * grad_p)): zero wherever p is, so hidden scores and blind rows get none
            grad_s = torch.ops.aten._softmax_backward_data.out(
                grad_p, probabilities, -1, work, grad_input=grad_p
            )
            if grad_lse is not None:
                own = grad_lse[step.batch, heads.query, rows].reshape(-1, 1)
                grad_s.addcmul_(probabilities, own.to(work))
            grad_s = grad_s.to(narrow)
            _add(grad_values, step, heads.key, _matmul(probabilities.to(narrow).t(), grad))
            _add(grad_keys, step, heads.key, _matmul(grad_s.t(), own_q.flatten(0, 1).to(narrow)))
            grad_rows = _matmul(grad_s, factors[heads.key]).view(own_q.shape)
            grad_q[step.batch, rows, heads.query] = grad_rows.mul_(scale).transpose(0, 1)
    grad_k, grad_v = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (grad_keys, grad_values))
    return grad_q, grad_k, grad_v


@masked_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    plan: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]


def _add(total: torch.Tensor, step: Step, head: int, part: torch.Tensor) -> None:
    """Add a part [columns, D] to the columns of a step: total [B, H, N, D]."""
    at = 0
    for first, last, _ in step.ranges:
        total[step.batch, head, first:last] += part[at : at + last - first]
        at += last - first


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bounds, plan, ctx.causal, ctx.scale, ctx.want_lse = inputs
    ctx.save_for_backward(q, k, v, bounds, plan)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, bounds, plan = ctx.saved_tensors
    if grad_out is None:
        grad_out = q.new_zeros(*q.shape[:3], v.shape[-1])
    if not ctx.want_lse:
        grad_lse = None
    grads = masked_attention_backward(grad_out, grad_lse, q, k, v, bounds, plan, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


masked_attention.register_autograd(_backward, setup_context=_save)
