"""From a rank to the controller: lines are queued on the step path and pushed in batches by a thread of their
own.

While a lost controller is started again they wait here, in order and numbered: the new one says which it has.
"""

import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from ..faulttol.untold import Untold
from ..runtime.journal import EventKind

PUSH_EVERY_S = 0.2  # how stale the progress line may be
PUSH_AGAIN_S = 0.2  # between attempts while there is no controller
FLUSH_TIMEOUT_S = 60.0  # a controller is back within seconds, on a busy machine within half of this


class EpochOver(OSError):
    """The run goes on without what this rank was part of."""


class Outbox:
    """Implements `runtime.trainer.Recorder` for one epoch. Metrics of rank 0 speak for all ranks; events are
    told by whoever has them.
    """

    def __init__(self, controller: Any, *, rank: int, epoch: int, folder: Path | None = None) -> None:
        """In `folder`, if there is one, metrics are kept that the controller may not have written down."""
        self._controller = controller
        self._rank = rank
        self._epoch = epoch
        self._untold = Untold(folder) if folder is not None and rank == 0 else None
        self._lines: list[tuple[str, dict[str, Any]]] = []
        self._told = self._pushed = 0
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._push_all, name="outbox", daemon=True)
        self._thread.start()

    def metric(self, values: dict[str, Any]) -> None:
        """One optimizer step. Raises EpochOver on every rank that was told so, at its next step."""
        if self._rank == 0 or self._error is not None:
            self._tell("metric", values)

    def event(self, kind: EventKind, step: int, **fields: Any) -> None:
        """Something worth remembering."""
        self._tell("event", {"kind": kind, "step": step, **fields})

    def end_epoch(self) -> None:
        """Take in no more; what is on its way still goes."""
        with self._changed:
            self._error = self._error or EpochOver(f"rank {self._rank} was told to leave epoch {self._epoch}")
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when the controller has written down all that was told. Raises TimeoutError when it does
        not.
        """
        with self._changed:
            goal = self._told
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pushed >= goal or self._error is not None, FLUSH_TIMEOUT_S)
            if self._error is None and self._pushed < goal:
                self._error = TimeoutError(
                    f"the controller wrote nothing down for {FLUSH_TIMEOUT_S:.0f} s; is its process gone?"
                )
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Push what is left and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(FLUSH_TIMEOUT_S)
        if self._untold is not None:
            self._untold.close()

    def _push(self, lines: list[tuple[str, dict[str, Any]]]) -> OSError | None:
        try:
            taken = self._record(lines)
        except RayTaskError as error:
            return OSError(f"the record of the run cannot be written: {error.cause}")
        except (RayActorError, GetTimeoutError) as error:
            return OSError(f"the controller does not take in the record: {type(error).__name__}")
        if not taken:
            return EpochOver(
                f"epoch {self._epoch} of the run is over: what its ranks tell is no longer taken in"
            )
        with self._changed:
            self._pushed += len(lines)
            if self._untold is not None and self._pushed == self._told:
                self._untold.all_told()
            self._changed.notify_all()
        return None

    def _record(self, lines: list[tuple[str, dict[str, Any]]]) -> bool:
        """Whether the controller heard these lines; waits for one that is being started again."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            told = self._controller.record.remote(
                lines, epoch=self._epoch, rank=self._rank, number=self._pushed
            )
            try:
                heard: bool = ray.get(told, timeout=FLUSH_TIMEOUT_S)
                return heard
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PUSH_AGAIN_S)

    def _tell(self, what: str, values: dict[str, Any]) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error  # training that nobody records is worth nothing
            self._lines.append((what, values))
            self._told += 1
            if self._untold is not None and what == "metric":
                self._untold.add(values)
            if what == "event":  # rare, and somebody may be waiting for it
                self._changed.notify_all()

    def _push_all(self) -> None:
        while True:
            with self._changed:
                if not self._closed and not any(what == "event" for what, _ in self._lines):
                    self._changed.wait(PUSH_EVERY_S)
                lines, self._lines = self._lines, []
                closed = self._closed
            if lines and (error := self._push(lines)) is not None:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            if closed and not self._lines:
                return
