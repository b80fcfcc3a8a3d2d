"""The course of a run: an explicit state machine (`states.py`), off the step path.

It sends rare commands and looks on while the ranks train; what it does when one of them is lost stands in
`mending.py`. What another controller would have to know is in the ledger before anyone is told anything, so
that it can take over at any point.
"""

import json
import threading
import time
from dataclasses import asdict
from typing import Any

from ..faulttol.remedy import Fault, Shrink
from ..faulttol.verdict import Failure, Verdict
from ..runtime.journal import SUMMARY
from ..runtime.plan import RunPlan
from .coldstart import Former
from .crew import GONE, Crew
from .fleet import FleetError, Interrupted, StartGivenUp
from .ledger import Ledger
from .mending import Mending, Move
from .notice import Asked, Unmanaged
from .record import Record
from .states import BEFORE_THE_RANKS, ENDS, TRANSITIONS, WITH_AN_EPOCH, State
from .stuck import Lookout
from .watch import Notice

LOOK_EVERY_S = 0.1  # between looks at what vaults have noticed
UPKEEP_EVERY_S = 1.0  # between looks at spares, and at what rank 0 is doing
MOST_LIVES = 5  # of a controller in that time: one that is lost more often is lost to something of its own
LIVES_WITHIN_S = 600.0


