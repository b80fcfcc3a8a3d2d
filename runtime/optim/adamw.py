"""AdamW on the shards that a rank holds, small ones many at a time (`kernels/adamw.py`).

AdamW is elementwise, so it runs on the local tensors of the sharded parameters and nothing is dispatched
through DTensor on the step path. Small shards of one kind move into one flat buffer when the optimizer is
made, their moments into two more: the model's own tensors become views of it. Gradients arrive one by one and
are copied side by side just before their buffer is updated. A large shard stays where it is: its update is
worth a call, a copy of its gradient is not.

At rest every moment is a DTensor again, named like its parameter.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...kernels.adamw import FlatLayout, adamw_, aligned, moment_dtype, share_buffers
from ...kernels.config import Path
from .config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")

# Up to here copying a gradient costs less than a call of its own. On a CPU a buffer's gradients are read back
# from the cache that they were copied into, so buffers are about that large; elsewhere a call is a launch.
SMALL_BYTES = {"cpu": 64 * 1024}
SMALL_BYTES_ELSEWHERE = 1024**2
BUFFER_BYTES = {"cpu": 2 * 1024**2}
BUFFER_BYTES_ELSEWHERE = 64 * 1024**2


@dataclass
class _Shard:
    """One parameter and the plain tensor that shares its local memory."""

    name: str
    parameter: nn.Parameter
    local: torch.Tensor
    fsdp: Any = None  # what FSDP keeps of it, see `_kept_by_fsdp`
    moments: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Elements that its memory must have: FSDP gathers shards of one size, the last ones padded."""
        return self.fsdp._sharded_param_data.numel() if self.fsdp is not None else self.local.numel()

    @property
    def movable(self) -> bool:
        """Whether its memory may be replaced: a plain tensor, or one of FSDP's that is nothing special."""
        if isinstance(self.parameter, DTensor):
            return self.fsdp is not None and type(self.local) is torch.Tensor and not self.fsdp.offload_to_cpu
        return type(self.parameter) is nn.Parameter

    def move(self, home: torch.Tensor) -> None:
        """Copy the numbers into `home` [room], zero so far, and let everyone use them there."""
        local = home[: self.local.numel()].view(self.local.shape)
        local.copy_(self.local)
        assert self.movable, f"the shard of {self.name} is contiguous, or nobody else holds it"
        if isinstance(self.parameter, DTensor):
            # both, as FSDP has them: the memory that it gathers from, and the part of it that is no padding
            self.fsdp._sharded_param_data = home
            self.parameter._local_tensor = local
        else:
            self.parameter.data = local
        self.local = local


