"""Output matrix with the cross-entropy behind it, over chunks of tokens: the logits are never whole.

The logits' gradient needs nothing but the logits, so the forward pass makes it while it holds them
(`cross_entropy_chunks.py`). Going backward, both gradients are scaled by the loss's; they are all that is
kept, so weight's [V, D] is held from the forward pass on. (Chunks with gradients at once: Liger Kernel, arXiv
2410.10989. Cut Cross-Entropy, arXiv 2411.09009, holds less and multiplies once more.)

Gradients of 16-bit inputs are of the sum of losses, rounded, then scaled and rounded again; weight's is
summed over chunks in fp32. Only the reference can be differentiated twice, and only unsharded.
Shapes: T tokens, D model, V vocabulary, V/tp a rank's rows of it.
"""

import torch
import torch.nn.functional as F

from . import cross_entropy_cpu as cpu
from .config import Path
from .cross_entropy_chunks import ON_CPU, ON_DEVICE, VocabularyShard, chunked_loss, row_places
from .cross_entropy_cpu import row_losses
from .dispatch import at_least_fp32, choose

__all__ = ["VocabularyShard", "linear_cross_entropy"]


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignored: int = -100,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    path: Path = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -log softmax(x @ weight.T)[label], how many labels) over labels that are not `ignored`.

    x [..., D], weight [V, D] or [V/tp, D], labels [...] int64 -> scalars, fp32 (fp64 for fp64) and int64.
    `z_loss` * logsumexp^2 a token is part of the sum. A label that is none raises IndexError on the CPU and
    stops the device, as in F.cross_entropy; with a shard, where no rank knows them all, the loss is NaN.
    """
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} are not one for each vector of x {list(x.shape)}")
    chosen = choose("cross_entropy", x, path).path
    x, labels = x.reshape(-1, x.shape[-1]), labels.flatten()
    count = (labels != ignored).sum()
    if chosen == "reference":
        return _reference(x, weight, labels, ignored, z_loss, shard), count
    if chosen == "cpu":
        return chunked_loss(x, weight, labels, ignored, z_loss, shard, cpu.STEPS, ON_CPU), count
    from .gpu.cross_entropy import STEPS

    return chunked_loss(x, weight, labels, ignored, z_loss, shard, STEPS, ON_DEVICE), count


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignored: int,
    z_loss: float,
    shard: VocabularyShard | None,
) -> torch.Tensor:
    logits = F.linear(x, weight).to(at_least_fp32(x.dtype))  # [T, V]
    if shard is None:
        loss = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        if z_loss == 0:
            return loss
        return loss + z_loss * torch.where(labels == ignored, 0, logits.logsumexp(-1)).square().sum()

    def whole(part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, whose gradient is this rank's."""
        summed = part.detach().clone()
        shard.sum_over(summed)
        return part + (summed - part.detach())

    places = row_places(labels, weight.shape[0], ignored, shard)
    top = logits.detach().amax(-1)
    shard.max_over(top)
    lse = top + whole((logits - top[:, None]).exp().sum(-1)).log()
    here = places >= 0
    label = whole(torch.where(here, logits.gather(1, places.clamp(min=0)[:, None])[:, 0], 0))
    label = torch.where(whole(here.to(label.dtype)) > 0, label, torch.nan)
    return row_losses(lse, label, places, z_loss).sum()
