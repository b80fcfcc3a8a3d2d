"""AdamW on the shards that a rank holds, small ones many at a time (`kernels/adamw.py`).

AdamW is elementwise, so it runs on the local tensors of the sharded parameters and nothing is dispatched
through DTensor on the step path. Small shards of one kind move into one flat buffer when the optimizer is
made, their moments into two more: the model's own tensors become views of it. Gradients arrive one by one and
are copied side by side just before their buffer is updated. A large shard stays where it is: its update is
worth a call, a copy of its gradient is not.

With a `Memory`, all of it lies there: parameters, large ones too, moments and the model's buffers, in an
order that follows from the model alone. What an earlier life left there is taken as it is.

At rest a moment is a box of a whole tensor, as its parameter is, and named after it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...kernels.adamw import FlatLayout, adamw_, aligned, moment_dtype, share_buffers
from ...kernels.config import Path
from ...parallel.model import Sharded
from ..part import Part, local_of
from .config import OptimConfig
from .shards import Memory, Shard, settle_buffer, shards_of, zeros_in

MOMENTS = ("exp_avg", "exp_avg_sq")

# Up to here copying a gradient costs less than a call of its own. On a CPU a buffer's gradients are read back
# from the cache that they were copied into, so buffers are about that large; elsewhere a call is a launch.
SMALL_BYTES = {"cpu": 64 * 1024}
SMALL_BYTES_ELSEWHERE = 1024**2
BUFFER_BYTES = {"cpu": 2 * 1024**2}
BUFFER_BYTES_ELSEWHERE = 64 * 1024**2


Update = tuple[int, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class _Group:
    """Shards of one kind: which update of each is due, counted apart as a parameter may miss its gradient."""

    def __init__(self, shards: Sequence[Shard], weight_decay: float) -> None:
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
    """Large shards, each in memory of its own, without a `Memory` where it is: [numel] each."""

    def __init__(self, shards: Sequence[Shard], weight_decay: float, memory: Memory | None) -> None:
        super().__init__(shards, weight_decay)
        for shard in shards:
            if memory is not None:
                shard.settle(memory)
            elif not shard.local.is_contiguous():
                shard.move(shard.local.new_zeros(shard.local.numel()))
            dtype, numel, shape = moment_dtype(shard.local.dtype), shard.local.numel(), shard.local.shape
            for moment in MOMENTS:
                flat, _ = zeros_in(memory, numel, like=shard.local, dtype=dtype)
                shard.moments[moment] = flat.view(shape)
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

    def __init__(self, shards: Sequence[Shard], weight_decay: float, memory: Memory | None) -> None:
        super().__init__(shards, weight_decay)
        first = shards[0].local
        self.layout = FlatLayout.of([s.local.shape for s in shards], [s.room for s in shards])
        self.has_gaps = self.layout.has_gaps
        self.flat, kept = zeros_in(memory, self.layout.numel, like=first)
        for shard, start in zip(shards, self.layout.starts, strict=True):
            shard.move(self.flat[start : start + shard.room], kept=kept)
        dtype = moment_dtype(first.dtype)
        homes = (zeros_in(memory, self.layout.numel, like=first, dtype=dtype) for _ in MOMENTS)
        self.moments = [home for home, _ in homes]
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
    """AdamW over every trainable parameter of `model`; only matrices decay, norms and biases do not.

    A parameter that this rank holds twice is updated twice, from equal gradients to equal numbers.
    """

    def __init__(
        self, model: Sharded, config: OptimConfig, *, path: Path = "auto", memory: Memory | None = None
    ) -> None:
        """May move the memory of small parameters: views taken of it before are views no longer.

        With a `memory`, which must have room for all that `memory_needed` says, everything moves into it.
        """
        self._config = config
        self.path = path
        shards = shards_of(model.held, model.parts)
        self._shards = [shard for shard in shards if shard.parameter.requires_grad]
        filled = [shard for shard in self._shards if shard.local.numel()]
        self._filled = [shard.parameter for shard in filled]
        self._shares: dict[float, list[nn.Parameter]] = {}
        for shard in filled:
            self._shares.setdefault(shard.held.counted, []).append(shard.parameter)
        # a small tensor may leave some ranks without a part
        self._empty = [shard.parameter for shard in self._shards if not shard.local.numel()]
        self._groups = _groups(filled, config.weight_decay, memory)
        if memory is not None:
            for shard in _frozen(shards):
                shard.settle(memory)
            for buffer in model.buffers.values():
                settle_buffer(buffer, memory)

    def gradients(self) -> list[torch.Tensor]:
        """The local gradients that exist, as plain tensors sharing memory with the model's."""
        return _local_gradients(self._filled)

    def gradients_by_share(self) -> list[tuple[float, list[torch.Tensor]]]:
        """The same in lists of those that count equally much in sums over all ranks (`Held.counted`)."""
        shares = ((counted, _local_gradients(those)) for counted, those in self._shares.items())
        return [(counted, grads) for counted, grads in shares if grads]

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

    def parts(self, prefix: str = "") -> list[Part]:
        """Both moments of every parameter as `<prefix><moment>.<name>`; loading writes into them."""
        parts = []
        for shard in self._shards:
            part = Part.of(shard.held, shard.held.name)
            for moment in MOMENTS:
                tensor = shard.moments[moment] if shard.moments else torch.zeros_like(shard.local)
                parts.append(replace(part, name=f"{prefix}{moment}.{part.name}", tensor=tensor))
        return parts

    def set_steps(self, steps: int) -> None:
        """Tell the bias correction how many updates were made."""
        for group in self._groups:
            group.steps = [steps] * len(group.parameters)


