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
from ..parallel.mesh import FoldedMesh, pretended_mesh
from ..parallel.parallelize import Workings, lay_out
from ..parallel.recompute import KEPT
from ..parallel.schedules import order_of
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
    snapshots: int = 0  # copies in the host's shared memory, where the living state lies too on a CPU

    @property
    def state(self) -> int:
        """What a snapshot copies."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        """Sum of all parts; the process itself (torch and Ray, about 300 MiB on CPU) comes on top."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """The parts and their total, in bytes."""
        return {**asdict(self), "total": self.total}


def estimate_memory(plan: RunPlan) -> RankMemory:
    """Memory of the fullest rank of `plan`. Raises what building the model or reading the tokenizer does."""
    vocab_size = resolve_tokenizer(plan.config.data).vocab_size
    return max((_of_rank(plan, vocab_size, rank) for rank in range(plan.layout.pp)), key=lambda m: m.total)


@dataclass(frozen=True)
class _Stage:
    """Numbers of one stage of a pipeline, or of the whole model without one."""

    numbers: int  # of its parameters, cut by tensor parallelism
    largest: int  # of its largest block, or of what is in none
    outside: int  # of what is in no block
    share: int  # that a rank keeps of them
    kept: list[int]  # bytes for the backward pass of a micro-batch


def _of_rank(plan: RunPlan, vocab_size: int, pp_rank: int) -> RankMemory:
    """The first rank of a pipeline rank; others hold as much, or less where sizes are uneven."""
    config, layout = plan.config, plan.layout
    mesh = pretended_mesh(layout, torch.device("cpu"), pp_rank=pp_rank)
    stages = {stage: _stage(plan, mesh, vocab_size, stage) for stage in layout.stages_of(pp_rank)}
    share = sum(stage.share for stage in stages.values()) * FP32_BYTES
    width = 2 if config.precision.compute == "bf16" else FP32_BYTES
    gathered, gradients = 0, share
    sharded = layout.dp_shard * layout.cp > 1
    if layout.pp > 1:
        # a stage is gathered for the whole step, and its gradients are whole until all micro-batches are done
        whole = sum(stage.numbers for stage in stages.values())
        gathered = whole * width if sharded or width != FP32_BYTES else 0
        gradients += whole * FP32_BYTES if sharded else 0
    elif sharded or width != FP32_BYTES:
        # the root is gathered for the whole step, one block beside it; whole copies in fp32 gather nothing
        gathered = sum(stage.outside + stage.largest for stage in stages.values()) * width
    return RankMemory(
        parameters=share,
        gradients=gradients,
        optimizer=2 * share,
        gathered=gathered,
        activations=_most_kept(plan, pp_rank, {number: sum(stage.kept) for number, stage in stages.items()}),
        backward=max((size for stage in stages.values() for size in stage.kept), default=0),
        # with snapshots they are what is written
        checkpoint_copy=3 * share if plan.device == "cpu" and config.snapshot.enabled is False else 0,
        snapshots=config.snapshot.copies * 3 * share if config.snapshot.enabled is not False else 0,
    )


def _stage(plan: RunPlan, mesh: FoldedMesh, vocab_size: int, stage: int) -> _Stage:
    config, layout = plan.config, plan.layout
    fields = config.model if isinstance(config.model, LlamaConfig) else config.model.fields
    workings = Workings(recompute=config.parallel.recompute)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config.model.family, fields, vocab_size=vocab_size, kernels=config.kernels)
        lay_out(model, getattr(model, "plan", None), mesh, workings, stage=stage)
        dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
        _cast(model, dtype)
        width: int = getattr(model, "width", 0)  # a model for a pipeline states it
        batch = _pretended_batch(plan, first=stage == 0, width=width, dtype=dtype)
        kept = saved_bytes(model, batch, recompute=config.parallel.recompute)
    if stage < layout.stages - 1:  # what was sent on is held until its gradient comes back
        rows, own = batch.labels.shape
        kept.append(rows * own // layout.tp * width * dtype.itemsize)
    blocks = blocks_of(model)
    per_block = [_numbers(block) for block in blocks]
    outside = _numbers(model) - sum(per_block)
    shards = layout.dp_shard * layout.cp
    return _Stage(
        numbers=_numbers(model),
        largest=max([outside, *per_block]),
        outside=outside,
        share=sum(_largest_shard(p, shards) for p in model.parameters()),
        kept=kept,
    )


def _most_kept(plan: RunPlan, pp_rank: int, kept: dict[int, int]) -> int:
    """The most bytes kept at once for backward passes, by what each stage keeps of a micro-batch."""
    if plan.layout.pp == 1:
        return sum(kept.values())
    part = plan.config.batch.size // plan.layout.dp_size
    held = most = 0
    for step in order_of(plan.layout, part // plan.config.batch.micro(plan.layout))[pp_rank]:
        held += kept[step.stage] * {"F": 1, "B": -1, "I": 0, "W": -1}[step.kind]
        most = max(most, held)
    return most


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
            if parameter.is_floating_point() and parameter.dtype != dtype:
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


def _pretended_batch(plan: RunPlan, *, first: bool, width: int, dtype: torch.dtype) -> Batch:
    """A micro-batch as a stage is given it: tokens at the first, then hidden states."""
    rows, length = plan.config.batch.micro(plan.layout), plan.config.data.seq_len
    own = length // plan.layout.cp
    tokens = torch.zeros(rows, own, dtype=torch.int64)
    if not first:
        tokens = torch.zeros(rows, own // plan.layout.tp, width, dtype=dtype, requires_grad=True)
    return Batch(
        tokens=tokens,
        labels=torch.zeros(rows, own, dtype=torch.int64),
        positions=torch.arange(own).expand(rows, own),
        document_ids=torch.zeros(rows, length, dtype=torch.int32),
        sample_ids=tuple(range(rows)),
    )
