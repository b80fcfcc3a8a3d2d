"""Watches processes of this machine: says when one has died or was stopped, without asking it.

A look at /proc costs microseconds and answers whatever the process is doing: one stopped by a signal answers
nobody, and Ray never notices it. Process ids are used again, so a process is known by its start as well.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..faulttol.stuck import Seen

LOOK_EVERY_S = 0.05  # a tenth of what a whole recovery takes
GLANCES, GLANCE_EVERY_S = 4, 0.011  # not in step with the 5 ms in which Python's threads take turns
STOPPED_AFTER_S = 0.5  # shorter stops are debuggers and profilers at work


@dataclass(frozen=True)
class Notice:
    """Something befell a process."""

    pid: int
    what: str  # "died" or "stopped"
    last_well_unix: float  # when it was last seen alive and going


@dataclass(frozen=True)
class _Followed:
    started: str
    last_well_unix: float
    told: bool = False


class Watch:
    """Looks at the processes it follows from a thread of its own; `tell` is called there, once a process."""

    def __init__(self, tell: Callable[[Notice], None]) -> None:
        self._tell = tell
        self._followed: dict[int, _Followed] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._thread.start()

    def follow(self, pid: int) -> None:
        """Watch a process from now on; one that is gone already is told as died."""
        now = time.time()
        state, started = state_of(pid)
        with self._lock:
            self._followed[pid] = _Followed(started, now)
        if not state:
            self._look(pid, now)

    def end(self, pid: int) -> float | None:
        """Kill a process that is watched, and watch it no longer: its death is news to nobody. When it was
        last seen well, in unix time; None, and nothing is done, if it is not watched.
        """
        with self._lock:
            known = self._followed.pop(pid, None)
        if known is None:
            return None
        if state_of(pid)[1] == known.started:  # its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return known.last_well_unix

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(10 * LOOK_EVERY_S)  # it is between two looks, or in the middle of one

    def _look_on(self) -> None:
        last = time.time()
        while not self._closed.wait(LOOK_EVERY_S):
            now = time.time()
            if now - last > STOPPED_AFTER_S / 2:
                self._start_anew(now)
            last = now
            for pid in list(self._followed):
                self._look(pid, now)

    def _start_anew(self, now: float) -> None:
        """Nobody looked for a while (Ctrl-Z, a machine asleep): what was stopped with us is not at fault."""
        with self._lock:
            for pid, known in self._followed.items():
                self._followed[pid] = replace(known, last_well_unix=now)

    def _look(self, pid: int, now: float) -> None:
        state, started = state_of(pid)
        with self._lock:
            known = self._followed.get(pid)
            if known is None or known.told:
                return
            if not state or state in "ZX" or started != known.started:
                what = "died"
            elif state == "T" and now - known.last_well_unix > STOPPED_AFTER_S:
                what = "stopped"
            else:
                if state != "T":
                    self._followed[pid] = replace(known, last_well_unix=now)
                return
            self._followed[pid] = replace(known, told=True)
        self._tell(Notice(pid, what, known.last_well_unix))


def state_of(pid: int) -> tuple[str, str]:
    """(state letter, start time) of a process as the kernel tells; two empty strings when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def seen_of(pid: int) -> Seen:
    """What the kernel tells of a process as a whole; it is asked nothing. Takes `GLANCES * GLANCE_EVERY_S`.

    A thread wants a processor if it does at every glance: one that waits for the interpreter looks after it
    two hundred times a second.
    """
    wanting: set[str] | None = None
    try:
        for _ in range(GLANCES):
            threads = {
                thread for thread in os.listdir(f"/proc/{pid}/task") if thread_state(pid, int(thread)) == "R"
            }
            wanting = threads if wanting is None else wanting & threads
            time.sleep(GLANCE_EVERY_S)
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return Seen("", 0.0)
    ticks = int(fields[11]) + int(fields[12])  # utime and stime
    state = "S" if fields[0] == "R" else fields[0]  # of its first thread, which may run just now
    return Seen("R" if wanting else state, ticks / os.sysconf("SC_CLK_TCK"))


def thread_state(pid: int | str, thread: int) -> str:
    """The state letter of one thread; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def watching_works() -> bool:
    """Whether this system tells about its processes in /proc."""
    return bool(state_of(os.getpid())[0])
