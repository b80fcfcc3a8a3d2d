"""Recompute: what the backward pass computes again instead of keeping it (arXiv 1604.06174, 2205.05198)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..kernels.flashmask.cpu import masked_attention
from ..kernels.linear import ONEDNN_PRODUCT
from .ring import ring_attention

# Results worth their memory: matrix products and attention cost more to compute again than to keep.
KEPT = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        ONEDNN_PRODUCT,
        masked_attention._opoverload,
        ring_attention._opoverload,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    )
)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(blocks: list[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Make each block recompute its forward in the backward pass; names and states of the blocks stay as they
    are.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        block.forward = partial(checkpoint, forward, **options)
