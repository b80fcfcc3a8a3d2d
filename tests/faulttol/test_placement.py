"""Placement: which nodes protect each other, and how likely that is enough.

Properties of the groups against all nodes and zones; probabilities against counting every loss.
"""

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol.erasure import encode, manifest_of, rebuild
from rayfold.faulttol.placement import (
    Group,
    Node,
    PlacementError,
    Scheme,
    block_ranges,
    memory_factor,
    protection_for,
    recoverable,
    survives,
    weak_zones,
)


def nodes(count: int, zones: int = 0) -> list[Node]:
    return [Node(f"n{i:03}", f"zone{i % zones}" if zones else "") for i in range(count)]


def group(scheme: Scheme, size: int) -> Group:
    return Group(scheme, tuple(nodes(size)))


@pytest.mark.parametrize(
    ("count", "schemes"),
    [
        (0, []),
        (1, ["none"]),
        (2, ["replica"]),
        (3, ["xor"]),
        (5, ["xor"]),
        (6, ["pq"]),
        (11, ["pq"]),
        (12, ["pq", "pq"]),
        (16, ["pq", "pq"]),
        (128, ["pq"] * 16),
    ],
)
def test_the_scheme_follows_from_the_number_of_nodes(count: int, schemes: list[str]) -> None:
    """One: nobody to ask; two: copies; three to five lose one; from six on, two."""
    assert [g.scheme for g in protection_for(nodes(count))] == schemes


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=40), st.randoms())
def test_every_node_is_in_one_group_whatever_the_order(zones: list[str], rng: random.Random) -> None:
    """All ranks and a restarted controller must come to the same groups without asking each other."""
    members = [Node(f"n{i}", zone) for i, zone in enumerate(zones)]
    groups = protection_for(members)
    assert sorted(m for g in groups for m in g.members) == sorted(members)
    rng.shuffle(members)
    assert protection_for(members) == groups
    if len(members) >= 6:
        assert all(6 <= len(g.members) <= 11 for g in groups)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=6, max_size=48))
