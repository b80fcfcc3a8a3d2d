"""Remedies: a table of faults and what is done about each; no process, no clock."""

from collections.abc import Sequence
from typing import Any

import pytest

from rayfold.faulttol.remedy import (
    Fault,
    FaultKind,
    Policy,
    Remedy,
    Replace,
    Shrink,
    Spare,
    Stop,
    flapping,
    remedy_for,
    signature_of,
)
from rayfold.parallel.layout import Layout
from rayfold.parallel.legal import legal_layouts
from rayfold.parallel.limits import Load

FOUR = Layout(dp_replicate=1, dp_shard=4)
HOMES = {0: "a", 1: "a", 2: "b", 3: "b"}
ON_A, ON_B, ON_C = Spare("s-a", "a"), Spare("s-b", "b"), Spare("s-c", "c")


def legal(world_size: int) -> Sequence[Layout]:
    return legal_layouts(Load(model=None, batch_size=8), world_size=world_size)


def fault(kind: FaultKind = "died", ranks: tuple[int, ...] = (3,), **more: Any) -> Fault:
    return Fault(kind=kind, ranks=ranks, **({"step": 7, "homes": HOMES} | more))


def decided(this: Fault, history: Sequence[Fault] = (), **more: Any) -> Remedy:
    return remedy_for(this, history, **({"layout": FOUR, "spares": [ON_A, ON_B], "legal": legal} | more))


@pytest.mark.parametrize(
    ("this", "spares", "placed"),
    [
        (fault(), [ON_A, ON_B], {3: ON_B}),  # its memory lies on its own node
        (fault(), [ON_A, ON_C], {3: ON_A}),  # no spare there: the first
        (fault(ranks=(1, 3)), [ON_B, ON_A], {1: ON_A, 3: ON_B}),
        (fault(ranks=(2, 3)), [ON_C, ON_B], {2: ON_B, 3: ON_C}),
        (fault("stopped"), [ON_B], {3: ON_B}),
        (fault("hang"), [ON_B], {3: ON_B}),
        (fault("stuck", signature="in a.py:1 (f)"), [ON_B], {3: ON_B}),
        (fault("oom", signature="MemoryError"), [ON_B], {3: ON_B}),  # a new process has a heap of its own
        (
            fault("node", ranks=(2, 3), node="b"),
            [ON_B, ON_A, ON_C],
            {2: ON_A, 3: ON_C},
        ),  # none on a lost node
        (fault("preempted", ranks=(2,), node="b"), [ON_B, ON_C], {2: ON_C}),
        (fault("preempted", ranks=(2,)), [ON_C, ON_B], {2: ON_B}),  # only its process is to go
        (fault("node", ranks=(), node="z"), [], {}),  # nothing of the layout is lost
    ],
)
def test_a_spare_takes_the_lost_rank(this: Fault, spares: list[Spare], placed: dict[int, Spare]) -> None:
    """The world keeps its size and every number of the run stays the same."""
    remedy = decided(this, spares=spares)
    assert isinstance(remedy, Replace)
    assert remedy.spares == placed
    assert remedy.quarantined == ()


@pytest.mark.parametrize(
    ("this", "spares", "size", "keep", "with_spares"),
    [
        (fault(), [], 2, (0, 1), ()),  # three ranks cannot share a batch of 8
        (fault(ranks=(0,)), [], 2, (1, 2), ()),
        (fault(ranks=(1, 2, 3)), [], 1, (0,), ()),
        (fault(ranks=(1, 2, 3)), [ON_A], 2, (0,), (ON_A,)),  # a spare is better than none
        (fault(ranks=(1, 2, 3)), [ON_A, ON_B], 2, (0,), (ON_A,)),  # and one goes on waiting
        (fault(ranks=(0, 1, 2, 3)), [ON_A], 1, (), (ON_A,)),
        (fault("node", ranks=(2, 3), node="b"), [ON_B], 2, (0, 1), ()),
    ],
)
def test_without_enough_spares_the_run_goes_on_smaller(
    this: Fault, spares: list[Spare], size: int, keep: tuple[int, ...], with_spares: tuple[Spare, ...]
) -> None:
    """The largest layout that carries the same global batch: slower, but the same training."""
    remedy = decided(this, spares=spares)
    assert isinstance(remedy, Shrink)
    assert (remedy.layout.world_size, remedy.keep, remedy.spares) == (size, keep, with_spares)
    assert f"goes on with {size} of 4 ranks" in remedy.sentence


