"""Lines of the record that are on their way to the controller, kept in memory outside of the process.

A process that is killed takes along what it had not told yet. A rank writes each line here as well, at the
price of a write to memory; once all of them are told, the file begins anew. Every line has its checksum.
"""

import json
import logging
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from isal import isal_zlib

logger = logging.getLogger(__name__)

UNTOLD = "untold.jsonl"
MOST_BYTES = 256 << 10  # of lines that are told; several hundred steps


class Untold:
    """The file of one rank, for its one writer. Its methods are not called at once."""

    def __init__(self, folder: Path) -> None:
        """Goes on behind what is in the file."""
        self._folder = folder
        self._file: RawIOBase | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep a line. Where there is no memory for it the run goes on without."""
        text = json.dumps(line)
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self._folder / UNTOLD, "ab", buffering=0)  # noqa: SIM115 (see close)
                self._file.write(b"\n")  # behind what another one may have been killed in the middle of
            self._file.write(f"{isal_zlib.crc32(text.encode()):08x} {text}\n".encode())
        except OSError as error:
            logger.warning("step=%s its line is not kept in memory: %s", line.get("step"), error)

    def all_told(self) -> None:
        """Nothing of what was added is needed any more."""
        if self._file is not None and self._file.tell() > MOST_BYTES:
            self._file.truncate(0)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file is not None:
            self._file.close()


def untold_in(folder: Path, *, after: int) -> list[dict[str, Any]]:
    """The lines of steps beyond `after` in a folder, in order; of a step that is there twice the one that was
    trained last. What was cut off or damaged is passed over.
    """
    path = folder / UNTOLD
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        crc, _, line = text.partition(" ")
        if crc != f"{isal_zlib.crc32(line.encode()):08x}":
            continue
        values = json.loads(line)
        before = found.get(values["step"])
        if values["step"] > after and (before is None or before["time_unix"] <= values["time_unix"]):
            found[values["step"]] = values
    return [found[step] for step in sorted(found)]
