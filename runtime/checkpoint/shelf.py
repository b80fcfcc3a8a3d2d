"""The checkpoints of a run on disk: which stand, which is newest, and how one comes to stand.

A checkpoint is written into `step-N.partial` and renamed to `step-N` when all of it is durable, so a kill at
any instant leaves the last good one. An old one is renamed away before it is deleted, so that half of one
never looks whole.
"""

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})")
PARTIAL, DOOMED = ".partial", ".deleting"


class Shelf:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self._keep = keep

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
        """Where it is written."""
        return self.folder / (self.path(step).name + PARTIAL)

    def clear_leftovers(self) -> None:
        """Delete what a killed run left half written or half deleted. Call before any writer starts."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.endswith((PARTIAL, DOOMED)):
                    shutil.rmtree(path, ignore_errors=True)

    def commit(self, partial: Path) -> None:
        """Make a fully written checkpoint count, then let go of those beyond `keep`."""
        final = partial.with_suffix("")
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
