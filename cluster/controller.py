"""The controller of a run: an explicit state machine in a Ray actor, off the step path.

    created -> starting -> forming -> running -> finished
                  |           |          |-----> stopping -> stopped
                  +-----------+----------+-----------------> failed

It sends rare commands, takes in what workers push, and is the one writer of the run's record. What a failure
means is decided by `faulttol.verdict`; this file carries it out.
"""

import enum
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..faulttol.verdict import Failure, Verdict, decide
from ..runtime.config import check_config
from ..runtime.journal import Journal
from ..runtime.plan import RunPlan, make_run_plan
from .deaths import Deaths
from .fleet import Fleet, FleetError, StartGivenUp, form, start_fleet
from .gauges import Gauges
from .home import Home

OTHERS_SPEAK_S = 3.0  # after a first failure: how long the other ranks may take to tell theirs
LOOK_EVERY_S = 1.0  # between looks at what the workers are doing
ANSWER_S = 5.0  # a control thread answers in milliseconds; one that takes this long does not answer


class State(enum.Enum):
    """Where a run is."""

    CREATED = "created"
    STARTING = "starting"
    FORMING = "forming"
    RUNNING = "running"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.FORMING, State.STOPPED, State.FAILED}),
    State.FORMING: frozenset({State.RUNNING, State.STOPPED, State.FAILED}),
    State.RUNNING: frozenset({State.STOPPING, State.FINISHED, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.FINISHED, State.STOPPED, State.FAILED}),
    State.FINISHED: frozenset(),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


