"""The walk over chunks of tokens behind `cross_entropy.py`, for any device's passes over logits.

For each chunk: multiply x by weight, take the losses and turn the logits into their gradient in place, and
multiply twice more, for the gradients of x and weight. Nothing is computed again going backward.
Shapes: T tokens, n of a chunk, D model, V vocabulary or a rank's rows of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .cross_entropy_cpu import ELSEWHERE, IGNORED, RowSteps, row_losses
from .dispatch import at_least_fp32
from .linear import product

Maybe = torch.Tensor | None
MIB = 2**20
# Sums of 16-bit weights lie in pieces, each freed as soon as it is rounded: the sum and the result are never
# both whole. The C library gives back to the system only what is larger than 32 MiB.
PIECE_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """A rank's rows of the vocabulary, from index `start` on, and how to reduce over the ranks that share it.

    Both callables all-reduce a tensor in place and are called the same number of times on each rank, given
    the same number of tokens. The loss is the whole one on every rank. The gradient of x is of this rank's
    rows alone: the caller sums it over the ranks, as for the input of any matrix split by columns.
    """

    start: int
    sum_over: Callable[[torch.Tensor], Any]
    max_over: Callable[[torch.Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of the logits is held at a time."""

    logits_bytes: int  # of a chunk
    least_rows: int  # of a chunk, whatever its bytes: fewer would wait for the weight at each product
    block_bytes: int  # of the weight's gradient from one product, before it joins the sum


# A chunk half the size of the 32 MiB cache of the processor this was measured on: products of 128 rows are as
# fast as of 1024 (32k vocabulary, 180 to 220 GFLOP/s in fp32) if blocks for the sum stay in the cache.
ON_CPU = Budget(logits_bytes=16 * MIB, least_rows=128, block_bytes=4 * MIB)
# Adding a product of 1024 rows to the fp32 sum is 256 operations a byte, about as many as an H100 does while
# it moves one.
ON_DEVICE = Budget(logits_bytes=256 * MIB, least_rows=1024, block_bytes=64 * MIB)


def chunked_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignored: int,
    z_loss: float,
    shard: VocabularyShard | None,
    steps: RowSteps,
    budget: Budget,
) -> torch.Tensor:
    """The sum of losses by way of `steps`, with gradients if any are asked for: x [T, D], labels [T]."""
    if shard is None:  # on no memory: F.cross_entropy's own check of labels, which waits for no device
        nothing = x.new_zeros(1, 1).expand(x.shape[0], weight.shape[0])
        F.nll_loss(nothing.detach(), labels, ignore_index=ignored, reduction="none")
    places = row_places(labels, weight.shape[0], ignored, shard)
    chunks = _Chunks(z_loss=z_loss, shard=shard, steps=steps, budget=budget)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Loss.apply(x, weight, places, chunks)
    return chunks.losses(x, weight, places, None).sum()


