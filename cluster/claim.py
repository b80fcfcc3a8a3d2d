"""One at a time in a run's folder: two commands, or two controllers, would write one record and one set of
checkpoints.

A command claims the folder for as long as it runs. A controller, which may outlive its command, claims the
record. The kernel lets go of a claim when the process ends, however it ends.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK, RECORD_LOCK = ".lock", ".record.lock"
RECORD_WAIT_S = 10.0  # for a controller that was killed a moment ago to be gone
LOOK_EVERY_S = 0.1


class RunBusy(ValueError):
    """Somebody else is at work in the folder."""


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold the folder inside the `with`. Raises RunBusy when another process holds it."""
    with open(run_dir / LOCK, "a") as file:
        if not _lock(file):
            raise RunBusy(
                f"{run_dir}: another rayfold command is training there; wait for it, stop it, or choose "
                "another run.name"
            )
        yield


def claim_record(run_dir: Path) -> IO[str]:
    """Hold the record for as long as the file that is returned is open. Raises RunBusy when another process
    still holds it after `RECORD_WAIT_S`.
    """
    file = open(run_dir / RECORD_LOCK, "a")  # noqa: SIM115 (closed by who holds it)
    deadline = time.monotonic() + RECORD_WAIT_S
    while not _lock(file):
        if time.monotonic() > deadline:
            file.close()
            raise RunBusy(
                f"{run_dir}: a run goes on there that was started on a Ray cluster. Watch or stop it with "
                "the run.address it has, or choose another run.name"
            )
        time.sleep(LOOK_EVERY_S)
    return file


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
