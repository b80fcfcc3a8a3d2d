"""Form the ranks of a run anew: around those that are lost, of the same ones, or of more.

What a failure means is decided by `faulttol.verdict`, what to do about it by `faulttol.remedy`; here it is
carried out, and written down before.
"""

import itertools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from ..faulttol.remedy import Fault, Remedy, Replace, Shrink, Stop, remedy_for, what_happened
from ..faulttol.verdict import Failure, Verdict, decide
from .crew import Crew
from .fleet import FleetError, Interrupted
from .notice import Leaving
from .record import Record
from .recovery import fault_of, hopeless, legal_of, remedy_fields
from .states import State

OTHERS_SPEAK_S = 3.0  # after a first failure of a run that ends: how long other ranks may take to tell theirs
CAUSE_S = 1.0  # a run that goes on waits no longer: a death is seen within 0.1 s, a stop after 0.5 s
TOGETHER_S = 0.02  # ranks that are killed at once are seen within one look of each other
ALIKE_S = 0.3  # an error of the user's may come on all ranks at once: no rank is to blame then
LOOK_EVERY_S = 0.1  # between looks at what vaults have noticed


@dataclass(frozen=True)
class Move:
    """Ranks that get other processes before theirs are lost."""

    remedy: Replace | Shrink
    ranks: tuple[int, ...]


