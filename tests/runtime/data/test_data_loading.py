"""Batches: the same for any number of ranks, from any position on, each sample once, and never stuck."""

import json
import pickle
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from rayfold.runtime.data.config import DataConfig
from rayfold.runtime.data.dataset import Dataset
from rayfold.runtime.data.errors import DataError
from rayfold.runtime.data.index import build_index
from rayfold.runtime.data.loader import Batch, Loader, val_batches
from rayfold.runtime.data.packing import ANCHOR_ID, IGNORED
from rayfold.runtime.data.tokenizer import resolve_tokenizer

SEQ_LEN = 32


def write_documents(folder: Path, count: int, prefix: str = "doc") -> Path:
    """JSONL of `count` different documents of 10 to 300 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "a.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"{prefix} {number:05d} " + "x" * (number * 37 % 290)}) + "\n")
    return folder


def open_dataset(config: DataConfig, seed: int = 1) -> Dataset:
    tokenizer = resolve_tokenizer(config)
    return Dataset(config, build_index(config, tokenizer), tokenizer, seed)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Some 20 small blocks, so that windows and epochs end often."""
    folder = write_documents(tmp_path_factory.mktemp("source"), 500)
    return DataConfig(
        source=str(folder), seq_len=SEQ_LEN, block_bytes=4096, shuffle_blocks=3, val_fraction=0.1
    )


@pytest.fixture(scope="module")
def dataset(config: DataConfig) -> Iterator[Dataset]:
    found = open_dataset(config)
    yield found
    found.close()


def steps(
    dataset: Dataset, count: int, *, cursor: int = 0, dp_size: int = 1, micro_size: int = 2
) -> list[Batch]:
    """`count` global batches of 16, put together from those of every rank."""
    rows = []
    loaders = [
        Loader(
            dataset,
            cursor=cursor,
            batch_size=16,
            dp_rank=r,
            dp_size=dp_size,
            micro_size=micro_size,
            prefetch=2,
        )
        for r in range(dp_size)
    ]
    for _ in range(count):
        parts = [batch for loader in loaders for batch in loader.next()]
        rows.append(joined(parts))
    assert {loader.cursor for loader in loaders} == {cursor + 16 * count}
    for loader in loaders:
        loader.close()
    return rows


def joined(parts: list[Batch]) -> Batch:
    names = ("tokens", "labels", "positions", "document_ids")
    return Batch(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        sample_ids=tuple(i for part in parts for i in part.sample_ids),
    )


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.sample_ids == other.sample_ids
        for name in ("tokens", "labels", "positions", "document_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(("dp_size", "micro_size"), [(2, 1), (2, 8), (4, 4), (8, 2)])
def test_any_number_of_ranks_makes_the_same_global_batches(
    dataset: Dataset, dp_size: int, micro_size: int
) -> None:
    """A run may go on with another number of workers."""
    assert_same(steps(dataset, 4, dp_size=dp_size, micro_size=micro_size), steps(dataset, 4))


def test_a_batch_has_the_types_the_models_expect(dataset: Dataset) -> None:
    """Shapes and dtypes are the contract with the trainer."""
    (batch,) = steps(dataset, 1)
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (16, SEQ_LEN)
    assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}
    assert batch.document_ids.dtype == torch.int32
    assert batch.sample_ids == tuple(range(16))


def test_going_on_anywhere_equals_never_having_stopped(config: DataConfig) -> None:
    """200 random positions over three epochs, their ends among them."""
    dataset, other = open_dataset(config), open_dataset(config)
    n = dataset.num_train
    rng = random.Random(0)
    stream = [dataset.sample(cursor).tokens.copy() for cursor in range(3 * n + 64)]
    starts = [n - 1, n, 2 * n - 7, *(rng.randrange(3 * n) for _ in range(197))]
    for start in starts:
        for cursor in range(start, start + 5):
            assert np.array_equal(other.sample(cursor).tokens, stream[cursor])
    for start in (0, n - 5, rng.randrange(2 * n)):
        found = torch.cat([batch.tokens for batch in steps(other, 3, cursor=start, dp_size=2)])
        assert np.array_equal(found.numpy(), np.stack(stream[start : start + 48]))


