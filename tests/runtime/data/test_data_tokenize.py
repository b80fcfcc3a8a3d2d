"""Tokenizers keep every byte of the text, and a tokenized source is the text it came from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.ipc  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerModel
from tokenizers import models

from rayfold.runtime.data import tokenize as tokenize_module
from rayfold.runtime.data.config import DataConfig
from rayfold.runtime.data.dataset import Dataset
from rayfold.runtime.data.errors import DataError
from rayfold.runtime.data.index import build_index
from rayfold.runtime.data.ragged import ragged_of
from rayfold.runtime.data.tokenize import tokenize_source
from rayfold.runtime.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer, resolve_tokenizer
from rayfold.runtime.data.train_bpe import train_bpe

SENTENCES = [f"Le café n° {i} coûte {i * 7 % 13} €, 漢字 and plain English words. " for i in range(400)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_bpe(SENTENCES, 400))
    return JsonTokenizer(path)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_byte_tokenizer_is_lossless(text: str) -> None:
    """Ids are the bytes themselves, so nothing can be lost or counted wrong."""
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(max_examples=50)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_a_trained_tokenizer_is_lossless(bpe: JsonTokenizer, texts: list[str]) -> None:
    """Round trip, and the bytes that ids stand for add up to the text's, which bits per byte rests on."""
    for ids, text in zip(bpe.encode_batch(texts), texts, strict=True):
        assert bpe.decode(ids) == text
        assert bpe.token_bytes[ids].sum() == len(text.encode())
    run = bpe.encode(ragged_of([text.encode() for text in texts]))
    assert np.array_equal(run.values[run.offsets[1:] - 1], [bpe.end_id] * len(texts))
    assert bpe.token_bytes[run.values].sum() == sum(len(text.encode()) for text in texts)


