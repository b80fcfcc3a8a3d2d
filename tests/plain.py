"""A plain module as the runtime sees a model: whole on every rank, or cut by FSDP alone."""

from typing import Any

from torch import nn

from rayfold.parallel.model import Held, Sharded
from rayfold.parallel.tensor import Piece


def held_of(module: nn.Module, *, copies: int = 1) -> list[Held]:
    """All parameters of `module`, of which as many copies train."""
    return [
        Held(name=name, parameter=parameter, piece=Piece.whole(parameter), counted=1 / copies)
        for name, parameter in module.named_parameters()
    ]


def as_sharded(module: nn.Module, *, copies: int = 1) -> Sharded:
    """The model of a run that nobody steps: it has no mesh."""
    nobody: Any = None
    return Sharded(
        [module], held_of(module, copies=copies), nobody, nobody, buffers=dict(module.named_buffers())
    )
