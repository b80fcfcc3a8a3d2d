"""Verdicts: the first cause among failures that mostly follow from one another, in one sentence.

Tables of (failures, missing) -> verdict; no process, no clock.
"""

import json
import linecache
from collections.abc import Callable

import pytest

from rayfold.faulttol.verdict import Failure, decide, failure_of, user_frames
from rayfold.models.registry import ModelError, load_factory


def failure(rank: int, kind: str, message: str, time_unix: float, *, step: int = 5) -> Failure:
    return Failure(rank=rank, step=step, kind=kind, message=message, time_unix=time_unix)


GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23521"
BAD = failure(2, "ValueError", "loss is NaN", 10.0)
LATE = failure(0, "RuntimeError", GLOO, 10.5)
EARLY = failure(1, "RuntimeError", GLOO, 9.0)  # told before the culprit: clocks and messages are late
DEAD = failure(3, "died", "its process was killed by signal 9", 11.0)
TIMED_OUT = failure(0, "RuntimeError", "Timed out waiting 600000ms for send operation to complete", 20.0)
BACKEND = failure(1, "DistBackendError", "NCCL error: remote process exited", 9.0)
STUCK = failure(2, "stuck", "has been in paced.py:25 (forward) for 8.2 s in step 5: alive but stuck", 9.5)
NO_MEMORY = failure(2, "RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to ...", 9.0)
NOT_COMM = failure(1, "RuntimeError", "shape mismatch: [2, 3] and [3, 2]", 12.0)


@pytest.mark.parametrize(
    ("failures", "missing", "rank", "cls"),
    [
        ([BAD], {}, 2, "exception"),
        ([LATE, BAD], {}, 2, "exception"),
        ([EARLY, BAD, LATE], {}, 2, "exception"),
        ([BACKEND, BAD], {}, 2, "exception"),
        ([EARLY, LATE, DEAD], {}, 3, "died"),
        ([BAD, DEAD], {}, 2, "exception"),
        ([DEAD, NOT_COMM], {}, 3, "died"),
        ([NOT_COMM, EARLY], {}, 1, "exception"),
        ([EARLY, LATE], {}, 1, "exception"),
        ([BAD], {0: True, 1: True}, 2, "exception"),
        ([DEAD], {0: False}, 3, "died"),
        ([TIMED_OUT], {1: True}, 1, "silent"),
        ([TIMED_OUT], {1: False}, 1, "silent"),
        ([EARLY, LATE], {2: False}, 2, "silent"),
        ([STUCK], {}, 2, "stuck"),
        ([NO_MEMORY, EARLY], {}, 2, "oom"),
        ([failure(2, "OutOfMemoryError", "CUDA out of memory. Tried ...", 9.0)], {}, 2, "oom"),
        ([failure(2, "MemoryError", "", 9.0)], {}, 2, "oom"),
        ([STUCK, EARLY, LATE], {}, 2, "stuck"),
    ],
)
def test_the_first_cause_is_named(
    failures: list[Failure], missing: dict[int, bool], rank: int, cls: str
) -> None:
    """A lost peer is a consequence; a failure of its own is a cause; among equals the earlier."""
    for order in (failures, failures[::-1]):
        verdict = decide(order, missing=missing)
        assert (verdict.ranks, verdict.cls) == ([rank], cls)
        assert f"rank {rank}" in verdict.sentence
        assert "step 5" in verdict.sentence
        assert "\n" not in verdict.sentence


def test_the_others_are_evidence() -> None:
    """Who failed after the culprit is worth knowing, and worth no more."""
    verdict = decide([LATE, BAD, EARLY])
    assert verdict.evidence["followed_by_ranks"] == [0, 1]
    assert verdict.evidence["exception"] == "ValueError"


@pytest.mark.parametrize(("answers", "how"), [(True, "stuck"), (False, "does not answer")])
def test_a_hang_tells_the_stuck_from_the_gone(answers: bool, how: str) -> None:
    """A process that still answers needs a debugger, one that does not needs a new machine."""
    verdict = decide([TIMED_OUT], missing={2: answers, 1: answers})
    assert verdict.ranks == [1, 2]
    assert "ranks 1, 2" in verdict.sentence
    assert how in verdict.sentence
    assert verdict.evidence["answers"] == {"1": answers, "2": answers}


def test_before_the_first_step_is_said_so() -> None:
    """Step 0 is no step."""
    assert "before the first step" in decide([failure(0, "ValueError", "x", 1.0, step=0)]).sentence


def test_a_verdict_is_an_event() -> None:
    """events.jsonl carries sentence, ranks, class and evidence as plain JSON."""
    event = decide([BAD, LATE]).as_event()
    assert json.loads(json.dumps(event)) == event
    assert event.keys() == {"sentence", "ranks", "class", "evidence"}


def raised_by(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_failure_keeps_what_dies_with_the_process() -> None:
    """Type, message, step and the user's own line survive; an empty message becomes the type."""

    def users_model() -> None:
        raise ValueError("no batch\nleft")

    def users_silence() -> None:
        raise KeyError

    made = failure_of(raised_by(users_model), rank=3, step=7, time_unix=1.5)
    assert (made.rank, made.step, made.kind, made.time_unix) == (3, 7, "ValueError", 1.5)
    assert "users_model" in made.frames[-1]
    assert f"{__file__}:" in made.frames[-1]
    assert "Traceback" in made.traceback
    assert "no batch left" in decide([made]).sentence
    assert __file__ in decide([made]).sentence
    empty = failure_of(raised_by(users_silence), rank=0, step=0, time_unix=0)
    assert empty.message == "KeyError()"


def test_frames_of_libraries_are_left_out() -> None:
    """A user reads their own line first, not torch's last."""

    def calls_library() -> None:
        json.loads("{")

    frames = user_frames(raised_by(calls_library).__traceback__)
    assert "calls_library" in frames[-1]
    assert not any("json" in frame.split(":")[0] for frame in frames)
    linecache.clearcache()
    only_library = raised_by(calls_library).__traceback__
    assert only_library is not None
    while only_library.tb_next is not None:
        only_library = only_library.tb_next
    assert len(user_frames(only_library)) == 1


def test_an_error_that_every_rank_raises_alike_is_nobodys_own() -> None:
    """Unreadable data is no fault of rank 0; blaming it would send its owner to look at a machine."""
    failures = [
        Failure(rank=rank, step=0, kind="DataError", message="no text", time_unix=10.0 - rank)
        for rank in (1, 0)
    ]
    verdict = decide(failures)
    assert verdict.ranks == [0, 1]
    assert verdict.sentence == "ranks 0, 1 failed before the first step: DataError: no text"
    assert verdict.evidence["followed_by_ranks"] == []


def test_an_error_of_rayfolds_own_names_no_line_of_it() -> None:
    """Its message says what to do; a path into the library says nothing to a user."""
    with pytest.raises(ModelError) as caught:
        load_factory("no_such_module:build", {})
    assert failure_of(caught.value, rank=0, step=0, time_unix=0.0).frames == []
