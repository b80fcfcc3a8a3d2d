"""What happens to a chunk of logits on the CPU: its statistics, its losses, its gradient in its place.

fp32 logits are turned where they lie; 16-bit ones a few rows at a time in fp32, then rounded back.
Shapes: n tokens of a chunk, V vocabulary. `places` [n] int64: the column of a token's label, or one of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .dispatch import at_least_fp32

ELSEWHERE = -1  # the label is in no column here
IGNORED = -2
# Of fp32 logits at a time: 32 rows of a 32k vocabulary, one for each of so many cores, within their caches.
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class RowSteps:
    """The passes over a chunk that each device has its own of."""

    # (logits, places) -> maximum, sum of exp(logit - maximum), label's logit or 0: [n] each, in fp32
    statistics: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    # (logits, places, logsumexp over the whole vocabulary, z_loss): logits become their gradient
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None]
    # (logits, places, z_loss) -> losses [n]; logits become their gradient
    loss_and_gradient: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def row_losses(lse: torch.Tensor, label: torch.Tensor, places: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Loss of each token from its logsumexp and its label's logit, all [n]; 0 where it is ignored."""
    losses = lse - label
    if z_loss != 0:
        losses = losses + z_loss * lse.square()
    return torch.where(places == IGNORED, 0, losses)


def _statistics(
    logits: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = []
    for block, at in _blocks(logits, places):
        wide = block.to(at_least_fp32(block.dtype))
        top = wide.amax(-1)
        parts.append((top, (wide - top[:, None]).exp_().sum(-1), _label_logits(wide, at)))
    top, total, label = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return top, total, label


def _gradient(logits: torch.Tensor, places: torch.Tensor, lse: torch.Tensor, z_loss: float) -> None:
    for (block, at), whole in zip(_blocks(logits, places), lse.split(_rows(logits)), strict=True):
        wide = block.to(lse.dtype)
        wide.sub_(whole[:, None]).exp_()
        _finish(wide, at, whole, z_loss)
        if wide is not block:
            block.copy_(wide)


def _loss_and_gradient(logits: torch.Tensor, places: torch.Tensor, z_loss: float) -> torch.Tensor:
    losses = []
    for block, at in _blocks(logits, places):
        wide = block.to(at_least_fp32(block.dtype))
        top, label = wide.amax(-1), _label_logits(wide, at)
        torch.softmax(wide, -1, out=wide)
        lse = top - wide.amax(-1).log()  # the highest logit's probability is 1 / sum
        losses.append(row_losses(lse, label, at, z_loss))
        _finish(wide, at, lse, z_loss)
        if wide is not block:
            block.copy_(wide)
    return torch.cat(losses)


def _finish(probabilities: torch.Tensor, places: torch.Tensor, lse: torch.Tensor, z_loss: float) -> None:
    """Probabilities [n, V] become d loss / d logits: p * (1 + 2 * z_loss * lse), less 1 at the label."""
    scale = torch.where(places == IGNORED, 0, 1 + 2 * z_loss * lse)
    probabilities.mul_(scale[:, None])
    at_label = -(places >= 0).to(probabilities.dtype)
    probabilities.scatter_add_(1, places.clamp(min=0)[:, None], at_label[:, None])


def _label_logits(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    found = logits.gather(1, places.clamp(min=0)[:, None])[:, 0]
    return torch.where(places >= 0, found, 0)


def _rows(logits: torch.Tensor) -> int:
    return max(1, BLOCK_BYTES // (4 * max(1, logits.shape[1])))


def _blocks(logits: torch.Tensor, places: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(logits.split(_rows(logits)), places.split(_rows(logits)), strict=True)


STEPS = RowSteps(_statistics, _gradient, _loss_and_gradient)
