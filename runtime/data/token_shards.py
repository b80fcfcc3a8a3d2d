"""Tokenized shards: Arrow IPC files with one document a row, described by an `index.json` beside them.

Columns: `tokens` list<uint16 | uint32> without an end token, and `key` uint64, the hash of the document's
text, so that the same documents are held out however they are stored. The index counts the rows and tokens of
every record batch and carries its checksum, so blocks are listed without opening a shard and damage is found
per batch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from .errors import DataError
from .ragged import Ragged
from .sources import INDEX_NAME
from .span import Span

TOKENIZER_NAME = "tokenizer.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's `index.json`. Raises DataError when it is missing or no JSON."""
    path = folder / INDEX_NAME
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}), so the shards beside it are of unknown content. "
            "Write the folder anew with `rayfold data tokenize`."
        ) from error
    return value


def token_spans(path: Path, block_bytes: int) -> Iterator[Span]:
    """Neighbouring record batches of one shard, up to `block_bytes` of tokens each."""
    shard = _shard(path)
    start = nbytes = 0
    for number, (_, tokens, _) in enumerate(shard["batches"]):
        size = tokens * int(shard["token_bytes"])
        if number > start and nbytes + size > block_bytes:
            yield Span(start=start, stop=number, nbytes=nbytes)
            start, nbytes = number, 0
        nbytes += size
    if start < len(shard["batches"]):
        yield Span(start=start, stop=len(shard["batches"]), nbytes=nbytes)


def _shard(path: Path) -> dict[str, Any]:
    for shard in read_index(path.parent)["shards"]:
        if shard["name"] == path.name:
            return dict(shard)
    raise DataError(
        f"{path} is not listed in the {INDEX_NAME} beside it, so nothing is known of its tokenizer. "
        "Remove the file, or write the folder anew with `rayfold data tokenize`."
    )


class TokenReader:
    """Reads record batches of shards; keeps what the index says of the shard last read."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._checksums: list[int] = []

    def read_batch(self, path: Path, number: int) -> tuple[Ragged, npt.NDArray[np.uint64]]:
        """Documents as token ids, and the hash of each one's text [n]. Raises ArrowInvalid on damage."""
        if self._path != path:
            self._checksums = [checksum for _, _, checksum in _shard(path)["batches"]]
            self._path = path
        with pa.OSFile(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(number)
        tokens = batch_tokens(batch)
        if tokens.crc32() != self._checksums[number]:
            raise pa.ArrowInvalid("its bytes do not match the checksum in the index")
        return tokens, batch.column("key").to_numpy()


def batch_tokens(batch: pa.RecordBatch) -> Ragged:
    """The documents of a record batch: values uint16 or uint32 [T], offsets int64 [n + 1]."""
    column = batch.column("tokens")
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(values=column.values.to_numpy()[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])
