"""Batches for one rank, made by a thread that runs ahead of training.

Rank r of a step takes the samples [cursor + r * n, cursor + (r + 1) * n) of the global batch, n = G /
dp_size. The position of a run is `cursor` alone: how many samples the steps handed out so far consumed, over
all ranks. Batches waiting in the queue do not count, so nothing is lost when a run stops.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .dataset import Dataset, split_share
from .errors import DataError
from .packing import Sample, empty_sample, write_padding

_POLL_S = 0.05  # how soon a waiting thread notices that it should stop
PADDING_ID = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch: int64 [B, S], and `document_ids` int32 [B, S].

    `sample_ids` are the samples' global cursors (or val numbers); -1 marks a row that only fills the batch.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor
    sample_ids: tuple[int, ...]


def to_batch(samples: Sample, sample_ids: Sequence[int]) -> Batch:
    """Arrays [B, S] as tensors that share their memory."""
    return Batch(
        tokens=torch.from_numpy(samples.tokens),
        labels=torch.from_numpy(samples.labels),
        positions=torch.from_numpy(samples.positions),
        document_ids=torch.from_numpy(samples.document_ids),
        sample_ids=tuple(sample_ids),
    )


class Loader:
    """An endless supply of steps for one data-parallel rank. Close it, or use it in a `with`.

    Raises DataError when the ranks cannot share the global batch evenly in whole microbatches.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        cursor: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        micro_size: int,
        prefetch: int,
    ) -> None:
        _check_sizes(batch_size, dp_size, micro_size)
        self._dataset = dataset
        self._cursor = cursor
        self._batch_size = batch_size
        self._share = batch_size // dp_size
        self._offset = dp_rank * self._share
        self._micro_size = micro_size
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(cursor,), name="data-reader", daemon=True)
        self._thread.start()

    @property
    def cursor(self) -> int:
        """Samples consumed over all ranks by the steps handed out; ask at the end of a step."""
        return self._cursor

    def next(self) -> list[Batch]:
        """The microbatches of the next step. Raises what the reader raised, and keeps raising it."""
        if self._failure is None and not self._stop.is_set():
            found = self._wait()
            if not isinstance(found, BaseException):
                self._cursor += self._batch_size
                return found
            self._failure = found
        if self._failure is not None:
            raise self._failure
        raise RuntimeError("the loader was closed, so it has no next step; make a new one at its cursor")

    def close(self) -> None:
        """Stop the reader and wait for it; it finishes the block it is decoding."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> list[Batch] | BaseException:
        while True:
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                # A thread puts its error into the queue; one that is gone without was killed with the process
                # forked, for instance.
                if not self._thread.is_alive() and self._ready.empty():
                    return RuntimeError(
                        f"the reader thread is gone at sample {self._cursor} without an error, as happens "
                        "after a fork; make the Loader in the process that uses it"
                    )

    def _read(self, cursor: int) -> None:
        try:
            while not self._stop.is_set():
                self._hand_over(self._step(cursor), cursor)
                cursor += self._batch_size
        except BaseException as error:
            self._hand_over(error, None)

    def _hand_over(self, item: list[Batch] | BaseException, cursor: int | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                if cursor is not None:
                    self._dataset.read_ahead(cursor + self._offset)

    def _step(self, cursor: int) -> list[Batch]:
        first = cursor + self._offset
        starts = range(first, first + self._share, self._micro_size)
        return [self._microbatch(range(start, start + self._micro_size)) for start in starts]

    def _microbatch(self, cursors: range) -> Batch:
        samples = empty_sample(len(cursors), self._dataset.seq_len)
        for row, cursor in enumerate(cursors):
            self._dataset.sample(cursor, samples.row(row))
        return to_batch(samples, cursors)


def val_batches(
    dataset: Dataset, *, dp_rank: int, dp_size: int, micro_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """A rank's share of the held-out samples, or of the first `limit`, each exactly once over all ranks.

    Every rank yields the same number of batches [micro_size, S]; rows without a sample have no labels.
    """
    total = dataset.num_val if limit is None else min(limit, dataset.num_val)
    start, stop = split_share(total, rank=dp_rank, size=dp_size)
    largest_share = -(-total // dp_size)
    num_batches = -(-largest_share // micro_size)
    for number in range(num_batches):
        first = start + number * micro_size
        ids = [i if i < stop else PADDING_ID for i in range(first, first + micro_size)]
        samples = empty_sample(micro_size, dataset.seq_len)
        for row, i in enumerate(ids):
            if i == PADDING_ID:
                write_padding(samples.row(row), dataset.end_id)
            else:
                dataset.val_sample(i, samples.row(row))
        yield to_batch(samples, ids)


def _check_sizes(batch_size: int, dp_size: int, micro_size: int) -> None:
    if batch_size < 1 or batch_size % (dp_size * micro_size):
        unit = dp_size * micro_size
        raise DataError(
            f"batch.size = {batch_size} is no multiple of {dp_size} data-parallel ranks * batch.micro_size = "
            f"{micro_size}, so the ranks would take unequal shares. Set batch.size = "
            f"{max(1, batch_size // unit) * unit}, or lower batch.micro_size."
        )
