"""Capture: a step is copied beside training, is whole when it counts, and its failures are not swallowed."""

import os
import random
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from killed import FINGERPRINT, check_what_is_left, killed, live, memory_folder, state_of

from rayfold.faulttol.arena import Arena
from rayfold.faulttol.header import CHUNK_BYTES, ArenaError
from rayfold.faulttol.image import Image, examine
from rayfold.faulttol.slots import Slot, Slots
from rayfold.faulttol.snapshot import ArenaSource, Capture, CaptureError, TensorSource
from rayfold.faulttol.vault import RankFiles, Vault

NUMEL = (2 * CHUNK_BYTES + 4096) // 8  # three chunks


@pytest.fixture
def files() -> Iterator[RankFiles]:
    """Reserved files of rank 0 in shared memory."""
    with memory_folder() as folder:
        yield Vault(folder / "vault", 256 << 20).reserve(0, 8 * NUMEL)


def trained(files: RankFiles, step: int) -> tuple[Arena, torch.Tensor]:
    arena = Arena.open(files.arena)
    tensor, _ = arena.take(NUMEL, torch.int64)
    arena.seal_index([arena.part("w", tensor, (NUMEL,), (0,))], FINGERPRINT, 1)
    update(arena, tensor, step)
    return arena, tensor


def update(arena: Arena, tensor: torch.Tensor, step: int) -> None:
    arena.begin_update()
    tensor.copy_(state_of(step, NUMEL))
    arena.end_update(step, {"cursor": 7 * step})


class Held(ArenaSource):
    """A source whose copy waits until it is let go."""

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.go = threading.Event()

    def copy(self, slot: Slot) -> None:
        assert self.go.wait(30), "the test lets it go"
        super().copy(slot)


def test_a_step_is_sealed_beside_training_then_committed(files: RankFiles) -> None:
    """start returns while the copy runs; barrier waits for it; commit makes it the step to go back to."""
    arena, tensor = trained(files, 1)
    source = Held(arena)
    capture = Capture(source, Slots.open(files.slots))
    assert capture.barrier() < 1
    assert capture.sealed_step == -1
    capture.start(1, {"cursor": 7})
    assert capture.busy
    assert capture.sealed_step == -1
    with pytest.raises(ArenaError, match="barrier"):
        capture.start(1, {})
    source.go.set()
    assert capture.barrier() >= 0
    assert capture.sealed_step == 1
    assert capture.commit(1)
    assert not capture.commit(2)
    update(arena, tensor, 2)
    capture.start(2, {"cursor": 14})
    capture.barrier()
    assert sorted((examine(path).state, examine(path).step) for path in files.slots) == [
        ("COMMITTED", 1),
        ("SEALED", 2),
    ]
    assert check_what_is_left(files, NUMEL, 0) == [2, 1, 2]
    capture.close()
    capture.close()
    with pytest.raises(ArenaError, match="closed"):
        capture.start(2, {})


def test_progress_is_that_of_the_start(files: RankFiles) -> None:
    """The run goes on changing its cursor while the copy is under way."""
    arena, _ = trained(files, 1)
    source = Held(arena)
    capture = Capture(source, Slots.open(files.slots))
    progress = {"cursor": {"sample": 1}}
    capture.start(1, progress)
    progress["cursor"]["sample"] = 2
    source.go.set()
    capture.barrier()
    assert Image.open(files.slots[0]).progress == {"cursor": {"sample": 1}}
    capture.close()


def test_only_a_whole_step_is_captured(files: RankFiles) -> None:
    """A start before the update has ended would copy half of it."""
    arena, _ = trained(files, 1)
    capture = Capture(arena, Slots.open(files.slots))
    with pytest.raises(ArenaError, match="step 1"):
        capture.start(2, {})
    arena.begin_update()
    with pytest.raises(ArenaError, match="no whole step"):
        capture.start(1, {})
    capture.close()


def test_an_update_during_the_copy_is_noticed(files: RankFiles) -> None:
    """Without a barrier the slot would be a mixture; it is not sealed, and the next copy works again."""
    arena, tensor = trained(files, 1)
    source = Held(arena)
    capture = Capture(source, Slots.open(files.slots))
    capture.start(1, {})
    update(arena, tensor, 2)
    source.go.set()
    with pytest.raises(CaptureError, match="barrier"):
        capture.barrier()
    assert capture.sealed_step == -1
    assert capture.barrier() < 1
    capture.start(2, {"cursor": 14})
    capture.barrier()
    assert capture.sealed_step == 2
    capture.close()


def test_a_new_life_goes_on_with_the_slots_of_the_last(files: RankFiles) -> None:
    """The committed step of a dead process is found, and is the last to be overwritten."""
    killed(lambda: live(files, NUMEL, steps=3))
    arena = Arena.open(files.arena)
    assert arena.adopt(FINGERPRINT)
    tensor, kept = arena.take(NUMEL, torch.int64)
    assert kept
    assert torch.equal(tensor, state_of(3, NUMEL))
    arena.seal_index([arena.part("w", tensor, (NUMEL,), (0,))], FINGERPRINT, 2)
    slots = Slots.open(files.slots)
    committed = slots.committed()
    assert committed is not None
    assert committed.step == 3
    capture = Capture(arena, slots)
    assert capture.sealed_step == 3
    update(arena, tensor, 4)
    capture.start(4, {"cursor": 28})
    capture.barrier()
    assert committed.step == 3
    assert Image.open(slots.next_to_fill().path).epoch == 2
    capture.close()


