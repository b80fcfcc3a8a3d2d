"""The state of a run as named boxes of layout-independent tensors, and its progress as plain values.

Tensors are named by their place in the unsharded model (`model.<name>`, `optim.<moment>.<name>`) and have
the shapes that they have there. What is a pure function of the step (learning rate, random streams, order of
samples) is not stored: the step and the cursor are.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..parallel.model import Sharded
from .optim.adamw import ShardedAdamW
from .part import Part
from .progress import Progress


@dataclass
class TrainState:
    """Model, optimizer and progress: all that a checkpoint holds."""

    model: Sharded
    optimizer: ShardedAdamW
    progress: Progress

    def parts(self) -> list[Part]:
        """All that this rank holds, sharing memory with the run: loading writes into it.

        A name that is held twice comes twice.
        """
        return [
            *(Part.of(held, f"model.{held.name}") for held in self.model.held),
            *(Part.whole(f"model.{name}", buffer) for name, buffer in self.model.buffers.items()),
            *self.optimizer.parts("optim."),
        ]

    def progress_values(self) -> dict[str, Any]:
        """Progress as JSON values."""
        return asdict(self.progress)

    def set_progress(self, values: dict[str, Any]) -> None:
        """Take over the progress of a loaded checkpoint."""
        self.progress = Progress(**values)
        self.optimizer.set_steps(self.progress.step)
