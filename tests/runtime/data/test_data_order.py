"""The order of samples is a permutation found index by index, and a mixture is a function of the cursor."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.runtime.data.mixture import Mixture
from rayfold.runtime.data.order import EpochOrder, order_key, permute


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 1_000_003])
def test_every_index_is_hit_once(n: int) -> None:
    """A permutation that misses an index would lose a sample in every epoch."""
    found = permute(np.arange(n), n, order_key("seed", 1))
    assert np.array_equal(np.sort(found), np.arange(n))


@given(n=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_an_integer_and_an_array_agree(n: int, key: int, data: st.DataObject) -> None:
    """Both forms are used, and one sample must not have two places."""
    index = data.draw(st.integers(0, n - 1))
    one = permute(index, n, key)
    assert 0 <= one < n
    assert permute(np.array([index]), n, key)[0] == one


def test_keys_give_different_orders_that_look_random() -> None:
    """Neighbours should not stay neighbours, nor one epoch resemble the next."""
    n = 10_000
    first, second = (permute(np.arange(n), n, order_key(0, epoch)) for epoch in (0, 1))
    assert np.mean(first == second) < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 0.05


@pytest.mark.parametrize("shuffle", [True, False])
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    width=st.integers(1, 10),
    key=st.integers(0, 2**32),
)
def test_an_epoch_visits_every_sample_once(shuffle: bool, counts: list[int], width: int, key: int) -> None:
    """Whatever the sizes of the blocks, and however many are mixed."""
    order = EpochOrder(np.array(counts), key=key, shuffle=shuffle, shuffle_blocks=width)
    found = [order.locate(index) for index in range(sum(counts))]
    expected = [(block, i) for block, count in enumerate(counts) for i in range(count)]
    assert sorted(found) == expected
    if not shuffle:
        assert found == expected


def test_a_window_needs_no_more_blocks_than_it_says() -> None:
    """Memory is bounded by the blocks of a window, so samples may not stray."""
    counts = np.full(40, 7)
    order = EpochOrder(counts, key=5, shuffle=True, shuffle_blocks=4)
    for window in range(10):
        blocks = {order.locate(i)[0] for i in range(window * 28, window * 28 + 28)}
        assert len(blocks) == 4
        if window:
            assert set(order.blocks_after((window - 1) * 28)) == blocks


@given(weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), cursor=st.integers(0, 10**12))
def test_a_mixture_honours_its_weights_and_skips_nothing(weights: list[float], cursor: int) -> None:
    """Each source's own samples come in order without gaps, from any cursor on."""
    mixture = Mixture(weights)
    found = [mixture.locate(cursor + i) for i in range(2000)]
    for source, weight in enumerate(weights):
        local = [index for k, index in found if k == source]
        assert local == list(range(local[0], local[0] + len(local))) if local else True
        assert abs(len(local) / 2000 - weight / sum(weights)) < 0.01


def test_a_mixture_starts_every_source_at_its_first_sample() -> None:
    """Nothing of a source is passed over."""
    mixture = Mixture([0.7, 0.2, 0.1])
    found = [mixture.locate(i) for i in range(10)]
    assert Counter(source for source, _ in found) == {0: 7, 1: 2, 2: 1}
    assert [index for source, index in found if source == 0] == list(range(7))
