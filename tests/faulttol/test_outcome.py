"""Outcomes: what a record of a run says about the promises of its campaign.

Records made by hand, as the controller writes them; no process, no clock.
"""

import json
from typing import Any

import pytest

from rayfold.faulttol.campaign import Injection, PlannedFault
from rayfold.faulttol.outcome import PHASES, campaign_report, report_table

Event = dict[str, Any]


def planned(*kinds: Injection) -> list[PlannedFault]:
    return [PlannedFault(index=i, kind=kind, rank=3, at_step=7) for i, kind in enumerate(kinds)]


def event(kind: str, at: float, **fields: Any) -> Event:
    return {"kind": kind, "time_unix": at, "step": 7, **fields}


def injected(at: float, index: int = 0) -> Event:
    return event("fault", at, planned=index, rank=3)


def recovery(at: float, *, lost_steps: int = 0, rank: int = 3, **restored: Any) -> list[Event]:
    """A recovery whose phases take 0.1, 0.02, 0.03, 0.05 and 0.2 s from the fault at `at`."""
    return [
        event("verdict", at + 0.1, ranks=[rank], sentence=f"rank {rank} died at step 7"),
        event("remedy", at + 0.12, action="replace", sentence="a spare takes its place"),
        event("formed", at + 0.2, fenced_unix=at + 0.15),
        event("restored", at + 0.4, source="memory", from_step=7, lost_steps=lost_steps, **restored),
    ]


def metrics(*steps: tuple[int, float]) -> list[Event]:
    return [{"step": step, "time_unix": at} for step, at in steps]


AFTER = metrics((8, 10.7), (9, 11.0))


def test_time_is_split_into_phases() -> None:
    """Where to look when a recovery is slow."""
    report = campaign_report(planned("kill"), [injected(10.0), *recovery(10.0)], metrics=AFTER)
    phases = report["faults"][0]["outcome"]["phases"]
    assert [phases[p] for p in PHASES] == pytest.approx([0.1, 0.02, 0.03, 0.05, 0.2, 0.3])
    assert report["faults"][0]["outcome"]["resume_s"] == pytest.approx(0.7)
    assert report["faults"][0]["kept"] is True
    assert report["phases"]["detect"]["worst"] == pytest.approx(0.1)


def test_catching_up_ends_where_the_run_had_been() -> None:
    """Two steps again: the first of them is a step, but nothing new."""
    events = [injected(10.0), *recovery(10.0, lost_steps=1)]
    outcome = campaign_report(planned("kill"), events, metrics=AFTER)["faults"][0]["outcome"]
    assert outcome["phases"]["catch_up"] == pytest.approx(0.6)
    assert outcome["resume_s"] == pytest.approx(0.7)


def test_phases_that_the_controller_measured_count() -> None:
    """It knows better than the times of events; only of the injection it cannot know."""
    measured = {"detect_s": 9.0, "decide_s": 0.05, "fence_s": 0.04, "regroup_s": 0.06, "restore_s": 0.3}
    events = [injected(10.0), *recovery(10.0, **measured, catch_up_s=0.5)]
    phases = campaign_report(planned("kill"), events, metrics=AFTER)["faults"][0]["outcome"]["phases"]
    assert [phases[p] for p in PHASES] == pytest.approx([0.07, 0.05, 0.04, 0.06, 0.3, 0.5])


SLOW = [{**e, "time_unix": e["time_unix"] + 0.9} for e in recovery(10.0)]
STOPPED = [*recovery(10.0)[:1], event("remedy", 10.2, action="stop", sentence="no spare is left")]

LEFT = [event("preempted", 10.1, ranks=[3], sentence="rank 3 got notice to leave"), *recovery(10.0)[1:]]


@pytest.mark.parametrize(
    ("kind", "events", "steps", "problem"),
    [
        ("kill", recovery(10.0, lost_steps=2), AFTER, "lost 2 steps, promised at most 1"),
        (
            "kill",
            SLOW,
            metrics((8, 11.4)),
            "detected in 1.00 s, promised 0.30; resumed in 1.40 s, promised 1.00",
        ),
        ("stop", SLOW, metrics((8, 11.4)), ""),  # a stopped process may be slow and not stopped
        ("kill", recovery(10.0), [], "no step was finished afterwards"),
        ("kill", STOPPED, [], "no recovery: no spare is left"),
        ("kill", [], [], "no recovery: nobody noticed"),
        ("bit_flip", [], AFTER, ""),
        ("kill_vault", recovery(10.0), AFTER, "training was disturbed: rank 3 died"),
        ("preempt", recovery(10.0, lost_steps=1), AFTER, "lost 1 steps, promised at most 0"),
        ("preempt", LEFT, AFTER, ""),
        ("preempt", [*LEFT[:1], STOPPED[1]], [], "no recovery: no spare is left"),
        ("lose_slot", LEFT, AFTER, "training was disturbed: rank 3 got notice to leave"),
        ("kill_controller", [event("fault", 11.0, **{"class": "controller", "message": "x"})], AFTER, ""),
        ("kill_controller", [], AFTER, 'the run told of no fault of class "controller"'),
        ("disk_full", [event("fault", 12.0, **{"class": "disk", "message": "full"})], AFTER, ""),
        ("disk_full", [], AFTER, 'the run told of no fault of class "disk"'),
        (
            "disk_full",
            recovery(10.0),
            AFTER,
            'training was disturbed: rank 3 died at step 7; the run told of no fault of class "disk"',
        ),
    ],
)
def test_a_broken_promise_is_told(
    kind: Injection, events: list[Event], steps: list[Event], problem: str
) -> None:
    """In the words of the promise, so that the table needs no legend."""
    report = campaign_report(planned(kind), [injected(10.0), *events], metrics=steps)
    fault = report["faults"][0]
    assert fault["kept"] is not bool(problem)
    assert "; ".join(fault["problems"]).startswith(problem)
    assert (report["kept"], report["broken"]) == (int(not problem), int(bool(problem)))


