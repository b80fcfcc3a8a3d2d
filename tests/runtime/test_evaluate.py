"""Validation figures by hand: nats a token, bits a byte of text."""

import math

import numpy as np
import torch
from harness import run_ranks
from torch import nn

from rayfold.parallel.context import ContextSplit
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.model import Sharded
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.data.packing import IGNORED
from rayfold.runtime.evaluate import Validation, evaluate


class Fixed(nn.Module):
    """Says the same probabilities for every next token: 1/2, 1/4, 1/8, 1/8."""

    def forward(
        self, tokens: torch.Tensor, *, positions: torch.Tensor, document_ids: torch.Tensor
    ) -> torch.Tensor:
        assert not self.training
        return torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(*tokens.shape, 4)


def batch_of(labels: list[list[int]]) -> Batch:
    tensor = torch.tensor(labels)
    blank = torch.zeros_like(tensor)
    return Batch(
        tokens=blank, labels=tensor, positions=blank, document_ids=blank.int(), sample_ids=(0,) * len(labels)
    )


def test_bits_per_byte_by_hand() -> None:
    """Labels cost 1, 2, 3, 3 bits and stand for 1, 4, 2, 0 bytes of text; padding counts for nothing."""
    parts = [[batch_of([[0, 1, IGNORED]])], [batch_of([[2, 3, 0]])], [batch_of([[IGNORED] * 3])]]
    bits, tokens, text_bytes = 1 + 2 + 3 + 3 + 1, 5, 1 + 4 + 2 + 0 + 1

    def on_rank() -> Validation:
        mesh = make_mesh(Layout(dp_replicate=1, dp_shard=3), torch.device("cpu"))
        model = Fixed()
        sharded = Sharded(parts=[model], held=[], mesh=mesh, context=ContextSplit("ring", mesh.cp))
        figures = evaluate(sharded, parts[mesh.data.rank], np.array([1, 4, 2, 0]))
        assert model.training
        return figures

    for figures in run_ranks(3, on_rank):
        assert math.isclose(figures.loss, bits * math.log(2) / tokens, rel_tol=1e-6)
        assert math.isclose(figures.bits_per_byte, bits / text_bytes, rel_tol=1e-6)
