"""Signals that a process hears while its first thread is in native code.

Python runs a signal's handler in the first thread, between two of its instructions; in a worker that thread
sits in Ray's own loop and comes to none. The number of a signal is written to a socket by the C part of the
handler, at once and in whatever thread the kernel chose, so a thread of its own hears it there.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping


def hear(heard: Mapping[int, Callable[[], None]]) -> None:
    """From now on these signals have no effect but the call, one after another in a thread of its own.

    Only the first thread of a process may ask for it (Python raises ValueError in others), and once. In a
    process that this one forks they are as ever: a signal to that one is none to this one.
    """
    told, tells = socket.socketpair()
    tells.setblocking(False)  # as the C part demands: it must not wait

    def listen() -> None:
        while numbers := told.recv(64):
            for number in numbers:
                if number in heard:
                    heard[number]()

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
        told.close()
        tells.close()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    for number in heard:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)  # what native code waits for goes on
    os.register_at_fork(after_in_child=forget)
