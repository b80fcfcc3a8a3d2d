"""What a worker imports before it can train: two seconds of a processor, so as cheaply as can be, and where
others train beside it out of their way.

Imports make half a million objects that stay. The collector of cycles would walk through all of them a few
times meanwhile, a quarter of the whole time, and again whenever a rank that trains has made many new ones.
"""

import contextlib
import gc
import os
from concurrent.futures import ThreadPoolExecutor


def import_trainer(*, in_background: bool) -> None:
    """Import torch and all that trains. `in_background` takes only what others leave of the processors: ranks
    run at Ray's niceness of 15, of whose share this priority still gets a twelfth where nobody pauses.
    """
    if not in_background:
        _import()
        return
    # numpy starts threads, which would keep the priority of the one that starts them
    import numpy  # noqa: F401

    # A priority that was lowered cannot be raised again, but it is each thread's own, and this one ends.
    with ThreadPoolExecutor(1, "imports", initializer=_give_way) as background:
        background.submit(_import).result()


def _give_way() -> None:
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # a container that forbids it; then it is as fast as the others
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _import() -> None:
    gc.disable()
    try:
        import torch  # noqa: F401

        from ..runtime import trainer  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
