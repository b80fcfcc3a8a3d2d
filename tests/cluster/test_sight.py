"""Where a thread and a process are, seen from another one: the real frames and the kernel's own figures."""

import subprocess
import sys
import threading
import time

import pytest

from rayfold.cluster.sight import sight
from rayfold.cluster.watch import seen_of, watching_works
from rayfold.faulttol.stuck import doing, place

pytestmark = pytest.mark.skipif(not watching_works(), reason="needs /proc")
SOON_S = 10.0  # a busy machine


class Sleeper:
    """A thread that sleeps in a function of this file until it is woken."""

    def __init__(self) -> None:
        self.ids = (0, 0)
        self._ready, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self.forward)
        self._thread.start()
        assert self._ready.wait(SOON_S)

    def forward(self) -> None:
        self.ids = threading.get_ident(), threading.get_native_id()
        self._ready.set()
        while not self._woken.is_set():
            time.sleep(0.05)

    def close(self) -> None:
        self._woken.set()
        self._thread.join(SOON_S)


def test_a_thread_that_sleeps_is_seen_at_its_line() -> None:
    """By another thread of its process, without its help."""
    sleeper = Sleeper()
    try:
        time.sleep(0.1)
        first = sight(*sleeper.ids, step=7, phase="training")
        time.sleep(0.3)
        second = sight(*sleeper.ids, step=7, phase="training")
    finally:
        sleeper.close()
    at = place(second.frames)
    assert at is not None
    assert str(at).startswith("test_sight.py:")
    assert at.function == "forward"
    assert doing(second.frames, second.pending) == "computes"
    assert (second.step, second.phase) == (7, "training")
    assert second.cpu_s - first.cpu_s < 0.1


@pytest.mark.parametrize(("code", "state"), [("time.sleep(60)", "S"), ("while True: pass", "R")])
def test_a_process_that_sleeps_differs_from_one_that_loops(code: str, state: str) -> None:
    """In what it wants of the processors, and what it has had of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time; print(1, flush=True)\n{code}"], stdout=-1
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        first = seen_of(process.pid)
        time.sleep(0.5)
        second = seen_of(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert (first.state, second.state) == (state, state)
    assert (second.cpu_s > first.cpu_s) == (state == "R")
    assert seen_of(process.pid).state == ""
