"""Looks for ranks that are alive and make no progress: asks them and the kernel, never on the step path.

As long as steps end nobody is asked anything. `faulttol.pace` says how long a run bears without one, and
`faulttol.stuck` what two looks at all ranks mean; half of that time goes by before the first look.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..faulttol.pace import Pace
from ..faulttol.stuck import Finding, Look, Seen, Told, judge
from ..faulttol.verdict import Failure
from .crew import Crew
from .record import Record

NATIVE = "native code that holds the interpreter"  # where a rank is that answers nobody
ANSWER_S = 1.0  # a control thread answers in milliseconds; two looks give it twice as long


@dataclass
class _Asking:
    """A look under way: answers come one by one."""

    at_s: float
    ranks: dict[Any, int]  # by reference to an answer, of a rank or of the vault beside it
    told: dict[int, Told] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)

    def done(self) -> bool:
        """Take in what has come; whether there is nothing to wait for any more."""
        ready, _ = ray.wait(list(self.ranks), num_returns=len(self.ranks), timeout=0)
        for ref in ready:
            self._take(self.ranks.pop(ref), ref)
        return not self.ranks or time.monotonic() - self.at_s > ANSWER_S

    def look(self) -> Look:
        """What has come by now."""
        return Look(at_s=self.at_s, told=self.told, seen=self.seen)

    def _take(self, rank: int, ref: Any) -> None:
        try:
            value = ray.get(ref, timeout=0)
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            # not silence: its end, or its vault's, is noticed by others
            value = Told(step=0, phase=type(error).__name__)
        if isinstance(value, Told):
            self.told[rank] = value
        elif isinstance(value, Seen):
            self.seen[rank] = value


class Lookout:
    """Called again and again by the controller while ranks train; keeps at most two looks."""

    def __init__(self, crew: Crew, record: Record) -> None:
        self._crew = crew
        self._record = record
        self._before: Look | None = None
        self._asking: _Asking | None = None
        self._told: set[str] = set()  # kinds of findings that were told since a step ended

    def stuck(self) -> list[Failure]:
        """The ranks that the others wait for, if they have waited too long; waits for nothing itself."""
        pace: Pace = self._record.pace
        now_s = time.monotonic()
        quiet_s, patience_s = pace.quiet_s(now_s), pace.patience_s
        if patience_s is None or quiet_s < patience_s / 2:
            self._before = self._asking = None
            self._told.clear()
            return []
        if self._asking is None:
            if self._before is None or now_s - self._before.at_s >= patience_s / 2:
                self._asking = self._ask(now_s)
            return []
        if self._asking.ranks and not self._asking.done():
            return []
        before, look = self._before, self._asking.look()
        self._before, self._asking = look, None
        if before is None or quiet_s < patience_s:
            return []
        finding = judge(before, look, ranks=self._crew.training, quiet_s=quiet_s)
        return self._act_on(finding, time.time() - quiet_s) if finding is not None else []

    def _ask(self, now_s: float) -> _Asking:
        asking = _Asking(now_s, {})
        for rank, member in enumerate(self._crew.fleet.members):
            asking.ranks[member.actor.sight.remote()] = rank
            seen = self._crew.seen(rank)
            if isinstance(seen, Seen):
                asking.seen[rank] = seen
            elif seen is not None:
                asking.ranks[seen] = rank
        return asking

    def _act_on(self, finding: Finding, since_unix: float) -> list[Failure]:
        if finding.kind == "stuck":
            return [
                Failure(
                    rank,
                    finding.step,
                    "stuck",
                    finding.message,
                    since_unix,
                    frames=[finding.places.get(rank, NATIVE)],
                    traceback=finding.stacks.get(rank, ""),
                )
                for rank in finding.ranks
            ]
        if finding.kind not in self._told:  # nothing to be done that the timeout of collectives does not do
            self._told.add(finding.kind)
            fields = {"class": finding.kind, "message": finding.message, "ranks": list(finding.ranks)}
            self._record.event("fault", **fields)
        return []
