"""Which layouts can be: checks of a layout against what it has to carry, and all that pass. No torch here."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import rules
from .layout import AXES, SCHEDULES, Context, Layout, ScheduleName, key_value
from .limits import Load, ModelLimits
from .microbatches import divisors, micro_size, rounds_of
from .rules import Rule


class Broken(NamedTuple):
    """A rule that a layout breaks: the key it is told at, and a fact that goes on after the key."""

    rule: Rule
    key: str
    fact: str


def legal_layouts(
    load: Load,
    *,
    world_size: int,
    contexts: Sequence[Context] = ("ring",),
    schedules: Sequence[ScheduleName] = ("1f1b",),
    stages_per_rank: Sequence[int] = (0,),
) -> list[Layout]:
    """Every layout of `world_size` ranks that can carry `load`, in a stable order: pp changes slowest, tp
    fastest. A layout without a context axis or a pipeline comes once, whatever the choices for these.
    """
    possible = all_layouts(
        world_size, contexts=contexts, schedules=schedules, stages_per_rank=stages_per_rank
    )
    return [layout for layout in possible if is_legal(layout, load)]


def all_layouts(
    world_size: int,
    *,
    contexts: Sequence[Context],
    schedules: Sequence[ScheduleName],
    stages_per_rank: Sequence[int] = (0,),
    stage_layers: Sequence[tuple[int, ...]] = ((),),
) -> Iterator[Layout]:
    """As `legal_layouts`, whatever has to be carried."""
    none: list[tuple[ScheduleName, int, tuple[int, ...]]] = [("1f1b", 0, ())]
    pipelines = list(itertools.product(schedules, stages_per_rank, stage_layers))
    for pp, dp_replicate, dp_shard, cp, tp in _factors(world_size, len(AXES)):
        for context in contexts if cp > 1 else ("ring",):
            for schedule, stages, layers in pipelines if pp > 1 else none:
                yield Layout(
                    pp=pp,
                    dp_replicate=dp_replicate,
                    dp_shard=dp_shard,
                    cp=cp,
                    tp=tp,
                    context=context,
                    schedule=schedule,
                    stages_per_rank=stages,
                    stage_layers=layers,
                )


def is_legal(layout: Layout, load: Load) -> bool:
    """Whether `layout` breaks no rule."""
    return next(itertools.chain(broken(layout, load), broken_by_batch(layout, load)), None) is None


def broken(layout: Layout, load: Load) -> Iterator[Broken]:
    """The rules that `layout` breaks whatever the batch."""
    model = load.model or ModelLimits(family="", axes=())
    for axis in ("tp", "cp", "pp"):
        if (size := getattr(layout, axis)) > 1 and axis not in model.axes:
            said = f" = {model.family}" if model.family else ""
            fact = f"is {size}, and the model of model.family{said} states no plan for it"
            yield Broken(rules.PLAN, f"parallel.{axis}", fact)
    if layout.tp > 1:
        yield from _tensor(layout, model)
    if layout.cp > 1:
        yield from _context(layout, model)
    if layout.pp > 1:
        yield from _pipeline(layout, model)
        if load.compiled and SCHEDULES[layout.schedule].splits_backward:
            yield _told(rules.COMPILED, f"is true, with parallel.pipeline_schedule = {layout.schedule}")


def broken_by_batch(layout: Layout, load: Load) -> Iterator[Broken]:
    """The rules about the batch that `layout` breaks; at most one, as each builds on the one before."""
    size, data_ranks = load.batch_size, layout.dp_size
    part = size // data_ranks
    if size % data_ranks:
        fact = (
            f"is {size}, which the parallel.dp_replicate * parallel.dp_shard = {layout.dp_replicate} * "
            f"{layout.dp_shard} data parallel ranks cannot share equally"
        )
        yield _told(rules.BATCH_SHARE, fact)
        return
    if load.micro_size and part % load.micro_size:
        of = f"the {part} sequences that a rank has of batch.size = {size}"
        yield _told(rules.BATCH_MICRO, f"is {load.micro_size}, which does not divide {of}")
        return
    count = part // (load.micro_size or micro_size(layout, part))
    schedule = SCHEDULES[layout.schedule]
    parts = f" of batch.micro_size = {load.micro_size}" if load.micro_size else ""
    makes = f"is {size}, of which a rank makes {count} micro-batches{parts}"
    if layout.stages > 1 and schedule.every_stage_busy and count < layout.stages:
        fact = (
            f"{makes}, fewer than the {layout.stages} stages under parallel.pipeline_schedule = "
            f"{layout.schedule}"
        )
        yield _told(rules.BATCH_STAGES, fact)
    elif layout.stages > 1 and schedule.in_rounds and count % (rounds := rounds_of(layout, count)):
        fact = (
            f"{makes}, no multiple of the {rounds} rounds of parallel.pipeline_schedule = {layout.schedule}"
        )
        yield _told(rules.BATCH_ROUNDS, fact)


def _tensor(layout: Layout, model: ModelLimits) -> Iterator[Broken]:
    tp = layout.tp
    for rule, heads in ((rules.TP_HEADS, model.heads), (rules.TP_KV_HEADS, model.kv_heads)):
        if heads is not None and heads % tp:
            yield _told(rule, f"is {tp}, which does not divide {rule.keys[1]} = {heads}")
    for rule, rows in ((rules.TP_FFN, model.ffn_dim), (rules.TP_VOCABULARY, model.vocab_size)):
        if rows is not None and -(-rows // tp) * (tp - 1) >= rows:
            fact = f"is {tp}, and {rule.keys[1]} = {rows} in parts of {-(-rows // tp)} is used up before"
            yield _told(rule, f"{fact} the last rank")
    seq_len, cp = model.seq_len, layout.cp
    if seq_len is not None and seq_len % cp == 0 and (seq_len // cp) % tp:
        of = _part("data.seq_len", seq_len, "parallel.cp", cp)
        yield _told(rules.TP_SEQUENCE, f"is {tp}, which does not divide {of}")


def _context(layout: Layout, model: ModelLimits) -> Iterator[Broken]:
    cp, tp, seq_len = layout.cp, layout.tp, model.seq_len
    kind = f"is {cp} with parallel.context = {layout.context}"
    if layout.context == "ring":
        if seq_len is not None and seq_len % (2 * cp):
            yield _told(rules.CP_RING, f"{kind}, and 2 * {cp} does not divide data.seq_len = {seq_len}")
        return
    if seq_len is not None and seq_len % cp:
        yield _told(rules.CP_ULYSSES, f"{kind}, and does not divide data.seq_len = {seq_len}")
    if (heads := model.heads) is not None and heads % tp == 0 and (heads // tp) % cp:
        of = _part("model.heads", heads, "parallel.tp", tp)
        yield _told(rules.CP_HEADS, f"{kind}, and does not divide {of}")
    heads = model.kv_heads
    if heads is not None and heads % tp == 0 and (heads // tp) % cp and cp % (heads // tp):
        of = _part("model.kv_heads", heads, "parallel.tp", tp)
        yield _told(rules.CP_KV_HEADS, f"{kind}, and neither divides {of} nor is divided by it")


def _pipeline(layout: Layout, model: ModelLimits) -> Iterator[Broken]:
    schedule, given = SCHEDULES[layout.schedule], layout.stages_per_rank
    if given not in (0, schedule.stages_per_rank) and not schedule.any_stages:
        takes = f"parallel.pipeline_schedule = {layout.schedule} takes {schedule.stages_per_rank}"
        yield _told(rules.STAGES_PER_RANK, f"is {given}, and {takes}")
        return
    pp, stages, layers = layout.pp, layout.stages, model.layers
    on_each = f" with {stages // pp} stages a rank" if stages > pp else ""
    if layers is not None and stages > layers:
        fact = f"is {pp}{on_each}, so {stages} stages share model.layers = {layers}"
        yield _told(rules.PP_LAYERS, fact)
    cut = layout.stage_layers
    if cut and len(cut) != stages:
        fact = f"is {key_value(cut)}, and parallel.pp = {pp}{on_each} makes {stages} stages"
        yield _told(rules.STAGE_COUNT, fact)
    elif cut and layers is not None and sum(cut) != layers:
        yield _told(rules.STAGE_SUM, f"is {key_value(cut)}, {sum(cut)} in all, and model.layers = {layers}")


def _part(key: str, number: int, axis: str, ranks: int) -> str:
    """What each rank of an axis has of a number."""
    return f"{key} / {axis} = {number} / {ranks} = {number // ranks}" if ranks > 1 else f"{key} = {number}"


def _told(rule: Rule, fact: str) -> Broken:
    return Broken(rule, rule.keys[0], fact)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as a product of `count` numbers, in order."""
    if count == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in _factors(number // first, count - 1):
            yield (first, *rest)
