"""What this machine has. No Ray and no torch here."""

import os
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shared_memory_bytes() -> int:
    """What shared memory has free; nothing where there is none."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
