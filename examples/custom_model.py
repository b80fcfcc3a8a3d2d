"""A model of your own: gated causal convolutions instead of attention, in plain PyTorch.

What Rayfold asks of a model is all here: a factory that takes `vocab_size` and the keys of the `[model]`
section, and a module that turns tokens into logits. Every member of the `nn.ModuleList` is one unit of
sharding and recompute. The model knows no rank: the same file trains on one CPU and on a cluster. Run it with

    rayfold train examples/custom_model.toml

Shapes: B batch, S sequence, D width, V vocabulary, K taps.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Mixer(nn.Module):
    """Mix each channel over the last K tokens of the same document, then gate: [B, S, D] -> [B, S, D]."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate_and_value = nn.Linear(dim, 2 * dim, bias=False)
        self.weights = nn.Parameter(torch.randn(taps, dim) * taps**-0.5)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
        """x [B, S, D], document_ids [B, S] -> [B, S, D]."""
        gate, value = self.gate_and_value(self.norm(x)).chunk(2, dim=-1)
        mixed = value * self.weights[0]
        for lag in range(1, min(len(self.weights), x.shape[1])):
            # rows are packed: a token looks back only as far as its own document goes
            same = document_ids[:, lag:] == document_ids[:, :-lag]
            earlier = value[:, :-lag] * self.weights[lag] * same.unsqueeze(-1)
            mixed = mixed + F.pad(earlier, (0, 0, lag, 0))
        return x + self.out(F.silu(gate) * mixed)


class ConvolutionLM(nn.Module):
    """tokens [B, S] -> logits [B, S, V]."""

    def __init__(self, vocab_size: int, dim: int, layers: int, taps: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Mixer(dim, taps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(
        self, tokens: torch.Tensor, *, positions: torch.Tensor, document_ids: torch.Tensor
    ) -> torch.Tensor:
        """All inputs [B, S]. Positions start anew in each document; a convolution has no need of them."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, document_ids)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def build(vocab_size: int, dim: int = 128, layers: int = 4, taps: int = 8) -> nn.Module:
    """The factory that `model.family` names; the other keys of `[model]` are its arguments."""
    return ConvolutionLM(vocab_size, dim, layers, taps)
