"""The layout of a run: how many ranks lie along each axis of parallelism.

A `Layout` is a value. It knows no torch, no process group and no rank, so that the command line can check it
in milliseconds before anything starts. `parallel/mesh.py` turns it into process groups.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

UNBUILT_AXES = ("tp", "cp", "pp", "ep", "etp", "bp", "dap")


class LayoutError(ValueError):
    """The sizes of the axes and the number of ranks do not fit together."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Section `[parallel]`."""

    dp_replicate: Annotated[int, "Copies of the model; gradients are summed over them.", "ranks"] = 1
    dp_shard: Annotated[
        int,
        "Ranks that share one copy (parameters, gradients, optimizer). -1 takes the ranks left over.",
        "ranks",
    ] = -1
    tp: Annotated[int, "Tensor parallel ranks. Only 1 in this version.", "ranks"] = 1
    cp: Annotated[int, "Context parallel ranks. Only 1 in this version.", "ranks"] = 1
    pp: Annotated[int, "Pipeline stages. Only 1 in this version.", "ranks"] = 1
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
    """Sizes of all axes; their product is the world size."""

    dp_replicate: int
    dp_shard: int

    @property
    def world_size(self) -> int:
        """Number of ranks in the run."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_size(self) -> int:
        """Number of ranks that hold different data."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard}"


def make_layout(config: ParallelConfig, *, world_size: int) -> Layout:
    """Fit the configured axes to `world_size` ranks.

    Raises `LayoutError` when they do not multiply to it, with the nearest sizes that do.
    """
    if config.dp_shard != -1:
        needed = config.dp_replicate * config.dp_shard
        if needed != world_size:
            raise LayoutError(
                f"parallel.dp_replicate * parallel.dp_shard = {config.dp_replicate} * {config.dp_shard} = "
                f"{needed} ranks, but run.workers = {world_size}: set run.workers={needed}, or "
                "parallel.dp_shard=-1 to take what is left"
            )
        return Layout(dp_replicate=config.dp_replicate, dp_shard=config.dp_shard)
    if world_size % config.dp_replicate:
        nearest = min(
            (d for d in range(1, world_size + 1) if world_size % d == 0),
            key=lambda d: abs(d - config.dp_replicate),
        )
        raise LayoutError(
            f"parallel.dp_replicate = {config.dp_replicate} does not divide run.workers = {world_size}, so "
            f"some ranks would have no copy to work on: set parallel.dp_replicate={nearest}"
        )
    return Layout(dp_replicate=config.dp_replicate, dp_shard=world_size // config.dp_replicate)
