"""The memory of a run that came to no end, for the run that goes on in its place on the same machine.

When a whole Ray cluster is lost, the files of state stay where they were. Whoever goes on takes the folders
over as they are: a folder is renamed, and each file is told in its header whose it is now. Nothing is copied
and no memory is needed for it; from then on the files are as if its own ranks had left them, and what it does
not need it lets go of as it always does.

Nobody may write any more: a process that still has a file of the folder mapped is one of the dead cluster's,
whose controller is gone, and is ended first.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .header import encode_static
from .image import inspect
from .pins import header_of
from .protection import PROTECTS
from .untold import UNTOLD
from .vault import BLOB_FILE, RANK_FILE

TAKEN = ".taken"  # how a folder ends that was taken over, while its files are moved
ENDED_S = 10.0  # for processes that were killed to be gone; one that waits for a disk takes seconds
LOOK_EVERY_S = 0.05
PROCESSES = Path("/proc")


class StillWritten(OSError):
    """A process that cannot be ended still writes the files."""


def inherit(states: Sequence[Path], into: Path, *, run: str) -> int:
    """Move the files of all nodes' folders in `states` into `into`, as files of `run`; their bytes.

    Each of `states` is all that a former run had on this machine, named after it, and is gone afterwards.
    What cannot be used is removed. Several callers may share a machine: each folder goes to one of them.
    Where ranks are at work in `into` already nothing is taken, as it might replace what is theirs.
    Raises StillWritten and OSError; what was not taken by then stays as it is.
    """
    if any(into.glob("rank-*")) and not any(into.glob(f"*{TAKEN}")):
        return 0
    for state in states:
        for folder in sorted(state.iterdir()) if state.is_dir() else ():
            if folder.is_dir():
                end_writers(folder)
                with contextlib.suppress(FileNotFoundError):  # another one was faster
                    os.rename(folder, into / f"{folder.name}{TAKEN}")
            else:
                folder.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone, or not empty yet
            state.rmdir()
    return sum(_unpack(folder, into, run) for folder in sorted(into.glob(f"*{TAKEN}")))


def rest_of(state: Path) -> bool:
    """Whether a former run has left something in `state`."""
    return state.is_dir() and any(folder.is_dir() for folder in state.iterdir())


def remove(state: Path) -> bool:
    """Remove all that a former run has left; whether there was something. Raises StillWritten."""
    if not state.is_dir():
        return False
    end_writers(state)
    shutil.rmtree(state, ignore_errors=True)
    return True


def end_writers(folder: Path) -> None:
    """End the processes that have a file below `folder` mapped to write. Raises StillWritten."""
    deadline = time.monotonic() + ENDED_S
    while pids := list(writers_of(folder)):
        if time.monotonic() > deadline:
            raise StillWritten(f"{folder}: is still written by {pids}, which did not end when killed")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S)


def writers_of(folder: Path) -> Iterator[int]:
    """The other processes that have a file below `folder` mapped to write; none where there is no /proc, and
    none of other users, whose files these cannot be.
    """
    below = f" {os.path.realpath(folder)}/"
    for process in PROCESSES.iterdir() if PROCESSES.is_dir() else ():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            mapped = (process / "maps").read_text(errors="replace")
        except OSError:
            continue  # gone meanwhile, or another user's
        if any(below in line and "w" in line.split(" ", 2)[1] for line in mapped.splitlines()):
            yield int(process.name)


def _unpack(folder: Path, into: Path, run: str) -> int:
    """Move the files of a folder that was taken over up to `into`, and remove it; their bytes."""
    end_writers(folder)  # one may have mapped a file just before the folder was taken
    size = sum(_unpack(nested, into, run) for nested in sorted(folder.glob(f"*{TAKEN}")))
    ranks: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := RANK_FILE.fullmatch(path.name)) and _name_anew(path, run):
            ranks.setdefault(match[1], []).append(path)
        elif path.name == UNTOLD:
            with open(into / UNTOLD, "ab") as lines:
                lines.write(b"\n" + path.read_bytes())
            path.unlink()
        elif BLOB_FILE.fullmatch(path.name) and not (into / path.name).exists() and _name_anew(path, run):
            size += _move(path, into / path.name)
        else:
            path.unlink()
    for rank, files in ranks.items():
        there = sorted(into.glob(f"rank-{rank}.*"))
        if there and _age(there) >= _age(files):
            continue  # left behind when the rank moved to another node
        for path in there:
            path.unlink()
        size += sum(_move(path, into / path.name) for path in files)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return size


def _name_anew(path: Path, run: str) -> bool:
    """Make the file one of `run`, which nobody has asked to keep anything; False where it is of no use."""
    info = inspect(path)
    if info is None or PROTECTS in info.progress:  # parities name nodes that are no more
        return False
    with open(path, "r+b", buffering=0) as file:
        file.write(encode_static(info.kind, run))
    if info.kind == "slot":
        with header_of(path) as header:
            header.kept = header.awaited = header.due = header.written = -1
    return True


def _age(files: Sequence[Path]) -> tuple[int, int]:
    """Epoch and step of the newest image among files."""
    found = [info for path in files if (info := inspect(path)) is not None and info.usable]
    return max(((info.epoch, info.step) for info in found), default=(-1, -1))


def _move(path: Path, to: Path) -> int:
    os.rename(path, to)
    return to.stat().st_size
