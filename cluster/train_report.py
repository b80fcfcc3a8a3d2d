"""What Ray Train is told while a run trains, and how its telling never slows a step.

`ray.train.report` is a barrier of all workers, and Ray Train takes one report each time it polls them, every
two seconds: on the step path it would set the pace. So the step path leaves its figures here, and a thread of
each rank reports. When is decided by rank 0 alone; the others wait for its word beside their training.
"""

import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import ray.train
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero

from ..runtime.checkpoint.shelf import Shelf
from ..runtime.journal import EventKind, Journal
from .train_pointer import Durable, pointed_step, write_pointer

REPORT_EVERY_S = 5.0  # Ray Train takes one every 2 s, and people read them; it warns of a silence of 60 s
LAST_REPORT_S = 120.0  # two polls of Ray Train, on a machine and a storage that may be busy
LINES_KEPT = 256  # steps that may pass while a checkpoint is written, for it to be told with its own figures
VALIDATED = ("val_loss", "val_bits_per_byte")
REPORT, NOTHING, END = "report", "nothing", "end"  # the word of rank 0


class Figures:
    """The recorder of a rank (`runtime.trainer.Recorder`). What rank 0 tells goes into the run's journal and
    the next report; what other ranks tell is the same, and is dropped.
    """

    def __init__(self, journal: Journal | None, last: dict[str, Any]) -> None:
        """`last` is the newest line of metrics in the record, {} where there is none."""
        self._journal = journal
        self._lock = threading.Lock()  # checkpoints are told by the thread that writes them
        self._lines: deque[dict[str, Any]] = deque([last] if last else [], maxlen=LINES_KEPT)
        self._validated = {key: last[key] for key in VALIDATED if key in last}

    def metric(self, values: dict[str, Any]) -> None:
        """One optimizer step."""
        if self._journal is None:
            return
        with self._lock:
            self._journal.metric(values)
            self._lines.append(values)
            self._validated |= {key: values[key] for key in VALIDATED if key in values}

    def event(self, kind: EventKind, step: int, **fields: Any) -> None:
        """Something worth remembering."""
        if self._journal is not None:
            with self._lock:
                self._journal.event(kind, step, **fields)

    def flush(self) -> None:
        """Nothing waits: every line is written when it is told."""

    def of(self, step: int | None) -> dict[str, Any]:
        """The figures of `step`, the newest where it is None or not known any more; {} before the first."""
        with self._lock:
            newest = self._lines[-1] if self._lines else {}
            line = next((line for line in reversed(self._lines) if line["step"] == step), newest)
            return {**self._validated, **line} if line else {}


class Reporter:
    """Reports to Ray Train from a thread for as long as it is entered; all ranks enter and leave it alike.

    Left without an error it reports what is newest, and returns when Ray Train has it. Raises TimeoutError
    then when it has not, and what went wrong with a report before.
    """

    def __init__(self, figures: Figures, run_dir: Path, *, rank: int) -> None:
        self._figures = figures
        self._run_dir = run_dir
        self._shelf = Shelf(run_dir / "checkpoints", keep=1)
        self._told_step = self._told_checkpoint = 0
        self._ending, self._given_up = threading.Event(), False
        self._error: Exception | None = None
        target = self._lead if rank == 0 else self._follow
        self._thread = threading.Thread(target=self._guard, args=(target,), name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = error is not None
        self._ending.set()
        if self._given_up:
            return  # the thread may wait for a rank that is gone; Ray Train ends this process
        self._thread.join(LAST_REPORT_S)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"Ray Train did not take the last report within {LAST_REPORT_S:.0f} s")

    def _guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # a thread's error is seen by nobody: kept for the rank
            self._error = error

    def _lead(self) -> None:
        if (
            checkpoint := ray.train.get_checkpoint()
        ) is not None:  # told before the workers were started anew
            self._told_checkpoint = pointed_step(checkpoint)
        while not self._ending.wait(REPORT_EVERY_S):
            self._tell()
        if not self._given_up:
            self._tell()
            broadcast_from_rank_zero(END)

    def _follow(self) -> None:
        while (word := broadcast_from_rank_zero(None)) != END:
            if word == REPORT:
                ray.train.report({})

    def _tell(self) -> None:
        """Report what is new: the figures, and the newest checkpoint that stands."""
        stands = next(iter(self._shelf.steps()), 0)
        pointed = stands if stands != self._told_checkpoint else None
        figures = self._figures.of(pointed)
        if not figures or (pointed is None and figures["step"] == self._told_step):
            broadcast_from_rank_zero(NOTHING)
            return
        broadcast_from_rank_zero(REPORT)
        self._told_step = figures["step"]
        if pointed is None:
            ray.train.report(figures)
            return
        self._told_checkpoint = pointed
        durable = Durable(self._run_dir, self._shelf.path(pointed), pointed)
        with tempfile.TemporaryDirectory() as folder:
            write_pointer(Path(folder), durable)
            ray.train.report(figures, checkpoint=Checkpoint.from_directory(folder))
