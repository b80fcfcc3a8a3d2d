"""Gated attention with pair bias, as the Evoformer has it (AlphaFold 2, supplement, algorithms 7 and 13).

Rows of a table attend along one axis. Scores get a mask per key and a bias per pair, one for all rows; the
result is multiplied by a sigmoid gate of the queries. Autograd on the formula keeps several tensors of scores
[B, N, H, R, K]; here none exists whole, in either pass. What a faster path replaces is the core between the
matrices: scores, softmax, values and gate. Queries, keys, values and gate come from one product where they
come from one table. Shapes: B batch, N rows, R queries, K keys, H heads, P head size, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .config import Path
from .dispatch import KernelError, choose
from .gated_attention_rows import attend_rows, attend_rows_backward
from .linear import linear

Attend = Callable[..., tuple[torch.Tensor, ...]]
AttendBackward = Callable[..., tuple[torch.Tensor | None, ...]]

HEAD_DIMS = (16, 32, 64)  # what the device's matrix units take and registers hold


@dataclass(frozen=True, kw_only=True)
class GatedAttentionWeights:
    """Matrices of one gated attention; k and v may read a table of another width than q and gate."""

    q: torch.Tensor  # [C, H, P]
    k: torch.Tensor  # [C, H, P]
    v: torch.Tensor  # [C, H, P]
    gate: torch.Tensor  # [C, H, P]
    gate_bias: torch.Tensor  # [H, P]
    out: torch.Tensor  # [H, P, C_out]
    out_bias: torch.Tensor  # [C_out]


def gated_attention(
    q_data: torch.Tensor,
    m_data: torch.Tensor,
    weights: GatedAttentionWeights,
    *,
    mask_bias: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
    path: Path = "auto",
) -> torch.Tensor:
    """q_data [B, N, R, C] attends to m_data [B, N, K, C] -> [B, N, R, C_out] in q_data's dtype.

    mask_bias [B, N, 1, 1, K] is added to every score of a key, pair_bias [B, 1, H, R, K] to those of every
    row. The mask gets no gradient.
    """
    if mask_bias is not None and mask_bias.requires_grad:
        raise ValueError("mask_bias requires a gradient, but it is a mask: pass mask_bias.detach()")
    chosen = choose("gated_attention", q_data, path).path
    if chosen == "triton" and (head_dim := weights.q.shape[-1]) not in HEAD_DIMS:
        if path == "triton":
            raise KernelError(f'heads of {head_dim} are not among the Triton path\'s {HEAD_DIMS}; use "auto"')
        chosen = "reference"
    empty = not (q_data.numel() and m_data.numel())
    # a compiler fuses the reference into its neighbours, and cannot look into the other paths
    if chosen == "reference" or empty or torch.compiler.is_compiling():
        return gated_attention_reference(q_data, m_data, weights, mask_bias, pair_bias)
    q, k, v, gate = _project(q_data, m_data, weights)
    core: tuple[Attend, AttendBackward] = attend_rows, attend_rows_backward
    if chosen == "triton":
        from .gpu.gated_attention import attend, attend_backward  # triton is optional

        core = attend, attend_backward
    out = _Core.apply(q, k, v, gate, weights.gate_bias, mask_bias, pair_bias, *core)
    return linear(out.flatten(-2), weights.out.flatten(0, 1).t(), "auto") + weights.out_bias


def gated_attention_reference(
    q_data: torch.Tensor,
    m_data: torch.Tensor,
    weights: GatedAttentionWeights,
    mask_bias: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The definition: every score is kept."""
    q = torch.einsum("bnrc,chp->bnhrp", q_data, weights.q) * weights.q.shape[-1] ** -0.5
    k = torch.einsum("bnkc,chp->bnhkp", m_data, weights.k)
    v = torch.einsum("bnkc,chp->bnhkp", m_data, weights.v)
    scores = q @ k.transpose(-1, -2)
    for bias in (mask_bias, pair_bias):
        scores = scores if bias is None else scores + bias
    out = (scores.softmax(-1).type_as(v) @ v).transpose(2, 3)
    gate = torch.sigmoid(torch.einsum("bnrc,chp->bnrhp", q_data, weights.gate) + weights.gate_bias)
    return torch.einsum("bnrhp,hpc->bnrc", out * gate, weights.out) + weights.out_bias


def _project(
    q_data: torch.Tensor, m_data: torch.Tensor, weights: GatedAttentionWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and the gate before its sigmoid, each [B, N, R or K, H, P], by as few products as can be."""
    if q_data is m_data:
        q, k, v, gate = _product(q_data, weights.q, weights.k, weights.v, weights.gate)
    else:
        q, gate = _product(q_data, weights.q, weights.gate)
        k, v = _product(m_data, weights.k, weights.v)
    return q, k, v, gate


def _product(data: torch.Tensor, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """data [..., C] times each matrix [C, H, P] -> [..., H, P] each, views of one result."""
    merged = torch.stack([matrix.flatten(1) for matrix in matrices], dim=1).flatten(1)
    result = linear(data, merged.t(), "auto")
    return result.unflatten(-1, (len(matrices), *matrices[0].shape[1:])).unbind(-3)


class _Core(torch.autograd.Function):
    """softmax(q k / sqrt(P) + biases) v * sigmoid(gate + gate_bias), all [B, N, R or K, H, P]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        gate_bias: torch.Tensor,
        mask: torch.Tensor | None,
        pair: torch.Tensor | None,
        attend: Attend,
        attend_backward: AttendBackward,
    ) -> torch.Tensor:
        out, *kept = attend(q, k, v, gate, gate_bias, mask, pair)
        ctx.save_for_backward(q, k, v, gate, gate_bias, mask, pair, *kept)
        ctx.attend_backward = attend_backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_pair = ctx.needs_input_grad[6]
        grad_q, grad_k, grad_v, grad_gate, grad_pair = ctx.attend_backward(
            grad, *ctx.saved_tensors, need_pair=need_pair
        )
        grad_bias = grad_gate.sum((0, 1, 2))
        return grad_q, grad_k, grad_v, grad_gate, grad_bias, None, grad_pair, None, None
