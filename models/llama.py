"""Llama: a decoder of RMSNorm, rotary grouped-query attention and SwiGLU. Plain PyTorch, no process group.

Architecture: "LLaMA" (arXiv 2302.13971) and "The Llama 3 Herd of Models" (arXiv 2407.21783). Rotary pairs are
the first and second half of a head, as in the published weights of Hugging Face. Shapes: B batch, S sequence,
D model, H query heads, K key/value heads, P head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.attention import document_attention, document_runs
from ..parallel.initial import Constant, Initial, Normal
from .llama_config import LlamaShape

EMBEDDING_STD = 0.02


class RMSNorm(nn.Module):
    """Scale each vector to unit root-mean-square, computed in fp32: [..., D] -> [..., D], x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Each position's turns, cos + i sin: positions [B, S] -> complex64 [B, S, 1, P / 2].

    RoFormer, arXiv 2104.09864. Complex, because mixed precision casts every real tensor that a block is
    given, and bf16 keeps too few bits of an angle.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponents
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(2)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + P / 2]) by their angles, computed in fp32: [B, S, H, P], x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = turns.real.contiguous(), turns.imag.contiguous()  # strided, they would take half as long again
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention inside documents: [B, S, D] -> [B, S, D]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; `runs` are the documents (`kernels.attention.document_runs`)."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        out = document_attention(rotate(q, turns), rotate(k, turns), v, runs)
        return self.o(out.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): [..., D] -> [..., D]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.up = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), turns, runs)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """The whole model: tokens [B, S] -> logits [B, S, V]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.head = None if shape.tied_embeddings else nn.Linear(shape.dim, shape.vocab_size, bias=False)

    def forward(
        self, tokens: torch.Tensor, *, positions: torch.Tensor, document_ids: torch.Tensor
    ) -> torch.Tensor:
        """tokens, positions, document_ids: [B, S] -> logits [B, S, V] in the compute dtype."""
        runs = document_runs(document_ids)
        turns = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turns, runs)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def initial(self, name: str) -> Initial:
        """How the parameter `name` starts: matrices keep the variance of their input, outputs shrink with
        depth.
        """
        if name.endswith("norm.weight"):
            return Constant(1.0)
        if name in ("embedding.weight", "head.weight"):
            return Normal(EMBEDDING_STD)
        fan_in = self.shape.ffn_dim if name.endswith("ffn.down.weight") else self.shape.dim
        std = fan_in**-0.5
        if name.endswith(("attention.o.weight", "ffn.down.weight")):
            std /= (2 * self.shape.layers) ** 0.5  # 2 additions a block: the residual stream keeps unit scale
        return Normal(std)
