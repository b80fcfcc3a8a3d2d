"""One command at a time in a run's folder: two would write one record and one set of checkpoints."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


class RunBusy(ValueError):
    """Another command is at work in the folder."""


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold the folder inside the `with`; the kernel lets go of it when the process ends, however it ends.

    Raises RunBusy when another process holds it.
    """
    with open(run_dir / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(
                f"{run_dir}: another rayfold command is training there; wait for it, stop it, or choose "
                "another run.name"
            ) from None
        yield
