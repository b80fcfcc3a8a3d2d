"""Fit a configuration to ranks: the layout it asks for, or what is wrong with it and the nearest that works.

Nearest is: the fewest keys to change (an axis that was not in use counts twice), then the smallest changes of
sizes. A message ends with those keys as the command line takes them; typing all of them works. No torch here.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from . import rules
from .layout import AXES, CONTEXTS, SCHEDULES, Layout, ParallelConfig, key_value
from .legal import Broken, all_layouts, broken, broken_by_batch, is_legal
from .limits import Load
from .microbatches import divisors

Changes: TypeAlias = dict[str, Any]  # section.key -> value
Candidate: TypeAlias = tuple[tuple[int, ...], Layout, Changes]  # what it costs, first


class LayoutError(ValueError):
    """The axes fit neither the ranks, nor the model, nor the batch: `problems` are (key, message)."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(f"{key}: {message}" for key, message in self.problems)


def make_layout(
    config: ParallelConfig, *, world_size: int, load: Load, or_worlds: Sequence[int] = ()
) -> Layout:
    """The layout that `config` asks for on `world_size` ranks.

    Raises `LayoutError` with everything that cannot be and the nearest that can; `or_worlds` are other
    numbers of ranks that may be suggested, where nobody insists on `world_size`.
    """
    layout, found = _check(config, world_size, load)
    if not found:
        return layout
    if fits(replace(config, dp_shard=-1), world_size=world_size, load=load):
        changes = {"run.workers": layout.world_size} | _batch_changes(layout, load)
        remedy = f"parallel.dp_shard=-1 to take what is left, or {_typed(changes)}"
    else:
        remedy = _typed(_nearest(config, found, asked=layout, worlds=(world_size, *or_worlds), load=load))
    raise LayoutError([(key, f"{fact}: {rule.why}; set {remedy}") for rule, key, fact in found])


def _typed(changes: Changes) -> str:
    return " ".join(f"{key}={key_value(value)}" for key, value in changes.items())


def fits(config: ParallelConfig, *, world_size: int, load: Load) -> bool:
    """Whether `make_layout` has a layout for this."""
    return not _check(config, world_size, load)[1]


