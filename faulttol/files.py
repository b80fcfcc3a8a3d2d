"""Files of state in memory: made with all of their pages, mapped by their one writer. No torch here."""

import mmap
import os
from pathlib import Path

from .header import HEADER_BYTES, PAGE_BYTES, DamagedImage, Header, decode_static


def make_file(path: Path, nbytes: int, *, kind: str, run: str, state: str) -> None:
    """Create a file with all of its pages and a header that holds nothing yet.

    Raises FileExistsError, OSError (ENOSPC) when the file system has not that much; nothing is left then.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES + nbytes)
        with mmap.mmap(fd, HEADER_BYTES) as mapping:
            header = Header(mapping, str(path))
            header.initialise(kind, run, state)
            header.close()
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def map_file(path: Path, *, populate: bool) -> tuple[mmap.mmap, str, str]:
    """Map a file for its writer; its kind and run key. With `populate` all of its pages are present at once,
    which takes 0.2 s a gigabyte; else each is at its first use. Raises DamagedImage, OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        kind, run = decode_static(os.pread(fd, PAGE_BYTES, 0), str(path))
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES:
            raise DamagedImage(f"{path}: is cut off after {size} of {HEADER_BYTES} bytes of header")
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        return mmap.mmap(fd, size, flags=flags), kind, run
    finally:
        os.close(fd)
