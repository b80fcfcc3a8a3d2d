"""From where every rank starts again: the newest step that all can reach, from the nearest place that has it.

Each rank of a new epoch offers what it found; one function, with the same offers on every rank, chooses for
all. Steps are never mixed: parameters of step 7 beside moments of step 8 are a state that no run ever had.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

SourceKind: TypeAlias = Literal["arena", "slot", "peer", "parity", "disk"]
Tier: TypeAlias = Literal["memory", "peer", "parity", "disk"]
Covers: TypeAlias = Callable[[str, frozenset[int]], bool]

KINDS: tuple[SourceKind, ...] = ("arena", "slot", "peer", "parity", "disk")  # the nearest first
TIERS: tuple[Tier, ...] = ("memory", "peer", "parity", "disk")
_TIER: dict[SourceKind, Tier] = {
    "arena": "memory",
    "slot": "memory",
    "peer": "peer",
    "parity": "parity",
    "disk": "disk",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place from which the state of a rank at a step can be had."""

    kind: SourceKind  # disk: a checkpoint, which is whole and which every layout can load
    step: int
    fingerprint: str  # of layout and model index; not looked at for disk
    where: str  # path or name, opaque here
    rank: int = -1  # whose image, under the layout of the fingerprint; -1: of the rank that offers it
    world_size: int = 0  # ranks of that layout; 0: not known
    epoch: int | None = None  # that wrote it; None: not known, then it counts whatever `began` says

    @property
    def tier(self) -> Tier:
        """How far away: arena and slot are memory, the others have their own names."""
        return _TIER[self.kind]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one rank of the new epoch can start from; torn and unreadable things are not offered."""

    rank: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where all start: one of `sources` each, or all read what they need in `images` of another layout."""

    step: int
    tier: Tier  # the farthest that is used: `source` of a `restored` event
    newest: int  # step that anybody had finished
    sources: Mapping[int, Source] = field(default_factory=dict)  # by rank
    images: tuple[Source, ...] = ()  # in the order of the ranks of their layout

    @property
    def load(self) -> bool:
        """Whether images of another layout are loaded, instead of each rank having its own."""
        return bool(self.images)

    @property
    def lost_steps(self) -> int:
        """Finished steps that have to be trained again."""
        return self.newest - self.step


def choose(
    offers: Sequence[Offer],
    *,
    fingerprint: str,
    newest: int = 0,
    began: Mapping[int, int] | None = None,
    covers: Covers | None = None,
) -> Choice | None:
    """The largest step that every rank can reach; None if there is none, and then training begins anew.

    At that step every rank takes its nearest source. `fingerprint` is that of the layout to be formed. Images
    of another are used together where they make up the whole state: `covers(fingerprint, ranks)` tells for a
    set of ranks of that layout, and by default all of them are needed.

    `newest` is a finished step known otherwise (metrics). `began`: epoch -> the step that it started from.
    What an older epoch wrote beyond such a start is of steps that were trained again since, so it does not
    count.
    Raises ValueError unless there is one offer of each rank.
    """
    _check_ranks(offers)
    current = [
        Offer(rank=offer.rank, sources=tuple(s for s in offer.sources if _counts(s, began or {})))
        for offer in offers
    ]
    steps = {source.step for offer in current for source in offer.sources}
    newest = max(steps | {newest})
    for step in sorted(steps, reverse=True):
        found = [*_own(current, step, fingerprint), *_together(current, step, fingerprint, covers)]
        if found:
            sources, images = min(found, key=lambda ways: _farthest([*ways[0].values(), *ways[1]]))
            tier = TIERS[_farthest([*sources.values(), *images])]
            return Choice(step=step, tier=tier, newest=newest, sources=sources, images=images)
    return None


_Way: TypeAlias = tuple[dict[int, Source], tuple[Source, ...]]


def _own(offers: Sequence[Offer], step: int, fingerprint: str) -> Iterator[_Way]:
    """Every rank has a source of its own at `step`."""
    chosen = {}
    for offer in offers:
        fitting = [
            s
            for s in offer.sources
            if s.step == step
            and (s.kind == "disk" or (s.fingerprint == fingerprint and s.rank in (-1, offer.rank)))
        ]
        if not fitting:
            return
        chosen[offer.rank] = min(fitting, key=_nearness)
    yield chosen, ()


def _together(offers: Sequence[Offer], step: int, fingerprint: str, covers: Covers | None) -> Iterator[_Way]:
    """Images of one other layout make up the whole state at `step`, with the nearest that suffice."""
    every = [
        s for offer in offers for s in offer.sources if s.step == step and s.kind != "disk" and s.rank >= 0
    ]
    layouts = sorted({(s.fingerprint, s.world_size) for s in every if s.fingerprint != fingerprint})
    for other, world_size in layouts:
        images = [s for s in every if (s.fingerprint, s.world_size) == (other, world_size)]
        for tier in range(len(TIERS)):
            near = sorted((s for s in images if _farthest([s]) <= tier), key=_nearness)
            by_rank: dict[int, Source] = {}
            for source in near:
                by_rank.setdefault(source.rank, source)
            ranks = frozenset(by_rank)
            if covers(other, ranks) if covers else ranks == frozenset(range(world_size)) and ranks:
                yield {}, tuple(by_rank[rank] for rank in sorted(by_rank))
                break


def _counts(source: Source, began: Mapping[int, int]) -> bool:
    """Whether an image is of the line of steps that the run now stands in."""
    if source.epoch is None:
        return True
    return all(source.step <= step for epoch, step in began.items() if epoch > source.epoch)


def _farthest(sources: Iterable[Source]) -> int:
    return max(TIERS.index(source.tier) for source in sources)


def _nearness(source: Source) -> tuple[int, str, tuple[int, ...]]:
    """Ties go by name, then by whatever differs, so that all ranks that choose choose alike."""
    epoch = -1 if source.epoch is None else source.epoch
    return KINDS.index(source.kind), source.where, (source.rank, source.world_size, epoch)


def _check_ranks(offers: Sequence[Offer]) -> None:
    """One offer a rank."""
    ranks = sorted(offer.rank for offer in offers)
    if ranks != list(range(len(ranks))) or not ranks:
        raise ValueError(
            f"offers of ranks {ranks}: a choice needs one of each rank from 0 on, of one that has nothing too"
        )
