"""Capture: the state of an update is copied to a slot while the next forward and backward pass run.

Parameters and moments change in the update alone, so between two updates a thread can copy them without
holding up training: `start` after an update hands it the work, `barrier` before the next one waits for what
is left of it. Where state lies in an arena it is copied from there; tensors on a device go through pinned
memory on a stream of their own.
"""

import copy
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .arena import ALIGNMENT, Arena
from .header import CHUNK_BYTES, ArenaError, ImageError
from .image import PartIndex, encode_index
from .slots import Slot, Slots

logger = logging.getLogger(__name__)

_ALIVE_S = 1.0  # how often a wait looks whether the copying thread still lives


class CaptureError(ImageError):
    """A copy to a slot failed; its cause is chained. The slots before it are untouched."""


class Source(Protocol):
    """What is copied: `used` bytes, chunk by chunk."""

    @property
    def used(self) -> int:
        """Bytes of data."""

    @property
    def index_bytes(self) -> bytes:
        """Of `encode_index`."""

    @property
    def fingerprint(self) -> str:
        """Of the layout and the model."""

    @property
    def epoch(self) -> int:
        """In which the state was made."""

    def ready(self, step: int) -> None:
        """On the training thread, as a copy is started. Raises ArenaError when there is no such step to
        copy.
        """

    def copy(self, slot: Slot) -> None:
        """On the copying thread: put every chunk."""


class ArenaSource:
    """The data of an arena whose index is sealed."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._version = -1

    @property
    def used(self) -> int:
        """Bytes of data."""
        return self._arena.record.used

    @property
    def index_bytes(self) -> bytes:
        """As the arena's header has it."""
        return self._arena.index_bytes

    @property
    def fingerprint(self) -> str:
        """Of the layout and the model."""
        return self._arena.record.fingerprint

    @property
    def epoch(self) -> int:
        """Of the arena."""
        return self._arena.record.epoch

    def ready(self, step: int) -> None:
        """The arena must be at this step."""
        if self._arena.torn or self._arena.record.step != step:
            at = "no whole step" if self._arena.torn else f"step {self._arena.record.step}"
            raise ArenaError(
                f"{self._arena.path}: step {step} cannot be captured, the arena is at {at}. "
                f"Call start() after end_update()."
            )
        self._version = self._arena.version

    def copy(self, slot: Slot) -> None:
        """Straight from memory to memory. An update that begins meanwhile is an ArenaError."""
        data = self._arena.data
        for chunk in range(slot.chunks()):
            begin = chunk * CHUNK_BYTES
            slot.put(chunk, data[begin : begin + CHUNK_BYTES])
        if self._arena.version != self._version:
            raise ArenaError(
                f"{self._arena.path}: an update began while it was copied. "
                f"Call barrier() before begin_update()."
            )


