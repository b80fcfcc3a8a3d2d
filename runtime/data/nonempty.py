"""The error for a source in which there is nothing to train on, with the likeliest cause."""

from collections.abc import Sequence

from .errors import DataError
from .skip import Skip


def require_documents(
    name: str,
    column: str,
    *,
    documents: int,
    ignored: int,
    lacking: int,
    columns: Sequence[str],
    skipped: Sequence[Skip],
) -> None:
    """Raise DataError when `name` has no document: a missing key, empty files or unreadable ones."""
    if documents:
        return
    if lacking:
        seen = sorted(set(columns))
        raise DataError(
            f"data.column = {column!r} is in none of the {lacking} JSON lines of {name}; their text keys are "
            f"{seen or 'none'}. Only text can be trained on. Set data.column = {(seen or ['text'])[0]!r}."
        )
    first = f" The first: {skipped[0].path} ({skipped[0].where}) {skipped[0].reason}." if skipped else ""
    raise DataError(
        f"{name} holds no document: {ignored} were empty, {len(skipped)} files or parts could not be read."
        f'{first} There is nothing to train on. Correct the files; data.source = "stdlib" works everywhere.'
    )
