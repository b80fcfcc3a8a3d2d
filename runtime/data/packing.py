"""Documents to samples of S tokens, with the boundaries kept.

The documents of a block come in the epoch's order, each with its end token, as one stream. Packing
"documents" cuts that stream every S tokens; packing "none" gives every document samples of its own. A sample
is computed from the block's tokens when it is asked for; nothing is laid out beforehand.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .order import order_key, permute
from .ragged import Ragged, offsets_of

ANCHOR_ID = -1  # the document id of a token that every document behind it sees
IGNORED = -100  # the label of a position that predicts nothing; the value torch's cross entropy leaves out

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence, all [S], or B of them, [B, S].

    `labels` is the next token of the same document, or -100 after its last.
    `positions` count from 0 at the start of every piece of a document, `document_ids` number the pieces;
    padding at the end is a piece of its own without labels. An anchor has the document id -1.
    """

    tokens: Int64s
    labels: Int64s
    positions: Int64s
    document_ids: npt.NDArray[np.int32]

    def row(self, number: int) -> "Sample":
        """Row `number` of arrays [B, S], as views [S]."""
        return Sample(
            tokens=self.tokens[number],
            labels=self.labels[number],
            positions=self.positions[number],
            document_ids=self.document_ids[number],
        )

    def behind(self, first: int) -> "Sample":
        """The positions from `first` on of arrays [S], as views."""
        return Sample(
            tokens=self.tokens[first:],
            labels=self.labels[first:],
            positions=self.positions[first:],
            document_ids=self.document_ids[first:],
        )


class Arranged:
    """The documents of a block in one epoch's order, cut into samples of `seq_len`."""

    def __init__(self, run: Ragged, *, seq_len: int, packing: str, end_id: int, key: int | None) -> None:
        """`key` chooses the order of the documents; None keeps the file's."""
        self._run = run
        self._seq_len = seq_len
        self._packed = packing == "documents"
        self._end_id = end_id
        order = np.arange(len(run), dtype=np.int64)
        self._order = order if key is None else permute(order, len(run), order_key(key, "documents"))
        lengths = run.lengths[self._order]
        # Where each document starts: in the stream of tokens, or in the list of samples.
        pieces = lengths if self._packed else -(-lengths // seq_len)
        self._starts = offsets_of(pieces)
        self._last = int(self._starts[-1])
        self._count = np.arange(seq_len, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """How many samples the documents make."""
        return -(-self._last // self._seq_len) if self._packed else self._last

    def sample(self, number: int, into: Sample) -> None:
        """Write sample `number` of [0, num_samples) into arrays of [S]."""
        if self._packed:
            self._from_stream(number * self._seq_len, into)
        else:
            self._from_document(number, into)

    def _from_stream(self, begin: int, into: Sample) -> None:
        starts = self._starts
        stop = min(begin + self._seq_len, self._last)
        first = int(starts.searchsorted(begin, "right")) - 1
        start, end = int(starts[first]), int(starts[first + 1])
        if end >= stop:  # inside one document: most samples, so worth a path without small arrays
            source = int(self._run.offsets[self._order[first]]) + begin - start
            self._one_piece(source, stop - begin, end == stop, into)
            return
        last = int(starts.searchsorted(stop, "left"))
        begins = starts[first:last]
        froms: Int64s = np.maximum(begins, begin)
        lengths = np.minimum(starts[first + 1 : last + 1], stop) - froms
        sources = self._run.offsets[self._order[first:last]] + (froms - begins)
        self._many_pieces(sources, lengths, bool(starts[last] == stop), into)

    def _from_document(self, number: int, into: Sample) -> None:
        row = int(self._starts.searchsorted(number, "right")) - 1
        document = int(self._order[row])
        offset = (number - int(self._starts[row])) * self._seq_len
        begin, end = int(self._run.offsets[document]) + offset, int(self._run.offsets[document + 1])
        length = min(self._seq_len, end - begin)
        self._one_piece(begin, length, begin + length == end, into)

    def _one_piece(self, source: int, used: int, whole: bool, into: Sample) -> None:
        """Lay out tokens [source, source + used) of the block; `whole` when a document ends there."""
        values = self._run.values
        labelled = used - whole
        into.tokens[:used] = values[source : source + used]
        into.labels[:labelled] = values[source + 1 : source + 1 + labelled]
        into.labels[labelled:] = IGNORED
        into.positions[:] = self._count
        into.document_ids[:] = 0
        if used < self._seq_len:
            self._pad(used, 1, into)

    def _many_pieces(self, sources: Int64s, lengths: Int64s, whole: bool, into: Sample) -> None:
        """Lay several pieces of the block end to end; `whole` says whether the last one ends its document."""
        ends = lengths.cumsum()
        used, pieces = int(ends[-1]), len(lengths)
        positions = self._count[:used] - (ends - lengths).repeat(lengths)
        where = positions + sources.repeat(lengths)
        values = self._run.values
        into.tokens[:used] = values[where]
        # The last token of a block has no next; it is the end of a document, so its label goes below.
        into.labels[:used] = values[np.minimum(where + 1, len(values) - 1)]
        # Every piece but the last ends its document: the next token belongs to another one.
        into.labels[(ends if whole else ends[:-1]) - 1] = IGNORED
        into.positions[:used] = positions
        into.document_ids[:used] = np.arange(pieces).repeat(lengths)
        if used < self._seq_len:
            self._pad(used, pieces, into)

    def _pad(self, used: int, pieces: int, into: Sample) -> None:
        into.tokens[used:] = self._end_id
        into.labels[used:] = IGNORED
        into.positions[used:] = self._count[: self._seq_len - used]
        into.document_ids[used:] = pieces


def empty_sample(*shape: int) -> Sample:
    """Arrays of `shape`, [S] or [B, S], to write samples into."""
    return Sample(
        tokens=np.empty(shape, dtype=np.int64),
        labels=np.empty(shape, dtype=np.int64),
        positions=np.empty(shape, dtype=np.int64),
        document_ids=np.empty(shape, dtype=np.int32),
    )


def write_anchor(into: Sample, end_id: int) -> None:
    """Put an anchor at position 0 of arrays [S], and let positions run through all documents."""
    into.tokens[0] = end_id
    into.labels[0] = IGNORED
    into.document_ids[0] = ANCHOR_ID
    into.positions[:] = np.arange(len(into.positions))


def write_padding(into: Sample, end_id: int) -> None:
    """Fill arrays of [S] with a sample that counts for nothing: every label is ignored."""
    into.tokens[:] = end_id
    into.labels[:] = IGNORED
    into.positions[:] = np.arange(len(into.positions))
    into.document_ids[:] = 0
