"""The checkpoints of a run on disk: which stand, which is newest, and how one comes to stand.

A checkpoint is written into `step-N.partial` and renamed to `step-N` when all of it is durable, so a kill at
any instant leaves the last good one. An old one is renamed away before it is deleted, so that half of one
never looks whole.
"""

import errno
import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})")
PARTIAL, DOOMED = ".partial", ".deleting"
_LEFT = re.compile(rf"step-\d{{8,}}(?:\.([a-z]+))?({re.escape(PARTIAL)}|{re.escape(DOOMED)})")
# no room, no room for this user, too large a file, a broken disk, one mounted read-only
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


def is_of_disk(error: BaseException | None) -> bool:
    """Whether a disk is full, or refuses to be written to."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


class Shelf:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, *, keep: int, writer: str = "") -> None:
        """`writer`: a word of letters that names who writes, where there may be another."""
        self.folder = folder
        self._keep = keep
        self._writer = writer

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` stands when it is committed."""
        return self.folder / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is written; `writer` tells apart those that may be at work at the same time."""
        writer = f".{self._writer}" if self._writer else ""
        return self.folder / f"{self.path(step).name}{writer}{PARTIAL}"

    def clear_leftovers(self) -> None:
        """Delete what a killed run left half written, by a writer of this name, or half deleted. Call before
        the writer starts.
        """
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                match = _LEFT.fullmatch(path.name)
                if match and (match[2] == DOOMED or (match[1] or "") == self._writer):
                    shutil.rmtree(path, ignore_errors=True)

    def commit(self, step: int) -> None:
        """Make a fully written checkpoint count, then let go of those beyond `keep`."""
        partial, final = self.partial(step), self.path(step)
        if final.exists():  # written again after a damaged one of the same step was left behind
            self._delete(final)
        _sync_folder(partial)
        os.rename(partial, final)
        _sync_folder(self.folder)
        for step in self.steps()[self._keep :]:
            self._delete(self.path(step))

    def _delete(self, path: Path) -> None:
        doomed = path.with_name(path.name + DOOMED)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, not only the bytes of its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
