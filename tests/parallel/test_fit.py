"""Fitting a configuration to ranks: the layout asked for, or what is wrong with it and what to type."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loads import loads
from refusals import remedies

from rayfold.parallel.fit import LayoutError, fits, make_layout
from rayfold.parallel.layout import AXES, CONTEXTS, SCHEDULES, Layout, ParallelConfig
from rayfold.parallel.legal import broken, legal_layouts
from rayfold.parallel.limits import Load, ModelLimits
from rayfold.parallel.rules import RULES

SMALL = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 8])
ANY_MODEL = Load(model=ModelLimits(family="a:b"), batch_size=2**7 * 3**4 * 5 * 7)


@st.composite
def configs(draw: st.DrawFn) -> ParallelConfig:
    """Sizes and choices that do and do not fit each other."""
    return ParallelConfig(
        dp_replicate=draw(SMALL),
        dp_shard=draw(st.one_of(st.just(-1), SMALL)),
        tp=draw(SMALL),
        cp=draw(SMALL),
        pp=draw(SMALL),
        context=draw(st.sampled_from(CONTEXTS)),
        pipeline_schedule=draw(st.sampled_from([*SCHEDULES])),
        stages_per_rank=draw(st.sampled_from([0, 0, 1, 2, 3])),
        stage_layers=tuple(draw(st.sampled_from([(), (), (1, 2), (2, 1, 1), (1, 1, 1, 1)]))),
    )


def asks_for(layout: Layout) -> ParallelConfig:
    """The configuration of a layout's own keys."""
    return ParallelConfig(**layout.keys())


def problems(config: ParallelConfig, world_size: int, load: Load, **more: Any) -> list[tuple[str, str]]:
    try:
        make_layout(config, world_size=world_size, load=load, **more)
    except LayoutError as error:
        return error.problems
    return []


def after(
    changes: dict[str, str], config: ParallelConfig, world_size: int, load: Load
) -> tuple[ParallelConfig, int, Load]:
    """What somebody has who types the changes."""
    for key, text in changes.items():
        section, name = key.split(".")
        value: Any = int(text) if text.lstrip("-").isdigit() else text
        if name == "stage_layers":
            value = tuple(int(n) for n in text.strip("[]").split(",") if n)
        if section == "parallel":
            config = replace(config, **{name: value})
        elif key == "run.workers":
            world_size = value
        else:
            load = replace(load, **{{"size": "batch_size"}.get(name, name): value})
    return config, world_size, load


