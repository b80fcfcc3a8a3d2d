"""Where a block lies in its file."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Span:
    """From `start` to `stop`, in row groups, bytes or record batches; fields as in Block."""

    start: int
    stop: int
    nbytes: int
    rows: tuple[int, int, int] | None = None
    problem: str = ""
