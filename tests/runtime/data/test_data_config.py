"""The `[data]` section refuses what cannot work, all of it at once, with a value that does."""

import subprocess
import sys
from typing import Any

import pytest

from rayfold.runtime.data.config import DataConfig

IMPOSSIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({"source": ""}, "source", "stdlib"),
    ({"source": []}, "source", "stdlib"),
    ({"source": ["stdlib", " "]}, "source", "stdlib"),
    ({"source": ["stdlib", {"path": "stdlib", "weight": 1.0}]}, "source", "{path = ..., weight = 1.0}"),
    ({"source": [{"weight": 1.0}]}, "source", 'path = "stdlib"'),
    ({"source": [{"path": "a", "weight": 0.0}]}, "source", "weight = 1.0"),
    ({"source": [{"path": "a", "weight": float("nan")}]}, "source", "weight = 1.0"),
    ({"source": [{"path": "a", "weight": "many"}]}, "source", "weight = 1.0"),
    ({"source": [{"path": "a", "weight": 1.0, "column": "b"}]}, "source", "data.column"),
    ({"format": "csv"}, "format", "data.format = 'auto'"),
    ({"packing": "tight"}, "packing", "data.packing = 'documents'"),
    ({"column": ""}, "column", "data.column = 'text'"),
    ({"tokenizer": ""}, "tokenizer", "data.tokenizer = 'bytes'"),
    ({"seq_len": 0}, "seq_len", "data.seq_len = 256"),
    ({"shuffle_blocks": 0}, "shuffle_blocks", "data.shuffle_blocks = 8"),
    ({"block_bytes": 100}, "block_bytes", "data.block_bytes = 4194304"),
    ({"prefetch": 0}, "prefetch", "data.prefetch = 2"),
    ({"val_fraction": 1.0}, "val_fraction", "data.val_fraction = 0.01"),
    ({"val_fraction": -0.1}, "val_fraction", "data.val_fraction = 0.01"),
]


def test_the_defaults_have_no_problem() -> None:
    """A run without a `[data]` section starts on any machine."""
    assert DataConfig().problems() == []


@pytest.mark.parametrize(("fields", "key", "remedy"), IMPOSSIBLE)
def test_an_impossible_value_is_named_with_its_remedy(fields: dict[str, Any], key: str, remedy: str) -> None:
    """The message holds what to type instead."""
    (problem,) = DataConfig(**fields).problems()
    assert problem[0] == key
    assert remedy in problem[1]


def test_all_problems_are_reported_together() -> None:
    """Whoever corrects a file wants to do it once."""
    config = DataConfig(seq_len=0, prefetch=0, val_fraction=2.0, column="")
    assert [key for key, _ in config.problems()] == ["column", "seq_len", "prefetch", "val_fraction"]


def test_the_section_is_read_without_heavy_imports() -> None:
    """`rayfold train --help` should not wait for torch."""
    code = (
        "import sys, rayfold.runtime.data.config as c; c.DataConfig().problems(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