@given(load=loads(), world_size=st.integers(1, 16), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_legal_layout_can_be_asked_for(load: Load, world_size: int, data: st.DataObject) -> None:
    """By its own keys, and with the data ranks left open."""
    found = legal_layouts(load, world_size=world_size, contexts=CONTEXTS, schedules=[*SCHEDULES])
    for layout in found:
        config = asks_for(layout)
        assert make_layout(config, world_size=world_size, load=load) == layout
        assert make_layout(replace(config, dp_shard=-1), world_size=world_size, load=load) == layout


@given(config=configs(), load=loads(), world_size=st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_a_layout_is_as_asked_or_every_remedy_works(
    config: ParallelConfig, load: Load, world_size: int
) -> None:
    """What a message says to type is typed, and must then be enough."""
    found = problems(config, world_size, load)
    assert fits(config, world_size=world_size, load=load) == (not found)
    if not found:
        layout = make_layout(config, world_size=world_size, load=load)
        assert layout.world_size == world_size
        for axis in AXES:
            assert getattr(config, axis) in (getattr(layout, axis), -1)
        return
    for _, message in found:
        choices = remedies(message)
        assert choices, message
        for changes in choices:
            assert changes, message
            assert not problems(*after(changes, config, world_size, load)), message


@given(config=configs(), load=loads(), world_size=st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_every_message_names_both_settings(config: ParallelConfig, load: Load, world_size: int) -> None:
    """The one it is told at and the one that it does not fit; both may be wrong."""
    for key, message in problems(config, world_size, load):
        [rule] = [rule for rule in RULES if f": {rule.why}; set " in message]
        line = f"{key}: {message}"
        if rule.id == "plan":
            assert key in ("parallel.tp", "parallel.cp", "parallel.pp")
            assert "model.family" in line
        else:
            assert all(name in line for name in rule.keys), line


@given(config=configs(), load=loads(), world_size=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_no_nearer_layout_was_missed(config: ParallelConfig, load: Load, world_size: int) -> None:
    """With ranks and batch as they are, no legal layout is fewer keys away than what is said."""
    found = problems(config, world_size, load)
    if not found:
        return
    said = min(cost(changes, config) for changes in remedies(found[0][1]))
    for layout in legal_layouts(
        load,
        world_size=world_size,
        contexts=CONTEXTS,
        schedules=[*SCHEDULES],
        stages_per_rank=sorted({0, config.stages_per_rank}),
    ):
        wanted = layout.keys() | {axis: getattr(layout, axis) for axis in AXES}
        if layout.pp > 1:
            wanted |= {"stages_per_rank": layout.stages_per_rank, "stage_layers": layout.stage_layers}
        if config.dp_shard == -1:
            del wanted["dp_shard"]
        needed = {f"parallel.{k}": "" for k, value in wanted.items() if value != getattr(config, k)}
        sound = not any(key.startswith("batch.") for key, _ in found) or any(broken(layout, load))
        if sound:
            assert cost(needed, config) >= said, f"{layout}: {found}"


def cost(changes: dict[str, str], config: ParallelConfig) -> int:
    """Keys to change; an axis that was not in use counts twice."""
    new = [
        axis for axis in ("tp", "cp", "pp") if f"parallel.{axis}" in changes and getattr(config, axis) == 1
    ]
    return len(changes) + len(new)


@given(replicate=st.integers(1, 64), world_size=st.integers(1, 256))
@settings(deadline=None)
def test_the_nearest_divisor_is_named(replicate: int, world_size: int) -> None:
    """No other number of copies that fits is closer to the one asked for."""
    if world_size % replicate == 0:
        return
    load = replace(ANY_MODEL, batch_size=world_size)
    [(_, message)] = problems(ParallelConfig(dp_replicate=replicate), world_size, load)
    [changes] = remedies(message)
    nearest = min(abs(d - replicate) for d in range(1, world_size + 1) if world_size % d == 0)
    assert abs(int(changes["parallel.dp_replicate"]) - replicate) == nearest


def test_all_problems_are_told_at_once() -> None:
    """Each with its own reason, all with the one remedy."""
    model = ModelLimits(family="llama", layers=4, heads=4, kv_heads=2, ffn_dim=384, seq_len=254)
    config = ParallelConfig(tp=3, cp=4, pp=8, dp_shard=1)
    found = problems(config, 96, Load(model=model, batch_size=96))
    assert [key for key, _ in found] == [*["parallel.tp"] * 2, "parallel.cp", "parallel.pp"]
    assert len({message.rpartition("; set ")[2] for _, message in found}) == 1


def test_ranks_that_are_left_over_can_be_taken_or_not_started() -> None:
    """Where a number of data ranks is stated, either side may give way."""
    config = ParallelConfig(dp_shard=2, tp=2)
    [(key, message)] = problems(config, 8, ANY_MODEL)
    assert key == "parallel.dp_shard"
    assert remedies(message) == [{"parallel.dp_shard": "-1"}, {"run.workers": "4"}]


def test_a_model_without_a_plan_says_what_it_needs() -> None:
    """Each axis is told by itself; data parallel axes need none."""
    load = Load(model=None, batch_size=8)
    found = problems(ParallelConfig(tp=2, pp=2), 4, load)
    assert [key for key, _ in found] == ["parallel.pp", "parallel.tp"] or [key for key, _ in found] == [
        "parallel.tp",
        "parallel.pp",
    ]
    for _, message in found:
        assert "ModelPlan" in message
        assert remedies(message) == [{"parallel.pp": "1", "parallel.tp": "1"}]
    assert make_layout(ParallelConfig(dp_replicate=2), world_size=4, load=load).dp_size == 4


def test_choices_without_effect_leave_no_trace() -> None:
    """Two configurations that come to the same are the same layout, and neither is refused."""
    plain = make_layout(ParallelConfig(), world_size=2, load=ANY_MODEL)
    config = ParallelConfig(
        context="ulysses", pipeline_schedule="zbv", stages_per_rank=5, stage_layers=(9, 9)
    )
    assert make_layout(config, world_size=2, load=ANY_MODEL) == plain
    zbv = ParallelConfig(pp=2, pipeline_schedule="zbv")
    assert make_layout(replace(zbv, stages_per_rank=2), world_size=2, load=ANY_MODEL) == make_layout(
        zbv, world_size=2, load=ANY_MODEL
    )


@pytest.mark.parametrize("world_size", [512, 1024])
def test_a_thousand_ranks_are_answered_at_once(world_size: int) -> None:
    """The search for the nearest layout must not be felt."""
    model = ModelLimits(family="llama", layers=80, heads=64, kv_heads=8, ffn_dim=28672, seq_len=8192)
    config = ParallelConfig(tp=16, pp=8, cp=2, pipeline_schedule="zbv")
    [(_, message)] = problems(config, world_size, Load(model=model, batch_size=2048))
    assert remedies(message) == [{"parallel.tp": "8"}]
