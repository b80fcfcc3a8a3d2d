"""Core of gated attention on the CPU, a few rows of the table at a time.

Forward is torch's fused attention, given both biases of those rows. Its backward gives no gradient to a bias,
so weights are computed again, rows by rows: a bias that all rows share adds their score gradients up in
place, in the order of the rows. From scores, not from the saved log-sum-exp: where a whole row is masked by
-1e9, fp32 cannot hold the sum beside it. Scores and softmax are fp32 for 16-bit tables too; the other
products take the tables' dtype. Shapes as in `gated_attention`.
"""

from collections.abc import Iterator

import torch

from .dispatch import at_least_fp32

# Scores at work at a time: 1 MB a tensor in fp32, so that three of them and their operands stay in cache.
SCORES = 2**18


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    mask: torch.Tensor | None,
    pair: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated result and, for the backward pass, what it was before the gate: both [B, N, R, H, P]."""
    attended = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, heads, rows in _pieces(q, k):
        parts = [t[b, rows, :, heads].transpose(1, 2) for t in (q, k, v)]
        bias = _bias(mask, pair, b, heads, rows)
        if bias is not None:
            shape = (*parts[0].shape[:3], k.shape[2])
            bias = bias.to(q.dtype).expand(shape)
        part, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, attn_mask=bias)
        attended[b, rows, :, heads] = part.transpose(1, 2)
    return (gate + gate_bias).sigmoid_().mul_(attended), attended


def attend_rows_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    mask: torch.Tensor | None,
    pair: torch.Tensor | None,
    attended: torch.Tensor,
    *,
    need_pair: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, the gate and, if needed, the pair bias."""
    opened = (gate + gate_bias).sigmoid_()
    grad_gate = torch.ops.aten.sigmoid_backward(attended * grad, opened)
    grad = opened.mul_(grad)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    wide = at_least_fp32(q.dtype)
    grad_pair = (
        torch.zeros(pair.shape, dtype=wide, device=q.device) if pair is not None and need_pair else None
    )
    scale = q.shape[-1] ** -0.5
    for b, heads, rows in _pieces(q, k):
        part_q, part_k, part_v, part_grad = (t[b, rows, :, heads].transpose(1, 2) for t in (q, k, v, grad))
        scores = (part_q.to(wide) * scale) @ part_k.to(wide).transpose(-1, -2)
        bias = _bias(mask, pair, b, heads, rows)
        weights = (scores if bias is None else scores.add_(bias)).softmax(-1)
        grad_v[b, rows, :, heads] = (weights.to(q.dtype).transpose(-1, -2) @ part_grad).transpose(1, 2)
        grad_weights = (part_grad @ part_v.transpose(-1, -2)).to(wide)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, wide)
        if grad_pair is not None:
            grad_pair[b, 0, heads] += grad_scores.sum(0)
        grad_scores = grad_scores.to(q.dtype)
        grad_q[b, rows, :, heads] = (grad_scores @ part_k).mul_(scale).transpose(1, 2)
        grad_k[b, rows, :, heads] = (grad_scores.transpose(-1, -2) @ part_q).mul_(scale).transpose(1, 2)
    if grad_pair is not None and pair is not None:
        grad_pair = grad_pair.to(pair.dtype)
    return grad_q, grad_k, grad_v, grad_gate, grad_pair


def _pieces(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(batch, heads, rows) of pieces with no more than SCORES scores, at least one head of one row."""
    batch, rows, queries, heads, _ = q.shape
    scores = queries * k.shape[2]
    some_heads = max(1, min(heads, SCORES // scores))
    some_rows = max(1, SCORES // (scores * some_heads))
    for b in range(batch):
        for head in range(0, heads, some_heads):
            for row in range(0, rows, some_rows):
                yield b, slice(head, head + some_heads), slice(row, row + some_rows)


def _bias(
    mask: torch.Tensor | None, pair: torch.Tensor | None, b: int, heads: slice, rows: slice
) -> torch.Tensor | None:
    """What is added to the scores of a piece: broadcasts over [rows, heads, R, K]."""
    if mask is None:
        return None if pair is None else pair[b, :, heads]
    return mask[b, rows] if pair is None else mask[b, rows] + pair[b, :, heads]
