"""The processes beside the ranks, kept in number, and the ranks whose own processes must leave."""

import time
from collections.abc import Collection

from ..faulttol.remedy import Spare
from .fleet import Fleet
from .losses import Losses, short_name
from .notice import Leaving, draining_nodes


class Reserve:
    """Spares of a fleet, and who was asked to leave."""

    def __init__(self, fleet: Fleet, losses: Losses, *, asked: Collection[str], drained: bool) -> None:
        """`asked`: names of the workers that were asked to leave, which others add to; `drained`: whether
        anybody takes nodes away, as nobody does with an embedded session.
        """
        self._fleet = fleet
        self._losses = losses
        self._asked = asked
        self._drained = drained
        self._draining: dict[str, float | None] = {}  # nodes that will be taken away, as last told

    @property
    def asked(self) -> list[int]:
        """Ranks whose processes were asked to leave, each by itself."""
        return [rank for rank, member in enumerate(self._fleet.members) if member.name in self._asked]

    def ready(self) -> list[Spare]:
        """Processes that could take a rank's place this instant."""
        self._losses.drop_dead_spares(self._fleet)
        for spare in list(self._fleet.spares()):
            if spare.name in self._asked or spare.place.node in self._draining:
                self._losses.drop(self._fleet, spare)
        return [Spare(spare.id, short_name(spare.place.node)) for spare in self._fleet.spares()]

    def pids(self) -> dict[str, int]:
        """Process id of each spare."""
        return {spare.id: spare.place.pid for spare in self._fleet.spares()}

    def is_short(self, missing: int) -> bool:
        """Whether fewer spares are ready than there should be, for ranks that are `missing` too."""
        return len(self._fleet.spares()) < self._fleet.spares_wanted + missing

    def keep_up(self, missing: int) -> list[int]:
        """Replace spares that were used or have died, and follow new ones; process ids of the dead. There are
        to be as many more as would make up for `missing` ranks.
        """
        for spare in self._fleet.spares():
            self._losses.follow(spare)
        dead = self._losses.dead_spares(self._fleet)
        few = max(0, self._fleet.spares_wanted + missing - self._fleet.spares_in_all)
        self._fleet.add_spares(few, avoid=self._draining, in_background=True)
        return dead

    def start_anew(self, count: int, *, timeout_s: float) -> list[Spare]:
        """New processes for `count` ranks, when none is left and no spare: their state is in memory still.
        With those that are there when the time is over the run may go on.
        """
        self._fleet.add_spares(count - self._fleet.spares_in_all, avoid=self._draining)
        self._fleet.await_spares(time.monotonic() + timeout_s, given_up=lambda: False)
        return self.ready()

    def leaving(self) -> Leaving | None:
        """A node that will be taken away and has ranks, if Ray knows of one, or ranks that were asked to
        leave; spares to which that happens are ended.
        """
        if self._drained:
            self._draining = draining_nodes()
        self.ready()
        for node, deadline_unix in self._draining.items():
            ranks = [rank for rank, member in enumerate(self._fleet.members) if member.place.node == node]
            if ranks:
                return Leaving(node=node, ranks=tuple(ranks), deadline_unix=deadline_unix)
        return Leaving(node="", ranks=tuple(asked), deadline_unix=None) if (asked := self.asked) else None
