"""The state machine of a run, and the queue from a rank to its controller."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import Bench

from rayfold.cluster import outbox as outbox_module
from rayfold.cluster import reaper
from rayfold.cluster.deaths import describe
from rayfold.cluster.interrupts import Interrupts, StoppedAtOnce
from rayfold.cluster.outbox import EpochOver, Outbox
from rayfold.cluster.reaper import session_processes
from rayfold.cluster.session import ray_session
from rayfold.cluster.states import TRANSITIONS, State

EPOCH = 3
ENDS = {State.FINISHED, State.STOPPED, State.FAILED}


def test_every_state_is_reachable_and_only_ends_are_terminal() -> None:
    """A run that can get somewhere it cannot leave, or never arrive at an end, hangs."""
    assert set(TRANSITIONS) == set(State)
    seen, todo = {State.CREATED}, [State.CREATED]
    while todo:
        for state in TRANSITIONS[todo.pop()] - seen:
            seen.add(state)
            todo.append(state)
    assert seen == set(State)
    assert {state for state, allowed in TRANSITIONS.items() if not allowed} == ENDS


@pytest.mark.parametrize("state", [s for s in State if s not in ENDS and s is not State.CREATED])
def test_a_run_that_has_begun_can_fail_and_be_stopped_in_every_state(state: State) -> None:
    """Ctrl-C and a dying worker come at any time."""
    assert TRANSITIONS[state] >= {State.STOPPED, State.FAILED}


@pytest.mark.parametrize(
    ("status", "said"), [(9, "SIGKILL"), (11, "SIGSEGV"), (0x300, "status 3"), (0, "status 0"), (40, "40")]
)
def test_a_wait_status_is_told_in_words(status: int, said: str) -> None:
    """Users know SIGKILL, not 9."""
    assert said in describe(status)


def test_a_second_ctrl_c_is_raised_only_where_nobody_polls_for_it() -> None:
    """Ray answers an exception out of a signal handler with a SystemError, so its callers poll instead."""
    asked = Interrupts()
    asked(2, None)
    with pytest.raises(StoppedAtOnce):
        asked(2, None)
    polled = Interrupts()
    assert polled.poll() is False
    polled(2, None)
    assert polled.poll() is True
    polled(2, None)
    polled(2, None)
    with pytest.raises(StoppedAtOnce):
        polled.poll()


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An embedded Ray as the command has it."""
    bench = Bench(tmp_path_factory.mktemp("outbox"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bench.env.items():
            patch.setenv(name, value)
        with ray_session("local", cpus=1, gpus=0, namespace="test"):
            pass_through = ray.cluster_resources()
            assert pass_through["CPU"] == 1
            yield
    bench.close()


def listener(*, delay_s: float = 0.0, fails: bool = False) -> Any:
    """An actor that takes in what a rank tells, as the controller does."""

    class Listener:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def record(self, lines: list[Any], *, epoch: int, rank: int, number: int) -> bool:
            time.sleep(delay_s)
            if fails:
                raise OSError("No space left on device")
            if epoch == EPOCH:
                self.heard += lines
            return epoch == EPOCH

        def told(self) -> list[Any]:
            return self.heard

    return ray.remote(num_cpus=0)(Listener).remote()


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
def test_what_a_rank_tells_arrives_once_and_in_order_and_flush_waits_for_it() -> None:
    """The record is what tools read; a line lost, doubled or out of order would be a lie."""
    actor = listener(delay_s=0.02)
    outbox = Outbox(actor, rank=0, epoch=EPOCH)
    for step in range(200):
        outbox.metric({"step": step})
        if step % 50 == 0:
            outbox.event("checkpoint", step, seconds=0.0)
            outbox.flush()
            assert ray.get(actor.told.remote())[-1] == (
                "event",
                {"kind": "checkpoint", "step": step, "seconds": 0.0},
            )
    outbox.close()
    steps = [values["step"] for what, values in ray.get(actor.told.remote()) if what == "metric"]
    assert steps == list(range(200))


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
def test_only_rank_zero_tells_metrics() -> None:
    """Every rank has the same global figures; one line a step is the contract."""
    actor = listener()
    outbox = Outbox(actor, rank=3, epoch=EPOCH)
    outbox.metric({"step": 1})
    outbox.event("fault", 1)
    outbox.close()
    assert ray.get(actor.told.remote()) == [("event", {"kind": "fault", "step": 1})]


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("trouble", ["fails", "dies", "is silent"])
def test_a_record_that_cannot_be_written_stops_the_writer_of_checkpoints(
    monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A full disk must not look like a record that is fine; telling itself never waits."""
    monkeypatch.setattr(outbox_module, "FLUSH_TIMEOUT_S", 2.0)
    actor = listener(fails=trouble == "fails", delay_s=30.0 if trouble == "is silent" else 0.0)
    outbox = Outbox(actor, rank=0, epoch=EPOCH)
    if trouble == "dies":
        ray.kill(actor)
    started = time.monotonic()
    outbox.metric({"step": 1})
    assert time.monotonic() - started < 0.1
    with pytest.raises(OSError, match=r"No space left|controller"):
        outbox.flush()
    with pytest.raises(OSError, match=r"No space left|controller"):
        outbox.metric({"step": 2})
    assert time.monotonic() - started < 5.0
    outbox.close()


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
def test_a_rank_of_an_epoch_that_is_over_records_nothing() -> None:
    """A rank that was given up and wakes up again must not write over what its successor tells."""
    actor = listener()
    outbox = Outbox(actor, rank=0, epoch=EPOCH - 1)
    outbox.metric({"step": 1})
    with pytest.raises(EpochOver):
        outbox.flush()
    outbox.close()
    assert ray.get(actor.told.remote()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_told_to_leave_still_tells_what_it_had_and_then_stops(rank: int) -> None:
    """Alone in its run it waits for nobody whose loss could stop it; its finished steps must not be lost."""
    actor = listener()
    outbox = Outbox(actor, rank=rank, epoch=EPOCH)
    outbox.metric({"step": 1})
    outbox.end_epoch()
    with pytest.raises(EpochOver):
        outbox.metric({"step": 2})
    outbox.close()
    assert ray.get(actor.told.remote()) == ([("metric", {"step": 1})] if rank == 0 else [])


def test_memory_of_a_session_that_was_killed_whole_is_given_back_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in /dev/shm takes memory until somebody removes it, and nobody may remove a live run's."""
    monkeypatch.setattr(reaper, "SHARED_MEMORY", str(tmp_path))
    claims = {name: reaper.claim_memory(f"/tmp/{name}") for name in ("dead", "alive", "new")}
    (tmp_path / "rayfold-joined-state").mkdir()
    (tmp_path / "foreign").mkdir()
    for name in ("dead-state", "alive-state", "rayfold-joined-state", "foreign"):
        os.utime(tmp_path / name, (0, 0))
    for name in ("dead", "new"):
        os.close(claims[name])
    reaper.clear_abandoned_memory()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"alive-state", "new-state", "rayfold-joined-state", "foreign"}
    os.close(claims["alive"])


def test_a_session_is_found_by_its_mark_or_by_what_it_writes_and_by_nothing_else(tmp_path: Path) -> None:
    """Ray's agents write their title over their environment; who only reads a log is left alone."""
    session = tmp_path / "session"
    session.mkdir()
    (session / "log").touch()
    assert session_processes(str(session)) == []
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    with open(session / "log", "a") as written, open(session / "log") as read:
        started = [
            subprocess.Popen(wait, env={**os.environ, reaper.MARK: str(session)}),
            subprocess.Popen(wait, stdout=written),
            subprocess.Popen(wait, stdin=read),
            subprocess.Popen(wait, env={**os.environ, reaper.MARK: f"{session}-of-another"}),
        ]
    try:
        assert set(session_processes(str(session))) == {process.pid for process in started[:2]}
    finally:
        for process in started:
            process.kill()
            process.wait()
