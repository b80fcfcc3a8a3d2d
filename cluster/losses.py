"""What befell the processes and the nodes of a run: as vaults have noticed it, as Ray tells, as it is silent.

Says what was lost as values; nothing here decides.
"""

import threading
import time
from collections.abc import Iterable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from ..faulttol.verdict import Failure
from .deaths import Deaths
from .fleet import Fleet, Member
from .vault import Vaults
from .watch import Notice

LOOK_EVERY_S = 0.05  # at a node while it is not clear whether it is lost
UNKNOWN = "its process ended without a Python error: killed from outside, or crashed in native code"
LOST = "its machine does not answer"
UNMANAGED = {
    "stopped": "Ray's own process on its machine was halted by a signal, so nothing can be started there",
    "died": "Ray's own process on its machine has died, and takes the others there along",
}
STOPPED = "its process was halted by a signal, as SIGSTOP does, and answers nobody"


class Losses:
    """Follows the processes of a run and ends those that are given up."""

    def __init__(self, vaults: Vaults, *, own_node: str, recovers: bool) -> None:
        """`recovers`: whether there are vaults, since the run goes on after a loss."""
        self.nodes: set[str] = set()  # those that are lost, by their short names
        self.emptied: set[str] = set()  # lost nodes whose ranks' state has not been made again
        self._vaults = vaults
        self._recovers = recovers
        self._own_node = own_node  # that of the controller, which cannot be lost without it
        self._deaths = Deaths(own_node)
        self._ranks: list[Failure] = []  # found while something else was asked
        self._notices: list[Notice] = []
        self._unmanaged: dict[str, str] = {}  # node -> what befell Ray's own process there
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._dead_spares: list[int] = []  # process ids of those that nobody was told of yet

    def follow(self, member: Member) -> None:
        """Watch its process from now on."""
        self._deaths.follow(member.place)
        if self._recovers:
            self._vaults.follow(member.place.node, member.place.pid)

    def drop(self, fleet: Fleet, member: Member) -> Any:
        """End its process, dead or alive; a reference to when it was last seen well, or None."""
        seen = self._vaults.kill(member.place.node, member.place.pid)
        fleet.drop(member)
        return seen

    def tell(self, notice: Notice) -> None:
        """Take in what a vault has seen; called by another thread."""
        with self._lock:
            self._notices.append(notice)
        self._news.set()

    def tell_unmanaged(self, node: str, what: str) -> None:
        """Take in that Ray's own process on a node was stopped or has died; called by another thread."""
        with self._lock:
            self._unmanaged[node] = what
        self._news.set()

    def listen(self, calls: Iterable[Any]) -> None:
        """Have `await_news` return when one of these calls of Ray's has ended, too."""
        for call in calls:
            call.future().add_done_callback(lambda _: self._news.set())

    def await_news(self, timeout_s: float) -> None:
        """Wait until something is told or has ended since this was called last."""
        self._news.wait(timeout_s)
        self._news.clear()

    def noticed_any(self, fleet: Fleet) -> bool:
        """Whether something was noticed of a rank that nobody has asked about yet."""
        ranks = {member.place.pid for member in fleet.members}
        with self._lock:
            return any(notice.pid in ranks for notice in self._notices)

    def noticed(self, fleet: Fleet, step: int) -> list[Failure]:
        """What was noticed of the ranks since the last call, and of nodes that went silent."""
        ranks = {member.place.pid: rank for rank, member in enumerate(fleet.members)}
        with self._lock:
            mine = [notice for notice in self._notices if notice.pid in ranks]
            self._notices = [notice for notice in self._notices if notice.pid not in ranks]
        failures, self._ranks = self._ranks, []
        for notice in mine:
            how = STOPPED if notice.what == "stopped" else self._deaths.how(notice.pid) or UNKNOWN
            failures.append(Failure(ranks[notice.pid], step, notice.what, how, notice.last_well_unix))
        for node in self._silent(fleet) if self._recovers else []:
            failures += self.lose(fleet, node, step)
        return failures + self._given_up(fleet, step)

    def dead_spares(self, fleet: Fleet) -> list[int]:
        """Process ids of the spares that have died since the last call."""
        self.drop_dead_spares(fleet)
        dead, self._dead_spares = self._dead_spares, []
        return dead

    def drop_dead_spares(self, fleet: Fleet) -> None:
        """Count on them no more."""
        ranks = {member.place.pid for member in fleet.members}
        with self._lock:
            others = {notice.pid for notice in self._notices if notice.pid not in ranks}
            self._notices = [notice for notice in self._notices if notice.pid in ranks]
        for spare in [one for one in fleet.spares() if one.place.pid in others]:
            self._dead_spares.append(spare.place.pid)
            self.drop(fleet, spare)

    def lose(self, fleet: Fleet, node: str, step: int, how: str = LOST) -> list[Failure]:
        """A node is gone, with all that was there; its ranks as failures."""
        self.nodes.add(short_name(node))
        self._vaults.lose(node)
        for spare in [one for one in fleet.spares() if one.place.node == node]:
            self.drop(fleet, spare)
        ranks = [rank for rank, member in enumerate(fleet.members) if member.place.node == node]
        if ranks:
            self.emptied.add(node)
        return [Failure(rank, step, "died", how, time.time()) for rank in ranks]

    def death(self, fleet: Fleet, rank: int, step: int, error: RayActorError | RayTaskError) -> Failure:
        """What `error`, which Ray has for an answer of a rank, says of its end."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            return Failure(rank, step, type(cause).__name__, str(cause), time.time(), traceback=str(error))
        place = fleet.members[rank].place
        if self._recovers and not self._outlives(fleet, place.node, step):
            return Failure(rank, step, "died", LOST, time.time(), traceback=str(error))
        with self._lock:  # a vault may have seen it as well, and earlier
            seen = [n.last_well_unix for n in self._notices if n.pid == place.pid]
            self._notices = [n for n in self._notices if n.pid != place.pid]
        how = self._deaths.how(place.pid) or _why(error)
        return Failure(rank, step, "died", how, min([time.time(), *seen]), traceback=str(error))

    def close(self) -> None:
        """Follow nobody any more."""
        self._deaths.close()

    def _given_up(self, fleet: Fleet, step: int) -> list[Failure]:
        """Nodes without Ray's own process, as lost ones; what there is left of the run is ended."""
        with self._lock:
            unmanaged, self._unmanaged = self._unmanaged, {}
        failures = []
        for node, what in unmanaged.items():
            if node != self._own_node and short_name(node) not in self.nodes:
                self._vaults.abandon(node)
                failures += self.lose(fleet, node, step, UNMANAGED[what])
        return failures

    def _silent(self, fleet: Fleet) -> list[str]:
        there: dict[str, list[Any]] = {}
        for member in (*fleet.members, *fleet.spares()):
            if member.actor is not None:
                there.setdefault(member.place.node, []).append(member.actor)
        return self._vaults.silent(time.monotonic(), there)

    def _outlives(self, fleet: Fleet, node: str, step: int) -> bool:
        """Whether somebody on a node answers, after a process of it has ended; waits until that is clear."""
        since = time.monotonic()
        while not self._vaults.heard_since(node, since):  # a lost one is not asked any more
            time.sleep(LOOK_EVERY_S)
            for lost in self._silent(fleet):
                self._ranks += self.lose(fleet, lost, step)
        return short_name(node) not in self.nodes


def short_name(node: str) -> str:
    """Enough of a node's id to tell it from others."""
    return node[:12]


def _why(error: RayActorError) -> str:
    """Why an actor's process ended, as far as Ray can tell."""
    text = str(error).lower()
    if "memory pressure" in text or "out_of_memory" in text:
        return "its process was killed by Ray, because its machine ran out of memory"
    if "node" in text and ("node has died" in text or "node died" in text or "node is dead" in text):
        return "its machine was lost"
    return UNKNOWN
