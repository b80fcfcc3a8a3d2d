"""The layout as a value: where layers and stages lie, into how many micro-batches a step is cut."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.parallel.fit import LayoutError
from rayfold.parallel.layout import SCHEDULES, Layout, even_cut
from rayfold.parallel.microbatches import divisors, micro_size, schedule_takes
from rayfold.parallel.schedules import order_of
from rayfold.parallel.timeline import ScheduleError

STAGES = st.integers(1, 40)


def pipeline(schedule: str, pp: int, stages_per_rank: int = 0) -> Layout:
    return Layout(
        dp_replicate=1,
        dp_shard=1,
        pp=pp,
        schedule=schedule,  # type: ignore[arg-type]
        stages_per_rank=stages_per_rank,
    )


# --- layers


@given(stages=STAGES, more=st.integers(0, 200))
def test_an_even_cut_places_every_layer_once(stages: int, more: int) -> None:
    """No stage is empty, none has two layers more than another, and the layers follow each other."""
    layers = stages + more
    cut = even_cut(layers, stages)
    assert sum(cut) == layers
    assert min(cut) >= 1
    assert max(cut) - min(cut) <= 1
    layout = pipeline("1f1b", stages)
    assert [layer for stage in range(stages) for layer in layout.layers_of(stage, layers)] == [*range(layers)]


@given(stages=st.integers(2, 40), layers=st.integers(2, 200))
def test_the_ends_of_the_model_have_no_more_layers_than_the_middle(stages: int, layers: int) -> None:
    """Embedding and output cost time too: sizes rise to the middle and fall; none is below the last."""
    cut = even_cut(layers, stages)
    top = cut.index(max(cut))
    assert list(cut[: top + 1]) == sorted(cut[: top + 1])
    assert list(cut[top:]) == sorted(cut[top:], reverse=True)
    assert cut[-1] == min(cut)
    assert cut[0] <= max(cut[1:-1], default=cut[0])


@given(stages=STAGES, layers=st.integers(1, 200))
def test_another_layer_makes_no_stage_smaller(stages: int, layers: int) -> None:
    """A deeper model moves one layer, not all of them."""
    before, after = even_cut(layers, stages), even_cut(layers + 1, stages)
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (stages - 1) + [1]


def test_the_rule_of_the_rest_is_as_documented() -> None:
    """docs/layouts.md says it in words: the middle, of two the later, then the first, never the last."""
    assert [list(even_cut(layers, 4)) for layers in range(4, 9)] == [
        [1, 1, 1, 1],
        [1, 1, 2, 1],
        [1, 2, 2, 1],
        [2, 2, 2, 1],
        [2, 2, 2, 2],
    ]
    assert list(even_cut(3, 2)) == [2, 1]


def test_a_stated_cut_is_taken_as_stated() -> None:
    """Whoever measured knows better."""
    layout = Layout(dp_replicate=1, dp_shard=1, pp=2, stage_layers=(3, 5))
    assert [layout.layers_of(stage, 8) for stage in range(2)] == [range(3), range(3, 8)]


# --- stages


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 5])
def test_every_stage_is_on_one_rank(schedule: str, pp: int) -> None:
    """A stage that two ranks hold, or none, is a model computed wrong."""
    layout = pipeline(schedule, pp)
    held = [list(layout.stages_of(rank)) for rank in range(pp)]
    assert sorted(itertools.chain(*held)) == list(range(layout.stages))
    assert all(stages == sorted(stages) for stages in held)


def test_stages_go_round_or_down_and_up() -> None:
    """As the schedules send: to the next rank and from the last to the first, or to a neighbour only."""
    assert [list(pipeline("interleaved_1f1b", 2, 3).stages_of(rank)) for rank in (0, 1)] == [
        [0, 2, 4],
        [1, 3, 5],
    ]
    assert [list(pipeline("zbv", 3).stages_of(rank)) for rank in (0, 1, 2)] == [[0, 5], [1, 4], [2, 3]]


def test_without_a_pipeline_there_is_one_stage_whatever_the_schedule() -> None:
    """`parallel.pp=1` on the command line must be enough to go without."""
    layout = pipeline("zbv", 1)
    assert (layout.stages, list(layout.stages_of(0)), layout.layers_of(0, 7)) == (1, [0], range(7))


# --- micro-batches


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_takes_the_micro_batches_that_torch_takes(schedule: str) -> None:
    """The rule stands here without torch; torch would say no an hour later, on every rank."""
    kind = SCHEDULES[schedule]  # type: ignore[index]
    for pp, stages in itertools.product((2, 3, 4), (1, 2, 3) if kind.any_stages else (0,)):
        layout = pipeline(schedule, pp, stages)
        for count in range(1, 14):
            try:
                order_of(layout, count)
            except ScheduleError:
                assert not schedule_takes(layout, count), f"{layout}, {count} micro-batches"
            else:
                assert schedule_takes(layout, count), f"{layout}, {count} micro-batches"


@given(
    schedule=st.sampled_from([*SCHEDULES]),
    pp=st.integers(1, 5),
    part=st.integers(1, 300),
)
def test_an_automatic_micro_batch_makes_a_pipeline_busy(schedule: str, pp: int, part: int) -> None:
    """The largest of which there are twice as many as stages, or else as many as can be; without a pipeline
    all at once.
    """
    layout = pipeline(schedule, pp)
    size = micro_size(layout, part)
    assert part % size == 0
    if pp == 1:
        assert size == part
        return
    counts = [count for count in divisors(part) if schedule_takes(layout, count)]
    wanted = [count for count in counts if count >= 2 * layout.stages]
    if counts:
        assert part // size == (wanted[0] if wanted else counts[-1])


@given(st.integers(1, 3000))
def test_divisors_are_all_there(number: int) -> None:
    """Layouts are enumerated by them."""
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


# --- texts


def test_a_layout_says_itself() -> None:
    """The text is in every event and summary, in words that can be typed back."""
    assert str(Layout(dp_replicate=2, dp_shard=3)) == "dp_replicate=2 dp_shard=3"
    layout = Layout(dp_replicate=1, dp_shard=2, cp=2, tp=4, pp=2, context="ulysses", stage_layers=(3, 1))
    assert str(layout) == (
        "dp_replicate=1 dp_shard=2 cp=2 context=ulysses tp=4 pp=2 pipeline_schedule=1f1b stage_layers=[3,1]"
    )
    assert layout.world_size == 32


def test_a_layout_error_survives_the_way_between_processes() -> None:
    """It may be raised on a worker."""
    error = LayoutError([("parallel.tp", "is 3"), ("batch.size", "is 1")])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems) == ("parallel.tp: is 3\nbatch.size: is 1", error.problems)
