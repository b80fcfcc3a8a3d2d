"""Rotary embedding: the pairs of a head are turned by angles that grow with the position.

RoFormer, arXiv 2104.09864; pairs are the first and second half of a head, as in the published weights of
Hugging Face. Positions are any integers, one a token, so packed documents need nothing special. Turning back
is turning by the opposite angle: the backward pass needs the table alone, and `rotate_` may overwrite x.

The CPU path turns a stretch of positions at a time, as x * (cos, cos) + swapped(x) * (-sin, sin): passes over
whole heads, not halves, in memory that the cache still holds. Shapes: B batch, S sequence, H heads, P head
size.
"""

from collections.abc import Callable
from typing import Any

import torch

from .config import Path
from .dispatch import at_least_fp32, choose

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

# Numbers turned at a time on the CPU: with their swapped copy 2 MB in fp32, what a core's caches share.
STRETCH = 2**18


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Each position's turns, cos + i sin: positions [B, S] -> complex64 [B, S, 1, P / 2].

    Complex, because mixed precision casts every real tensor that a block is given, and bf16 keeps too few
    bits of an angle.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponents
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(2)


def rotate_reference(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + P / 2]) by their angles, at least in fp32: [B, S, H, P], x's dtype."""
    wide = at_least_fp32(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = turns.real.contiguous(), turns.imag.contiguous()  # strided, they would take half as long again
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def rotate(x: torch.Tensor, turns: torch.Tensor, *, path: Path = "auto") -> torch.Tensor:
    """x [B, S, H, P] or [B, S, H * P] turned by `turns` [B, S, 1, P / 2], in new memory of x's dtype."""
    return _rotate(x, turns, path, in_place=False)


def rotate_(x: torch.Tensor, turns: torch.Tensor, *, path: Path = "auto") -> torch.Tensor:
    """`rotate` in the memory of x; only what it returns may be used afterwards.

    For results that their maker does not need again, such as those of a matrix product. Give it the product
    as it is, [B, S, H * P], and split heads afterwards: writing into a view costs autograd a copy. Not for a
    product that selective recompute keeps: the kept one would be turned here and once more going backward.
    """
    return _rotate(x, turns, path, in_place=True)


def _rotate(x: torch.Tensor, turns: torch.Tensor, path: Path, *, in_place: bool) -> torch.Tensor:
    chosen = choose("rope", x, path).path
    # a compiler fuses the reference into its neighbours, and cannot look into the other paths
    if chosen == "reference" or torch.compiler.is_compiling():
        return rotate_reference(_heads(x, turns), turns).view_as(x)
    return _Rotate.apply(x, turns, _turn_on_gpu if chosen == "triton" else turn_stretches, in_place)


class _Rotate(torch.autograd.Function):
    """`turn` as a step of autograd that saves the table only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, turns: torch.Tensor, turn: Turn, in_place: bool) -> torch.Tensor:
        ctx.save_for_backward(turns)
        ctx.turn = turn
        if in_place:
            ctx.mark_dirty(x)
        out = x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
        turn(x, out, turns)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (turns,) = ctx.saved_tensors
        # in new memory: others may hold the same gradient
        return _Rotate.apply(grad, turns.conj(), ctx.turn, False), None, None, None


def turn_stretches(x: torch.Tensor, out: torch.Tensor, turns: torch.Tensor) -> None:
    """Write x turned by `turns` into `out`, which may be x, one stretch of positions after another."""
    x, out = _heads(x, turns), _heads(out, turns)
    batch, _, heads, head_dim = x.shape
    length = max(1, STRETCH // max(1, batch * heads * head_dim))
    wide = at_least_fp32(x.dtype)
    for source, target, part in zip(*(t.split(length, 1) for t in (x, out, turns)), strict=True):
        cos, sin = part.real.to(wide).contiguous(), part.imag.to(wide).contiguous()
        numbers = source.to(wide)
        first, second = numbers.chunk(2, dim=-1)
        swapped, signed = torch.cat((second, first), dim=-1), torch.cat((-sin, sin), dim=-1)
        into = target if target.dtype == wide else numbers
        torch.mul(numbers, torch.cat((cos, cos), dim=-1), out=into).addcmul_(swapped, signed)
        if into is not target:
            target.copy_(into)


def _turn_on_gpu(x: torch.Tensor, out: torch.Tensor, turns: torch.Tensor) -> None:
    from .gpu.rope import turn  # triton is optional

    turn(_heads(x, turns), _heads(out, turns), turns)


def _heads(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x as [B, S, H, P], a view; the table knows P."""
    return x if x.dim() == 4 else x.unflatten(-1, (-1, 2 * turns.shape[-1]))
