"""A worker that starts beside a run gets out of its way, and is itself again when it is up."""

import subprocess
import sys

import pytest

SAY = """
import gc, os, sys, threading
from rayfold.cluster.imports import import_trainer
before = os.getpriority(os.PRIO_PROCESS, 0)
import_trainer(in_background=True)
left = [t for t in threading.enumerate() if t is not threading.main_thread()]
print("rayfold.runtime.trainer" in sys.modules, os.getpriority(os.PRIO_PROCESS, 0) == before, left)
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs priorities of threads")
def test_what_is_imported_in_the_background_leaves_the_process_as_any_other() -> None:
    """Nobody may raise a priority again, so the thread that trains must never have had a low one."""
    told = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, timeout=120)
    assert told.stdout.split("\n")[:2] == ["True True []", "True True"], told.stderr
