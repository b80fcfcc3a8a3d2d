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

from math import inf

import torch

from ..linear import dense_product
from .gather import Columns, Hidden, add_columns, heads_of, hidden_of, read_rows, write_rows
from .plan import decode

SMALL_PRODUCT = 1 << 20  # multiplications and additions; below it torch's own was measured as fast or faster


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
    """By oneDNN in fp32, but for products so small that calling it is most of their time."""
    large = a.dtype == torch.float32 and a.numel() * b.shape[1] >= SMALL_PRODUCT
    return dense_product(a, b) if large else a @ b


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    group: int,
    hidden: Hidden,
    lse: torch.Tensor | None = None,
    *,
    careful: bool = False,
) -> torch.Tensor:
    """Scaled queries [M, D] of `group` heads, keys [W, D] -> probabilities [M, W]; fills `lse` [G, R]."""
    flat = _matmul(q, k.t())
    scores = hidden.scores(flat, group)
    for part, limit in hidden.parts(scores):
        if careful:
            part.masked_fill_(limit < 0, -inf)
        else:
            torch.minimum(part, limit, out=part)  # a sixth of masked_fill_'s time
    if hidden.blind is not None:
        scores.masked_fill_(hidden.blind, 0.0)  # any finite row: its probabilities are set to zero below
    if lse is not None:
        lse.copy_(scores.amax(-1))
    torch.softmax(flat, -1, out=flat)  # in place: two of them would not fit a core's cache
    if hidden.limits and not careful and bool(flat[:, 0].sum().isnan()):
        # the minimum with a NaN is one, and a row with one is full of them: a hidden key may have done that
        return _probabilities(q, k, group, hidden, lse, careful=True)
    if lse is not None:
        lse -= scores.amax(-1).log_()  # the largest probability is exp(largest score - log-sum-exp)
    if hidden.blind is not None:
        scores.masked_fill_(hidden.blind, 0.0)
        if lse is not None:
            lse.masked_fill_(hidden.blind[:, 0], -inf)
    return flat


def _shares(q: torch.Tensor, k: torch.Tensor, hidden: Hidden, lse: torch.Tensor) -> torch.Tensor:
    """Scaled queries [M, D], keys [W, D], log-sum-exp [G, R] -> exp(score - log-sum-exp) [M, W]."""
    flat = _matmul(q, k.t())
    scores = hidden.scores(flat, len(lse))
    for part, limit in hidden.parts(scores):
        torch.minimum(part, limit, out=part)
    # a row that sees nothing anywhere has -inf: with inf in its place all its shares are 0
    scores.sub_(lse.masked_fill(lse == -inf, inf)[..., None]).exp_()
    for part, limit in hidden.parts(scores):
        if bool(part.sum().isnan()):
            part.masked_fill_(limit < 0, 0.0)
    return flat


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
    steps, shift = decode(plan), k.shape[1] - q.shape[1] if causal else None
    counts = bounds.shape[2], q.shape[2], k.shape[2]
    own = heads_of(0, *counts).keys
    keys, values = Columns(k, steps, own, work), Columns(v, steps, own, narrow)
    for step in steps:
        heads = heads_of(step.head, *counts)
        queries = read_rows(q, step, heads, work).mul_(scale).unbind(0)
        hidden = hidden_of(step, bounds[:, step.batch, step.head], shift, work)
        lse_rows = lse[step.batch, heads.queries, step.first : step.last].split(heads.group)
        mixed = []
        for i, (key, value) in enumerate(zip(keys.read(step, heads), values.read(step, heads), strict=True)):
            own_lse = lse_rows[i] if want_lse else None
            probabilities = _probabilities(queries[i], key, heads.group, hidden, own_lse)
            mixed.append(_matmul(probabilities.to(narrow), value))
        write_rows(out, step, heads, mixed)
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
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, summed over row blocks in the working type and in the order of the plan.

    With `lse` [B, H, Nq] and `out` [B, Nq, H, Dv] of a softmax over more keys than these, the part of its
    gradients that belongs to these, in the working type: more parts will be added to it.
    """
    work, narrow = _work_type(q), _product_type(q)
    kept = q.dtype if lse is None else work
    grad_q = torch.zeros_like(q, dtype=kept, memory_format=torch.contiguous_format)
    steps, shift = decode(plan), k.shape[1] - q.shape[1] if causal else None
    counts = bounds.shape[2], q.shape[2], k.shape[2]
    own = heads_of(0, *counts).keys
    keys, values = Columns(k, steps, own, work), Columns(v, steps, own, narrow)
    narrow_keys = keys if narrow == work else Columns(k, steps, own, narrow)
    grad_keys, grad_values = (
        x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=work) for x in (k, v)
    )
    for step in steps:
        heads = heads_of(step.head, *counts)
        queries = read_rows(q, step, heads, work).mul_(scale).unbind(0)
        grads = read_rows(grad_out, step, heads, narrow).unbind(0)
        hidden = hidden_of(step, bounds[:, step.batch, step.head], shift, work)
        columns = (x.read(step, heads) for x in (keys, values, narrow_keys))
        lse_rows, grad_lse_rows = (
            None if x is None else x[step.batch, heads.queries, step.first : step.last].split(heads.group)
            for x in (lse, grad_lse)
        )
        mixed = None if out is None else read_rows(out, step, heads, work)
        grad_rows = []
        for i, (key, value, factor) in enumerate(zip(*columns, strict=True)):
            if lse_rows is None:
                probabilities = _probabilities(queries[i], key, heads.group, hidden)
            else:
                probabilities = _shares(queries[i], key, hidden, lse_rows[i])
            grad_p = _matmul(grads[i], value.t()).to(work)
            # p * (grad_p - sum(p * grad_p)): zero wherever p is, so hidden scores and blind rows get none
            if mixed is None:
                grad_s = torch.ops.aten._softmax_backward_data.out(
                    grad_p, probabilities, -1, work, grad_input=grad_p
                )
            else:
                # the sum runs over keys that are not here; it is that of out * grad_out
                grad_s = grad_p.sub_((mixed[i] * grads[i]).sum(-1, keepdim=True)).mul_(probabilities)
            used = heads.group * hidden.rows
            if grad_lse_rows is not None:
                grad_s[:used].addcmul_(probabilities[:used], grad_lse_rows[i].reshape(-1, 1).to(work))
            if len(grad_s) > used:
                grad_s[used:].zero_()  # a hidden value that is not a number would be one of their factors
            grad_s = grad_s.to(narrow)
            add_columns(
                grad_values, step, heads.first_key + i, _matmul(probabilities.to(narrow).t(), grads[i])
            )
            add_columns(grad_keys, step, heads.first_key + i, _matmul(grad_s.t(), queries[i].to(narrow)))
            grad_rows.append(_matmul(grad_s, factor).mul_(scale))
        write_rows(grad_q, step, heads, grad_rows)
    grad_k, grad_v = (x.transpose(1, 2).to(kept).contiguous() for x in (grad_keys, grad_values))
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
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = q.dtype if lse is None else _work_type(q)
    return (
        q.new_empty(q.shape, dtype=kept),
        q.new_empty(k.shape, dtype=kept),
        q.new_empty(v.shape, dtype=kept),
    )


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
