"""How a worker died: the kernel tells a signal from an exit, Ray only that the connection closed.

Until a process is reaped, /proc tells its exit status to others than its parent; since Linux 6.15 a handle on
it tells that later (PIDFD_GET_INFO). Only processes of this machine can be asked; of others, and on older
kernels, nothing is known.
"""

import contextlib
import fcntl
import os
import signal
import struct
import time

from .watch import exit_status
from .worker import Place

_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_EXIT = 1 << 3  # PIDFD_INFO_EXIT in the mask
_LAYOUT = struct.Struct("=QQ11Ii")  # mask, cgroup, eleven ids, exit status as wait() has it
_REAPED_WITHIN_S = 1.0  # the raylet reaps at once; its machine may be busy
_LOOK_EVERY_S = 0.002  # a run that is down waits for the answer


class Deaths:
    """Handles on the processes of this machine, opened while they live."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._handles: dict[int, int] = {}

    def follow(self, place: Place) -> None:
        """Be ready to tell how the process at `place` dies."""
        if hasattr(os, "pidfd_open") and place.node == self._node and place.pid not in self._handles:
            with contextlib.suppress(OSError):  # gone already, or a kernel without handles
                self._handles[place.pid] = os.pidfd_open(place.pid)

    def how(self, pid: int) -> str | None:
        """How a process died, in a few words; None where nobody knows."""
        handle = self._handles.get(pid)
        deadline = time.monotonic() + _REAPED_WITHIN_S
        while handle is not None and time.monotonic() < deadline:
            raw = bytearray(_LAYOUT.pack(_EXIT, *[0] * 13))
            try:
                fcntl.ioctl(handle, _GET_INFO, raw)
            except OSError:
                deadline = 0.0  # a kernel that does not tell
            mask, *_, told = _LAYOUT.unpack(raw)
            # one that is not reaped still has its number for itself
            status = told if mask & _EXIT and deadline else exit_status(pid)
            if status is not None:
                return describe(status)
            time.sleep(_LOOK_EVERY_S)
        return None

    def close(self) -> None:
        """Let go of the handles."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def describe(status: int) -> str:
    """A status of wait() in words."""
    if not os.WIFSIGNALED(status):
        return f"its process exited with status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = ", as the kernel sends when memory runs out" if number == signal.SIGKILL else ""
    return f"its process was killed by {name}{hint}"
