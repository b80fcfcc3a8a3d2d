"""The layout of a run: how many ranks lie along each axis of parallelism, and how a pipeline is cut.

A `Layout` is a value. It knows no torch, no process group and no rank, so that the command line can check it
in milliseconds before anything starts. `parallel/rules.py` says which layouts a model and a batch allow,
`parallel/legal.py` finds those that do, `parallel/mesh.py` turns one into process groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # as ranks are counted: tp changes fastest
UNBUILT_AXES = ("ep", "etp", "bp", "dap")

Context: TypeAlias = Literal["ring", "ulysses"]
ScheduleName: TypeAlias = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"
]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What an order of forward and backward passes asks for, as torch 2.13 carries it out."""

    stages_per_rank: int  # unless given
    any_stages: bool = False  # other numbers of stages a rank work too
    v_shaped: bool = False  # stages go down the ranks and up again, so rank 0 has both ends of the model
    every_stage_busy: bool = False  # at least as many micro-batches as stages
    in_rounds: bool = False  # micro-batches come in equal rounds of about as many as there are ranks
    splits_backward: bool = False  # gradients of inputs first, those of weights where there is time


SCHEDULES: dict[ScheduleName, Schedule] = {
    "gpipe": Schedule(stages_per_rank=1),
    "1f1b": Schedule(stages_per_rank=1, every_stage_busy=True),
    "interleaved_1f1b": Schedule(stages_per_rank=2, any_stages=True, in_rounds=True),
    "interleaved_zero_bubble": Schedule(
        stages_per_rank=2, any_stages=True, in_rounds=True, splits_backward=True
    ),
    "zbv": Schedule(stages_per_rank=2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(stages_per_rank=2, v_shaped=True, every_stage_busy=True, splits_backward=True),
}
CONTEXTS: tuple[Context, ...] = ("ring", "ulysses")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Section `[parallel]`."""

    dp_replicate: Annotated[int, "Copies of the model; gradients are summed over them.", "ranks"] = 1
    dp_shard: Annotated[
        int,
        "Ranks that share one copy (parameters, gradients, optimizer). -1 takes the ranks left over.",
        "ranks",
    ] = -1
    tp: Annotated[int, "Tensor parallel ranks: share every matrix, and the sequence between.", "ranks"] = 1
    cp: Annotated[int, "Context parallel ranks: share every sequence.", "ranks"] = 1
    context: Annotated[
        Context,
        "How attention crosses context parallel ranks: keys and values go round, or heads are exchanged.",
    ] = "ring"
    pp: Annotated[int, "Pipeline parallel ranks: share the layers.", "ranks"] = 1
    pipeline_schedule: Annotated[ScheduleName, "Order of micro-batches in a pipeline; read if pp > 1."] = (
        "1f1b"
    )
    stages_per_rank: Annotated[
        int,
        "Pieces of the model on a pipeline rank. 0: 1 under gpipe and 1f1b, 2 under the others.",
        "stages",
    ] = 0
    stage_layers: Annotated[
        tuple[int, ...],
        "Layers of each stage in the order of the model. Empty: as even as can be, fewer beside the "
        "embedding and the output.",
        "layers",
    ] = ()
    ep: Annotated[int, "Expert parallel ranks. Only 1 in this version.", "ranks"] = 1
    etp: Annotated[int, "Tensor parallel ranks inside an expert. Only 1 in this version.", "ranks"] = 1
    bp: Annotated[int, "Branch parallel ranks. Only 1 in this version.", "ranks"] = 1
    dap: Annotated[int, "Dynamic axial parallel ranks. Only 1 in this version.", "ranks"] = 1
    recompute: Annotated[
        Literal["none", "selective", "full"],
        "What the backward pass computes again instead of storing: nothing, all but matrix products and "
        "attention, or whole blocks.",
    ] = "none"

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if self.dp_replicate < 1:
            found.append(
                ("dp_replicate", f"is {self.dp_replicate}; at least one copy of the model is needed, use 1")
            )
        if self.dp_shard < 1 and self.dp_shard != -1:
            found.append(("dp_shard", f"is {self.dp_shard}; use -1 (the ranks left over) or a number from 1"))
        for axis in ("tp", "cp", "pp"):
            if (size := getattr(self, axis)) < 1:
                found.append((axis, f"is {size}; use 1 to go without, or a number of ranks from 2"))
        if self.stages_per_rank < 0:
            found.append(
                (
                    "stages_per_rank",
                    f"is {self.stages_per_rank}; use 0 for what the schedule takes, or from 1",
                )
            )
        if any(layers < 1 for layers in self.stage_layers):
            at_least = ", ".join(str(max(layers, 1)) for layers in self.stage_layers)
            found.append(
                (
                    "stage_layers",
                    f"is {list(self.stage_layers)}; a stage holds at least 1 layer: use [{at_least}], or [] "
                    "for an even cut",
                )
            )
        for axis in UNBUILT_AXES:
            if (size := getattr(self, axis)) != 1:
                found.append(
                    (
                        axis,
                        f"is {size}, but this version has no {axis} axis yet; use 1 and give the ranks to "
                        "dp_shard",
                    )
                )
        return found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of all axes, whose product is the world size, and how context and pipeline go about it."""

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    context: Context = "ring"
    schedule: ScheduleName = "1f1b"
    stages_per_rank: int = 0  # 0: what the schedule takes by itself
    stage_layers: tuple[int, ...] = ()  # empty: an even cut

    @property
    def world_size(self) -> int:
        """Number of ranks in the run."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp_size(self) -> int:
        """Number of groups of ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def stages(self) -> int:
        """Number of pieces that the layers are cut into, over all pipeline ranks."""
        if self.pp == 1:
            return 1
        return self.pp * (self.stages_per_rank or SCHEDULES[self.schedule].stages_per_rank)

    def stages_of(self, pp_rank: int) -> range:
        """The stages that a pipeline rank holds, in the order of the model."""
        if self.stages > self.pp and SCHEDULES[self.schedule].v_shaped:
            last = self.stages - 1 - pp_rank
            return range(pp_rank, last + 1, last - pp_rank)
        return range(pp_rank, self.stages, self.pp)

    def layers_of(self, stage: int, layers: int) -> range:
        """The layers of `stage` in a model that has `layers` of them."""
        cut = self.stage_layers or even_cut(layers, self.stages)
        start = sum(cut[:stage])
        return range(start, start + cut[stage])

    def keys(self) -> dict[str, Any]:
        """The `[parallel]` keys that ask for this layout; those that have no effect are left out."""
        keys: dict[str, Any] = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        if self.cp > 1:
            keys |= {"cp": self.cp, "context": self.context}
        if self.tp > 1:
            keys["tp"] = self.tp
        if self.pp > 1:
            keys |= {"pp": self.pp, "pipeline_schedule": self.schedule}
            if self.stages_per_rank:
                keys["stages_per_rank"] = self.stages_per_rank
            if self.stage_layers:
                keys["stage_layers"] = self.stage_layers
        return keys

    def __str__(self) -> str:
        return " ".join(f"{key}={key_value(value)}" for key, value in self.keys().items())


def even_cut(layers: int, stages: int) -> Sequence[int]:
    """How many layers each stage gets: all as many, and of what is left over one each from the middle on.

    The first stage also embeds, and the last also computes logits and losses, which costs more: they get
    their extra layer last, the last stage never. In the middle later stages come first, as they keep fewer
    micro-batches in memory.
    """
    middle = (stages - 1) / 2
    order = sorted(range(stages), key=lambda s: (s == stages - 1, s == 0, abs(s - middle), -s))
    more = set(order[: layers % stages])
    return [layers // stages + (stage in more) for stage in range(stages)]


def key_value(value: Any) -> str:
    """A value as it is typed on the command line."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