def test_a_smaller_layout_cuts_tensors_as_before() -> None:
    """From 8 ranks with tp = 2 to 4 there are many ways; the nearest needs the least reshaping."""
    eight = Layout(dp_replicate=2, dp_shard=2, tp=2)

    def any_layout(world_size: int) -> Sequence[Layout]:
        half = world_size // 2
        options = [Layout(dp_replicate=1, dp_shard=world_size), Layout(dp_replicate=1, dp_shard=half, tp=2)]
        return [*options, Layout(dp_replicate=half, dp_shard=1, tp=2)] if world_size == 4 else []

    remedy = decided(fault(ranks=(5, 6, 7)), layout=eight, spares=[], legal=any_layout)
    assert isinstance(remedy, Shrink)
    assert remedy.layout == Layout(dp_replicate=2, dp_shard=1, tp=2)


@pytest.mark.parametrize(
    ("this", "batch_size", "says"),
    [
        (fault(ranks=(0, 1, 2, 3)), 8, "there is no spare, and no rank is left"),
        (fault(), 0, "no layout of up to 3 ranks carries the same global batch"),
    ],
)
def test_where_nothing_helps_the_run_ends_and_says_what_would(
    this: Fault, batch_size: int, says: str
) -> None:
    """The way out is a key of the configuration."""
    remedy = decided(this, spares=[], legal=legal if batch_size else lambda world_size: [])
    assert isinstance(remedy, Stop)
    assert says in remedy.sentence
    assert "snapshot.spares" in remedy.sentence


RAISED = fault("exception", signature="ValueError at f.py:3: bad", traceback="Traceback ...")


def test_an_exception_is_tried_again_once() -> None:
    """A cosmic ray deserves a second chance, which needs no spare: the processes are well."""
    remedy = decided(RAISED, spares=[])
    assert isinstance(remedy, Replace)
    assert remedy.spares == {}


@pytest.mark.parametrize(
    ("earlier", "stops"),
    [
        (RAISED, True),
        (fault("exception", ranks=(0,), signature=RAISED.signature), True),  # on another rank: the same
        (fault("exception", signature=RAISED.signature, step=6), False),  # the run came further
        (fault("exception", signature="KeyError"), False),
        (fault("died"), False),
    ],
)
def test_the_same_exception_at_the_same_step_ends_the_run(earlier: Fault, stops: bool) -> None:
    """What is deterministic comes back for ever: stop with the traceback instead of burning hours."""
    remedy = decided(RAISED, [earlier, fault("died", step=5)])
    assert isinstance(remedy, Stop) == stops
    if isinstance(remedy, Stop):
        assert remedy.traceback == "Traceback ..."
        assert "rank 3 raised an exception" in remedy.sentence


def test_the_signature_leaves_out_what_changes() -> None:
    """Addresses and losses differ each time; the place and the type do not."""
    first = signature_of("ValueError", "loss 3.14 of <Tensor at 0x7f00>", ["a.py:1 in f", "b.py:2 in g"])
    again = signature_of("ValueError", "loss 2.72 of <Tensor at 0x55aa>", ["a.py:9 in f", "b.py:2 in g"])
    assert first == again
    assert first != signature_of("ValueError", "loss 3.14 of <Tensor at 0x7f00>", ["a.py:1", "b.py:3 in g"])
    assert first.startswith("ValueError at b.py:2 in g: loss")


@pytest.mark.parametrize(
    "kind", ["died", "stopped", "node", "exception", "preempted", "hang", "stuck", "oom"]
)
def test_a_recovery_that_does_not_end_is_ended(kind: FaultKind) -> None:
    """Faults during recovery are recovered from too, but not for ever."""
    patient = Policy(max_rounds=3)
    this = fault(kind, node="b", signature="x")
    assert not isinstance(decided(this, round=3, policy=patient, spares=[ON_A]), Stop)
    remedy = decided(this, round=4, policy=patient, spares=[ON_A])
    assert isinstance(remedy, Stop)
    assert "fault number 4 before training went on, and 3 are borne" in remedy.sentence


def test_stuck_again_at_the_same_place_of_the_same_step_ends_the_run() -> None:
    """A deterministic livelock, which would take one spare after the other."""
    this = fault("stuck", signature="in a.py:1 (f)")
    elsewhere = [
        fault("stuck", signature="in b.py:9 (g)"),
        fault("stuck", signature=this.signature, step=6),
    ]
    assert isinstance(decided(this, elsewhere[1:]), Replace)
    assert isinstance(decided(this, elsewhere), Replace)
    remedy = decided(this, [this])
    assert isinstance(remedy, Stop)
    assert remedy.sentence.startswith(
        "rank 3 was alive but stuck (in a.py:1 (f)) at step 7, as before: it comes back whenever"
    )


