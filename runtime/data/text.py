"""Text and JSONL files as documents; what cannot be decoded is reported and left out."""

import json
from collections.abc import Iterator
from pathlib import Path

from .skip import Skip

REPORTED_LINES = 20  # of one block; the rest are counted together, so that a bad file cannot fill the index


def read_text_file(path: Path, name: str, start: int, stop: int | None) -> bytes | Skip:
    """One document: the file, or bytes [start, stop) of a large one. A Skip when it is not UTF-8."""
    where = "file" if stop is None else f"bytes {start} to {stop}"
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(-1 if stop is None else stop - start)
    except OSError as error:
        return Skip(path=name, where=where, reason=f"cannot be read: {error.strerror}")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skip(path=name, where=where, reason=f"is not UTF-8 at byte {start + error.start}")
    return text


class JsonLines:
    """Lines of a byte range of a JSONL file, decoded: `documents`, and what was wrong with the others."""

    def __init__(self, path: Path, name: str, column: str, start: int, stop: int) -> None:
        self.documents: list[bytes] = []
        self.skipped: list[Skip] = []
        self.ignored = 0  # null or without the column
        self.lacking = 0  # without the column
        self.columns: tuple[str, ...] = ()  # the text keys of the first line without it
        self._name = name
        self._column = column
        self._unreported = 0
        try:
            with path.open("rb") as file:
                file.seek(start)
                lines = file.read(stop - start).split(b"\n")
        except OSError as error:
            self.skipped.append(Skip(path=name, where="file", reason=f"cannot be read: {error.strerror}"))
            return
        for offset, line in _numbered(lines, start):
            self._add(line, offset)
        if self._unreported:
            self.skipped.append(
                Skip(path=name, where="more lines", reason="as above", count=self._unreported)
            )

    def _add(self, line: bytes, offset: int) -> None:
        if not line.strip():
            return
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._skip(offset, f"is not JSON: {error}")
            return
        if not isinstance(found, dict):
            self._skip(offset, f"is a {type(found).__name__}, not an object")
            return
        text = found.get(self._column)
        if self._column not in found:
            self.lacking += 1
            self.columns = self.columns or tuple(k for k, v in found.items() if isinstance(v, str))
        if text is None:
            self.ignored += 1
        elif not isinstance(text, str):
            self._skip(offset, f"holds a {type(text).__name__} as {self._column!r}, not text")
        else:
            self._encode(text, offset)

    def _encode(self, text: str, offset: int) -> None:
        try:
            self.documents.append(text.encode("utf-8"))
        except UnicodeEncodeError:
            self._skip(offset, "holds half of a surrogate pair, which is no text")

    def _skip(self, offset: int, reason: str) -> None:
        if len(self.skipped) >= REPORTED_LINES:
            self._unreported += 1
        else:
            self.skipped.append(Skip(path=self._name, where=f"line at byte {offset}", reason=reason))


def _numbered(lines: list[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    for line in lines:
        yield start, line
        start += len(line) + 1