def test_going_on_with_fewer_ranks_may_take_longer() -> None:
    """A smaller layout has to be loaded, not adopted."""
    shrunk = [{**e, "action": "shrink"} if e["kind"] == "remedy" else e for e in recovery(10.0)]
    steps = metrics((8, 12.5))
    assert campaign_report(planned("kill"), [injected(10.0), *shrunk], metrics=steps)["kept"] == 1
    assert campaign_report(planned("kill"), [injected(10.0), *recovery(10.0)], metrics=steps)["kept"] == 0


def test_a_second_kill_during_recovery_is_judged_by_what_ended_both() -> None:
    """One recovery answers two faults, and its lost step counts once."""
    second = recovery(10.15, rank=2, lost_steps=1, decide_s=0.04, fence_s=0.06)  # the sums of both rounds
    first = [e for e in recovery(10.0) if e["kind"] in ("verdict", "remedy")]
    events = [injected(10.0), *first, {**injected(10.15, 1), "rank": 2}, *second]
    report = campaign_report(planned("kill", "kill_in_recovery"), events, metrics=AFTER)
    assert [fault["outcome"]["resume_s"] for fault in report["faults"]] == pytest.approx([0.7, 0.55])
    assert [fault["outcome"]["phases"]["detect"] for fault in report["faults"]] == pytest.approx([0.1, 0.1])
    assert (report["kept"], report["lost_steps"]) == (2, 1)


def test_each_fault_has_the_verdict_that_names_its_rank() -> None:
    """Two ranks are killed at once: the one is told a moment before the other."""
    other = event("verdict", 10.05, ranks=[1], sentence="rank 1 died at step 7")
    events = [injected(10.0), {**injected(10.0, 1), "rank": 1}, other, *recovery(10.0)]
    report = campaign_report(planned("kill", "kill"), events, metrics=AFTER)
    told = [fault["outcome"]["verdict"] for fault in report["faults"]]
    assert told == ["rank 3 died at step 7", "rank 1 died at step 7"]


def test_a_later_fault_of_the_same_rank_is_another() -> None:
    """The first showed as an exception of rank 1, and was recovered from, long before the second."""
    events = [injected(10.0), *recovery(10.0, rank=1), injected(20.0, 1), *recovery(20.0)]
    report = campaign_report(planned("exception", "kill"), events, metrics=[*AFTER, *metrics((9, 20.7))])
    assert [fault["outcome"]["resume_s"] for fault in report["faults"]] == pytest.approx([0.7, 0.7])


def test_the_next_fault_is_not_laid_to_a_harmless_one() -> None:
    """A spare died, and later a rank: the spare disturbed nobody."""
    events = [injected(5.0), injected(10.0, 1), *recovery(10.0)]
    report = campaign_report(planned("kill_spare", "kill"), events, metrics=AFTER)
    assert [fault["kept"] for fault in report["faults"]] == [True, True]


def test_what_was_never_injected_is_neither_kept_nor_broken() -> None:
    """A run that ended early has shown nothing about the rest."""
    report = campaign_report(planned("kill", "stop"), [injected(10.0), *recovery(10.0)], metrics=AFTER)
    assert report["faults"][1]["kept"] is None
    assert (report["planned"], report["injected"], report["kept"], report["broken"]) == (2, 1, 1, 0)


def test_the_report_is_plain_and_has_a_table() -> None:
    """It is kept as JSON beside the run, and people read the table."""
    events = [injected(10.0), *recovery(10.0, lost_steps=2), event("run_finished", 20.0, status="finished")]
    report = campaign_report(planned("kill", "stop"), events, metrics=AFTER)
    assert json.loads(json.dumps(report)) == report
    table = report_table(report).splitlines()
    assert table[0].split()[:6] == ["#", "fault", "rank", "kept", "lost", "source"]
    assert table[1].split()[:6] == ["0", "kill", "3", "NO", "2", "memory"]
    assert table[1].endswith("lost 2 steps, promised at most 1")
    assert table[2].split()[:4] == ["1", "stop", "3", "-"]
    assert table[-1].endswith("1 were never injected. 2 steps were trained again. The run: finished.")
