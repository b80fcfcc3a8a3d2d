"""What Ray Train is told of a checkpoint: a folder with one small file that names the run's own.

The run's checkpoints are sharded and large, durable where they lie, and loaded under any layout. Reporting
them themselves would have Ray Train copy every byte a second time, and keep a second opinion of which ones
count. So it is given a pointer: path, step and the digest of the checkpoint's index, which in turn holds a
sum of every chunk.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import Checkpoint

POINTER = "rayfold.json"
INDEX = "index.json"  # last file of a checkpoint to be written; see runtime/checkpoint/format.py


class CheckpointLost(RuntimeError):
    """A pointer leads to no checkpoint, or to another one than it was made for."""


@dataclass(frozen=True)
class Durable:
    """A checkpoint of a run, as it stands in the run's folder."""

    run_dir: Path
    folder: Path
    step: int


def write_pointer(into: Path, durable: Durable) -> None:
    """Write the pointer to a checkpoint that stands. Raises OSError when it does not."""
    said = {
        "run_dir": str(durable.run_dir),
        "folder": str(durable.folder),
        "step": durable.step,
        "index_sha256": _digest(durable.folder),
    }
    (into / POINTER).write_text(json.dumps(said, indent=2) + "\n")


def pointed_step(checkpoint: Checkpoint) -> int:
    """The step that a reported checkpoint is of; nothing is looked at but the pointer.

    Raises CheckpointLost when it is no pointer.
    """
    return int(_read(checkpoint)["step"])


def durable_checkpoint(checkpoint: Checkpoint) -> Durable:
    """The run's own checkpoint that a reported one (`result.checkpoint`) points to.

    Raises CheckpointLost when it is not there any more, or is not the same.
    """
    said = _read(checkpoint)
    durable = Durable(Path(said["run_dir"]), Path(said["folder"]), int(said["step"]))
    try:
        digest = _digest(durable.folder)
    except OSError as error:
        raise CheckpointLost(
            f"{durable.folder}: cannot be read ({error.strerror}); the run keeps the newest checkpoint.keep "
            "of its checkpoints, on the machines that trained it"
        ) from error
    if digest != said["index_sha256"]:
        raise CheckpointLost(
            f"{durable.folder}: is another checkpoint of step {durable.step} than the one that was reported; "
            "the run was trained again in the same folder"
        )
    return durable


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        path = Path(folder) / POINTER
        if not path.exists():
            raise CheckpointLost(f"{checkpoint.path}: holds no {POINTER}, so train_loop did not report it")
        said: dict[str, Any] = json.loads(path.read_text())
    return said


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
