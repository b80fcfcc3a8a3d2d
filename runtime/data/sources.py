"""`data.source` to a sorted list of files.

A file is known by its entry (which path of `data.source` led to it) and its name below that entry's root, so
that an index made on one node means the same on another.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .config import DataConfig
from .errors import DataError

TOKENS_FORMAT = "rayfold-tokens"
INDEX_NAME = "index.json"
JOURNAL_NAME = "journal.json"

_KINDS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
# Never text: left out of folders when the format is "auto"; naming such a file alone still tries it.
# fmt: off
_BINARY = frozenset(
    {
        ".7z", ".a", ".arrow", ".avi", ".bin", ".bz2", ".ckpt", ".dll", ".dylib", ".exe",
        ".feather", ".gif", ".gz", ".ico", ".jpeg", ".jpg", ".mp3", ".mp4", ".npy", ".npz", ".o",
        ".onnx", ".pdf", ".pkl", ".png", ".pt", ".pth", ".pyc", ".pyo", ".safetensors", ".so",
        ".tar", ".tiff", ".wav", ".webp", ".whl", ".xz", ".zip", ".zst",
    }
)
# fmt: on
# The standard library's own tests hold broken encodings on purpose, and some systems leave them out.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One path of `data.source`: `source` numbers the table of the mixture it belongs to."""

    path: str
    source: int
    root: Path


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of the source: `name` is relative to the root of its entry; size in bytes."""

    entry: int
    source: int
    name: str
    kind: str
    size: int
    mtime_ns: int


def source_weights(config: DataConfig) -> list[float]:
    """The weights of the mixture; a source without weights is one source of weight 1."""
    weights = [float(t.get("weight", 1.0)) for t in _as_list(config) if isinstance(t, dict)]
    return weights or [1.0]


def source_entries(config: DataConfig) -> list[SourceEntry]:
    """Every path of `data.source`, with the folder that its file names are relative to."""
    entries = []
    for number, item in enumerate(_as_list(config)):
        path, source = (str(item["path"]), number) if isinstance(item, dict) else (item, 0)
        entries.append(SourceEntry(path=path, source=source, root=_root(path)))
    return entries


def list_files(config: DataConfig) -> list[SourceFile]:
    """All files of the source, by entry and name. Raises DataError for a path that leads to none."""
    files = []
    for number, entry in enumerate(source_entries(config)):
        found = list(_entry_files(number, entry, config.format))
        if not found:
            raise DataError(
                f"data.source {entry.path!r} holds no file to read as {config.format} (looked in "
                f"{entry.root}), so there is nothing to train on. Name a folder with Parquet, "
                'JSONL or text files, or set data.source = "stdlib".'
            )
        files += sorted(found, key=lambda file: file.name)
    return files


def tokens_folder(root: Path) -> bool:
    """Whether the folder was written by `rayfold data tokenize`."""
    index = root / INDEX_NAME
    if not index.is_file():
        return False
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and found.get("format") == TOKENS_FORMAT


def _as_list(config: DataConfig) -> list[str | dict[str, str | float | int]]:
    source = config.source
    return [source] if isinstance(source, str) else list(source)


def _root(path: str) -> Path:
    if path == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    full = Path(path).expanduser()
    if full.is_dir():
        return full
    if full.exists() or not _WILDCARDS & set(path):
        return full.parent
    fixed = []
    for part in full.parts[:-1]:
        if _WILDCARDS & set(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _entry_files(number: int, entry: SourceEntry, wanted: str) -> Iterator[SourceFile]:
    for path in _entry_paths(entry, wanted):
        stat = path.stat()
        yield SourceFile(
            entry=number,
            source=entry.source,
            name=path.relative_to(entry.root).as_posix(),
            kind="text" if entry.path == "stdlib" else _kind(path, wanted),
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
        )


def _entry_paths(entry: SourceEntry, wanted: str) -> list[Path]:
    if entry.path == "stdlib":
        return [path for path in _walk(entry.root, _NOT_STDLIB) if path.suffix == ".py"]
    full = Path(entry.path).expanduser()
    if full.is_dir():
        return _folder_paths(full, wanted)
    if full.is_file():
        return [full]
    matches = [Path(match) for match in glob.glob(str(full), recursive=True)]
    if not matches and not _WILDCARDS & set(entry.path):
        raise DataError(
            f"data.source {entry.path!r} does not exist (looked at {full.absolute()}), so there is nothing "
            'to read. Correct the path; data.source = "stdlib" works on every machine.'
        )
    return [match for match in matches if match.is_file()]


def _folder_paths(folder: Path, wanted: str) -> list[Path]:
    if wanted in ("auto", "tokens") and tokens_folder(folder):
        shards = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["shards"]
        return [folder / shard["name"] for shard in shards if (folder / shard["name"]).is_file()]
    if wanted == "tokens":
        raise DataError(
            f"data.source {str(folder)!r} holds no {INDEX_NAME} of tokenized shards, so data.format = "
            "'tokens' cannot read it. Write it with `rayfold data tokenize`, or set data.format = 'auto'."
        )
    if _is_half_tokenized(folder):  # what lies there would be read as text
        raise DataError(
            f"data.source {str(folder)!r} was tokenized only in part. Run the same `rayfold data tokenize` "
            "again, which goes on where it was interrupted."
        )
    paths = list(_walk(folder, frozenset({"__pycache__"})))
    if wanted == "text":
        return paths
    # A data set's folder carries a README and a licence; they are no part of it.
    kinds = frozenset(_KINDS.values()) if wanted == "auto" else {wanted}
    data = [path for path in paths if _KINDS.get(path.suffix.lower()) in kinds]
    if data or wanted != "auto":
        return data
    return [path for path in paths if path.suffix.lower() not in _BINARY]


def _is_half_tokenized(folder: Path) -> bool:
    try:
        journal = json.loads((folder / JOURNAL_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(journal, dict) and {"identity", "tokenizer_sha256", "shards"} <= journal.keys()


def _walk(folder: Path, leave_out: frozenset[str]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
        for name in names:
            path = Path(where, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _kind(path: Path, wanted: str) -> str:
    if wanted == "auto":
        if path.suffix == ".arrow" and tokens_folder(path.parent):
            return "tokens"
        return _KINDS.get(path.suffix.lower(), "text")
    return wanted
