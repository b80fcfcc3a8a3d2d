"""Which nodes are lost: nobody there answers, neither the vault nor a rank.

Ray finds out for itself, after 13 seconds where its own process on the node was killed and after a minute
where the node was cut off. Questions that nobody waits for find out sooner. A vault that is silent while
its ranks answer is stuck or stopped, and the run is not protected meanwhile: it is started again.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

# A process that only has to wait for its turn of a crowded processor answers within a few tenths of a second,
# and a vault and all ranks of a node at once do not all wait long.
SUSPECT_S = 0.5  # the vault is silent: its ranks are asked as well
BROKEN_S = 1.5  # nobody answers, and a connection broke: processes were killed there, not only kept waiting
SILENT_S = 5.0  # nobody answers, and nothing else is known: the load of a machine can pass for that
UNWATCHED_S = (
    0.5  # nobody looked for so long (the machine slept, or this process did): silence is no sign then
)
ASK_EVERY_S = 0.2
STUCK_S = 10.0  # the vault is silent and its ranks answer: no load of a machine holds up one so much longer
ANEW_S = 300.0  # for one that was killed to be there again: seconds, and minutes where the machine is crowded


class Pulse:
    """Asks the vaults of a run over and over, and the ranks of a node whose vault is silent.

    Who looks gives the time in seconds, on any clock that does not go back.
    """

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}  # node -> when somebody there answered, or nobody could be heard
        self._alive: dict[str, float] = {}  # node -> when the last question was asked that was answered
        self._broken: set[str] = set()  # nodes with a broken connection since then
        self._vault_until: dict[str, float] = {}  # node -> until then its vault need not answer
        self._asked: dict[Any, tuple[str, Any, float]] = {}  # reference -> node, who was asked and when
        self._next: dict[str, float] = {}  # node -> when its vault is asked again
        self._looked = 0.0

    def look(
        self, now: float, vaults: Mapping[str, Any], ranks: Mapping[str, Sequence[Any]]
    ) -> tuple[list[str], dict[str, set[int]]]:
        """Nodes that are lost, and what vaults have answered: the processes that they watch.

        `vaults`: the vault of each node that may be lost; `ranks`: workers by node, some of those nodes.
        """
        if now - self._looked > UNWATCHED_S:
            self._heard = dict.fromkeys(self._heard, now)
            self._vault_until = {n: max(until, now + STUCK_S) for n, until in self._vault_until.items()}
        self._looked = now
        watched = self._hear(now, vaults)
        lost = []
        for node, vault in vaults.items():
            silent_s = now - self._heard.setdefault(node, now)
            if now >= self._next.get(node, now):
                self._next[node] = now + ASK_EVERY_S
                self._ask(node, vault, "following", now)
            if silent_s > SUSPECT_S:
                for worker in ranks.get(node, ()):
                    self._ask(node, worker, "place", now)
            if silent_s > (BROKEN_S if node in self._broken else SILENT_S):
                lost.append(node)
            elif now > self._vault_until.setdefault(node, now + STUCK_S) and silent_s <= SUSPECT_S:
                self._vault_until[node] = now + ANEW_S
                logger.warning("node=%s its vault is silent and its ranks are not: it is started again", node)
                ray.kill(vault, no_restart=False)
        return lost, watched

    def in_doubt(self, nodes: Iterable[str]) -> bool:
        """Whether one of these may turn out to be lost."""
        return any(self._looked - self._heard.get(node, self._looked) > SUSPECT_S / 2 for node in nodes)

    def heard_since(self, node: str, since: float) -> bool:
        """Whether somebody there has answered what was asked after that time. An answer that is found after
        it may be of a node that was lost before.
        """
        return self._alive.get(node, since) > since

    def forget(self, node: str) -> None:
        """A node that is gone."""
        self._heard.pop(node, None)
        self._alive.pop(node, None)
        self._next.pop(node, None)
        self._vault_until.pop(node, None)
        self._broken.discard(node)
        self._asked = {ref: asked for ref, asked in self._asked.items() if asked[0] != node}

    def _ask(self, node: str, actor: Any, what: str, now: float) -> None:
        if not any(asked is actor for _, asked, _ in self._asked.values()):
            self._asked[getattr(actor, what).remote()] = node, actor, now

    def _hear(self, now: float, vaults: Mapping[str, Any]) -> dict[str, set[int]]:
        watched: dict[str, set[int]] = {}
        if not self._asked:
            return watched
        for ref in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0]:
            node, who, asked_at = self._asked.pop(ref)
            try:
                answer = ray.get(ref)
            except RayError:  # started again, or its node is gone: then Ray may also have nowhere to start it
                self._broken.add(node)
                if who is vaults.get(node):
                    self._vault_until[node] = now + ANEW_S
                continue
            self._heard[node] = now
            self._alive[node] = max(asked_at, self._alive.get(node, asked_at))
            self._broken.discard(node)
            if isinstance(answer, set):
                watched[node] = answer
                self._vault_until[node] = now + STUCK_S
        return watched
