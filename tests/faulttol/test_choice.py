"""From where to start again: one step for all, the newest there is, from the nearest place.

A table of cases that happen, then properties against trying everything.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol.choice import KINDS, TIERS, Choice, Offer, Source, SourceKind, choose


def src(kind: SourceKind, step: int, **more: object) -> Source:
    given = {"fingerprint": "now", "where": f"{kind}-{step}"} | more
    return Source(kind=kind, step=step, **given)  # type: ignore[arg-type]


def offers(*sources: list[Source]) -> list[Offer]:
    return [Offer(rank=rank, sources=tuple(some)) for rank, some in enumerate(sources)]


def chosen(*sources: list[Source], **more: object) -> Choice:
    found = choose(offers(*sources), fingerprint="now", **more)  # type: ignore[arg-type]
    assert found is not None
    return found


def kinds(choice: Choice) -> list[str]:
    return [choice.sources[rank].kind for rank in sorted(choice.sources)]


ARENA, SLOTS = src("arena", 8), [src("slot", 8), src("slot", 7)]


@pytest.mark.parametrize(
    ("found", "step", "kinds_chosen", "tier", "lost"),
    [
        ([[ARENA, *SLOTS], [ARENA, *SLOTS]], 8, ["arena", "arena"], "memory", 0),
        # killed inside the update: its arena is torn, its slot of the step before is not
        ([[src("arena", 9), *SLOTS], SLOTS], 8, ["slot", "slot"], "memory", 1),
        # killed while it copied: the slot of 8 was never sealed
        ([[ARENA, *SLOTS], [src("slot", 7), src("slot", 6)]], 7, ["slot", "slot"], "memory", 1),
        # a node is gone: its rank comes from a peer, or from parity, while the others keep their arenas
        ([[ARENA], [src("peer", 8), src("parity", 8), src("disk", 4)]], 8, ["arena", "peer"], "peer", 0),
        ([[ARENA, *SLOTS], [src("parity", 7)]], 7, ["slot", "parity"], "parity", 1),
        # nothing common in memory: all from the checkpoint, not some
        ([[ARENA, src("disk", 4)], [src("disk", 4)]], 4, ["disk", "disk"], "disk", 4),
        ([[ARENA, src("disk", 8)], [src("disk", 8)]], 8, ["arena", "disk"], "disk", 0),
        ([[src("slot", 8), ARENA]], 8, ["arena"], "memory", 0),
    ],
)
def test_all_ranks_start_at_the_newest_common_step(
    found: list[list[Source]], step: int, kinds_chosen: list[str], tier: str, lost: int
) -> None:
    """What happens after a kill at each moment of a step."""
    choice = chosen(*found)
    assert (choice.step, kinds(choice), choice.tier, choice.lost_steps) == (step, kinds_chosen, tier, lost)
    assert not choice.load


def test_nothing_common_is_no_choice() -> None:
    """Training begins anew; a mixture would be a state that no run ever had."""
    assert choose(offers([src("arena", 8)], [src("arena", 9)]), fingerprint="now") is None
    assert choose(offers([src("arena", 8)], []), fingerprint="now") is None


def test_metrics_of_a_lost_step_count_as_lost() -> None:
    """The step that every rank forgot was still finished once: hiding it would flatter the figure."""
    assert chosen([ARENA], newest=10).lost_steps == 2


def old(kind: SourceKind, step: int, rank: int, world_size: int = 3, fingerprint: str = "old") -> Source:
    return src(kind, step, rank=rank, world_size=world_size, fingerprint=fingerprint, where=f"{kind}-{rank}")


def test_fewer_ranks_load_the_images_of_all() -> None:
    """After shrinking from 3 to 2 each new rank needs pieces of several old ones, the lost rank's too."""
    choice = chosen([old("arena", 8, 0)], [old("slot", 8, 1), old("parity", 8, 2), old("peer", 8, 2)])
    assert choice.load
    assert [(s.rank, s.kind) for s in choice.images] == [(0, "arena"), (1, "slot"), (2, "peer")]
    assert (choice.step, choice.tier, choice.sources) == (8, "peer", {})


def test_images_that_leave_a_gap_are_not_loaded() -> None:
    """Rank 2's pieces of step 8 are nowhere: the checkpoint of step 5 is the newest whole state."""
    gap = [[old("arena", 8, 0), src("disk", 5)], [old("arena", 8, 1), src("disk", 5)]]
    assert (chosen(*gap).step, kinds(chosen(*gap))) == (5, ["disk", "disk"])


def test_a_copy_of_the_model_can_fill_the_gap() -> None:
    """With dp_replicate > 1 fewer images than ranks hold everything, and only the caller knows which."""

    def covers(fingerprint: str, ranks: frozenset[int]) -> bool:
        assert fingerprint == "old"
        return {0, 1} <= ranks

    choice = chosen([old("arena", 8, 0)], [old("arena", 8, 1), old("parity", 8, 2)], covers=covers)
    assert [s.rank for s in choice.images] == [0, 1], "nothing is decoded that is not needed"


