"""Where to cut a long file so that no line, or at least no character, is cut in two."""

from pathlib import Path
from typing import BinaryIO

_CHUNK = 64 * 1024


def line_cuts(path: Path, size: int, block_bytes: int) -> list[int]:
    """Byte offsets 0 .. size about `block_bytes` apart, each after a newline; a longer line stays whole."""
    cuts = [0]
    with path.open("rb") as file:
        while size - cuts[-1] > block_bytes:
            cut = _after_newline(file, cuts[-1] + block_bytes)
            if cut is None or cut >= size:
                break
            cuts.append(cut)
    return [*cuts, size] if size else [0]


def text_cuts(path: Path, size: int, block_bytes: int) -> list[int]:
    """Byte offsets 0 .. size at most `block_bytes` apart, after a newline or else between two characters."""
    cuts = [0]
    with path.open("rb") as file:
        while size - cuts[-1] > block_bytes:
            target = cuts[-1] + block_bytes
            start = max(cuts[-1] + block_bytes // 2, target - _CHUNK)
            file.seek(start)
            tail = file.read(target - start + 1)
            newline = tail.rfind(b"\n", 0, target - start)
            cuts.append(start + newline + 1 if newline >= 0 else _character_start(tail, start))
    return [*cuts, size] if size else [0]


def _after_newline(file: BinaryIO, offset: int) -> int | None:
    # From the byte before: an offset that already follows a newline is its own answer.
    file.seek(offset - 1)
    where = offset - 1
    while chunk := file.read(_CHUNK):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return where + newline + 1
        where += len(chunk)
    return None


def _character_start(tail: bytes, start: int) -> int:
    """The last offset in `tail` where a UTF-8 character starts (its later bytes are 10xxxxxx)."""
    for back in range(1, min(5, len(tail))):
        if tail[-back] & 0xC0 != 0x80:
            return start + len(tail) - back
    return start + len(tail) - 1
