"""Ctrl-C and SIGTERM while a run lasts: the first asks for a clean stop, the second ends at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedAtOnce(BaseException):
    """A second Ctrl-C: end now, without a checkpoint of this step. No `except Exception` on the way may take
    it.
    """


class Interrupts:
    """How often the user asked to stop.

    A second time is raised in the middle of whatever runs, until someone polls: Ray's calls answer an
    exception from a signal handler with a SystemError of their own.
    """

    def __init__(self) -> None:
        self._count = 0
        self._polled = False

    def poll(self) -> bool:
        """Whether a clean stop is asked for; raises StoppedAtOnce when it was asked for twice."""
        self._polled = True
        if self._count >= 2:
            raise StoppedAtOnce
        return self._count > 0

    def listen(self) -> None:
        """Be the handler of the signals that ask; they belong to the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 2 and not self._polled:  # once: a third must not cut the cleaning up short
            raise StoppedAtOnce


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Count Ctrl-C and SIGTERM instead of dying of them; the handlers before come back at the end."""
    asked = Interrupts()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    asked.listen()
    try:
        yield asked
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
