"""Alive and stuck, or only slow: what two looks at the ranks of a run mean. Values; no process, no clock."""

import queue
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol import stuck
from rayfold.faulttol.stuck import (
    Finding,
    Frame,
    Look,
    Seen,
    Told,
    doing,
    judge,
    place,
)

ROOT = stuck.__file__.removesuffix("/faulttol/stuck.py")
SITE = "/usr/lib/site-packages"
TRAINER = Frame(f"{ROOT}/runtime/trainer.py", 220, "_one_step")
STEP = Frame(f"{ROOT}/runtime/step.py", 150, "_forward_backward")
FORWARD = Frame("/home/me/paced.py", 25, "forward")
TROUBLE = Frame("/home/me/paced.py", 44, "make_trouble")
LINEAR = Frame(f"{SITE}/torch/nn/modules/linear.py", 134, "forward")
BACKWARD = Frame(f"{SITE}/torch/autograd/graph.py", 800, "_engine_run_backward")
C10D = Frame(f"{SITE}/torch/distributed/distributed_c10d.py", 3000, "all_reduce")
WAIT = Frame(f"{ROOT}/runtime/step.py", 214, "_wait")
SHIFT = Frame(f"{ROOT}/parallel/collectives.py", 55, "wait")
LOADER = Frame(f"{ROOT}/runtime/data/loader.py", 96, "_wait")
BARRIER = Frame(f"{ROOT}/faulttol/snapshot.py", 120, "barrier")
QUEUE = Frame(queue.__file__, 180, "get")
LOCK = Frame(threading.__file__, 324, "wait")
DYNAMO = Frame(f"{SITE}/torch/_dynamo/convert_frame.py", 700, "_compile")
COMPILED = Frame(f"{SITE}/torch/_dynamo/eval_frame.py", 900, "_fn")

IN_FORWARD = (FORWARD, STEP, TRAINER)
ASLEEP_IN_FORWARD = (TROUBLE, *IN_FORWARD)
IN_EXCHANGE = (C10D, STEP, TRAINER)
QUIET_S = 2.1


def test_an_exchange_within_compiled_code_is_one() -> None:
    """It has no frame of its own; the recorder of exchanges tells. The user's line is further out."""
    frames = (Frame("/tmp/torchinductor_me/ab/cab.py", 55, "call"), COMPILED, *IN_FORWARD)
    assert (doing(frames, "gloo:all_reduce"), doing(frames)) == ("waits", "computes")
    assert place(frames) == FORWARD


@pytest.mark.parametrize(
    ("frames", "does", "at"),
    [
        (IN_FORWARD, "computes", FORWARD),
        (ASLEEP_IN_FORWARD, "computes", TROUBLE),
        ((LINEAR, *IN_FORWARD), "computes", FORWARD),
        ((BACKWARD, STEP, TRAINER), "computes", STEP),
        (IN_EXCHANGE, "waits", STEP),
        ((C10D, BACKWARD, STEP, TRAINER), "waits", STEP),
        ((C10D, *IN_FORWARD), "waits", FORWARD),  # an exchange of the user's own
        ((WAIT, STEP, TRAINER), "waits", WAIT),
        ((SHIFT, STEP, TRAINER), "waits", SHIFT),
        ((LOCK, QUEUE, LOADER, TRAINER), "reads", LOADER),
        ((LOCK, BARRIER, TRAINER), "computes", BARRIER),
        ((DYNAMO, COMPILED, *IN_FORWARD), "compiles", FORWARD),
        ((COMPILED, *IN_FORWARD), "computes", FORWARD),
        ((), "computes", None),
    ],
)
def test_what_a_thread_does_follows_from_where_it_is(
    frames: tuple[Frame, ...], does: str, at: Frame | None
) -> None:
    """The user's own line is named where there is one, and otherwise ours: never a library's."""
    assert doing(frames) == does
    assert place(frames) == at


def told(frames: Sequence[Frame], *, cpu_s: float = 0.0, **more: Any) -> Told:
    return Told(**({"step": 7, "phase": "training", "frames": tuple(frames), "cpu_s": cpu_s} | more))


WAITING = told(IN_EXCHANGE)
IDLE = Seen("S", 5.0)


def look(*ranks: Told | None, at_s: float = 0.0, seen: Seen = IDLE) -> Look:
    """What each rank told; all processes look alike from outside."""
    answers = {rank: one for rank, one in enumerate(ranks) if one is not None}
    return Look(at_s=at_s, told=answers, seen=dict.fromkeys(range(len(ranks)), seen))


def judged(before: Sequence[Told | None], now: Sequence[Told | None], **seen: Seen) -> Finding | None:
    """Two looks a second apart."""
    first = look(*before, seen=seen.get("seen", IDLE))
    second = look(*now, at_s=1.0, seen=seen.get("then", seen.get("seen", IDLE)))
    return judge(first, second, ranks=range(len(now)), quiet_s=QUIET_S)


