"""The controller of a run: an explicit state machine in a Ray actor, off the step path.

    created -> starting -> forming -> running -> finished
                  |         |   ^      | |-----> stopping -> stopped
                  |         |   |      v
                  |         |   +-- recovering
                  +---------+----------+---------> failed

It sends rare commands, takes in what workers push, and is the one writer of the run's record. What a failure
means is decided by `faulttol.verdict`, what to do about it by `faulttol.remedy`; this file carries it out.
"""

import enum
import itertools
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ..faulttol.remedy import Fault, Remedy, Replace, Shrink, Stop, remedy_for
from ..faulttol.verdict import Failure, Verdict, decide
from ..runtime.config import check_config
from ..runtime.plan import RunPlan, make_run_plan
from .crew import Crew
from .fleet import FleetError, Interrupted, StartGivenUp
from .home import Home
from .record import Record
from .recovery import fault_of, hopeless, legal_of, remedy_fields

OTHERS_SPEAK_S = 3.0  # after a first failure of a run that ends: how long other ranks may take to tell theirs
CAUSE_S = 1.0  # a run that goes on waits no longer: a death is seen within 0.1 s, a stop after 0.5 s
ALIKE_S = 0.3  # an error of the user's may come on all ranks at once: no rank is to blame then
LOOK_EVERY_S = 0.1  # between looks at what vaults have noticed
UPKEEP_EVERY_S = 1.0  # between looks at spares, and at what rank 0 is doing


class State(enum.Enum):
    """Where a run is."""

    CREATED = "created"
    STARTING = "starting"
    FORMING = "forming"
    RUNNING = "running"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.FORMING, State.STOPPED, State.FAILED}),
    State.FORMING: frozenset({State.RUNNING, State.RECOVERING, State.STOPPED, State.FAILED}),
    State.RUNNING: frozenset({State.RECOVERING, State.STOPPING, State.FINISHED, State.STOPPED, State.FAILED}),
    State.RECOVERING: frozenset({State.RECOVERING, State.FORMING, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.RECOVERING, State.FINISHED, State.STOPPED, State.FAILED}),
    State.FINISHED: frozenset(),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


