"""What whoever starts a rank gives to it: where its snapshots lie, and what stays of the attempt before.

An attempt is one life of the training loop in a process. The files are a node's: they outlive the process,
and the ones of a rank that moved are read where they are.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..faulttol.image import Image
from ..faulttol.listing import Listed
from ..faulttol.vault import RankFiles
from .corpus import Corpus

LINES_KEPT = 256  # of metrics, in case the process that records them dies with some untold


@dataclass(frozen=True, kw_only=True)
class SnapshotPlace:
    """Where a rank keeps its state in memory, and how it gets what lies on other nodes."""

    run: str  # key of the run, in every header
    node: str  # name of this node among those of the run; no colon in it
    folder: Path  # files of this node, of any rank
    epoch: int
    # (rank, bytes of data) -> files with that much room, those of an earlier life as they are where they fit.
    # Raises OSError or ImageError where there is no memory.
    reserve: Callable[[int, int], RankFiles]
    elsewhere: tuple[Listed, ...] = ()  # images on nodes that have no rank to tell of them
    # `where` of an image on another node ("<node>:<path>") -> a copy of the file on this one, for its caller
    # alone. Raises OSError where it cannot be had.
    fetch: Callable[[str], Path] | None = None
    newest: int = 0  # step that is known to be finished
    recorded: int | None = None  # last step in the record of the run, where whoever starts the rank knows it
    began: Mapping[int, int] = field(default_factory=dict)  # epoch -> step, beyond what images here know
    writes: bool = False  # whether whoever keeps the files also writes what is due to disk
    durable: int = 0  # newest step that is known to be on disk; the same on all ranks
    leaving: Callable[[], bool] = lambda: False  # whether the rank is to wait for nothing any more
    mtbf_s: float = 3600.0  # expected time between failures; the same on all ranks

    def where(self, path: Path) -> str:
        """A file of this node, for all ranks."""
        return f"{self.node}:{path}"

    def open(self, where: str) -> Image:
        """An image on any node; what had to be fetched is held for as long as the image is.

        Raises what `Image.open` raises, and OSError.
        """
        node, _, path = where.partition(":")
        if node == self.node:
            return Image.open(path)
        if self.fetch is None:
            raise FileNotFoundError(f"{where}: lies on another node, and nobody here can fetch it")
        copy = self.fetch(where)
        try:
            return Image.open(copy)
        finally:
            copy.unlink()  # the memory goes when the image does


@dataclass
class Warm:
    """What a process keeps from one attempt to the next."""

    corpus: Corpus | None = None
    lines: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
