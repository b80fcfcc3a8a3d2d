"""Writing one tokenized shard so that it is either whole under its name or not there."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from .ragged import Ragged, join_ragged

Rows: TypeAlias = tuple[
    Ragged, npt.NDArray[np.uint64]
]  # documents as token ids, and the hash of each one's text

BATCH_BYTES = 4 << 20  # of tokens in a record batch: what a reader decodes at a time


def write_shard(path: Path, parts: Iterable[Rows], dtype: Any) -> dict[str, Any]:
    """Write token rows and keys as record batches; returns rows, tokens, batches and the file's sha256."""
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype))), ("key", pa.uint64())])
    unfinished = path.with_suffix(".tmp")
    batches = []
    with unfinished.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for tokens, keys in _batched(parts, np.dtype(dtype).itemsize):
                writer.write_batch(_record_batch(tokens, keys, schema))
                batches.append([len(tokens), len(tokens.values), tokens.crc32()])
        file.flush()
        os.fsync(file.fileno())
    digest = file_sha256(unfinished)
    put_in_place(unfinished, path)
    return {
        "name": path.name,
        "rows": sum(rows for rows, _, _ in batches),
        "tokens": sum(tokens for _, tokens, _ in batches),
        "token_bytes": np.dtype(dtype).itemsize,
        "batches": batches,
        "sha256": digest,
    }


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by `content`, or leave it as it was."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(unfinished, path)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Rename, and make the new name survive a loss of power."""
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batched(parts: Iterable[Rows], itemsize: int) -> Iterator[Rows]:
    waiting: list[Rows] = []
    size = 0
    for part in parts:
        nbytes = len(part[0].values) * itemsize
        if waiting and size + nbytes > BATCH_BYTES:
            yield _joined(waiting)
            waiting, size = [], 0
        if len(part[0]):
            waiting.append(part)
            size += nbytes
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Rows]) -> Rows:
    return join_ragged([tokens for tokens, _ in parts]), np.concatenate([keys for _, keys in parts])


def _record_batch(tokens: Ragged, keys: npt.NDArray[np.uint64], schema: pa.Schema) -> pa.RecordBatch:
    values = pa.array(tokens.values, type=schema.field("tokens").type.value_type)
    offsets = pa.array(tokens.offsets.astype(np.int32))
    return pa.RecordBatch.from_arrays(
        [pa.ListArray.from_arrays(offsets, values), pa.array(keys)], schema=schema
    )
