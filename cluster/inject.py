"""Injects the faults of a campaign into the processes of a run on this machine, from outside.

The run knows nothing of it, but for what a process does to itself at a signal (`saboteur.py`): where it is
follows from its record, which process is which from its last `formed` event, and what a rank is doing from
the headers of its files in memory. Only processes that carry the session's mark are touched. What was done
goes to a file of its own beside the record, which has one writer already.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..faulttol.campaign import OF_CHECKPOINTS, OF_COPIES, Injection, PlannedFault
from ..faulttol.header import FILLING
from ..faulttol.outcome import PROMISES
from ..runtime.journal import EVENTS, METRICS
from .reaper import MARK, session_processes
from .saboteur import FROM_WITHIN, signal_for
from .strikes import (
    catches,
    cut_slot,
    damage_checkpoint,
    data_files,
    files_of,
    flip_bit,
    kill_when,
    lift_limit,
    limit_files,
    lose_slot,
    send,
    title_of,
)
from .watch import state_of

LOOK_EVERY_S = 0.01  # a tenth of what deciding and fencing take: a kill must be able to fall between them
INTO_STEP_S = 1.0  # the most that a kill waits for its place within a step
END_S = 5.0  # for the thread: a look takes less than INTO_STEP_S and strikes.CATCH_S together

REPLACED_STEPS = 2  # after so many there is a whole copy that is newer than one that was damaged
NOT_DUE = "the run ended before it was due"
STEPS_TO_KNOW = 7  # before them a run does not know how long its steps take (`faulttol.pace`)
# Faults of a process of the run that is no rank: how it calls itself.
TITLES: dict[Injection, str] = {
    "kill_spare": "ray::Worker",
    "kill_vault": "ray::VaultActor",
    "kill_controller": "ray::Controller",
}


class Tail:
    """The lines of a JSON lines file that were added since the last look; whole ones only."""

    def __init__(self, path: Path, *, since_unix: float) -> None:
        """Lines of before `since_unix`, of an earlier command, are left out."""
        self._path = path
        self._since = since_unix
        self._offset = 0

    def news(self) -> list[dict[str, Any]]:
        """None where the file is not there yet."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                whole = file.read()
        except FileNotFoundError:
            return []
        whole = whole[: whole.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if line["time_unix"] >= self._since]


