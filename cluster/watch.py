"""Watches processes of this machine: says when one has died or was stopped, without asking it.

The kernel tells that a process has ended, to whoever has a handle on it (a pidfd), once its memory is given
back, which takes a tenth of a second for each gigabyte. So each is also looked at time and again: that tells
before it that a process is on its way out, and that one is stopped, which the kernel tells only its parent. A
look at /proc costs microseconds and answers whatever the process is doing: one stopped by a signal answers
nobody, and Ray never notices it. Process ids are used again, so one is known by its start as well.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..faulttol.stuck import Seen

LOOK_EVERY_S = 0.02  # a run that is down waits for half of it on average; 1,000 looks take 16 ms
GLANCES, GLANCE_EVERY_S = 4, 0.011  # not in step with the 5 ms in which Python's threads take turns
STOPPED_AFTER_S = 0.5  # shorter stops are debuggers and profilers at work
CLOSE_S = 0.5  # for the thread to end, which is between two looks or in the middle of one
ON_ITS_WAY_OUT = 0x4  # PF_EXITING among the flags of a process


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


class _Handles:
    """Handles on processes, waited for all at once; where this system has none, waiting is a pause."""

    def __init__(self) -> None:
        self._poll = select.epoll() if hasattr(os, "pidfd_open") else None
        self._open: set[int] = set()

    def add(self, pid: int) -> None:
        """Have `wait` return at the end of a process; what is gone already it may not notice."""
        if self._poll is not None:
            with contextlib.suppress(OSError):  # gone, no handle left to have, or a kernel before 5.3
                handle = os.pidfd_open(pid)
                self._open.add(handle)  # first: another thread waits
                self._poll.register(handle, select.EPOLLIN)

    def wait(self, timeout_s: float) -> None:
        """Return as soon as a process has ended, once for each; after `timeout_s` if none has."""
        if self._poll is None:
            time.sleep(timeout_s)
            return
        for handle, _ in self._poll.poll(timeout_s):
            self._open.discard(handle)
            os.close(handle)  # and is waited for no more

    def close(self) -> None:
        """Let go of all; nothing is opened or waited for any more."""
        for handle in self._open:
            os.close(handle)
        if self._poll is not None:
            self._poll.close()


class Watch:
    """Looks at the processes it follows from a thread of its own; `tell` is called there, once a process."""

    def __init__(self, tell: Callable[[Notice], None]) -> None:
        self._tell = tell
        self._followed: dict[int, _Followed] = {}
        self._handles = _Handles()
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
        if state:
            self._handles.add(pid)
        else:
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
        """End the thread, and follow nobody from now on."""
        self._closed.set()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._handles.close()

    def _look_on(self) -> None:
        last = time.time()
        while not self._closed.is_set():
            self._handles.wait(LOOK_EVERY_S)
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
    """(state letter, start time) of a process as the kernel tells; two empty strings when it is gone.

    The letter is "X" as soon as the process runs nothing of its own any more.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    leaves = int(fields[6]) & ON_ITS_WAY_OUT and fields[0] != "Z"
    return "X" if leaves else fields[0], fields[19]


def exit_status(pid: int) -> int | None:
    """The status, as wait() has it, of a process that is on its way out or that nobody has waited for yet;
    None where that is not known.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[49])  # 0 as well where the kernel does not say
    return status if status and (int(fields[6]) & ON_ITS_WAY_OUT or fields[0] in "ZX") else None


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
