"""AdamW on the shards that a rank holds (Loshchilov and Hutter, arXiv 1711.05101), with torch's fused kernel.

AdamW is elementwise, so it runs on the local tensors of the sharded parameters: the fused kernel sees plain
memory, and nothing is dispatched through DTensor on the step path. At rest every moment is a DTensor again,
named like its parameter.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Shard:
    """One parameter and the plain tensor that shares its local memory."""

    name: str
    parameter: nn.Parameter
    local: torch.Tensor


class ShardedAdamW:
    """AdamW over every trainable parameter of `model`; only matrices decay, norms and biases do not."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._shards = [_Shard(name, p, local_of(p).detach()) for name, p in named]
        held = [
            s for s in self._shards if s.local.numel()
        ]  # a small tensor may leave some ranks without a part
        groups = [
            {"params": [s.local for s in held if s.parameter.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [s.local for s in held if s.parameter.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = (
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
            if groups
            else None
        )
        for shard in held:
            self._adamw_state(shard)

    def _adamw_state(self, shard: _Shard) -> None:
        # what AdamW would make at its first step, made now so that a checkpoint can be loaded into it
        assert self._adamw is not None, "a held shard belongs to a group"
        self._adamw.state[shard.local] = {
            "step": torch.zeros((), dtype=torch.float32, device=shard.local.device),
            **{moment: torch.zeros_like(shard.local) for moment in MOMENTS},
        }

    def gradients(self) -> list[torch.Tensor]:
        """The local gradients that exist, as plain tensors sharing memory with the model's."""
        return [
            local_of(s.parameter.grad)
            for s in self._shards
            if s.parameter.grad is not None and s.local.numel()
        ]

    def step(self, lr: float) -> None:
        """Update every parameter in place from its gradient, then drop the gradients."""
        for shard in self._shards:
            grad = shard.parameter.grad
            shard.local.grad = None if grad is None else local_of(grad)
            shard.parameter.grad = None
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both moments of every parameter by name, sharded as the parameter is; loading writes into them."""
        found = {}
        for shard in self._shards:
            for moment in MOMENTS:
                state = self._adamw.state.get(shard.local) if self._adamw is not None else None
                local = state[moment] if state else torch.zeros_like(shard.local)
                found[f"{moment}.{shard.name}"] = like(shard.parameter, local)
        return found

    def set_steps(self, steps: int) -> None:
        """Tell the bias correction how many updates were made."""
        for state in self._adamw.state.values() if self._adamw is not None else ():
            state["step"].fill_(steps)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
