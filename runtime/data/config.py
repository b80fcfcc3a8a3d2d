"""The `[data]` section: where the text comes from and how it becomes samples.

Imports nothing heavy, so that a command line can show and check the section without torch, pyarrow or numpy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

Problem: TypeAlias = tuple[str, str]

FORMATS = ("auto", "parquet", "jsonl", "text", "tokens")
PACKINGS = ("documents", "none")
SMALLEST_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads. Every field can be set as `data.<name>`."""

    source: Annotated[
        str | list[str] | list[dict[str, str | float | int]],
        "A file, folder or glob; a list of them; a list of {path, weight} tables that are mixed; or "
        '"stdlib", the sources of the running Python.',
    ] = "stdlib"
    format: Annotated[
        Literal["auto", "parquet", "jsonl", "text", "tokens"],
        "What the files hold; auto goes by the file name, and in a folder prefers Parquet and JSONL to text.",
    ] = "auto"
    column: Annotated[str, "The Parquet column, or JSONL key, that holds a document's text."] = "text"
    tokenizer: Annotated[
        str, 'Either "bytes" or the path of a tokenizer.json; a tokenized source brings its own.'
    ] = "bytes"
    seq_len: Annotated[int, "Length of one sample.", "tokens"] = 256
    packing: Annotated[
        Literal["documents", "none"],
        "documents fills every sample with as many documents as it takes; none gives each document its own.",
    ] = "documents"
    anchor: Annotated[
        bool,
        "Put one end token before each sample that every document in it sees, with positions that run "
        "through the sample (AnchorAttention, arXiv 2411.13476).",
    ] = False
    shuffle: Annotated[bool, "Whether every epoch has its own order; false reads in file order."] = True
    shuffle_blocks: Annotated[int, "How many blocks are mixed with each other at a time.", "blocks"] = 8
    block_bytes: Annotated[int, "How much text is read and decoded at a time.", "bytes"] = 4 * 1024 * 1024
    val_fraction: Annotated[float, "Share of the documents held out, chosen by a hash of their text."] = 0.0
    prefetch: Annotated[int, "How far the reader runs ahead of training.", "steps"] = 2

    @property
    def text_len(self) -> int:
        """Tokens of text in a sample: all, or all behind the anchor."""
        return self.seq_len - self.anchor

    def problems(self) -> list[Problem]:
        """Every impossible value as (key, message); an empty list when all is well."""
        return [*_source_problems(self.source), *_choice_problems(self), *_number_problems(self)]


def _source_problems(source: object) -> Iterator[Problem]:
    entries = source if isinstance(source, list) else [source]
    if not entries or any(isinstance(entry, str) and not entry.strip() for entry in entries):
        yield (
            "source",
            f"data.source = {source!r} names nothing to read. "
            'Give a file, a folder or a glob; data.source = "stdlib" works on every machine.',
        )
        return
    tables = [entry for entry in entries if isinstance(entry, dict)]
    if tables and len(tables) < len(entries):
        yield (
            "source",
            f"data.source mixes {len(tables)} tables with {len(entries) - len(tables)} plain paths, so the "
            "weights of the paths are unknown. Write every entry as {path = ..., weight = 1.0}.",
        )
    for number, table in enumerate(tables):
        yield from _table_problems(number, table)


def _table_problems(number: int, table: dict[str, object]) -> Iterator[Problem]:
    where = f"data.source[{number}]"
    path, weight = table.get("path"), table.get("weight", 1.0)
    if not isinstance(path, str) or not path.strip():
        yield (
            "source",
            f'{where} has path {path!r}, so there is nothing to read. Set path = "stdlib" or a file.',
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        yield (
            "source",
            f"{where} has weight {weight!r}; a share of the samples is a number above 0. "
            "Set weight = 1.0, or remove the table.",
        )
    unknown = sorted(set(table) - {"path", "weight"})
    if unknown:
        yield (
            "source",
            f"{where} has unknown keys {', '.join(unknown)}, which would be ignored. Only path and weight "
            "are known; format and column are set once, as data.format and data.column.",
        )


def _choice_problems(config: DataConfig) -> Iterator[Problem]:
    for key, known in (("format", FORMATS), ("packing", PACKINGS)):
        value = getattr(config, key)
        if value not in known:
            yield (
                key,
                f"data.{key} = {value!r} is not one of {', '.join(known)}. Set data.{key} = {known[0]!r}.",
            )
    for key, good in (("column", "text"), ("tokenizer", "bytes")):
        if not getattr(config, key).strip():
            yield key, f"data.{key} is empty, so it names nothing. Set data.{key} = {good!r}."


def _number_problems(config: DataConfig) -> Iterator[Problem]:
    limits = (
        ("seq_len", 1, 256, "a sample holds at least one token"),
        ("shuffle_blocks", 1, 8, "at least one block is read at a time"),
        ("block_bytes", SMALLEST_BLOCK, 4194304, "smaller blocks cost more to find than to read"),
        ("prefetch", 1, 2, "the reader has to be at least one step ahead"),
    )
    if config.anchor and config.seq_len == 1:
        yield "seq_len", "data.seq_len = 1 is all anchor and no text. Set data.seq_len = 256."
    for key, least, good, why in limits:
        value = getattr(config, key)
        if value < least:
            yield key, f"data.{key} = {value} is below {least}; {why}. Set data.{key} = {good}."
    if not 0.0 <= config.val_fraction < 1.0:
        yield (
            "val_fraction",
            f"data.val_fraction = {config.val_fraction} is no share of the documents that leaves any to "
            "train on; it lies in [0, 1). Set data.val_fraction = 0.01.",
        )
