"""What a rank sends in one step, by axis, from the layout and the sizes of the model. Plain arithmetic.

Bytes are those that leave a rank when each collective runs as a ring over p ranks: (p - 1) / p of the whole
for a gather, a reduce-scatter and an exchange of all with all, twice that for an all-reduce; a message counts
as it is. `benchmarks/layouts.py` counts them in a real step. Without recompute: what is computed again sends
again.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from .layout import Layout
from .model import Sharded
from .shard import blocks_of

FP32 = 4
COUNT_AND_STOP = 2 * 8  # int64
LOSS_AND_NORM = 2 * 8  # fp64
LOSS_STATISTICS = 4  # numbers a token that vocabulary parallel ranks reduce: the largest logit and three sums


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What goes through a rank in a step."""

    microbatches: int
    rows: int  # of a micro-batch
    seq_len: int
    width: int  # of hidden states
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_number: int  # in the compute dtype


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Shapes of the pieces of one stage, as tensor parallelism cuts them, by the unit that FSDP gathers."""

    blocks: Sequence[Sequence[tuple[int, ...]]]
    rest: Sequence[tuple[int, ...]]
    replicated: Sequence[tuple[int, ...]]  # those of them that tensor parallel ranks all hold whole
    shared: Sequence[tuple[int, ...]] = ()  # those that the first and the last stage both hold


def stages_of(model: Sharded) -> dict[int, StageParameters]:
    """The stages that this rank holds, by number."""
    numbers = model.mesh.layout.stages_of(model.mesh.pp.rank)
    held = {id(each.parameter): each for each in model.held}
    found = {}
    for number, part in zip(numbers, model.parts, strict=True):
        blocks = [list(block.parameters()) for block in blocks_of(part)]
        inside = {id(parameter) for block in blocks for parameter in block}
        own = list(part.parameters())
        found[number] = StageParameters(
            blocks=[_shapes(block) for block in blocks],
            rest=_shapes(p for p in own if id(p) not in inside),
            replicated=_shapes(p for p in own if not held[id(p)].piece.split),
            shared=_shapes(p for p in own if held[id(p)].name in model.tied),
        )
    return found


def _shapes(parameters: Iterable[nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in parameters]


def bytes_by_axis(layout: Layout, passes: Passes, stages: dict[int, StageParameters]) -> dict[str, int]:
    """Bytes that a rank with `stages` sends in a step: by "tp", "cp", "shard", "dp_replicate", "pp", "ends"
    and "world". Axes of one rank send nothing.
    """
    sent: dict[str, float] = defaultdict(float)
    for stage, parameters in stages.items():
        _tensor(sent, layout, passes, stage, parameters)
        _context(sent, layout, passes, len(parameters.blocks))
        _data(sent, layout, passes, parameters)
        _pipeline(sent, layout, passes, stage, stages, parameters)
    world = layout.world_size
    sent["world"] += _all_reduced(COUNT_AND_STOP + LOSS_AND_NORM, world)
    return {axis: round(size) for axis, size in sent.items() if size}


def _tensor(
    sent: dict[str, float], layout: Layout, passes: Passes, stage: int, parameters: StageParameters
) -> None:
    """Four exchanges of hidden states a block each way, two at either end, and the sums of the loss."""
    p, tokens = layout.tp, passes.rows * passes.seq_len // layout.cp
    hidden = _scattered(tokens * passes.width * passes.bytes_per_number, p)
    exchanges = 8 * len(parameters.blocks)
    exchanges += 2 * (stage == 0) + 2 * (stage == layout.stages - 1)
    sent["tp"] += passes.microbatches * exchanges * hidden
    if stage == layout.stages - 1:
        sent["tp"] += passes.microbatches * _all_reduced(tokens * LOSS_STATISTICS * FP32, p)
    own = sum(_shard_numbers(shape, layout) for shape in parameters.replicated)
    sent["tp"] += _all_reduced(own * FP32, p)


def _context(sent: dict[str, float], layout: Layout, passes: Passes, blocks: int) -> None:
    """Keys and values, or heads, as `context.py` has it."""
    cp, tokens = layout.cp, passes.rows * passes.seq_len // layout.cp
    heads, kv_heads = passes.heads // layout.tp, passes.kv_heads // layout.tp
    if cp == 1:
        return
    there: float
    if layout.context == "ring":
        numbers = tokens * 2 * kv_heads * passes.head_dim
        there = 2 * (cp - 1) * numbers * passes.bytes_per_number + cp * numbers * FP32
    else:
        copies = cp // math.gcd(cp, kv_heads)
        numbers = tokens * (2 * heads + 2 * kv_heads * copies) * passes.head_dim
        there = 2 * _scattered(numbers * passes.bytes_per_number, cp)
    sent["cp"] += passes.microbatches * blocks * there


def _data(sent: dict[str, float], layout: Layout, passes: Passes, parameters: StageParameters) -> None:
    """Parameters gathered, gradients summed: without a pipeline for each micro-batch, with one for all."""
    shards = layout.dp_shard * layout.cp
    blocks = sum(_padded(shape, shards) for block in parameters.blocks for shape in block)
    rest = sum(_padded(shape, shards) for shape in parameters.rest)
    times = 1 if layout.pp > 1 else passes.microbatches
    # a block is gathered forward and again backward; in a pipeline once, and kept until the step is over
    gathers = times * (rest + (1 if layout.pp > 1 else 2) * blocks)
    sent["shard"] += _scattered(gathers * passes.bytes_per_number, shards)
    sent["shard"] += _scattered(times * (blocks + rest) * FP32, shards)
    sent["dp_replicate"] += _all_reduced((blocks + rest) / shards * FP32, layout.dp_replicate)


def _pipeline(
    sent: dict[str, float],
    layout: Layout,
    passes: Passes,
    stage: int,
    stages: dict[int, StageParameters],
    parameters: StageParameters,
) -> None:
    """Hidden states to the next stage, their gradients to the one before, and gradients of what both ends
    hold.
    """
    tokens = passes.rows * passes.seq_len // layout.cp // layout.tp
    message = passes.microbatches * tokens * passes.width * passes.bytes_per_number
    for neighbour in (stage - 1, stage + 1):
        if 0 <= neighbour < layout.stages and neighbour not in stages:
            sent["pp"] += message
    if not {0, layout.stages - 1} <= set(stages):
        own = sum(_shard_numbers(shape, layout) for shape in parameters.shared)
        sent["ends"] += _all_reduced(own * FP32, 2)


def _padded(shape: tuple[int, ...], shards: int) -> int:
    """Numbers that are gathered of a parameter: its rows are padded to shards of one size."""
    return _largest_shard(shape, shards) * shards


def _largest_shard(shape: tuple[int, ...], shards: int) -> int:
    return -(-shape[0] // shards) * math.prod(shape[1:])


def _shard_numbers(shape: tuple[int, ...], layout: Layout) -> int:
    """Numbers that the first ranks keep of a parameter; the last may have fewer."""
    return min(_largest_shard(shape, layout.dp_shard * layout.cp), math.prod(shape))


def _scattered(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks


def _all_reduced(size: float, ranks: int) -> float:
    return 2 * _scattered(size, ranks)
