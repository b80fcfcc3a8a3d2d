"""What an interrupted tokenization has finished."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DataError
from .shard_writer import write_whole
from .sources import INDEX_NAME, JOURNAL_NAME


@dataclass(kw_only=True)
class Journal:
    """What is finished. Kept beside the shards, since it also says what the folder was made from."""

    path: Path
    identity: dict[str, str]
    tokenizer_sha256: str = ""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, identity: dict[str, str]) -> "Journal":
        """The journal of `out`, or an empty one. Raises DataError when `out` was begun as something else."""
        path = out / JOURNAL_NAME
        if not path.is_file():
            if (out / INDEX_NAME).exists():
                raise DataError(
                    f"{out} holds an {INDEX_NAME} but no {JOURNAL_NAME}, so it cannot be told what it was "
                    "made from, and going on could spoil it. Write to another folder."
                )
            return cls(path=path, identity=identity)
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in identity.items():
            if found["identity"][key] != value:
                raise DataError(
                    f"{out} was begun with another {key} ({found['identity'][key]} instead of {value}); "
                    "shards of both would be mixed. Write to another folder, or remove this one."
                )
        return cls(path=path, **found)

    def save(self) -> None:
        """Write it; a crash leaves the version before or this one."""
        value = {key: getattr(self, key) for key in ("identity", "tokenizer_sha256", "shards")}
        write_whole(self.path, json.dumps(value).encode())