SLEEPS = told(ASLEEP_IN_FORWARD)
LOOPS = (told(IN_FORWARD, state="R"), told(IN_FORWARD, state="R", cpu_s=0.95))


@pytest.mark.parametrize(
    ("before", "now", "ranks", "says"),
    [
        (
            (WAITING, SLEEPS, WAITING, WAITING),
            (WAITING, SLEEPS, WAITING, WAITING),
            (1,),
            "has been in paced.py:44 (make_trouble) for 2.1 s in step 7 while the 3 others wait for it: ",
        ),
        ((LOOPS[0], WAITING), (LOOPS[1], WAITING), (0,), "has been in paced.py:25 (forward) for 2.1 s"),
        (
            (SLEEPS, SLEEPS, WAITING),
            (SLEEPS, SLEEPS, WAITING),
            (0, 1),
            "have been in paced.py:44 (make_trouble) for 2.1 s in step 7 while the other waits for them",
        ),
        (
            (WAITING, None),
            (WAITING, None),
            (1,),
            "has answered nothing for 2.1 s in step 7 while the other waits for it: native code holds ",
        ),
        (
            (WAITING, told((BACKWARD, STEP, TRAINER))),
            (WAITING, told((BACKWARD, STEP, TRAINER))),
            (1,),
            "has been in step.py:150 (_forward_backward)",
        ),
    ],
)
def test_who_stands_still_while_the_others_wait_is_stuck(
    before: Sequence[Told | None], now: Sequence[Told | None], ranks: tuple[int, ...], says: str
) -> None:
    """Asleep, in a loop, or with an interpreter that native code holds: the place is named."""
    found = judged(before, now)
    assert found is not None
    assert (found.kind, found.ranks, found.step) == ("stuck", ranks, 7)
    assert found.message.startswith(says)
    assert found.message.endswith("alive but stuck")


BUSY, HALTED, DISK = Seen("R", 5.0), Seen("T", 5.0), Seen("D", 5.0)
ELSEWHERE = told((FORWARD, STEP, TRAINER))


@pytest.mark.parametrize(
    ("before", "now", "seen"),
    [
        ((SLEEPS, SLEEPS), (SLEEPS, SLEEPS), {}),  # all alike: a slow step
        ((WAITING, SLEEPS), (WAITING, ELSEWHERE), {}),  # it moves
        ((WAITING, SLEEPS), (WAITING, replace(SLEEPS, step=8)), {}),
        ((WAITING, SLEEPS), (WAITING, WAITING), {}),  # it came
        ((WAITING, SLEEPS), (WAITING, replace(SLEEPS, begun=41)), {}),  # the next of many small exchanges
        ((WAITING, SLEEPS, SLEEPS), (WAITING, SLEEPS, ELSEWHERE), {}),  # another rank is on its way
        ((WAITING, SLEEPS), (told(IN_EXCHANGE, cpu_s=0.9), SLEEPS), {}),  # copies, in an exchange's code
        ((WAITING, LOOPS[0]), (WAITING, replace(LOOPS[1], cpu_s=0.1)), {}),  # others have the processor
        ((WAITING, replace(SLEEPS, state="R")), (WAITING, replace(SLEEPS, state="R")), {}),
        ((WAITING, replace(SLEEPS, state="D")), (WAITING, replace(SLEEPS, state="D")), {}),  # swapped out
        ((WAITING, told((DYNAMO, *IN_FORWARD))), (WAITING, told((DYNAMO, *IN_FORWARD))), {}),
        ((WAITING, replace(SLEEPS, phase="validating")), (WAITING, SLEEPS), {}),
        ((WAITING, SLEEPS), (replace(WAITING, phase="saving a checkpoint"), SLEEPS), {}),
        ((WAITING, Told(step=0, phase="idle")), (WAITING, Told(step=0, phase="idle")), {}),
        ((WAITING, None), (WAITING, SLEEPS), {}),  # late with its answer
        ((WAITING, SLEEPS), (WAITING, None), {}),
        ((WAITING, None), (WAITING, None), {"seen": BUSY}),  # it had no processor to answer with
        ((WAITING, None), (WAITING, None), {"seen": HALTED}),  # the watch of processes tells that
        ((WAITING, None), (WAITING, None), {"seen": Seen("", 0.0)}),  # and that it is dead
        ((WAITING, None), (WAITING, None), {"seen": DISK}),
        ((None, None), (None, None), {}),  # nobody waits
        ((SLEEPS,), (SLEEPS,), {}),  # a run of one rank keeps nobody waiting
        ((WAITING, WAITING), (WAITING, WAITING), {"then": Seen("S", 5.5)}),  # bytes are on their way
    ],
)
def test_who_is_only_slow_is_let_be(
    before: Sequence[Told | None], now: Sequence[Told | None], seen: dict[str, Seen]
) -> None:
    """A false alarm ends a process that was about to come."""
    assert judged(before, now, **seen) is None


