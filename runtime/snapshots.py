"""The snapshots of one rank: which steps are copied, when a copy counts, and what may change meanwhile.

The state changes in the update alone. Between two updates a thread copies it to a slot; before the last sums
of the next step the copy is waited for, and every rank votes that its own is whole. When all have voted, the
copy is committed right after the update, before another one is begun: with two slots a step that all ranks
can go back to stands at every moment. No rank is a whole update ahead of another, as the sums need all.

How often is a function of times that all ranks have summed, so that all copy the same steps.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..faulttol.arena import Arena
from ..faulttol.config import SnapshotConfig
from ..faulttol.interval import steps_between
from ..faulttol.slots import Slots
from ..faulttol.snapshot import Capture, CaptureError, TensorSource
from ..parallel.collectives import sum_over
from ..parallel.mesh import FoldedMesh
from .part import Part
from .place import SnapshotPlace
from .restore import Restored, twin_of

logger = logging.getLogger(__name__)

MICROSECOND = 1e-6  # times are summed as whole ones: the same sum on every rank
FITS = (
    0.8  # part of a step that a copy may take and still be made at every one; the update itself is the rest
)
DISK_S = 300.0  # a vault or a controller that is lost is back within one minute, and tries again for another
DISK_LOOK_S = 0.005
SMOOTHING = 0.2  # weight of the last copy in the means


class Snapshots:
    """Guards the state that a rank was given; one thread calls it. Close it, whatever happened."""

    def __init__(
        self,
        restored: Restored,
        mesh: FoldedMesh,
        place: SnapshotPlace,
        *,
        config: SnapshotConfig,
        arena: Arena | None,
        slots: Slots,
        due: bool,
    ) -> None:
        """Every rank has what it needs from the files of the others by now. `due`: the step that is begun
        with is to be on disk.
        """
        state = restored.state
        self._mesh, self._config, self._mtbf_s, self._arena = mesh, config, place.mtbf_s, arena
        rank, world_size = mesh.world.rank, mesh.world.size
        self._said = {
            "rank": rank,
            "world_size": world_size,
            "twin": twin_of(mesh.layout, rank),
            "copies": mesh.layout.dp_replicate,
            "began": {str(epoch): step for epoch, step in restored.began.items()},
        }
        # buffers change in the forward pass: nothing may be copied beside it
        self._changes_early = bool(state.model.buffers)
        self._slots, self._place = slots, place
        parts = [part for part in state.parts() if part.at_rest]
        slots.discard_after(state.progress.step)
        slots.forget_due()
        if due and place.writes:
            slots.due = state.progress.step
        source: Arena | TensorSource
        if arena is not None:
            index = [arena.part(part.name, part.tensor, part.shape, part.offsets) for part in parts]
            arena.seal_index(index, restored.fingerprint, place.epoch)
            arena.end_update(state.progress.step, state.progress_values() | self._said)
            source = arena
        else:
            source = tensors_of(parts, fingerprint=restored.fingerprint, epoch=place.epoch)
        self._capture = Capture(source, slots)
        self._pending: int | None = None  # the step that is, or was last, copied and not voted for
        self._ended = self._sealed = False  # whether its copy is over, and whole
        self._votes = torch.zeros(4, dtype=torch.int64, device=mesh.device)
        self._voting: dist.Work | None = None
        self._voted = False
        self._means = (0.0, 0.0, 0.0)  # seconds of a copy, a step and a stall, over ranks and time
        self._stall_s = 0.0  # not told yet
        self._waited_s = 0.0  # for the copy that is pending
        self._every = config.every or 1
        self._updated_at, self._step_s = time.perf_counter(), 0.0
        self._protect(slots, restored)

    def before_forward(self) -> None:
        """A model that changes in its forward pass is copied before it begins."""
        if self._changes_early:
            self._wait()
            if self._arena is not None:
                self._arena.begin_update()

    def before_sums(self) -> None:
        """Wait for the copy, then vote for it."""
        if self._pending is not None:
            self._wait()
            self._voting = self._vote()
            self._voted = True

    def before_update(self) -> None:
        """Hear the votes; from now on, to the next `after_update`, the state is of no step."""
        self._hear()
        if self._arena is not None:
            self._arena.begin_update()

    @property
    def are_written(self) -> bool:
        """Whether copies that are due on disk are written by whoever keeps them."""
        return self._place.writes

    def after_update(self, step: int, progress: Mapping[str, Any], *, due: bool = False) -> None:
        """The state is that of `step`: commit the copy before, begin one where it is time, or where it is
        `due` on disk.
        """
        started = time.perf_counter()
        self._step_s, self._updated_at = started - self._updated_at, started
        self._count()
        said = {**progress, **self._said}
        if self._arena is not None:
            self._arena.end_update(step, said)
        if due and self._place.writes:
            self._await_disk()
            self._slots.due = step
        if step >= self._next or self._slots.due == step:
            self._start(step, said)
        self._stall_s += time.perf_counter() - started

    def finish(self, step: int, progress: Mapping[str, Any]) -> None:
        """Nothing changes any more: the last step is copied, and committed where all ranks have it."""
        if self._pending != step:
            self._wait()
            self._start(step, {**progress, **self._said})
        self.before_sums()
        self._hear()
        self._count()

    def take_stall(self) -> float:
        """Seconds that training waited for copies since this was asked last."""
        stall, self._stall_s = self._stall_s, 0.0
        return stall

    @property
    def copy_s(self) -> float:
        """Of the last copy on this rank."""
        return self._capture.copy_s

    @property
    def every(self) -> int:
        """Steps from one copy to the next, as it is now."""
        return self._every

    def close(self) -> None:
        """End the copying thread, when a copy under way is done."""
        self._capture.close()

    def _protect(self, slots: Slots, restored: Restored) -> None:
        """Have a copy of what the attempt starts from before its first update; one that stands is as good."""
        progress, step = restored.state.progress_values(), restored.state.progress.step
        slot = slots.find(step)
        record = slot.holds() if slot is not None else None
        if (
            record is not None
            and record.fingerprint == restored.fingerprint
            # and not of a line of steps that was given up since
            and all(step <= start for epoch, start in restored.began.items() if epoch > record.epoch)
        ):
            self._pending, self._ended, self._sealed = step, True, True
            self._next = step + self._every
        else:
            self._start(step, {**progress, **self._said})

    def _await_disk(self) -> None:
        """Back-pressure: the step that was due before is on disk, or was given up."""
        deadline = time.monotonic() + DISK_S
        while self._slots.due >= 0 and not self._place.leaving():
            if time.monotonic() > deadline:
                logger.warning("step=%d is not on disk after %.0f s", self._slots.due, DISK_S)
                return
            time.sleep(DISK_LOOK_S)

    def _start(self, step: int, said: dict[str, Any]) -> None:
        self._capture.start(step, said)
        self._pending, self._waited_s = step, 0.0
        self._ended = self._sealed = False
        self._next = step + self._every

    def _wait(self) -> None:
        if self._pending is None or self._ended:
            return
        started = time.perf_counter()
        self._ended = True
        try:
            self._capture.barrier()
            self._sealed = True
        except CaptureError as error:  # this step cannot be gone back to; the copy before it still can
            logger.warning("step=%d snapshot failed: %s", self._pending, error)
        self._waited_s += time.perf_counter() - started
        self._stall_s += time.perf_counter() - started

    def _vote(self) -> dist.Work | None:
        """In a sum of its own: whole numbers, so that the loss's sum has the bits that it has without."""
        seconds = (self._capture.copy_s, self._step_s, self._waited_s)
        values = [int(self._sealed), *(int(s / MICROSECOND) for s in seconds)]
        self._votes.copy_(torch.tensor(values))
        return sum_over(self._votes, self._mesh.world, wait=False)

    def _hear(self) -> None:
        if self._voting is not None:
            self._voting.wait()  # bounded by the timeout of the group
            self._voting = None

    def _count(self) -> None:
        if not self._voted or self._pending is None:
            return
        votes, *times = self._votes.tolist()
        size = self._mesh.world.size
        if votes == size:
            self._capture.commit(self._pending)
        if all(times[:2]):  # of a copy made beside a whole step
            self._learn([total * MICROSECOND / size for total in times])
        self._next = self._pending + self._every
        self._pending, self._voted = None, False

    def _learn(self, seconds: list[float]) -> None:
        if not any(self._means):
            self._means = (seconds[0], seconds[1], seconds[2])
        copy, step, stall = (
            mean + SMOOTHING * (new - mean) for mean, new in zip(self._means, seconds, strict=True)
        )
        self._means = copy, step, stall
        self._every = self._config.every or how_often(
            copy_s=copy, step_s=step, stall_s=stall, mtbf_s=self._mtbf_s
        )


def how_often(*, copy_s: float, step_s: float, stall_s: float, mtbf_s: float) -> int:
    """Steps from one copy to the next: 1 where a copy is done before the step is, else the best interval."""
    if copy_s <= FITS * step_s or step_s <= 0:
        return 1
    return steps_between(step_s=step_s, delta_s=stall_s, mtbf_s=mtbf_s, copy_s=copy_s)


def tensors_of(parts: list[Part], *, fingerprint: str, epoch: int) -> TensorSource:
    """What is copied where the state does not lie in an arena."""
    boxes = [(part.name, part.shape, part.offsets) for part in parts]
    tensors = [part.tensor for part in parts]
    return TensorSource(tensors, boxes, fingerprint=fingerprint, epoch=epoch)
