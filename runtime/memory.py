"""Memory of one rank before anything starts: parameters counted, activations measured on a pretended step.

The model runs once on tensors that have shapes and no memory; what autograd would keep for the backward pass
is added up. So the figure follows the real model, also a user's own, and needs no formula of a family.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.llama_config import LlamaConfig
from ..models.registry import build_model
from ..parallel.recompute import KEPT, apply_recompute
from ..parallel.shard import blocks_of
from .data.loader import Batch
from .data.tokenizer import resolve_tokenizer
from .plan import RunPlan
from .step import token_loss

FP32_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its fullest."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int  # the whole block (or the rest of the model) that is being computed, in the compute dtype
    activations: int  # kept by the forward pass of a micro-batch for the backward pass
    backward: int  # gradient of the largest of them (logits, where a model makes them), alive beside them
    checkpoint_copy: int  # host copies from which a checkpoint is written; other memory than a GPU's

    @property
    def total(self) -> int:
        """Sum of all parts; the process itself (torch and Ray, about 300 MiB on CPU) comes on top."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """The parts and their total, in bytes."""
        return {**asdict(self), "total": self.total}


def estimate_memory(plan: RunPlan) -> RankMemory:
    """Memory of a rank of `plan`. Raises what building the model or reading the tokenizer raises."""
    config, layout = plan.config, plan.layout
    fields = config.model if isinstance(config.model, LlamaConfig) else config.model.fields
    vocab_size = resolve_tokenizer(config.data).vocab_size
    batch = _pretended_batch(config.batch.micro(layout.dp_size), config.data.seq_len)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config.model.family, fields, vocab_size=vocab_size, kernels=config.kernels)
        if config.precision.compute == "bf16":
            _cast(model, torch.bfloat16)
        blocks = blocks_of(model)
        apply_recompute(blocks, config.parallel.recompute)
        kept = saved_bytes(model, batch, recompute=config.parallel.recompute)
    count = _numbers(model)
    per_block = [_numbers(block) for block in blocks]
    largest = max([count - sum(per_block), *per_block])
    width = 2 if config.precision.compute == "bf16" else FP32_BYTES
    # the root is gathered for the whole step, one block beside it; whole copies in fp32 gather nothing new
    gathered = 0
    if layout.dp_shard > 1 or width != FP32_BYTES:
        gathered = (count - sum(per_block) + largest) * width
    share = sum(_largest_shard(p, layout.dp_shard) for p in model.parameters()) * FP32_BYTES
    return RankMemory(
        parameters=share,
        gradients=share,
        optimizer=2 * share,
        gathered=gathered,
        activations=sum(kept),
        backward=max(kept, default=0),
        checkpoint_copy=3 * share if plan.device == "cpu" else 0,
    )


def _largest_shard(parameter: torch.Tensor, shards: int) -> int:
    """Numbers that the rank with most of `parameter` holds: it is cut by rows."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(rows, 1))


def saved_bytes(model: nn.Module, batch: Batch, *, recompute: str = "none") -> list[int]:
    """Bytes of each thing that the backward pass of `batch` needs, beyond parameters; shared memory once."""
    known = {_memory_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (memory := _memory_of(tensor)) not in known:
            kept[memory] = tensor.untyped_storage()
        return tensor

    blocks = [] if recompute == "none" else blocks_of(model)
    watch = _KeptResults(keep)
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda _, inputs: _keep_inputs(keep, inputs)))
        if recompute == "selective":
            handles.append(block.register_forward_pre_hook(lambda *_: watch.inside(True)))
            handles.append(block.register_forward_hook(lambda *_: watch.inside(False)))
    with watch if blocks else nullcontext(), saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_loss(model, batch)
    for handle in handles:
        handle.remove()
    del loss
    return [storage.nbytes() for storage in kept.values()]


class _KeptResults(TorchDispatchMode):
    """Sees the results that selective recompute keeps inside a block, which autograd's hooks do not."""

    def __init__(self, keep: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._keep = keep
        self._inside = False

    def inside(self, inside: bool) -> None:
        """Whether a block is being computed: only its results are kept."""
        self._inside = inside

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if self._inside and op in KEPT:
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    self._keep(value)
        return result


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating parameters in another dtype; `Module.to` cannot swap pretended ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))


def _keep_inputs(keep: Any, inputs: tuple[Any, ...]) -> None:
    # a block that is recomputed holds its inputs outside of autograd's sight
    for value in inputs:
        if isinstance(value, torch.Tensor):
            keep(value)


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pretended_batch(rows: int, seq_len: int) -> Batch:
    positions = torch.arange(seq_len).expand(rows, seq_len)
    return Batch(
        tokens=torch.zeros(rows, seq_len, dtype=torch.int64),
        labels=torch.zeros(rows, seq_len, dtype=torch.int64),
        positions=positions,
        document_ids=torch.zeros(rows, seq_len, dtype=torch.int32),
        sample_ids=tuple(range(rows)),
    )
