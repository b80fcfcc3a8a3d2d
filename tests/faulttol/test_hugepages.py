"""Files in huge pages are the files that they would be without."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfold.faulttol import hugepages
from rayfold.faulttol.hugepages import HUGE_BYTES, allocate

SIZES = [1, 40_960, HUGE_BYTES - 1, HUGE_BYTES, HUGE_BYTES + 1, 5 * HUGE_BYTES + 12_345]


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rayfold-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("nbytes", SIZES)
def test_a_file_has_its_length_all_of_its_pages_and_nothing_in_them(
    memory: Path, nbytes: int, huge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel that gives huge pages, and with one that gives none."""
    if not huge:
        monkeypatch.setattr(hugepages, "_collapse", lambda fd, nbytes: False)
    with open(memory / "file", "w+b") as file:
        allocate(file.fileno(), nbytes)
        assert os.fstat(file.fileno()).st_size == nbytes
        assert os.fstat(file.fileno()).st_blocks * 512 >= nbytes
        assert file.read() == bytes(nbytes)
        # to the byte: what a huge page has beyond the end would count against everybody's memory
        assert os.fstat(file.fileno()).st_blocks * 512 < nbytes + 4096


def test_what_does_not_fit_is_told_before_memory_is_full(memory: Path) -> None:
    there = os.statvfs(memory)
    with open(memory / "file", "w+b") as file:
        with pytest.raises(OSError, match="No space left") as caught:
            allocate(file.fileno(), 2 * there.f_blocks * there.f_frsize)
        assert caught.value.errno == errno.ENOSPC
        assert os.fstat(file.fileno()).st_blocks == 0