class Controller:
    """Runs one plan. `run` lasts as long as the run; the other methods are answered beside it."""

    def __init__(self, plan: dict[str, Any], home: Home, session: str) -> None:
        """`session` names the embedded session of the command, "" in a joined cluster."""
        home.enter()
        config = check_config(plan)
        self._plan: RunPlan = make_run_plan(config, cpus=1, gpus=int(config.run.device == "cuda"))
        self._state = State.CREATED
        self._stop = threading.Event()
        self._record = Record(Path(config.run_dir), config.run.name)
        self._phase = ""
        self._history: list[Fault] = []
        self._begun = time.monotonic()
        self._crew = Crew(self._plan, home, ray.get_runtime_context().current_actor, session=session)

    def run(self) -> dict[str, Any]:
        """Start the workers, train, and return the summary that was written."""
        self._record.event("run_started", attempt=self._record.attempt, layout=str(self._plan.layout))
        try:
            self._go(State.STARTING)
            self._crew.start(self._stop.is_set)
            self._go(State.FORMING)
            self._form(self._stop.is_set)
            if self._stop.is_set():
                return self._finish(State.STOPPED)
            while True:
                self._go(State.RUNNING)
                end = self._train()
                if isinstance(end, State):
                    return self._finish(end)
                verdict = self._grow(end) if isinstance(end, Shrink) else self._recover(end)
                if verdict is not None:
                    return self._finish(State.FAILED, verdict)
        except StartGivenUp:
            return self._finish(State.STOPPED)
        except (FleetError, Interrupted) as error:
            verdict = Verdict(sentence=str(error), ranks=[], cls="start", step=0, evidence={})
            return self._finish(State.FAILED, verdict)
        finally:
            self._crew.close()
            self._record.close()

    @ray.method(concurrency_group="record")
    def record(self, lines: list[tuple[str, dict[str, Any]]], epoch: int) -> bool:
        """Write down what a worker tells, in its order; False, and nothing, if its epoch is over."""
        return self._record.take_in(lines, epoch)

    @ray.method(concurrency_group="control")
    def view(self, since: int) -> dict[str, Any]:
        """State, phase and the news after number `since`; the one who watches has seen those before it."""
        return {"state": self._state.value, "phase": self._phase, "news": self._record.news(since)}

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask for a clean stop: after the step the ranks are in, with a checkpoint."""
        self._stop.set()

    @ray.method(concurrency_group="control")
    def notice(self, notice: Any) -> None:
        """Take in what a vault has seen of a process."""
        self._crew.tell(notice)

    @ray.method(concurrency_group="control")
    def answers(self) -> bool:
        """That it is there."""
        return True

    def _form(self, given_up: Callable[[], bool] = lambda: False) -> None:
        formed = self._crew.form(given_up, self._crew.noticed_any)
        self._record.begin_epoch(self._crew.epoch, formed, came_unix=self._crew.last_well_unix())

    def _train(self) -> State | list[Failure] | Shrink:
        """Let the ranks train; how the run ended, the first failures, or how it can be whole again."""
        self._crew.train(recorded=self._record.last_step)
        statuses: set[str] = set()
        upkeep_at, stopping = time.monotonic(), False
        while self._crew.training:
            ends = self._crew.ends(lambda: self._record.step + 1, timeout_s=LOOK_EVERY_S)
            if failures := [end for end in ends if isinstance(end, Failure)]:
                return failures
            statuses |= {end["outcome"]["status"] for end in ends if not isinstance(end, Failure)}
            if self._stop.is_set() and not stopping:
                stopping = True
                self._go(State.STOPPING)
                self._crew.stop()
            if time.monotonic() - upkeep_at > UPKEEP_EVERY_S:
                upkeep_at = time.monotonic()
                self._look_after()
                if (
                    not stopping
                    and not self._record.recovering
                    and (growth := self._crew.whole_again()) is not None
                ):
                    return growth
        return State.STOPPED if "stopped" in statuses else State.FINISHED

    def _look_after(self) -> None:
        if (phase := self._crew.phase()) is not None:
            self._phase = phase
        if self._crew.recovers and not self._record.recovering:
            # not before: a new spare's start would slow a recovery down
            for pid in self._crew.keep_up():
                message = f"the spare process {pid} died; another one takes its place"
                self._record.event("fault", **{"class": "spare", "message": message})

    def _recover(self, failures: list[Failure]) -> Verdict | None:
        """Form the ranks anew around those that are lost; a verdict when the run cannot go on."""
        for number in itertools.count(1):
            self._go(State.RECOVERING)
            self._record.begin_recovery(min(failure.time_unix for failure in failures))
            failures = self._hear(failures)
            verdict, fault, remedy = self._judge(failures, number)
            if isinstance(remedy, Stop):
                return verdict
            self._record.end_phase("decide")
            lost = fault.ranks if fault.kind != "exception" else ()
            late = self._begin_epoch(remedy, lost)
            if not late:
                return None
            failures = late if self._state is State.FORMING else [*failures, *late]
        raise AssertionError("the policy bounds the rounds")

    def _begin_epoch(self, remedy: Replace | Shrink, lost: Collection[int]) -> list[Failure]:
        """End the present epoch and form the next as `remedy` says; what was lost meanwhile, which is why it
        is not formed.
        """
        self._crew.fence_off()
        self._record.fenced_unix = time.time()
        late = self._crew.break_off(lost, step_s=self._record.step_s, step=self._record.step + 1)
        self._record.end_epoch()
        self._record.end_phase("fence")
        if late:
            return late
        self._crew.carry_out(remedy, lost=lost)
        self._go(State.FORMING)
        try:
            self._form()
        except Interrupted:
            return self._who_is_lost()
        return []

    def _grow(self, remedy: Shrink) -> Verdict | None:
        """Go on with as many ranks as at the start, since the missing ones are here; a verdict when that, and
        the recovery from it, came to nothing.
        """
        self._go(State.RECOVERING)
        self._record.begin_recovery(time.time())
        before, after = self._crew.plan.layout, remedy.layout
        sentence = f"{after.world_size} processes are here again, so the run goes on as it was begun"
        fields = {"sentence": sentence, "layout": str(after), "before": str(before)}
        self._record.event("resized", world_size=after.world_size, **fields)
        late = self._begin_epoch(remedy, ())
        return self._recover(late) if late else None

    def _hear(self, failures: list[Failure]) -> list[Failure]:
        """Hear the other ranks for a moment: the first to be heard need not be the first to have failed."""
        heard = list(failures)
        deadline = time.monotonic() + (CAUSE_S if self._crew.recovers else OTHERS_SPEAK_S)
        while self._crew.training and time.monotonic() < deadline:
            if self._crew.recovers and (causes := [one for one in heard if not one.lost_peer]):
                seen = any(one.kind in ("died", "stopped") for one in causes)
                deadline = min(deadline, time.monotonic() + (0.0 if seen else ALIKE_S))
            wait_s = min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic()))
            heard += self._failures(wait_s)
        return heard

    def _failures(self, timeout_s: float) -> list[Failure]:
        ends = self._crew.ends(lambda: self._record.step + 1, timeout_s=timeout_s)
        return [end for end in ends if isinstance(end, Failure)]

    def _judge(self, failures: list[Failure], number: int) -> tuple[Verdict, Fault, Remedy]:
        """What happened and what to do, both written down."""
        crew = self._crew
        missing = {}
        if all(failure.lost_peer for failure in failures):
            missing = {rank: crew.answers(rank) for rank in crew.training}
        verdict = decide(failures, missing=missing)
        uptime_s = time.monotonic() - self._begun
        fault = fault_of(verdict, failures, nodes=crew.nodes, lost_nodes=crew.lost_nodes, uptime_s=uptime_s)
        if not crew.recovers:
            self._record.event("verdict", **verdict.as_event())
            return verdict, fault, Stop(sentence="snapshot.enabled = false")
        plan, spares = crew.plan, crew.spares()
        remedy = hopeless(verdict, fault, world_size=plan.layout.world_size) or remedy_for(
            fault, self._history, layout=plan.layout, spares=spares, legal=legal_of(plan), round=number
        )
        self._history.append(fault)
        if isinstance(remedy, Stop) and fault.kind != "exception":
            verdict = replace(verdict, sentence=f"{verdict.sentence}; {remedy.sentence}")
        self._record.event("verdict", **verdict.as_event())
        self._record.event("remedy", **remedy_fields(remedy, crew.spare_pids()))
        return verdict, fault, remedy

    def _who_is_lost(self) -> list[Failure]:
        """The ranks that were lost while all were forming. Raises FleetError when none is."""
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline:
            if found := self._failures(0.0):
                return found
            time.sleep(LOOK_EVERY_S / 2)
        silent = [rank for rank in range(self._crew.plan.layout.world_size) if not self._crew.answers(rank)]
        if not silent:
            raise FleetError("the ranks could not find each other again, and none of them is lost")
        told = "its process does not answer"
        return [Failure(rank, self._record.step + 1, "stopped", told, time.time()) for rank in silent]

    def _finish(self, state: State, verdict: Verdict | None = None) -> dict[str, Any]:
        self._go(state)
        layout = self._crew.plan.layout
        extra: dict[str, Any] = {"world_size": layout.world_size, "layout": str(layout)}
        if verdict is not None:
            extra |= {"verdict": verdict.sentence}
        return self._record.finish(state.value, **extra)

    def _go(self, state: State) -> None:
        allowed = TRANSITIONS[self._state]
        assert state in allowed, f"a run that is {self._state.value} cannot become {state.value}"
        self._state = state
        self._phase = state.value
