"""Break gloo on purpose, so that a rank that waits for one that will never answer raises at once.

Nothing in torch ends a gloo collective under way: aborting or destroying its group returns, and the waiting
thread waits on up to the collective's timeout. Shutting the connections of the groups down ends it in
milliseconds, and the process can join new groups afterwards.

Which sockets are gloo's is read off the kernel. Each group has a loop of its own: an epoll instance, kept
across exec, that watches one listening socket, the group's connections and a pipe that wakes it. Ray, gRPC,
asyncio and torch's store build theirs otherwise (closed on exec, woken by an eventfd or a socket pair), so
their connections stay whatever opened meanwhile. Linux only: elsewhere nothing is found and nothing broken.
"""

import contextlib
import os
import re
import socket

_CLOEXEC = 0o2000000
_WATCHED = re.compile(r"^tfd:\s+(\d+)", re.MULTILINE)
_FLAGS = re.compile(r"^flags:\s+([0-7]+)", re.MULTILINE)


def break_gloo() -> int:
    """Shut down every connection of this process's gloo groups; returns how many there were.

    Called by another thread than those that wait. New groups can be made as soon as the old are destroyed.
    """
    return _shut(gloo_sockets())


def break_connections_to(port: int) -> int:
    """Shut down this process's connections to `port` of another: waits on a store there raise at once."""
    found = {}
    for name, fd in _sockets().items():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] == port:
                found[name] = fd
    return _shut(found)


def forget_groups() -> None:
    """Leave all groups, and be as a process that has joined none: torch names groups by counting them, an
    attempt that came to nothing too, and would look for those that begin anew under another name than theirs.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0


def gloo_sockets() -> dict[str, int]:
    """The connections of gloo's loops: the kernel's name of each (its inode) and the descriptor."""
    found: dict[str, int] = {}
    for fd in _descriptors():
        if _target(fd) != "anon_inode:[eventpoll]":
            continue
        watched = {int(number): _target(int(number)) for number in _watched_by_gloo(fd)}
        sockets = {name: number for number, name in watched.items() if name.startswith("socket:")}
        listening = {name for name, number in sockets.items() if _listens(number)}
        if listening and any(name.startswith("pipe:") for name in watched.values()):
            found |= {name: number for name, number in sockets.items() if name not in listening}
    return found


def _shut(sockets: dict[str, int]) -> int:
    # duplicates first: as one connection fails gloo closes the others, and their numbers may be used again
    copies = []
    for name, fd in sockets.items():
        with contextlib.suppress(OSError):
            copy = os.dup(fd)
            if _target(copy) == name:
                copies.append(copy)
            else:
                os.close(copy)
    for copy in copies:
        with socket.socket(fileno=copy) as one, contextlib.suppress(OSError):  # not connected any more
            one.shutdown(socket.SHUT_RDWR)
    return len(copies)


def _watched_by_gloo(epoll: int) -> list[str]:
    """What an epoll instance watches, if it is kept across exec as gloo's are."""
    try:
        with open(f"/proc/self/fdinfo/{epoll}") as file:
            text = file.read()
    except OSError:
        return []
    flags = _FLAGS.search(text)
    if flags is None or int(flags[1], 8) & _CLOEXEC:
        return []
    return _WATCHED.findall(text)


def _sockets() -> dict[str, int]:
    names = {fd: _target(fd) for fd in _descriptors()}
    return {name: fd for fd, name in names.items() if name.startswith("socket:")}


def _descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""  # closed meanwhile


def _listens(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as one:
            return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
