"""A block decoded into documents, whatever it is stored as."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .blocks import Block
from .config import DataConfig
from .parquet import DAMAGE, ParquetReader, reason
from .ragged import Ragged, join_ragged, ragged_of
from .skip import Skip
from .sources import source_entries
from .text import JsonLines, read_text_file
from .token_shards import TokenReader


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The documents of a block: uint8 text, or token ids when the source is tokenized.

    `keys` uint64 [n] are the hashes that decide what is held out, where the source stores them. `ignored`
    counts nulls and empty documents; `lacking` the JSON lines without the column, of which the first had
    `columns`.
    """

    documents: Ragged
    keys: npt.NDArray[np.uint64] | None = None
    skipped: tuple[Skip, ...] = ()
    ignored: int = 0
    lacking: int = 0
    columns: tuple[str, ...] = ()


class BlockReader:
    """Reads blocks of one source, one at a time; keeps the last file open. Not for two threads."""

    def __init__(self, config: DataConfig) -> None:
        self._column = config.column
        self._roots = [entry.root for entry in source_entries(config)]
        self._parquet = ParquetReader(config.column)
        self._tokens = TokenReader()

    def read(self, block: Block) -> Decoded:
        """Decode a block. Never raises for damage: what cannot be read is in `skipped`."""
        if block.problem:
            return Decoded(documents=ragged_of([]), skipped=(_skip(block, "file", block.problem),))
        read = {
            "parquet": self._read_parquet,
            "jsonl": self._read_jsonl,
            "text": self._read_text,
            "tokens": self._read_tokens,
        }[block.kind]
        return _without_empty(read(block, self._roots[block.entry]))

    def close(self) -> None:
        """Let go of open files."""
        self._parquet.close()

    def _read_text(self, block: Block, root: Path) -> Decoded:
        stop = None if len(block.files) > 1 else block.stop
        found = [read_text_file(root / name, name, block.start, stop) for name in block.files]
        return Decoded(
            documents=ragged_of([text for text in found if isinstance(text, bytes)]),
            skipped=tuple(skip for skip in found if isinstance(skip, Skip)),
        )

    def _read_jsonl(self, block: Block, root: Path) -> Decoded:
        name = block.files[0]
        lines = JsonLines(root / name, name, self._column, block.start, block.stop)
        return Decoded(
            documents=ragged_of(lines.documents),
            skipped=tuple(lines.skipped),
            ignored=lines.ignored,
            lacking=lines.lacking,
            columns=lines.columns,
        )

    def _read_parquet(self, block: Block, root: Path) -> Decoded:
        path, parts, skipped = root / block.files[0], [], []
        for group in range(block.start, block.stop):
            try:
                parts.append(self._parquet.read_group(path, group, block.rows))
            except DAMAGE as error:
                skipped.append(_skip(block, f"row group {group}", reason(error)))
        return Decoded(documents=join_ragged(parts), skipped=tuple(skipped))

    def _read_tokens(self, block: Block, root: Path) -> Decoded:
        path, parts, keys, skipped = root / block.files[0], [], [], []
        for number in range(block.start, block.stop):
            try:
                tokens, key = self._tokens.read_batch(path, number)
            except DAMAGE as error:
                skipped.append(_skip(block, f"record batch {number}", reason(error)))
                continue
            parts.append(tokens)
            keys.append(key)
        all_keys = np.concatenate(keys) if keys else np.empty(0, dtype=np.uint64)
        return Decoded(documents=join_ragged(parts), keys=all_keys, skipped=tuple(skipped))


def _skip(block: Block, where: str, why: str) -> Skip:
    return Skip(path=block.files[0], where=where, reason=why)


def _without_empty(decoded: Decoded) -> Decoded:
    keep = decoded.documents.lengths > 0
    if keep.all():
        return decoded
    return Decoded(
        documents=decoded.documents.select(keep),
        keys=None if decoded.keys is None else decoded.keys[keep],
        skipped=decoded.skipped,
        ignored=decoded.ignored + int((~keep).sum()),
        lacking=decoded.lacking,
        columns=decoded.columns,
    )
