"""Waits for the command to end, however it ends, and leaves nothing of its embedded Ray behind.

Started as its own process with a pipe whose other end only the command holds. When the pipe closes, because
the command is done or because it was killed, every process that carries the session's mark in its environment
is ended and the session's folder removed. Standard library only: it must start in milliseconds and need
nothing that can be broken.
"""

import os
import shutil
import signal
import sys
import time

MARK = "RAYFOLD_SESSION"  # environment variable that every process of a session inherits
_ROUNDS, _PAUSE_S = (
    50,
    0.1,
)  # processes may still be starting others while they are ended; five seconds is ample


def session_processes(session: str) -> list[int]:
    """Process ids, other than this one, whose environment carries the mark of `session`."""
    if not os.path.isdir("/proc/self"):
        return []  # no /proc on this system: Ray's own processes end with the one that started them
    mark = f"{MARK}={session}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                marked = mark in file.read().split(b"\0")
            with open(f"/proc/{name}/stat", "rb") as file:
                is_zombie = file.read().rpartition(b")")[2].split()[0] == b"Z"
        except OSError:
            continue  # gone meanwhile, or another user's
        if marked and not is_zombie:
            found.append(int(name))
    return found


def end_session(session: str) -> None:
    """End every process of the session, then remove its folder."""
    for _ in range(_ROUNDS):
        pids = session_processes(session)
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # gone meanwhile
        time.sleep(_PAUSE_S)
    shutil.rmtree(session, ignore_errors=True)


def main() -> None:
    """`reaper.py SESSION_FOLDER PIPE_FD`: wait for the pipe to close, then clean up."""
    session, pipe = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C and a closing terminal are for the command
    while os.read(pipe, 1):
        pass
    end_session(session)


if __name__ == "__main__":
    main()
