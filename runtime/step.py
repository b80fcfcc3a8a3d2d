"""One optimizer step: forward, backward, update; returns a value.

The loss contract: a step yields (sum of token losses, number of valid tokens). Both are summed over every
rank that carries data and divided once. The count is known before the forward pass, so its sum travels while
the model computes, and gradients leave the backward pass already divided by it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..kernels.adamw import square_sum
from ..parallel.collectives import sum_over
from ..parallel.context import ContextSplit
from ..parallel.mesh import FoldedMesh
from ..parallel.model import Sharded
from .data.loader import Batch
from .data.packing import IGNORED
from .optim.adamw import ShardedAdamW

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it, so that both clip alike


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is no number any more on this rank; its state must not be saved."""


class NonFinitePeer(RuntimeError):
    """The same, seen from a rank whose own part is finite."""


class Guard(Protocol):
    """Whoever copies the state while it does not change; all ranks of a run have one, or none has."""

    def before_sums(self) -> None:
        """The last sums before the update are next: what they tell every rank is that all came this far."""

    def before_update(self) -> None:
        """All ranks came this far, and the state changes from now on."""


@dataclass(frozen=True)
class StepResult:
    """What one step was, over all ranks."""

    loss_sum: float
    tokens: int
    grad_norm: float
    exposed_comm_s: float  # waiting for the step's own sums (count, loss, norm), stragglers included
    stop: bool  # some rank was asked to stop; every rank learns it at the same step

    @property
    def loss(self) -> float:
        """Mean loss of a valid token."""
        return self.loss_sum / max(self.tokens, 1)


def token_loss(part: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropy of all valid tokens of a micro-batch that this rank has, in fp32: a scalar."""
    if getattr(part, "computes_loss", False):
        return part(batch.tokens, **_where(batch), labels=batch.labels)
    logits = part(batch.tokens, **_where(batch))
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum", ignore_index=IGNORED
    )


def pipeline_inputs(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the first stage takes, and what every stage does."""
    return batch.tokens, {**_where(batch), "labels": batch.labels}


def _where(batch: Batch) -> dict[str, torch.Tensor]:
    return {"positions": batch.positions, "document_ids": batch.document_ids}


def train_step(
    model: Sharded,
    optimizer: ShardedAdamW,
    microbatches: Sequence[Batch],
    *,
    lr: float,
    clip_norm: float | None,
    stop: bool = False,
    guard: Guard | None = None,
) -> StepResult:
    """Train on this rank's micro-batches of one step; every rank of the mesh must call it with as many.

    Ranks that share samples are all given the same rows, whole.
    """
    mesh = model.mesh
    tokens = _valid_tokens(microbatches) if mesh.speaks else 0
    counts = torch.tensor([tokens, int(stop)], dtype=torch.int64, device=mesh.device)
    pending = sum_over(counts, mesh.world, wait=False)
    microbatches = [part_of(batch, model.context) for batch in microbatches]
    if model.pipeline is not None:
        waited = _wait(pending)
        loss_sum = model.pipeline.run([*map(pipeline_inputs, microbatches)], counts[0].clamp(min=1))
    else:
        loss_sum, waited = _forward_backward(model.parts[0], microbatches, counts, pending, mesh)
    model.sum_shared()
    # each rank adds what no other does; the loss is the same on all tensor parallel ranks
    own_loss = loss_sum if mesh.tp.rank == 0 else torch.zeros_like(loss_sum)
    sums = torch.stack([own_loss, _square_sum(optimizer, mesh)])
    if guard is not None:
        guard.before_sums()
    started = time.perf_counter()
    sum_over(sums, mesh.world)
    waited += time.perf_counter() - started
    grad_norm = sums[1].sqrt()
    if clip_norm is not None:
        _clip(optimizer.gradients(), clip_norm / (grad_norm + CLIP_EPS))
    if guard is not None:
        guard.before_update()
    optimizer.step(lr)
    # read by the host only now that all of the step is launched: a GPU is waited for once a step
    loss_value, norm_value = torch.stack([sums[0], grad_norm]).tolist()
    tokens, stops = counts.tolist()
    if not math.isfinite(loss_value + norm_value):
        raise _not_finite(loss_sum.item(), loss_value / max(tokens, 1), norm_value)
    return StepResult(
        loss_sum=loss_value, tokens=tokens, grad_norm=norm_value, exposed_comm_s=waited, stop=stops > 0
    )


def _forward_backward(
    part: nn.Module,
    microbatches: Sequence[Batch],
    counts: torch.Tensor,
    pending: torch.distributed.Work | None,
    mesh: FoldedMesh,
) -> tuple[torch.Tensor, float]:
    """(sum of losses in fp64, seconds waited for the count, which travels during the first forward pass)."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
    waited = 0.0
    for number, batch in enumerate(microbatches):
        _reduce_when_last(part, mesh, last=number == len(microbatches) - 1)
        loss = token_loss(part, batch)
        if number == 0:
            waited = _wait(pending)
        (loss / counts[0].clamp(min=1)).backward()
        loss_sum += loss.detach()
    return loss_sum, waited


def _clip(grads: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Shrink gradients by `scale` where it is below 1; on the host, where asking is free, only then."""
    if scale.device.type != "cpu" or scale < 1.0:
        torch._foreach_mul_(grads, scale.clamp(max=1.0).to(torch.float32))


def _not_finite(own_loss_sum: float, loss: float, grad_norm: float) -> RuntimeError:
    """The error of this rank: its own where its loss is no number, or where only the gradient is none.

    The update is made already, so whoever catches it must drop the state.
    """
    elsewhere = math.isfinite(own_loss_sum) and not math.isfinite(loss)
    return (NonFinitePeer if elsewhere else NonFiniteLoss)(
        f"loss {loss}, gradient norm {grad_norm}: training has diverged or met bad numbers; nothing of this "
        "step is saved and the last checkpoint stands; lower optim.lr or raise optim.warmup_steps"
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same micro-batch on `device`; on the host's own it is the batch itself."""
    if device.type == "cpu":
        return batch
    names = ("tokens", "labels", "positions", "document_ids")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def _valid_tokens(microbatches: Sequence[Batch]) -> int:
    return sum(int((batch.labels != IGNORED).sum()) for batch in microbatches)


def part_of(batch: Batch, context: ContextSplit) -> Batch:
    """What this rank has of a micro-batch whose sequences are shared; document ids stay whole."""
    return replace(
        batch,
        tokens=context.local(batch.tokens),
        labels=context.local(batch.labels),
        positions=context.local(batch.positions),
    )


def _square_sum(optimizer: ShardedAdamW, mesh: FoldedMesh) -> torch.Tensor:
    """This rank's part of the squared global norm, in fp64; each copy counts with its share."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for counted, grads in optimizer.gradients_by_share():
        total += counted * square_sum(grads, optimizer.path)
    return total


def _reduce_when_last(model: nn.Module, mesh: FoldedMesh, *, last: bool) -> None:
    """Accumulate over micro-batches where memory allows: whole copies wait for the last, shards are reduced
    each time.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or mesh.layout.dp_shard * mesh.layout.cp > 1)
        model.set_requires_all_reduce(last)  # behind the other, which says this too
        model.set_is_last_backward(last)


def _wait(work: torch.distributed.Work | None) -> float:
    started = time.perf_counter()
    if work is not None:
        work.wait()
    return time.perf_counter() - started
