"""A source tokenized once, into shards that a run reads instead.

Encoding text costs far more than reading tokens, so a source that is used more than once is worth it. Which
blocks go into which shard is settled before the first is written; a journal records each finished one, so
that a run that was interrupted goes on there and ends with the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .blocks import Block, list_blocks
from .config import DataConfig
from .errors import DataError
from .nonempty import require_documents
from .ragged import Ragged, offsets_of
from .reader import BlockReader, Decoded
from .scan import Progress
from .shard_writer import Rows, file_sha256, write_shard, write_whole
from .skip import Skip
from .sources import INDEX_NAME, TOKENS_FORMAT, SourceFile, list_files
from .token_journal import Journal
from .token_shards import TOKENIZER_NAME
from .tokenizer import JsonTokenizer
from .train_bpe import DEFAULT_VOCAB, SMALLEST_VOCAB, sample_texts, train_bpe

FORMAT_VERSION = 1
SHARD_TEXT_BYTES = 64 << 20  # about half a minute of encoding is lost at most when interrupted


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """What a folder of shards holds; `kept` shards were there from an earlier, interrupted call."""

    out: Path
    shards: int
    kept: int
    documents: int
    tokens: int
    text_bytes: int
    vocab_size: int
    skipped: tuple[Skip, ...]


def tokenize_source(
    config: DataConfig,
    out: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> TokenizeSummary:
    """Write tokenizer.json, shards and index.json to `out`; call it again to go on after an interruption.

    Trains a BPE of `vocab_size` ids (8192 when None) unless `tokenizer` names a tokenizer.json. `progress` is
    told (bytes done, bytes in all, what). Raises DataError when `out` belongs to another source or tokenizer.
    """
    files = list_files(config)
    blocks = list_blocks(config, files)
    _check_request(blocks, vocab_size, tokenizer)
    report: Progress = progress or (lambda done, total, what: None)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(out, _identity(config, files, blocks, vocab_size, tokenizer))
    job = _Job(
        config=config,
        out=out,
        journal=journal,
        tokenizer=_place_tokenizer(config, out, blocks, journal, vocab_size, tokenizer, report),
        mtimes={(file.entry, file.name): file.mtime_ns for file in files},
        total=sum(block.nbytes for block in blocks),
        report=report,
    )
    kept = job.write_shards(_shard_plan(blocks))
    return job.finish(kept)


def _check_request(blocks: Sequence[Block], vocab_size: int | None, tokenizer: str | None) -> None:
    if any(block.kind == "tokens" for block in blocks):
        raise DataError(
            "data.source is tokenized already, so there is no text to encode. Name the source of the text."
        )
    if vocab_size is not None and tokenizer is not None:
        raise DataError(
            f"both a vocabulary size ({vocab_size}) and a tokenizer ({tokenizer}) are given, but a tokenizer "
            "has its own size. Leave one of them out."
        )
    if vocab_size is not None and vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} ids cannot hold the 256 bytes and the end token, so some text "
            f"could not be written. Ask for at least {SMALLEST_VOCAB}; {DEFAULT_VOCAB} suits a small source."
        )


def _identity(
    config: DataConfig,
    files: Sequence[SourceFile],
    blocks: Sequence[Block],
    vocab_size: int | None,
    tokenizer: str | None,
) -> dict[str, str]:
    source = [[file.entry, file.name, file.size] for file in files]
    layout = [asdict(block) for block in blocks]
    content = json.dumps([config.column, source, layout], sort_keys=True).encode()
    wanted = f"bpe of {vocab_size or DEFAULT_VOCAB} ids"
    if tokenizer is not None:
        wanted = f"sha256 {JsonTokenizer(Path(tokenizer).expanduser()).fingerprint}"
    return {"source": hashlib.blake2b(content, digest_size=16).hexdigest(), "tokenizer": wanted}


def _shard_plan(blocks: Sequence[Block]) -> list[list[Block]]:
    plan: list[list[Block]] = [[]]
    size = 0
    for block in blocks:
        if plan[-1] and size + block.nbytes > SHARD_TEXT_BYTES:
            plan.append([])
            size = 0
        plan[-1].append(block)
        size += block.nbytes
    return plan


def _place_tokenizer(
    config: DataConfig,
    out: Path,
    blocks: Sequence[Block],
    journal: Journal,
    vocab_size: int | None,
    tokenizer: str | None,
    report: Progress,
) -> JsonTokenizer:
    path = out / TOKENIZER_NAME
    if path.is_file() and journal.tokenizer_sha256 == file_sha256(path):
        return JsonTokenizer(path)
    if tokenizer is not None:
        content = Path(tokenizer).expanduser().read_bytes()
    else:
        report(0, sum(block.nbytes for block in blocks), "training the tokenizer")
        content = train_bpe(sample_texts(config, blocks), vocab_size or DEFAULT_VOCAB)
    write_whole(path, content)
    journal.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
    journal.save()
    return JsonTokenizer(path)


@dataclass(kw_only=True)
class _Job:
    config: DataConfig
    out: Path
    journal: Journal
    tokenizer: JsonTokenizer
    mtimes: dict[tuple[int, str], int]
    total: int
    report: Progress
    done: int = 0

    def write_shards(self, plan: Sequence[Sequence[Block]]) -> int:
        """Write every shard that is not there yet; returns how many were."""
        kept = 0
        for number, blocks in enumerate(plan):
            name = f"shard-{number:05d}.arrow"
            times = self._times(blocks)
            if self._is_finished(name, times):
                kept += 1
                self._advance(sum(block.nbytes for block in blocks), name)
            else:
                self.journal.shards[name] = {**self._write(self.out / name, blocks), "times": times}
                self.journal.save()
        return kept

    def finish(self, kept: int) -> TokenizeSummary:
        """Write the index, which makes the folder a source."""
        entries = [self.journal.shards[name] for name in sorted(self.journal.shards)]
        skipped = {(s["path"], s["where"]): Skip(**s) for entry in entries for s in entry["skipped"]}
        require_documents(
            f"data.source = {self.config.source!r}",
            self.config.column,
            documents=sum(entry["shard"]["rows"] for entry in entries),
            ignored=sum(entry["ignored"] for entry in entries),
            lacking=sum(entry["lacking"] for entry in entries),
            columns=[column for entry in entries for column in entry["columns"]],
            skipped=list(skipped.values()),
        )
        shards = [entry["shard"] for entry in entries]
        index = {
            "format": TOKENS_FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "source_fingerprint": self.journal.identity["source"],
            "shards": shards,
            "skipped": [asdict(skip) for skip in skipped.values()],
        }
        write_whole(self.out / INDEX_NAME, json.dumps(index).encode())
        return TokenizeSummary(
            out=self.out,
            shards=len(shards),
            kept=kept,
            documents=sum(shard["rows"] for shard in shards),
            tokens=sum(shard["tokens"] for shard in shards),
            text_bytes=sum(shard["bytes"] for shard in shards),
            vocab_size=self.tokenizer.vocab_size,
            skipped=tuple(skipped.values()),
        )

    def _times(self, blocks: Sequence[Block]) -> str:
        """Changes when one of the files was written to, even if its size is as before."""
        names = sorted({(block.entry, name) for block in blocks for name in block.files})
        content = json.dumps([[*name, self.mtimes[name]] for name in names])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def _is_finished(self, name: str, times: str) -> bool:
        entry = self.journal.shards.get(name)
        path = self.out / name
        if entry is None or entry["times"] != times or not path.is_file():
            return False
        return bool(entry["shard"]["sha256"] == file_sha256(path))

    def _write(self, path: Path, blocks: Sequence[Block]) -> dict[str, Any]:
        tally = _Tally()
        shard = write_shard(path, self._encoded(blocks, tally), self.tokenizer.dtype)
        return {
            "shard": {**shard, "bytes": tally.text_bytes},
            "skipped": [asdict(skip) for skip in tally.skipped],
            "ignored": tally.ignored,
            "lacking": tally.lacking,
            "columns": tally.columns,
        }

    def _encoded(self, blocks: Sequence[Block], tally: "_Tally") -> Iterator[Rows]:
        reader = BlockReader(self.config)
        try:
            for block in blocks:
                decoded = reader.read(block)
                tally.add(decoded)
                texts = [row.tobytes() for row in decoded.documents.rows()]
                tokens = self.tokenizer.encode_batch(texts)
                yield _rows(tokens, self.tokenizer.dtype), decoded.documents.content_keys()
                self._advance(block.nbytes, block.files[0])
        finally:
            reader.close()

    def _advance(self, nbytes: int, what: str) -> None:
        self.done += nbytes
        self.report(self.done, self.total, what)


@dataclass(kw_only=True)
class _Tally:
    text_bytes: int = 0
    ignored: int = 0
    lacking: int = 0
    columns: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def add(self, decoded: Decoded) -> None:
        self.text_bytes += len(decoded.documents.values)
        self.ignored += decoded.ignored
        self.lacking += decoded.lacking
        self.columns = self.columns or list(decoded.columns)
        self.skipped += decoded.skipped


def _rows(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> Ragged:
    lengths = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
    values = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    return Ragged(values=values, offsets=offsets_of(lengths))