@pytest.mark.parametrize("kind", ["died", "hang"])
def test_a_step_that_kills_the_same_rank_again_and_again_ends_the_run(kind: FaultKind) -> None:
    """A kernel that crashes leaves no exception; spares would go one after the other."""
    before = [fault(kind), fault(kind, ranks=(2, 3))]
    others = [fault(kind, ranks=(1,)), fault(kind, step=6), fault("stopped")]
    off = Policy(flaps=0)
    assert isinstance(decided(fault(kind), [*before, *others], policy=off), Stop)
    assert isinstance(decided(fault(kind), [before[0], *others], policy=off), Replace)


def flaps(times: Sequence[float], **more: Any) -> list[Fault]:
    return [fault(time_s=time, step=step, **more) for step, time in enumerate(times)]


def test_a_node_that_fails_again_and_again_gets_no_more_ranks() -> None:
    """Three faults on node b in ten minutes: the next spare is one elsewhere, though b's would be nearer."""
    remedy = decided(fault(time_s=500.0), flaps([0.0, 200.0]), spares=[ON_B, ON_A])
    assert isinstance(remedy, Replace)
    assert (remedy.spares, remedy.quarantined) == ({3: ON_A}, ("b",))
    assert "node b had 3 faults or more in 600 s" in remedy.sentence
    smaller = decided(fault(time_s=500.0), flaps([0.0, 200.0]), spares=[ON_B])
    assert isinstance(smaller, Shrink), "its own spare is no way out"
    assert smaller.quarantined == ("b",)


@pytest.mark.parametrize(
    ("history", "policy"),
    [
        (flaps([0.0]), Policy()),
        (flaps([-200.0, 0.0]), Policy()),  # the first is out of the window
        (flaps([0.0, 200.0], ranks=(0,)), Policy()),  # another node
        (flaps([0.0, 200.0], kind="preempted"), Policy()),  # not its fault
        (flaps([0.0, 200.0], kind="exception", signature="x"), Policy()),
        (flaps([0.0, 200.0]), Policy(flaps=0)),
    ],
)
def test_a_node_is_given_up_for_faults_of_its_own_alone(history: list[Fault], policy: Policy) -> None:
    """Good nodes are scarce."""
    assert flapping(fault(time_s=500.0), history, [ON_A, ON_B], policy) == frozenset()


HERE = dict.fromkeys(range(4), "a")


def barren(*steps: int, every_s: float = 10.0) -> Remedy:
    """What is done about the last of faults at these steps, of another rank each time."""
    faults = [
        fault(ranks=(number % 4,), step=step, homes=HERE, time_s=every_s * number)
        for number, step in enumerate(steps)
    ]
    return decided(faults[-1], faults[:-1], spares=[ON_A])


def test_a_node_without_another_that_only_burns_ends_the_run() -> None:
    """Each spare dies like the one before it: whoever pays for it must be told."""
    remedy = barren(7, 7, 8, 8, 9)
    assert isinstance(remedy, Stop)
    assert "fault number 5 in 40 s, with 2 steps of progress between them" in remedy.sentence
    assert isinstance(barren(7, 7, 8, 9), Replace)
    assert isinstance(barren(7, 8, 9, 10, 11), Replace), "it comes further"
    assert isinstance(barren(7, 7, 8, 8, 9, every_s=200.0), Replace), "in its time"


def test_the_only_node_is_kept() -> None:
    """On a laptop there is no better one."""
    history = flaps([0.0, 200.0], homes=HERE)
    remedy = decided(fault(homes=HERE, time_s=500.0), history, spares=[ON_A])
    assert isinstance(remedy, Replace)
    assert remedy.spares == {3: ON_A}


@pytest.mark.parametrize(
    ("this", "starts"),
    [
        (fault(), "rank 3 died at step 7; spare s-b on node b becomes rank 3"),
        (fault("node", ranks=(3, 2), node="b"), "ranks 2, 3 went down (node b) at step 7; "),
        (fault("preempted", ranks=(2,), node="b"), "rank 2 got notice to leave (node b) at step 7; "),
        (fault("node", ranks=(), node="z"), "node z, without ranks, went down at step 7; no rank is lost"),
        (RAISED, "rank 3 raised an exception (ValueError at f.py:3: bad) at step 7; all ranks try again"),
    ],
)
def test_every_remedy_says_what_happened_and_what_is_done(this: Fault, starts: str) -> None:
    """One sentence for people: it stands in the progress line, in the events and in the report."""
    assert decided(this, spares=[ON_A, ON_B, ON_C]).sentence.startswith(starts)