class TensorSource:
    """Contiguous tensors of any device, each laid at the next multiple of 64 bytes, in their order.

    `boxes` says of each tensor (name, shape of the whole, offsets in it). On a CUDA device two pinned buffers
    of a chunk each are used in turns, so the device fills one while the other is stored.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        boxes: Sequence[tuple[str, Sequence[int], Sequence[int]]],
        *,
        fingerprint: str,
        epoch: int,
    ) -> None:
        self.fingerprint = fingerprint
        self.epoch = epoch
        parts, self.used, pieces = [], 0, []
        for tensor, (name, shape, offsets) in zip(tensors, boxes, strict=True):
            if not tensor.is_contiguous():
                raise ArenaError(
                    f"{name}: its memory is not contiguous; capture the tensor that it is a view of"
                )
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            start = -(-self.used // ALIGNMENT) * ALIGNMENT
            dtype = str(tensor.dtype).removeprefix("torch.")
            sizes = tuple(tensor.shape)
            parts.append(PartIndex(name, dtype, tuple(shape), tuple(offsets), sizes, start, len(flat)))
            pieces.append((start, flat))
            self.used = start + len(flat)
        self.index_bytes = encode_index(parts)
        self._chunks = _cut(pieces, self.used)
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        if len(devices) > 1:
            raise ArenaError(
                f"tensors of {len(devices)} devices; a rank has one. Capture each with its own slots."
            )
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None
        pinned = self._stream is not None
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._updated: torch.cuda.Event | None = None

    def ready(self, step: int) -> None:
        """The copies come after what the training stream has been given so far."""
        if self._stream is not None:
            self._updated = torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, slot: Slot) -> None:
        """Device to pinned memory one chunk ahead of pinned memory to slot."""
        if self._stream is not None and self._updated is not None:
            self._stream.wait_event(self._updated)
        total = slot.chunks()
        arrived = self._fetch(0) if total else None
        for chunk in range(total):
            coming = self._fetch(chunk + 1) if chunk + 1 < total else None
            if arrived is not None:
                arrived.synchronize()
            length = min(CHUNK_BYTES, self.used - chunk * CHUNK_BYTES)
            slot.put(chunk, self._buffers[chunk % 2][:length].numpy())
            arrived = coming

    def _fetch(self, chunk: int) -> torch.cuda.Event | None:
        buffer = self._buffers[chunk % 2]
        segments = self._chunks[chunk]
        if sum(len(piece) for _, piece in segments) < CHUNK_BYTES:
            buffer.zero_()  # between tensors, so that equal state is equal bytes
        with torch.cuda.stream(self._stream):  # None, on the CPU, changes nothing
            for start, piece in segments:
                buffer[start : start + len(piece)].copy_(piece, non_blocking=True)
        return self._stream.record_event() if self._stream is not None else None


def _cut(pieces: Sequence[tuple[int, torch.Tensor]], used: int) -> list[list[tuple[int, torch.Tensor]]]:
    """For every chunk of `used` bytes the views that fill it: (start in the chunk, bytes)."""
    chunks: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(-(-used // CHUNK_BYTES))]
    for start, flat in pieces:
        done = 0
        while done < len(flat):
            chunk, inside = divmod(start + done, CHUNK_BYTES)
            length = min(CHUNK_BYTES - inside, len(flat) - done)
            chunks[chunk].append((inside, flat[done : done + length]))
            done += length
    return chunks


class Capture:
    """Copies steps to slots on a thread of its own, which lives until `close`. Call it from one thread.

    Nothing is allocated per step but the few objects that name it.
    """

    def __init__(self, source: Arena | Source, slots: Slots) -> None:
        self._source: Source = ArenaSource(source) if isinstance(source, Arena) else source
        self._slots = slots
        self._changed = threading.Condition()
        self._work: tuple[Slot, int, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._closed = False
        self.copy_s = 0.0  # of the last copy
        # A daemon: a process that is told to end must not wait for a copy that nobody will read.
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def start(self, step: int, progress: dict[str, Any]) -> None:
        """Copy the state of `step` from now on; returns at once. The state must not change before `barrier`
        returns.

        Raises ArenaError when a copy is under way, or when the source is not at this step.
        """
        with self._changed:
            if self._closed or self._work is not None:
                why = "capture is closed" if self._closed else "a copy is under way; call barrier() first"
                raise ArenaError(f"step {step} cannot be captured: {why}")
            self._source.ready(step)
            slot = self._slots.next_to_fill()
            slot.begin(self._source.used, self._source.index_bytes)
            self._work = (slot, step, copy.deepcopy(progress))
            self._changed.notify_all()

    def barrier(self) -> float:
        """Wait for the copy under way, if any: seconds waited. Raises CaptureError when it failed.

        The wait has no time limit of its own: it ends with a copy from memory to memory, which waits for
        nobody, and going on earlier would tear it. A thread that ended without an answer is noticed.
        """
        began = time.perf_counter()
        with self._changed:
            while self._work is not None:
                if not self._changed.wait(_ALIVE_S) and not self._thread.is_alive():
                    raise CaptureError("the copying thread is gone; make a new Capture over the same slots")
            error, self._error = self._error, None
        if error is not None:
            raise CaptureError(f"a copy to a slot failed: {type(error).__name__}: {error}") from error
        return time.perf_counter() - began

    @property
    def busy(self) -> bool:
        """Whether a copy is under way."""
        return self._work is not None

    @property
    def sealed_step(self) -> int:
        """The newest whole step in the slots, committed or not; -1 where there is none."""
        slot = self._slots.sealed()
        return slot.step if slot else -1

    def commit(self, step: int) -> bool:
        """Mark the slot of `step` COMMITTED: all ranks have sealed it. False where it has been
        overwritten.
        """
        return self._slots.commit(step)

    def close(self) -> None:
        """End the thread after the copy under way, if any. Twice is as good as once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                # No time limit: it ends with start() or close(), and as a daemon with the process.
                self._changed.wait_for(lambda: self._work is not None or self._closed)
                if self._work is None:
                    return
                slot, step, progress = self._work
            error = self._copy(slot, step, progress)
            with self._changed:
                self._error = error
                self._work = None
                self._changed.notify_all()

    def _copy(self, slot: Slot, step: int, progress: dict[str, Any]) -> BaseException | None:
        began = time.perf_counter()
        try:
            self._source.copy(slot)
            slot.seal(
                step=step, epoch=self._source.epoch, fingerprint=self._source.fingerprint, progress=progress
            )
        except BaseException as error:
            logger.warning("capture step=%d slot=%s failed: %s", step, slot.path, error)
            return error
        self.copy_s = time.perf_counter() - began
        return None