def test_an_anchor_is_put_before_the_same_text(config: DataConfig) -> None:
    """Samples one token longer hold the anchor and the text of those without it, held-out ones too."""
    plain, anchored = open_dataset(config), open_dataset(replace(config, anchor=True, seq_len=SEQ_LEN + 1))
    assert (anchored.num_train, anchored.num_val) == (plain.num_train, plain.num_val)
    for with_anchor, without in (
        *((anchored.sample(i), plain.sample(i)) for i in range(0, 700, 9)),
        *((anchored.val_sample(i), plain.val_sample(i)) for i in range(plain.num_val)),
    ):
        assert with_anchor.tokens.tolist() == [plain.end_id, *without.tokens.tolist()]
        assert with_anchor.labels.tolist() == [IGNORED, *without.labels.tolist()]
        assert with_anchor.document_ids.tolist() == [ANCHOR_ID, *without.document_ids.tolist()]
    plain.close()
    anchored.close()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", ["documents", "none"])
def test_an_epoch_holds_every_token_once(
    config: DataConfig, shuffle: bool, packing: Literal["documents", "none"]
) -> None:
    """By labels: every token but the first of a document is one, in each epoch and in another order."""
    config = replace(config, shuffle=shuffle, packing=packing, val_fraction=0.0)
    index = build_index(config)
    dataset = open_dataset(config)
    epochs = []
    for epoch in range(2):
        samples = [dataset.sample(epoch * dataset.num_train + i) for i in range(dataset.num_train)]
        epochs.append([sample.tokens.tobytes() for sample in samples])
        labels = np.concatenate([sample.labels for sample in samples])
        assert (labels != IGNORED).sum() == index.totals.train.text_bytes
    assert (epochs[0] == epochs[1]) != shuffle


def test_each_document_comes_once_an_epoch(config: DataConfig) -> None:
    """Without packing a short document is a sample of its own, so its name can be counted."""
    config = replace(config, packing="none", seq_len=512, val_fraction=0.2)
    dataset, tokenizer = open_dataset(config), resolve_tokenizer(config)
    train = [tokenizer.decode(dataset.sample(i).tokens)[:9] for i in range(dataset.num_train)]
    val = [tokenizer.decode(dataset.val_sample(i).tokens)[:9] for i in range(dataset.num_val)]
    assert sorted(train + val) == [f"doc {number:05d}" for number in range(500)]
    assert 50 < len(val) < 150


def test_a_document_is_held_out_by_its_text_alone(tmp_path: Path, config: DataConfig) -> None:
    """Moving documents between files or adding others must not leak them into training."""
    lines = Path(str(config.source), "a.jsonl").read_text().splitlines(keepends=True)
    random.Random(3).shuffle(lines)
    (tmp_path / "x.jsonl").write_text("".join(lines[:300]))
    (tmp_path / "y.jsonl").write_text("".join(lines[200:]))  # a hundred of them twice
    held = []
    for source in (config.source, str(tmp_path)):
        dataset = open_dataset(replace(config, source=source, packing="none", seq_len=512))
        held.append({dataset.val_sample(i).tokens.tobytes() for i in range(dataset.num_val)})
        train = {dataset.sample(i).tokens.tobytes() for i in range(dataset.num_train)}
        assert not train & held[-1]
    assert held[0] == held[1]


def test_holding_out_nothing_is_an_error(tmp_path: Path) -> None:
    """An evaluation over no document would look like a perfect one."""
    write_documents(tmp_path, 3)
    with pytest.raises(DataError, match=r"none of the 3 documents.*val_fraction = 0.5"):
        build_index(DataConfig(source=str(tmp_path), val_fraction=1e-9))
    with pytest.raises(DataError, match=r"all 3 documents"):
        build_index(DataConfig(source=str(tmp_path), val_fraction=1 - 1e-12))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [None, 5])