class Controller:
    """Runs one plan. `run` lasts as long as the run; `record`, `view` and `stop` are answered beside it."""

    def __init__(self, plan: dict[str, Any], home: Home) -> None:
        home.enter()
        config = check_config(plan)
        self._plan: RunPlan = make_run_plan(config, cpus=1, gpus=int(config.run.device == "cuda"))
        self._home = home
        self._state = State.CREATED
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._journal = Journal(Path(config.run_dir))
        self._gauges = Gauges(config.run.name)
        self._news: list[dict[str, Any]] = []
        self._forgotten = 0  # news before those in the list
        self._deaths: Deaths | None = None
        self._phase = ""
        self._step = 0

    def run(self) -> dict[str, Any]:
        """Start the workers, train, and return the summary that was written."""
        self._event("run_started", attempt=self._journal.attempt, layout=str(self._plan.layout))
        fleet = None
        try:
            self._go(State.STARTING)
            fleet = start_fleet(self._plan, self._home, self._stop.is_set)
            self._go(State.FORMING)
            self._deaths = Deaths(fleet.places, ray.get_runtime_context().get_node_id())
            form(fleet, self._plan, self._stop.is_set)
            self._event("formed", **self._formed(fleet))
            return self._finish(*self._train(fleet))
        except StartGivenUp:
            return self._finish(State.STOPPED)
        except FleetError as error:
            verdict = Verdict(sentence=str(error), ranks=[], cls="start", step=0, evidence={})
            return self._finish(State.FAILED, verdict)
        finally:
            if fleet is not None:
                fleet.end()
            if self._deaths is not None:
                self._deaths.close()
            self._journal.close()

    @ray.method(concurrency_group="record")
    def record(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        """Write down what a worker tells, in its order."""
        with self._lock:
            for what, values in lines:
                if what == "metric":
                    self._step = values["step"]
                    self._gauges.show(values)
                    self._news.append({"metric": self._journal.metric(values)})
                else:
                    self._news.append({"event": self._journal.event(**values)})

    @ray.method(concurrency_group="control")
    def view(self, since: int) -> dict[str, Any]:
        """State, phase and the news after number `since`; the one who watches has seen those before it."""
        with self._lock:
            del self._news[: since - self._forgotten]  # a long run must not fill the memory
            self._forgotten = since
            return {"state": self._state.value, "phase": self._phase, "news": list(self._news)}

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask for a clean stop: after the step the ranks are in, with a checkpoint."""
        self._stop.set()

    def _train(self, fleet: Fleet) -> tuple[State, Verdict | None]:
        if self._stop.is_set():
            return State.STOPPED, None
        self._go(State.RUNNING)
        myself = ray.get_runtime_context().current_actor
        values = self._plan.config.to_dict()
        running = {
            worker.train.remote(rank=rank, plan=values, controller=myself): rank
            for rank, worker in enumerate(fleet.workers)
        }
        statuses: set[str] = set()
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_EVERY_S)
            for ref in done:
                result = self._result(ref, running.pop(ref))
                if isinstance(result, Failure):
                    return State.FAILED, self._judge(fleet, result, running)
                statuses.add(result["status"])
            if self._stop.is_set() and self._state is State.RUNNING:
                self._go(State.STOPPING)
                fleet.stop()
            if not done:
                self._look(fleet)
        return (State.STOPPED if "stopped" in statuses else State.FINISHED), None

    def _result(self, ref: Any, rank: int) -> dict[str, Any] | Failure:
        """The outcome of a rank, or its failure: told by itself, or seen from its death."""
        try:
            result = ray.get(ref)
        except RayActorError as error:
            how = self._deaths.how(rank) if self._deaths else None
            return Failure(
                rank=rank,
                step=self._step + 1,
                kind="died",
                message=how or _death(error),
                time_unix=time.time(),
                traceback=str(error),
            )
        except RayTaskError as error:
            cause = error.cause
            return Failure(
                rank, self._step, type(cause).__name__, str(cause), time.time(), traceback=str(error)
            )
        return Failure(**result["failure"]) if "failure" in result else result["outcome"]

    def _judge(self, fleet: Fleet, first: Failure, running: dict[Any, int]) -> Verdict:
        """Hear the other ranks for a moment, since the first to be heard need not be the first to have
        failed.
        """
        failures = [first]
        done, _ = (
            ray.wait(list(running), num_returns=len(running), timeout=OTHERS_SPEAK_S) if running else ([], [])
        )
        for ref in done:
            if isinstance(result := self._result(ref, running.pop(ref)), Failure):
                failures.append(result)
        missing = {rank: self._answers(fleet.workers[rank]) for rank in running.values()}
        verdict = decide(failures, missing=missing)
        self._event("verdict", **verdict.as_event())
        return verdict

    def _answers(self, worker: Any) -> bool:
        try:
            ray.get(worker.status.remote(), timeout=ANSWER_S)
        except (GetTimeoutError, RayActorError):
            return False
        return True

    def _look(self, fleet: Fleet) -> None:
        """Ask rank 0 what it is doing, for the progress line; training does not wait for the answer."""
        try:
            status = ray.get(fleet.workers[0].status.remote(), timeout=ANSWER_S)
        except (GetTimeoutError, RayActorError):
            return  # its end, or the others' timeout, will tell
        self._phase = status["phase"]

    def _finish(self, state: State, verdict: Verdict | None = None) -> dict[str, Any]:
        self._go(state)
        with self._lock:
            # last event, then the summary that counts it
            self._news.append({"event": self._journal.event("run_finished", self._step, status=state.value)})
            extra: dict[str, Any] = {
                "world_size": self._plan.layout.world_size,
                "layout": str(self._plan.layout),
            }
            if verdict is not None:
                extra |= {"verdict": verdict.sentence}
            return self._journal.summary(state.value, **extra)

    def _formed(self, fleet: Fleet) -> dict[str, Any]:
        return {
            "epoch": 1,
            "world_size": self._plan.layout.world_size,
            "layout": str(self._plan.layout),
            "nodes": [place.node for place in fleet.places],
            "pids": [place.pid for place in fleet.places],
        }

    def _event(self, kind: Any, **fields: Any) -> None:
        with self._lock:
            self._news.append({"event": self._journal.event(kind, self._step, **fields)})

    def _go(self, state: State) -> None:
        allowed = TRANSITIONS[self._state]
        assert state in allowed, f"a run that is {self._state.value} cannot become {state.value}"
        self._state = state
        self._phase = state.value


def _death(error: RayActorError) -> str:
    """Why an actor's process ended, as far as Ray can tell."""
    text = str(error).lower()
    if "memory pressure" in text or "out_of_memory" in text:
        return "its process was killed by Ray, because its machine ran out of memory"
    if "node" in text and ("node has died" in text or "node died" in text or "node is dead" in text):
        return "its machine was lost"
    return "its process ended without a Python error: killed from outside, or crashed in native code"
