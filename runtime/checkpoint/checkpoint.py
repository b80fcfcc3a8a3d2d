"""Save while training goes on, load the newest that is whole.

Saving copies the tensors once (the only part that training waits for) and writes from a thread with its own
process group. Loading tries the newest committed checkpoint first and falls back to older ones when it is
damaged; all ranks agree.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ...parallel.collectives import gather_json
from ...parallel.mesh import Axis
from ..part import Part
from ..state import TrainState
from .format import DamagedCheckpoint, read_index
from .planners import PartLoadPlanner, PartSavePlanner, by_name
from .shelf import Shelf, is_of_disk
from .storage import FolderReader, FolderWriter


class CheckpointMismatch(RuntimeError):
    """A whole checkpoint, of another model than the one to be loaded."""


class NoCheckpointLeft(RuntimeError):
    """Checkpoints exist, and none of them is whole."""


class CheckpointNotWritten(RuntimeError):
    """A save came to nothing; the checkpoint before it still stands."""

    def __init__(self, message: str, of_disk: bool = False) -> None:
        """`of_disk`: because a disk is full, or refuses to be written to."""
        super().__init__(message, of_disk)  # both, as they cross processes
        self.of_disk = of_disk

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Loaded:
    """What was loaded, and what could not be."""

    step: int
    damaged: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves and loads a `TrainState`; every method is called by all ranks in the same order."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        everyone: Axis,
        group: dist.ProcessGroup,
        device: torch.device,
        on_commit: Callable[[int, float], None],
    ) -> None:
        """`everyone` loads, with `device` to talk over; `group`, of the same ranks, is used by the writing
        thread alone.

        `on_commit(step, seconds)` runs on rank 0 just before a checkpoint counts.
        """
        self._shelf = shelf
        self._everyone = everyone
        self._group = group
        self._device = device
        self._on_commit = on_commit
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._staged: tuple[list[Part], dict[str, Any]] | None = None
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None  # what stopped the last write, the same on every rank
        self._untold: CheckpointNotWritten | None = None

    def save(self, state: TrainState) -> float:
        """Copy the state and start writing it; returns the seconds that training waited."""
        stall = self.stage(state)
        self.write()
        return stall

    def stage(self, state: TrainState) -> float:
        """Copy the state as it is now, for `write`; returns the seconds that training waited."""
        started = time.perf_counter()
        self._join()
        self._error = None
        self._staged = self._copy(state.parts()), state.progress_values()
        return time.perf_counter() - started

    def write(self) -> None:
        """Start writing what was staged."""
        assert self._staged is not None, "stage comes first"
        staged, self._staged = self._staged, None
        self._writing = threading.Thread(target=self._write, args=staged, name="checkpoint", daemon=True)
        self._writing.start()

    def take_error(self) -> CheckpointNotWritten | None:
        """What stopped a write that has ended, told once; the previous checkpoint still stands.

        Ranks hear of it at different steps; only `wait` answers alike on all.
        """
        error, self._untold = self._untold, None
        return error

    def wait(self) -> None:
        """Wait until the last save is durable. Raises what stopped it, told before or not."""
        self._join()
        if self._error is not None:
            raise self._error

    def abandon(self, timeout_s: float) -> None:
        """Let a write end that has lost the other ranks; what it wrote is no checkpoint."""
        if self._writing is not None:
            self._writing.join(timeout_s)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that stand, as rank 0 sees them, newest first."""
        steps: list[int] = gather_json(self._shelf.steps(), self._everyone, self._device)[0]
        return steps

    def load(self, state: TrainState) -> Loaded | None:
        """Load the newest whole checkpoint into `state`; None when there is none at all.

        Raises NoCheckpointLeft when there are some and all are damaged (starting anew would bury them), and
        CheckpointMismatch when one is whole and of another model.
        """
        candidates = self.steps()
        damaged: list[str] = []
        for step in candidates:
            folder = self._shelf.path(step)
            parts = state.parts()
            # ranks hold different names: what one of them misses, the others must hear of
            looked: dict[str, Any] = {}
            for found in reversed(gather_json(_look(folder, parts), self._everyone, self._device)):
                looked |= found
            if "mismatch" in looked:
                raise CheckpointMismatch(f"{folder}: {looked['mismatch']}")
            if "damage" in looked:
                damaged.append(f"step {step}: {looked['damage']}")
                continue
            try:
                dcp.load(
                    by_name(parts),
                    storage_reader=FolderReader(folder),
                    planner=PartLoadPlanner(),
                    process_group=self._everyone.group,
                )
            except CheckpointException as error:
                damaged.append(f"step {step}: {_first_cause(error)}")
                continue
            state.set_progress(looked["progress"])
            return Loaded(step, damaged)
        if damaged:
            raise NoCheckpointLeft(
                f"none of the checkpoints in {self._shelf.folder} is whole: {'; '.join(damaged)}. Restore "
                "one from a backup, or choose another run.dir to start anew"
            )
        return None

    def _write(self, copies: list[Part], progress: dict[str, Any]) -> None:
        started = time.perf_counter()
        partial = self._shelf.partial(progress["step"])

        def commit(_: Path) -> None:
            self._on_commit(progress["step"], time.perf_counter() - started)
            self._shelf.commit(progress["step"])

        try:
            writer = FolderWriter(partial, progress, commit)
            dcp.save(
                by_name(copies),
                storage_writer=writer,
                planner=PartSavePlanner(),
                process_group=self._group,
            )
        except (
            BaseException
        ) as error:  # a thread's error is seen by nobody: kept for the rank, whatever it is
            cause = _first_cause(error) if isinstance(error, CheckpointException) else repr(error)
            told = f"step {progress['step']}: {cause}"
            self._error = self._untold = CheckpointNotWritten(told, _of_disk(error))
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()  # bounded by the collective timeout of the group
            self._writing = None

    def _copy(self, parts: list[Part]) -> list[Part]:
        """Copies in host memory of all that there is to write; the memory is kept for the next save."""
        boxes = {(part.name, part.offsets): part for part in parts if part.at_rest}
        for box, part in boxes.items():
            if box not in self._copies:
                self._copies[box] = torch.empty_like(part.tensor, device="cpu")
            self._copies[box].copy_(part.tensor)
        return [replace(part, tensor=self._copies[box]) for box, part in boxes.items()]


def _look(folder: Path, parts: list[Part]) -> dict[str, Any]:
    """What the index of a checkpoint says: its progress, its damage, or why it is none of this model."""
    try:
        index = read_index(folder)
    except DamagedCheckpoint as error:
        return {"damage": str(error)}
    for part in parts:
        stored = index.tensors.get(part.name)
        if stored is None:
            return {"mismatch": f"holds no {part.name}, which this model has; choose another run.dir"}
        if stored.shape != part.shape:
            shapes = f"{list(stored.shape)}, which is {list(part.shape)} in this model"
            return {"mismatch": f"holds {part.name} as {shapes}; choose another run.dir"}
    return {"progress": index.progress}


def _of_disk(error: BaseException) -> bool:
    """Whether a disk is the cause, on any rank."""
    causes = (
        [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    )
    return any(is_of_disk(cause) for cause in causes)


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return str(cause) if isinstance(cause, DamagedCheckpoint) else f"rank {rank}: {cause!r}"
