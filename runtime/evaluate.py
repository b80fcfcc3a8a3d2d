"""Validation: mean loss and bits per byte over held-out documents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..parallel.collectives import sum_over
from ..parallel.model import Sharded
from .data.loader import Batch
from .data.packing import IGNORED
from .step import on_device, part_of, pipeline_inputs, token_loss


@dataclass(frozen=True)
class Validation:
    """Figures over all ranks."""

    loss: float  # nats a token
    bits_per_byte: float  # of the text, so that tokenizers can be compared


@torch.no_grad()
def evaluate(model: Sharded, batches: Iterable[Batch], token_bytes: np.ndarray) -> Validation:
    """Measure `model` on each rank's `batches` (every rank has as many); `token_bytes` [V] is the text behind
    an id.
    """
    mesh = model.mesh
    # the last entry serves ignored labels
    widths = torch.from_numpy(np.append(token_bytes, 0)).to(mesh.device)
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    model.train(False)
    for batch in batches:
        batch = on_device(batch, mesh.device)
        loss_sum = forward(model, batch)
        if mesh.tp.rank == 0:  # the others have the same loss
            sums[0] += loss_sum
        if mesh.speaks:
            valid = batch.labels != IGNORED
            sums[1] += valid.sum()
            sums[2] += widths[torch.where(valid, batch.labels, -1)].sum()
    model.train()
    sum_over(sums, mesh.world)
    loss_sum, tokens, text_bytes = sums.tolist()
    return Validation(
        loss=loss_sum / max(tokens, 1), bits_per_byte=loss_sum / math.log(2) / max(text_bytes, 1)
    )


def forward(model: Sharded, batch: Batch) -> torch.Tensor:
    """This rank's share of the sum of losses of whole rows."""
    part = part_of(batch, model.context)
    if model.pipeline is None:
        return token_loss(model.parts[0], part)
    return model.pipeline.evaluate([pipeline_inputs(part)])
