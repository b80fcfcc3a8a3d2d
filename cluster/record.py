"""What the controller writes down and shows: one record, one writer, whoever tells.

Ranks tell in the name of their epoch; those of an epoch that is over are not heard. A recovery is timed by
phase, and its `restored` event is told when the steps that the fault had interrupted are done again.

The lines of a rank are numbered, and a bookmark beside the record says which of them it holds and where it
ended then. A writer that is started again cuts off what is behind the bookmark and hears it again from the
ranks, so that no line is missing and none is there twice, whenever the one before was killed.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..faulttol.pace import Pace
from ..runtime.journal import EventKind, Journal, cut_back
from .gauges import Gauges
from .ledger import Ledger
from .recovery import Phases

BOOKMARK = ".record.json"
NEWS_KEPT = 1000  # a run that nobody watches must not fill the memory


class Record:
    """The journal of a run, the news for the one who watches, and the phases of a recovery under way."""

    def __init__(self, run_dir: Path, name: str, *, owner: str) -> None:
        """Goes on where a record of the same `owner` was left. Raises LedgerDamaged and OSError."""
        self.step = 0  # the last that was written down
        self.step_s = 0.0  # and how long it took
        self.fenced_unix = 0.0
        self.pace = Pace()
        self._bookmark = Ledger(run_dir / BOOKMARK, owner=owner)
        left = self._bookmark.read()
        if left is not None:
            cut_back(run_dir, left["sizes"])
        self._journal = Journal(run_dir)
        self._gauges = Gauges(name)
        self._lock = threading.Lock()
        self._news: list[dict[str, Any]] = []
        self._forgotten = 0  # news before those in the list
        self._accepted = 0  # the epoch whose ranks are heard; 0: none
        self._phases: Phases | None = None  # of the recovery under way, until it has caught up
        self._restored: dict[str, Any] | None = None  # its event
        self._fault_step = 0
        self._taken: dict[int, int] = {}  # rank -> how many of its lines of this epoch are written down
        self._spares: set[int] = set()  # processes that were said to be ready to take a rank's place
        if left is not None:
            self._go_on(left)

    @property
    def told_any(self) -> bool:
        """Whether the record of this run has begun."""
        return self._forgotten + len(self._news) > 0

    @property
    def attempt(self) -> int:
        """Which attempt at the run this is."""
        return self._journal.attempt

    @property
    def last_step(self) -> int:
        """The largest step in the journal, of earlier starts too."""
        return self._journal.last_step

    @property
    def recovering(self) -> bool:
        """Whether a fault has not been made up for."""
        return self._phases is not None

    def take_in(self, lines: list[tuple[str, dict[str, Any]]], *, epoch: int, rank: int, number: int) -> bool:
        """Write down what a rank tells, in its order, `number` being that of its first line in this epoch;
        False, and nothing, if its epoch is over. What is written down already is not written again.
        """
        with self._lock:
            if epoch != self._accepted:
                return False
            taken = self._taken.get(rank, 0)
            assert number <= taken, f"rank {rank} tells line {number} of epoch {epoch}, {taken} came before"
            for what, values in lines[taken - number :]:
                if what == "metric":
                    self._caught_up(values)
                    self.step, self.step_s = values["step"], values["step_time_s"]
                    # a checkpoint is no part of its step
                    own_s = self.step_s - values.get("snapshot_stall_s", 0.0)
                    self.pace.ended(own_s, values["time_unix"], time.monotonic())
                    self._gauges.show(values)
                    self._add({"metric": self._journal.metric(values)})
                elif values["kind"] == "restored" and self._phases is not None:
                    self._phases.end("restore")
                    self._restored = {"time_unix": time.time(), **values}
                else:
                    self._add({"event": self._journal.event(**values)})
            self._taken[rank] = max(taken, number + len(lines))
            self._save()
        return True

    def news(self, since: int | None) -> tuple[int, list[dict[str, Any]]]:
        """How much was told in all, and what of it came after number `since`; None: nothing of it."""
        with self._lock:
            told = self._forgotten + len(self._news)
            return told, [] if since is None else self._news[max(0, since - self._forgotten) :]

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Something that the controller itself has to tell."""
        self.event_of(self.step, kind, **fields)

    def event_of(self, step: int, kind: EventKind, **fields: Any) -> None:
        """The same, of another step than the last that was written down."""
        with self._lock:
            self._add({"event": self._journal.event(kind, step, **fields)})
            self._save()

    def spares(self, pids: Iterable[int]) -> None:
        """These processes are ready to take a rank's place; told where that is news."""
        if (ready := set(pids)) != self._spares:
            self._spares = ready
            self.event("spares", pids=sorted(ready))

    def begin_epoch(self, epoch: int, formed: dict[str, Any], *, came_unix: float | None) -> None:
        """Hear the ranks of `epoch`; `came_unix` is when the fault came, if that is known better by now."""
        with self._lock:
            self.pace.begin(time.monotonic(), time.time())
            if self._phases is not None:
                formed = formed | {"fenced_unix": self.fenced_unix}
                self._journal.attempt += 1
                self._phases.end("regroup")
                if came_unix is not None:
                    self._phases.began_at(came_unix)
            self._accepted, self._taken, self._spares = epoch, {}, set(formed["spare_pids"])
            self._add({"event": self._journal.event("formed", self.step, **formed)})
            self._save()

    def end_epoch(self) -> None:
        """Hear nobody: what the ranks had to tell they have told."""
        with self._lock:
            self._accepted, self._taken = 0, {}
            self._save()

    def begin_recovery(self, since: float) -> None:
        """A fault came at `since` (unix time) and has been noticed now; it may be one within a recovery."""
        with self._lock:
            if self._restored is not None:  # another one before the last was made up for
                self._tell_restored()
            if self._phases is None:
                self._phases = Phases(since)
                self._fault_step = self.step + 1
            self._phases.end("detect")
            self._save()

    def end_phase(self, name: str) -> None:
        """A phase of the recovery is over."""
        with self._lock:
            if self._phases is not None:
                self._phases.end(name)

    def finish(self, status: str, **extra: Any) -> dict[str, Any]:
        """Write the last event, then the summary that counts it; returns the summary."""
        with self._lock:
            self._tell_restored()
            self._add({"event": self._journal.event("run_finished", self.step, status=status)})
            self._save()
            return self._journal.summary(status, **extra)

    def close(self) -> None:
        """Close the files."""
        self._journal.close()

    def _caught_up(self, metric: dict[str, Any]) -> None:
        """Called with the lock held, before a step is written down."""
        if self._phases is None or "regroup" not in self._phases.seconds:
            return  # all is well, or the ranks have not formed anew yet
        if metric["step"] < self._fault_step:
            return
        if metric["time_unix"] >= self._phases.since:  # one of before the fault may come late
            self._phases.end("catch_up", metric["time_unix"])
            self._tell_restored()

    def _tell_restored(self) -> None:
        """Called with the lock held; there is none to tell where the fault came before the first step."""
        restored, phases = self._restored, self._phases
        self._restored = self._phases = None
        if restored is not None and phases is not None:
            self._add({"event": self._journal.event(**{**restored, **phases.as_fields()})})

    def _add(self, item: dict[str, Any]) -> None:
        """Called with the lock held."""
        self._news.append(item)
        if len(self._news) > 2 * NEWS_KEPT:
            self._forgotten += len(self._news) - NEWS_KEPT
            del self._news[:-NEWS_KEPT]

    def _save(self) -> None:
        """Called with the lock held, after what it tells of is written."""
        self._bookmark.write(
            {
                "sizes": self._journal.sizes(),
                "told": self._forgotten + len(self._news),
                "attempt": self._journal.attempt,
                "accepted": self._accepted,
                "taken": list(self._taken.items()),
                "step": self.step,
                "step_s": self.step_s,
                "fault_step": self._fault_step,
                "restored": self._restored,
                "phases": None if self._phases is None else asdict(self._phases),
                "pace": self.pace.as_values(),
            }
        )

    def _go_on(self, left: dict[str, Any]) -> None:
        """As the bookmark says."""
        self._forgotten = left["told"]
        self._journal.attempt = left["attempt"]
        self._accepted, self._taken = left["accepted"], dict(left["taken"])
        self.pace.go_on(left["pace"])
        self.pace.begin(time.monotonic(), time.time())
        self.step, self.step_s = left["step"], left["step_s"]
        self._fault_step, self._restored = left["fault_step"], left["restored"]
        if (phases := left["phases"]) is not None:
            self._phases = Phases(phases["since"], phases["seconds"])
            self._phases.begun = phases["begun"]
