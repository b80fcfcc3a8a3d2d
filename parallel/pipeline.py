"""Pipeline parallelism: the stages of a rank, a micro-batch at a time, in an order of torch (`schedules.py`).

Between stages the hidden states [B, S / tp, D] travel in the compute dtype, their gradients back. Shapes are
known beforehand, so nothing is inferred and no pickle is sent. `stage.py` says what one stage does.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

from ..kernels.linear import Deferred
from .layout import SCHEDULES
from .mesh import FoldedMesh
from .plan import PlanError, Stages
from .schedules import forward_class, schedule_class
from .stage import Stage

Inputs = tuple[torch.Tensor, dict[str, torch.Tensor]]  # tokens [B, S], and what every stage is given


def cut(model: nn.Module, stages: Stages, *, first: bool, last: bool, layers: range) -> None:
    """Take from `model`, in place, what a stage does not hold; the names of what stays are as before."""
    blocks = getattr(model, stages.blocks)
    for index in range(len(blocks)):
        if index not in layers:
            delattr(blocks, str(index))
    for name in stages.entry:
        if not first and not (last and name in stages.shared):
            setattr(model, name, None)
    for name in stages.exit:
        if not last:
            setattr(model, name, None)


class Pipeline:
    """Runs the stages of this rank. All ranks of a pipeline call its methods alike, with equal shapes."""

    def __init__(
        self, parts: Sequence[nn.Module], mesh: FoldedMesh, *, compute: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        self._mesh = mesh
        self._parts = dict(zip(mesh.layout.stages_of(mesh.pp.rank), parts, strict=True))
        self._width = _width(parts[0])
        self._dtype = torch.bfloat16 if compute == "bf16" else torch.float32
        self._deferred: dict[int, Deferred] = {}
        self._ready: dict[bool, tuple[Any, Any]] = {}  # training or not -> (shapes, schedule)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for stage, part in self._parts.items():
            if isinstance(part, FSDPModule):
                # gathered once a step, not in each pass of each micro-batch: the schedules know when
                part.set_reshard_after_forward(False)
            if SCHEDULES[mesh.layout.schedule].splits_backward:
                self._deferred[stage] = _attach_deferred(part)

    def run(self, microbatches: Sequence[Inputs], count: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradients of (sum of losses / count), summed by FSDP over its ranks.

        Returns the sum of losses in fp64, 0 on ranks without the last stage.
        """
        return self._step(microbatches, count, train=True)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Inputs]) -> torch.Tensor:
        """The sum of losses in fp64, 0 on ranks without the last stage."""
        return self._step(microbatches, None, train=False)

    def _step(
        self, microbatches: Sequence[Inputs], count: torch.Tensor | None, *, train: bool
    ) -> torch.Tensor:
        tokens = torch.cat([each[0] for each in microbatches])
        given = {name: torch.cat([each[1][name] for each in microbatches]) for name in microbatches[0][1]}
        shapes = (len(microbatches), microbatches[0][0].shape)
        if train not in self._ready or self._ready[train][0] != shapes:
            self._ready[train] = (shapes, self._schedule(*shapes, train=train))
        schedule = self._ready[train][1]
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        args = (tokens,) if 0 in self._parts else ()
        step = schedule.step if train else schedule.eval
        with _without_tables():
            step(*args, target=given["labels"], loss_kwargs={"count": count}, return_outputs=False, **given)
        return self._loss_sum

    def _loss(self, loss: torch.Tensor, _: torch.Tensor, *, count: torch.Tensor | None) -> torch.Tensor:
        """What to differentiate, of the loss that the last stage returned."""
        self._loss_sum += loss.detach()
        return loss if count is None else loss / count

    def _schedule(self, microbatches: int, tokens: torch.Size, *, train: bool) -> Any:
        name = self._mesh.layout.schedule
        kind: Any = schedule_class(name) if train else forward_class(name)
        stages = [self._stage(index, part, tokens) for index, part in self._parts.items()]
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        return kind(stages[0] if single else stages, microbatches, loss_fn=self._loss, scale_grads=False)

    def _stage(self, index: int, part: nn.Module, tokens: torch.Size) -> Stage:
        layout, mesh = self._mesh.layout, self._mesh
        shape = (tokens[0], tokens[1] // mesh.tp.size, self._width)
        hidden = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        return Stage(
            part,
            index,
            layout.stages,
            device=mesh.device,
            group=mesh.pp.group,
            given=hidden if index else torch.empty(tokens, dtype=torch.int64, device="meta"),
            made=hidden if index < layout.stages - 1 else torch.empty((), device="meta"),
            deferred=self._deferred.get(index),
        )


def _width(part: nn.Module) -> int:
    width = getattr(part, "width", None)
    if not isinstance(width, int) or not getattr(part, "computes_loss", False):
        raise PlanError(
            f"{type(part).__name__} cannot run in a pipeline: it needs `computes_loss = True`, as the sum of "
            "losses is what a last stage returns, and `width: int`, the size of the hidden states"
        )
    return width


def _attach_deferred(part: nn.Module) -> Deferred:
    """Let the matrix products of `part` that can do so put off the gradients of their weights."""
    deferred = Deferred()
    for module in part.modules():
        if hasattr(module, "deferred"):
            module.deferred = deferred  # type: ignore[assignment]
    return deferred


@contextmanager
def _without_tables() -> Iterator[None]:
    """On an error torch logs the whole schedule, hundreds of lines a rank; the error says where it was."""
    logger = logging.getLogger(schedules.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
