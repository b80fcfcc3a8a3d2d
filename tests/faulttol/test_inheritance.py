"""A run takes over the memory of one that came to no end: nothing is copied, nobody else writes any more."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed import killed, live, state_of

from rayfold.faulttol.inheritance import TAKEN, inherit, remove, rest_of, writers_of
from rayfold.faulttol.pins import Pins
from rayfold.faulttol.protection import PROTECTS
from rayfold.faulttol.slots import Slot
from rayfold.faulttol.untold import UNTOLD, Untold, untold_in
from rayfold.faulttol.vault import Vault, rank_of

MIB = 1 << 20
NUMEL = MIB // 8


def left_by(state: Path, node: str, *, rank: int, steps: int, slots: int = 2) -> Vault:
    """What a rank of a run that was killed has left on a node."""
    vault = Vault(state / node, 1 << 30, run="before", slots=slots)
    files = vault.reserve(rank, MIB)
    killed(lambda: live(files, NUMEL, steps=steps))
    (state / f"{node}.lock").touch()
    return vault


def new_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "now-state" / "node"
    folder.mkdir(parents=True)
    return folder


def test_images_are_the_new_runs_and_not_copied(tmp_path: Path) -> None:
    """The same files, of the same steps, with the same bytes; what is asked of the slots is asked anew."""
    state, into = tmp_path / "before-state", new_folder(tmp_path)
    vault = left_by(state, "a", rank=1, steps=4)
    Pins(vault.folder, [1], 1).settle(3)
    Pins(vault.folder, [1], 1).wait_for(4)
    before = {(p.name, p.stat().st_ino) for p in (state / "a").iterdir()}
    assert rest_of(state)
    size = inherit([state], into, run="now")
    assert {(p.name, p.stat().st_ino) for p in into.iterdir()} == before
    assert size == sum(path.stat().st_size for path in into.iterdir())
    assert not state.exists()
    assert not rest_of(state)
    now = Vault(into, 1 << 30, run="now")
    assert [(info.kind, info.step) for info in now.inventory()] == [("arena", 4), ("slot", 3), ("slot", 4)]
    image = now.open("rank-00001.slot-1")
    assert image.tensor(image.part("w")).equal(state_of(4, NUMEL))
    slots = now.files_of(1).slots
    assert Slot.open(slots[0]).pins == (-1, -1)
    assert inherit([state], into, run="now") == 0, "there is nothing left to take"
    left_by(state, "a", rank=1, steps=9)
    assert inherit([state], into, run="now") == 0, "its ranks may be at work by now"
    assert now.open("rank-00001.arena").step == 4


def test_what_is_of_no_use_is_given_back(tmp_path: Path) -> None:
    """Damaged headers, parities of nodes that are no more, files of nobody: no run would ever read them."""
    state, into = tmp_path / "before-state", new_folder(tmp_path)
    vault = left_by(state, "a", rank=0, steps=4)
    vault.store("parity-0-0-p", b"x" * 1000, step=4, epoch=1, progress={PROTECTS: {}})
    vault.store("peer-rank-00003", b"y" * 1000, step=4, epoch=1)
    (state / "a" / "notes.txt").write_text("?")
    with open(state / "a" / "rank-00000.slot-1", "r+b") as file:
        file.write(b"\xff" * 64)
    inherit([state], into, run="now")
    names = ["peer-rank-00003.blob", "rank-00000.arena", "rank-00000.slot-0"]
    assert sorted(path.name for path in into.iterdir()) == names
    assert [info.step for info in Vault(into, 1 << 30, run="now").inventory()] == [4, 4, 3]


def test_of_a_rank_that_had_moved_its_last_place_counts(tmp_path: Path) -> None:
    """Its files are left on the node that it was on before; all nodes here were on one machine."""
    state, into = tmp_path / "before-state", new_folder(tmp_path)
    left_by(state, "a", rank=0, steps=9)
    left_by(state, "b", rank=0, steps=5)
    left_by(state, "c", rank=1, steps=9)
    inherit([state], into, run="now")
    found = Vault(into, 1 << 30, run="now").inventory()
    assert sorted((rank_of(info), info.step) for info in found) == [
        (0, 8),
        (0, 9),
        (0, 9),
        (1, 8),
        (1, 9),
        (1, 9),
    ]


def test_lines_that_nobody_was_told_are_kept_together(tmp_path: Path) -> None:
    """Rank 0 may have been on several nodes, and several runs may have come to no end in a row."""
    first, second, into = tmp_path / "first-state", tmp_path / "second-state", new_folder(tmp_path)
    for state, node, step in ((first, "a", 1), (first, "b", 2), (second, "c", 3)):
        file = Untold(state / node)
        file.add({"step": step, "time_unix": 0.0})
        file.close()
    inherit([second, first], into, run="now")
    assert [line["step"] for line in untold_in(into, after=0)] == [1, 2, 3]
    assert [path.name for path in into.iterdir()] == [UNTOLD]


def test_one_that_was_killed_while_it_took_over_is_gone_on_from(tmp_path: Path) -> None:
    """The folder is there under its new name, or within that of a run that was lost in its turn."""
    state, into = tmp_path / "before-state", new_folder(tmp_path)
    left_by(state, "a", rank=0, steps=4)
    os.rename(state / "a", into / f"a{TAKEN}")
    inherit([state], into, run="now")
    assert len(list(into.glob("rank-*"))) == 3
    os.rename(into, tmp_path / "hidden")
    into.mkdir()
    os.rename(tmp_path / "hidden", into / f"x{TAKEN}")
    third = tmp_path / "third-state" / "node"
    third.mkdir(parents=True)
    inherit([into.parent], third, run="third")
    assert len(Vault(third, 1 << 30, run="third").inventory()) == 3


WRITER = """
import mmap, os, sys, time
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_whoever_still_writes_is_ended_first(tmp_path: Path) -> None:
    """A rank of a dead cluster would go on changing what the new run has read; a reader may stay."""
    state, into = tmp_path / "before-state", new_folder(tmp_path)
    left_by(state, "a", rank=0, steps=4)
    path = state / "a" / "rank-00000.arena"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "mapped\n"
        assert list(writers_of(state)) == [writer.pid]
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            inherit([state], into, run="now")
        assert writer.wait(10) == -9
    finally:
        writer.kill()
        writer.communicate()
    assert list(writers_of(into)) == []


def test_all_of_it_can_be_given_back(tmp_path: Path) -> None:
    """To a run that has no use for it."""
    state = tmp_path / "before-state"
    assert not remove(state)
    left_by(state, "a", rank=0, steps=1)
    assert remove(state)
    assert not state.exists()
