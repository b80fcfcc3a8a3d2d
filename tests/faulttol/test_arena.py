"""Arenas: state that outlives its process, adopted in place, and never taken for whole when it is not."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed import (
    FINGERPRINT,
    check_what_is_left,
    kill_at_opcode,
    killed,
    live,
    memory_folder,
    shared_number,
    started,
    state_of,
)

from rayfold.faulttol.arena import Arena
from rayfold.faulttol.header import (
    INDEX_BYTES,
    INDEX_START,
    RECORD_BYTES,
    RECORDS_START,
    WORDS_START,
    ArenaError,
    DamagedImage,
    ImageError,
    TornImage,
)
from rayfold.faulttol.image import Image, PartIndex, encode_index, examine, inspect
from rayfold.faulttol.vault import Vault

MIB = 1 << 20


def small(path: Path, *, step: int = 3) -> Arena:
    """An arena with two tensors, at `step`."""
    arena = Arena.create(path, MIB, run="run-1")
    return filled(arena, step)


def filled(arena: Arena, step: int) -> Arena:
    first, _ = arena.take(5, torch.float32)
    second, _ = arena.take(63, torch.bfloat16)
    first.fill_(step)
    second.fill_(-step)
    parts = [
        arena.part("a", first.view(1, 5), (4, 5), (2, 0)),
        arena.part("b", second[3:], (63,), (3,)),
    ]
    arena.seal_index(parts, FINGERPRINT, 1)
    arena.begin_update()
    arena.end_update(step, {"cursor": [step, "x"]})
    return arena


def test_tensors_are_the_file(tmp_path: Path) -> None:
    """What is written to a tensor is in the file for whoever comes later, with no call in between."""
    arena = small(tmp_path / "a")
    image = Image.open(tmp_path / "a")
    assert (image.step, image.epoch, image.fingerprint, image.info.run) == (3, 1, FINGERPRINT, "run-1")
    assert image.progress == {"cursor": [3, "x"]}
    a, b = image.parts()
    assert (a.name, a.shape, a.offsets, a.sizes, a.start) == ("a", (4, 5), (2, 0), (1, 5), 0)
    assert (b.dtype, b.start % 64, b.length) == ("bfloat16", 6, 120)
    assert torch.equal(image.tensor(a), torch.full((1, 5), 3.0))
    assert torch.equal(image.tensor(b), torch.full((60,), -3.0, dtype=torch.bfloat16))
    assert arena.nbytes == MIB
    del arena
    assert Image.open(tmp_path / "a").step == 3


def test_an_earlier_life_is_adopted_in_place(tmp_path: Path) -> None:
    """The same rank built again finds its state at the same addresses; nothing is copied."""
    small(tmp_path / "a")
    arena = Arena.open(tmp_path / "a")
    assert arena.adopt(FINGERPRINT)
    first, kept = arena.take(5, torch.float32)
    assert kept
    assert torch.equal(first, torch.full((5,), 3.0))
    second, kept = arena.take(63, torch.bfloat16)
    assert kept
    parts = Image.open(tmp_path / "a").parts()
    arena.seal_index(parts, FINGERPRINT, 2)
    info = examine(tmp_path / "a")
    assert (info.step, info.epoch, info.torn) == (3, 2, False)
    assert torch.equal(second, torch.full((63,), -3.0, dtype=torch.bfloat16))


def test_the_same_process_builds_again(tmp_path: Path) -> None:
    """A fault ends an attempt, not the process: the next attempt adopts what the last one mapped."""
    arena = small(tmp_path / "a")
    arena.rewind()
    assert arena.adopt()
    assert arena.take(5, torch.float32)[1]
    arena.rewind()
    again, kept = arena.take(5, torch.float32)
    assert not kept
    assert arena.torn
    again.zero_()
    assert inspect(tmp_path / "a") is not None
    assert not examine(tmp_path / "a").usable


@pytest.mark.parametrize("how", ["torn", "other", "new"])
def test_nothing_is_adopted_that_is_not_whole(tmp_path: Path, how: str) -> None:
    """A torn arena, one of another layout and an empty one are filled from elsewhere."""
    if how == "new":
        arena = Arena.create(tmp_path / "a", MIB)
    else:
        arena = small(tmp_path / "a")
        if how == "torn":
            arena.begin_update()
    reopened = Arena.open(tmp_path / "a")
    assert not reopened.adopt("another" if how == "other" else FINGERPRINT)
    assert not reopened.take(5, torch.float32)[1]
    assert examine(tmp_path / "a").torn


def test_a_model_that_was_built_otherwise_is_refused(tmp_path: Path) -> None:
    """Adopting under wrong addresses would train on shifted numbers."""
    small(tmp_path / "a")
    arena = Arena.open(tmp_path / "a")
    assert arena.adopt()
    with pytest.raises(ArenaError, match="allocation 0"):
        arena.take(6, torch.float32)
    arena.rewind()
    assert arena.adopt()
    arena.take(5, torch.float32)
    with pytest.raises(ArenaError, match="index"):
        arena.seal_index([], FINGERPRINT, 2)
    assert examine(tmp_path / "a").usable  # a refusal destroys nothing


def test_an_image_is_loaded_whole(tmp_path: Path) -> None:
    """A spare takes the place of a rank by one verified copy."""
    small(tmp_path / "a", step=9)
    arena = small(tmp_path / "b", step=2)
    arena.load(Image.open(tmp_path / "a"))
    assert examine(tmp_path / "b").step == 9
    assert Image.open(tmp_path / "b").progress == {"cursor": [9, "x"]}
    assert bytes(Image.open(tmp_path / "b").read(0, 20)) == bytes(Image.open(tmp_path / "a").read(0, 20))


def test_misuse_says_what_to_do(tmp_path: Path) -> None:
    """Each refusal names the file and the numbers."""
    arena = Arena.create(tmp_path / "a", 1000)
    with pytest.raises(ArenaError, match="Reserve at least 1004"):
        arena.take(251, torch.float32)
    with pytest.raises(ArenaError, match="seal_index"):
        arena.end_update(1, {})
    with pytest.raises(FileExistsError):
        Arena.create(tmp_path / "a", 1000)
    tensor, _ = arena.take(16, torch.float32)
    with pytest.raises(ArenaError, match="contiguous"):
        arena.part("w", torch.ones(3), (3,), (0,))
    with pytest.raises(ArenaError, match="contiguous"):
        arena.part("w", tensor.view(4, 4).T, (4, 4), (0, 0))
    arena.seal_index([], FINGERPRINT, 0)
    with pytest.raises(ArenaError, match="room"):
        arena.end_update(1, {"text": "x" * RECORD_BYTES})
    assert arena.torn
    names = random.Random(0)
    crowd = [
        PartIndex(f"{names.getrandbits(800):x}", "float32", (1,), (0,), (1,), 0, 4)
        for _ in range(INDEX_BYTES // 80)
    ]
    with pytest.raises(ArenaError, match="fewer tensors"):
        encode_index(crowd)
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(DamagedImage, match="does not start"):
        Arena.open(tmp_path / "text")


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_new_step_is_whole_or_torn_at_every_instruction(tmp_path: Path, stride: int) -> None:
    """SIGKILL before bytecode instructions of an update: never a step that is not there."""
    counted = shared_number()
    files = ("header.py", "arena.py")

    def one(folder: Path, number: int) -> tuple[str, int]:
        folder.mkdir()
        arena = small(folder / "a", step=1)
        tensor = arena.take(8, torch.int64)[0]  # beside the described ones, so it is free to change
        arena.seal_index([arena.part("t", tensor, (8,), (0,))], FINGERPRINT, 1)
        tensor.fill_(1)
        arena.begin_update()
        arena.end_update(1, {"cursor": 1})

        def work() -> None:
            kill_at_opcode(number, files, counted)
            arena.begin_update()
            tensor.fill_(2)
            arena.end_update(2, {"cursor": 2})

        killed(work)
        info = examine(folder / "a")
        if info.torn:
            return "torn", -1
        image = Image.open(folder / "a")
        assert torch.equal(image.tensor(image.part("t")), torch.full((8,), image.step))
        assert image.progress == {"cursor": image.step}
        return "whole", image.step

    assert one(tmp_path / "all", -1) == ("whole", 2)
    total = counted.value
    assert total > 100
    seen = [one(tmp_path / str(number), number) for number in range(1, total + 1, stride)]
    assert {("whole", 1), ("torn", -1), ("whole", 2)} >= set(seen)
    assert ("torn", -1) in seen
    order = [step for _, step in seen]
    assert order == sorted(order, key=[1, -1, 2].index)  # old, then torn, then new: no way back


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_new_epoch_of_adopted_content_loses_it_at_no_instruction(tmp_path: Path, stride: int) -> None:
    """Survivors keep their state while a membership changes, and may be killed at that moment too."""
    counted = shared_number()

    def one(number: int) -> int:
        (tmp_path / "a").unlink(missing_ok=True)
        small(tmp_path / "a")
        arena = Arena.open(tmp_path / "a")
        assert arena.adopt(FINGERPRINT)
        arena.take(5, torch.float32)
        arena.take(63, torch.bfloat16)
        parts = Image.open(tmp_path / "a").parts()

        def work() -> None:
            kill_at_opcode(number, ("header.py", "arena.py"), counted)
            arena.seal_index(parts, FINGERPRINT, 2)

        killed(work)
        image = Image.open(tmp_path / "a")
        assert image.step == 3
        assert torch.equal(image.tensor(image.parts()[0]), torch.full((1, 5), 3.0))
        return image.epoch

    assert one(-1) == 2
    epochs = [one(number) for number in range(1, counted.value + 1, stride)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 1


def test_no_flipped_bit_makes_a_torn_arena_whole(tmp_path: Path) -> None:
    """Each bit of the words that say so; its data has no checksum that would notice."""
    arena = small(tmp_path / "a", step=5)
    arena.begin_update()
    torn = (tmp_path / "a").read_bytes()
    for bit in range(3 * 64):
        data = bytearray(torn)
        data[WORDS_START + bit // 64 * 64 + bit % 64 // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(data)
        with pytest.raises(ImageError):
            Image.open(tmp_path / "flipped")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in shared memory where the system has it."""
    with memory_folder() as folder:
        yield folder


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.campaign)])
def test_a_rank_killed_at_any_moment_leaves_its_step(memory: Path, kills: int) -> None:
    """Real SIGKILLs at seeded moments of updates and copies; at most the step being made is lost."""
    numel = 12 * MIB // 8 + 5  # three chunks and a bit
    chance = random.Random(kills)
    vault = Vault(memory / "vault", 512 * MIB)
    states = []
    for _ in range(kills):
        files = vault.reserve(0, 8 * numel)
        finished = shared_number()
        killed(lambda: live(files, numel, steps=0, finished=finished), after_s=chance.uniform(0.02, 0.12))  # noqa: B023
        states.append((examine(files.arena).torn, len(check_what_is_left(files, numel, finished.value))))
        vault.release(0)
    assert any(torn for torn, _ in states)
    assert any(not torn for torn, _ in states)


