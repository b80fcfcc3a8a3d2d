"""A vault keeps the files of one node: arenas and slots of its ranks, replicas and parity of others'.

Everything it knows is in the files: a vault that is made again over the same folder goes on where the last
one ended. It is bounded by a budget of bytes, and takes only what the file system really has.
"""

import logging
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .files import make_file
from .header import EMPTY, HEADER_BYTES, LIVE, PAGE_BYTES, DamagedImage, ImageError, decode_static
from .image import Image, ImageInfo, PartIndex, encode_index, examine
from .slots import Slot

logger = logging.getLogger(__name__)

Bytes = bytes | bytearray | memoryview | mmap.mmap | np.ndarray

RANK_FILE = re.compile(r"rank-(\d{5,})\.(arena|slot)(-\d+)?")
BLOB_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.blob")
_UNFINISHED = ".part"
STAT_BLOCK_BYTES = 512  # of `st_blocks`, whatever a file system's own blocks are


class VaultError(ImageError):
    """A name or a size that a vault cannot keep.

    └── VaultFull   the budget or the file system has no room
    """


class VaultFull(VaultError):
    """The budget or the file system has no room; the message has the numbers and the nearest remedy."""


@dataclass(frozen=True)
class RankFiles:
    """The files of one rank. Written by its worker alone."""

    arena: Path
    slots: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """Arena first."""
        return (self.arena, *self.slots)


@dataclass(frozen=True)
class Holdings:
    """What a scan of the folder found."""

    images: list[ImageInfo] = field(default_factory=list)  # of this run, by name; torn and empty ones too
    damaged: dict[str, str] = field(default_factory=dict)  # file name -> what is wrong with it
    foreign: dict[str, str] = field(default_factory=dict)  # file name -> why it is not of this vault


