"""The disk tier: the vaults write the steps that are due out of the slots of their ranks, who train on.

A step is *captured* when all ranks have committed a copy of it, *protected* when other nodes keep it too
(`protect.py`), and *durable* when it is on disk: three different moments, and a run ends with the third.
Ranks keep a step that is due until it is durable, or given up, and wait with the next until then: that is the
back-pressure. The controller gathers what the vaults wrote, makes the index and renames the folder, and not
before the record has the step: one that stands while its step is missing from the record hides it for good.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..runtime.checkpoint.format import write_index
from ..runtime.checkpoint.shelf import Shelf, is_of_disk
from ..runtime.checkpoint.streaming import Holding, Share, Unusable, assign, index_of
from ..runtime.progress import Progress
from .protect import SLOTS_FOR_ONE
from .record import Record
from .rounds import ANSWER_S, Epoch, NoAnswer, RoundFailed, Rounds
from .vault import Vaults

logger = logging.getLogger(__name__)

WRITER = "vaults"  # in the names of unfinished folders; trainers without snapshots write as well
DUE_S = 1.0  # a vault looks so long for a step that is due before it is asked again
RECORD_LOOK_S = 0.02
SLOWEST_DISK = 4e6  # bytes a second for all ranks of a node; what is slower is not waited for
BACK_S = 60.0  # a vault that was killed is back within seconds, on a busy machine within half of this
AGAIN_S = 0.5


class Durable(Rounds):
    """Writes what is due, one step at a time. Methods are called by the controller's threads."""

    def __init__(self, vaults: Vaults, shelf: Shelf, record: Record, turns: threading.Lock) -> None:
        """`turns`: held by whoever has steps kept; ranks have no slots for more than one of them."""
        shelf.clear_leftovers()
        self._shelf = shelf
        self._record = record
        self._turns = turns
        self._one = threading.Lock()  # a step at a time
        self._last: Epoch | None = None  # whose steps lie in the slots
        self._ending = False  # what is left to be done is not done in rounds
        self._done: set[int] = set()  # written in this epoch
        self._failing_since = 0.0  # of the due step; 0: it is not
        super().__init__(vaults, name="durable")

    @property
    def step(self) -> int:
        """The newest on disk; 0 where there is none."""
        return max(self._shelf.steps(), default=0)

    def begin(self, epoch: int, homes: Sequence[str]) -> None:
        """Write what the ranks of `epoch` call due."""
        self._last = Epoch(epoch, tuple(homes))
        self._done.clear()  # ranks that have gone back make steps again, over ones that are damaged perhaps
        super().begin(epoch, homes)

    def pause(self) -> None:
        """As `Rounds.pause`."""
        super().pause()
        for actor in self._vaults.actors().values():
            actor.give_up_writing.remote()

    def finish(self, step: int) -> str | None:
        """Make `step` durable, the last of a run whose ranks have ended; why it is not, or None."""
        self._ending = True
        problem: Exception = Unusable("no rank has ever held it in memory")
        deadline = time.monotonic() + BACK_S
        while (last := self._last) is not None and time.monotonic() < deadline:
            with self._one:  # a round under way may be at just this step
                try:
                    due = self._due(last, wanted=lambda: not self._closed)
                    if step not in self._done and (due == step or step not in self._shelf.steps()):
                        self._write(last, step, wanted=lambda: not self._closed)
                    return None
                except (RoundFailed, Unusable, OSError) as error:
                    problem = error
            if not _may_pass(problem):
                break
            time.sleep(AGAIN_S)
        return None if step in self._shelf.steps() else f"step {step}: {problem}"

    def rescue(self) -> None:
        """Make the newest step durable that all ranks have in memory, of a run that cannot go on; if that is
        possible.
        """
        if (last := self._last) is None:
            return
        self._ending = True
        try:
            with self._one:
                actors, ranks = self._ranks(last)
                calls = {n: a.whole.remote(ranks[n]) for n, a in actors.items()}
                found = self._ask(calls, wanted=lambda: not self._closed)
                whole = set.intersection(*found.values())
                # the line of a later one may have died with its rank
                step = max((step for step in whole if step <= self._record.last_step), default=0)
                if step > self.step:
                    self._write(last, step, wanted=lambda: not self._closed)
        except (RoundFailed, Unusable, OSError) as error:
            logger.warning("what ranks had in memory is not on disk: %s", error)

    def _round(self, epoch: Epoch) -> float:
        if self._ending:
            return AGAIN_S
        with self._one:
            wanted = lambda: self._goes_on(epoch)  # noqa: E731 (handed down)
            try:
                step = self._due(epoch, wanted=lambda: wanted() and not self._ending, wait_s=DUE_S)
                if step is not None:
                    self._write_in_time(epoch, step, wanted)
                    actors, ranks = self._ranks(epoch)
                    for node, actor in actors.items():
                        actor.wrote.remote(ranks[node], step)
            except RoundFailed as error:
                logger.info("epoch=%d what is due is not written yet: %s", epoch.number, error)
                return AGAIN_S
        return 0.0

    def _due(self, epoch: Epoch, *, wanted: Callable[[], bool], wait_s: float = 0.0) -> int | None:
        """The step that ranks keep until it is on disk, once all have passed it; None while there is none.
        Raises RoundFailed.
        """
        actors, ranks = self._ranks(epoch)
        calls = {
            n: a.due.remote(ranks[n], wait_s) if wait_s else a.due_now.remote(ranks[n])
            for n, a in actors.items()
        }
        steps = [step for step in self._ask(calls, wanted=wanted).values() if step is not None]
        if not steps:
            return None
        # a rank that has lost the file in which it said so is none to wait for
        passed = {n: a.passed.remote(ranks[n], max(steps)) for n, a in actors.items()}
        return max(steps) if all(self._ask(passed, wanted=wanted).values()) else None

    def _write_in_time(self, epoch: Epoch, step: int, wanted: Callable[[], bool]) -> None:
        """Write a step, or give it up and tell. Raises RoundFailed where another try may write it."""
        if step in self._done:  # and the vault was killed before it could tell its ranks
            return
        try:
            self._write(epoch, step, wanted=wanted)
        except (RoundFailed, Unusable, OSError) as error:
            self._failing_since = self._failing_since or time.monotonic()
            late = time.monotonic() - self._failing_since > BACK_S
            if not wanted() or (_may_pass(error) and not late):
                raise RoundFailed(str(error)) from error
            self._tell_failed(step, error)
        self._failing_since = 0.0

    def _write(self, epoch: Epoch, step: int, *, wanted: Callable[[], bool]) -> None:
        """Raises RoundFailed, Unusable and OSError; the checkpoint before stands then."""
        began, partial = time.monotonic(), self._shelf.partial(step)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with self._turns if self._vaults.slots <= SLOTS_FOR_ONE else nullcontext():
                progress = self._fill(epoch, step, partial, wanted)
            self._await_record(step, wanted)
            self._shelf.commit(step)
            self._done.add(step)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
            raise
        self._record.event_of(progress.step, "checkpoint", seconds=time.monotonic() - began)

    def _fill(self, epoch: Epoch, step: int, partial: Path, wanted: Callable[[], bool]) -> Progress:
        """Have the vaults write their parts, and write the index."""
        actors, ranks = self._ranks(epoch)
        asked = {n: a.holdings.remote(ranks[n], step) for n, a in actors.items()}
        held: dict[int, Holding] = {}
        for found in self._ask(asked, wanted=wanted).values():
            held |= found
        given = assign(held)
        shares = {
            # with the epoch: a vault of an earlier one that was cut off may still be writing
            rank: Share(held[rank].path, step, parts, f"rank-{rank:05d}.{epoch.number}.bin")
            for rank, parts in given.items()
            if parts
        }
        work = {n: [shares[rank] for rank in ranks[n] if rank in shares] for n in actors}
        largest = max(sum(part.length for share in each for part in share.parts) for each in work.values())
        wrote = self._ask(
            {n: a.write_down.remote(work[n], partial) for n, a in actors.items()},
            timeout_s=ANSWER_S + largest / SLOWEST_DISK,
            wanted=wanted,
        )
        progress = Progress.among(next(iter(held.values())).progress)
        done = [share for node in actors for share in work[node]]
        places = [where for node in actors for where in wrote[node]]
        write_index(partial, index_of(vars(progress), done, places))
        return progress

    def _await_record(self, step: int, wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_S
        while self._record.last_step < step:
            if not wanted() or time.monotonic() > deadline:
                raise RoundFailed(f"the record has no line of step {step}")
            time.sleep(RECORD_LOOK_S)

    def _ranks(self, epoch: Epoch) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """The vaults of the nodes with ranks, and the ranks on each. Raises NoAnswer where a node is lost."""
        actors = self._vaults.actors()
        if lost := set(epoch.homes) - actors.keys():
            raise NoAnswer(f"node {', '.join(sorted(lost))} is lost")
        here = {node: actors[node] for node in dict.fromkeys(epoch.homes)}
        return here, epoch.ranks_on(here)

    def _tell_failed(self, step: int, error: Exception) -> None:
        of_disk = is_of_disk(error.cause if isinstance(error, NoAnswer) else error)
        kind = "disk" if of_disk else "checkpoint_not_written"
        message = f"a checkpoint could not be written, the one before still stands: step {step}: {error}"
        self._record.event("fault", **{"class": kind, "message": message})


def _may_pass(error: Exception) -> bool:
    """Whether another try may find what this one did not: a vault that did not answer may be back."""
    return isinstance(error, NoAnswer) and error.cause is None
