"""Which layouts are legal, against the rules written down a second time as plain arithmetic."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loads import loads

from rayfold.models.llama_config import PRESETS, LlamaConfig
from rayfold.parallel import rules
from rayfold.parallel.layout import AXES, CONTEXTS, SCHEDULES, Layout
from rayfold.parallel.legal import all_layouts, is_legal, legal_layouts
from rayfold.parallel.limits import Load, ModelLimits
from rayfold.parallel.microbatches import micro_size

WORLD_SIZES = st.integers(1, 16)


def rows_on_last_rank(rows: int, ranks: int) -> int:
    part = math.ceil(rows / ranks)
    return len(range(rows)[part * (ranks - 1) :])


def works(layout: Layout, load: Load) -> bool:
    """All rules once more, from their description."""
    model, pp, cp, tp = load.model, layout.pp, layout.cp, layout.tp
    if model is None:
        if max(pp, cp, tp) > 1:
            return False
    elif not (fits_tensor(model, cp, tp) and fits_context(layout, model)):
        return False
    if load.batch_size % (layout.dp_replicate * layout.dp_shard):
        return False
    part = load.batch_size // (layout.dp_replicate * layout.dp_shard)
    micro = load.micro_size or micro_size(layout, part)
    if part % micro:
        return False
    return pp == 1 or (model is not None and fits_pipeline(layout, model, part // micro, load.compiled))


def fits_tensor(model: ModelLimits, cp: int, tp: int) -> bool:
    assert None not in (model.heads, model.kv_heads, model.ffn_dim, model.seq_len)
    rows = [model.ffn_dim] + ([model.vocab_size] if model.vocab_size else [])
    return (
        model.heads % tp == model.kv_heads % tp == 0
        and all(rows_on_last_rank(n, tp) >= 1 for n in rows)
        and model.seq_len % (cp * tp) == 0
    )


def fits_context(layout: Layout, model: ModelLimits) -> bool:
    assert None not in (model.heads, model.kv_heads, model.seq_len)
    cp = layout.cp
    if cp == 1:
        return True
    if layout.context == "ring":
        return model.seq_len % (2 * cp) == 0
    heads, kv_heads = model.heads // layout.tp, model.kv_heads // layout.tp
    return heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)


def fits_pipeline(layout: Layout, model: ModelLimits, count: int, compiled: bool) -> bool:
    assert model.layers
    name, given = layout.schedule, layout.stages_per_rank
    if name in ("gpipe", "1f1b"):
        allowed, stages = (0, 1), layout.pp
    elif name in ("zbv", "dualpipev"):
        allowed, stages = (0, 2), 2 * layout.pp
    else:
        allowed, stages = tuple(range(9)), layout.pp * (given or 2)
    if given not in allowed or stages > model.layers:
        return False
    if compiled and name in ("zbv", "dualpipev", "interleaved_zero_bubble"):
        return False
    if name in ("1f1b", "dualpipev"):
        return count >= stages
    if name.startswith("interleaved"):
        return count % max(1, count // layout.pp) == 0
    return True


def everything(world_size: int, stages_per_rank: tuple[int, ...]) -> Iterator[Layout]:
    """Every place in the grid of axes that has `world_size` ranks, with every choice."""
    for sizes in itertools.product(range(1, world_size + 1), repeat=len(AXES)):
        if math.prod(sizes) == world_size:
            axes = dict(zip(AXES, sizes, strict=True))
            for context in CONTEXTS if axes["cp"] > 1 else ["ring"]:
                if axes["pp"] == 1:
                    yield Layout(**axes, context=context)  # type: ignore[arg-type]
                    continue
                for schedule, stages in itertools.product(SCHEDULES, stages_per_rank):
                    yield Layout(**axes, context=context, schedule=schedule, stages_per_rank=stages)  # type: ignore[arg-type]


GRID = {world: list(everything(world, (0, 1, 2, 3))) for world in range(1, 9)}


@given(load=loads(), world_size=st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_the_legal_layouts_are_all_that_work_and_no_other(load: Load, world_size: int) -> None:
    """A layout that is missing is never proposed; one too many fails on the ranks."""
    found = legal_layouts(
        load, world_size=world_size, contexts=CONTEXTS, schedules=[*SCHEDULES], stages_per_rank=(0, 1, 2, 3)
    )
    assert found == [layout for layout in GRID[world_size] if works(layout, load)]


@given(load=loads(), world_size=WORLD_SIZES)
@settings(max_examples=60, deadline=None)
def test_the_usual_choices_are_a_part_of_all_in_the_same_order(load: Load, world_size: int) -> None:
    """A list in another order every time would make other plans every time."""
    usual = legal_layouts(load, world_size=world_size)
    every = legal_layouts(load, world_size=world_size, contexts=CONTEXTS, schedules=[*SCHEDULES])
    assert [layout for layout in every if layout in set(usual)] == usual
    assert len(set(every)) == len(every)
    assert all(layout.world_size == world_size for layout in every)


@pytest.mark.parametrize(("world_size", "ways"), [(1, 1), (7, 5), (8, 35), (12, 75), (16, 70)])
def test_every_factorization_comes_once(world_size: int, ways: int) -> None:
    """Stars and bars for each prime factor."""
    found = list(all_layouts(world_size, contexts=["ring"], schedules=["1f1b"]))
    assert len(set(found)) == len(found) == ways


def test_what_a_model_does_not_know_yet_is_not_held_against_it() -> None:
    """A model of the user's is planned before it is built."""
    load = Load(model=ModelLimits(family="a:b"), batch_size=64)
    assert is_legal(Layout(dp_replicate=1, dp_shard=1, pp=3, cp=5, tp=7), load)


def test_a_plan_without_an_axis_allows_no_ranks_on_it() -> None:
    """A model may say how its matrices split and not where a pipeline cuts."""
    load = Load(model=ModelLimits(family="a:b", axes=("tp",)), batch_size=64)
    found = legal_layouts(load, world_size=4)
    assert {layout.tp for layout in found} == {1, 2, 4}
    assert {(layout.cp, layout.pp) for layout in found} == {(1, 1)}


def test_every_rule_is_in_the_list() -> None:
    """The documentation is made of the list."""
    stated = [rule for rule in vars(rules).values() if isinstance(rule, rules.Rule)]
    assert sorted(rule.id for rule in stated) == sorted(rule.id for rule in rules.RULES)
    assert len({rule.id for rule in stated}) == len(stated)
    assert set(rules.RULES) >= rules.OF_BATCH


@pytest.mark.parametrize("preset", PRESETS)
def test_a_llama_says_what_decides_its_layouts(preset: str) -> None:
    """The numbers of the shape that a rule reads, and the vocabulary only where it is known."""
    shape, limits = PRESETS[preset], LlamaConfig(preset=preset).limits(4096)
    for key in ("layers", "heads", "kv_heads", "ffn_dim"):
        assert getattr(limits, key) == getattr(shape, key)
    assert limits.vocab_size == (shape.vocab_size or None)
    assert (limits.seq_len, limits.tied, limits.family) == (4096, shape.tied_embeddings, "llama")