def _check(config: ParallelConfig, world_size: int, load: Load) -> tuple[Layout, list[Broken]]:
    """The layout asked for, as near as ranks allow, and all that is wrong with it."""
    fixed = {axis: getattr(config, axis) for axis in AXES if axis != "dp_shard"}
    if config.dp_shard != -1:
        fixed["dp_shard"] = config.dp_shard
    needed = math.prod(fixed.values())
    dp_shard = max(1, world_size // needed) if config.dp_shard == -1 else config.dp_shard
    layout = Layout(**fixed | {"dp_shard": dp_shard}, **_choices(config))
    found = list(broken(layout, load))
    if layout.world_size != world_size:
        # the batch cannot be judged before the number of data parallel ranks is known
        return layout, [_wrong_ranks(config, fixed, needed, world_size), *found]
    return layout, [*found, *broken_by_batch(layout, load)]


def _wrong_ranks(config: ParallelConfig, fixed: dict[str, int], needed: int, world_size: int) -> Broken:
    in_use = {f"parallel.{axis}": size for axis, size in fixed.items() if size > 1}
    product = f"{' * '.join(in_use)} = {' * '.join(map(str, in_use.values()))} = {needed}"
    if config.dp_shard == -1:
        key, size = next(iter(in_use.items()))
        what = f"is {size}, which" if len(in_use) == 1 else f"is {size}, and {product}"
        fact = (
            f"{what} does not divide run.workers = {world_size}, so parallel.dp_shard = -1 cannot fill them"
        )
        return Broken(rules.RANKS, key, fact)
    ranks = product if len(in_use) > 1 else str(needed)
    fact = f"is {config.dp_shard}, which makes {ranks} ranks, not run.workers = {world_size}"
    return Broken(rules.RANKS, rules.RANKS.keys[0], fact)


def _choices(config: ParallelConfig) -> dict[str, Any]:
    """How a layout of `config` does what its axes ask for; what has no effect has the default."""
    choices: dict[str, Any] = {}
    if config.cp > 1:
        choices["context"] = config.context
    if config.pp > 1:
        stages = config.stages_per_rank
        usual = SCHEDULES[config.pipeline_schedule].stages_per_rank
        choices |= {
            "schedule": config.pipeline_schedule,
            "stages_per_rank": 0 if stages == usual else stages,
            "stage_layers": config.stage_layers,
        }
    return choices


def _nearest(
    config: ParallelConfig, found: list[Broken], *, asked: Layout, worlds: Sequence[int], load: Load
) -> Changes:
    """The fewest changes that make a layout that works."""
    if rules.OF_BATCH.issuperset(broken.rule for broken in found):
        return _batch_changes(asked, load)  # the layout itself is sound: keep it
    candidates = _candidates(config, worlds)
    if config.dp_shard != -1 and asked.world_size not in worlds:
        candidates = sorted(
            [((1, 0, 0, 0), asked, {"run.workers": asked.world_size}), *candidates], key=_cost
        )
    best: tuple[tuple[int, ...], Changes] | None = None
    for cost, layout, changes in candidates:
        if best is not None and cost >= best[0]:
            break  # the others cost more, whatever the batch
        if any(broken(layout, load)):
            continue
        batch = _batch_changes(layout, load)
        whole = ((cost[0] + len(batch), *cost[1:]), changes | batch)
        if best is None or whole[0] < best[0]:
            best = whole
    assert best is not None, "all ranks on dp_shard work for every model"
    return best[1]


def _candidates(config: ParallelConfig, worlds: Sequence[int]) -> list[Candidate]:
    """Layouts with what they cost and the changes that ask for them, cheapest first; of `worlds`, the first
    number of ranks is the one asked for.
    """
    rows = []
    usual = SCHEDULES[config.pipeline_schedule].stages_per_rank
    # of schedules that are as near: those with as many stages, and gpipe last, as it keeps most in memory
    alike = sorted(SCHEDULES, key=lambda s: (SCHEDULES[s].stages_per_rank != usual, s == "gpipe"))
    for world in dict.fromkeys(worlds):
        layouts = all_layouts(
            world,
            contexts=CONTEXTS if config.cp > 1 else (config.context,),
            schedules=alike if config.pp > 1 else (config.pipeline_schedule,),
            stages_per_rank=sorted({0, config.stages_per_rank}),
            stage_layers=sorted({(), config.stage_layers}),
        )
        for layout in layouts:
            changes = _changes(config, layout)
            sizes = [(value, getattr(config, key)) for key, value in changes.items() if key in AXES]
            new_axes = [key for key in ("pp", "cp", "tp") if key in changes and getattr(config, key) == 1]
            cost = (
                len(changes) + len(new_axes),
                sum(abs(new - old) for new, old in sizes),
                abs(world - worlds[0]),
                sum(new for new, _ in sizes),
            )
            rows.append((cost, layout, {f"parallel.{key}": value for key, value in changes.items()}))
    return sorted(rows, key=_cost)


def _cost(candidate: Candidate) -> tuple[int, ...]:
    return candidate[0]


def _changes(config: ParallelConfig, layout: Layout) -> Changes:
    """The `[parallel]` keys to change in `config` so that it asks for `layout`."""
    changes: Changes = {axis: getattr(layout, axis) for axis in AXES}
    if config.dp_shard == -1:
        del changes["dp_shard"]
    if layout.cp > 1:
        changes["context"] = layout.context
    if layout.pp > 1:
        changes["pipeline_schedule"] = layout.schedule
        changes["stages_per_rank"] = layout.stages_per_rank
        changes["stage_layers"] = layout.stage_layers
    return {key: value for key, value in changes.items() if value != getattr(config, key)}


def _batch_changes(layout: Layout, load: Load) -> Changes:
    """The nearest batch that a sound `layout` takes, as changes of the one there is."""
    if is_legal(layout, load):
        return {}
    for size in _multiples_near(load.batch_size, layout.dp_size):
        part = size // layout.dp_size
        asked = load.micro_size
        # a pipeline with fewer micro-batches than stages may be possible, and is not what was meant
        fair = [d for d in divisors(part) if layout.stages == 1 or part // d >= layout.stages]
        for micro in sorted(fair, key=lambda d: abs(d - asked)) if asked else (0,):
            if is_legal(layout, replace(load, batch_size=size, micro_size=micro)):
                changes = {"batch.size": size, "batch.micro_size": micro}
                now = {"batch.size": load.batch_size, "batch.micro_size": asked}
                return {key: value for key, value in changes.items() if value != now[key]}
    raise AssertionError("a batch of one sequence a stage works under every schedule")


def _multiples_near(number: int, step: int) -> Iterator[int]:
    """The multiples of `step` from the nearest to `number` outwards, larger ones first."""
    nearest = max(step, (number + step // 2) // step * step)
    for away in itertools.count(0, step):
        yield nearest + away
        if 0 < away < nearest:
            yield nearest - away
