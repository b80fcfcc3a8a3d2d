"""Faults that nobody can bring about from outside of a process: an exception, no memory, no progress.

A chaos campaign asks for it when it starts a run (`Home.sabotaged`), and only then its workers have it. It
acts on the thread that trains, wherever that is, when the process gets one of its signals.
"""

import ctypes
import signal
import time
from collections.abc import Callable

from ..faulttol.campaign import Injection

FROM_WITHIN: frozenset[Injection] = frozenset({"exception", "oom", "stuck"})
STUCK_S = 3600.0  # longer than anybody waits for it: it is found, or the campaign shows that it is not
STRIKE_S = 5.0  # for its moment to come: a rank may be validating, or its epoch may be over
LOOK_EVERY_S = 0.002


def signal_for(kind: Injection, draw: int = 0) -> int:
    """The signal that brings `kind` about; there are two ways of being stuck, of which `draw` picks one.

    One of those that have no meaning, away from the first of them, which C libraries take.
    """
    return signal.SIGRTMIN + {"exception": 10, "oom": 11, "stuck": 12 + draw % 2}[kind]


class Sabotage(Exception):
    """Raised on purpose."""

    def __init__(self) -> None:
        super().__init__("raised on purpose by a chaos campaign")


class Livelock(BaseException):
    """Never comes to be: the thread that is to raise it makes it, and does not get done with that."""

    def __init__(self) -> None:
        super().__init__("the time of a livelock is over")
        until = time.monotonic() + STUCK_S
        while time.monotonic() < until:
            pass


class Saboteur:
    """Strikes the thread that trains; `thread` says which that is while it is in the middle of a step."""

    def __init__(self, thread: Callable[[], int | None]) -> None:
        self._thread = thread

    def signals(self) -> dict[int, Callable[[], None]]:
        """What each signal does, for `signals.hear`."""
        return {
            signal_for("exception"): lambda: self._raise(Sabotage),
            signal_for("oom"): lambda: self._raise(MemoryError),
            signal_for("stuck"): lambda: self._raise(Livelock),
            signal_for("stuck", draw=1): lambda: _hold_interpreter(int(STUCK_S)),
        }

    def _raise(self, kind: type[BaseException]) -> None:
        """Have the thread raise `kind` at its next instruction in Python, once."""
        deadline = time.monotonic() + STRIKE_S
        while time.monotonic() < deadline:
            if (thread := self._thread()) is not None:
                _raise_in(thread, kind)
                return
            time.sleep(LOOK_EVERY_S)


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _hold_interpreter(seconds: int) -> None:
    """No thread of this process executes Python meanwhile."""
    ctypes.PyDLL(None).sleep(seconds)
