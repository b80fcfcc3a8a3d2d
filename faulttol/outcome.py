"""What the faults of a campaign promised and what came of them, from the record of the run alone.

A recovery is cut into six phases, each the answer to another question: how long until somebody noticed, until
it was clear what to do, until nobody of the old epoch could do harm, until the ranks were together, until
they had their state, and until they were where they had been.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .campaign import Injection, PlannedFault

PHASES = ("detect", "decide", "fence", "regroup", "restore", "catch_up")

Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Bounds on what one fault may cost; None where nothing is promised."""

    recovers: bool = True  # False: training goes on as if nothing were
    lost_steps: int = 0
    detect_s: float | None = None
    resume_s: float | None = None  # from the fault to the first finished step behind it, with a spare
    alarm: str = ""  # class of the `fault` that the run tells of it


# A kill that may hit the update costs the step under way; all others find the arena or a slot whole.
PROMISES: Mapping[Injection, Promise] = {
    "kill": Promise(lost_steps=1, detect_s=0.3, resume_s=1.0),
    "kill_in_update": Promise(lost_steps=1, detect_s=0.3, resume_s=1.0),
    "kill_in_copy": Promise(lost_steps=1, detect_s=0.3, resume_s=1.0),
    "kill_in_recovery": Promise(lost_steps=1, detect_s=0.6, resume_s=2.0),
    "kill_all": Promise(lost_steps=1, detect_s=0.3),
    "kill_node": Promise(lost_steps=1, detect_s=1.0, resume_s=3.0),
    "stop": Promise(lost_steps=1, detect_s=2.0, resume_s=3.0),
    "stale": Promise(lost_steps=1, detect_s=2.0, resume_s=3.0),
    "stuck": Promise(lost_steps=1),
    "exception": Promise(lost_steps=1, detect_s=1.0, resume_s=2.0),
    "oom": Promise(lost_steps=1, detect_s=1.0, resume_s=2.0),
    "preempt": Promise(lost_steps=0, detect_s=0.5, resume_s=1.0),
    "kill_spare": Promise(recovers=False),
    "kill_vault": Promise(recovers=False),
    "kill_controller": Promise(recovers=False, alarm="controller"),
    "kill_driver": Promise(recovers=False),
    "bit_flip": Promise(recovers=False),
    "truncate": Promise(lost_steps=1),
    "lose_slot": Promise(recovers=False),
    "flip_checkpoint": Promise(recovers=False),
    "truncate_checkpoint": Promise(recovers=False),
    "disk_full": Promise(recovers=False, alarm="disk"),
}
NOTICED = frozenset({"verdict", "preempted"})  # events that say that ranks cannot go on as they are
SHRINK_S = 3.0  # to resume where no spare was left


def campaign_report(
    planned: Sequence[PlannedFault],
    events: Iterable[Record],
    *,
    metrics: Iterable[Record] = (),
    promises: Mapping[Injection, Promise] = PROMISES,
) -> dict[str, Any]:
    """Promise and outcome of every planned fault as plain values, and what recoveries cost in all.

    Reads lines of events.jsonl and metrics.jsonl: `fault` with `planned` (index of the fault, told when it is
    injected), `verdict` and `preempted` (`ranks`), `remedy` (`action`), `formed` (`fenced_unix`), `restored`
    (`source`, `lost_steps`, and `<phase>_s` where the controller measured them), `run_finished` (`status`).
    """
    told = sorted(events, key=lambda event: float(event["time_unix"]))
    steps = sorted(metrics, key=lambda line: float(line["time_unix"]))
    injected = {event["planned"]: event for event in told if event["kind"] == "fault" and "planned" in event}
    faults = [_told(fault, injected.get(fault.index), told, steps, promises[fault.kind]) for fault in planned]
    recovered = [fault["outcome"] for fault in faults if fault["outcome"].get("source")]
    last = next((event for event in reversed(told) if event["kind"] == "run_finished"), {})
    return {
        "status": last.get("status", "unknown"),
        "planned": len(faults),
        "injected": len(injected),
        "kept": sum(fault["kept"] is True for fault in faults),
        "broken": sum(fault["kept"] is False for fault in faults),
        # one recovery may answer several faults
        "lost_steps": sum({o["restored_unix"]: o["lost_steps"] for o in recovered}.values()),
        "phases": {phase: _spread([o["phases"][phase] for o in recovered]) for phase in PHASES},
        "resume_s": _spread([o["resume_s"] for o in recovered if o["resume_s"] is not None]),
        "faults": faults,
    }


