"""Waits for the command to end, however it ends, and leaves nothing of its embedded Ray behind.

Started as its own process with a pipe whose other end only the command holds. When the pipe closes, because
the command is done or because it was killed, every process of the session is ended and the session's folder
removed. A process belongs to the session by the mark in its environment or by a file below the folder that it
writes: Ray's agents write their title over most of what `/proc` shows of their environment. Standard library
only: it must start in milliseconds and need nothing that can be broken.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time

MARK = "RAYFOLD_SESSION"  # environment variable that every process of a session inherits
SHARED_MEMORY = "/dev/shm"
_MEMORY, _CLAIM = "-state", "in-use"  # how a folder in memory ends, and the file in it that says so
_CLAIMED_WITHIN_S = 60.0  # a reaper claims its folder as soon as it has made it
_ROUNDS, _PAUSE_S = (
    50,
    0.1,
)  # processes may still be starting others while they are ended; five seconds is ample
_EMPTY_ROUNDS = 3  # a process that is just starting shows no environment for a moment


def session_processes(session: str) -> list[int]:
    """Process ids, other than this one, that carry the mark of `session` or write below its folder."""
    if not os.path.isdir("/proc/self"):
        return []  # no /proc on this system: Ray's own processes end with the one that started them
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                is_zombie = file.read().rpartition(b")")[2].split()[0] == b"Z"
            belongs = has_variable(name, MARK, session) or writes_below(name, session)
        except OSError:
            continue  # gone meanwhile, or another user's
        if belongs and not is_zombie:
            found.append(int(name))
    return found


def has_variable(pid: int | str, name: str, value: str) -> bool:
    """Whether the process started with this variable, as far as it left its environment to be seen."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{name}={value}".encode() in file.read().split(b"\0")


def writes_below(pid: int | str, folder: str) -> bool:
    """Whether the process has a file below `folder` open to write; one that only reads does not count."""
    within = os.path.realpath(folder) + "/"
    for name in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{name}"
        try:
            if os.readlink(link).startswith(within) and os.lstat(link).st_mode & 0o200:
                return True
        except FileNotFoundError:
            continue  # closed meanwhile
    return False


def end_session(session: str, command: int) -> None:
    """End every process of the session but the command itself, then remove the session's folders."""
    empty = 0
    for _ in range(_ROUNDS):
        # a command that ends by itself still has Ray's log of it open, and its own work to finish
        pids = [pid for pid in session_processes(session) if pid != command]
        empty = 0 if pids else empty + 1
        if empty == _EMPTY_ROUNDS:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # gone meanwhile
        time.sleep(_PAUSE_S)
    shutil.rmtree(session, ignore_errors=True)
    shutil.rmtree(memory_folder(session), ignore_errors=True)


def memory_folder(session: str) -> str:
    """Where the processes of a session keep what lies in memory: a folder named after it."""
    return os.path.join(_memory_root(), os.path.basename(session) + _MEMORY)


def claim_memory(session: str) -> int:
    """Make the session's folder in memory; it counts as in use for as long as the descriptor is open."""
    folder = memory_folder(session)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    claim = os.open(os.path.join(folder, _CLAIM), os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(claim, fcntl.LOCK_EX)
    return claim


def has_reaper(folder: str) -> bool:
    """Whether a folder in memory is, or was, an embedded session's: a reaper's matter."""
    return os.path.exists(os.path.join(folder, _CLAIM))


def clear_abandoned_memory() -> None:
    """Remove the folders of sessions whose reaper was killed too: nobody else would give the memory back."""
    root = _memory_root()
    for name in os.listdir(root):
        folder = os.path.join(root, name)
        try:
            # one without a claim is a joined cluster's, and a new one may not be claimed yet
            if not name.endswith(_MEMORY) or time.time() - os.stat(folder).st_mtime < _CLAIMED_WITHIN_S:
                continue
            claim = os.open(os.path.join(folder, _CLAIM), os.O_RDWR)
        except OSError:
            continue  # gone meanwhile, another user's, or none of ours
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use
        finally:
            os.close(claim)


def _memory_root() -> str:
    return SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()


def main() -> None:
    """`reaper.py SESSION_FOLDER PIPE_FD`: wait for the pipe to close, then clean up."""
    session, pipe, command = sys.argv[1], int(sys.argv[2]), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C and a closing terminal are for the command
    with contextlib.suppress(OSError):  # no room for a folder: then there will be no memory to give back
        claim_memory(session)  # let go of by the kernel when this process ends
    while os.read(pipe, 1):
        pass
    end_session(session, command)


if __name__ == "__main__":
    main()
