"""Orders of work in a pipeline: complete, possible, and as long as the formulas say."""

from typing import Any

import pytest

from rayfold.parallel.layout import SCHEDULES, Layout, ScheduleName
from rayfold.parallel.microbatches import schedule_takes
from rayfold.parallel.schedules import order_of
from rayfold.parallel.timeline import Durations, ScheduleError, ScheduleStep, in_flight, simulate


def layout_of(name: ScheduleName, pp: int, **more: Any) -> Layout:
    return Layout(dp_replicate=1, dp_shard=1, pp=pp, schedule=name, **more)


CASES = [
    (name, pp, count)
    for name in SCHEDULES
    for pp, count in ((2, 4), (2, 9), (3, 6), (4, 8), (4, 13))
    if schedule_takes(layout_of(name, pp), count)
]


def backward_of(order: Any) -> dict[tuple[int, int], list[str]]:
    """What follows each pass forward, by stage and micro-batch."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for steps in order:
        for step in steps:
            kinds.setdefault((step.stage, step.microbatch), []).append(step.kind)
    return kinds


@pytest.mark.parametrize(("name", "pp", "count"), CASES)
def test_every_stage_sees_every_microbatch_once(name: ScheduleName, pp: int, count: int) -> None:
    """Forward, then backward, whole or in two halves in their order: or gradients are missing or doubled."""
    layout = layout_of(name, pp)
    passes = backward_of(order_of(layout, count))
    assert set(passes) == {(stage, number) for stage in range(layout.stages) for number in range(count)}
    assert all(kinds in (["F", "B"], ["F", "I", "W"]) for kinds in passes.values())
    assert SCHEDULES[name].splits_backward == any("W" in kinds for kinds in passes.values())


@pytest.mark.parametrize(("name", "pp", "count"), CASES)
def test_nobody_waits_for_ever(name: ScheduleName, pp: int, count: int) -> None:
    """Each rank holds the stages that the layout gives it, and all that it needs comes at some time."""
    layout = layout_of(name, pp)
    order = order_of(layout, count)
    for rank, steps in enumerate(order):
        assert {step.stage for step in steps} == set(layout.stages_of(rank))
    timeline = simulate(order)
    done = {(t.step.kind, t.step.stage, t.step.microbatch): t for steps in timeline.ranks for t in steps}
    for (kind, stage, number), timed in done.items():
        if kind == "F" and stage:
            assert timed.start >= done["F", stage - 1, number].end
        if kind in "BI" and stage < layout.stages - 1:
            later = done.get(("B", stage + 1, number)) or done["I", stage + 1, number]
            assert timed.start >= later.end


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
def test_the_layout_knows_how_many_microbatches_a_schedule_takes(name: ScheduleName, pp: int) -> None:
    """What is refused before a run, without torch, is what torch would refuse in it."""
    layout = layout_of(name, pp)
    for count in range(1, 14):
        if schedule_takes(layout, count):
            simulate(order_of(layout, count))
        else:
            with pytest.raises(ScheduleError, match=f"{name} does not work with {count} micro-batches"):
                order_of(layout, count)


@pytest.mark.parametrize(("pp", "count"), [(2, 4), (4, 8), (8, 8)])
def test_bubbles_are_those_of_the_papers(pp: int, count: int) -> None:
    """(p - 1) / (m + p - 1) of the time under GPipe and 1F1B; two stages a rank halve it, roughly."""
    plain = (pp - 1) / (count + pp - 1)
    assert simulate(order_of(layout_of("gpipe", pp), count)).bubble == pytest.approx(plain)
    assert simulate(order_of(layout_of("1f1b", pp), count)).bubble == pytest.approx(plain)
    interleaved = simulate(order_of(layout_of("interleaved_1f1b", pp), count)).bubble
    assert interleaved == pytest.approx((pp - 1) / (2 * count + pp - 1))
    assert simulate(order_of(layout_of("interleaved_zero_bubble", pp), count)).bubble < interleaved


def test_one_forward_one_backward_holds_few_microbatches() -> None:
    """That is what it is for: as many as stages are still to come, however long the step."""
    assert in_flight(order_of(layout_of("gpipe", 4), 16)) == [16, 16, 16, 16]
    assert in_flight(order_of(layout_of("1f1b", 4), 16)) == [4, 3, 2, 1]


def test_an_order_of_two_ranks_in_full() -> None:
    """Read it once, and every other test here is easier."""
    first, last = order_of(layout_of("1f1b", 2), 3)
    assert " ".join(map(str, first)) == "0F0 0F1 0B0 0F2 0B1 0B2"
    assert " ".join(map(str, last)) == "1F0 1B0 1F1 1B1 1F2 1B2"
    times = [[(t.start, t.end) for t in steps] for steps in simulate((first, last)).ranks]
    assert times[0] == [(0, 1), (1, 2), (4, 6), (6, 7), (7, 9), (10, 12)]
    assert times[1] == [(1, 2), (2, 4), (4, 5), (5, 7), (7, 8), (8, 10)]


def test_stages_and_messages_may_take_their_time() -> None:
    """A stage of twice the layers holds the others up, and so does the way between two ranks."""
    order = order_of(layout_of("gpipe", 2), 2)
    assert simulate(order).length == 9
    assert simulate(order, Durations(stages=(1.0, 2.0))).length == 15
    assert simulate(order, Durations(transfer=0.5)).length == 10


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """A wrong order is an error of the plan, not a hang of a run."""
    circle = (
        (ScheduleStep("F", 0, 0), ScheduleStep("B", 0, 0)),
        (ScheduleStep("B", 1, 0), ScheduleStep("F", 1, 0)),
    )
    with pytest.raises(ScheduleError, match="rank 0 waits for ever before 0B0"):
        simulate(circle)


def test_an_unknown_schedule_is_told_the_known_ones() -> None:
    """A slip of the pen is answered with what could have been meant."""
    with pytest.raises(ScheduleError, match='no schedule "2f2b"; there are gpipe, 1f1b'):
        order_of(layout_of("2f2b", 1), 4)  # type: ignore[arg-type]