def test_no_group_has_more_of_a_zone_than_it_must(zones: list[str]) -> None:
    """A rack that goes dark then costs every group the fewest members there can be."""
    groups = protection_for([Node(f"n{i}", zone) for i, zone in enumerate(zones)])
    for zone in set(zones):
        parts = [sum(m.zone == zone for m in g.members) for g in groups]
        assert max(parts) == -(-zones.count(zone) // len(groups))


def test_sixteen_nodes_in_eight_racks_outlive_any_rack() -> None:
    """Two groups of eight, one member of each rack: a rack is one loss of two that are allowed."""
    groups = protection_for(nodes(16, zones=8))
    assert all(len({m.zone for m in g.members}) == 8 and weak_zones(g) == () for g in groups)


def test_too_few_zones_are_told() -> None:
    """With two racks a group of six has three in one: better known before than after."""
    (only,) = protection_for(nodes(6, zones=2))
    assert weak_zones(only) == ("zone0", "zone1")
    assert weak_zones(protection_for(nodes(6, zones=3))[0]) == (), "two of a zone are what P and Q outlive"
    assert weak_zones(protection_for(nodes(4, zones=3))[0]) == ("zone0",)


@pytest.mark.parametrize(("scheme", "size"), [("replica", 2), ("xor", 3), ("xor", 5), ("pq", 6), ("pq", 8)])
def test_stripes_outlive_every_loss_that_the_group_promises(scheme: Scheme, size: int) -> None:
    """Places and code together: images of all members from what any survivors hold, to the bit."""
    whole = group(scheme, size)
    images = {m: random.Random(m).randbytes(700 + 13 * i) for i, m in enumerate(whole.ids)}
    cut = {
        (m, b): image[start : start + length]
        for m, image in images.items()
        for b, (start, length) in enumerate(block_ranges(len(image), whole.blocks, align=64))
    }
    stripes = whole.stripes()
    placed = [place for stripe in stripes for place in stripe.data]
    assert sorted(placed) == sorted(cut), "each block is in one stripe"
    for count in range(whole.parities + 1):
        for lost in itertools.combinations(whole.ids, count):
            assert survives(whole, lost)
            got = {place: block for place, block in cut.items() if place[0] not in lost}
            for stripe in stripes:
                data = [cut[place] for place in stripe.data]
                parity = encode(data, whole.parities)  # type: ignore[arg-type]
                holders = [place[0] for place in stripe.data] + list(stripe.parity)
                assert len(set(holders)) == size, "a member is in a stripe once"
                blocks = dict(enumerate([*data, *parity]))
                present = {i: b for i, b in blocks.items() if holders[i] not in lost}
                for i, block in rebuild(present, manifest_of(data, parity)).items():
                    got[stripe.data[i]] = block.tobytes()
            assert got == cut
    assert not survives(whole, whole.ids[: whole.parities + 1])


def test_every_member_holds_as_much_parity_as_the_others() -> None:
    """A fixed parity node would be the one whose network is always full."""
    for whole in (group("xor", 4), group("pq", 7)):
        held = [holder for stripe in whole.stripes() for holder in stripe.parity]
        assert all(held.count(m) == whole.parities for m in whole.ids)


@pytest.mark.parametrize(
    ("scheme", "size", "total", "losses", "expected", "factor"),
    [
        ("replica", 2, 16, 2, 0.9333, 2.0),
        ("replica", 2, 16, 3, 0.800, 2.0),
        ("replica", 2, 16, 4, 0.615, 2.0),
        ("replica", 2, 128, 4, 0.953, 2.0),
        ("xor", 4, 16, 2, 0.800, 4 / 3),
        ("xor", 8, 16, 2, 0.533, 8 / 7),
        ("pq", 4, 16, 3, 0.971, 2.0),
        ("pq", 8, 16, 2, 1.000, 4 / 3),
        ("pq", 8, 16, 3, 0.800, 4 / 3),
        ("pq", 8, 128, 3, 0.997, 4 / 3),
    ],
)
def test_probabilities_are_the_measured_ones(
    scheme: Scheme, size: int, total: int, losses: int, expected: float, factor: float
) -> None:
    """Two parities in groups of eight beat copies at two thirds of their memory: the reason for the rule."""
    groups = [group(scheme, size)] * (total // size)
    assert float(recoverable(groups, losses)) == pytest.approx(expected, abs=6e-4)
    assert memory_factor(groups[0]) == pytest.approx(factor)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 13])
@pytest.mark.parametrize("losses", [0, 1, 2, 3, 5])
def test_probabilities_count_every_loss(count: int, losses: int) -> None:
    """Against brute force, unequal groups too."""
    groups = protection_for(nodes(count))
    ids = [m for g in groups for m in g.ids]
    if losses > count:
        with pytest.raises(PlacementError, match=f"{losses} losses among {count} nodes"):
            recoverable(groups, losses)
        return
    all_losses = list(itertools.combinations(ids, losses))
    good = sum(all(survives(g, lost) for g in groups) for lost in all_losses)
    assert recoverable(groups, losses) == Fraction(good, len(all_losses))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 512))
def test_blocks_cover_an_image_and_begin_at_chunks(nbytes: int, count: int, align: int) -> None:
    """Nothing twice, nothing left out, and a chunk's checksum never spans two blocks."""
    ranges = block_ranges(nbytes, count, align=align)
    assert len(ranges) == count
    assert sum(length for _, length in ranges) == nbytes
    at = 0
    for start, length in ranges:
        assert start == at
        assert length == 0 or start % align == 0
        at += length
    assert max(length for _, length in ranges) < nbytes / count + align


def test_a_node_given_twice_is_refused() -> None:
    """It would hold the parity of its own blocks."""
    with pytest.raises(PlacementError, match="node b is given 2 times"):
        protection_for([Node("a"), Node("b"), Node("b", "z")])
