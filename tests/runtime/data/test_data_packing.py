"""Packing against a plain reference that walks over the documents token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.runtime.data.order import order_key, permute
from rayfold.runtime.data.packing import ANCHOR_ID, IGNORED, Arranged, Sample, empty_sample, write_anchor
from rayfold.runtime.data.ragged import ragged_of

END = 256
Row = tuple[int, int, int, int]  # token, label, position, document id

documents_of = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=25)


def pack(documents: list[bytes], seq_len: int, packing: str, key: int | None = None) -> list[Sample]:
    """All samples of a block that holds `documents`."""
    run = ragged_of(documents).with_end(END, np.uint16)
    arranged = Arranged(run, seq_len=seq_len, packing=packing, end_id=END, key=key)
    samples = [empty_sample(seq_len) for _ in range(arranged.num_samples)]
    for number, sample in enumerate(samples):
        sample.tokens[:] = -7  # whatever is not written shows
        arranged.sample(number, sample)
    return samples


def reference(documents: list[bytes], seq_len: int, packing: str) -> list[list[Row]]:
    """The same, one token at a time."""
    stream: list[tuple[int, int, int]] = []  # token, label, number of its document
    samples: list[list[tuple[int, int, int]]] = []
    for number, document in enumerate(documents):
        ids = [*document, END]
        labels = [*document[1:], END, IGNORED]
        stream += [(token, label, number) for token, label in zip(ids, labels, strict=True)]
        if packing == "none":
            samples += [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
            stream = []
    samples += [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    return [_numbered(sample, seq_len) for sample in samples]


def _numbered(sample: list[tuple[int, int, int]], seq_len: int) -> list[Row]:
    rows: list[Row] = []
    padded = sample + [(END, IGNORED, -1)] * (seq_len - len(sample))
    piece, position, last = -1, 0, None
    for token, label, document in padded:
        piece, position = (piece, position + 1) if document == last else (piece + 1, 0)
        rows.append((token, label, position, piece))
        last = document
    return rows


@pytest.mark.parametrize("packing", ["documents", "none"])
@given(documents=documents_of, seq_len=st.integers(1, 50))
def test_samples_equal_the_reference(packing: str, documents: list[bytes], seq_len: int) -> None:
    """Tokens, labels, positions and document ids, over every way a document can meet a sample's edge."""
    samples = pack(documents, seq_len, packing)
    found = [
        list(
            zip(
                s.tokens.tolist(),
                s.labels.tolist(),
                s.positions.tolist(),
                s.document_ids.tolist(),
                strict=True,
            )
        )
        for s in samples
    ]
    assert found == reference(documents, seq_len, packing)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), seq_len=st.integers(2, 50))
def test_no_label_crosses_a_document(sizes: list[int], seq_len: int) -> None:
    """Each document repeats a byte of its own, so a label from another one would differ from its token."""
    documents = [bytes([number]) * size for number, size in enumerate(sizes)]
    for sample in pack(documents, seq_len, "documents", key=1):
        text = (sample.labels != IGNORED) & (sample.labels != END)
        assert np.array_equal(sample.labels[text], sample.tokens[text])
        assert np.all(sample.labels[sample.tokens == END] == IGNORED)


@pytest.mark.parametrize("packing", ["documents", "none"])
@given(documents=documents_of, seq_len=st.integers(1, 30), key=st.integers(0, 1000))
def test_the_order_of_documents_is_the_key_s(
    packing: str, documents: list[bytes], seq_len: int, key: int
) -> None:
    """A shuffled block is the block of the shuffled documents."""
    order = permute(np.arange(len(documents)), len(documents), order_key(key, "documents"))
    shuffled = [documents[i] for i in order]
    for one, other in zip(
        pack(documents, seq_len, packing, key), pack(shuffled, seq_len, packing), strict=True
    ):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.labels, other.labels)


def test_only_the_last_sample_of_a_block_is_padded() -> None:
    """Packing wastes less than one sample a block, however long the documents are."""
    lengths = np.random.default_rng(0).lognormal(5.0, 1.5, 2000).astype(int) + 1
    samples = pack([b"x" * int(length) for length in lengths], 256, "documents", key=3)
    total = int((lengths + 1).sum())
    assert len(samples) == -(-total // 256)
    assert total / (len(samples) * 256) > 0.99


def test_an_anchor_stands_before_the_text_and_positions_run_through() -> None:
    """Every document sees the anchor, so its place and theirs are counted in the sample."""
    [plain] = pack([b"ab", b"cde"], 7, "documents")
    anchored = empty_sample(8)
    text = anchored.behind(1)
    for name in ("tokens", "labels", "positions", "document_ids"):
        getattr(text, name)[:] = getattr(plain, name)
    write_anchor(anchored, END)
    assert anchored.tokens.tolist() == [END, *plain.tokens.tolist()]
    assert anchored.labels.tolist() == [IGNORED, *plain.labels.tolist()]
    assert anchored.document_ids.tolist() == [ANCHOR_ID, *plain.document_ids.tolist()]
    assert anchored.positions.tolist() == list(range(8))
