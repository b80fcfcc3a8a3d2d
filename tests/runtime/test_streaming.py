"""Checkpoints that are written out of images in memory: the same numbers, no damage taken over, and nobody is
made to wait without need.
"""

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lives import Life, Lives, place_on
from training import checkpoint_values, metrics, write_corpus

from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES, DamagedImage
from rayfold.faulttol.image import PartIndex, inspect
from rayfold.faulttol.pins import Pins
from rayfold.faulttol.slots import Slot
from rayfold.runtime.checkpoint.format import read_index, write_index
from rayfold.runtime.checkpoint.shelf import Shelf
from rayfold.runtime.checkpoint.streaming import (
    GivenUp,
    Holding,
    Share,
    Unusable,
    assign,
    index_of,
    look_at,
    write_share,
)
from rayfold.runtime.progress import Progress
from rayfold.runtime.snapshots import Snapshots
from rayfold.runtime.trainer import Trainer

STEPS = 4
HELD_S = 0.5  # steps take a twentieth of it
GIVEN = ("model.layers=4", "model.ffn_dim=48", "batch.micro_size=1", f"run.steps={STEPS}")
LAYOUTS = {
    "shard": (2, ("parallel.dp_shard=2",)),
    "replicate": (2, ("parallel.dp_replicate=2", "parallel.dp_shard=1")),
    "tensor": (2, ("parallel.tp=2", "parallel.dp_shard=1")),
    "pipeline": (2, ("parallel.pp=2", "parallel.dp_shard=1")),
    "tensor and pipeline": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=1")),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def lives(source: Path, tmp_path: Path) -> Iterator[Callable[..., Lives]]:
    made: list[Lives] = []

    def run(*overrides: str) -> Lives:
        made.append(Lives(tmp_path / f"run-{len(made)}", source, *GIVEN, *overrides))
        return made[-1]

    yield run
    for each in made:
        each.close()


def write(folder: Path, ranks: int, step: int, shelf: Shelf) -> list[Share]:
    """As vaults and their controller do; what each rank's part was."""
    pins = Pins(folder, range(ranks), None)
    held = {rank: look_at(pins.image_of(rank, step), step) for rank in range(ranks)}
    shares = [Share(held[r].path, step, parts, f"rank-{r:05d}.1.bin") for r, parts in assign(held).items()]
    partial = shelf.partial(step)
    partial.mkdir(parents=True)
    wrote = [write_share(share, partial, lambda: False) for share in shares]
    write_index(partial, index_of(vars(Progress.among(held[0].progress)), shares, wrote))
    shelf.commit(step)
    return shares


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_images_of_all_ranks_make_the_checkpoint_that_ranks_write(
    layout: str, lives: Any, tmp_path: Path
) -> None:
    """Every box once, whatever cut the tensors, and the work shared out."""
    ranks, overrides = LAYOUTS[layout]
    run = lives(*overrides)
    assert run.live(Life(ranks)) == ["finished"] * ranks
    theirs = Shelf(run.run_dir / "checkpoints", keep=2)
    ours = Shelf(tmp_path / "streamed", keep=2, writer="vaults")
    shares = write(run.state_folder, ranks, STEPS, ours)
    assert ours.steps() == [STEPS]
    (said, values), (told, expected) = (checkpoint_values(s.path(STEPS)) for s in (ours, theirs))
    assert said == told
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert np.array_equal(value, expected[name]), name
    sizes = [sum(part.length for part in share.parts) for share in shares]
    assert min(sizes) > 0
    assert sum(sizes) == sum(value.nbytes for value in expected.values())


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_image_comes_to_no_disk(lives: Any, tmp_path: Path) -> None:
    """A bit that has flipped in memory is not given a new checksum."""
    run = lives(*LAYOUTS["shard"][1])
    run.live(Life(2))
    shelf = Shelf(tmp_path / "streamed", keep=2)
    image = Pins(run.state_folder, range(2), None).image_of(1, STEPS)
    used = look_at(image, STEPS).parts[-1]
    flip(image, HEADER_BYTES + random.Random(3).randrange(used.start + used.length))
    with pytest.raises(DamagedImage, match=r"chunk 0 .* crc"):
        write(run.state_folder, 2, STEPS, shelf)
    assert shelf.steps() == []


def part(name: str, start: int, sizes: tuple[int, ...], shape: tuple[int, ...], at: int = 0) -> PartIndex:
    return PartIndex(name, "uint8", shape, (at,), sizes, start, sizes[0])


def test_images_that_make_no_whole_are_refused() -> None:
    """Of two layouts, or with a hole."""
    half = Holding("a", "f", {}, (part("w", 0, (4,), (8,)),))
    other = Holding("b", "f", {}, (part("w", 0, (4,), (8,), at=4),))
    assert {rank: len(parts) for rank, parts in assign({0: half, 1: other}).items()} == {0: 1, 1: 1}
    with pytest.raises(Unusable, match="4 of the 8 numbers of w"):
        assign({0: half, 1: half})
    with pytest.raises(Unusable, match="not of one layout"):
        assign({0: half, 1: replace(other, fingerprint="g")})


def filled(path: Path, used: int, step: int) -> np.ndarray:
    """A committed slot of random bytes, which are returned."""
    slot, data = Slot.create(path, used), np.random.default_rng(step).integers(0, 256, used, dtype=np.uint8)
    slot.begin(used, b"")
    for chunk in range(slot.chunks()):
        slot.put(chunk, data[chunk * CHUNK_BYTES : slot.end_of(chunk)])
    slot.seal(step=step, epoch=1, fingerprint="f", progress={})
    slot.commit()
    return data


def test_boxes_over_chunks_are_written_as_they_are(tmp_path: Path) -> None:
    """Boxes that begin and end anywhere, over more than one chunk and within one."""
    used = 3 * CHUNK_BYTES + 777
    data = filled(tmp_path / "slot", used, 5)
    cuts = [0, 100, CHUNK_BYTES - 1, 2 * CHUNK_BYTES + 9, used]
    spans = itertools.pairwise(cuts)
    parts = tuple(part(f"w{n}", a, (b - a,), (b - a,)) for n, (a, b) in enumerate(spans))
    share = Share(str(tmp_path / "slot"), 5, parts[1:], "rank.bin")
    index = index_of({"step": 5}, [share], [write_share(share, tmp_path, lambda: False)])
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert (tmp_path / "rank.bin").read_bytes() == data[100:].tobytes()
    with pytest.raises(Unusable, match="step 5 by now, not 4"):
        write_share(replace(share, step=4), tmp_path, lambda: False)
    asked = iter([False, False, True])
    with pytest.raises(GivenUp):
        write_share(share, tmp_path, lambda: next(asked))


def test_a_disk_without_room_is_told_as_that(tmp_path: Path) -> None:
    """/dev/full has no room for anybody."""
    filled(tmp_path / "slot", 5000, 1)
    os.symlink("/dev/full", tmp_path / "rank.bin")
    with pytest.raises(OSError, match="No space left"):
        write_share(
            Share(str(tmp_path / "slot"), 1, (part("w", 0, (5000,), (5000,)),), "rank.bin"),
            tmp_path,
            lambda: False,
        )


def keep_written(trainer: Trainer) -> None:
    """The rank's files are written by somebody else, as the cluster's vaults do."""
    trainer._place = replace(trainer._place, writes=True)  # type: ignore[type-var]


def test_a_due_step_stays_until_it_is_written_and_the_next_waits(lives: Any, tmp_path: Path) -> None:
    """Back-pressure: with a disk that takes its time no step is passed over, and the ranks write nothing."""
    run = lives("parallel.dp_shard=2", "checkpoint.every=2", "run.steps=7", "snapshot.every=1")
    shelf, ended = Shelf(tmp_path / "streamed", keep=9), threading.Event()
    reached: list[int] = []  # while step 2 was not on disk

    def at() -> int:
        info = inspect(run.state_folder / "rank-00000.arena")
        return info.step if info is not None else -1

    def write_what_is_due() -> None:
        while not ended.is_set():
            pins = Pins(run.state_folder, range(2), None)
            if (step := pins.due()) is None or not pins.passed(step):
                time.sleep(0.01)
                continue
            while step == 2 and at() < 4 and not ended.is_set():
                time.sleep(0.01)
            if step == 2:
                time.sleep(HELD_S)
                reached.append(at())
            write(run.state_folder, 2, step, shelf)
            Pins(run.state_folder, range(2), None).wrote(step)

    writer = threading.Thread(target=write_what_is_due)
    writer.start()
    try:
        assert run.live(Life(2, faults={0: keep_written, 1: keep_written})) == ["finished"] * 2
        deadline = time.monotonic() + 10
        while 7 not in shelf.steps() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        ended.set()
        writer.join()
    assert shelf.steps() == [7, 6, 4, 2]
    assert not (run.run_dir / "checkpoints").exists()
    stalls = {line["step"]: line["snapshot_stall_s"] for line in metrics(run.run_dir)}
    assert reached == [4], "the step that is due next waits, and none after it is made"
    assert stalls[4] > HELD_S
    for step, folder in ((step, shelf.path(step)) for step in shelf.steps()):
        assert checkpoint_values(folder)[0]["step"] == step


def test_a_rank_that_is_to_leave_waits_for_no_disk(tmp_path: Path) -> None:
    """Nobody writes, and the rank is told to leave: it goes on at once."""
    leaving = threading.Event()
    place = replace(place_on(tmp_path, 1), writes=True, leaving=leaving.is_set)
    slots = Slot.create(tmp_path / "rank-00000.slot-0", 10)
    slots.due = 3
    snapshots = Snapshots.__new__(Snapshots)
    snapshots._slots, snapshots._place = slots, place  # type: ignore[assignment]
    threading.Timer(0.2, leaving.set).start()
    began = time.monotonic()
    snapshots._await_disk()
    assert 0.1 < time.monotonic() - began < 5
