"""The bytes of protection: parities out of blocks that lie on other nodes, and lost blocks out of parities.

All of it goes through memory piece by piece, whatever the size of a node's state. Where pieces come from is
the caller's `Fetch`. Blocks are checked against the checksums that their nodes gave when the step was pinned,
what is made again against the same, and files besides by their own.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from isal import isal_zlib

from .erasure import ErasureError, encode, solve
from .galois import Bytes
from .header import CHUNK_BYTES, DamagedImage, ImageError
from .image import Image
from .protection import BlockRecipe, NotProtected, Parity, Recipe

PIECE_BYTES = 4 << 20  # of each block at a time: ten of them come at once at most


@dataclass(frozen=True)
class Want:
    """A part of a node's files laid one behind the other, or of the data of a blob there."""

    node: str
    start: int
    length: int
    files: tuple[tuple[str, int], ...] = ()
    blob: str = ""


Fetch: TypeAlias = Callable[[Sequence[Want]], list[bytes | ImageError]]  # what is wanted, or why it is not


def parity_pieces(parity: Parity, fetch: Fetch) -> Iterator[Bytes]:
    """The parity, piece by piece. Raises DamagedImage after the last one if a block was not what it should
    have been, and what a fetch found at any time.
    """
    blocks, crcs = parity.blocks, [0] * len(parity.blocks)
    for at in range(0, parity.length, PIECE_BYTES):
        sizes = [min(PIECE_BYTES, max(0, block.length - at)) for block in blocks]
        wants = [
            Want(block.node, block.start + at, size, parity.files[block.node])
            for block, size in zip(blocks, sizes, strict=True)
        ]
        data = []
        for number, piece in enumerate(fetch(wants)):
            if isinstance(piece, ImageError):
                raise piece
            crcs[number] = isal_zlib.crc32(piece, crcs[number])
            data.append(piece)
        yield encode(data, 1)[0] if parity.number == 0 else encode(data, 2)[1]
    wrong = sorted({block.node for block, crc in zip(blocks, crcs, strict=True) if block.crc != crc})
    if wrong:
        raise DamagedImage(
            f"stripe {parity.stripe} of step {parity.step}: what came from {', '.join(wrong)} is not what "
            "was pinned there"
        )


def make_again(recipe: Recipe, folder: Path, fetch: Fetch) -> list[Path]:
    """Make the files of a lost node in `folder`, as images that its ranks could have written.

    Raises NotProtected, with the reason, when too much of what they are made of is damaged or gone; OSError.
    """
    names = {name: f"{recipe.kind}-{name.partition('.')[0]}.blob" for name, _ in recipe.files}
    parts = {name: folder / f"{final}.part" for name, final in names.items()}
    try:
        with _Writer(recipe.files, parts) as writer:
            for block in recipe.blocks:
                _make_block(block, recipe, fetch, writer)
        made = []
        for name, part in parts.items():
            _verify(part)
            os.rename(part, folder / names[name])
            made.append(folder / names[name])
        return made
    except DamagedImage as damage:
        raise NotProtected(f"node {recipe.node}, step {recipe.step}: {damage}") from damage
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _make_block(recipe: BlockRecipe, whole: Recipe, fetch: Fetch, writer: "_Writer") -> None:
    """One block, without what turns out to be damaged, for as long as parities last."""
    left_out: set[str] = set()
    while True:
        found = _try_block(recipe, fetch, writer, left_out)
        if not found:
            return
        left_out |= found
        parities = [each for each in recipe.parities if f"{each.holder} {each.blob}" not in left_out]
        gone = recipe.gone | {i for i, block in enumerate(recipe.stripe) if block.node in left_out}
        if len(gone) > len(parities):
            raise NotProtected(
                f"step {whole.step} of node {whole.node} cannot be made again: what is left on "
                f"{', '.join(sorted(left_out))} is damaged or cannot be had, and the stripe had "
                f"{len(recipe.parities)} parities for {len(recipe.gone)} lost blocks"
            )


def _try_block(recipe: BlockRecipe, fetch: Fetch, writer: "_Writer", left_out: Collection[str]) -> set[str]:
    """Make a block; the names of what it must not be made of, and then it is not right."""
    parities = [each for each in recipe.parities if f"{each.holder} {each.blob}" not in left_out]
    present = [
        i for i, block in enumerate(recipe.stripe) if i not in recipe.gone and block.node not in left_out
    ]
    crcs = dict.fromkeys(present, 0)
    made_crc = 0
    lengths = [block.length for block in recipe.stripe]
    for at in range(0, max(lengths), PIECE_BYTES):
        sizes = [min(PIECE_BYTES, max(0, length - at)) for length in lengths]
        wants = []
        for i in present:
            block = recipe.stripe[i]
            wants.append(Want(block.node, block.start + at, sizes[i], parities[0].parity.files[block.node]))
        wants += [Want(each.holder, at, max(sizes), blob=each.blob) for each in parities]
        pieces = fetch(wants)
        known = [recipe.stripe[i].node for i in present] + [f"{p.holder} {p.blob}" for p in parities]
        if failed := {
            name for name, piece in zip(known, pieces, strict=True) if isinstance(piece, ImageError)
        }:
            return failed
        good = [piece for piece in pieces if isinstance(piece, bytes)]  # all of them
        data = dict(zip([*present, *(len(lengths) + p.parity.number for p in parities)], good, strict=True))
        for i in present:
            crcs[i] = isal_zlib.crc32(data[i], crcs[i])
        try:
            made = solve(data, sizes, parities=recipe.parities[0].parity.parities)[recipe.wanted]
        except ErasureError as error:
            raise NotProtected(str(error)) from error
        made_crc = isal_zlib.crc32(made.data, made_crc)
        writer.write(recipe.block.start + at, made)
    if made_crc == recipe.block.crc:
        return set()
    wrong = {recipe.stripe[i].node for i, crc in crcs.items() if crc != recipe.stripe[i].crc}
    # all blocks are right: then it is a parity that is not
    return wrong or {f"{each.holder} {each.blob}" for each in parities[:1]}


def _verify(path: Path) -> None:
    """Read all of an image. Raises DamagedImage, TornImage."""
    image = Image.open(path)
    for start in range(0, image.nbytes, CHUNK_BYTES):
        image.read(start, min(CHUNK_BYTES, image.nbytes - start))


class _Writer:
    """Writes into files laid one behind the other."""

    def __init__(self, files: Sequence[tuple[str, int]], paths: Mapping[str, Path]) -> None:
        self._files = [(paths[name], size) for name, size in files]
        self._handles: list[int] = []

    def __enter__(self) -> "_Writer":
        for path, size in self._files:
            self._handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            os.posix_fallocate(self._handles[-1], 0, size)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)

    def write(self, start: int, data: Bytes) -> None:
        """Put `data` at `start` of the whole."""
        begin, view = 0, data.data
        for handle, (_, size) in zip(self._handles, self._files, strict=True):
            first, last = max(start, begin), min(start + len(view), begin + size)
            done = first
            while done < last:
                done += os.pwrite(handle, view[done - start : last - start], done - begin)
            begin += size