def test_memory_of_another_layout_comes_before_disk() -> None:
    """At the same step the nearer place wins, though the checkpoint needs no reshaping by us."""
    choice = chosen([old("arena", 8, 0, 1), src("disk", 8)], [src("disk", 8)])
    assert (choice.load, choice.tier) == (True, "memory")


def test_an_image_of_nobody_known_does_not_stand_in_the_way() -> None:
    """A file that does not say whose it is belongs to its finder, and to no other layout."""
    nobody = old("arena", 8, -1, 1)
    assert [s.rank for s in chosen([nobody, old("slot", 8, 0, 1)]).images] == [0]
    assert choose(offers([nobody]), fingerprint="now") is None


def test_two_old_layouts_are_not_mixed() -> None:
    """Images of two different shrinks do not fit together, even at the same step."""
    assert choose(offers([old("arena", 8, 0, 2, "a"), old("arena", 8, 1, 2, "b")]), fingerprint="now") is None


def test_an_image_of_another_rank_is_no_rank_s_own() -> None:
    """A rank may offer all files of its node; it must not start from its neighbour's."""
    mine, other = old("slot", 8, 0, fingerprint="now"), old("slot", 9, 1, fingerprint="now")
    assert chosen([mine, other]).step == 8


def test_steps_that_were_trained_again_since_do_not_count() -> None:
    """Epoch 2 went on from step 5: what epoch 1 left of step 8 is of another line, whatever its number."""
    stale, fresh = src("slot", 8, epoch=1), src("slot", 7, epoch=2)
    shared = src("slot", 5, epoch=1)
    choice = chosen([stale, fresh, shared], [stale, shared], began={1: 0, 2: 5})
    assert (choice.step, choice.newest) == (5, 7)
    assert choose(offers([stale]), fingerprint="now", began={2: 8}) is not None


@pytest.mark.parametrize("ranks", [[0, 0], [1, 2], []])
def test_offers_of_the_wrong_ranks_are_refused(ranks: list[int]) -> None:
    """A rank left out would be left behind at another step."""
    with pytest.raises(ValueError, match="one of each rank"):
        choose([Offer(rank=rank, sources=()) for rank in ranks], fingerprint="now")


sources = st.builds(
    Source,
    kind=st.sampled_from(KINDS),
    step=st.integers(1, 4),
    fingerprint=st.sampled_from(["now", "old"]),
    where=st.sampled_from(["a", "b"]),
    rank=st.integers(-1, 2),
    world_size=st.integers(1, 3),
    epoch=st.none() | st.integers(1, 3),
)
everything = st.lists(
    st.lists(sources.filter(lambda s: s.rank < s.world_size), max_size=4), min_size=1, max_size=3
)


@settings(max_examples=400, deadline=None)
@given(everything, st.dictionaries(st.integers(1, 3), st.integers(0, 4)))
def test_the_choice_is_the_best_of_all_ways(found: list[list[Source]], began: dict[int, int]) -> None:
    """Against trying every combination of sources and every set of images."""
    choice = choose(offers(*found), fingerprint="now", began=began)
    ways = list(all_ways(found, began))
    if not ways:
        assert choice is None
        return
    step, far = max((step, -far) for step, far in ways)
    assert choice is not None
    assert (choice.step, TIERS.index(choice.tier)) == (step, -far)
    used = [*choice.sources.values(), *choice.images]
    assert {s.step for s in used} == {choice.step}
    assert bool(choice.images) != (sorted(choice.sources) == list(range(len(found))))


@settings(max_examples=100, deadline=None)
@given(everything, st.randoms(use_true_random=False))
def test_every_rank_comes_to_the_same_choice(found: list[list[Source]], rng: object) -> None:
    """Each computes it for itself: the order in which offers and files were found must not matter."""
    turned = [rng.sample(some, len(some)) for some in found]  # type: ignore[attr-defined]
    assert choose(offers(*turned), fingerprint="now") == choose(offers(*found), fingerprint="now")


def all_ways(found: list[list[Source]], began: dict[int, int]) -> list[tuple[int, int]]:
    """(step, farthest tier) of every way there is to start again."""

    def valid(source: Source) -> bool:
        starts = [step for epoch, step in began.items() if epoch > (source.epoch or 99)]
        return all(source.step <= step for step in starts)

    some = [[s for s in of_rank if valid(s)] for of_rank in found]
    ways = []
    for way in itertools.product(*some):
        own = all(
            s.kind == "disk" or (s.fingerprint == "now" and s.rank in (-1, r)) for r, s in enumerate(way)
        )
        if own and len({s.step for s in way}) == 1:
            ways.append((way[0].step, max(TIERS.index(s.tier) for s in way)))
    images = [s for of_rank in some for s in of_rank if s.fingerprint == "old" and s.kind != "disk"]
    for count in (1, 2, 3):
        for way in itertools.permutations(images, count):
            whole = [(s.rank, s.world_size) for s in way] == [(rank, count) for rank in range(count)]
            if whole and len({s.step for s in way}) == 1:
                ways.append((way[0].step, max(TIERS.index(s.tier) for s in way)))
    return ways
