"""A whole state filled at once: the right bytes wherever they go, and no damaged one unnoticed."""

import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from rayfold.faulttol.filling import fill
from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES, ArenaError, DamagedImage
from rayfold.faulttol.image import Image
from rayfold.faulttol.scatter import VIEWS, read_scattered
from rayfold.faulttol.slots import Slot

USED = 3 * CHUNK_BYTES + 777  # a last chunk that is short


def sealed(path: Path) -> np.ndarray:
    """The data of a new slot at `path`: [USED] uint8."""
    data = np.random.default_rng(1).integers(0, 256, USED, dtype=np.uint8)
    slot = Slot.create(path, USED)
    slot.begin(USED, b"")
    for chunk in range(slot.chunks()):
        slot.put(chunk, data[chunk * CHUNK_BYTES : slot.end_of(chunk)])
    slot.seal(step=1, epoch=1, fingerprint="f", progress={})
    return data


def cuts(number: int, rng: random.Random) -> list[tuple[int, int]]:
    """`number` stretches that do not overlap, in no order, some of them empty, with holes between."""
    ends = sorted(rng.randrange(USED + 1) for _ in range(2 * number))
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("number", [1, 7, 3000])
def test_every_piece_gets_its_bytes(tmp_path: Path, number: int) -> None:
    """Pieces of any size at any place, more of them in a chunk than one read takes."""
    data = sealed(tmp_path / "slot")
    image = Image.open(tmp_path / "slot")
    for seed in range(3):
        pairs = cuts(number, random.Random(seed))
        pieces = [(start, np.zeros(end - start, dtype=np.uint8)) for start, end in pairs]
        fill(image, pieces)
        for start, out in pieces:
            assert np.array_equal(out, data[start : start + len(out)])


def test_pieces_may_overlap_and_cover_all(tmp_path: Path) -> None:
    """A tensor that a rank holds twice is filled twice."""
    data = sealed(tmp_path / "slot")
    spans = [(0, USED), (5, 5), (CHUNK_BYTES - 3, CHUNK_BYTES + 9), (CHUNK_BYTES - 3, CHUNK_BYTES + 9)]
    pieces = [(start, np.zeros(end - start, dtype=np.uint8)) for start, end in spans]
    fill(Image.open(tmp_path / "slot"), pieces)
    for (start, end), (_, out) in zip(spans, pieces, strict=True):
        assert np.array_equal(out, data[start:end])


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize("between", [False, True])
def test_a_flipped_bit_in_any_touched_chunk_is_noticed(tmp_path: Path, chunk: int, between: bool) -> None:
    """Also one that lies between the pieces: a crc is of a chunk, and cannot tell whose bit it was."""
    sealed(tmp_path / "slot")
    at = chunk * CHUNK_BYTES + 100
    with open(tmp_path / "slot", "rb+") as file:
        file.seek(HEADER_BYTES + at)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + at)
        file.write(bytes([byte ^ 8]))
    spans = [(0, at), (at + 1, USED)] if between else [(0, USED)]
    pieces = [(start, np.zeros(end - start, dtype=np.uint8)) for start, end in spans]
    with pytest.raises(DamagedImage, match=f"chunk {chunk} .*has crc"):
        fill(Image.open(tmp_path / "slot"), pieces)
    elsewhere = (chunk + 1) % 4 * CHUNK_BYTES
    fill(Image.open(tmp_path / "slot"), [(elsewhere, np.zeros(50, dtype=np.uint8))])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Beyond the data, and behind the end of a file that was cut short meanwhile."""
    sealed(tmp_path / "slot")
    image = Image.open(tmp_path / "slot")
    with pytest.raises(ArenaError, match="no bytes"):
        fill(image, [(USED - 1, np.zeros(2, dtype=np.uint8))])
    with open(tmp_path / "slot", "rb+") as file:
        file.truncate(HEADER_BYTES + 2 * CHUNK_BYTES + 7)
    with pytest.raises(DamagedImage, match=f"chunk 2 is cut off at byte {2 * CHUNK_BYTES + 7} of"):
        fill(image, [(0, np.zeros(USED, dtype=np.uint8))])
    fill(image, [])


def test_a_scattered_read_sums_all_of_it(tmp_path: Path) -> None:
    """With more buffers than one call of the system takes."""
    data = np.random.default_rng(2).integers(0, 256, CHUNK_BYTES + 5, dtype=np.uint8)
    (tmp_path / "file").write_bytes(b"??" + data.tobytes())
    sizes = [1] * (3 * VIEWS) + [0, CHUNK_BYTES // 2]
    sizes.append(len(data) - sum(sizes))
    buffers = [np.zeros(size, dtype=np.uint8) for size in sizes]
    with open(tmp_path / "file", "rb") as file:
        done, crc = read_scattered(file.fileno(), 2, buffers, summed=True)
        assert (done, np.concatenate(buffers).tobytes()) == (len(data), data.tobytes())
        assert crc == zlib.crc32(data)
        beyond = [np.zeros(4, dtype=np.uint8)]
        assert read_scattered(file.fileno(), len(data), beyond, summed=False) == (2, 0)
