"""What a campaign does to a process or a file of a run on this machine. Each says when and what it did, or
None where it could not.
"""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..faulttol.header import (
    COMMITTED,
    HEADER_BYTES,
    PAGE_BYTES,
    RECORD_BYTES,
    RECORDS_START,
    SEALED,
    DamagedImage,
    Record,
    Words,
)
from ..runtime.checkpoint.shelf import Shelf
from .reaper import memory_folder
from .watch import state_of, thread_state

CATCH_S = 0.2  # on the lookout for a moment within a step before the record is looked at again
FREEZE_S = 0.05  # the kernel halts a process within microseconds, unless the machine is very busy


def flip_bit(slots: Sequence[Path], draw: int) -> dict[str, Any] | None:
    """Flip one bit in the data of the newest whole slot; which one, None where there is no whole slot."""
    whole = [(record.step, path, record) for path in slots if (record := _whole(path)) is not None]
    if not whole:
        return None
    step, path, record = max(whole, key=lambda one: one[:2])
    bit = draw % (8 * record.used)
    return {**_flip(path, HEADER_BYTES + bit // 8, bit % 8), "of_step": step}


def cut_slot(slots: Sequence[Path], draw: int) -> dict[str, Any] | None:
    """Cut the newest whole slot off somewhere in its data; None where there is no whole slot."""
    whole = [(record.step, path, record) for path in slots if (record := _whole(path)) is not None]
    if not whole:
        return None
    step, path, record = max(whole, key=lambda one: one[:2])
    return {**_cut(path, HEADER_BYTES + draw % record.used), "of_step": step}


def lose_slot(slots: Sequence[Path]) -> dict[str, Any] | None:
    """Remove the newest whole slot, as a program that clears shared memory does; None where there is none."""
    whole = [(record.step, path) for path in slots if (record := _whole(path)) is not None]
    if not whole:
        return None
    step, path = max(whole)
    done = {"time_unix": time.time(), "file": str(path), "of_step": step}
    path.unlink()
    return done


def damage_checkpoint(checkpoints: Path, draw: int, *, cut: bool) -> dict[str, Any] | None:
    """Cut a file of the newest checkpoint off, or flip one of its bits; None where there is no checkpoint."""
    files = data_files(checkpoints)
    if not files:
        return None
    path = files[draw % len(files)]
    if cut:
        return _cut(path, draw % path.stat().st_size)
    bit = draw % (8 * path.stat().st_size)
    return _flip(path, bit // 8, bit % 8)


def data_files(checkpoints: Path) -> list[Path]:
    """The files with the bytes of the newest checkpoint; none where there is no checkpoint."""
    shelf = Shelf(checkpoints, keep=1)
    newest = shelf.steps()[:1]
    return [path for step in newest for path in sorted(shelf.path(step).glob("*.bin")) if path.stat().st_size]


def limit_files(pids: Sequence[int], nbytes: int) -> dict[str, Any] | None:
    """Let processes write no file beyond `nbytes`, as on a disk without room; None where all are gone.

    Files in memory that they have mapped are none that they write to. The limit goes with the process.
    """
    at, hit = time.time(), []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (nbytes, most))
            hit.append(pid)
    return {"time_unix": at, "pids": hit, "bytes": nbytes} if hit else None


def lift_limit(pids: Sequence[int]) -> None:
    """Let processes write files of any size again."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))


def title_of(pid: int) -> str:
    """What a process calls itself; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _flip(path: Path, byte: int, bit: int) -> dict[str, Any]:
    done = {"time_unix": time.time(), "file": str(path), "byte": byte, "bit": bit}
    with open(path, "rb+", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, byte)[0] ^ 1 << bit]), byte)
    return done


def _cut(path: Path, nbytes: int) -> dict[str, Any]:
    done = {"time_unix": time.time(), "file": str(path), "bytes": nbytes, "of_bytes": path.stat().st_size}
    os.truncate(path, nbytes)
    return done


def _whole(slot: Path) -> Record | None:
    """The record of a slot with a whole step in it."""
    with open(slot, "rb") as file:
        head = file.read(RECORDS_START + 2 * RECORD_BYTES)
    words = Words.decode(head[:PAGE_BYTES])
    if words.torn or words.state not in (SEALED, COMMITTED):
        return None
    start = RECORDS_START + words.version // 2 % 2 * RECORD_BYTES
    try:
        record = Record.decode(head[start : start + RECORD_BYTES], words.version, str(slot))
    except DamagedImage:
        return None  # being filled right now
    return record if record.used else None


def files_of(session: str, rank: int, what: str) -> list[Path]:
    """Files in memory of a rank. An embedded session is one node, so there is one folder that has them."""
    return sorted(Path(memory_folder(session)).glob(f"*/rank-{rank:05d}.{what}"))


def send(pids: Sequence[int], number: int) -> dict[str, Any] | None:
    """Signal processes; when and which, None where all are gone."""
    at, hit = time.time(), []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            hit.append(pid)
    return {"time_unix": at, "pids": hit, "signal": name_of(number)} if hit else None


def name_of(number: int) -> str:
    """What a signal is called."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def kill_when(pid: int, files: Sequence[Path], moment: Callable[[Words], bool]) -> dict[str, Any] | None:
    """Kill a process while one of its files is as `moment` says; None when that did not come in `CATCH_S`.

    The moment lasts as short as a look. So the process is halted first, looked at again while nothing can
    move, and goes on if it was too late; it is halted for much shorter than what counts as stopped.
    """
    with contextlib.ExitStack() as opened:
        handles = [opened.enter_context(open(path, "rb", buffering=0)).fileno() for path in files]
        deadline = time.monotonic() + CATCH_S
        while time.monotonic() < deadline:
            if not any(moment(_words(handle)) for handle in handles):
                continue
            at = time.time()
            try:
                os.kill(pid, signal.SIGSTOP)
                halted = _halted(pid)
                if halted and any(moment(_words(handle)) for handle in handles):
                    os.kill(pid, signal.SIGKILL)
                    return {"time_unix": at, "pids": [pid], "signal": signal.SIGKILL.name}
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                return None
    return None


def _words(handle: int) -> Words:
    return Words.decode(os.pread(handle, PAGE_BYTES, 0))


def _halted(pid: int) -> bool:
    """Whether every thread of a process has come to a halt, given a moment."""
    deadline = time.monotonic() + FREEZE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            threads = os.listdir(f"/proc/{pid}/task")
            if all(thread_state(pid, int(thread)) in ("T", "") for thread in threads):
                return bool(state_of(pid)[0])
    return False