class Course:
    """Runs one plan; `run` lasts as long as the run, or as its controller lives."""

    def __init__(self, plan: RunPlan, *, crew: Crew, record: Record, ledger: Ledger) -> None:
        self.state = State.CREATED
        self.phase = ""  # for whoever watches
        self._plan = plan
        self._crew = crew
        self._record = record
        self._ledger = ledger
        self._stop = threading.Event()
        self._mending = Mending(crew, record, self._go)
        self._reached = 0  # the last step of ranks that have ended
        self._parting = ""  # why it was stopped, if not by the user
        self._lives = [time.time()]  # when each controller of this run began

    def run(self) -> dict[str, Any]:
        """Start the workers, or take those over that a lost controller left; train, and return the summary
        that was written.
        """
        try:
            verdict = self._begin()
            while verdict is None and self.state not in ENDS:
                self._go(State.RUNNING)
                end = self._train()
                if isinstance(end, State):
                    return self._come_to_an_end(end)
                verdict = self._mend(end)
            if verdict is None:
                return self._summary()
            if self._crew.recovers:
                self._crew.rescue()
            return self._finish(State.FAILED, verdict)
        except StartGivenUp:
            return self._finish(State.STOPPED)
        except (FleetError, Interrupted) as error:
            verdict = Verdict(sentence=str(error), ranks=[], cls="start", step=0, evidence={})
            return self._finish(State.FAILED, verdict)
        finally:
            self._crew.close()
            self._record.close()

    def ask_to_stop(self) -> None:
        """Stop cleanly: after the step the ranks are in, with a checkpoint."""
        self._stop.set()

    def tell(self, notice: Notice | Asked | Unmanaged) -> None:
        """Take in what a vault has seen of a process, or that one was asked to leave; called by another
        thread.
        """
        self._crew.tell(notice)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop.is_set()

    def _begin(self) -> Verdict | None:
        """Ranks that have formed, unless the run has an end; the verdict of one that cannot go on."""
        self._crew.inherit(Former.found_in(self._ledger, self._plan.config))
        if (left := self._ledger.read()) is not None:
            was = State(left["state"])
            if was in ENDS:
                self.state = was
                return None
            self._lives = [*left["lives"], time.time()]
            self._mending.begun_unix = left["begun_unix"]
            self._mending.history = [_fault(values) for values in left["history"]]
            self._ledger.write(left | {"lives": self._lives})  # before anything can go wrong again
            if was not in BEFORE_THE_RANKS:
                return self._take_over(was, left["crew"])
        if not self._record.told_any:
            layout = str(self._crew.plan.layout)
            self._record.event("run_started", attempt=self._record.attempt, layout=layout)
        if (verdict := self._lost_too_often()) is not None:
            return verdict
        self._go(State.STARTING)
        self._crew.start(self._stop.is_set)
        for message in self._crew.come_into_memory(recorded=self._record.last_step):
            self._record.event("snapshot", message=message)
        self._go(State.FORMING)
        self._mending.form(self._stop.is_set)
        if self._stop.is_set():
            self._finish(State.STOPPED)
        return None

    def _take_over(self, was: State, crew: dict[str, Any]) -> Verdict | None:
        """Go on with the ranks of a controller that was lost when the run was in state `was`."""
        gone = self._crew.take_over(crew, in_epoch=was in WITH_AN_EPOCH)
        message = "the process of the controller was lost and another goes on; the ranks trained meanwhile"
        self._record.event("fault", **{"class": "controller", "message": message})
        if (verdict := self._lost_too_often()) is not None:
            return verdict
        if was is State.STOPPING:
            self._stop.set()
        if gone:
            step, at = self._record.step + 1, time.time()
            return self._mending.recover([Failure(rank, step, "died", GONE, at) for rank in gone])
        if was in WITH_AN_EPOCH and self._crew.settled():
            return None
        self._go(State.RECOVERING)
        self._record.begin_recovery(time.time())
        late = self._mending.begin_epoch(None, ())
        return self._mending.recover(late) if late else None

    def _lost_too_often(self) -> Verdict | None:
        since = self._lives[-1] - LIVES_WITHIN_S
        if (lives := sum(begun >= since for begun in self._lives)) <= MOST_LIVES:
            return None
        step = self._record.step
        sentence = (
            f"the controller of the run was lost {lives - 1} times in {LIVES_WITHIN_S / 60:.0f} minutes, the "
            f"last time after step {step}; the last durable checkpoint stands, and the same command goes on "
            "from it"
        )
        return Verdict(sentence=sentence, ranks=[], cls="controller", step=step, evidence={})

    def _mend(self, end: list[Failure] | Shrink | Move) -> Verdict | None:
        """Form the ranks anew after their training ended so; a verdict when the run cannot go on."""
        match end:
            case Shrink():
                return self._mending.grow(end)
            case Move():
                return self._mending.move(end)
        return self._mending.recover(end)

    def _train(self) -> State | list[Failure] | Shrink | Move:
        """Let the ranks train; how the run ended, the first failures, or how other processes can go on."""
        self._crew.train(recorded=self._record.last_step)
        statuses: set[str] = set()
        upkeep_at, stopping = time.monotonic(), False
        lookout = Lookout(self._crew, self._record)
        while self._crew.training:
            ends = self._crew.ends(lambda: self._record.step + 1, timeout_s=LOOK_EVERY_S)
            if failures := [end for end in ends if isinstance(end, Failure)]:
                return failures
            for end in ends:
                if not isinstance(end, Failure):
                    statuses.add(end["outcome"]["status"])
                    self._reached = max(self._reached, end["outcome"]["step"])
            if stuck := lookout.stuck():
                return stuck
            if self._stop.is_set() and not stopping:
                stopping = True
                self._go(State.STOPPING)
                self._crew.stop()
            due = time.monotonic() - upkeep_at > UPKEEP_EVERY_S
            if due:
                upkeep_at = time.monotonic()
                self._look_after()
            elif self._crew.reserve.is_short(self._crew.missing):
                self._keep_up()
            may_change = (due or self._crew.reserve.asked) and not stopping and not self._record.recovering
            if may_change and (change := self._change()) is not None:
                return change
        return State.STOPPED if "stopped" in statuses else State.FINISHED

    def _change(self) -> Shrink | Move | None:
        """How the run should go on otherwise than it does, though no rank is lost."""
        if (leaving := self._crew.reserve.leaving()) is not None:
            remedy = self._mending.about(leaving)
            if isinstance(remedy, Move):
                return remedy
            self._parting = remedy.sentence
            self._stop.set()
            return None
        return self._crew.whole_again()

    def _look_after(self) -> None:
        if (phase := self._crew.phase()) is not None:
            self.phase = phase
        self._tell_protection()
        self._keep_up()

    def _keep_up(self) -> None:
        if not self._crew.recovers or self._record.recovering:
            return  # a new spare's start would slow a recovery down
        for pid in self._crew.reserve.keep_up(self._crew.missing):
            message = f"the spare process {pid} died; another one takes its place"
            self._record.event("fault", **{"class": "spare", "message": message})
        self._record.spares(self._crew.reserve.pids().values())

    def _tell_protection(self) -> None:
        for news in self._crew.protection_news():
            self._record.event("snapshot", **news)

    def _come_to_an_end(self, state: State) -> dict[str, Any]:
        """Have the last step on disk, without which a run has not ended well; the summary."""
        if not self._crew.recovers:  # its ranks have written it
            return self._finish(state)
        self.phase = "writing the last checkpoint"
        if not self._reached or (problem := self._crew.make_durable(self._reached)) is None:
            return self._finish(state)
        sentence = f"the last checkpoint could not be written: {problem}; the one before still stands"
        verdict = Verdict(sentence=sentence, ranks=[], cls="disk", step=self._reached, evidence={})
        return self._finish(State.FAILED, verdict)

    def _finish(self, state: State, verdict: Verdict | None = None) -> dict[str, Any]:
        self._go(state)
        layout = self._crew.plan.layout
        extra: dict[str, Any] = {"world_size": layout.world_size, "layout": str(layout)}
        if verdict is not None or self._parting:
            extra |= {"verdict": verdict.sentence if verdict is not None else self._parting}
        self._tell_protection()
        if self._crew.node_safe_step is not None:
            extra |= {"node_safe_step": self._crew.node_safe_step}
        summary = self._record.finish(state.value, **extra)
        self._write_down()  # not before: one that is started again in between ends the run again
        return summary

    def _summary(self) -> dict[str, Any]:
        """What is written of a run that has ended."""
        path = self._plan.config.run_dir / SUMMARY
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def _go(self, state: State) -> None:
        allowed = TRANSITIONS[self.state]
        assert state in allowed, f"a run that is {self.state.value} cannot become {state.value}"
        self.state = state
        self.phase = state.value
        if state not in ENDS:
            self._write_down()

    def _write_down(self) -> None:
        """What another controller would go on from."""
        self._ledger.write(
            {
                "state": self.state.value,
                "begun_unix": self._mending.begun_unix,
                "lives": self._lives,
                "history": [asdict(fault) for fault in self._mending.history],
                "crew": self._crew.as_values(),
                "memory": self._crew.memory_values(),
            }
        )


def _fault(values: dict[str, Any]) -> Fault:
    """A fault from its plain values; JSON knows neither tuples nor numbers as keys."""
    homes = {int(rank): node for rank, node in values["homes"].items()}
    return Fault(**values | {"ranks": tuple(values["ranks"]), "homes": homes})
