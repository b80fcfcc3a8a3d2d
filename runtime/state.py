"""The state of a run as one named, layout-independent dict of tensors, and its progress as plain values.

Tensors are named by their place in the unsharded model (`model.<name>`, `optim.<moment>.<name>`) and have
global shapes. What is a pure function of the step (learning rate, random streams, order of samples) is not
stored: the step and the cursor are.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .optim.adamw import ShardedAdamW


@dataclass
class Progress:
    """How far the run is."""

    step: int = 0
    cursor: int = 0  # samples consumed by finished steps, over all ranks
    tokens: int = 0  # valid target tokens trained on


@dataclass
class TrainState:
    """Model, optimizer and progress: all that a checkpoint holds."""

    model: nn.Module
    optimizer: ShardedAdamW
    progress: Progress

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, sharing memory with the run: loading writes into it."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return named | {f"optim.{name}": tensor for name, tensor in self.optimizer.tensors().items()}

    def progress_values(self) -> dict[str, Any]:
        """Progress as JSON values."""
        return asdict(self.progress)

    def set_progress(self, values: dict[str, Any]) -> None:
        """Take over the progress of a loaded checkpoint."""
        self.progress = Progress(**values)
        self.optimizer.set_steps(self.progress.step)