Update = tuple[int, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class _Group:
    """Shards of one kind: which update of each is due, counted apart as a parameter may miss its gradient."""

    def __init__(self, shards: Sequence[_Shard], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.shards = shards
        self.parameters = [shard.parameter for shard in shards]
        self.sharded = isinstance(self.parameters[0], DTensor)
        self.steps = [0] * len(shards)

    def take_gradients(self) -> tuple[list[Any], list[int]]:
        """(local gradient or None, number of the update or 0) of each; the parameters have none any more."""
        grads: list[Any] = [parameter.grad for parameter in self.parameters]  # thousands: plain loops
        for parameter in self.parameters:
            parameter.grad = None
        due = [0 if grad is None else done + 1 for grad, done in zip(grads, self.steps, strict=True)]
        self.steps = [new or done for new, done in zip(due, self.steps, strict=True)]
        if self.sharded:
            grads = [None if grad is None else grad._local_tensor for grad in grads]
        return grads, due

    def updates(self) -> Iterator[Update]:
        """(number, parameters, gradients, both moments) of buffers to update before the next is asked for.

        What has no gradient is left out, as torch.optim leaves it.
        """
        raise NotImplementedError


class _Alone(_Group):
    """Large shards, each where it is: [numel] each."""

    def __init__(self, shards: Sequence[_Shard], weight_decay: float) -> None:
        super().__init__(shards, weight_decay)
        for shard in shards:
            if not shard.local.is_contiguous():
                shard.move(shard.local.new_zeros(shard.local.numel()))
            dtype = moment_dtype(shard.local.dtype)
            shard.moments = {moment: torch.zeros_like(shard.local, dtype=dtype) for moment in MOMENTS}
        self.flat = [shard.local.view(-1) for shard in shards]
        self.moments = [[shard.moments[moment].view(-1) for shard in shards] for moment in MOMENTS]

    def updates(self) -> Iterator[Update]:
        grads, due = self.take_gradients()
        for number in sorted(set(due) - {0}):
            which = [place for place, step in enumerate(due) if step == number]
            lists = (self.flat, grads, *self.moments)
            params, there, first, second = ([xs[place] for place in which] for xs in lists)
            yield number, params, [grad.reshape(-1) for grad in there], first, second


class _Shared(_Group):
    """Small shards that moved into one buffer: parameters and moments [layout.numel], padding zero."""

    def __init__(self, shards: Sequence[_Shard], weight_decay: float) -> None:
        super().__init__(shards, weight_decay)
        first = shards[0].local
        self.layout = FlatLayout.of([s.local.shape for s in shards], [s.room for s in shards])
        self.has_gaps = self.layout.has_gaps
        self.flat = first.new_zeros(self.layout.numel)
        for shard, start in zip(shards, self.layout.starts, strict=True):
            shard.move(self.flat[start : start + shard.room])
        dtype = moment_dtype(first.dtype)
        self.moments = [torch.zeros_like(self.flat, dtype=dtype) for _ in MOMENTS]
        for moment, flat in zip(MOMENTS, self.moments, strict=True):
            for shard, view in zip(shards, self.layout.views(flat), strict=True):
                shard.moments[moment] = view

    def gather_into(self, stage: torch.Tensor) -> None:
        """Choose `stage`, which others use too, as the memory to copy gradients into."""
        self.stage = stage[: self.layout.numel]
        self.staged = self.layout.views(self.stage)

    def updates(self) -> Iterator[Update]:
        grads, due = self.take_gradients()
        first = 0
        for number, same in itertools.groupby(due):  # neighbours of one step are one piece of the buffer
            last = first + len(list(same))
            if number:
                where = self.layout.span(first, last)
                if self.has_gaps:
                    self.stage[where].zero_()
                torch._foreach_copy_(self.staged[first:last], grads[first:last])
                flat = (self.flat, self.stage, *self.moments)
                params, there, *moments = ([x[where]] for x in flat)
                yield number, params, there, moments[0], moments[1]
            first = last


class ShardedAdamW:
    """AdamW over every trainable parameter of `model`; only matrices decay, norms and biases do not."""

    def __init__(self, model: nn.Module, config: OptimConfig, *, path: Path = "auto") -> None:
        """May move the memory of small parameters: views taken of it before are views no longer."""
        self._config = config
        self.path = path
        kept = _kept_by_fsdp(model)
        self._shards = [
            _Shard(name, p, local_of(p).detach(), kept.get(id(p)))
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
        held = [shard for shard in self._shards if shard.local.numel()]
        self._held = [shard.parameter for shard in held]
        # a small tensor may leave some ranks without a part
        self._empty = [shard.parameter for shard in self._shards if not shard.local.numel()]
        self._groups = _groups(held, config.weight_decay)

    def gradients(self) -> list[torch.Tensor]:
        """The local gradients that exist, as plain tensors sharing memory with the model's."""
        grads = [parameter.grad for parameter in self._held]
        return [local_of(grad) for grad in grads if grad is not None]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter in place from its gradient, then drop the gradients."""
        for group in self._groups:
            for number, params, grads, exp_avgs, exp_avg_sqs in group.updates():
                adamw_(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    step=number,
                    lr=lr,
                    betas=self._config.betas,
                    eps=self._config.eps,
                    weight_decay=group.weight_decay,
                    path=self.path,
                )
        for parameter in self._empty:
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both moments of every parameter by name, sharded as the parameter is; loading writes into them."""
        return {
            f"{moment}.{shard.name}": like(
                shard.parameter, shard.moments[moment] if shard.moments else torch.zeros_like(shard.local)
            )
            for shard in self._shards
            for moment in MOMENTS
        }

    def set_steps(self, steps: int) -> None:
        """Tell the bias correction how many updates were made."""
        for group in self._groups:
            group.steps = [steps] * len(group.parameters)


def _groups(shards: Sequence[_Shard], weight_decay: float) -> list[_Group]:
    """`shards`, none of which is empty, by how they are updated: only what has rows and columns decays."""
    small: list[_Shard] = []
    large: dict[tuple[Any, ...], list[_Shard]] = {}
    for shard in shards:
        limit = SMALL_BYTES.get(shard.local.device.type, SMALL_BYTES_ELSEWHERE)
        if shard.movable and shard.room * shard.local.itemsize <= limit:
            small.append(shard)
        else:
            large.setdefault(_kind(shard), []).append(shard)
    decays = {True: weight_decay, False: 0.0}
    sizes = [aligned(shard.room) * shard.local.itemsize for shard in small]
    limit = BUFFER_BYTES.get(small[0].local.device.type, BUFFER_BYTES_ELSEWHERE) if small else 0
    members = share_buffers(sizes, [_kind(shard) for shard in small], limit)
    shared = [
        _Shared([small[place] for place in group], decays[small[group[0]].parameter.ndim >= 2])
        for group in members
    ]
    stages: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    for buffer in sorted(shared, key=lambda buffer: buffer.layout.numel, reverse=True):
        kind = buffer.flat.dtype, buffer.flat.device
        if kind not in stages:  # the largest comes first
            stages[kind] = torch.zeros_like(buffer.flat)
        buffer.gather_into(stages[kind])
    return [*shared, *(_Alone(group, decays[kind[0]]) for kind, group in large.items())]


def _kind(shard: _Shard) -> tuple[Any, ...]:
    """What shards must have in common to be updated together; first whether they decay."""
    local, parameter = shard.local, shard.parameter
    return parameter.ndim >= 2, local.dtype, local.device, isinstance(parameter, DTensor)


def _kept_by_fsdp(model: nn.Module) -> dict[int, Any]:
    """FSDP's record of each parameter by the parameter's id, which knows the padded memory of the shard."""
    return {
        id(record.sharded_param): record
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for record in group.fsdp_params
    }


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory; autograd does not see it taken."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` seen as a part of a tensor that is laid out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
