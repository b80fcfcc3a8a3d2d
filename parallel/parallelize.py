"""The only place that knows in which order a model is cut, compiled, recomputed, sharded and started."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from .context import ContextSplit, apply_context
from .initial import fill
from .layout import Layout
from .mesh import FoldedMesh
from .model import Held, Sharded, kept_buffers
from .pipeline import Pipeline, cut
from .plan import ModelPlan, check_plan
from .recompute import apply_recompute
from .shard import apply_sharding, blocks_of
from .tensor import Piece, apply_tensor


@dataclass(frozen=True, kw_only=True)
class Workings:
    """How a model computes, whatever its layout."""

    compute: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    compiled: bool = False


def parallelize(
    build: Callable[[], nn.Module],
    mesh: FoldedMesh,
    *,
    seed: int,
    workings: Workings | None = None,
    start: bool = True,
) -> Sharded:
    """Build a model, lay it out over `mesh` and start its parameters, the same under every layout.

    A model that says how its parameters start (`initial(name)`) and has no buffers is built without memory
    and filled piece by piece; any other is built whole on each rank from the same seed. Without `start` the
    first kind has no numbers yet: they are loaded, or `start_numbers` draws them. Raises PlanError where the
    model's plan does not fit it.
    """
    # they would give back an equal mesh of an earlier epoch, in which this process may have been another rank
    _clear_sharding_prop_cache()
    workings = workings or Workings()
    layout = mesh.layout
    model, in_memory = build_module(build, seed=seed)
    plan: ModelPlan | None = getattr(model, "plan", None)
    if plan is not None:
        check_plan(plan, model)
    tied = _tied(model, plan) if layout.stages > 1 else frozenset()
    parts, held = [], []
    for number, stage in enumerate(layout.stages_of(mesh.pp.rank)):
        if number:
            model, _ = build_module(build, seed=seed)
        pieces = lay_out(model, plan, mesh, workings, stage=stage)
        if in_memory:
            model.to(mesh.device)
        apply_sharding(model, mesh, compute=workings.compute)
        if not in_memory:
            model.to_empty(device=mesh.device)
        held += [
            Held(
                name=name, parameter=parameter, piece=pieces[name], counted=_counted(name, pieces, mesh, tied)
            )
            for name, parameter in model.named_parameters()
        ]
        parts.append(model)
    sharded = Sharded(
        parts=parts,
        held=held,
        mesh=mesh,
        context=ContextSplit(layout.context, mesh.cp),
        tied=tied,
        pipeline=Pipeline(parts, mesh, compute=workings.compute) if layout.stages > 1 else None,
        buffers={name: buffer for part in parts for name, buffer in kept_buffers(part).items()},
    )
    if start:
        start_numbers(sharded, seed=seed)
    return sharded


def start_numbers(model: Sharded, *, seed: int) -> None:
    """Draw what parameters start from, where the model says how they start; it has no numbers before."""
    if (initial := getattr(model.parts[0], "initial", None)) is not None:
        for each in model.held:
            start = initial(each.name)
            fill(each.parameter, start, seed=seed, name=each.name, shape=each.shape, box=each.box())


def lay_out(
    model: nn.Module, plan: ModelPlan | None, mesh: FoldedMesh, workings: Workings, *, stage: int
) -> dict[str, Piece]:
    """Everything but data parallelism, in place: what a stage of a pipeline holds, what tensor and context
    parallel ranks share, what is compiled and what is computed again. Where each parameter's piece lies, by
    name.
    """
    if mesh.layout.stages > 1:
        _cut_stage(model, plan, mesh.layout, stage)
    pieces = apply_tensor(model, plan, mesh.tp)
    if plan is not None:
        apply_context(model, plan, mesh, mesh.layout.context)
    if workings.compiled:
        # the body alone: FSDP's hooks would break the graph, and recompute repeats it as a whole
        for block in blocks_of(model):
            block.forward = torch.compile(block.forward)
    apply_recompute(blocks_of(model), workings.recompute)
    return pieces


def _cut_stage(model: nn.Module, plan: ModelPlan | None, layout: Layout, stage: int) -> None:
    """Leave in `model` what `stage` of the pipeline holds."""
    assert plan is not None, "the layout was checked against the model"
    assert plan.stages is not None, "the layout was checked against the model"
    layers = layout.layers_of(stage, len(getattr(model, plan.stages.blocks)))
    cut(model, plan.stages, first=stage == 0, last=stage == layout.stages - 1, layers=layers)


def _tied(model: nn.Module, plan: ModelPlan | None) -> frozenset[str]:
    """Names of the parameters that the first and the last stage both hold."""
    shared = () if plan is None or plan.stages is None else plan.stages.shared
    return frozenset(
        f"{module}.{name}" for module in shared for name, _ in getattr(model, module).named_parameters()
    )


def _counted(name: str, pieces: dict[str, Piece], mesh: FoldedMesh, tied: frozenset[str]) -> float:
    """Share of this rank's copy in a sum over the world: other copies of the same numbers count the rest."""
    copies = mesh.layout.dp_replicate
    if not pieces[name].split:
        copies *= mesh.tp.size
    if name in tied:
        copies *= 2
    return 1 / copies


def build_module(build: Callable[[], nn.Module], *, seed: int) -> tuple[nn.Module, bool]:
    """The module, and whether its numbers are in memory (else its tensors are on the meta device)."""
    with torch.device("meta"):
        model = build()
    if hasattr(model, "initial") and next(model.buffers(), None) is None:
        return model, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(), True
