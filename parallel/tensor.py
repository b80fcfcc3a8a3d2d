"""Tensor and sequence parallelism (arXiv 1909.08053, 2205.05198) by a model's plan.

Each rank holds some heads, hidden features and tokens of the vocabulary, and between the modules that share
work, some of the sequence: x is [B, S/tp, D]. A module with the role SEQUENCE is given the gathered [B, S, D]
and its output, a part of a sum, is summed and scattered along the sequence in one exchange. What travels a
block, forward and again backward: two gathers and two reduce-scatters of B * S * D numbers.

Parameters are plain tensors of a rank's piece, not DTensors: operators then need no rules for splitting, and
nothing is dispatched on the step path. `Piece` says where the piece lies in the whole.

Gradients of parameters that every rank holds whole are parts of a sum, as each rank saw its part of the
sequence or of the heads: they are summed after the backward pass (`Sharded.sum_shared`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.cross_entropy import VocabularyShard
from .collectives import gather, max_over, reduce_scatter, sum_over
from .mesh import Axis
from .plan import ModelPlan, Role, Split

SEQUENCE_DIM = 1


@dataclass(frozen=True)
class Piece:
    """A rank's part of a parameter before FSDP cuts it further."""

    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]
    split: bool  # over tensor parallel ranks; else each holds all of it

    @staticmethod
    def whole(parameter: torch.Tensor) -> "Piece":
        """All of it."""
        return Piece(tuple(parameter.shape), (0,) * parameter.ndim, False)


def share(rows: int, axis: Axis) -> tuple[int, int]:
    """(first, how many) of `rows` that this rank is dealt: pieces of one size, the last ones smaller."""
    size = -(-rows // axis.size)
    first = min(axis.rank * size, rows)
    return first, min(size, rows - first)


def apply_tensor(model: nn.Module, plan: ModelPlan | None, axis: Axis) -> dict[str, Piece]:
    """Cut the parameters of `model` in place and let its modules exchange what they must; where each piece
    lies, by name.
    """
    if plan is None or axis.size == 1:
        return {name: Piece.whole(parameter) for name, parameter in model.named_parameters()}
    pieces = {name: _cut(model, name, plan.split_of(name), axis) for name, _ in [*model.named_parameters()]}
    for module in plan.modules_with(Role.SEQUENCE, model):
        module.forward = _on_whole_sequence(module.forward, axis)
    vocabulary = [piece for name, piece in pieces.items() if plan.split_of(name) is Split.VOCABULARY]
    for piece in vocabulary[:1]:  # all are cut alike
        for module in plan.modules_with(Role.EMBEDDING, model):
            module.forward = _on_own_tokens(module, piece.offsets[0], axis)
        for module in plan.modules_with(Role.LOSS, model):
            module.forward = _on_own_logits(module.forward, piece.offsets[0], axis)
    return pieces


def _cut(model: nn.Module, name: str, split: Split | None, axis: Axis) -> Piece:
    parameter = model.get_parameter(name)
    if split is None:
        return Piece.whole(parameter)
    first, size = share(parameter.shape[split.dim], axis)
    owner, _, attribute = name.rpartition(".")
    part = parameter.detach().narrow(split.dim, first, size).clone()
    setattr(model.get_submodule(owner), attribute, nn.Parameter(part, parameter.requires_grad))
    offsets = tuple(first if dim == split.dim else 0 for dim in range(parameter.ndim))
    return Piece(tuple(parameter.shape), offsets, True)


def _on_whole_sequence(inner: Callable[..., torch.Tensor], axis: Axis) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        part = inner(gather(x, SEQUENCE_DIM, axis), *args, **kwargs)
        return reduce_scatter(part, SEQUENCE_DIM, axis)

    return forward


def _on_own_tokens(module: nn.Module, start: int, axis: Axis) -> Callable[..., torch.Tensor]:
    assert isinstance(module, nn.Embedding), f"the role EMBEDDING is for nn.Embedding, not {type(module)}"

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens - start
        own = (rows >= 0) & (rows < module.weight.shape[0])
        x = F.embedding(torch.where(own, rows, 0), module.weight)
        return reduce_scatter(x.masked_fill(~own[..., None], 0.0), SEQUENCE_DIM, axis)

    return forward


def _on_own_logits(inner: Callable[..., torch.Tensor], start: int, axis: Axis) -> Callable[..., torch.Tensor]:
    shard = VocabularyShard(
        start=start, sum_over=lambda x: sum_over(x, axis), max_over=lambda x: max_over(x, axis)
    )

    def forward(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return inner(gather(x, SEQUENCE_DIM, axis), weight, labels, shard=shard)

    return forward
