"""Validation: mean loss and bits per byte over held-out documents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..parallel.collectives import sum_over
from ..parallel.mesh import FoldedMesh
from .data.loader import Batch
from .data.packing import IGNORED
from .step import on_device, token_loss


@dataclass(frozen=True)
class Validation:
    """Figures over all ranks."""

    loss: float  # nats a token
    bits_per_byte: float  # of the text, so that tokenizers can be compared


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], mesh: FoldedMesh, token_bytes: np.ndarray
) -> Validation:
    """Measure `model` on each rank's `batches` (every rank has as many); `token_bytes` [V] is the text behind
    an id.
    """
    widths = torch.from_numpy(np.append(token_bytes, 0)).to(
        mesh.device
    )  # the last entry serves ignored labels
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    model.eval()
    for batch in batches:
        batch = on_device(batch, mesh.device)
        valid = batch.labels != IGNORED
        sums[0] += token_loss(model, batch)
        sums[1] += valid.sum()
        sums[2] += widths[torch.where(valid, batch.labels, -1)].sum()
    model.train()
    sum_over(sums, mesh.data)
    loss_sum, tokens, text_bytes = sums.tolist()
    return Validation(
        loss=loss_sum / max(tokens, 1), bits_per_byte=loss_sum / math.log(2) / max(text_bytes, 1)
    )
