"""Llama: a decoder of RMSNorm, rotary grouped-query attention and SwiGLU. Plain PyTorch, no process group.

Architecture: "LLaMA" (arXiv 2302.13971) and "The Llama 3 Herd of Models" (arXiv 2407.21783). Rotary pairs are
the first and second half of a head, as in the published weights of Hugging Face. Shapes: B batch, S sequence,
D model, H query heads, K key/value heads, P head size, V vocabulary.
"""

import torch
from torch import nn

from ..kernels.attention import flashmask_attention
from ..kernels.config import AUTO, KernelsConfig
from ..kernels.cross_entropy import VocabularyShard, linear_cross_entropy
from ..kernels.flashmask.kinds import packed
from ..kernels.flashmask.mask import ColumnMask
from ..kernels.gate import swiglu
from ..kernels.linear import Deferred, linear
from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rope import rotary_table, rotate
from ..parallel.initial import Constant, Initial, Normal
from ..parallel.plan import ModelPlan, Role, Split, Stages
from .llama_config import LlamaShape

EMBEDDING_STD = 0.02


def llama_plan(*, tied: bool) -> ModelPlan:
    """How a Llama splits: attention by heads, the feed-forward part by hidden features, the vocabulary by
    rows.
    """
    vocabularies = ("embedding.weight",) if tied else ("embedding.weight", "head.weight")
    return ModelPlan(
        parameters={
            **dict.fromkeys(vocabularies, Split.VOCABULARY),
            "blocks.*.attention.[qkv].weight": Split.COLUMN,
            "blocks.*.attention.o.weight": Split.ROW,
            "blocks.*.ffn.gate.weight": Split.COLUMN,
            "blocks.*.ffn.up.weight": Split.COLUMN,
            "blocks.*.ffn.down.weight": Split.ROW,
        },
        modules={
            "embedding": Role.EMBEDDING,
            "blocks.*.attention": Role.SEQUENCE,
            "blocks.*.attention.core": Role.ATTENTION,
            "blocks.*.ffn": Role.SEQUENCE,
            "loss": Role.LOSS,
        },
        stages=Stages(
            entry=("embedding",),
            blocks="blocks",
            exit=("norm", "head", "loss"),
            shared=("embedding",) if tied else (),
        ),
    )


class RMSNorm(nn.Module):
    """Scale each vector to unit root-mean-square, computed in fp32: [..., D] -> [..., D], x's dtype."""

    def __init__(self, dim: int, eps: float, kernels: KernelsConfig) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self._path = kernels.of("norm")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, eps=self.eps, path=self._path)

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual), in one pass over both."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps, path=self._path)


class Linear(nn.Linear):
    """Matrix product without a bias: [..., K] -> [..., N]."""

    deferred: Deferred | None = None  # set by a pipeline that computes gradients of weights when it has time

    def __init__(self, width_in: int, width_out: int, kernels: KernelsConfig) -> None:
        super().__init__(width_in, width_out, bias=False)
        self._path = kernels.of("linear")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self._path, self.deferred)


class AttentionCore(nn.Module):
    """Where tokens meet: q [B, S, H, P], k and v [B, S, K, P] -> [B, S, H, P]."""

    def __init__(self, kernels: KernelsConfig) -> None:
        super().__init__()
        self.path = kernels.of("attention")

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
        """Scores that `mask` hides count nothing."""
        out: torch.Tensor = flashmask_attention(q, k, v, mask, path=self.path)
        return out


class Attention(nn.Module):
    """Causal grouped-query attention inside documents: [B, S, D] -> [B, S, D]."""

    def __init__(self, shape: LlamaShape, kernels: KernelsConfig) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q = Linear(shape.dim, shape.heads * shape.head_dim, kernels)
        self.k = Linear(shape.dim, shape.kv_heads * shape.head_dim, kernels)
        self.v = Linear(shape.dim, shape.kv_heads * shape.head_dim, kernels)
        self.o = Linear(shape.heads * shape.head_dim, shape.dim, kernels)
        self.core = AttentionCore(kernels)
        self._rope = kernels.of("rope")

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; `turns` are the rotary table of the positions."""
        rope = self._rope
        flat = (rotate(self.q(x), turns, path=rope), rotate(self.k(x), turns, path=rope), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)
        return self.o(self.core(q, k, v, mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): [..., D] -> [..., D]."""

    def __init__(self, shape: LlamaShape, kernels: KernelsConfig) -> None:
        super().__init__()
        self.gate = Linear(shape.dim, shape.ffn_dim, kernels)
        self.up = Linear(shape.dim, shape.ffn_dim, kernels)
        self.down = Linear(shape.ffn_dim, shape.dim, kernels)
        self._path = kernels.of("gate")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down(swiglu(self.gate(x), self.up(x), path=self._path))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, shape: LlamaShape, kernels: KernelsConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps, kernels)
        self.attention = Attention(shape, kernels)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, kernels)
        self.ffn = FeedForward(shape, kernels)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        attended = self.attention(self.attention_norm(x), turns, mask)
        normed, x = self.ffn_norm.after_adding(attended, x)
        return x + self.ffn(normed)


class TokenLoss(nn.Module):
    """Sum of the losses of all labels that are not -100, fp32: the logits are never in memory as a whole."""

    def __init__(self, kernels: KernelsConfig) -> None:
        super().__init__()
        self._path = kernels.of("cross_entropy")

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        shard: VocabularyShard | None = None,
    ) -> torch.Tensor:
        """x [B, S, D], weight [V, D] or this rank's rows of it, labels [B, S] -> a scalar."""
        return linear_cross_entropy(x, weight, labels, shard=shard, path=self._path)[0]


class Llama(nn.Module):
    """The whole model: tokens [B, S] -> logits [B, S, V], or the sum of losses.

    As a stage of a pipeline it lacks some of its modules: without its embedding it is given the hidden
    states [B, S, D] instead of tokens, without its norm it returns them.
    """

    computes_loss = True

    def __init__(self, shape: LlamaShape, kernels: KernelsConfig = AUTO) -> None:
        super().__init__()
        self.shape = shape
        self._kernels = kernels
        self.plan = llama_plan(tied=shape.tied_embeddings)
        self.width = shape.dim
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, kernels) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps, kernels)
        self.head = None if shape.tied_embeddings else Linear(shape.dim, shape.vocab_size, kernels)
        self.loss = TokenLoss(kernels)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        document_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, positions, document_ids: [B, S] -> logits [B, S, V] in the compute dtype.

        With `labels` [B, S] the sum of the losses of all labels that are not -100 instead, fp32. Where a
        context is split, tokens, positions and labels are this rank's; document ids are always whole.
        """
        mask = packed(document_ids)
        turns = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta)
        x = tokens if tokens.is_floating_point() else self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turns, mask)
        if self.norm is None:
            return x
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if labels is None:
            return linear(x, weight, self._kernels.of("linear"))
        return self.loss(x, weight, labels)

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
