"""Blocks: the pieces of the source that are read and decoded on their own.

Consecutive Parquet row groups, a slice of a row group too big to hold, a byte range of a JSONL or text file,
a group of small text files, or record batches of a tokenized shard. Listing them reads footers and a few
bytes at each cut, never the text, and gives the same list wherever the files are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from .config import DataConfig
from .cuts import line_cuts, text_cuts
from .parquet import parquet_spans
from .sources import SourceFile, list_files, source_entries
from .span import Span
from .token_shards import token_spans


@dataclass(frozen=True, kw_only=True)
class Block:
    """One piece. `start` and `stop` count row groups, bytes or record batches of its file, by `kind`.

    `files` has one name except for a group of small text files. `rows` narrows one row group to [from, to),
    decoded a step at a time: (from, to, step). `problem` says why the file cannot be opened; such a block has
    no documents. `nbytes` is about the text's size.
    """

    number: int
    source: int
    entry: int
    kind: str
    files: tuple[str, ...]
    start: int
    stop: int
    nbytes: int
    rows: tuple[int, int, int] | None = None
    problem: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Block":
        """The block that `dataclasses.asdict` and JSON made `value` of."""
        rows = value["rows"]
        return cls(**{**value, "files": tuple(value["files"]), "rows": tuple(rows) if rows else None})


def list_blocks(config: DataConfig, files: list[SourceFile] | None = None) -> list[Block]:
    """The blocks of the whole source in file order, numbered from 0. Raises DataError without files."""
    files = list_files(config) if files is None else files
    roots = [entry.root for entry in source_entries(config)]
    spans: list[tuple[SourceFile, tuple[str, ...], Span]] = []
    for (entry, is_text), group in groupby(files, key=lambda file: (file.entry, file.kind == "text")):
        if is_text:
            spans += _text_spans(list(group), roots[entry], config.block_bytes)
        else:
            for file in group:
                spans += ((file, (file.name,), span) for span in _file_spans(file, roots[entry], config))
    return [
        Block(
            number=number,
            source=file.source,
            entry=file.entry,
            kind=file.kind,
            files=names,
            start=span.start,
            stop=span.stop,
            nbytes=span.nbytes,
            rows=span.rows,
            problem=span.problem,
        )
        for number, (file, names, span) in enumerate(spans)
    ]


def _file_spans(file: SourceFile, root: Path, config: DataConfig) -> Iterator[Span]:
    path = root / file.name
    if file.kind == "parquet":
        yield from parquet_spans(path, config.column, config.block_bytes)
    elif file.kind == "tokens":
        yield from token_spans(path, config.block_bytes)
    else:
        yield from _byte_spans(line_cuts(path, file.size, config.block_bytes))


def _byte_spans(cuts: list[int]) -> Iterator[Span]:
    for start, stop in pairwise(cuts):
        yield Span(start=start, stop=stop, nbytes=stop - start)


def _text_spans(
    files: list[SourceFile], root: Path, block_bytes: int
) -> Iterator[tuple[SourceFile, tuple[str, ...], Span]]:
    waiting: list[SourceFile] = []
    for file in files:
        if waiting and sum(f.size for f in waiting) + file.size > block_bytes:
            yield _text_group(waiting)
            waiting = []
        if file.size > block_bytes:
            for span in _byte_spans(text_cuts(root / file.name, file.size, block_bytes)):
                yield file, (file.name,), span
        else:
            waiting.append(file)
    if waiting:
        yield _text_group(waiting)


def _text_group(files: list[SourceFile]) -> tuple[SourceFile, tuple[str, ...], Span]:
    size = sum(file.size for file in files)
    return files[0], tuple(file.name for file in files), Span(start=0, stop=size, nbytes=size)