def memory_needed(model: Sharded) -> list[tuple[int, torch.dtype]] | None:
    """(elements, dtype) of all that `ShardedAdamW` takes of a `Memory`, in order; None where some tensor must
    stay where it is.
    """
    shards = shards_of(model.held, model.parts)
    filled = [shard for shard in shards if shard.local.numel()]
    if not all(shard.movable for shard in filled):
        return None
    needed: list[tuple[int, torch.dtype]] = []
    together, alone = _divided([shard for shard in filled if shard.parameter.requires_grad])
    for group in together:
        numel, dtype = (
            FlatLayout.of([s.local.shape for s in group], [s.room for s in group]).numel,
            group[0].local.dtype,
        )
        needed += [(numel, dtype), *[(numel, moment_dtype(dtype))] * len(MOMENTS)]
    for shard in itertools.chain.from_iterable(alone):
        dtype = shard.local.dtype
        needed += [(shard.room, dtype), *[(shard.local.numel(), moment_dtype(dtype))] * len(MOMENTS)]
    needed += [(shard.room, shard.local.dtype) for shard in _frozen(shards)]
    return needed + [(buffer.numel(), buffer.dtype) for buffer in model.buffers.values()]


def _frozen(shards: Iterable[Shard]) -> list[Shard]:
    return [shard for shard in shards if shard.local.numel() and not shard.parameter.requires_grad]


def _divided(shards: Sequence[Shard]) -> tuple[list[list[Shard]], list[list[Shard]]]:
    """(those that share buffers, those that are large by their kind) of `shards`, none of which is empty."""
    small: list[Shard] = []
    large: dict[tuple[Any, ...], list[Shard]] = {}
    for shard in shards:
        limit = SMALL_BYTES.get(shard.local.device.type, SMALL_BYTES_ELSEWHERE)
        if shard.movable and shard.room * shard.local.itemsize <= limit:
            small.append(shard)
        else:
            large.setdefault(_kind(shard), []).append(shard)
    sizes = [aligned(shard.room) * shard.local.itemsize for shard in small]
    limit = BUFFER_BYTES.get(small[0].local.device.type, BUFFER_BYTES_ELSEWHERE) if small else 0
    members = share_buffers(sizes, [_kind(shard) for shard in small], limit)
    return [[small[place] for place in group] for group in members], list(large.values())


def _groups(shards: Sequence[Shard], weight_decay: float, memory: Memory | None) -> list[_Group]:
    """`shards`, none of which is empty, by how they are updated: only what has rows and columns decays."""
    together, alone = _divided(shards)
    decays = {True: weight_decay, False: 0.0}
    shared = [_Shared(group, decays[_kind(group[0])[0]], memory) for group in together]
    stages: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    for buffer in sorted(shared, key=lambda buffer: buffer.layout.numel, reverse=True):
        kind = buffer.flat.dtype, buffer.flat.device
        if kind not in stages:  # the largest comes first
            stages[kind] = torch.zeros_like(buffer.flat)
        buffer.gather_into(stages[kind])
    return [*shared, *(_Alone(group, decays[_kind(group[0])[0]], memory) for group in alone)]


def _kind(shard: Shard) -> tuple[Any, ...]:
    """What shards must have in common to be updated together; first whether they decay."""
    local, parameter = shard.local, shard.parameter
    return parameter.ndim >= 2, local.dtype, local.device, isinstance(parameter, DTensor)


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    grads = [parameter.grad for parameter in parameters]
    return [local_of(grad) for grad in grads if grad is not None]
