"""Which images of a run lie in a node's folder: what one rank, or the node's vault, tells all the others."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .choice import Source, SourceKind
from .image import ImageInfo, inspect

SAID = {"rank", "world_size", "twin", "copies", "began"}  # of whose image one is, beside its progress
_FILES = re.compile(r".*\.(arena|slot-\d+|blob)")
_MADE_AGAIN: dict[str, SourceKind] = {"peer": "peer", "parity": "parity"}  # blobs of a lost node's ranks


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An image, and what it says of the layout that it is of."""

    source: Source
    twin: int  # the first rank with the same boxes
    copies: int  # ranks that hold the same
    began: Mapping[str, int]  # epoch -> step that it started from

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Listed":
        """Inverse of `to_json`."""
        return Listed(**{**values, "source": Source(**values["source"])})


def images_in(folder: Path, *, run: str, node: str) -> list[Listed]:
    """The images of `run` in `folder` that a rank may start from, by file name; parities are of several ranks
    and not among them. `node` is the name by which others know this one.
    """
    return list(_images_in(folder, run=run, node=node))


def _images_in(folder: Path, *, run: str, node: str) -> Iterator[Listed]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        info = inspect(path) if _FILES.fullmatch(path.name) else None
        if info is None or info.run != run or not info.usable or not info.progress.keys() >= SAID:
            continue
        said = info.progress
        source = Source(
            kind=_kind_of(path, info),
            step=info.step,
            fingerprint=info.fingerprint,
            where=f"{node}:{path}",
            rank=said["rank"],
            world_size=said["world_size"],
            epoch=info.epoch,
        )
        yield Listed(source=source, twin=said["twin"], copies=said["copies"], began=said["began"])


def _kind_of(path: Path, info: ImageInfo) -> SourceKind:
    if path.name.endswith(".blob"):
        return _MADE_AGAIN.get(path.name.partition("-")[0], "peer")
    return "arena" if info.kind == "arena" else "slot"
