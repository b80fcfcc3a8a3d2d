"""What a worker imports before it can train: two seconds of a processor, so as cheaply as can be, and where
others train beside it out of their way.

Imports make half a million objects that stay. The collector of cycles would walk through all of them a few
times meanwhile, a quarter of the whole time, and again whenever a rank that trains has made many new ones.
"""

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor

GIVE_WAY = 4  # of niceness: less than a third of what a rank on the same core has that never pauses


def import_trainer(*, in_background: bool) -> None:
    """Import torch and all that trains. `in_background` gives way to ranks, but not for ever: where none
    pauses it takes six seconds instead of two. The lowest priority of all may take minutes there, and nobody
    in the process could raise it, as the thread that waits for a processor holds the interpreter.
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
    if sys.platform == "linux":  # elsewhere a priority is not a thread's, but the whole process's
        os.nice(GIVE_WAY)


def _import() -> None:
    gc.disable()
    try:
        import torch  # noqa: F401

        from ..runtime import trainer  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
