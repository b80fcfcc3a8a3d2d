"""What the controller writes down and shows: one record, one writer, whoever tells.

Ranks tell in the name of their epoch; those of an epoch that is over are not heard. A recovery is timed by
phase, and its `restored` event is told when the steps that the fault had interrupted are done again.
"""

import threading
import time
from pathlib import Path
from typing import Any

from ..runtime.journal import EventKind, Journal
from .gauges import Gauges
from .recovery import Phases


class Record:
    """The journal of a run, the news for the one who watches, and the phases of a recovery under way."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.step = 0  # the last that was written down
        self.step_s = 0.0  # and how long it took
        self.fenced_unix = 0.0
        self._journal = Journal(run_dir)
        self._gauges = Gauges(name)
        self._lock = threading.Lock()
        self._news: list[dict[str, Any]] = []
        self._forgotten = 0  # news before those in the list
        self._accepted = 0  # the epoch whose ranks are heard; 0: none
        self._phases: Phases | None = None  # of the recovery under way, until it has caught up
        self._restored: dict[str, Any] | None = None  # its event
        self._fault_step = 0

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

    def take_in(self, lines: list[tuple[str, dict[str, Any]]], epoch: int) -> bool:
        """Write down what a rank tells, in its order; False, and nothing, if its epoch is over."""
        with self._lock:
            if epoch != self._accepted:
                return False
            for what, values in lines:
                if what == "metric":
                    self._caught_up(values)
                    self.step, self.step_s = values["step"], values["step_time_s"]
                    self._gauges.show(values)
                    self._news.append({"metric": self._journal.metric(values)})
                elif values["kind"] == "restored" and self._phases is not None:
                    self._phases.end("restore")
                    self._restored = {"time_unix": time.time(), **values}
                else:
                    self._news.append({"event": self._journal.event(**values)})
        return True

    def news(self, since: int) -> list[dict[str, Any]]:
        """What was written down after number `since`; the one who watches has seen those before it."""
        with self._lock:
            del self._news[: since - self._forgotten]  # a long run must not fill the memory
            self._forgotten = since
            return list(self._news)

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Something that the controller itself has to tell."""
        with self._lock:
            self._news.append({"event": self._journal.event(kind, self.step, **fields)})

    def begin_epoch(self, epoch: int, formed: dict[str, Any], *, came_unix: float | None) -> None:
        """Hear the ranks of `epoch`; `came_unix` is when the fault came, if that is known better by now."""
        with self._lock:
            if self._phases is not None:
                formed = formed | {"fenced_unix": self.fenced_unix}
                self._journal.attempt += 1
                self._phases.end("regroup")
                if came_unix is not None:
                    self._phases.began_at(came_unix)
            self._accepted = epoch
            self._news.append({"event": self._journal.event("formed", self.step, **formed)})

    def end_epoch(self) -> None:
        """Hear nobody: what the ranks had to tell they have told."""
        with self._lock:
            self._accepted = 0

    def begin_recovery(self, since: float) -> None:
        """A fault came at `since` (unix time) and has been noticed now; it may be one within a recovery."""
        with self._lock:
            if self._restored is not None:  # another one before the last was made up for
                self._tell_restored()
            if self._phases is None:
                self._phases = Phases(since)
                self._fault_step = self.step + 1
            self._phases.end("detect")

    def end_phase(self, name: str) -> None:
        """A phase of the recovery is over."""
        with self._lock:
            if self._phases is not None:
                self._phases.end(name)

    def finish(self, status: str, **extra: Any) -> dict[str, Any]:
        """Write the last event, then the summary that counts it; returns the summary."""
        with self._lock:
            self._tell_restored()
            self._news.append({"event": self._journal.event("run_finished", self.step, status=status)})
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
            self._news.append({"event": self._journal.event(**{**restored, **phases.as_fields()})})
