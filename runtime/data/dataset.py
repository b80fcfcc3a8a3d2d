"""Samples by number: cursor in, sample out, from wherever it lies in the source.

`sample(cursor)` depends on the configuration, the seed and the source alone, so ranks and restarts need to
agree on nothing but the cursor. Memory: the tokens of two windows of blocks (the one in use and the one read
ahead) and of the held-out documents up to a fixed size, all in the smallest integer type that holds the
vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .cache import BlockCache
from .config import DataConfig
from .index import Index
from .mixture import Mixture
from .order import EpochOrder, order_key
from .packing import Arranged, Sample, empty_sample, write_anchor
from .scan import BlockCount
from .tokenizer import Tokenizer

VAL_CACHE_BYTES = 64 << 20


class Dataset:
    """All samples of a run; `num_train` and `num_val` count one epoch, summed over a mixture's sources."""

    def __init__(self, config: DataConfig, index: Index, tokenizer: Tokenizer, seed: int) -> None:
        self.seq_len = config.seq_len
        self._text_len = config.text_len
        self.end_id = tokenizer.end_id
        weights = index.settings["weights"]
        self._mixture = Mixture(weights)
        self._sources = [
            _Source(number, config, index.counts, tokenizer, seed) for number in range(len(weights))
        ]
        self.num_train = index.totals.train.samples
        self.num_val = index.totals.val.samples
        self._val = BlockCache(index.counts, config, tokenizer, split="val", budget_bytes=VAL_CACHE_BYTES)
        self._val_starts = np.cumsum([0, *(count.val.samples for count in index.counts)])
        self._val_arranged: tuple[int, Arranged] | None = None
        self._packing = config.packing

    def sample(self, cursor: int, into: Sample | None = None) -> Sample:
        """The training sample at a global cursor, which counts on through all epochs; written into `into`."""
        source, local = self._mixture.locate(cursor)
        into = into or empty_sample(self.seq_len)
        self._sources[source].sample(local, self._text_of(into))
        return self._anchored(into)

    def epoch(self, cursor: int) -> float:
        """How many times the first source was read before `cursor`, with the fraction."""
        local = self._mixture.locate(cursor)[1]
        return local / self._sources[0].num_samples

    def val_sample(self, number: int, into: Sample | None = None) -> Sample:
        """Sample `number` of [0, num_val), in file order; written into `into`."""
        block = int(self._val_starts.searchsorted(number, "right")) - 1
        held = self._val_arranged
        if held is None or held[0] != block:
            arranged = Arranged(
                self._val.get(block),
                seq_len=self._text_len,
                packing=self._packing,
                end_id=self.end_id,
                key=None,
            )
            held = self._val_arranged = (block, arranged)
        into = into or empty_sample(self.seq_len)
        held[1].sample(number - int(self._val_starts[block]), self._text_of(into))
        return self._anchored(into)

    def _text_of(self, sample: Sample) -> Sample:
        """The part of a sample that text is written into."""
        return sample if self._text_len == self.seq_len else sample.behind(self.seq_len - self._text_len)

    def _anchored(self, sample: Sample) -> Sample:
        if self._text_len < self.seq_len:
            write_anchor(sample, self.end_id)
        return sample

    def read_ahead(self, cursor: int) -> bool:
        """Load one block that will be needed after the window of `cursor`; False when all are there."""
        source, local = self._mixture.locate(cursor)
        return self._sources[source].read_ahead(local)

    def close(self) -> None:
        """Let go of open files and of the blocks in memory."""
        self._val.close()
        for source in self._sources:
            source.close()


class _Source:
    """One source of the mixture, read again and again, each epoch in its own order."""

    def __init__(
        self, number: int, config: DataConfig, counts: Sequence[BlockCount], tokenizer: Tokenizer, seed: int
    ) -> None:
        self._config = config
        self._number = number
        self._seed = seed
        self._end_id = tokenizer.end_id
        own = [count for count in counts if count.block.source == number and count.train.samples]
        self._blocks = [count.block.number for count in own]
        self._counts = np.array([count.train.samples for count in own], dtype=np.int64)
        self.num_samples = int(self._counts.sum())
        self._window_blocks = config.shuffle_blocks if config.shuffle else 1
        self._cache = BlockCache(
            counts, config, tokenizer, split="train", budget_bytes=self._budget(own, tokenizer)
        )
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._arranged: OrderedDict[tuple[int, int], Arranged] = OrderedDict()

    def _budget(self, own: Sequence[BlockCount], tokenizer: Tokenizer) -> int:
        itemsize = 2 if tokenizer.vocab_size <= 1 << 16 else 4
        sizes = sorted((c.train.tokens * itemsize + c.train.documents * 8 + 8 for c in own), reverse=True)
        return sum(sizes[: 2 * self._window_blocks])

    def sample(self, local: int, into: Sample) -> None:
        epoch, index = divmod(local, self.num_samples)
        slot, offset = self._order(epoch).locate(index)
        self._arrange(epoch, self._blocks[slot]).sample(offset, into)

    def read_ahead(self, local: int) -> bool:
        epoch, index = divmod(local, self.num_samples)
        slots = self._order(epoch).blocks_after(index)
        missing = [self._blocks[slot] for slot in slots if self._blocks[slot] not in self._cache]
        if missing:
            self._cache.get(missing[0])
        return len(missing) > 1

    def close(self) -> None:
        self._arranged.clear()
        self._cache.close()

    def _key(self, epoch: int, *rest: int | str) -> int:
        return order_key(self._seed, self._number, epoch, *rest)

    def _order(self, epoch: int) -> EpochOrder:
        found = self._orders.get(epoch)
        if found is None:
            found = self._orders[epoch] = EpochOrder(
                self._counts,
                key=self._key(epoch),
                shuffle=self._config.shuffle,
                shuffle_blocks=self._window_blocks,
            )
            # Two, since the reader may be an epoch ahead of whoever asks for a sample by hand.
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return found

    def _arrange(self, epoch: int, block: int) -> Arranged:
        pair = (epoch, block)
        found = self._arranged.get(pair)
        if found is None:
            found = Arranged(
                self._cache.get(block),
                seq_len=self._config.text_len,
                packing=self._config.packing,
                end_id=self._end_id,
                key=self._key(epoch, "block", block) if self._config.shuffle else None,
            )
            self._arranged[pair] = found
            # An arrangement keeps its block's tokens alive, so no more of them than a window has blocks.
            while len(self._arranged) > self._window_blocks:
                self._arranged.popitem(last=False)
        return found


def split_share(total: int, *, rank: int, size: int) -> tuple[int, int]:
    """The [from, to) of `total` things that `rank` of `size` takes: neighbours, the first ranks no less."""
    share = -(-total // size)
    return min(rank * share, total), min((rank + 1) * share, total)
