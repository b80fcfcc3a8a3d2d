"""Attention under a column mask: FlashMask (arXiv 2410.01359) behind one function.

The mask says what is hidden column by column (`kernels/flashmask/mask.py`; the usual ones are in
`kernels/flashmask/kinds.py`). Tiles that are all hidden are never computed, tiles with nothing hidden see no
mask; rows that see nothing give zero, and a log-sum-exp of minus infinity.
"""

from math import inf
from typing import Any

import torch
import torch.nn.functional as F

from .config import Path
from .dispatch import at_least_fp32, choose
from .flashmask.cpu import masked_attention, masked_attention_backward
from .flashmask.mask import ColumnMask, MaskError


def flashmask_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: ColumnMask,
    scale: float | None = None,
    return_lse: bool = False,
    path: Path = "auto",
) -> Any:
    """q [B, Nq, H, D], k and v [B, Nk, Hk, D] -> [B, Nq, H, D] in q's dtype, and the log-sum-exp fp32 [B, H,
    Nq] if asked for.

    Heads of q share those of k and v in equal groups; `scale` is 1 / sqrt(D) unless given. Raises MaskError
    when the mask does not fit.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("attention", q, path).path
    if chosen == "cpu":
        out, lse = masked_attention(q, k, v, mask.stacked, mask.plan, mask.causal, scale, return_lse)
    elif chosen == "triton":
        out, lse = _TritonAttention.apply(q, k, v, mask, scale)
    else:
        out, lse = attention_reference(q, k, v, mask, scale, return_lse)
    return (out, lse) if return_lse else out


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: ColumnMask,
    scale: float,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As torch has it, with every score's mask in memory; the log-sum-exp is computed only when asked for."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    seen = ~mask.dense().repeat_interleave(q.shape[2] // mask.heads, dim=1)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=group > 1
    )
    lse = None
    if return_lse:
        wide = at_least_fp32(q.dtype)
        scores = queries.to(wide) @ keys.to(wide).repeat_interleave(group, dim=1).transpose(-1, -2) * scale
        lse = torch.logsumexp(scores.masked_fill(~seen, -inf), -1)
    return out.transpose(1, 2), lse


def attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: ColumnMask,
    scale: float | None = None,
    path: Path = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q [B, Nq, H, D], k and v [B, Nk, Hk, D] where k and v are some of the keys of a softmax.

    `out` [B, Nq, H, D] and `lse` [B, H, Nq] are those over all keys, -inf where a row sees none; the mask is
    that of the keys given. Over sets of keys that make up all, dq adds up to the gradient, dk and dv lie side
    by side. Since they are parts of sums they are fp32 (fp64 for fp64), whatever the inputs are.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("attention", q, path).path
    if chosen == "cpu":
        how = (mask.stacked, mask.plan, mask.causal, scale)
        return masked_attention_backward(grad_out, None, q, k, v, *how, lse, out)
    if chosen == "triton":
        from .gpu import attention as gpu  # triton comes with CUDA builds of torch only

        bounds: tuple[Any, ...] = mask.for_device
        rest: dict[str, Any] = {"causal": mask.causal, "scale": scale, "kept": at_least_fp32(q.dtype)}
        return gpu.backward(grad_out, q, k, v, out, lse, *bounds, **rest)
    return _gradients_reference(grad_out, q, k, v, out, lse, mask, scale)


def _gradients_reference(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: ColumnMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with every score in memory: p = exp(score - lse), its gradient p * (dP - sum(out * dOut))."""
    wide, group = at_least_fp32(q.dtype), q.shape[2] // k.shape[2]
    grads, queries, keys, values, outs = (x.transpose(1, 2).to(wide) for x in (grad_out, q, k, v, out))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    hidden = mask.dense().repeat_interleave(q.shape[2] // mask.heads, dim=1)
    scores = (queries @ keys.mT * scale).masked_fill(hidden, -inf)
    p = torch.exp(scores - lse.masked_fill(lse == -inf, inf)[..., None])
    ds = p * (grads @ values.mT - (outs * grads).sum(-1, keepdim=True)) * scale
    parts = (ds @ keys, ds.mT @ queries, p.mT @ grads)
    dq, dk, dv = (x.transpose(1, 2) for x in parts)
    dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .gpu import attention as gpu  # triton comes with CUDA builds of torch only

        bounds: tuple[Any, ...] = mask.for_device
        out, lse = gpu.forward(q, k, v, *bounds, causal=mask.causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, *bounds)
        ctx.causal, ctx.scale = mask.causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from .gpu import attention as gpu

        if grad_out is None:
            grad_out = torch.zeros_like(ctx.saved_tensors[3])
        how: dict[str, Any] = {"causal": ctx.causal, "scale": ctx.scale, "grad_lse": grad_lse}
        return *gpu.backward(grad_out, *ctx.saved_tensors, **how), None, None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> None:
    heads, key_heads = q.shape[2], k.shape[2]
    if (
        heads % key_heads
        or k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
    ):
        raise MaskError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: one batch, one head "
            "size, and query heads in equal groups over the key heads are needed"
        )
    if mask.heads not in (1, key_heads, heads):
        raise MaskError(
            f"the mask has {mask.heads} heads; 1, {key_heads} (keys) or {heads} (queries) can be used"
        )
    if (mask.lts.shape[0], mask.nq, mask.nk) != (q.shape[0], q.shape[1], k.shape[1]):
        raise MaskError(
            f"the mask is for batch {mask.lts.shape[0]}, {mask.nq} queries and {mask.nk} keys, the data has "
            f"batch {q.shape[0]}, {q.shape[1]} queries and {k.shape[1]} keys"
        )