def test_a_silent_rank_of_which_nobody_knows_more_is_let_be() -> None:
    """Without the kernel's word a busy machine looks the same."""
    before, now = (Look(at_s=at, told={0: WAITING}, seen={0: IDLE}) for at in (0.0, 1.0))
    assert judge(before, now, ranks=[0, 1], quiet_s=QUIET_S) is None


def test_a_native_loop_that_holds_the_interpreter_is_stuck_too() -> None:
    """It has all the processor it wants and answers nobody."""
    found = judged((WAITING, None), (WAITING, None), seen=BUSY, then=Seen("R", 5.95))
    assert found is not None
    assert found.ranks == (1,)


def test_all_waiting_is_a_connection_that_hangs_and_no_rank_s_fault() -> None:
    """Nobody can be replaced for it: told with the exchange, and left to the timeout of collectives."""
    waits = replace(WAITING, pending="gloo:all_reduce")
    found = judged((waits, waits), (waits, waits))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (0, 1))
    assert found.message.startswith(
        "all 2 ranks wait for each other in gloo:all_reduce in step 7, and nothing"
    )


def test_waiting_for_data_is_told_as_that() -> None:
    """Another process would read the same files, so none is put in its place."""
    reads = told((LOCK, QUEUE, LOADER, TRAINER))
    found = judged((WAITING, reads), (WAITING, reads))
    assert found is not None
    assert (found.kind, found.ranks) == ("data", (1,))
    assert found.message == "rank 1 has waited for data for 2.1 s in step 7, and the other waits for it"


def drawn(rng: random.Random, kind: str) -> tuple[Told | None, Told | None]:
    """Two looks a second apart at a rank that does what `kind` says, in one of its ways."""
    base = rng.uniform(0.0, 100.0)
    ours = rng.choice([IN_EXCHANGE, (WAIT, STEP, TRAINER), (C10D, BACKWARD, STEP, TRAINER)])
    users = [Frame("/home/me/net.py", rng.randrange(1, 900), f"layer_{n}") for n in range(6)]
    depth = rng.randrange(1, 6)
    inner = (LINEAR,) * rng.randrange(2)
    at = (*inner, *users[:depth], STEP, TRAINER)
    match kind:
        case "waits":
            return told(ours, cpu_s=base), told(ours, cpu_s=base + rng.uniform(0.0, 0.06))
        case "sleeps":
            return told(at, cpu_s=base), told(at, cpu_s=base + rng.uniform(0.0, 0.06))
        case "loops":
            other = (*inner, replace(users[0], line=rng.randrange(1, 900)), *users[1:depth], STEP, TRAINER)
            return told(at, state="R", cpu_s=base), told(other, state="R", cpu_s=base + rng.uniform(0.3, 1.0))
        case "moves":
            there = (*inner, Frame("/home/me/net.py", 5, "head"), STEP, TRAINER)
            return told(at, cpu_s=base), told(there, cpu_s=base + rng.uniform(0.0, 1.0))
        case "starves":
            state = rng.choice(["R", "D"])
            return told(at, state=state, cpu_s=base), told(at, state=state, cpu_s=base + rng.uniform(0, 0.2))
        case "compiles":
            compiling = (*inner, DYNAMO, *at)
            return told(compiling, cpu_s=base), told(compiling, cpu_s=base + rng.uniform(0.0, 1.0))
        case "validates":
            phase = rng.choice(["validating", "saving a checkpoint", "restoring the state", "idle"])
            return told(at, cpu_s=base, phase=phase), told(at, cpu_s=base, phase=phase)
        case _:
            return None, None


INNOCENT = ["moves", "starves", "compiles", "validates"]


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.sampled_from(["waits"] * 3 + ["sleeps", "loops", "silent", *INNOCENT]), min_size=2, max_size=8
    ),
    st.randoms(use_true_random=False),
)
def test_only_ranks_that_stand_still_are_ever_named(kinds: list[str], rng: random.Random) -> None:
    """Whatever runs beside them: with one rank on its way there is no verdict, and without one all that
    stand still are named, and no other.
    """
    ranks = [drawn(rng, kind) for kind in kinds]
    found = judged([before for before, _ in ranks], [now for _, now in ranks])
    stand = tuple(r for r, kind in enumerate(kinds) if kind in ("sleeps", "loops", "silent"))
    if stand and "waits" in kinds and not set(kinds) & set(INNOCENT):
        assert found is not None
        assert (found.kind, found.ranks) == ("stuck", stand)
    else:
        assert found is None or found.kind == "hang"
