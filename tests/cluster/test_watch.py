"""What becomes of a process is seen from outside, within moments and once."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from rayfold.cluster import watch as watching
from rayfold.cluster.watch import STOPPED_AFTER_S, Notice, Watch, exit_status, state_of, watching_works

pytestmark = pytest.mark.skipif(not watching_works(), reason="needs /proc")
SOON_S = 5.0  # a busy machine; idle it is a twentieth of a second


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def told() -> Iterator[tuple[Watch, "queue.Queue[Notice]"]]:
    """A watch, and what it tells."""
    notices: queue.Queue[Notice] = queue.Queue()
    watch = Watch(notices.put)
    yield watch, notices
    watch.close()


def test_a_killed_process_is_told_once_with_when_it_was_well(
    sleeper: "subprocess.Popen[bytes]", told: tuple[Watch, "queue.Queue[Notice]"]
) -> None:
    """Its parent has not even waited for it: a zombie is as dead."""
    watch, notices = told
    watch.follow(sleeper.pid)
    time.sleep(0.2)
    killed = time.time()
    sleeper.kill()
    notice = notices.get(timeout=SOON_S)
    assert (notice.pid, notice.what) == (sleeper.pid, "died")
    assert notice.last_well_unix <= time.time()
    assert abs(notice.last_well_unix - killed) < SOON_S
    with pytest.raises(queue.Empty):
        notices.get(timeout=0.2)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs handles on processes")
def test_an_end_is_told_at_once_and_needs_no_look(
    monkeypatch: pytest.MonkeyPatch, sleeper: "subprocess.Popen[bytes]"
) -> None:
    """A run that is down waits for this: the kernel wakes the watch, whenever it would have looked next."""
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 2.0)
    notices: queue.Queue[Notice] = queue.Queue()
    watch = Watch(notices.put)
    watch.follow(os.getpid())  # lives on, and is waited for beside the other
    watch.follow(sleeper.pid)
    sleeper.kill()
    assert notices.get(timeout=1.5).pid == sleeper.pid
    watch.close()


def test_an_end_is_told_where_the_system_has_no_handles(
    monkeypatch: pytest.MonkeyPatch, sleeper: "subprocess.Popen[bytes]"
) -> None:
    """Kernels before 5.3 and their imitations: it is found at the next look."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    notices: queue.Queue[Notice] = queue.Queue()
    watch = Watch(notices.put)
    watch.follow(sleeper.pid)
    sleeper.kill()
    assert notices.get(timeout=SOON_S).what == "died"
    watch.close()


def test_how_a_process_ended_is_known_before_anybody_has_waited_for_it(
    sleeper: "subprocess.Popen[bytes]",
) -> None:
    """Giving its memory back takes a while, and the verdict names the signal."""
    assert exit_status(sleeper.pid) is None
    sleeper.kill()
    deadline = time.monotonic() + SOON_S
    while (status := exit_status(sleeper.pid)) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert status == signal.SIGKILL
    assert state_of(sleeper.pid)[0] in ("X", "Z")
    sleeper.wait()
    assert exit_status(sleeper.pid) is None


def test_a_stopped_process_is_told_only_when_it_stays_so(
    sleeper: "subprocess.Popen[bytes]", told: tuple[Watch, "queue.Queue[Notice]"]
) -> None:
    """A profiler stops a process for a moment; that is nobody's fault."""
    watch, notices = told
    watch.follow(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(STOPPED_AFTER_S / 5)
    os.kill(sleeper.pid, signal.SIGCONT)
    with pytest.raises(queue.Empty):
        notices.get(timeout=2 * STOPPED_AFTER_S)
    os.kill(sleeper.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    notice = notices.get(timeout=SOON_S)
    assert (notice.pid, notice.what) == (sleeper.pid, "stopped")
    assert time.monotonic() - stopped > STOPPED_AFTER_S / 2


def test_a_process_that_is_ended_on_purpose_is_no_news_and_one_that_is_gone_is(
    sleeper: "subprocess.Popen[bytes]", told: tuple[Watch, "queue.Queue[Notice]"]
) -> None:
    """Who ends a process knows of its death; who follows one too late must hear of it."""
    watch, notices = told
    assert watch.end(sleeper.pid) is None, "not watched: it may be anybody's"
    assert sleeper.poll() is None
    watch.follow(sleeper.pid)
    assert watch.end(sleeper.pid) is not None
    assert sleeper.wait(SOON_S) == -signal.SIGKILL
    assert notices.empty()
    watch.follow(sleeper.pid)
    assert notices.get(timeout=SOON_S).what == "died"