def test_two_readers_beside_a_writer_accept_nothing_torn(memory: Path) -> None:
    """A reader of another process sees a step whole or is told that it is torn."""
    numel = MIB // 8
    files = Vault(memory / "vault", 64 * MIB).reserve(0, 8 * numel)
    accepted = [shared_number(), shared_number()]
    refused = [shared_number(), shared_number()]
    live(files, numel, steps=1)

    def read(number: int) -> None:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            for path in files.all:
                try:
                    image = Image.open(path)
                    content = image.tensor(image.part("w"))
                except (TornImage, DamagedImage, KeyError):
                    refused[number].value += 1
                    continue
                assert torch.equal(content, state_of(image.step, numel))
                accepted[number].value += 1

    readers = [started(read, number) for number in range(2)]
    killed(lambda: live(files, numel, steps=0), after_s=1.2)
    for reader in readers:
        reader.join(30)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert all(number.value for number in (*accepted, *refused))


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.campaign)])
def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path, flips: int) -> None:
    """Whatever bit of a header flips, nobody is given another step, another place or a torn content."""
    chance = random.Random(flips)
    small(tmp_path / "whole", step=5)
    torn = small(tmp_path / "torn", step=5)
    torn.begin_update()
    del torn
    refused = 0
    image = Image.open(tmp_path / "whole")
    truth = (image.step, image.progress, image.fingerprint, image.parts())
    record = RECORDS_START + image.info.version // 2 % 2 * RECORD_BYTES
    for number in range(flips):
        name = "torn" if number % 4 == 0 else "whole"
        data = bytearray((tmp_path / name).read_bytes())
        place = chance.choice([(0, 220), (WORDS_START, 136), (record, 200), (INDEX_START, 100)])
        position = place[0] + chance.randrange(place[1])
        data[position] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped").write_bytes(data)
        try:
            found = Image.open(tmp_path / "flipped")
        except ImageError:
            refused += 1
            continue
        assert name == "whole"
        assert (found.step, found.progress, found.fingerprint, found.parts()) == truth
    assert refused > flips // 2
    whole = (tmp_path / "whole").read_bytes()
    for _ in range(flips // 10):
        (tmp_path / "short").write_bytes(whole[: chance.randrange(image.nbytes + 2 * MIB)])
        with pytest.raises(ImageError):
            Image.open(tmp_path / "short")
        assert inspect(tmp_path / "short") is None
