"""Parquet files as blocks of text: listed from their footers, read a row group or a slice of one at a time.

A writer that was not told otherwise puts a million rows into a row group, which may be the whole file. Such a
row group is cut into row ranges, and read as a stream of pages through a small buffer, so that memory follows
`data.block_bytes` and not the file. Reading range k of a group decodes the ranges before it unless they were
just read, so such a file is slower to shuffle than one of small row groups.
"""

import difflib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from .errors import DataError
from .ragged import Ragged, join_ragged
from .span import Span

# What pyarrow raises for damaged bytes: its own errors, OSError for the file, ValueError for the footer.
DAMAGE = (pa.ArrowException, OSError, ValueError)

_STREAM_BUFFER = 1 << 20
_PROBE_ROWS = 256


def parquet_spans(path: Path, column: str, block_bytes: int) -> Iterator[Span]:
    """The blocks of one file. Raises DataError when the column is not there or holds no text."""
    try:
        file = _open(path)
    except DAMAGE as error:
        yield Span(start=0, stop=0, nbytes=0, problem=reason(error))
        return
    with file:
        _check_column(file.schema_arrow, column, path)
        yield from _merge(_group_spans(file, column, block_bytes), block_bytes)


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(
        path, page_checksum_verification=True, buffer_size=_STREAM_BUFFER, memory_map=False, pre_buffer=False
    )


def _check_column(schema: pa.Schema, column: str, path: Path) -> None:
    if column in schema.names and _is_text(schema.field(column).type):
        return
    texts = [field.name for field in schema if _is_text(field.type)]
    near = difflib.get_close_matches(column, texts, n=1, cutoff=0.0)
    remedy = f"Set data.column = {near[0]!r}." if near else "Add a column of strings to the file."
    what = f"is of type {schema.field(column).type}" if column in schema.names else "does not exist"
    raise DataError(
        f"data.column = {column!r} {what} in {path}; its text columns are {texts or 'none'}. "
        f"Only text can be trained on. {remedy}"
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _group_spans(file: pq.ParquetFile, column: str, block_bytes: int) -> Iterator[Span]:
    """One span a row group, or several for one that is more than half as big again as a block."""
    growth = _decoded_growth(file, column)
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        nbytes = round(_stored_bytes(file.metadata, group, column) * growth)
        parts = min(rows, -(-nbytes // block_bytes)) if 2 * nbytes > 3 * block_bytes else 1
        if parts <= 1:
            yield Span(start=group, stop=group + 1, nbytes=nbytes)
            continue
        edges = [rows * part // parts for part in range(parts + 1)]
        # One step for all slices: so the same rows lie behind a damaged page, whichever slice is read first.
        step = max(1, rows // parts // 4)
        for start, stop in pairwise(edges):
            yield Span(start=group, stop=group + 1, nbytes=nbytes // parts, rows=(start, stop, step))


def _stored_bytes(metadata: Any, group: int, column: str) -> int:
    columns = metadata.row_group(group)
    for number in range(columns.num_columns):
        if columns.column(number).path_in_schema == column:
            return int(columns.column(number).total_uncompressed_size)
    return 0


def _decoded_growth(file: pq.ParquetFile, column: str) -> float:
    """How much longer text is than the footer says: a column of repeated texts stores each once."""
    metadata = file.metadata
    if not metadata.num_row_groups or not metadata.row_group(0).num_rows:
        return 1.0
    try:
        first = next(file.iter_batches(_PROBE_ROWS, row_groups=[0], columns=[column], use_threads=False))
        text = len(to_ragged(first.column(0)).values) / max(1, first.num_rows)
    except (*DAMAGE, StopIteration):
        return 1.0
    stored = _stored_bytes(metadata, 0, column) / metadata.row_group(0).num_rows
    # Below 4 the rows at hand may just be the long ones.
    return text / stored if stored and text > 4 * stored else 1.0


def _merge(spans: Iterator[Span], block_bytes: int) -> Iterator[Span]:
    """Join neighbouring whole row groups while they fit into one block."""
    last: Span | None = None
    for span in spans:
        if last and not last.rows and not span.rows and last.nbytes + span.nbytes <= block_bytes:
            last = Span(start=last.start, stop=span.stop, nbytes=last.nbytes + span.nbytes)
            continue
        if last:
            yield last
        last = span
    if last:
        yield last


def to_ragged(array: pa.Array) -> Ragged:
    """A text column as rows of bytes, nulls as empty rows. Raises pyarrow.ArrowInvalid for bad UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    array.validate(full=True)
    text = array.cast(pa.large_string()).fill_null("")
    if len(text) == 0:
        return join_ragged([])
    _, offset_buffer, value_buffer = text.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[text.offset : text.offset + len(text) + 1]
    values = np.frombuffer(value_buffer, dtype=np.uint8) if value_buffer else np.empty(0, dtype=np.uint8)
    return Ragged(values=values[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])


def reason(error: BaseException) -> str:
    """The first line of an error: pyarrow's go on with stack traces."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ParquetReader:
    """Reads row groups of one column; keeps the last file open, and the place in a group read in slices."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._path: Path | None = None
        self._file: pq.ParquetFile | None = None
        self._stream: _GroupStream | None = None

    def read_group(self, path: Path, group: int, rows: tuple[int, int, int] | None) -> Ragged:
        """The text of row group `group`, or of its rows [from, to), decoded a step at a time.

        Raises one of DAMAGE when unreadable.
        """
        file = self._opened(path)
        if rows is None:
            table = file.read_row_group(group, columns=[self._column], use_threads=False)
            _expect_rows(table.num_rows, file.metadata.row_group(group).num_rows)
            return join_ragged([to_ragged(chunk) for chunk in table.column(0).chunks])
        start, stop, step = rows
        stream, self._stream = self._stream, None
        if stream is None or stream.group != group or stream.position > start:
            stream = _GroupStream(file, group, self._column, batch_rows=step)
        stream.take(start - stream.position, keep=False)
        found = stream.take(stop - start, keep=True)
        self._stream = stream  # kept only when nothing failed: a broken stream starts anew
        return join_ragged([to_ragged(chunk) for chunk in found])

    def _opened(self, path: Path) -> pq.ParquetFile:
        if self._file is None or self._path != path:
            self.close()
            self._file, self._path = _open(path), path
        return self._file

    def close(self) -> None:
        """Let go of the file."""
        self._stream = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _GroupStream:
    """A row group read front to back, some rows at a time."""

    def __init__(self, file: pq.ParquetFile, group: int, column: str, *, batch_rows: int) -> None:
        self.group = group
        self.position = 0
        self._batches = file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False)
        self._rest: pa.Array | None = None

    def take(self, count: int, *, keep: bool) -> list[pa.Array]:
        """The next `count` rows; nothing when `keep` is false."""
        found = []
        while count > 0:
            part = self._rest if self._rest is not None else self._next_array()
            taken = min(count, len(part))
            if keep:
                found.append(part.slice(0, taken))
            self._rest = part.slice(taken) if taken < len(part) else None
            self.position += taken
            count -= taken
        return found

    def _next_array(self) -> pa.Array:
        batch = next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid(f"ends after {self.position} rows, fewer than the footer promises")
        return batch.column(0)


def _expect_rows(found: int, promised: int) -> None:
    if found != promised:
        raise pa.ArrowInvalid(f"{found} rows instead of the {promised} that the footer promises")
