"""Decoded blocks, the most recently used ones, within a budget of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from .config import DataConfig
from .errors import DataError
from .ragged import Ragged
from .reader import BlockReader
from .scan import BlockCount, held_out, to_tokens
from .tokenizer import Tokenizer


class BlockCache:
    """The tokens of one split's documents, by block. Safe to use from several threads."""

    def __init__(
        self,
        counts: Sequence[BlockCount],
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        split: str,
        budget_bytes: int,
    ) -> None:
        self._counts = counts
        self._config = config
        self._tokenizer = tokenizer
        self._split = split
        self._budget = budget_bytes
        self._reader = BlockReader(config)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Ragged] = OrderedDict()
        self._nbytes = 0

    def __contains__(self, block: int) -> bool:
        return block in self._kept

    @property
    def nbytes(self) -> int:
        """Memory of the tokens kept."""
        return self._nbytes

    def get(self, block: int) -> Ragged:
        """Token ids of the block's documents. Raises DataError when the file is not what was counted."""
        with self._lock:
            if block in self._kept:
                self._kept.move_to_end(block)
                return self._kept[block]
            run = self._load(self._counts[block])
            self._kept[block] = run
            self._nbytes += run.nbytes
            # The newest stays even when it is larger than the budget: somebody is about to use it.
            while self._nbytes > self._budget and len(self._kept) > 1:
                self._nbytes -= self._kept.popitem(last=False)[1].nbytes
            return run

    def _load(self, count: BlockCount) -> Ragged:
        decoded = self._reader.read(count.block)
        crc32 = decoded.documents.crc32()
        if crc32 != count.crc32:
            raise _changed(count, crc32, [f"{s.where} {s.reason}" for s in decoded.skipped])
        is_val = held_out(decoded, self._config.val_fraction)
        documents = decoded.documents.select(is_val if self._split == "val" else ~is_val)
        return to_tokens(documents, count.block, self._tokenizer)

    def close(self) -> None:
        """Let go of open files and of the tokens."""
        with self._lock:
            self._reader.close()
            self._kept.clear()
            self._nbytes = 0


def _changed(count: BlockCount, crc32: int, problems: list[str]) -> DataError:
    block = count.block
    files = block.files[0] if len(block.files) == 1 else f"one of {block.files[0]} ... {block.files[-1]}"
    unit = {"parquet": "row groups", "tokens": "record batches"}.get(block.kind, "bytes")
    found = f" ({'; '.join(problems[:3])})" if problems else ""
    return DataError(
        f"the source changed since the run started: {files}, {unit} {block.start} to {block.stop}, has "
        f"checksum {crc32:08x} instead of {count.crc32:08x}{found}. Samples would be lost or repeated. "
        "Put the file back as it was, or start a new run (another run.dir)."
    )
