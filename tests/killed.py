"""A rank that lives in shared memory and is killed in the middle of things, and what must be true of what it
leaves.

Its whole state is a function of the step, so that every byte which anybody accepts can be checked.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rayfold.faulttol.arena import Arena
from rayfold.faulttol.image import Image, examine
from rayfold.faulttol.slots import Slots
from rayfold.faulttol.snapshot import Capture
from rayfold.faulttol.vault import RankFiles

_FORK = multiprocessing.get_context("fork")
FINGERPRINT = "layout-1"


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in shared memory, where arenas and slots live; a plain one where the system has none."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="rayfold-test-", dir=parent) as folder:
        yield Path(folder)


def state_of(step: int, numel: int) -> torch.Tensor:
    """[numel] int64: what a rank's memory holds after `step`; no two steps agree anywhere."""
    return torch.arange(numel) * 2_654_435_761 + step * 1_000_003


def live(files: RankFiles, numel: int, *, steps: int, finished: Any = None) -> None:
    """Train: update in place, capture, commit, until killed or for `steps`. `finished.value` is the last
    whole step.
    """
    arena = Arena.open(files.arena)
    tensor, _ = arena.take(numel, torch.int64)
    arena.seal_index([arena.part("w", tensor, (numel,), (0,))], FINGERPRINT, 1)
    capture = Capture(arena, Slots.open(files.slots))
    for step in range(1, steps + 1) if steps else itertools.count(1):
        after = state_of(step, numel)
        arena.begin_update()
        tensor.copy_(after)
        arena.end_update(step, {"cursor": 7 * step})
        if finished is not None:
            finished.value = step
        capture.start(step, {"cursor": 7 * step})
        capture.barrier()
        capture.commit(step)


def started(work: Callable[..., None], *args: Any) -> Any:
    """A process that runs `work`; whoever starts it joins or kills it."""
    process = _FORK.Process(target=_alone, args=(work, *args), daemon=True)
    process.start()
    return process


def _alone(work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's other threads, and would wait for them
    work(*args)


def killed(work: Callable[[], None], *, after_s: float | None = None) -> int:
    """Run `work` in a process; SIGKILL it `after_s` after it started unless it does so itself. Its exit
    code.
    """
    process = started(work)
    if after_s is not None:
        process.join(after_s)
        process.kill()
    process.join(60)  # a killed process is gone at once
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def kill_at_opcode(number: int, files: tuple[str, ...], counted: Any = None) -> None:
    """SIGKILL this process when it is about to run the `number`-th bytecode instruction of `files`, on any
    thread.
    """
    count = itertools.count(1)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            here = next(count)
            if counted is not None:
                counted.value = here
            if here == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def shared_number() -> Any:
    """A number that survives the process that writes it."""
    return _FORK.Value("q", 0, lock=False)


def check_what_is_left(files: RankFiles, numel: int, finished: int) -> list[int]:
    """Every file is decidable, what is usable is bitwise of its step, and no step is lost that was promised.

    Returns the usable steps.
    """
    usable = []
    for path in files.all:
        info = examine(path)  # raises on what cannot be decided
        if not info.usable:
            continue
        with_index = Image.open(path)
        assert with_index.progress == {"cursor": 7 * info.step}
        assert with_index.fingerprint == FINGERPRINT
        content = with_index.tensor(with_index.part("w"))
        assert torch.equal(content, state_of(info.step, numel)), f"{path} is not step {info.step}"
        usable.append(info.step)
    if finished:
        # At most the step being made is lost: the arena has it, or was torn and a slot has the one before.
        assert usable, "no step is left"
        assert finished - 1 <= max(usable) <= finished + 1
    committed = [info.step for info in map(examine, files.slots) if info.state == "COMMITTED"]
    if finished > 1:
        assert committed
        assert max(committed) >= finished - 1
    return usable
