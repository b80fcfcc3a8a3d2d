"""Rounds of protection: the state of every node is kept by other nodes too, step after step.

A round goes on beside training, from a thread of the controller's process. All vaults have their ranks keep
one step of the near future; when it is there, each vault pulls the parities that it holds for others; when
all have theirs and the step is still whole everywhere, it is *node-safe*: a node that is lost from then on is
made up for from memory, at that step. Only then what protected the step before is let go.

One round at a time, and a pause after each, so that copying takes a small part of the time. What a lost node
held is made again before the ranks form anew (`make_again`), whatever round was under way.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray

from ..faulttol.listing import Listed
from ..faulttol.placement import Group, protection_for
from ..faulttol.protection import NotProtected, Parity, Recipe, Stored, orders, recipes
from .rounds import ANSWER_S, Epoch, NoAnswer, RoundFailed, Rounds, answer_of
from .vault import Vaults

logger = logging.getLogger(__name__)

DUTY = 0.2  # part of the time that rounds may take: two passes of checksums at full speed take a core
PAUSE_S = 0.25  # at least: a round of a small state is a few dozen short calls, and they all wake somebody
REACHED_S = 1.0  # a vault looks so long for an awaited step before it is asked again
SLOTS_FOR_ONE = 3  # copies of a rank that suffice for rounds of one kind at a time
STORED_S = 5.0  # for a look at what lies on a node, while the run waits
ROUND_S = 900.0  # for pulling what a node stores of others: 100 GB over a network of 1 Gbit/s
MAKE_AGAIN_S = 300.0  # the run waits for this one; a checkpoint is read sooner
MOST_AHEAD = 64  # steps: a round that finds its step overwritten awaits a later one, at most so much later
FAILURES_TOLD = 3  # rounds that fail in a row before it is told: one is an accident


class Protector(Rounds):
    """Protects the state of a run on several nodes. Its methods are called by the controller's threads."""

    def __init__(self, vaults: Vaults, turns: threading.Lock) -> None:
        """`turns`: held by whoever pins steps; ranks have no slots for more than one of them."""
        self.safe_step = -1  # the newest that outlives the loss of a node; -1: none yet
        self._turns = turns
        self._ahead, self._failures = 1, 0
        self._worked_s = 0.0  # of the last round, without its wait for a step
        self._turn: int | None = None  # of the names that parities get; None: not known which are free
        self._released = 0  # the last epoch in which what was kept for others was let go
        self._level: bool | None = None  # whether the run was last said to be protected
        self._news: list[dict[str, Any]] = []
        super().__init__(vaults, name="protect")

    def begin(self, epoch: int, homes: Sequence[str]) -> None:
        """Protect what the ranks of `epoch` commit; `homes` is the node of each."""
        with self._changed:
            self._failures, self._ahead = 0, 1
        super().begin(epoch, homes)

    def pause(self) -> None:
        """No rounds until `begin`; one that is under way ends soon, and comes to nothing."""
        super().pause()
        for actor in self._vaults.actors().values():
            actor.give_up.remote()

    def take_news(self) -> list[dict[str, Any]]:
        """Changes of the level since the last call, as fields of events."""
        with self._changed:
            news, self._news = self._news, []
        return news

    def make_again(self, lost: Mapping[str, str]) -> None:
        """Make the state of lost nodes, by name, on the node that is named for each. What came of it is news:
        where it cannot be made, ranks start from what else there is.
        """
        self.pause()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, ANSWER_S)
        names = f"{', '.join(sorted(lost))} {'is' if len(lost) == 1 else 'are'} lost"
        try:
            told = "; ".join(self._make_again(lost))
        except (NoAnswer, NotProtected) as error:
            told = f"what was there cannot be had from memory: {error}"
        self._unprotected(f"node {names}")
        with self._changed:
            self._news.append({"message": f"node {names}; {told}"})

    def _make_again(self, lost: Mapping[str, str]) -> list[str]:
        actors = self._vaults.actors()
        made = recipes(list(lost), self._stored(actors))
        if missing := sorted(lost.keys() - {recipe.node for recipe in made}):
            raise NotProtected(f"the nodes that are left keep nothing of {', '.join(missing)}")
        calls = {each.node: actors[lost[each.node]].make_again.remote(each, actors) for each in made}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=MAKE_AGAIN_S)
        for node, ref in calls.items():
            answer_of(lost[node], ref, MAKE_AGAIN_S)
        return [_sentence(recipe, lost[recipe.node]) for recipe in made]

    def _stored(self, actors: Mapping[str, Any]) -> list[Stored]:
        """The parities on all nodes that answer."""
        calls = {node: actor.stored.remote() for node, actor in actors.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=STORED_S)
        stored = []
        for node, ref in calls.items():
            try:
                blobs = answer_of(node, ref, STORED_S)
            except NoAnswer as error:  # perhaps the others suffice
                logger.warning("parities are not seen: %s", error)
                continue
            stored += [Stored(node, name, Parity.from_json(values)) for name, values in blobs]
        return stored

    def elsewhere(self, homes: Sequence[str]) -> list[Listed]:
        """Images on nodes that have no rank."""
        idle = {n: a.images.remote() for n, a in self._vaults.actors().items() if n not in homes}
        if not idle:
            return []
        ray.wait(list(idle.values()), num_returns=len(idle), timeout=STORED_S)
        found: list[Listed] = []
        for node, ref in idle.items():
            try:
                found += answer_of(node, ref, STORED_S)
            except NoAnswer as error:
                logger.warning("images on a node without ranks are not seen: %s", error)
        return found

    def _round(self, epoch: Epoch) -> float:
        self._worked_s = 0.0
        try:
            problem = self._cannot()
            if problem is not None:
                self._unprotected(problem)
                self._release(epoch)
            elif (step := self._protect(epoch)) is not None:
                self._failures = 0
                self._protected(step)
        except (RoundFailed, NotProtected) as error:
            logger.info("epoch=%d a round of protection failed: %s", epoch.number, error)
            self._failures += 1
            if self._failures == FAILURES_TOLD and self._goes_on(epoch):
                self._unprotected(str(error))
        return max(PAUSE_S, self._worked_s * (1 / DUTY - 1))

    def _cannot(self) -> str | None:
        """Why there is nothing to do."""
        if len(self._vaults.nodes()) < 2:
            return "the run is on one node"
        if self._vaults.slots < 3:
            return f"its ranks have {self._vaults.slots} slots, and 3 are needed (snapshot.slots = 0 or 3)"
        return None

    def _protect(self, epoch: Epoch) -> int | None:
        """Protect one step more, which is returned; None where there is none yet."""
        actors = self._vaults.actors()
        groups = protection_for(self._vaults.nodes())
        ranks = epoch.ranks_on(actors)
        at = self._ask_all(epoch, {n: a.newest.remote(ranks[n], epoch.number) for n, a in actors.items()})
        if any(step is None for step in at.values()):
            return None
        awaited = max(at.values()) + self._ahead
        try:
            calls = {n: a.wait_for.remote(ranks[n], epoch.number, awaited) for n, a in actors.items()}
            self._ask_all(epoch, calls)
            step = self._await(epoch, actors, ranks, awaited)
            # not sooner: ranks may wait for the disk, and the awaited step for them
            with self._turns if self._vaults.slots <= SLOTS_FOR_ONE else nullcontext():
                began = time.monotonic()
                names = self._store(epoch, actors, groups, ranks, step)
                self._worked_s = time.monotonic() - began
                there = {n: a.still_there.remote(ranks[n], epoch.number, step) for n, a in actors.items()}
                if not all(self._ask_all(epoch, there).values()):
                    raise RoundFailed(f"step {step} was overwritten while it was protected")
        except (RoundFailed, NotProtected):
            for node, actor in actors.items():
                actor.settle.remote(ranks[node], epoch.number, None, ())
            raise
        # from here on the step is safe, whatever becomes of the calls
        self.safe_step, turn = step, self._turn or 0
        self._turn = 1 - turn
        settled = {n: a.settle.remote(ranks[n], epoch.number, step, names[n]) for n, a in actors.items()}
        self._ask_all(epoch, settled)
        return step

    def _release(self, epoch: Epoch) -> None:
        """Let go of all that was kept for other nodes, once in an epoch, when its ranks have steps of it."""
        if self._released == epoch.number:
            return
        actors = self._vaults.actors()
        ranks = epoch.ranks_on(actors)
        at = self._ask_all(epoch, {n: a.newest.remote(ranks[n], epoch.number) for n, a in actors.items()})
        if None not in at.values():
            settled = {n: a.settle.remote(ranks[n], epoch.number, -1, ()) for n, a in actors.items()}
            self._ask_all(epoch, settled)
            self._released = epoch.number

    def _await(
        self, epoch: Epoch, actors: Mapping[str, Any], ranks: Mapping[str, list[int]], awaited: int
    ) -> int:
        """The step that all ranks keep because of `awaited`."""
        waiting, steps = dict(actors), set()
        while waiting:
            calls = {
                node: actor.reached.remote(ranks[node], epoch.number, awaited, REACHED_S)
                for node, actor in waiting.items()
            }
            for node, found in self._ask_all(epoch, calls).items():
                if found is not None:
                    steps |= found
                    del waiting[node]
        if len(steps) != 1:
            self._ahead = min(2 * self._ahead, MOST_AHEAD)
            raise RoundFailed(
                f"ranks kept steps {sorted(steps)} instead of one: they are quicker than the round"
            )
        return steps.pop()

    def _store(
        self,
        epoch: Epoch,
        actors: Mapping[str, Any],
        groups: Sequence[Group],
        ranks: Mapping[str, list[int]],
        step: int,
    ) -> dict[str, list[str]]:
        """Have every node store what it holds of others; the names of its blobs."""
        blocks = {node: group.blocks for group in groups for node in group.ids}
        held = self._ask_all(
            epoch,
            {n: a.held.remote(ranks[n], epoch.number, step, blocks[n]) for n, a in actors.items()},
            timeout_s=ROUND_S,
        )
        ordered: dict[str, list[Parity]] = {}
        for group in groups:
            ordered |= orders(group, {node: held[node] for node in group.ids}, step=step, epoch=epoch.number)
        if self._turn is None:  # those of a controller before this one stay until the round has ended
            newest = max(self._stored(actors), key=lambda s: (s.parity.epoch, s.parity.step), default=None)
            self._turn = int(newest is not None and newest.blob.startswith(newest.parity.name(0)))
        calls = {n: a.store.remote(ordered[n], self._turn, dict(actors)) for n, a in actors.items()}
        return self._ask_all(epoch, calls, timeout_s=ROUND_S)

    def _ask_all(
        self, epoch: Epoch, calls: Mapping[str, Any], *, timeout_s: float = ANSWER_S
    ) -> dict[str, Any]:
        return self._ask(calls, timeout_s=timeout_s, wanted=lambda: self._goes_on(epoch))

    def _protected(self, step: int) -> None:
        schemes = Counter(group.scheme for group in protection_for(self._vaults.nodes()))
        told = ", ".join(f"{scheme}" for scheme in sorted(schemes))
        message = f"the loss of a node costs no more than the steps since {step}, and those after it in turn"
        self._tell(True, message=message, scheme=told, safe_step=step)

    def _unprotected(self, reason: str) -> None:
        since = f"; step {self.safe_step} was the last that is safe" if self.safe_step >= 0 else ""
        self._tell(False, message=f"a lost node would be recovered from disk: {reason}{since}")

    def _tell(self, level: bool, **fields: Any) -> None:
        with self._changed:
            # a run on one node says nothing until it has been protected
            if level != self._level and (level or self._level or len(self._vaults.nodes()) > 1):
                self._news.append({"protected": level, **fields})
            self._level = level


def _sentence(recipe: Recipe, target: str) -> str:
    size = sum(size for _, size in recipe.files) / 2**20
    how = "a copy" if recipe.kind == "peer" else "parity"
    return f"step {recipe.step} of node {recipe.node} ({size:,.1f} MiB) was made from {how} on node {target}"