def report_table(report: Record) -> str:
    """The same for people: one line a fault, then the sums."""
    head = [
        "#",
        "fault",
        "rank",
        "kept",
        "lost",
        "source",
        *(f"{p} s" for p in PHASES),
        "resume s",
        "broken promises",
    ]
    rows = [head]
    for fault in report["faults"]:
        outcome = fault["outcome"]
        phases = outcome.get("phases", {})
        kept = {True: "yes", False: "NO", None: "-"}[fault["kept"]]
        cells = [fault["index"], fault["kind"], fault["rank"] if fault["rank"] >= 0 else "-", kept]
        cells += [outcome.get("lost_steps", "-"), outcome.get("source", "-")]
        cells += [_figure(phases.get(phase)) for phase in PHASES]
        rows.append(
            [str(cell) for cell in [*cells, _figure(outcome.get("resume_s"))]]
            + ["; ".join(fault["problems"])]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    sums = (
        f"{report['kept']} of {report['injected']} injected faults kept their promise, {report['broken']} "
        f"did not; {report['planned'] - report['injected']} were never injected. {report['lost_steps']} "
        f"steps were trained again. The run: {report['status']}."
    )
    return "\n".join([*lines, "", sums])


def _told(
    fault: PlannedFault,
    injection: Record | None,
    told: Sequence[Record],
    steps: Sequence[Record],
    promise: Promise,
) -> dict[str, Any]:
    """One fault with its promise, its outcome, and whether it was kept (None: never injected)."""
    outcome: dict[str, Any] = {}
    problems: list[str] = []
    rank = fault.rank if injection is None else injection.get("rank", fault.rank)
    if injection is not None:
        outcome = _outcome(float(injection["time_unix"]), rank, told, steps, promise)
        problems = _broken(outcome, promise)
    return {
        "index": fault.index,
        "kind": fault.kind,
        "rank": rank,
        "due": {"step": fault.at_step} if fault.at_step is not None else {"seconds": fault.at_s},
        "promise": dict(promise.__dict__),
        "outcome": outcome,
        "kept": None if injection is None else not problems,
        "problems": problems,
    }


def _outcome(
    at: float, rank: int, told: Sequence[Record], steps: Sequence[Record], promise: Promise
) -> dict[str, Any]:
    after = [event for event in told if float(event["time_unix"]) >= at]
    verdicts = [e for e in after if e["kind"] in NOTICED]
    if not promise.recovers:
        # A verdict that another fault explains comes behind that one.
        other = next(
            (e for e in after if e["kind"] == "fault" and "planned" in e and e["time_unix"] > at), None
        )
        verdicts = [e for e in verdicts if other is None or e["time_unix"] < other["time_unix"]]
    alarm = next((e for e in after if promise.alarm and e.get("class") == promise.alarm), None)
    alarms = {} if alarm is None else {"alarm": alarm["message"]}
    if not verdicts:
        return alarms
    # Before the next recovery is through, that of another fault may come first: the one that names the rank
    # is this one's.
    ready = _first([e for e in after if e["time_unix"] >= verdicts[0]["time_unix"]], "restored")
    near = [e for e in verdicts if ready is None or e["time_unix"] <= ready["time_unix"]]
    verdict = next((e for e in near if rank in e.get("ranks", ())), near[0])
    seen = float(verdict["time_unix"])
    later = [event for event in told if float(event["time_unix"]) >= seen]
    remedy = _first(later, "remedy")
    restored = _first(later, "restored")
    outcome = alarms | {
        "verdict": verdict.get("sentence", ""),
        "remedy": (remedy or {}).get("sentence", ""),
        "action": (remedy or {}).get("action", ""),
    }
    if remedy is None or restored is None:
        return outcome
    formed = [e for e in later if e["kind"] == "formed" and e["time_unix"] <= restored["time_unix"]]
    alone = _verdicts_of(restored, told) == 1
    step = next((s for s in steps if s["time_unix"] >= restored["time_unix"]), None)
    goal = int(restored.get("from_step", 0)) + int(restored.get("lost_steps", 0)) + 1
    caught = next((s for s in steps if s["time_unix"] >= restored["time_unix"] and s["step"] >= goal), None)
    return outcome | {
        "source": restored.get("source", ""),
        "lost_steps": int(restored.get("lost_steps", 0)),
        "restored_unix": float(restored["time_unix"]),
        "resume_s": None if step is None else float(step["time_unix"]) - at,
        "phases": _phases(at, verdict, remedy, formed[-1] if formed else remedy, restored, caught, alone),
    }


def _verdicts_of(restored: Record, told: Sequence[Record]) -> int:
    """The number of verdicts that one recovery answers: those since the recovery before."""
    until = float(restored["time_unix"])
    before = [float(e["time_unix"]) for e in told if e["kind"] == "restored" and e["time_unix"] < until]
    since = max(before, default=-math.inf)
    return sum(e["kind"] in NOTICED and since < e["time_unix"] <= until for e in told)


def _phases(
    at: float,
    verdict: Record,
    remedy: Record,
    formed: Record,
    restored: Record,
    caught: Record | None,
    alone: bool,
) -> dict[str, float]:
    """Seconds a phase: as the controller measured them, else from the times of the events."""
    fenced = formed.get("fenced_unix", remedy["time_unix"])
    ends = [verdict["time_unix"], remedy["time_unix"], fenced, formed["time_unix"], restored["time_unix"]]
    ends.append(restored["time_unix"] if caught is None else caught["time_unix"])
    phases, before = {}, at
    for phase, end in zip(PHASES, map(float, ends), strict=True):
        phases[phase] = max(0.0, end - before)
        before = max(before, end)
    for phase in PHASES:
        if (measured := restored.get(f"{phase}_s")) is not None and phase != "detect":
            phases[phase] = float(measured)
    # The controller cannot know when a fault was injected: detection is what lies before its decision. Where
    # it decided more than once its sum tells nothing of this fault, and all before the verdict is detection.
    if "decide_s" in restored and alone:
        phases["detect"] = max(0.0, float(remedy["time_unix"]) - at - float(restored["decide_s"]))
    return phases


def _broken(outcome: Record, promise: Promise) -> list[str]:
    """How the outcome differs from the promise, one part a sentence."""
    if not promise.recovers:
        disturbed = [f"training was disturbed: {outcome['verdict']}"] if "verdict" in outcome else []
        unheard = promise.alarm and "alarm" not in outcome
        return [*disturbed, *([f'the run told of no fault of class "{promise.alarm}"'] if unheard else [])]
    if "source" not in outcome:
        return [f"no recovery: {outcome.get('remedy') or outcome.get('verdict') or 'nobody noticed'}"]
    problems = []
    if outcome["lost_steps"] > promise.lost_steps:
        problems.append(f"lost {outcome['lost_steps']} steps, promised at most {promise.lost_steps}")
    detect_s, resume_s = outcome["phases"]["detect"], outcome["resume_s"]
    if promise.detect_s is not None and detect_s > promise.detect_s:
        problems.append(f"detected in {detect_s:.2f} s, promised {promise.detect_s:.2f}")
    bound_s = promise.resume_s
    if bound_s is not None and outcome["action"] == "shrink":
        bound_s = max(bound_s, SHRINK_S)
    if resume_s is None:
        problems.append("no step was finished afterwards")
    elif bound_s is not None and resume_s > bound_s:
        problems.append(f"resumed in {resume_s:.2f} s, promised {bound_s:.2f}")
    return problems


def _first(events: Iterable[Record], kind: str) -> Record | None:
    return next((event for event in events if event["kind"] == kind), None)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "worst": max(values)} if values else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
