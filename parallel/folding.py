"""Where each rank stands on each axis: pure arithmetic on rank numbers, no torch.

A view gives the sizes of some axes, outermost first, whose product is the world. Several views can fold the
same ranks: the dense one below, later one for experts. Two views that begin with the same axis agree on it.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .layout import AXES, Layout

View = Mapping[str, int]


def dense_view(layout: Layout) -> View:
    """The axes of dense layers. tp changes fastest: its ranks talk in every block and should be neighbours,
    those of a pipeline talk least and may be far apart.
    """
    return {axis: getattr(layout, axis) for axis in AXES}


def groups(view: View, axes: Collection[str], topology: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The sets of ranks that differ in `axes` alone; each rank is in one, in the order of the view.

    `topology` says which rank stands at each place of the view (a permutation); without it rank = place.
    """
    places = _places(view, topology)
    names = list(view)
    moving = [names.index(axis) for axis in names if axis in axes]
    fixed = [at for at in range(len(names)) if at not in moving]
    size = math.prod(places.shape[at] for at in moving)
    rows = places.transpose(*fixed, *moving).reshape(-1, size)
    return [tuple(int(rank) for rank in row) for row in rows]


def coordinate(view: View, rank: int, topology: Sequence[int] | None = None) -> dict[str, int]:
    """Where `rank` stands on each axis of `view`."""
    found = np.argwhere(_places(view, topology) == rank)[0]
    return {axis: int(at) for axis, at in zip(view, found, strict=True)}


def _places(view: View, topology: Sequence[int] | None) -> np.ndarray:
    world_size = math.prod(view.values())
    ranks = list(range(world_size)) if topology is None else list(topology)
    assert sorted(ranks) == list(range(world_size)), f"topology {ranks} names each of {world_size} ranks once"
    return np.array(ranks).reshape(tuple(view.values()))
