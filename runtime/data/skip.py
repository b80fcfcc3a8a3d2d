"""What was left out of the source, and why."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Skip:
    """`count` things of one file, named by `where`, that could not be read; `path` is relative."""

    path: str
    where: str
    reason: str
    count: int = 1
