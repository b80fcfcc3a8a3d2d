"""What becomes of each kind of source: listed the same everywhere, decoded, and damage left out once."""

import json
import os
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from rayfold.runtime.data.blocks import list_blocks
from rayfold.runtime.data.config import DataConfig
from rayfold.runtime.data.errors import DataError
from rayfold.runtime.data.index import Index, build_index
from rayfold.runtime.data.reader import BlockReader
from rayfold.runtime.data.scan import scan_blocks
from rayfold.runtime.data.sources import list_files
from rayfold.runtime.data.tokenizer import ByteTokenizer
from rayfold.runtime.data.unchanged import check_unchanged

TEXTS = [f"document {i} " + "lorem ipsum ä " * (i % 7) for i in range(200)]


def documents(config: DataConfig) -> list[str]:
    """The text of every document, in file order."""
    reader = BlockReader(config)
    rows = [row.tobytes().decode() for b in list_blocks(config) for row in reader.read(b).documents.rows()]
    reader.close()
    return rows


def write_parquet(
    path: Path, texts: list[str | None], *, rows: int = 20, kind: pa.DataType | None = None
) -> None:
    """Uncompressed and with page checksums, so that a test can find and spoil bytes."""
    table = pa.table({"text": pa.array(texts, type=kind or pa.string()), "id": list(range(len(texts)))})
    pq.write_table(
        table,
        path,
        row_group_size=rows,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
        data_page_size=64 << 10,
        write_batch_size=16,
    )


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
)
def test_any_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Writers differ in how they store the same strings."""
    source = tmp_path / "a.parquet"
    try:
        write_parquet(source, [*TEXTS], kind=kind)
    except (pa.ArrowException, TypeError):
        pytest.skip(f"this pyarrow writes no {kind}")
    assert documents(DataConfig(source=str(source))) == TEXTS


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
@pytest.mark.parametrize("row_group", [20, 200])
def test_row_groups_are_merged_and_cut_to_blocks(tmp_path: Path, block_bytes: int, row_group: int) -> None:
    """Small groups share a block and a large one is read in slices, but the documents stay as they are."""
    texts = [text * 3 for text in TEXTS]
    write_parquet(tmp_path / "a.parquet", [*texts], rows=row_group)
    config = DataConfig(source=str(tmp_path / "a.parquet"), block_bytes=block_bytes)
    assert documents(config) == texts
    sizes = [count.train.text_bytes for count in scan_blocks(list_blocks(config), config, ByteTokenizer())]
    assert max(sizes) < 2 * block_bytes
    assert (len(sizes) == 1) == (block_bytes > 100_000)


def test_slices_of_a_row_group_can_be_read_in_any_order(tmp_path: Path) -> None:
    """Shuffling asks for them in any."""
    write_parquet(tmp_path / "a.parquet", [text * 5 for text in TEXTS], rows=200)
    config = DataConfig(source=str(tmp_path), block_bytes=4096)
    blocks, reader = list_blocks(config), BlockReader(config)
    checksums = [reader.read(block).documents.crc32() for block in blocks]
    assert len(blocks) > 5
    for number in (3, 4, 1, 0, 5, 2, 2):
        assert reader.read(blocks[number]).documents.crc32() == checksums[number]
    reader.close()


def test_a_column_of_repeated_texts_is_cut_by_what_it_decodes_to(tmp_path: Path) -> None:
    """The footer counts a repeated text once; a block must not grow to all its copies."""
    pq.write_table(pa.table({"text": ["x" * 1000, "y" * 1000] * 2000}), tmp_path / "a.parquet")
    config = DataConfig(source=str(tmp_path), block_bytes=100_000)
    counts = scan_blocks(list_blocks(config), config, ByteTokenizer())
    assert sum(count.train.documents for count in counts) == 4000
    assert max(count.train.text_bytes for count in counts) < 300_000


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
def test_json_lines_are_never_cut(tmp_path: Path, block_bytes: int) -> None:
    """A block ends where a line does; a line longer than a block stays whole."""
    texts = [*TEXTS, "z" * 20_000, "last"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert documents(DataConfig(source=str(tmp_path / "a.jsonl"), block_bytes=block_bytes)) == texts


def test_a_large_text_file_is_cut_between_characters(tmp_path: Path) -> None:
    """Without a newline near, a piece ends before a character, never inside one."""
    text = "é漢😀" * 10_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = documents(DataConfig(source=str(tmp_path / "a.txt"), block_bytes=5000))
    assert "".join(found) == text
    assert len(found) > 10
    assert max(len(piece.encode()) for piece in found) <= 5000


def test_small_text_files_share_a_block(tmp_path: Path) -> None:
    """One document a file, sorted by path, hidden and binary files left out."""
    for number in range(30):
        (tmp_path / f"{number:02d}.py").write_text(f"print({number})\n" * 20)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    config = DataConfig(source=str(tmp_path), block_bytes=4096)
    assert documents(config) == [f"print({number})\n" * 20 for number in range(30)]
    assert 1 < len(list_blocks(config)) < 10


def test_a_folder_glob_and_list_find_the_same_files(tmp_path: Path) -> None:
    """Three ways to say the same thing; a data set's README is none of its text."""
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    write_parquet(tmp_path / "deep" / "a.parquet", ["a"])
    (tmp_path / "README.md").write_text("about")
    paths = [tmp_path / "b.jsonl", tmp_path / "deep" / "a.parquet"]
    assert documents(DataConfig(source=str(tmp_path))) == ["b", "a"]
    assert documents(DataConfig(source=[str(path) for path in paths])) == ["b", "a"]
    assert documents(DataConfig(source=str(tmp_path / "**" / "*.[jp]*"))) == ["b", "a"]


