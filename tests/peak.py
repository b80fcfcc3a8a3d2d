"""How much memory a process of Linux takes at its fullest, beyond what it had."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE_BYTES = 1 << 16


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), of files now (RssFile), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def most_of_its_own() -> int:
    """Bytes of this process in memory at most, but for pages of files: code is mapped as it is first run, by
    as many pages around it as the system happens to have in its cache.
    """
    return resident("VmHWM") - resident("RssFile")


def watch_peak() -> int:
    """Forget the peak so far; returns what is resident now, but for pages of files.

    A forked process begins with its parent's peak (so does `ru_maxrss`), and with memory that the parent has
    freed and kept: that is given back, or what follows would use it and not be seen. Large blocks are given
    back as they are freed, or the peak would be that of the allocator.
    """
    gc.collect()
    c: Any = ctypes.CDLL(None)
    c.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    c.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS") - resident("RssFile")


def peak_bytes(step: Callable[[], Any]) -> int:
    """How far the memory of this process rises above what it is, at its fullest in `step`."""
    before = watch_peak()
    step()
    return most_of_its_own() - before
