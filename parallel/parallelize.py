"""The only place that knows in which order a model is compiled, recomputed, sharded and started."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from .initial import fill
from .mesh import FoldedMesh
from .recompute import apply_recompute
from .shard import apply_sharding, blocks_of


def parallelize(
    build: Callable[[], nn.Module],
    mesh: FoldedMesh,
    *,
    seed: int,
    compute: Literal["fp32", "bf16"] = "fp32",
    recompute: Literal["none", "selective", "full"] = "none",
    compiled: bool = False,
) -> nn.Module:
    """Build a model, lay it out over `mesh` and start its parameters, the same under every layout.

    A model that says how its parameters start (`initial(name)`) and has no buffers is built without memory
    and filled shard by shard; any other is built whole on each rank from the same seed.
    """
    model, in_memory = build_module(build, seed=seed)
    if compiled:
        # the body alone: FSDP's hooks would break the graph, and recompute repeats it as a whole
        for block in blocks_of(model):
            block.forward = torch.compile(block.forward)
    apply_recompute(blocks_of(model), recompute)
    if in_memory:
        model.to(mesh.device)
    apply_sharding(model, mesh, compute=compute)
    if not in_memory:
        model.to_empty(device=mesh.device)
    if (initial := getattr(model, "initial", None)) is not None:
        for name, parameter in model.named_parameters():
            fill(parameter, initial(name), seed=seed, name=name)
    return model


def build_module(build: Callable[[], nn.Module], *, seed: int) -> tuple[nn.Module, bool]:
    """The module, and whether its numbers are in memory (else its tensors are on the meta device)."""
    with torch.device("meta"):
        model = build()
    if hasattr(model, "initial") and next(model.buffers(), None) is None:
        return model, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(), True
