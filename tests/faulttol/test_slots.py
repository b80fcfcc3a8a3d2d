"""Slots: which one is filled, which ones may be read, and that no damaged byte is handed out."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from killed import kill_at_opcode, killed, shared_number

from rayfold.faulttol.header import (
    CHUNK_BYTES,
    HEADER_BYTES,
    INDEX_START,
    RECORD_BYTES,
    RECORDS_START,
    TABLE_START,
    WORDS_START,
    ArenaError,
    DamagedImage,
    ImageError,
    TornImage,
)
from rayfold.faulttol.image import Image, PartIndex, encode_index, examine
from rayfold.faulttol.slots import Slot, Slots

USED = CHUNK_BYTES + 1000
INDEX = encode_index([PartIndex("w", "uint8", (USED,), (0,), (USED,), 0, USED)])


def data_of(step: int, used: int = USED) -> np.ndarray:
    """[used] uint8, another one for every step."""
    return np.random.default_rng(step).integers(0, 256, used, dtype=np.uint8)


def fill(slot: Slot, step: int, *, epoch: int = 1, commit: bool = False, used: int = USED) -> None:
    data = data_of(step, used)
    slot.begin(used, INDEX)
    for chunk in range(slot.chunks()):
        slot.put(chunk, data[chunk * CHUNK_BYTES : slot.end_of(chunk)])
    slot.seal(step=step, epoch=epoch, fingerprint="f", progress={"cursor": step})
    if commit:
        slot.commit()


def check(path: Path) -> int:
    """The step of a slot all of whose bytes are right; raises what reading raises."""
    image = Image.open(path)
    assert bytes(image.read(0, image.nbytes)) == data_of(image.step, image.nbytes).tobytes()
    assert image.progress == {"cursor": image.step}
    return image.step


def three(folder: Path, number: int = 3) -> Slots:
    return Slots([Slot.create(folder / f"slot-{n}", USED) for n in range(number)])


def test_a_slot_is_readable_from_sealed_on(tmp_path: Path) -> None:
    """EMPTY and FILLING hold no step; SEALED and COMMITTED do."""
    slot = Slot.create(tmp_path / "s", USED)
    states = [slot.state]
    with pytest.raises(DamagedImage, match="EMPTY"):
        check(slot.path)
    slot.begin(USED, INDEX)
    states.append(slot.state)
    with pytest.raises(TornImage):
        check(slot.path)
    with pytest.raises(ArenaError, match="SEALED"):
        slot.commit()
    fill(slot, 4)
    states.append(slot.state)
    assert check(slot.path) == 4
    slot.commit()
    states.append(slot.state)
    assert check(slot.path) == 4
    assert states == ["EMPTY", "FILLING", "SEALED", "COMMITTED"]
    assert Slot.open(slot.path).step == 4
    slot.empty()
    assert (slot.state, slot.step) == ("EMPTY", -1)


def test_the_newest_committed_is_never_filled(tmp_path: Path) -> None:
    """Whatever was captured and committed in whatever order, one step that all ranks have stays."""
    for number in (2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        slots = three(folder, number)
        chance = random.Random(number)
        newest = -1
        for step in range(1, 60):
            fill(slots.next_to_fill(), step, used=100)
            if chance.random() < 0.6:
                assert slots.commit(step)
                newest = step
            committed = slots.committed()
            assert (committed.step if committed else -1) == newest
            sealed = slots.sealed()
            assert sealed is not None
            assert sealed.step == step


def test_a_filling_goes_to_the_least_loss(tmp_path: Path) -> None:
    """First what holds no step, then the oldest; a later epoch is newer than a higher step of an earlier
    one.
    """
    slots = three(tmp_path)
    fill(slots.slots[0], 7, commit=True)
    assert slots.next_to_fill() is slots.slots[1]
    fill(slots.slots[1], 8)
    slots.slots[2].begin(USED, INDEX)
    assert slots.next_to_fill() is slots.slots[2]
    fill(slots.slots[2], 6, epoch=2, commit=True)
    assert slots.committed() is slots.slots[2]
    assert slots.next_to_fill() is slots.slots[0]
    slots.discard_after(7)
    assert [slot.step for slot in slots.slots] == [7, -1, 6]
    assert not slots.commit(8)
    with pytest.raises(ArenaError, match="2 or more"):
        Slots(slots.slots[:1])


def test_a_refilled_slot_is_not_mixed_with_what_it_was(tmp_path: Path) -> None:
    """A reader of another process that is half through must not get the rest from the next step."""
    slot = Slot.create(tmp_path / "s", USED)
    fill(slot, 1)
    image = Image.open(slot.path)
    assert bytes(image.read(0, 10)) == data_of(1)[:10].tobytes()
    fill(slot, 2)
    with pytest.raises(DamagedImage, match=r"chunk 1 .*another slot"):
        image.read(CHUNK_BYTES - 5, 10)
    assert check(slot.path) == 2


def test_reads_need_not_follow_chunks(tmp_path: Path) -> None:
    """Parts begin and end anywhere."""
    slot = Slot.create(tmp_path / "s", USED)
    fill(slot, 1)
    image = Image.open(slot.path)
    data = data_of(1)
    for start, length in [(0, 0), (5, 7), (CHUNK_BYTES - 3, 9), (0, USED), (CHUNK_BYTES, 1000), (USED, 0)]:
        assert bytes(image.read(start, length)) == data[start : start + length].tobytes()
    for start, length in [(-1, 4), (USED - 3, 4)]:
        with pytest.raises(ArenaError, match="no bytes"):
            image.read(start, length)


def test_a_slot_is_only_filled_with_what_fits(tmp_path: Path) -> None:
    """The numbers are in the error, and the slot is as it was."""
    slot = Slot.create(tmp_path / "s", USED)
    fill(slot, 1)
    with pytest.raises(ArenaError, match=f"Reserve at least {USED + 1}"):
        slot.begin(USED + 1, INDEX)
    assert check(slot.path) == 1


def test_a_smaller_filling_hides_what_was_behind_it(tmp_path: Path) -> None:
    """Bytes of an earlier, longer filling are not part of the next one."""
    slot = Slot.create(tmp_path / "s", USED)
    fill(slot, 1)
    fill(slot, 2, used=100)
    image = Image.open(slot.path)
    assert image.nbytes == 100
    with pytest.raises(ArenaError):
        image.read(99, 2)


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_filling_is_whole_or_torn_at_every_instruction(tmp_path: Path, stride: int) -> None:
    """SIGKILL before bytecode instructions of a filling: the other slot is whole, this one is decidable."""
    counted = shared_number()
    slots = three(tmp_path, 2)
    fill(slots.slots[0], 1, used=100, commit=True)

    def work(number: int) -> None:
        kill_at_opcode(number, ("slots.py", "header.py"), counted)
        target = slots.next_to_fill()
        fill(target, 2, used=100, commit=True)

    killed(lambda: work(-1))
    total = counted.value
    assert total > 200
    assert check(slots.slots[1].path) == 2
    slots.slots[1].empty()
    seen = []
    for number in range(1, total + 1, stride):
        fill(slots.slots[0], 1, used=100, commit=True)
        slots.slots[1].empty()
        killed(lambda: work(number))  # noqa: B023
        assert check(slots.slots[0].path) == 1
        state = slots.slots[1].state
        info = examine(slots.slots[1].path)
        assert info.usable == (state in ("SEALED", "COMMITTED"))
        if info.usable:
            assert check(slots.slots[1].path) == 2
        seen.append(state)
    kinds = ["EMPTY", "FILLING", "SEALED", "COMMITTED"]
    assert seen == sorted(seen, key=kinds.index)
    assert {"EMPTY", "FILLING"} <= set(seen)
    assert stride > 1 or set(seen) == set(kinds)


@pytest.mark.parametrize("damages", [200, pytest.param(1000, marks=pytest.mark.campaign)])
def test_no_damage_is_accepted(tmp_path: Path, damages: int) -> None:
    """Random bit flips in data and header, and files cut anywhere: refused, or not a byte of the content
    differs.
    """
    chance = random.Random(damages)
    slot = Slot.create(tmp_path / "s", USED)
    fill(slot, 3, commit=True)
    whole = slot.path.read_bytes()
    image = Image.open(slot.path)
    record = RECORDS_START + image.info.version // 2 % 2 * RECORD_BYTES
    places = {
        "static": (0, 220),
        "version": (WORDS_START, 8),
        "again": (WORDS_START + 64, 8),
        "state": (WORDS_START + 128, 8),
        "record": (record, 130),
        "table": (TABLE_START, 8),
        "index": (INDEX_START, len(INDEX)),
        "data": (HEADER_BYTES, USED),
    }
    flipped = tmp_path / "flipped"
    flipped.write_bytes(whole)
    harmless, named = [], []
    with flipped.open("r+b", buffering=0) as file:
        for name, _ in zip(itertools.cycle(places), range(damages), strict=False):
            begin, length = places[name]
            position = begin + chance.randrange(length)
            file.seek(position)
            file.write(bytes([whole[position] ^ 1 << chance.randrange(8)]))
            try:
                assert check(flipped) == 3
                harmless.append(name)
            except ImageError as error:
                named.append(str(flipped) in str(error))
            file.seek(position)
            file.write(whole[position : position + 1])
        assert all(named)
        assert check(flipped) == 3
        # One publish behind the first word, the second one says nothing else than before.
        assert set(harmless) <= {"again"}
        for _ in range(damages // 10):
            file.truncate(chance.randrange(len(whole)))
            with pytest.raises(ImageError):
                check(flipped)
            file.seek(0)
            file.write(whole)


def test_a_slot_whose_file_is_gone_is_filled_no_more(tmp_path: Path) -> None:
    """Its writer still has it mapped, and nobody else could find what it copies there."""
    slots = three(tmp_path)
    slots.due = 9
    slots.slots[0].path.unlink()
    filled = set()
    for step in range(1, 6):
        slot = slots.next_to_fill()
        fill(slot, step, commit=True, used=100)
        filled.add(slot.path.name)
    assert filled == {"slot-1", "slot-2"}
    assert slots.due == -1, "the word for the vault is where the vault looks"
