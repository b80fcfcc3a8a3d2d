"""Vaults: memory within a budget, found again by whoever comes next, and gone at the end."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from killed import killed, live, state_of

from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES, DamagedImage
from rayfold.faulttol.image import Image, PartIndex
from rayfold.faulttol.slots import Slot
from rayfold.faulttol.vault import Vault, VaultError, VaultFull, rank_of

MIB = 1 << 20
FILE = HEADER_BYTES + MIB  # of the sizes below


def bytes_of(step: int, length: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, length, dtype=np.uint8)


def test_a_vault_that_comes_back_finds_everything(tmp_path: Path) -> None:
    """What it knows is in the files, so its death costs nothing."""
    vault = Vault(tmp_path / "v", 64 * MIB, run="r1")
    files = vault.reserve(3, MIB)
    killed(lambda: live(files, MIB // 8, steps=4))
    vault.store("rank-00007.replica", bytes_of(1, 1000), step=4, epoch=1, fingerprint="f")
    before = vault.inventory()
    del vault
    vault = Vault(tmp_path / "v", 64 * MIB, run="r1")
    assert vault.inventory() == before
    assert [(Path(i.path).name, i.kind, i.state, i.step, rank_of(i)) for i in before] == [
        ("rank-00003.arena", "arena", "LIVE", 4, 3),
        ("rank-00003.slot-0", "slot", "COMMITTED", 3, 3),
        ("rank-00003.slot-1", "slot", "COMMITTED", 4, 3),
        ("rank-00007.replica.blob", "blob", "SEALED", 4, None),
    ]
    assert vault.used == 3 * FILE + HEADER_BYTES + 1000
    assert vault.reserve(3, MIB) == files
    assert vault.inventory() == before
    found = vault.read("rank-00003.slot-1", 80, 16, version=before[2].version)
    assert bytes(found) == state_of(4, 12)[10:].numpy().tobytes()


def test_a_reservation_grows_in_place(tmp_path: Path) -> None:
    """A larger layout needs larger files, and the step in the smaller ones is what it starts from."""
    vault = Vault(tmp_path / "v", 64 * MIB)
    files = vault.reserve(0, MIB)
    killed(lambda: live(files, MIB // 8, steps=2))
    assert vault.reserve(0, 2 * MIB) == files
    assert [info.nbytes for info in vault.inventory()] == [2 * MIB] * 3
    assert [info.step for info in vault.inventory()] == [2, 1, 2]
    image = vault.open("rank-00000.slot-1")
    assert image.tensor(image.part("w")).equal(state_of(2, MIB // 8))
    vault.reserve(0, MIB)
    assert [info.nbytes for info in vault.inventory()] == [2 * MIB] * 3


def test_the_budget_is_kept_and_said(tmp_path: Path) -> None:
    """The error has the numbers and a budget that works; nothing is left of the try."""
    vault = Vault(tmp_path / "v", 5 * FILE, slots=3)
    vault.reserve(0, MIB)
    with pytest.raises(VaultFull, match=f"Raise the budget to at least {8 * FILE}, or") as caught:
        vault.reserve(1, MIB)
    assert f"needs {4 * FILE} bytes" in str(caught.value)
    assert vault.used == 4 * FILE
    vault.store("parity", bytes_of(1, MIB), step=1, epoch=1)
    with pytest.raises(VaultFull, match="discard"):
        vault.store("parity-2", bytes_of(1, 1), step=1, epoch=1)
    vault.discard("parity")
    vault.discard("parity")
    vault.store("parity-2", bytes_of(1, 1), step=1, epoch=1)
    vault.release(0)
    vault.release(0)
    assert [info.kind for info in vault.inventory()] == ["blob"]
    vault.reserve(1, MIB // 2)


def test_a_file_system_that_is_full_is_said_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is promised and not there is a SIGBUS in the middle of an update."""
    vault = Vault(tmp_path / "v", 1 << 60)
    with pytest.raises(VaultFull, match=r"free\. Mount it larger by \d+ bytes .*--shm-size"):
        vault.reserve(0, 1 << 50)
    vault.reserve(0, MIB)

    def full(fd: int, start: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for reserve in (lambda: vault.reserve(1, MIB), lambda: vault.reserve(0, 2 * MIB)):
        with pytest.raises(VaultFull, match="No space left"):
            reserve()
    with pytest.raises(VaultFull, match="No space left"):
        vault.store("parity", b"1", step=1, epoch=1)
    assert [info.nbytes for info in vault.inventory()] == [MIB] * 3
    assert len(list(vault.folder.iterdir())) == 3


def test_replicas_and_parity_come_in_pieces_and_carry_their_index(tmp_path: Path) -> None:
    """Pieces of any size, one behind the other; the copy reads like the slot that it was made of."""
    vault = Vault(tmp_path / "v", 64 * MIB)
    data = bytes_of(5, CHUNK_BYTES + 3000)
    parts = [PartIndex("w", "uint8", (len(data),), (0,), (len(data),), 0, len(data))]
    pieces = [data[:1], data[1:5000], data[5000:-7], data[-7:]]
    path = vault.store(
        "replica", iter(pieces), nbytes=len(data), step=5, epoch=2, parts=parts, progress={"of": 3}
    )
    image = Image.open(path)
    assert (image.step, image.epoch, image.progress, image.parts()) == (5, 2, {"of": 3}, parts)
    assert image.tensor(parts[0]).numpy().tobytes() == data.tobytes()
    assert bytes(vault.read("replica", CHUNK_BYTES - 2, 5)) == data[CHUNK_BYTES - 2 :][:5].tobytes()
    for wrong in (len(data) - 1, len(data) + 1):
        with pytest.raises(VaultError, match=f"{wrong} bytes"):
            vault.store("replica", pieces, nbytes=wrong, step=6, epoch=2)
    with pytest.raises(VaultError, match="nbytes"):
        vault.store("replica", pieces, step=6, epoch=2)
    for name in ("", "../up", ".hidden", "a/b"):
        with pytest.raises(VaultError, match="no name"):
            vault.store(name, b"1", step=6, epoch=2)
    assert vault.open("replica").step == 5
    assert len(list(vault.folder.iterdir())) == 1


def test_a_store_that_is_cut_short_leaves_the_old_blob(tmp_path: Path) -> None:
    """Killed between two pieces: the blob of before is there, the unfinished one is swept up."""
    vault = Vault(tmp_path / "v", 64 * MIB)
    vault.store("replica", bytes_of(1, 9000), step=1, epoch=1)

    def work() -> None:
        def pieces() -> object:
            yield bytes_of(2, 100)
            os.kill(os.getpid(), 9)

        vault.store("replica", pieces(), nbytes=9000, step=2, epoch=1)  # type: ignore[arg-type]

    assert killed(work) == -9
    assert len(list(vault.folder.iterdir())) == 2
    vault = Vault(tmp_path / "v", 64 * MIB)
    assert [path.name for path in vault.folder.iterdir()] == ["replica.blob"]
    assert bytes(vault.read("replica", 0, 9000)) == bytes_of(1, 9000).tobytes()


def test_storing_in_place_takes_no_new_memory(tmp_path: Path) -> None:
    """Two names in turn, written over and over; a reader that is half through is told."""
    vault = Vault(tmp_path / "v", HEADER_BYTES + 9000)
    vault.store("replica", bytes_of(1, 9000), step=1, epoch=1, in_place=True)
    inode = (vault.folder / "replica.blob").stat().st_ino
    version = vault.inventory()[0].version
    vault.store("replica", bytes_of(2, 8000), step=2, epoch=1, in_place=True)
    assert (vault.folder / "replica.blob").stat().st_ino == inode
    assert bytes(vault.read("replica", 0, 8000)) == bytes_of(2, 8000).tobytes()
    with pytest.raises(DamagedImage, match="inventory"):
        vault.read("replica", 0, 8, version=version)


def test_strange_and_damaged_files_are_told_and_left_alone(tmp_path: Path) -> None:
    """A folder may hold what another run, another program or a broken memory left."""
    vault = Vault(tmp_path / "v", 64 * MIB, run="mine")
    Vault(tmp_path / "v", 64 * MIB, run="other").store("theirs", b"1", step=1, epoch=1)
    vault.store("ours", bytes_of(1, 100), step=1, epoch=1)
    (vault.folder / "notes.txt").write_text("mine")
    (vault.folder / "rank-00001.slot-0").write_bytes(b"RAYFOLD\x00 but not more")
    (vault.folder / "rank-00002.arena").mkdir()
    vault.store("flipped", bytes_of(1, 100), step=1, epoch=1)
    with (vault.folder / "flipped.blob").open("r+b") as file:
        file.seek(4096 + 20)
        file.write(b"\xff\xff")
        file.seek(4096 + 16384 + 20)
        file.write(b"\xff\xff")
    found = vault.scan()
    assert [Path(info.path).name for info in found.images] == ["ours.blob"]
    assert found.damaged.keys() == {"flipped.blob", "rank-00001.slot-0"}
    assert found.foreign.keys() == {"notes.txt", "rank-00002.arena", "theirs.blob"}
    assert "'other'" in found.foreign["theirs.blob"]
    with pytest.raises(DamagedImage, match="crc"):
        vault.read("flipped", 0, 10)
    files = vault.reserve(1, MIB)  # what cannot be opened is made again
    assert [Slot.open(path).state for path in files.slots] == ["EMPTY", "EMPTY"]


def test_a_flipped_bit_in_a_blob_is_found(tmp_path: Path) -> None:
    """Memory lies too; the chunk is named."""
    vault = Vault(tmp_path / "v", 64 * MIB)
    path = vault.store("parity", bytes_of(1, CHUNK_BYTES + 10), step=1, epoch=1)
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + CHUNK_BYTES + 4)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))
    assert vault.read("parity", 0, 10)
    with pytest.raises(DamagedImage, match=r"parity\.blob: chunk 1 "):
        vault.read("parity", CHUNK_BYTES, 10)


def test_a_closed_vault_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Memory of a run that has ended belongs to the next one; a file of somebody else stays his."""
    vault = Vault(tmp_path / "v", 64 * MIB)
    vault.reserve(0, MIB)
    vault.store("parity", b"1", step=1, epoch=1)
    vault.close(remove=False)
    assert len(vault.inventory()) == 4
    (vault.folder / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        vault.close(remove=True)
    assert [path.name for path in vault.folder.iterdir()] == ["notes.txt"]
    assert "notes.txt" in caplog.text
    (vault.folder / "notes.txt").unlink()
    vault.close(remove=True)
    assert not vault.folder.exists()
    vault.close(remove=True)
