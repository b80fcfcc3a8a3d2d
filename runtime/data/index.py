"""What the source holds, counted once: the index that turns a sample number into a place in a file.

One streaming pass decodes and tokenizes every block and keeps a few numbers of each, so the index is small,
is plain JSON, and the pass can be split: each rank scans some of the blocks, and one puts the counts
together. The checksums in it are compared each time a block is read again.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .blocks import list_blocks
from .config import DataConfig
from .errors import DataError
from .nonempty import require_documents
from .scan import BlockCount, Progress, SplitCount, scan_blocks
from .skip import Skip
from .sources import SourceFile, list_files, source_weights
from .tokenizer import Tokenizer, resolve_tokenizer

INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all blocks. `skipped` counts what could not be read, `ignored` nulls and empty documents."""

    train: SplitCount
    val: SplitCount
    blocks: int
    ignored: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """The counts of every block, and under which settings and from which files they were made."""

    settings: dict[str, Any]
    files: tuple[SourceFile, ...]
    counts: tuple[BlockCount, ...]

    @classmethod
    def assemble(cls, config: DataConfig, tokenizer: Tokenizer, counts: Iterable[BlockCount]) -> "Index":
        """Put the counts of all blocks together, in whatever order they come.

        Raises DataError when nothing could be read, a column is missing, or nothing is held out.
        """
        ordered = tuple(sorted(counts, key=lambda count: count.block.number))
        numbers = [count.block.number for count in ordered]
        assert numbers == list(range(len(ordered))), f"every block is to be counted once, got {numbers[:20]}"
        index = cls(
            settings=index_settings(config, tokenizer),
            files=tuple(list_files(config)),
            counts=ordered,
        )
        for source in range(len(source_weights(config))):
            _check_source(config, source, [c for c in ordered if c.block.source == source])
        _check_held_out(config, index.totals)
        return index

    @cached_property
    def totals(self) -> Totals:
        """Sums over all blocks."""
        return Totals(
            train=sum((count.train for count in self.counts), SplitCount()),
            val=sum((count.val for count in self.counts), SplitCount()),
            blocks=len(self.counts),
            ignored=sum(count.ignored for count in self.counts),
            skipped=sum(skip.count for skip in self.skipped),
        )

    @cached_property
    def skipped(self) -> tuple[Skip, ...]:
        """Everything that could not be read, once each, in file order."""
        # A row group read in slices reports itself with each of them.
        found = {(c.block.entry, s.path, s.where): s for c in self.counts for s in c.skipped if s.count == 1}
        many = [skip for count in self.counts for skip in count.skipped if skip.count > 1]
        return (*found.values(), *many)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which sample a cursor means; the same on every node."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=16)
        for file in self.files:
            digest.update(json.dumps([file.entry, file.name, file.size]).encode())
        for count in self.counts:
            fields = [asdict(count.block), count.crc32, count.train.samples, count.val.samples]
            digest.update(json.dumps(fields, sort_keys=True).encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The whole index as text."""
        value = {
            "version": INDEX_VERSION,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "files": [asdict(file) for file in self.files],
            "counts": [count.to_json() for count in self.counts],
        }
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str) -> "Index":
        """The inverse of to_json. Raises DataError for another version."""
        value = json.loads(text)
        if value.get("version") != INDEX_VERSION:
            raise DataError(
                f"the data index has version {value.get('version')}, this program reads {INDEX_VERSION}, so "
                "its counts cannot be trusted. Remove it; it is made again from the source."
            )
        return cls(
            settings=value["settings"],
            files=tuple(SourceFile(**file) for file in value["files"]),
            counts=tuple(BlockCount.from_json(count) for count in value["counts"]),
        )


def index_settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that decide which sample a cursor means."""
    names = (
        "format",
        "column",
        "seq_len",
        "packing",
        "anchor",
        "shuffle",
        "shuffle_blocks",
        "block_bytes",
        "val_fraction",
    )
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    return {**settings, "tokenizer": tokenizer.fingerprint, "weights": source_weights(config)}


def build_index(
    config: DataConfig, tokenizer: Tokenizer | None = None, progress: Progress | None = None
) -> Index:
    """List, scan and assemble in one go, on one process."""
    tokenizer = tokenizer or resolve_tokenizer(config)
    return Index.assemble(config, tokenizer, scan_blocks(list_blocks(config), config, tokenizer, progress))


def _check_source(config: DataConfig, source: int, counts: Sequence[BlockCount]) -> None:
    documents = sum(count.train.documents + count.val.documents for count in counts)
    name = f"data.source[{source}]" if len(source_weights(config)) > 1 else f"data.source = {config.source!r}"
    require_documents(
        name,
        config.column,
        documents=documents,
        ignored=sum(count.ignored for count in counts),
        lacking=sum(count.lacking for count in counts),
        columns=[column for count in counts for column in count.columns],
        skipped=[skip for count in counts for skip in count.skipped],
    )
    if not any(count.train.documents for count in counts):
        raise DataError(
            f"data.val_fraction = {config.val_fraction} holds out all {documents} documents of {name}, so "
            f"none is left to train on. Set data.val_fraction = {config.val_fraction / 10:g}, or add text."
        )


def _check_held_out(config: DataConfig, totals: Totals) -> None:
    if config.val_fraction > 0.0 and not totals.val.documents:
        documents = totals.train.documents
        enough = min(0.5, 10 / documents)
        raise DataError(
            f"data.val_fraction = {config.val_fraction} holds out none of the {documents} documents, so "
            f"there is nothing to validate on. Set data.val_fraction = {enough:g}, or 0."
        )
