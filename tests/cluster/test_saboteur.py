"""What a saboteur does to the thread that trains: threads and processes, no Ray."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import wait_until

from rayfold.cluster.saboteur import FROM_WITHIN, Saboteur, signal_for
from rayfold.cluster.strikes import catches, name_of
from rayfold.faulttol.campaign import Injection
from rayfold.faulttol.verdict import failure_of

SOON_S = 10.0


class Trains:
    """A thread that goes on until something is raised in it."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self.steps = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ident(self) -> int | None:
        """The thread."""
        return self._thread.ident

    def _run(self) -> None:
        try:
            while True:
                self.steps += 1
                time.sleep(0.001)
        except BaseException as error:
            self.raised = error


@pytest.mark.parametrize(
    ("kind", "said", "out_of_memory"),
    [
        ("exception", "raised on purpose by a chaos campaign", False),
        ("oom", "MemoryError()", True),
    ],
)
def test_an_exception_comes_up_in_the_thread_that_trains(
    kind: Injection, said: str, out_of_memory: bool
) -> None:
    """Not in the one that was told to raise it; and it reads as what it stands for."""
    trains = Trains()
    Saboteur(trains.ident).signals()[signal_for(kind)]()
    wait_until(lambda: trains.raised, SOON_S, "the exception")
    assert trains.raised is not None
    failure = failure_of(trains.raised, rank=1, step=3, time_unix=0.0)
    assert (failure.message, failure.out_of_memory, failure.lost_peer) == (said, out_of_memory, False)


def test_nothing_is_raised_before_the_thread_is_in_a_step() -> None:
    """An exception in between two epochs would be another fault than the one that was asked for."""
    trains, looks = Trains(), iter([None, None])
    found: Callable[[], int | None] = lambda: next(looks, trains.ident())  # noqa: E731
    Saboteur(found).signals()[signal_for("exception")]()
    assert next(looks, "none") == "none", "it was waited for"
    wait_until(lambda: trains.raised, SOON_S, "the exception")


STUCK = """
import signal, sys, threading, time
from rayfold.cluster.saboteur import Saboteur
from rayfold.cluster.signals import hear

def train():
    for step in range(100000):
        print(step, flush=True)
        time.sleep(0.01)

thread = threading.Thread(target=train)
hear(Saboteur(lambda: thread.ident).signals())
thread.start()
while thread.is_alive():
    time.sleep(0.1)
    print("the first thread goes on", flush=True)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("draw", "others_go_on"), [(0, True), (1, False)])
def test_a_stuck_process_lives_and_trains_no_further(tmp_path: Path, draw: int, others_go_on: bool) -> None:
    """In a loop its other threads still run; in native code that keeps the interpreter nobody does."""
    out = tmp_path / "out"
    with open(out, "w") as file:
        process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=file)
    try:
        wait_until(lambda: "3" in out.read_text(), SOON_S, "its first steps")
        number = signal_for("stuck", draw)
        assert catches(process.pid, number)
        process.send_signal(number)
        quiet_since = time.monotonic()
        steps = -1
        while time.monotonic() - quiet_since < 0.7:
            told = [line for line in out.read_text().splitlines() if line.isdigit()]
            if len(told) != steps:
                steps, quiet_since = len(told), time.monotonic()
            assert steps < 1000, "it trains on"
            time.sleep(0.05)
        before = out.read_text().count("goes on")
        time.sleep(0.7)
        assert (out.read_text().count("goes on") > before) is others_go_on
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(SOON_S)


def test_each_kind_has_a_signal_of_its_own_which_nobody_else_takes() -> None:
    """A process that does not expect it would be ended by it, so it is asked first whether it does."""
    numbers = {signal_for(kind, draw) for kind in FROM_WITHIN for draw in range(2)}
    assert len(numbers) == 4
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not any(catches(sleeper.pid, number) for number in numbers)
        assert {name_of(number) for number in numbers} == {f"SIGRTMIN+{n}" for n in (10, 11, 12, 13)}
        assert name_of(signal.SIGTERM) == "SIGTERM"
    finally:
        sleeper.kill()
        sleeper.wait(SOON_S)
    assert not catches(sleeper.pid, signal.SIGTERM), "it is gone"
