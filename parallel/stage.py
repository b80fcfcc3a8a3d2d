"""One stage of a pipeline: torch's `PipelineStage`, with four things done otherwise.

- A backward pass in two halves (zero bubble) is not torch's, which walks autograd's graph twice: our own
  operators and whatever is recomputed would be computed once for each half, selective recompute would fail,
  and bf16 gradients would be summed in bf16. Instead the first half is the whole pass, but matrix products
  put the gradients of their weights off to the second (`kernels/linear.py`). So both are exact by
  construction, whatever else a model is made of; a weight that no `Deferred` reaches has its gradient in the
  first half.
- Memory for what is received is taken when it comes and let go after use, not held for all micro-batches.
- Passes forward alone, for evaluation, work on a V of stages too, and give back what FSDP gathered.
- An error keeps its type; torch would wrap it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage

from ..kernels.linear import Deferred, add_weight_gradients


class Stage(PipelineStage):
    """Stage `index` of `count`; `given` and `made` are its input and output without memory."""

    def __init__(
        self,
        part: nn.Module,
        index: int,
        count: int,
        *,
        device: torch.device,
        group: ProcessGroup | None,
        given: torch.Tensor,
        made: torch.Tensor,
        deferred: Deferred | None = None,
    ) -> None:
        super().__init__(
            part,
            index,
            count,
            device,
            input_args=given,
            output_args=made,
            group=group,
            dw_builder=None if deferred is None else self._put_off,
        )
        self._deferred = deferred

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """One micro-batch forward."""
        out = _unwrapped(super().forward_one_chunk, fwd_chunk_id, args, kwargs, save_forward_output)
        _let_go(self.args_recv_info[fwd_chunk_id])
        return out

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module itself; what is sent must lie without gaps."""
        out: torch.Tensor = super().forward_maybe_with_nosync(*args, **kwargs)
        return out.contiguous()

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """One micro-batch backward, without the gradients of weights that are put off unless it is full."""
        if self._deferred is not None:
            self._deferred.collecting = not full_backward
        _unwrapped(super().backward_one_chunk, bwd_chunk_id, loss, full_backward, last_backward)
        if self.has_backward:
            _let_go(self.grad_recv_info[bwd_chunk_id])

    def _put_off(self) -> Callable[[], None]:
        """What `backward_weight_one_chunk` will do for the micro-batch whose backward pass has just run."""
        assert self._deferred is not None, "the schedule does not split backward passes"
        return partial(self._add_weight_gradients, self._deferred.take())

    def _add_weight_gradients(self, waiting: list[Any]) -> None:
        add_weight_gradients(waiting)
        if waiting and isinstance(self.submod, FSDPModule):
            # as after a backward pass: sums over micro-batches are kept in the dtype of reductions
            fully_shard.state(self.submod)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Sum gradients over data parallel ranks; after passes forward alone give parameters back."""
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
            return
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Make room for a micro-batch, and receive it."""
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Make room for a gradient, and receive it."""
        if self.has_backward:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """The gradient for the stage before on the same rank; nothing without a backward pass."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """The gradient of the stage behind on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(num_microbatches)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """torch makes the buffers of all micro-batches; these only describe them."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _make_room(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)


def _let_go(infos: Sequence[Any]) -> None:
    for info in infos:
        info.buffer = None


def _unwrapped(run: Callable[..., Any], *args: Any) -> Any:
    """Call `run`; an error in the stage comes as it was raised, torch's words about it as a note."""
    try:
        return run(*args)
    except RuntimeError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and "failed to run" in str(error).lower():
            cause.add_note(" ".join(str(error).split()))
            raise cause from cause.__cause__
        raise
