"""Images on other nodes: fetched when they are opened, and held no longer than they are read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rayfold.faulttol.header import HEADER_BYTES, DamagedImage, ImageError
from rayfold.faulttol.listing import images_in
from rayfold.faulttol.slots import Slot
from rayfold.faulttol.vault import RankFiles, Vault
from rayfold.runtime.place import SnapshotPlace


def fill(slot: Slot, rank: int, step: int) -> None:
    slot.begin(100, b"")
    slot.put(0, np.full(100, rank, np.uint8))
    said = {"rank": rank, "world_size": 2, "twin": rank, "copies": 1, "began": {"1": 0}}
    slot.seal(step=step, epoch=2, fingerprint="f", progress=said)


def no_room(rank: int, nbytes: int) -> RankFiles:
    raise AssertionError("nothing is reserved here")


def place_of(folder: Path, fetch: Callable[[str], Path] | None) -> SnapshotPlace:
    return SnapshotPlace(run="r", node="here", folder=folder, epoch=3, reserve=no_room, fetch=fetch)


def test_what_is_fetched_goes_when_it_has_been_read(tmp_path: Path) -> None:
    """A copy of another node's image takes memory of this one, so it is nobody's file any more once open."""
    there = Vault(tmp_path / "there", 1 << 30, run="r")
    path = there.reserve(0, 100).slots[0]
    fill(Slot.open(path), 0, 7)
    copy = tmp_path / "copy"

    def fetch(where: str) -> Path:
        assert where == f"there:{path}"
        return Path(shutil.copy(path, copy))

    place = place_of(tmp_path / "here", fetch)
    image = place.open(f"there:{path}")
    assert not copy.exists()
    assert bytes(image.read(0, 100)) == bytes(100)
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"!")
    with pytest.raises(DamagedImage):
        place.open(f"there:{path}").read(0, 100)
    path.write_bytes(b"too short")
    with pytest.raises(ImageError):
        place.open(f"there:{path}")
    assert not copy.exists()
    with pytest.raises(FileNotFoundError, match="another node"):
        place_of(tmp_path, None).open(f"there:{path}")


def test_a_folder_lists_its_images_by_where_they_come_from(tmp_path: Path) -> None:
    """A slot of a rank, what was made again of a lost node; nothing of another run or of several ranks."""
    vault = Vault(tmp_path, 1 << 30, run="r", slots=2)
    files = vault.reserve(1, 100)
    fill(Slot.open(files.slots[1]), 1, 5)
    for name, rank in (("peer-rank-00002.blob", 2), ("parity-rank-00003.blob", 3)):
        fill(Slot.create(tmp_path / name, 100, run="r"), rank, 4)
    fill(Slot.create(tmp_path / "parity-rank-00004.blob", 100, run="another"), 4, 4)
    vault.store("parity-0-1-p", bytes(10), step=4, epoch=2, progress={"protects": {}})
    listed = images_in(tmp_path, run="r", node="n")
    told = [(image.source.kind, image.source.rank, image.source.step) for image in listed]
    assert told == [("parity", 3, 4), ("peer", 2, 4), ("slot", 1, 5)]
    assert listed[2].source.where == f"n:{files.slots[1]}"
    assert listed == [type(image).from_json(image.to_json()) for image in listed]