class Mending:
    """Brings a run from one epoch to the next."""

    def __init__(self, crew: Crew, record: Record, go: Callable[[State], None]) -> None:
        """`go` changes the state of the run, and writes down what another controller would go on from."""
        self.history: list[Fault] = []
        self.begun_unix = time.time()  # of the run
        self._crew = crew
        self._record = record
        self._go = go
        self._carried_out = False  # the last remedy

    def form(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Let the ranks find each other, and hear them. Raises as `Crew.form` does."""
        formed = self._crew.form(given_up, self._crew.noticed_any)
        self._record.begin_epoch(self._crew.epoch, formed, came_unix=self._crew.last_well_unix())

    def recover(self, failures: list[Failure]) -> Verdict | None:
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
            late = self.begin_epoch(remedy, lost)
            if not late:
                return None
            failures = late if self._carried_out else [*failures, *late]
        raise AssertionError("the policy bounds the rounds")

    def begin_epoch(
        self, remedy: Replace | Shrink | None, lost: Collection[int], *, leaving: Collection[int] = ()
    ) -> list[Failure]:
        """End the present epoch and form the next as `remedy` says, or of the same ranks; what was lost
        meanwhile, which is why it is not formed. `leaving` are ranks that live and are ended in between.
        """
        self._carried_out = False
        self._crew.fence_off()
        self._record.fenced_unix = time.time()
        late = self._crew.break_off(lost, step_s=self._record.step_s, step=self._record.step + 1)
        self._record.end_epoch()
        self._record.end_phase("fence")
        if late:
            return late
        self._crew.end(leaving)
        if remedy is not None:
            self._crew.carry_out(remedy, lost=(*lost, *leaving))
        self._carried_out = True
        self._go(State.FORMING)
        try:
            self.form()
        except Interrupted:
            return self._who_is_lost()
        return []

    def grow(self, remedy: Shrink) -> Verdict | None:
        """Go on with as many ranks as at the start, since the missing ones are here; a verdict when that, and
        the recovery from it, came to nothing.
        """
        self._go(State.RECOVERING)
        self._crew.halt(step_s=self._record.step_s)
        self._record.begin_recovery(time.time())
        before, after = self._crew.plan.layout, remedy.layout
        sentence = f"{after.world_size} processes are here again, so the run goes on as it was begun"
        fields = {"sentence": sentence, "layout": str(after), "before": str(before)}
        self._record.event("resized", world_size=after.world_size, **fields)
        late = self.begin_epoch(remedy, ())
        return self.recover(late) if late else None

    def about(self, leaving: Leaving) -> Move | Stop:
        """What to do about ranks that have notice to leave, written down."""
        crew, step = self._crew, self._record.step + 1
        node, homes = crew.nodes[leaving.ranks[0]] if leaving.node else "", dict(enumerate(crew.nodes))
        at = time.time() - self.begun_unix
        fault = Fault(kind="preempted", ranks=leaving.ranks, step=step, node=node, homes=homes, time_s=at)
        plan = crew.plan
        remedy: Remedy = Stop(sentence=f"{what_happened(fault)}; snapshot.enabled = false")
        if crew.recovers:
            remedy = remedy_for(
                fault, self.history, layout=plan.layout, spares=crew.reserve.ready(), legal=legal_of(plan)
            )
        ranks, sentence = list(leaving.ranks), remedy.sentence
        fields = {"node": leaving.node, "deadline_unix": leaving.deadline_unix, "sentence": sentence}
        self._record.event("preempted", ranks=ranks, **fields)
        self._record.event("remedy", **remedy_fields(remedy, crew.reserve.pids()))
        return remedy if isinstance(remedy, Stop) else Move(remedy, leaving.ranks)

    def move(self, move: Move) -> Verdict | None:
        """Give ranks other processes at a step boundary; a verdict when the recovery from that failed."""
        self._go(State.RECOVERING)
        self._crew.halt(step_s=self._record.step_s)
        self._record.begin_recovery(time.time())
        late = self.begin_epoch(move.remedy, (), leaving=move.ranks)
        return self.recover(late) if late else None

    def _hear(self, failures: list[Failure]) -> list[Failure]:
        """Hear the other ranks for a moment: the first to be heard need not be the first to have failed."""
        heard = list(failures)
        deadline = time.monotonic() + (CAUSE_S if self._crew.recovers else OTHERS_SPEAK_S)
        while self._crew.training and (time.monotonic() < deadline or self._crew.in_doubt):
            if self._crew.recovers and (causes := [one for one in heard if not one.lost_peer]):
                seen = any(one.kind in ("died", "stopped", "stuck") for one in causes)
                deadline = min(deadline, time.monotonic() + (TOGETHER_S if seen else ALIKE_S))
            left_s = deadline - time.monotonic()
            wait_s = LOOK_EVERY_S if self._crew.in_doubt else max(0.0, min(LOOK_EVERY_S, left_s))
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
        uptime_s = time.time() - self.begun_unix
        fault = fault_of(verdict, failures, nodes=crew.nodes, lost_nodes=crew.lost_nodes, uptime_s=uptime_s)
        if not crew.recovers:
            self._record.event("verdict", **verdict.as_event())
            return verdict, fault, Stop(sentence="snapshot.enabled = false")
        plan = crew.plan
        remedy: Remedy | None = hopeless(verdict, fault, world_size=plan.layout.world_size)
        if remedy is None:
            nobody = len(fault.ranks) == plan.layout.world_size and fault.kind != "exception"
            spares = crew.reserve.ready()
            if nobody and not spares:
                timeout_s = plan.config.run.start_timeout_s
                spares = crew.reserve.start_anew(plan.layout.world_size, timeout_s=timeout_s)
            remedy = remedy_for(
                fault, self.history, layout=plan.layout, spares=spares, legal=legal_of(plan), round=number
            )
        self.history.append(fault)
        if isinstance(remedy, Stop) and fault.kind != "exception":
            verdict = replace(verdict, sentence=f"{verdict.sentence}; {remedy.sentence}")
        self._record.event("verdict", **verdict.as_event())
        self._record.event("remedy", **remedy_fields(remedy, crew.reserve.pids()))
        return verdict, fault, remedy

    def _who_is_lost(self) -> list[Failure]:
        """The ranks that were lost while all were forming. Raises FleetError when none is."""
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline or self._crew.in_doubt:
            if found := self._failures(0.0):
                return found
            time.sleep(LOOK_EVERY_S / 2)
        silent = [rank for rank in range(self._crew.plan.layout.world_size) if not self._crew.answers(rank)]
        if not silent:
            raise FleetError("the ranks could not find each other again, and none of them is lost")
        told = "its process does not answer"
        return [Failure(rank, self._record.step + 1, "stopped", told, time.time()) for rank in silent]