@pytest.mark.parametrize("chunk", range(4))
def test_killed_in_the_copy_of_any_chunk_the_committed_slot_stays(files: RankFiles, chunk: int) -> None:
    """A single copy in memory would be lost here; the arena and the slot before are both whole."""

    class Deadly(Slot):
        def put(self, number: int, source: object) -> None:
            if number == chunk:
                os.kill(os.getpid(), signal.SIGKILL)
            super().put(number, source)  # type: ignore[arg-type]

        def seal(self, **what: object) -> None:
            if chunk == self.chunks():
                os.kill(os.getpid(), signal.SIGKILL)
            super().seal(**what)  # type: ignore[arg-type]

    def work() -> None:
        live(files, NUMEL, steps=1)
        arena, _ = trained(files, 2)
        slots = Slots([Slot.open(files.slots[0]), Deadly.open(files.slots[1])])
        slots.slots[1].__class__ = Deadly
        capture = Capture(arena, slots)
        capture.start(2, {"cursor": 14})
        capture.barrier()

    assert killed(work) == -signal.SIGKILL
    assert [examine(path).state for path in files.slots] == ["COMMITTED", "FILLING"]
    assert check_what_is_left(files, NUMEL, 2) == [2, 1]


def test_killed_in_the_update_the_slot_of_the_step_before_stays(files: RankFiles) -> None:
    """The torn arena is never used; one step is lost and no more."""

    def work() -> None:
        live(files, NUMEL, steps=3)
        arena, tensor = trained(files, 3)
        arena.begin_update()
        tensor[: NUMEL // 2] = 0
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed(work) == -signal.SIGKILL
    assert examine(files.arena).torn
    assert not Arena.open(files.arena).adopt(FINGERPRINT)
    assert sorted(check_what_is_left(files, NUMEL, 3)) == [2, 3]


def test_tensors_of_a_device_take_the_same_road(files: RankFiles) -> None:
    """Several dtypes and sizes, over the ends of chunks; equal state is equal bytes. Here with CPU
    tensors.
    """
    chance = torch.Generator().manual_seed(0)
    shapes = [(3,), (1025, 1031), (), (0, 4), (63, 1000), (1 << 20,)]
    dtypes = [torch.float32, torch.float32, torch.int64, torch.float32, torch.bfloat16, torch.uint8]
    tensors = [
        torch.randn(shape, generator=chance).mul(9).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    boxes = [(f"t{n}", (9, *shape[1:]), (1,) * len(shape)) for n, shape in enumerate(shapes)]
    slots = Slots.open(files.slots)
    source = TensorSource(tensors, boxes, fingerprint=FINGERPRINT, epoch=4)
    capture = Capture(source, slots)
    for step in (1, 2):
        capture.start(step, {"cursor": step})
        capture.barrier()
    images = [Image.open(path) for path in files.slots]
    for image in images:
        assert image.epoch == 4
        for part, tensor, box in zip(image.parts(), tensors, boxes, strict=True):
            assert (part.name, part.shape, part.offsets) == box
            assert part.start % 64 == 0
            assert torch.equal(image.tensor(part), tensor)
    assert images[0].read(0, source.used) == images[1].read(0, source.used)
    capture.close()
    with pytest.raises(ArenaError, match="not contiguous"):
        TensorSource([torch.ones(4, 4).T], [("t", (4, 4), (0, 0))], fingerprint="", epoch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_cuda_device_are_captured(files: RankFiles) -> None:
    """Through pinned memory on a stream of their own, after what the training stream had been given."""
    tensors = [torch.full((3_000_001,), 1.0, device="cuda"), torch.ones(5, device="cuda")]
    boxes = [("a", (3_000_001,), (0,)), ("b", (5,), (0,))]
    capture = Capture(TensorSource(tensors, boxes, fingerprint="f", epoch=0), Slots.open(files.slots))
    for step in range(1, 5):
        for tensor in tensors:
            tensor.mul_(2)
        capture.start(step, {})
        capture.barrier()
        slot = capture._slots.find(step)
        assert slot is not None
        image = Image.open(slot.path)
        for part, tensor in zip(image.parts(), tensors, strict=True):
            assert torch.equal(image.tensor(part), tensor.cpu())
    capture.close()


def test_the_same_tensors_are_described_alike() -> None:
    """A rank that is built again finds its index unchanged in its slots."""
    chance = random.Random(1)
    tensors = [torch.ones(chance.randrange(1, 50)) for _ in range(20)]
    boxes = [(f"t{n}", (len(t),), (0,)) for n, t in enumerate(tensors)]
    one, two = (TensorSource(tensors, boxes, fingerprint="", epoch=0) for _ in range(2))
    assert (one.used, one.index_bytes) == (two.used, two.index_bytes)