def row_places(labels: torch.Tensor, rows: int, ignored: int, shard: VocabularyShard | None) -> torch.Tensor:
    """Row of this rank's weight for each label, ELSEWHERE or IGNORED."""
    row = labels if shard is None else labels - shard.start
    row = torch.where((row >= 0) & (row < rows), row, ELSEWHERE)
    return torch.where(labels == ignored, IGNORED, row)


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    return product(a, b) if on_cpu and not torch.compiler.is_compiling() else a @ b


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """The walk over chunks of tokens."""

    z_loss: float
    shard: VocabularyShard | None
    steps: RowSteps
    budget: Budget

    def losses(
        self, x: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, grads: "_Gradients | None"
    ) -> torch.Tensor:
        """Losses [T] of tokens x [T, D]."""
        rows = self.budget.least_rows
        if self.shard is None:  # shares of ranks may differ in size, and their calls must not
            fit = self.budget.logits_bytes // (max(1, weight.shape[0]) * weight.element_size())
            rows = max(rows, fit // 64 * 64)
        rows = -(-x.shape[0] // max(1, -(-x.shape[0] // rows)))  # chunks alike: a short one costs as much
        losses = x.new_empty(x.shape[0], dtype=at_least_fp32(x.dtype))
        for start in range(0, x.shape[0], max(1, rows)):
            here = slice(start, start + rows)
            losses[here] = self._chunk(x, weight, places[here], grads, here)
        return losses

    def _chunk(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        grads: "_Gradients | None",
        here: slice,
    ) -> torch.Tensor:
        logits = _multiply(x[here], weight.t())
        if grads is not None and self.shard is None:
            losses = self.steps.loss_and_gradient(logits, places, self.z_loss)
        else:
            lse, label = self._over_ranks(*self.steps.statistics(logits, places), places)
            losses = row_losses(lse, label, places, self.z_loss)
            if grads is not None:
                self.steps.gradient(logits, places, lse, self.z_loss)
        if grads is not None:  # the logits are their gradient now
            if grads.x is not None:
                grads.x[here] = _multiply(logits, weight)
            if grads.weight is not None:
                grads.weight.add(logits, x[here])
        return losses

    def _over_ranks(
        self, top: torch.Tensor, total: torch.Tensor, label: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logsumexp, logit of the label), both [n], over the whole vocabulary."""
        if self.shard is None:
            return top + total.log(), label
        highest = top.clone()
        self.shard.max_over(highest)
        sums = torch.stack((total * (top - highest).exp(), label, (places >= 0).to(label.dtype)))
        self.shard.sum_over(sums)
        return highest + sums[0].log(), torch.where(sums[2] > 0, sums[1], torch.nan)


class _WeightSum:
    """The sum over chunks of gradient.T @ x, [V, D]: in fp32 at least, for bf16 adds up to 7 digits."""

    def __init__(self, weight: torch.Tensor, block_bytes: int) -> None:
        self._shape, self._dtype = weight.shape, weight.dtype
        wide = weight.new_empty(0, dtype=at_least_fp32(weight.dtype))
        row_bytes = max(1, weight.shape[1] * wide.element_size())
        self._block_rows = max(1, block_bytes // row_bytes)
        self._whole: Maybe = None
        piece_rows = max(1, PIECE_BYTES // row_bytes)
        if wide.dtype == weight.dtype:
            self._whole = wide.new_zeros(weight.shape)
            self._pieces = list(self._whole.split(piece_rows))
        else:
            self._pieces = [wide.new_zeros(piece.shape) for piece in weight.split(piece_rows)]

    def add(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """Add gradient [n, V] transposed times x [n, D]."""
        start = 0
        for piece in self._pieces:
            for block in piece.split(self._block_rows):
                block.add_(_multiply(gradient[:, start : start + block.shape[0]].t(), x))
                start += block.shape[0]

    def result(self) -> torch.Tensor:
        """The sum in the weight's dtype; nothing can be added any more."""
        if self._whole is not None:
            return self._whole
        result = self._pieces[0].new_empty(self._shape, dtype=self._dtype)
        end = result.shape[0]
        while self._pieces:
            piece = self._pieces.pop()
            end -= piece.shape[0]
            result[end : end + piece.shape[0]].copy_(piece)
        return result


@dataclass(frozen=True)
class _Gradients:
    """Where the chunks leave theirs, as far as they are asked for: x's [T, D] and the sum for weight."""

    x: Maybe
    weight: _WeightSum | None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, chunks: _Chunks
    ) -> torch.Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        grads = _Gradients(
            torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None,
            _WeightSum(weight, chunks.budget.block_bytes) if of_weight else None,
        )
        losses = chunks.losses(x, weight, places, grads)
        ctx.save_for_backward(grads.x, grads.weight and grads.weight.result())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, Maybe, None, None]:
        if torch.is_grad_enabled():  # once_differentiable lets them pass for constants
            raise RuntimeError(
                "create_graph=True: gradients of linear_cross_entropy cannot be differentiated again, as "
                'they were made in the forward pass; with kernels.cross_entropy = "reference" they can'
            )
        # a graph that is kept may come back for them
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        grad_x, grad_weight = (
            saved if saved is None else saved * grad if kept else saved.mul_(grad)
            for saved in ctx.saved_tensors
        )
        return grad_x, grad_weight, None, None
