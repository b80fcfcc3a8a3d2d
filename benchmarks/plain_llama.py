"""The baseline of `layouts.py`: a Llama of plain PyTorch modules, laid out by torch's own tools alone.

Tensor and sequence parallelism are `parallelize_module` with DTensor, pipelines are
`torch.distributed.pipelining`, data parallelism is FSDP2. Torch has no context parallelism that runs on the
CPU under a mask; what one would write is used: keys and values gathered over the ranks, and attention under
the rows' part of a dense mask.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.layout import Layout
from rayfold.runtime.data.loader import Batch


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, shape.dim, bias=False)
        self.context: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q, k, v = heads
        q, k = rotate(q, turns), rotate(k, turns)
        k, v = self.context(k), self.context(v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.up = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), turns, mask)
        return x + self.ffn(self.ffn_norm(x))


class PlainLlama(nn.Module):
    """Some layers of a Llama; without its embedding it is given hidden states, without its head it returns
    them.
    """

    def __init__(self, shape: LlamaShape, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim) if first else None
        self.blocks = nn.ModuleDict({str(layer): Block(shape) for layer in layers})
        self.norm = nn.RMSNorm(shape.dim, shape.norm_eps) if last else None
        self.head = nn.Linear(shape.dim, shape.vocab_size, bias=False) if last else None

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, document_ids: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        rows, columns = document_ids.gather(1, places)[:, :, None], document_ids[:, None]
        order = torch.arange(document_ids.shape[1])
        mask = ((rows == columns) & (places[:, :, None] >= order))[:, None]
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** (-torch.arange(half) / half)
        angles = positions[:, None, :, None] * rates
        turns = torch.stack([angles.cos(), angles.sin()])
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, turns, mask)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x [B, H, S, P], turns [2, B, 1, S, P / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = turns
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def apply_tensor_parallel(model: PlainLlama, mesh: DeviceMesh) -> None:
    """As torch's tutorial on tensor parallelism has it."""
    plan: dict[str, Any] = {}
    if model.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if model.head is not None:
        plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        )
    parallelize_module(model, mesh, plan)
    gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    for block in model.blocks.values():
        attention = PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        )
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": attention,
                **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
                "attention.o": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "ffn": PrepareModuleInput(**gathered),
                "ffn.gate": ColwiseParallel(),
                "ffn.up": ColwiseParallel(),
                "ffn.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


@dataclass
class PlainRun:
    """A laid out model and what trains it."""

    layout: Layout
    mesh: DeviceMesh
    model: PlainLlama
    optimizer: torch.optim.Optimizer
    micro_size: int

    def step(self, batch: Batch) -> float:
        """Train on this rank's rows; the loss, where it is known."""
        count = torch.tensor(float((batch.labels != -100).sum()))
        dist.all_reduce(count, group=self.mesh.get_group("dp"))
        cp, at = self.layout.cp, self.mesh.get_local_rank("cp")
        width = batch.tokens.shape[1] // cp
        here = slice(at * width, (at + 1) * width)
        places = torch.arange(here.start, here.stop).expand(batch.tokens.shape[0], width)
        own = {"positions": batch.positions[:, here], "document_ids": batch.document_ids, "places": places}
        tokens, labels = batch.tokens[:, here], batch.labels[:, here].contiguous()
        with self._losses():
            loss = self._pass(tokens, labels, own, count)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _losses(self) -> AbstractContextManager[Any]:
        return loss_parallel() if self.layout.tp > 1 else nullcontext()

    def _pass(
        self, tokens: torch.Tensor, labels: torch.Tensor, own: dict[str, Any], count: torch.Tensor
    ) -> float:
        def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / count

        micros = tokens.shape[0] // self.micro_size
        total = 0.0
        if self.layout.pp == 1:
            for number in range(micros):
                rows = slice(number * self.micro_size, (number + 1) * self.micro_size)
                logits = self.model(tokens[rows], **{k: v[rows] for k, v in own.items()})
                loss = loss_of(logits, labels[rows])
                loss.backward()
                total += float(loss.detach())
            return total
        schedule, losses = self._schedule(micros, loss_of), []  # type: ignore[var-annotated]
        if self.mesh.get_local_rank("pp") == 0:
            schedule.step(tokens, **own)
        elif self.mesh.get_local_rank("pp") == self.layout.pp - 1:
            schedule.step(target=labels, losses=losses, **own)
        else:
            schedule.step(**own)
        return float(sum(loss.detach() for loss in losses))

    def _schedule(self, micros: int, loss_of: Any) -> Any:
        if not hasattr(self, "_made"):
            group = self.mesh.get_group("pp")
            stage = PipelineStage(
                self.model, dist.get_rank(group), self.layout.pp, torch.device("cpu"), group=group
            )
            made = Schedule1F1B if micros >= self.layout.pp else ScheduleGPipe
            self._made = made(stage, micros, loss_fn=loss_of, scale_grads=False)
        return self._made

    def _clip(self) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        square = (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
        if self.layout.pp > 1:
            dist.all_reduce(square, group=self.mesh.get_group("pp"))
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, square.sqrt())


def plain_run(shape: LlamaShape, layout: Layout, micro_size: int) -> PlainRun:
    """Lay a model out by hand; every rank calls it."""
    names = ("pp", "dp", "cp", "tp")
    sizes = (layout.pp, layout.dp_size, layout.cp, layout.tp)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    stage, stages = mesh.get_local_rank("pp"), layout.pp
    layers = range(shape.layers * stage // stages, shape.layers * (stage + 1) // stages)
    torch.manual_seed(0)
    model = PlainLlama(shape, layers, first=stage == 0, last=stage == stages - 1)
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"])
    if layout.cp > 1:
        group = mesh.get_group("cp")
        for block in model.blocks.values():
            block.attention.context = lambda x: funcol.all_gather_tensor_autograd(x.contiguous(), 2, group)
    if layout.dp_size * layout.cp > 1:
        sharding = _sharding(mesh, layout)
        for module in (*model.blocks.values(), model):
            fully_shard(module, mesh=sharding)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(_groups(model), lr=1e-3, fused=True)
    return PlainRun(layout, mesh, model, optimizer, micro_size)


def _sharding(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    if layout.cp == 1:
        if layout.dp_replicate == 1:
            return mesh["dp"]
        return mesh["dp"]._unflatten(0, (layout.dp_replicate, layout.dp_shard), ("replicate", "shard"))
    return mesh["dp", "cp"]._flatten("dp_cp")


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Fused AdamW refuses DTensors and plain tensors in one group."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kind = isinstance(parameter, DTensor) and parameter.device_mesh
        kinds.setdefault((parameter.ndim >= 2, kind), []).append(parameter)
    return [{"params": parameters, "weight_decay": 0.1 * decays} for (decays, _), parameters in kinds.items()]
