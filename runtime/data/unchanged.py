"""Whether the source is still the one an index was made of: asked when a run goes on where it stopped."""

from collections.abc import Iterable

from .config import DataConfig
from .errors import DataError
from .index import Index, index_settings
from .reader import BlockReader
from .sources import SourceFile, list_files
from .tokenizer import resolve_tokenizer

_SHOWN = 5


def check_unchanged(index: Index, config: DataConfig) -> None:
    """Compare settings, file names and sizes; read again only the files whose time stamp alone differs.

    Raises DataError that names the settings that differ, or the files added, removed or changed.
    """
    _check_settings(index, config)
    before = {(file.entry, file.name): file for file in index.files}
    now = {(file.entry, file.name): file for file in list_files(config)}
    shared = [(before[key], now[key]) for key in before.keys() & now.keys()]
    changed = {old.name for old, new in shared if old.size != new.size}
    touched = [old for old, new in shared if old.size == new.size and old.mtime_ns != new.mtime_ns]
    changed |= _changed_content(index, config, touched)
    added = [name for _, name in now.keys() - before.keys()]
    removed = [name for _, name in before.keys() - now.keys()]
    found = [
        f"{what} {_some(names)}"
        for what, names in (("added:", added), ("removed:", removed), ("changed:", changed))
        if names
    ]
    if found:
        raise DataError(
            f"data.source changed since the run started; {'; '.join(found)}. The run's position is a count "
            "of samples, which would now mean others. Put the files back as they were, or start a new run "
            "(another run.dir)."
        )


def _check_settings(index: Index, config: DataConfig) -> None:
    now = index_settings(config, resolve_tokenizer(config))
    differing = [key for key in now if index.settings.get(key) != now[key]]
    if differing:
        pairs = ", ".join(f"data.{k} = {now[k]!r} (was {index.settings.get(k)!r})" for k in differing)
        raise DataError(
            f"the data settings changed since the run started: {pairs}. The run's position is a count of "
            "samples, which would now mean others. Set them back, or start a new run (another run.dir)."
        )


def _changed_content(index: Index, config: DataConfig, touched: list[SourceFile]) -> set[str]:
    keys = {(file.entry, file.name) for file in touched}
    changed: set[str] = set()
    reader = BlockReader(config)
    try:
        for count in index.counts:
            block = count.block
            names = {name for name in block.files if (block.entry, name) in keys}
            if names and reader.read(block).documents.crc32() != count.crc32:
                changed |= names
    finally:
        reader.close()
    return changed


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