def test_every_rank_validates_as_many_batches(dataset: Dataset, dp_size: int, limit: int | None) -> None:
    """Ranks meet in collectives, so none may end early; and no sample may count twice."""
    ranks = [
        list(val_batches(dataset, dp_rank=r, dp_size=dp_size, micro_size=4, limit=limit))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [i for batches in ranks for batch in batches for i in batch.sample_ids if i >= 0]
    assert sorted(ids) == list(range(limit or dataset.num_val))
    for batches in ranks:
        for batch in batches:
            for row, i in enumerate(batch.sample_ids):
                assert (i >= 0) == bool((batch.labels[row] != IGNORED).any())


def test_a_mixture_draws_from_each_source_by_its_weight(tmp_path: Path) -> None:
    """By the documents that come, each source in its own epochs, and from any cursor alike."""
    sources: list[dict[str, str | float | int]] = [
        {"path": str(write_documents(tmp_path / name, count, name)), "weight": weight}
        for name, count, weight in (("aaa", 400, 3.0), ("bbb", 20, 1))
    ]
    config = DataConfig(source=sources, seq_len=512, packing="none", block_bytes=4096)
    dataset, other = open_dataset(config), open_dataset(config)
    first = [bytes(dataset.sample(i).tokens[:9].astype(np.uint8)) for i in range(400)]
    assert sum(text.startswith(b"aaa") for text in first) == 300
    assert len({text for text in first if text.startswith(b"aaa")}) == 300
    small = [text for text in first if text.startswith(b"bbb")]
    for epoch in range(5):
        assert len(set(small[epoch * 20 : epoch * 20 + 20])) == 20
    assert small[:20] != small[20:40]
    assert bytes(other.sample(399).tokens[:9].astype(np.uint8)) == first[399]


def test_a_block_that_changed_behind_the_index_is_an_error(tmp_path: Path) -> None:
    """A file replaced during a run would silently repeat and lose samples."""
    folder = write_documents(tmp_path, 50)
    dataset = open_dataset(DataConfig(source=str(folder)))
    path = folder / "a.jsonl"
    path.write_text(path.read_text().replace("doc 00007", "DOC 00007"))
    loader = Loader(dataset, cursor=0, batch_size=2, dp_rank=0, dp_size=1, micro_size=1, prefetch=1)
    for _ in range(2):  # a trainer that asks again gets the cause again
        with pytest.raises(DataError, match=r"a\.jsonl.*checksum"):
            loader.next()
    loader.close()
    assert pickle.loads(pickle.dumps(DataError("why"))).args == ("why",)


def test_close_leaves_no_thread_and_no_next(dataset: Dataset) -> None:
    """Also while the reader waits for room, which is where it spends its life."""
    before = threading.active_count()
    with Loader(dataset, cursor=0, batch_size=4, dp_rank=0, dp_size=1, micro_size=4, prefetch=1) as loader:
        assert threading.active_count() == before + 1
        loader.next()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_a_loader_without_its_thread_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child has no reader; it must not wait for one forever."""
    monkeypatch.setattr(Loader, "_read", lambda self, cursor: None)
    loader = Loader(dataset, cursor=0, batch_size=4, dp_rank=0, dp_size=1, micro_size=4, prefetch=1)
    with loader, pytest.raises(RuntimeError, match="fork"):
        loader.next()


def test_a_batch_that_ranks_cannot_share_is_an_error(dataset: Dataset) -> None:
    """The message holds the nearest size that works."""
    with pytest.raises(DataError, match=r"batch.size = 12"):
        Loader(dataset, cursor=0, batch_size=13, dp_rank=0, dp_size=2, micro_size=2, prefetch=1)