class Vault:
    """The keeper of `folder`, which holds nothing but its files. One process, one thread at a time.

    `budget` is in bytes, headers included. Files in the folder that are not a vault's are never touched.
    """

    def __init__(self, folder: str | Path, budget: int, *, run: str = "", slots: int = 2) -> None:
        self.folder = Path(folder)
        self.budget = budget
        self.run = run
        self._slots = slots
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._own(unfinished=True):  # of a vault that was killed in the middle of a store
            path.unlink(missing_ok=True)

    def files_of(self, rank: int) -> RankFiles:
        """Where the files of a rank are, or would be."""
        stem = self.folder / f"rank-{rank:05d}"
        slots = tuple(stem.with_suffix(f".slot-{number}") for number in range(self._slots))
        return RankFiles(stem.with_suffix(".arena"), slots)

    def reserve(self, rank: int, nbytes: int, *, beside: float = 0.0) -> RankFiles:
        """Files with room for `nbytes` of state: an arena and the slots. Those of this run that are there
        stay, with their content; a smaller one grows in place. Room for `beside` times a copy is left, for
        blobs.

        Raises VaultFull; nothing that was there has changed then.
        """
        files = self.files_of(rank)
        size = HEADER_BYTES + nbytes
        what = f"rank {rank}: an arena and {self._slots} slots for {nbytes} bytes of state"
        kept = {path: _size(path) for path in files.all if self._is_own(path)}
        lost = sum(_size(path) for path in files.all if path not in kept)
        more = sum(max(0, size - kept.get(path, 0)) for path in files.all)
        left = max(0, int(beside * (size + self._one_copy(files.arena))) - self._blob_bytes())
        if left:
            what += f", with {left} bytes left for what protects other nodes,"
        if more:  # what is there may stay, whatever has become of the other nodes
            self._check_room(what, more + left, lost, "use more ranks or nodes, or fewer slots")
        done: list[Path] = []
        try:
            for path in files.all:
                done.append(path)
                if path in kept:
                    _resize(path, max(size, kept[path]))
                    continue
                path.unlink(missing_ok=True)
                kind, state = ("arena", LIVE) if path == files.arena else ("slot", EMPTY)
                make_file(path, nbytes, kind=kind, run=self.run, state=state)
        except OSError as error:
            for path in done:
                if path in kept:
                    os.truncate(path, kept[path])
                else:
                    path.unlink(missing_ok=True)
            raise VaultFull(f"{what}: {error.strerror} in {self.folder}; {self._room()}") from error
        return files

    def release(self, rank: int) -> None:
        """Remove the files of a rank. A process that has them mapped keeps its memory until it ends."""
        for path in self.folder.glob(f"rank-{rank:05d}.*"):
            path.unlink(missing_ok=True)

    def scan(self) -> Holdings:
        """What is in the folder now, by header. Data is verified when it is read."""
        found = Holdings()
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(_UNFINISHED):
                continue
            if not (RANK_FILE.fullmatch(path.name) or BLOB_FILE.fullmatch(path.name)):
                found.foreign[path.name] = "its name is none of a vault's"
                continue
            try:
                info = examine(path)
            except DamagedImage as damage:
                found.damaged[path.name] = str(damage)
            except OSError as error:  # gone since, or a folder
                found.foreign[path.name] = str(error)
            else:
                if info.run == self.run:
                    found.images.append(info)
                else:
                    found.foreign[path.name] = f"is of run {info.run!r}, this vault of {self.run!r}"
        return found

    def inventory(self) -> list[ImageInfo]:
        """The files of this run whose headers are whole. Damaged and foreign ones are in `scan`."""
        return self.scan().images

    def open(self, name: str) -> Image:
        """A file of this vault by its name ("rank-00003.slot-0") or a blob by the name it was stored under.

        Raises FileNotFoundError, TornImage, DamagedImage, VaultError.
        """
        return Image.open(self._path(name))

    def read(self, name: str, start: int, length: int, *, version: int | None = None) -> memoryview:
        """Verified bytes of the data. With `version`, from an ImageInfo, those of that filling and no later
        one.

        Raises what `open` and `Image.read` raise.
        """
        image = self.open(name)
        if version is not None and image.info.version != version:
            raise DamagedImage(
                f"{self.folder / name}: was filled again: version {image.info.version} of step {image.step}, "
                f"not {version}. Take the inventory again."
            )
        return image.read(start, length)

    def store(
        self,
        name: str,
        data: Bytes | Iterable[Bytes],
        *,
        nbytes: int | None = None,
        step: int,
        epoch: int,
        fingerprint: str = "",
        parts: Sequence[PartIndex] = (),
        progress: dict[str, Any] | None = None,
        in_place: bool = False,
    ) -> Path:
        """Keep a replica or a parity of another rank's bytes, checksummed, under `name`; `data` may come in
        pieces that make `nbytes` together.

        What had the name stays whole until the new one is, which takes room for both. `in_place` overwrites
        it: no new memory, and nothing of that name if this is interrupted; take two names in turn. Raises
        VaultFull, VaultError.
        """
        pieces: Iterable[Bytes] = [data] if isinstance(data, Bytes) else data
        if nbytes is None:
            if not isinstance(data, Bytes):
                raise VaultError(f"{name}: data that comes in pieces needs nbytes")
            nbytes = np.frombuffer(data, dtype=np.uint8).nbytes
        final = self._path(name, blob=True)
        reuse = in_place and _size(final) >= HEADER_BYTES + nbytes and self._is_own(final)
        path = final if reuse else final.with_name(final.name + _UNFINISHED)
        try:
            slot = Slot.open(path) if reuse else self._create(path, nbytes)
            slot.begin(nbytes, encode_index(parts) if parts else b"")
            _pour(slot, pieces, nbytes, name)
            slot.seal(step=step, epoch=epoch, fingerprint=fingerprint, progress=progress or {})
            os.rename(path, final)
        except BaseException:
            if not reuse:
                path.unlink(missing_ok=True)
            raise
        return final

    def discard(self, name: str) -> None:
        """Remove a blob; one that is not there is as good."""
        self._path(name, blob=True).unlink(missing_ok=True)

    def check_room(self, what: str, nbytes: int) -> None:
        """Raise VaultFull unless `nbytes` more fit."""
        self._check_room(what, nbytes, 0, "discard older blobs")

    @property
    def used(self) -> int:
        """Bytes of the budget in use."""
        return sum(_size(path) for path in self._own())

    def close(self, *, remove: bool) -> None:
        """With `remove`, delete every file of a vault here, and the folder unless others put something into
        it.
        """
        if not remove or not self.folder.exists():
            return
        for path in self._own():
            path.unlink(missing_ok=True)
        if left := sorted(path.name for path in self.folder.iterdir()):
            logger.warning("vault folder=%s is kept: not of a vault: %s", self.folder, ", ".join(left))
            return
        self.folder.rmdir()

    def _one_copy(self, without: Path) -> int:
        """Bytes of one copy of each rank but that of the arena `without`."""
        return sum(_size(path) for path in self.folder.glob("rank-*.arena") if path != without)

    def _blob_bytes(self) -> int:
        return sum(_size(path) for path in self.folder.glob("*.blob"))

    def _own(self, *, unfinished: bool = False) -> list[Path]:
        """Files with a name of a vault's; with `unfinished` only those of a store that has not ended."""
        own = []
        for path in self.folder.iterdir():
            name = path.name.removesuffix(_UNFINISHED)
            known = BLOB_FILE.fullmatch(name) or (name == path.name and RANK_FILE.fullmatch(name))
            if known and path.is_file() and (not unfinished or name != path.name):
                own.append(path)
        return own

    def _path(self, name: str, *, blob: bool = False) -> Path:
        if not blob and RANK_FILE.fullmatch(name):
            return self.folder / name
        file = name if name.endswith(".blob") else f"{name}.blob"
        if not BLOB_FILE.fullmatch(file):
            raise VaultError(f"{name!r} is no name of a blob: letters, digits, '.', '_' and '-' make one")
        return self.folder / file

    def _is_own(self, path: Path) -> bool:
        """Whether this can be opened by its writer and is of this run."""
        try:
            with path.open("rb") as file:
                run = decode_static(file.read(PAGE_BYTES), str(path))[1]
            return run == self.run and _size(path) >= HEADER_BYTES
        except (OSError, DamagedImage):
            return False

    def _create(self, path: Path, nbytes: int) -> Slot:
        what = f"{path.name.removesuffix(_UNFINISHED)}: {nbytes} bytes"
        more = HEADER_BYTES + nbytes
        self._check_room(what, more, 0, "discard older blobs, or protect with parity instead of replicas")
        try:
            return Slot.create(path, nbytes, run=self.run, kind="blob")
        except OSError as error:
            raise VaultFull(f"{what}: {error.strerror} in {self.folder}; {self._room()}") from error

    def _check_room(self, what: str, more: int, lost: int, remedy: str) -> None:
        """Raise VaultFull unless `more` bytes fit once `lost` are gone."""
        used = self.used - lost
        if used + more > self.budget:
            raise VaultFull(
                f"{what} needs {more} bytes; the budget of this node is {self.budget}, of which {used} are "
                f"used. Raise the budget to at least {used + more}, or {remedy}."
            )
        free = _free(self.folder) + lost
        if more > free:
            raise VaultFull(
                f"{what} needs {more} bytes; {self.folder} has {free} free. Mount it larger by {more - free} "
                f"bytes (containers: --shm-size), or {remedy}."
            )

    def _room(self) -> str:
        free = _free(self.folder)
        return f"{self.used} bytes of a budget of {self.budget} are used, and the file system has {free} free"


def rank_of(info: ImageInfo) -> int | None:
    """The rank whose arena or slot this is; None for blobs."""
    match = RANK_FILE.fullmatch(Path(info.path).name)
    return int(match[1]) if match else None


def _pour(slot: Slot, pieces: Iterable[Bytes], total: int, name: str) -> None:
    """Put the pieces one behind the other."""
    end = 0
    summed = 0
    for piece in pieces:
        view = np.frombuffer(piece, dtype=np.uint8)
        if end + len(view) > total:
            raise VaultError(f"{name}: more than the {total} bytes that were announced")
        slot.put_at(end, view)
        end += len(view)
        while summed < slot.chunks() and slot.end_of(summed) <= end:  # hot, as far as the pieces allow
            slot.sum_chunk(summed)
            summed += 1
    if end != total:
        raise VaultError(f"{name}: {end} of the {total} bytes that were announced")


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _free(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _resize(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        there = os.fstat(fd)
        # to be told that all pages are there takes 60 ms a gigabyte, while the run is down
        if there.st_size < size or there.st_blocks * STAT_BLOCK_BYTES < there.st_size:
            os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
