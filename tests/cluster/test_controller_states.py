"""The state machine of a run, and the queue from a rank to its controller."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import Bench

from rayfold.cluster import outbox as outbox_module
from rayfold.cluster.controller import TRANSITIONS, State
from rayfold.cluster.deaths import describe
from rayfold.cluster.interrupts import Interrupts, StoppedAtOnce
from rayfold.cluster.outbox import Outbox
from rayfold.cluster.reaper import session_processes
from rayfold.cluster.session import ray_session

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

        def record(self, lines: list[Any]) -> None:
            time.sleep(delay_s)
            if fails:
                raise OSError("No space left on device")
            self.heard += lines

        def told(self) -> list[Any]:
            return self.heard

    return ray.remote(num_cpus=0)(Listener).remote()


@pytest.mark.ray
@pytest.mark.usefixtures("connected")
def test_what_a_rank_tells_arrives_once_and_in_order_and_flush_waits_for_it() -> None:
    """The record is what tools read; a line lost, doubled or out of order would be a lie."""
    actor = listener(delay_s=0.02)
    outbox = Outbox(actor, rank=0)
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
    outbox = Outbox(actor, rank=3)
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
    outbox = Outbox(actor, rank=0)
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


def test_a_session_is_found_by_its_mark_alone(tmp_path: Path) -> None:
    """The reaper must never end a process of somebody else's."""
    assert session_processes(str(tmp_path / "nobody")) == []