@dataclass
class Situation:
    """Where a run is, from what it has written."""

    step: int = 0  # the largest recorded
    step_s: float = 0.0
    first_unix: float | None = None  # when the first step of this command was recorded
    last_unix: float = 0.0  # and the last
    formed: dict[str, Any] = field(default_factory=dict)
    spares: list[int] = field(default_factory=list)  # processes that were said to be ready
    verdict: dict[str, Any] = field(default_factory=dict)
    not_written_unix: float = 0.0  # when the last checkpoint came to nothing
    controller_unix: float = 0.0  # when the last controller began that took over from a lost one
    known: int = 0  # steps that the run has seen

    def learn(self, metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> None:
        """Take in new lines of the record."""
        self.known += len(metrics)
        for line in metrics:
            self.first_unix = self.first_unix or line["time_unix"]
            self.step = max(self.step, line["step"])
            self.step_s, self.last_unix = line["step_time_s"], line["time_unix"]
        for event in events:
            if event["kind"] == "formed":
                self.formed, self.spares = event, event["spare_pids"]
            if event["kind"] == "spares":
                self.spares = event["pids"]
            if event["kind"] in ("verdict", "preempted"):
                self.verdict = event
            if event["kind"] == "fault" and event["class"] == "controller":
                self.controller_unix = event["time_unix"]
            if event["kind"] == "fault" and event["class"] in ("disk", "checkpoint_not_written"):
                self.not_written_unix = event["time_unix"]

    @property
    def recovering(self) -> bool:
        """Whether ranks are lost and the others have not formed anew."""
        return bool(self.verdict) and self.verdict["time_unix"] > self.formed.get("time_unix", 0.0)

    def is_due(self, fault: PlannedFault, now_unix: float) -> bool:
        """Whether its step or its time has come."""
        if self.first_unix is None or (fault.kind == "stuck" and self.known < STEPS_TO_KNOW):
            return False
        if fault.at_step is not None:
            return self.step >= fault.at_step
        return fault.at_s is not None and now_unix - self.first_unix >= fault.at_s

    def is_well(self, injected_unix: float, injected_step: int) -> bool:
        """Whether what was injected last has been made up for: ranks formed since, and a new step is done."""
        formed_unix = self.formed.get("time_unix", 0.0)
        return formed_unix > injected_unix and self.last_unix > formed_unix and self.step > injected_step


@dataclass
class Second:
    """The second half of a fault, once something has come of the first."""

    kind: Injection
    pids: Sequence[int]
    since_unix: float

    def do(self, now: Situation) -> dict[str, Any] | None:
        """Do it, if its moment has come; fields of a line about it, None where it has not."""
        if self.kind == "disk_full" and now.not_written_unix > self.since_unix:
            lift_limit(self.pids)
            return {"message": "there is room again", "pids": list(self.pids)}
        if self.kind == "kill_controller" and now.controller_unix > self.since_unix:
            return {"message": "another one has taken over", "pids": list(self.pids)}
        if self.kind == "stale" and now.verdict.get("time_unix", 0.0) > self.since_unix:
            woken = send([pid for pid in self.pids if state_of(pid)[0] == "T"], signal.SIGCONT)
            return {"message": "it was woken" if woken else "it was dead already", "pids": list(self.pids)}
        return None


class Injector:
    """Injects `planned` in a thread of its own while the run of `run_dir` goes; use it in a `with`.

    One fault that ends an epoch is made up for before the next one comes, except for those that are meant to
    come in the midst of a recovery: a promise is of one fault.
    """

    def __init__(
        self, run_dir: Path, planned: Sequence[PlannedFault], told: TextIO, *, spares: int, since_unix: float
    ) -> None:
        """`told` takes a line for each injection, as events are written; a fault waits for `spares`."""
        self.pending = list(planned)
        self.why: dict[int, str] = {}  # index of a fault -> what it waits for, or why it was not injected
        self._told = told
        self._spares = spares
        self._metrics = Tail(run_dir / METRICS, since_unix=since_unix)
        self._events = Tail(run_dir / EVENTS, since_unix=since_unix)
        self._now = Situation()
        self._disturbed: tuple[float, int] | None = None  # when and at what step an epoch was ended last
        self._damaged_step = -REPLACED_STEPS  # at which a copy was damaged last
        self._second: Second | None = None  # nothing else is injected before that
        self._run_dir = run_dir
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def __enter__(self) -> "Injector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(END_S)

    def _run(self) -> None:
        while (self.pending or self._second) and not self._ended.wait(LOOK_EVERY_S):
            self._now.learn(self._metrics.news(), self._events.news())
            if self._second is not None:
                if (done := self._second.do(self._now)) is not None:
                    self._tell({"time_unix": time.time(), "class": self._second.kind, **done})
                    self._second = None
                continue
            for fault in list(self.pending):
                if not self._now.is_due(fault, time.time()):
                    self.why[fault.index] = NOT_DUE
                    continue
                try:
                    done = self._try(fault)
                except Exception as error:  # a campaign must not take the run down: told, and done with
                    done, self.why[fault.index] = None, f"could not be injected: {error!r}"
                    self.pending.remove(fault)
                if done is not None:
                    self.pending.remove(fault)
                    break  # the next one sees what this one did

    def _try(self, fault: PlannedFault) -> dict[str, Any] | None:
        """Inject a fault that is due and tell; None when its moment has not come."""
        if fault.kind == "kill_in_recovery":
            if not self._now.recovering or any(other.index < fault.index for other in self.pending):
                self.why[fault.index] = "no recovery came in which to inject it"
                return None
        elif self._disturbed is not None and not self._now.is_well(*self._disturbed):
            self.why[fault.index] = "the run ended before the fault before was made up for"
            return None
        elif self._now.step < self._damaged_step + REPLACED_STEPS:
            self.why[fault.index] = "the run ended before there was another copy than a damaged one"
            return None
        elif len([pid for pid in self._now.spares if title_of(pid)]) < self._spares:
            self.why[fault.index] = f"the run ended before {self._spares} spares were ready"
            return None
        step = self._now.step
        done = self._inject(fault)
        if done is not None:
            line = {"planned": fault.index, "class": fault.kind, "rank": fault.rank}
            self._tell({"time_unix": done["time_unix"], **line, **done})
            if fault.kind in ("disk_full", "stale", "kill_controller"):
                self._second = Second(fault.kind, done["pids"], done["time_unix"])
            if fault.kind in OF_COPIES:
                self._damaged_step = step
            if PROMISES[fault.kind].recovers:
                self._disturbed = done["time_unix"], step
        return done

    def _tell(self, fields: dict[str, Any]) -> None:
        line = {"time_unix": fields["time_unix"], "kind": "fault", "step": self._now.step, **fields}
        self._told.write(json.dumps(line) + "\n")
        self._told.flush()

    def _inject(self, fault: PlannedFault) -> dict[str, Any] | None:
        """Do it; fields of its line, None when it cannot be done this instant."""
        session = os.environ.get(MARK)  # of this process: it is there while the run's Ray is
        if not session:
            return None
        pids: list[int] = self._now.formed.get("pids", [])
        ours = set(session_processes(session))
        if (title := TITLES.get(fault.kind)) is not None:
            self.why[fault.index] = f"no process {title} was there"
            found = _titled(title, ours - set(pids))
            return send([found[fault.draw % len(found)]], signal.SIGKILL) if found else None
        if fault.kind == "kill_all":
            return send([pid for pid in pids if pid in ours], signal.SIGKILL)
        if fault.kind in OF_CHECKPOINTS:
            return self._on_disk(fault, _titled(TITLES["kill_vault"], ours))
        rank = fault.rank if fault.kind != "kill_in_recovery" else self._survivor(fault.rank, len(pids))
        if not 0 <= rank < len(pids) or pids[rank] not in ours:
            self.why[fault.index] = f"rank {fault.rank} was not there: the run went on with fewer"
            return None
        done = self._on_rank(fault, rank, pids[rank], session, ours)
        return None if done is None else {**done, "rank": rank}

    def _on_rank(
        self, fault: PlannedFault, rank: int, pid: int, session: str, ours: set[int]
    ) -> dict[str, Any] | None:
        match fault.kind:
            case "kill_in_update":
                self.why[fault.index] = "its state was never seen in the middle of an update"
                return kill_when(pid, files_of(session, rank, "arena"), lambda words: words.torn)
            case "kill_in_copy":
                self.why[fault.index] = "no copy of its state was ever seen under way"
                slots = files_of(session, rank, "slot-*")
                return kill_when(pid, slots, lambda words: words.state == FILLING)
            case kind if kind in OF_COPIES:
                self.why[fault.index] = "no whole copy of its state was there"
                slots = files_of(session, rank, "slot-*")
                if fault.kind == "lose_slot":
                    return lose_slot(slots)
                return (flip_bit if fault.kind == "bit_flip" else cut_slot)(slots, fault.draw)
            case "stop" | "stale":
                return send([pid], signal.SIGSTOP)
            case "kill_node":
                self.why[fault.index] = f"no process {TITLES['kill_vault']} was there"
                vaults = _titled(TITLES["kill_vault"], ours)
                return send([*vaults, pid], signal.SIGKILL) if vaults else None
        if fault.kind != "kill_in_recovery":  # anywhere within a step: a record tells of ends of steps only
            self._ended.wait(min(INTO_STEP_S, self._now.step_s * fault.draw / 2**32))
        if fault.kind in FROM_WITHIN:
            self.why[fault.index] = "its process does not take the signal for it"
            number = signal_for(fault.kind, fault.draw)
            return send([pid], number) if catches(pid, number) else None
        return send([pid], signal.SIGTERM if fault.kind == "preempt" else signal.SIGKILL)

    def _on_disk(self, fault: PlannedFault, vaults: Sequence[int]) -> dict[str, Any] | None:
        self.why[fault.index] = "no checkpoint was there"
        checkpoints = self._run_dir / "checkpoints"
        if fault.kind != "disk_full":
            return damage_checkpoint(checkpoints, fault.draw, cut=fault.kind == "truncate_checkpoint")
        sizes = [path.stat().st_size for path in data_files(checkpoints)]
        return limit_files(vaults, min(sizes) // 2) if sizes and vaults else None

    def _survivor(self, rank: int, world_size: int) -> int:
        """`rank`, or the next one that is not lost; -1 where all are."""
        lost = self._now.verdict.get("ranks", [])
        others = [(rank + i) % world_size for i in range(world_size)]
        return next((other for other in others if other not in lost), -1)


def _titled(title: str, pids: Iterable[int]) -> list[int]:
    """Those of the processes that call themselves so."""
    return sorted(pid for pid in pids if title_of(pid).startswith(title))
