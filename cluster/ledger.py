"""What a controller that is started again must know, in small files beside the run's record.

A file holds one JSON value with its checksum and the actor that wrote it, and is replaced in one instant. Ray
starts a lost actor again under the same id, so the next life of a controller finds its own file. What another
one has left in the folder is read by a name of its own: it tells where that run's memory may still lie.
"""

import json
from pathlib import Path
from typing import Any

from isal import isal_zlib

from ..runtime.journal import write_atomically


class LedgerDamaged(RuntimeError):
    """A file of the controller is not as it was written."""


class Ledger:
    """One such file; `owner` is the id of the actor that writes and reads it."""

    def __init__(self, path: Path, *, owner: str) -> None:
        self._path = path
        self._owner = owner

    def write(self, values: dict[str, Any]) -> None:
        """Replace what the file holds. Raises OSError when it cannot be written."""
        text = json.dumps(values)
        whole = {"owner": self._owner, "crc32": isal_zlib.crc32(text.encode()), "values": values}
        write_atomically(self._path, json.dumps(whole) + "\n")

    def read(self) -> dict[str, Any] | None:
        """What this owner wrote last; None where it has not. Raises LedgerDamaged."""
        return self._read(of_another=False)

    def read_of_another(self) -> dict[str, Any] | None:
        """What another owner wrote last, a controller of the same folder that is no more; None where there is
        no such thing. Raises LedgerDamaged.
        """
        return self._read(of_another=True)

    def _read(self, *, of_another: bool) -> dict[str, Any] | None:
        try:
            whole = json.loads(self._path.read_text(encoding="utf-8"))
            owner, crc32, values = whole["owner"], whole["crc32"], whole["values"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerDamaged(f"{self._path}: is not what a controller wrote ({error})") from None
        if (owner != self._owner) != of_another:
            return None
        if isal_zlib.crc32(json.dumps(values).encode()) != crc32:
            raise LedgerDamaged(f"{self._path}: its checksum does not fit what it holds")
        found: dict[str, Any] = values
        return found
