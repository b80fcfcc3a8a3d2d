"""What lies in a checkpoint folder: raw tensor chunks, and a JSON index that says where each is and what its
sum is.

    step-00000100/
        index.json          progress of the run; for each tensor its dtype, global shape and chunks
        rank-00000.bin ...  the bytes of the chunks, one file a writer

Nothing is pickled. Every chunk carries a CRC-32 and the index carries a SHA-256 of itself, so that no flipped
bit or lost tail is ever loaded. No key holds a rank or a world size: the file name of a chunk is only where
it lies. No torch here: vaults write checkpoints too.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib

FORMAT_VERSION = 1
INDEX = "index.json"
DTYPES = {"float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"}  # as torch says


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is not what was written; the message says which file and how."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it belongs, where its bytes lie, and what they sum to."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    crc32: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor by its name in the unsharded model."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """The whole checkpoint but for the bytes."""

    progress: dict[str, Any]
    tensors: dict[str, TensorEntry]


def write_index(folder: Path, index: Index) -> None:
    """Write the index durably; it is the last file of a checkpoint."""
    body = json.dumps({"version": FORMAT_VERSION, **asdict(index)}, separators=(",", ":"), sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    with open(folder / INDEX, "w") as file:
        file.write(f'{{"sha256":"{seal}","index":{body}}}\n')
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: Path) -> Index:
    """Read and verify the index; raises DamagedCheckpoint."""
    path = folder / INDEX
    try:
        outer = json.loads(path.read_text())
        body = outer["index"]
        sealed = json.dumps(body, separators=(",", ":"), sort_keys=True)
        if hashlib.sha256(sealed.encode()).hexdigest() != outer["sha256"]:
            raise DamagedCheckpoint(f"{path}: its content does not match its SHA-256")
        if body["version"] != FORMAT_VERSION:
            raise DamagedCheckpoint(
                f"{path}: format version {body['version']}, this program reads {FORMAT_VERSION}"
            )
        return Index(
            body["progress"], {name: _entry(path, name, raw) for name, raw in body["tensors"].items()}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: not readable: {error!r}") from error


def _entry(path: Path, name: str, raw: dict[str, Any]) -> TensorEntry:
    chunks = tuple(
        Chunk(tuple(c["offsets"]), tuple(c["sizes"]), c["file"], c["start"], c["length"], c["crc32"])
        for c in raw["chunks"]
    )
    if raw["dtype"] not in DTYPES or any(Path(c.file).name != c.file for c in chunks):
        raise DamagedCheckpoint(f"{path}: the entry of {name} names a dtype or a file that cannot be")
    return TensorEntry(raw["dtype"], tuple(raw["shape"]), chunks)


def read_bytes(folder: Path, chunk: Chunk) -> bytearray:
    """The verified bytes of a chunk; raises DamagedCheckpoint."""
    path = folder / chunk.file
    data = bytearray(chunk.length)
    try:
        with open(path, "rb") as file:
            file.seek(chunk.start)
            got = file.readinto(data)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: not readable: {error}") from error
    if got != chunk.length:
        raise DamagedCheckpoint(
            f"{path}: {chunk.length} bytes expected at {chunk.start}, {got} there: it was cut short"
        )
    if isal_zlib.crc32(data) != chunk.crc32:
        raise DamagedCheckpoint(
            f"{path}: the bytes at {chunk.start} to {chunk.start + chunk.length} have another CRC-32"
        )
    return data
