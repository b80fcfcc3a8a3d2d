"""Memory follows the block size, not the size of the source."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

SOURCE_BYTES = 256 << 20

# VmHWM rather than ru_maxrss: the latter begins at the size of the process that was forked.
READ = r"""
import re, sys
from pathlib import Path
from rayfold.runtime.data.config import DataConfig
from rayfold.runtime.data.dataset import Dataset
from rayfold.runtime.data.index import build_index
from rayfold.runtime.data.loader import Loader
from rayfold.runtime.data.tokenizer import resolve_tokenizer

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

config = DataConfig(source=sys.argv[1], seq_len=2048, block_bytes=1 << 20, shuffle_blocks=4)
tokenizer = resolve_tokenizer(config)
before = peak()
index = build_index(config, tokenizer)
dataset = Dataset(config, index, tokenizer, 0)
with Loader(dataset, cursor=0, batch_size=8, dp_rank=0, dp_size=1, micro_size=8, prefetch=2) as loader:
    for _ in range(int(sys.argv[2])):
        loader.next()
print(index.totals.train.text_bytes, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("rows_of_a_group", "steps"), [(500, 500), (1_000_000, 100)])
def test_a_large_source_is_read_in_little_memory(tmp_path: Path, rows_of_a_group: int, steps: int) -> None:
    """Also when the whole file is a single row group, as writers make it by default."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, 8 << 20, dtype=np.uint8).tobytes().decode()
    schema = pa.schema([("text", pa.string())])
    path = tmp_path / "a.parquet"
    rows = SOURCE_BYTES // 4000
    starts = random.integers(0, len(letters) - 4000, rows)
    texts = pa.array([letters[start : start + 4000] for start in starts.tolist()])
    table = pa.Table.from_arrays([texts], schema=schema)
    pq.write_table(table, path, row_group_size=rows_of_a_group, compression="none", use_dictionary=False)
    del table, texts
    found = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(steps)], capture_output=True, text=True, check=True
    )
    text_bytes, growth = (int(value) for value in found.stdout.split())
    assert text_bytes == rows * 4000
    # Some 70 MiB whatever the size of the source, most of it libraries and thread stacks.
    assert growth < SOURCE_BYTES / 2, f"{growth >> 20} MiB for {SOURCE_BYTES >> 20} MiB"
