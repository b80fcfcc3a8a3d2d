"""Counting blocks: decode, tokenize, and keep a few numbers of each.

The pass can be split: each rank scans some of the blocks, and one assembles the counts into an Index.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .blocks import Block
from .config import DataConfig
from .ragged import Ragged
from .reader import BlockReader, Decoded
from .skip import Skip
from .tokenizer import Tokenizer

Progress: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """What one split holds. `tokens` counts the end tokens, `text_bytes` does not."""

    samples: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "SplitCount") -> "SplitCount":
        return SplitCount(
            samples=self.samples + other.samples,
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """What one block holds, and the checksum of its documents."""

    block: Block
    crc32: int
    train: SplitCount
    val: SplitCount
    ignored: int
    lacking: int
    columns: tuple[str, ...]
    skipped: tuple[Skip, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file or another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "BlockCount":
        """The inverse of to_json."""
        return cls(
            block=Block.from_json(value["block"]),
            crc32=value["crc32"],
            train=SplitCount(**value["train"]),
            val=SplitCount(**value["val"]),
            ignored=value["ignored"],
            lacking=value["lacking"],
            columns=tuple(value["columns"]),
            skipped=tuple(Skip(**skip) for skip in value["skipped"]),
        )


def scan_blocks(
    blocks: Sequence[Block], config: DataConfig, tokenizer: Tokenizer, progress: Progress | None = None
) -> list[BlockCount]:
    """Count some blocks, one in memory at a time; `progress` is told (bytes done, bytes in all, file)."""
    reader = BlockReader(config)
    total, done = sum(block.nbytes for block in blocks), 0
    counts = []
    try:
        for block in blocks:
            counts.append(_count(block, reader.read(block), config, tokenizer))
            done += block.nbytes
            if progress:
                progress(done, total, block.files[0])
    finally:
        reader.close()
    return counts


def to_tokens(documents: Ragged, block: Block, tokenizer: Tokenizer) -> Ragged:
    """Documents of a block, text or token ids, to token ids with end tokens."""
    if block.kind != "tokens":
        return tokenizer.encode(documents)
    return documents.with_end(tokenizer.end_id, np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def held_out(decoded: Decoded, val_fraction: float) -> npt.NDArray[np.bool_]:
    """Which documents belong to the val split: bool [n], by a hash of their text alone."""
    if val_fraction <= 0.0 or not len(decoded.documents):
        return np.zeros(len(decoded.documents), dtype=bool)
    keys = decoded.documents.content_keys() if decoded.keys is None else decoded.keys
    return keys < np.uint64(int(val_fraction * 2**64))


def _count(block: Block, decoded: Decoded, config: DataConfig, tokenizer: Tokenizer) -> BlockCount:
    is_val = held_out(decoded, config.val_fraction)
    tokens = to_tokens(decoded.documents, block, tokenizer)
    if block.kind == "tokens":
        cumulative = np.concatenate(([0], np.cumsum(tokenizer.token_bytes[decoded.documents.values])))
        text_bytes = np.diff(cumulative[decoded.documents.offsets])
    else:
        text_bytes = decoded.documents.lengths
    return BlockCount(
        block=block,
        crc32=decoded.documents.crc32(),
        train=_split_count(tokens.lengths[~is_val], text_bytes[~is_val], config),
        val=_split_count(tokens.lengths[is_val], text_bytes[is_val], config),
        ignored=decoded.ignored,
        lacking=decoded.lacking,
        columns=decoded.columns,
        skipped=decoded.skipped,
    )


def _split_count(
    lengths: npt.NDArray[np.int64], text_bytes: npt.NDArray[np.int64], config: DataConfig
) -> SplitCount:
    tokens = int(lengths.sum())
    packed = config.packing == "documents"
    samples = -(-tokens // config.text_len) if packed else int((-(-lengths // config.text_len)).sum())
    return SplitCount(
        samples=samples, documents=len(lengths), tokens=tokens, text_bytes=int(text_bytes.sum())
    )
