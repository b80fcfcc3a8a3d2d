"""Machines that will be taken away, as the cloud or an operator tells Ray (`ray drain-node`)."""

from dataclasses import dataclass

import ray


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """A node that must be left, and the ranks that are there."""

    node: str  # its id
    ranks: tuple[int, ...]
    deadline_unix: float | None  # None where nobody said


def draining_nodes() -> dict[str, float | None]:
    """Ids of the nodes that are being drained, and when they will be gone (unix time)."""
    told: dict[str, int] = ray._private.state.state.get_draining_nodes()  # milliseconds; 0: nobody said
    return {node: at / 1000 or None for node, at in told.items()}
