"""What a campaign does to processes and files, and when: a sleeping process, slots made by hand, no Ray."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rayfold.cluster.inject import Second, Situation
from rayfold.cluster.strikes import (
    cut_slot,
    damage_checkpoint,
    flip_bit,
    kill_when,
    lift_limit,
    limit_files,
    lose_slot,
)
from rayfold.faulttol.campaign import PlannedFault
from rayfold.faulttol.header import FILLING, DamagedImage
from rayfold.faulttol.image import Image
from rayfold.faulttol.slots import Slot

BYTES = 1000


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that only sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(10)


def slot_of_step(path: Path, step: int) -> Slot:
    """A whole slot."""
    slot = Slot.create(path, BYTES)
    slot.begin(BYTES, b"")
    slot.put(0, (np.arange(BYTES) % 256).astype(np.uint8))
    slot.seal(step=step, epoch=1, fingerprint="", progress={})
    return slot


def test_a_flipped_bit_is_in_the_newest_copy_and_its_reader_refuses_it(tmp_path: Path) -> None:
    """Otherwise the fault would test nothing; one bit, as a cosmic ray would."""
    older, newer = (slot_of_step(tmp_path / f"slot-{step}", step) for step in (4, 5))
    done = flip_bit([older.path, newer.path], draw=12345)
    assert done is not None
    assert (done["of_step"], done["file"]) == (5, str(newer.path))
    with pytest.raises(DamagedImage):
        Image.open(newer.path).read(0, BYTES)
    assert bytes(Image.open(older.path).read(0, 3)) == b"\x00\x01\x02"


def test_no_bit_is_flipped_where_there_is_no_whole_copy(tmp_path: Path) -> None:
    """A copy under way would be written over, and nothing would have been injected."""
    slot = slot_of_step(tmp_path / "slot", 4)
    slot.begin(BYTES, b"")
    assert flip_bit([slot.path], draw=1) is None


def test_a_cut_copy_is_the_newest_and_keeps_its_header(tmp_path: Path) -> None:
    """Its reader finds that bytes are missing; one that is mapped is gone from under its writer."""
    older, newer = (slot_of_step(tmp_path / f"slot-{step}", step) for step in (4, 5))
    done = cut_slot([older.path, newer.path], draw=12345)
    assert done is not None
    assert (done["of_step"], done["bytes"]) == (5, newer.path.stat().st_size)
    with pytest.raises(DamagedImage):
        Image.open(newer.path).read(0, BYTES)
    assert Image.open(older.path).step == 4


def test_the_newest_copy_is_lost_and_its_owner_still_has_it(tmp_path: Path) -> None:
    """As when a program clears shared memory: the file is gone, and who has it mapped does not notice."""
    older, newer = (slot_of_step(tmp_path / f"slot-{step}", step) for step in (4, 5))
    done = lose_slot([older.path, newer.path])
    assert done is not None
    assert (done["of_step"], done["file"]) == (5, str(newer.path))
    assert [path.name for path in tmp_path.iterdir()] == ["slot-4"]
    newer.begin(BYTES, b"")
    newer.put(0, np.zeros(BYTES, np.uint8))
    assert lose_slot([]) is None


@pytest.mark.parametrize("cut", [False, True])
def test_the_newest_checkpoint_is_damaged_and_no_other(tmp_path: Path, cut: bool) -> None:
    """One that is being written is none, nor is one being deleted."""
    for name in ("step-00000010", "step-00000020", "step-00000030.partial", "step-00000005.deleting"):
        (tmp_path / name).mkdir()
        for rank in range(2):
            (tmp_path / name / f"rank-{rank:05d}.bin").write_bytes(bytes(100))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.bin")}
    done = damage_checkpoint(tmp_path, 12345, cut=cut)
    assert done is not None
    (changed,) = [path for path, data in before.items() if path.read_bytes() != data]
    assert (done["file"], changed.parent.name) == (str(changed), "step-00000020")
    data = changed.read_bytes()
    assert len(data) == 45 if cut else sum(byte.bit_count() for byte in data) == 1
    assert damage_checkpoint(tmp_path / "none", 1, cut=cut) is None


def test_a_process_without_room_writes_no_large_file_until_there_is_room(tmp_path: Path) -> None:
    """As a full disk: an error of its write call, and no signal that ends it."""
    path = tmp_path / "written"
    code = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        f"        with open({str(path)!r}, 'wb') as file:\n"
        "            file.write(bytes(int(line)))\n"
        "        print('written', flush=True)\n"
        "    except OSError as error:\n"
        "        print(error.strerror, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def write(nbytes: int) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        print(nbytes, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    try:
        assert write(2000) == "written"
        assert limit_files([process.pid], 1000) is not None
        assert [write(500), write(2000)] == ["written", "File too large"]
        lift_limit([process.pid])
        assert write(2000) == "written"
    finally:
        process.communicate(timeout=10)
    assert limit_files([process.pid], 1000) is None


def test_a_process_is_killed_at_its_moment_and_goes_on_without_one(
    tmp_path: Path, victim: "subprocess.Popen[bytes]"
) -> None:
    """It is halted for the second look, so it must be let go when the moment is not there."""
    slot = slot_of_step(tmp_path / "slot", 4)
    looks = iter([True, False])
    assert kill_when(victim.pid, [slot.path], lambda words: next(looks, False)) is None
    assert Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[0] in "RS"
    slot.begin(BYTES, b"")
    done = kill_when(victim.pid, [slot.path], lambda words: words.state == FILLING)
    assert done is not None
    assert done["pids"] == [victim.pid]
    assert victim.wait(10) == -9


FORMED: dict[str, object] = {"kind": "formed", "spare_pids": []}


def test_a_fault_is_due_at_its_step_or_its_time_after_the_first_step() -> None:
    """Starting takes as long as it takes, and no fault of a campaign is about that."""
    by_step = PlannedFault(index=0, kind="kill", rank=0, at_step=7)
    by_time = PlannedFault(index=1, kind="kill", rank=0, at_s=2.0)
    now = Situation()
    assert not now.is_due(by_step, 1e9)
    assert not now.is_due(by_time, 1e9)
    now.learn([{"step": 6, "time_unix": 10.0, "step_time_s": 0.1}], [])
    assert [now.is_due(fault, 11.0) for fault in (by_step, by_time)] == [False, False]
    now.learn([{"step": 7, "time_unix": 10.1, "step_time_s": 0.1}], [])
    assert [now.is_due(fault, 12.1) for fault in (by_step, by_time)] == [True, True]


def test_a_rank_is_stuck_only_in_a_run_that_knows_its_steps() -> None:
    """Before, nobody would find it for minutes."""
    stuck = PlannedFault(index=0, kind="stuck", rank=0, at_step=2)
    now = Situation()
    steps = [{"step": step, "time_unix": float(step), "step_time_s": 0.1} for step in range(1, 9)]
    now.learn(steps[:5], [])
    assert not now.is_due(stuck, 1e9)
    now.learn(steps[5:], [])
    assert now.is_due(stuck, 1e9)


def test_nothing_is_injected_until_a_killed_controller_has_a_successor() -> None:
    """What befell a rank meanwhile would be noticed by nobody, and that is no promise of its fault."""
    second, now = Second("kill_controller", [7], since_unix=10.0), Situation()
    now.learn([], [{"kind": "fault", "class": "controller", "time_unix": 9.0}])
    assert second.do(now) is None
    now.learn([], [{"kind": "fault", "class": "controller", "time_unix": 11.0}])
    assert second.do(now) == {"message": "another one has taken over", "pids": [7]}


def test_spares_are_those_that_were_told_last() -> None:
    """When the ranks formed, or later."""
    now = Situation()
    now.learn([], [{**FORMED, "spare_pids": [7, 8], "time_unix": 1.0}])
    assert now.spares == [7, 8]
    now.learn([], [{"kind": "spares", "pids": [8, 9], "time_unix": 2.0}])
    assert now.spares == [8, 9]
    now.learn([], [{**FORMED, "time_unix": 3.0}])
    assert now.spares == []


def test_ranks_that_leave_are_a_recovery_too() -> None:
    """A kill may fall into it as into any other."""
    now = Situation()
    now.learn([], [{**FORMED, "time_unix": 1.0}, {"kind": "preempted", "time_unix": 2.0}])
    assert now.recovering


def test_a_fault_is_made_up_for_when_ranks_have_formed_and_a_new_step_is_done() -> None:
    """Until then the next one would be a second fault of the same recovery, which is another promise."""
    now = Situation()
    now.learn([{"step": 7, "time_unix": 10.0, "step_time_s": 0.1}], [{**FORMED, "time_unix": 1.0}])
    assert not now.recovering
    now.learn([], [{"kind": "verdict", "time_unix": 11.1}])
    assert now.recovering
    now.learn([{"step": 7, "time_unix": 11.3, "step_time_s": 0.1}], [{**FORMED, "time_unix": 11.2}])
    assert not now.recovering
    assert not now.is_well(11.0, 7), "step 7 was trained again"
    now.learn([{"step": 8, "time_unix": 11.4, "step_time_s": 0.1}], [])
    assert now.is_well(11.0, 7)
