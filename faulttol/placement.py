"""Who protects whom: groups of nodes that hold redundancy for one another, and how likely that is enough.

One node alone has nobody; two hold copies of each other; three to five lose one node; from six on,
groups of about eight lose any two. Such groups need a third more memory than the state, and outlive more than
copies at twice the memory do. A node's image is cut into blocks and the parity goes round (RAIM5 of
the REFT paper), so that every member holds, sends and computes the same.

Zones are failure domains (a rack, a host of several containers): each zone is dealt out over the groups, so
no group has more of a zone than it must. `weak_zones` tells where that was not enough.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import Literal, TypeAlias

Scheme: TypeAlias = Literal["none", "replica", "xor", "pq"]

PARITIES: dict[Scheme, int] = {"none": 0, "replica": 1, "xor": 1, "pq": 2}
PQ_FROM, XOR_FROM = 6, 3  # nodes
GROUP_SIZE = 8  # nodes of a pq group, about: 6 to 11 as the number divides


class PlacementError(ValueError):
    """Nodes that cannot be told apart, or a number that cannot be."""


@dataclass(frozen=True, order=True)
class Node:
    """A node, and the failure domain it lies in; without a label it is a domain of its own."""

    id: str
    zone: str = ""

    @property
    def domain(self) -> tuple[str, str]:
        """What fails with the node; a zone is never mistaken for a node of the same name."""
        return ("zone", self.zone) if self.zone else ("node", self.id)


@dataclass(frozen=True)
class Stripe:
    """Blocks that are coded together, each on another member."""

    data: tuple[tuple[str, int], ...]  # (node id, number of its block), in the order of coding
    parity: tuple[str, ...]  # ids of the nodes that hold P, or P and Q


@dataclass(frozen=True)
class Group:
    """Nodes that protect one another."""

    scheme: Scheme
    members: tuple[Node, ...]

    @property
    def parities(self) -> int:
        """Number of members that may be lost together: 0, 1 or 2."""
        return PARITIES[self.scheme]

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the members."""
        return tuple(node.id for node in self.members)

    @property
    def blocks(self) -> int:
        """Number of blocks that a member's image is cut into; 0 where nothing is coded."""
        return len(self.members) - self.parities if self.parities else 0

    def stripes(self) -> tuple[Stripe, ...]:
        """One stripe a member, none under "none".

        A member is in every stripe once, with one of its blocks or with a parity: losing it costs a stripe
        one block. Of a pair, each stripe is one whole image and its copy.
        """
        size, made = len(self.members), []
        if not self.parities:
            return ()
        for first in range(size):
            holders = [(first + i) % size for i in range(self.parities)]
            # a member's blocks are counted from the stripe behind the one that it holds P of
            data = [(self.ids[m], (first - m) % size - 1) for m in range(size) if m not in holders]
            made.append(Stripe(tuple(data), tuple(self.ids[m] for m in holders)))
        return tuple(made)


def protection_for(nodes: Sequence[Node]) -> list[Group]:
    """Groups for these nodes, the same whatever their order. Raises PlacementError for a node given twice."""
    name, times = Counter(sorted(node.id for node in nodes)).most_common(1)[0] if nodes else ("", 0)
    if times > 1:
        raise PlacementError(f"node {name} is given {times} times; it cannot protect itself, give it once")
    if not nodes:
        return []
    count = max(1, (len(nodes) + GROUP_SIZE // 2) // GROUP_SIZE) if len(nodes) >= PQ_FROM else 1
    # Dealt like cards with the zones one after the other: each group gets an equal part of each zone, give or
    # take one, and groups differ by one member at most.
    dealt = sorted(nodes, key=lambda node: (node.domain, node.id))
    return [_group(dealt[first::count]) for first in range(count)]


def _group(members: Sequence[Node]) -> Group:
    size = len(members)
    scheme: Scheme = "pq" if size >= PQ_FROM else "xor" if size >= XOR_FROM else "replica"
    return Group("none" if size == 1 else scheme, tuple(sorted(members)))


def block_ranges(nbytes: int, count: int, *, align: int) -> list[tuple[int, int]]:
    """Cut `nbytes` into `count` ranges (start, length), each beginning at a multiple of `align` (as checksums
    of chunks do); the last ones may be short or empty.
    """
    if nbytes < 0 or count < 1 or align < 1:
        raise PlacementError(f"{nbytes} bytes in {count} blocks aligned to {align}: need >= 0, >= 1 and >= 1")
    size = -(-nbytes // (count * align)) * align
    starts = [min(i * size, nbytes) for i in range(count + 1)]
    return [(start, stop - start) for start, stop in itertools.pairwise(starts)]


def memory_factor(group: Group) -> float:
    """Memory for one image with the redundancy held for others, over that for the image alone."""
    size = len(group.members)
    return size / (size - group.parities)


def survives(group: Group, lost: Collection[str]) -> bool:
    """Whether all images of the group can be had after these nodes are lost. Others do not count."""
    return len(set(lost) & set(group.ids)) <= group.parities


def weak_zones(group: Group) -> tuple[str, ...]:
    """Zones whose loss as a whole the group would not survive."""
    counts = Counter(node.zone for node in group.members if node.zone)
    return tuple(sorted(zone for zone, count in counts.items() if count > group.parities))


def recoverable(groups: Sequence[Group], losses: int) -> Fraction:
    """Exact probability that all images can be had after `losses` random nodes are lost together.

    Of the sets of k nodes, those that leave every group whole are counted by the coefficient of x^k in the
    product over groups of sum_{i <= parities} C(size, i) x^i.
    """
    total = sum(len(group.members) for group in groups)
    if not 0 <= losses <= total:
        raise PlacementError(f"{losses} losses among {total} nodes; there can be 0 to {total}")
    good = [1] + [0] * losses
    for group in groups:
        ways = [comb(len(group.members), i) for i in range(group.parities + 1)]
        good = [
            sum(ways[i] * good[k - i] for i in range(min(k, group.parities) + 1)) for k in range(losses + 1)
        ]
    return Fraction(good[losses], comb(total, losses))