def test_the_standard_library_is_a_source() -> None:
    """Every machine can train on something."""
    files = list_files(DataConfig())
    assert len(files) > 200
    assert all(file.name.endswith(".py") and "site-packages" not in file.name for file in files)


def test_a_copy_elsewhere_has_the_same_fingerprint(tmp_path: Path) -> None:
    """Nodes may mount the same data at different places."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", TEXTS)
    first, second = (build_index(DataConfig(source=str(tmp_path / name))) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    write_jsonl(tmp_path / "two" / "a.jsonl", [*TEXTS[:-1], TEXTS[-1].upper()])
    assert build_index(DataConfig(source=str(tmp_path / "two"))).fingerprint != first.fingerprint


def test_ranks_scan_parts_and_json_carries_them(tmp_path: Path) -> None:
    """The pass over the source is split, so its parts must come together to the same index."""
    write_parquet(tmp_path / "a.parquet", [*TEXTS])
    config, tokenizer = DataConfig(source=str(tmp_path), block_bytes=4096, val_fraction=0.2), ByteTokenizer()
    whole = build_index(config)
    blocks = list_blocks(config)
    parts = [scan_blocks(blocks[rank::3], config, tokenizer) for rank in (2, 0, 1)]
    counts = [type(c).from_json(json.loads(json.dumps(c.to_json()))) for part in parts for c in part]
    assert Index.assemble(config, tokenizer, counts) == whole
    assert Index.from_json(whole.to_json()) == whole


def spoil(path: Path, near: bytes) -> None:
    """Flip bytes in the middle of the page that holds `near`."""
    content = bytearray(path.read_bytes())
    at = content.index(near)
    content[at : at + 8] = bytes(255 - byte for byte in content[at : at + 8])
    path.write_bytes(content)


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
def test_a_corrupt_row_group_is_left_out_alone(tmp_path: Path, block_bytes: int) -> None:
    """One bad page costs its row group, is reported once, and the same on every read."""
    texts = [f"unique text {i:04d} " * 4 for i in range(200)]
    write_parquet(tmp_path / "a.parquet", [*texts])
    spoil(tmp_path / "a.parquet", b"unique text 0050")
    config = DataConfig(source=str(tmp_path), block_bytes=block_bytes)
    assert documents(config) == texts[:40] + texts[60:]
    index = build_index(config)
    assert [(skip.path, skip.where) for skip in index.skipped] == [("a.parquet", "row group 2")]
    assert index.totals.skipped == 1
    assert build_index(config) == index


def test_a_corrupt_slice_spoils_the_rest_of_its_row_group_once(tmp_path: Path) -> None:
    """A group read in slices is one thing in the report."""
    texts = [f"unique text {i:05d} " * 50 for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", [*texts], rows=3000)
    spoil(tmp_path / "a.parquet", b"unique text 02000")
    config = DataConfig(source=str(tmp_path), block_bytes=1 << 18)
    index = build_index(config)
    assert [skip.where for skip in index.skipped] == ["row group 0"]
    assert 0 < index.totals.train.documents < 2000
    reader = BlockReader(config)
    for count in reversed(index.counts):  # each slice on its own finds the same as one after the other
        assert reader.read(count.block).documents.crc32() == count.crc32
    reader.close()


def test_text_that_is_no_utf8_is_left_out(tmp_path: Path) -> None:
    """A row group with invalid UTF-8 and a file with it are skipped, the others stay."""
    (tmp_path / "p").mkdir()
    table = pa.table({"text": pa.array([b"good", b"\xff\xfe bad", b"fine", b"too"], type=pa.binary())})
    pq.write_table(table, tmp_path / "p" / "a.parquet", row_group_size=2)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "t" / "b.txt").write_text("café", encoding="utf-8")
    config = DataConfig(source=[str(tmp_path / "p"), str(tmp_path / "t")])
    assert documents(config) == ["fine", "too", "café"]
    assert [(s.path, s.where) for s in build_index(config).skipped] == [
        ("a.parquet", "row group 0"),
        ("a.txt", "file"),
    ]


def test_bad_json_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    """The report names the first of them and counts the rest, so a bad file cannot flood it."""
    lines = [
        '{"text": "a"}',
        "{broken",
        "[1]",
        '{"text": 3}',
        '{"text": null}',
        '{"other": "b"}',
        "",
        '{"text": ""}',
    ]
    lines += ['{"text": "\\ud800"}'] + ["{worse"] * 100 + ['{"text": "z"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path))
    assert documents(config) == ["a", "z"]
    index = build_index(config)
    assert index.totals.skipped == 104
    assert index.totals.ignored == 3
    assert len(index.skipped) == 21
    assert index.skipped[0].where == "line at byte 14"


def test_a_file_without_a_footer_is_left_out(tmp_path: Path) -> None:
    """A truncated upload costs one file."""
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    write_parquet(tmp_path / "b.parquet", ["c", "d"])
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    config = DataConfig(source=str(tmp_path))
    assert documents(config) == ["c", "d"]
    (skip,) = build_index(config).skipped
    assert (skip.path, skip.where) == ("a.parquet", "file")


def test_nulls_and_empty_documents_are_counted_not_trained_on(tmp_path: Path) -> None:
    """They are no damage, but somebody may wonder where the rows went."""
    write_parquet(tmp_path / "a.parquet", ["a", None, "", "b"])
    config = DataConfig(source=str(tmp_path))
    assert documents(config) == ["a", "b"]
    assert build_index(config).totals.ignored == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b'{"text": ""}\n', b"not json\n"])
def test_a_source_without_a_document_is_an_error(tmp_path: Path, content: bytes) -> None:
    """A run that silently trains on nothing helps nobody."""
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"no document.*stdlib"):
        build_index(DataConfig(source=str(tmp_path)))


def test_a_path_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    """Missing files, empty folders and globs without a match each say what was looked for."""
    for source in (tmp_path / "missing", tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(DataError, match=r"nothing to .*stdlib"):
            build_index(DataConfig(source=str(source)))


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    """The likeliest mistake is a spelling."""
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match=r"data.column = 'text'"):
        build_index(DataConfig(source=str(tmp_path), column="txt"))
    with pytest.raises(DataError, match=r"int64.*data.column = 'text'"):
        build_index(DataConfig(source=str(tmp_path), column="id"))
    (tmp_path / "a.parquet").unlink()
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match=r"none of the 1 JSON lines.*data.column = 'text'"):
        build_index(DataConfig(source=str(tmp_path), column="txt"))


@pytest.fixture
def watched(tmp_path: Path) -> tuple[DataConfig, Index]:
    """Three files, and the index of a run that started on them."""
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    config = DataConfig(source=str(tmp_path), block_bytes=4096)
    return config, build_index(config)


def test_an_unchanged_or_touched_source_goes_on(watched: tuple[DataConfig, Index]) -> None:
    """A copy or a checkout changes time stamps and nothing else."""
    config, index = watched
    check_unchanged(index, config)
    os.utime(Path(str(config.source)) / "b.jsonl", ns=(1, 1))
    check_unchanged(index, config)


@pytest.mark.parametrize("change", ["added", "removed", "changed", "edited"])
def test_a_changed_source_is_refused_by_name(watched: tuple[DataConfig, Index], change: str) -> None:
    """The position of the run counts samples of the old files."""
    config, index = watched
    folder = Path(str(config.source))
    if change == "added":
        write_jsonl(folder / "d.jsonl", ["new"])
    elif change == "removed":
        (folder / "c.jsonl").unlink()
    elif change == "changed":
        write_jsonl(folder / "b.jsonl", ["other"])
    else:  # the same size, other text
        path = folder / "b.jsonl"
        path.write_text(path.read_text().replace("document 7 ", "DOCUMENT 7 "))
        os.utime(path, ns=(2, 2))
    file, word = {"added": "d", "removed": "c"}.get(change, "b"), change.replace("edited", "changed")
    with pytest.raises(DataError, match=rf"{word}: {file}\.jsonl"):
        check_unchanged(index, config)


def test_changed_settings_are_refused_by_key(watched: tuple[DataConfig, Index]) -> None:
    """Another length of sample means other samples, though no file changed."""
    config, index = watched
    with pytest.raises(DataError, match=r"data.seq_len = 64 \(was 256\)"):
        check_unchanged(index, DataConfig(source=config.source, block_bytes=4096, seq_len=64))
