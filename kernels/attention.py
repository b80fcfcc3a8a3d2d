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
from .flashmask.cpu import masked_attention
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
