"""Layouts: sizes that multiply to the ranks, or a message with sizes that do."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.parallel.layout import LayoutError, ParallelConfig, make_layout

SIZES = st.integers(1, 64)


@given(replicate=SIZES, shard=st.one_of(st.just(-1), SIZES), world_size=st.integers(1, 512))
def test_a_layout_fills_the_ranks_or_its_remedy_does(replicate: int, shard: int, world_size: int) -> None:
    """Every rank has exactly one place; where that cannot be, what the message says to type works."""
    config = ParallelConfig(dp_replicate=replicate, dp_shard=shard)
    try:
        layout = make_layout(config, world_size=world_size)
    except LayoutError as error:
        values = dict(re.findall(r"(run\.workers|parallel\.dp_replicate)=(\d+)", str(error)))
        assert len(values) == 1
        remedy = ParallelConfig(
            dp_replicate=int(values.get("parallel.dp_replicate", replicate)), dp_shard=shard
        )
        layout = make_layout(remedy, world_size=int(values.get("run.workers", world_size)))
        assert layout.world_size == int(values.get("run.workers", world_size))
        return
    assert layout.world_size == world_size == layout.dp_size
    assert layout.dp_replicate == replicate
    assert shard in (-1, layout.dp_shard)


@given(replicate=SIZES, world_size=st.integers(1, 256))
def test_the_nearest_divisor_is_named(replicate: int, world_size: int) -> None:
    """No other number of copies that fits is closer to the one asked for."""
    if world_size % replicate == 0:
        return
    with pytest.raises(LayoutError) as raised:
        make_layout(ParallelConfig(dp_replicate=replicate), world_size=world_size)
    found = re.search(r"set parallel\.dp_replicate=(\d+)", str(raised.value))
    assert found is not None
    nearest = min(abs(d - replicate) for d in range(1, world_size + 1) if world_size % d == 0)
    assert abs(int(found[1]) - replicate) == nearest


def test_a_layout_says_itself() -> None:
    """The text is in every event and summary."""
    assert str(make_layout(ParallelConfig(dp_replicate=2), world_size=6)) == "dp_replicate=2 dp_shard=3"