def test_text_that_spells_a_special_token_stays_text(bpe: JsonTokenizer) -> None:
    """A document must not be able to end itself."""
    (ids,) = bpe.encode_batch(["a<|endoftext|>b"])
    assert bpe.end_id not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_a_tokenizer_file_that_does_not_serve_is_an_error(tmp_path: Path) -> None:
    """Missing, broken, and without an end token: each says what to give instead."""
    with pytest.raises(DataError, match=r'cannot be read.*"bytes"'):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r'no tokenizer.*"bytes"'):
        load_tokenizer(str(tmp_path / "a.json"))
    TokenizerModel(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "b.json"))
    with pytest.raises(DataError, match=r"added_tokens"):
        load_tokenizer(str(tmp_path / "b.json"))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """JSONL of about 1 MB, with shards so small that there are several."""
    monkeypatch.setattr(tokenize_module, "SHARD_TEXT_BYTES", 200_000)
    folder = tmp_path / "source"
    folder.mkdir()
    with (folder / "a.jsonl").open("w") as file:
        for number in range(1500):
            file.write(json.dumps({"text": f"{number} {SENTENCES[number % 400] * (number % 20)}"}) + "\n")
        file.write("{bad\n")
    return DataConfig(source=str(folder), block_bytes=50_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tokenized_source_holds_the_same_documents(source: DataConfig, tmp_path: Path) -> None:
    """Same text, same held-out documents, and the folder brings its tokenizer along."""
    summary = tokenize_source(source, tmp_path / "out", vocab_size=500)
    assert summary.shards > 3
    assert [skip.where for skip in summary.skipped]
    config = DataConfig(source=str(tmp_path / "out"), val_fraction=0.1, seq_len=64, block_bytes=20_000)
    tokenizer = resolve_tokenizer(config)
    index = build_index(config, tokenizer)
    text = DataConfig(
        source=source.source, tokenizer=str(tmp_path / "out" / "tokenizer.json"), val_fraction=0.1, seq_len=64
    )
    direct = build_index(text)
    assert (index.totals.train.documents, index.totals.train.text_bytes, index.totals.train.tokens) == (
        direct.totals.train.documents,
        direct.totals.train.text_bytes,
        direct.totals.train.tokens,
    )
    assert index.totals.val.documents == direct.totals.val.documents > 0
    dataset = Dataset(config, index, tokenizer, 0)
    assert tokenizer.decode(dataset.val_sample(0).tokens)
    assert len(tokenizer.decode(dataset.sample(5).tokens)) > 20


def test_a_damaged_shard_costs_its_record_batch(source: DataConfig, tmp_path: Path) -> None:
    """The index beside the shards knows the checksum of every batch."""
    out = tmp_path / "out"
    tokenize_source(source, out, vocab_size=500)
    path = out / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    index = build_index(DataConfig(source=str(out)))
    assert [(skip.path, skip.where) for skip in index.skipped] == [(path.name, "record batch 0")]


class Interrupt(Exception):
    """What a progress callback raises in place of a crash."""


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (1, 0), (7, 2), (15, 4)])
def test_an_interrupted_tokenization_goes_on_to_the_same_bytes(
    source: DataConfig, tmp_path: Path, after: int, kept: int
) -> None:
    """Finished shards are kept, and nobody can tell from the result that there was an interruption."""
    calls = 0

    def fail(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupt

    whole = tokenize_source(source, tmp_path / "whole", vocab_size=500)
    with pytest.raises(Interrupt):
        tokenize_source(source, tmp_path / "out", vocab_size=500, progress=fail)
    assert not (tmp_path / "out" / "index.json").exists()
    summary = tokenize_source(source, tmp_path / "out", vocab_size=500)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert summary.tokens == whole.tokens
    assert summary.kept == kept


def test_a_killed_tokenization_goes_on_to_the_same_bytes(source: DataConfig, tmp_path: Path) -> None:
    """SIGKILL leaves no chance to tidy up, at whatever moment it comes."""
    out = tmp_path / "out"
    code = f"""
import sys, time
from pathlib import Path
from rayfold.runtime.data import tokenize
from rayfold.runtime.data.config import DataConfig
tokenize.SHARD_TEXT_BYTES = 200_000
config = DataConfig(source={source.source!r}, block_bytes=50_000)
tokenize.tokenize_source(
    config, Path({str(out)!r}), vocab_size=500, progress=lambda done, total, what: time.sleep(0.05)
)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (out / "shard-00001.arrow").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert tokenize_source(source, out, vocab_size=500).kept >= 1
    tokenize_source(source, tmp_path / "whole", vocab_size=500)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_spoilt_shard_is_written_again(source: DataConfig, tmp_path: Path) -> None:
    """The checksum decides, not the name."""
    first = tokenize_source(source, tmp_path / "out", vocab_size=500)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00000.arrow").write_bytes(b"spoilt")
    assert tokenize_source(source, tmp_path / "out", vocab_size=500).kept == first.shards - 1
    assert contents(tmp_path / "out") == before


def test_an_edited_file_of_the_same_size_is_tokenized_again(source: DataConfig, tmp_path: Path) -> None:
    """Going on must not keep shards of the old text."""
    tokenize_source(source, tmp_path / "out", vocab_size=500)
    path = Path(str(source.source)) / "a.jsonl"
    path.write_text(path.read_text().replace("English", "Spanish"))
    os.utime(path, ns=(5, 5))
    assert tokenize_source(source, tmp_path / "out", vocab_size=500).kept == 0


def test_a_folder_of_something_else_is_refused(source: DataConfig, tmp_path: Path) -> None:
    """Another source, size or tokenizer, two of them at once, and tokens in place of text."""
    out = tmp_path / "out"
    tokenize_source(source, out, vocab_size=500)
    with pytest.raises(DataError, match=r"another tokenizer.*another folder"):
        tokenize_source(source, out, vocab_size=600)
    with pytest.raises(DataError, match=r"another source.*another folder"):
        tokenize_source(DataConfig(source=str(Path(__file__))), out, vocab_size=500)
    with pytest.raises(DataError, match="tokenized already"):
        tokenize_source(DataConfig(source=str(out)), tmp_path / "b", vocab_size=500)
    with pytest.raises(DataError, match="one of them"):
        tokenize_source(source, tmp_path / "b", vocab_size=500, tokenizer=str(out / "tokenizer.json"))
    with pytest.raises(DataError, match="at least 257"):
        tokenize_source(source, tmp_path / "b", vocab_size=256)


def test_another_tokenizer_than_the_source_s_is_refused(source: DataConfig, tmp_path: Path) -> None:
    """Its ids would decode to other text; the same one by another path is fine."""
    out = tmp_path / "out"
    tokenize_source(source, out, vocab_size=500)
    again = tokenize_source(source, tmp_path / "again", tokenizer=str(out / "tokenizer.json"))
    assert again.tokens == build_index(DataConfig(source=str(out))).totals.train.tokens - again.documents
    resolve_tokenizer(DataConfig(source=str(out), tokenizer=str(tmp_path / "again" / "tokenizer.json")))
    (tmp_path / "other.json").write_bytes(train_bpe(SENTENCES, 300))
    with pytest.raises(DataError, match=r"tokenized with .*tokenize the source again"):
        resolve_tokenizer(DataConfig(source=str(out), tokenizer=str(tmp_path / "other.json")))


def test_shards_are_plain_arrow_files(source: DataConfig, tmp_path: Path) -> None:
    """Other tools read them: a row a document, the smallest integer type that holds the vocabulary."""
    tokenize_source(source, tmp_path / "out", vocab_size=500)
    table = pyarrow.ipc.open_file(tmp_path / "out" / "shard-00000.arrow").read_all()
    assert str(table.schema.field("tokens").type.value_type) == "uint16"
    tokenizer = JsonTokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.decode(table.column("tokens")[1].as_py()) == f"1 {SENTENCES[1]}"
