"""Alive and without progress: which rank the others wait for, from two looks at all of them.

A rank that hangs fails nowhere, and the timeout of a collective is long, because a slow step must not end a
run. So when a run is out of patience (`pace.py`) all ranks are looked at twice. The culprit is who is not
waiting in an exchange while everybody else is, and has not moved in between: its interpreter answers nobody
(native code holds it), or the thread that trains is at the same place. Whoever moves, compiles, reads data or
was given no processor is slow and not stuck: then there is no verdict, and one looks again later. Values in,
values out: no clock, no process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from .verdict import GENERATED, is_library, is_own

Doing: TypeAlias = Literal["waits", "computes", "compiles", "reads"]

ASLEEP_SHARE = 0.05  # of the time between two looks: a thread that used less of a processor sleeps
STARVED_SHARE = 0.25  # one that wants a processor and had it for less than this is held up by others
TICK_S = 0.02  # the kernel counts in hundredths of a second, at both ends

_COMPILERS = (  # entered by whoever compiles; code that is compiled already runs through other files
    "torch/_dynamo/convert_frame.py",
    "torch/_inductor/graph.py",
    "torch/_inductor/scheduler.py",
    "torch/_inductor/async_compile.py",
    "torch/utils/cpp_extension.py",
    "triton/compiler/",
    "triton/runtime/autotuner.py",
)
_EXCHANGES = ("/torch/distributed/", "/parallel/collectives.py", "/runtime/step.py", "/runtime/snapshots.py")
_READERS = "/runtime/data/"
_PAUSES = ("threading.py", "queue.py")  # of the standard library: who waits there is a frame further out


@dataclass(frozen=True)
class Frame:
    """Where a thread is."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} ({self.function})"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a rank says of itself: asked of a thread beside the one that trains."""

    step: int
    phase: str  # of the trainer; that of a rank which does not train is another than "training"
    frames: tuple[Frame, ...] = ()  # of the thread that trains, innermost first
    cpu_s: float = 0.0  # processor time of that thread
    state: str = "S"  # of that thread as the kernel has it: R where it wants a processor
    begun: int = 0  # exchanges that the process has entered in all
    pending: str = ""  # the last of them, if it is under way


@dataclass(frozen=True)
class Seen:
    """What the kernel says of a process."""

    state: str  # R: one of its threads wants a processor; else of its first: S, D, T, or "" where it is gone
    cpu_s: float  # of all its threads


@dataclass(frozen=True, kw_only=True)
class Look:
    """All ranks at one moment; those that did not answer are not in `told`."""

    at_s: float
    told: Mapping[int, Told]
    seen: Mapping[int, Seen]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why no step ends. A `stuck` rank can be replaced; of the others one can only tell."""

    kind: Literal["stuck", "hang", "data"]
    ranks: tuple[int, ...]
    step: int
    message: str  # for "stuck" what follows the names of the ranks, else a whole sentence
    places: Mapping[int, str] = field(default_factory=dict)  # of all ranks that told theirs
    stacks: Mapping[int, str] = field(default_factory=dict)  # the same in full, innermost frame last


def doing(frames: Sequence[Frame], pending: str = "") -> Doing:
    """What a thread does, from where it is (innermost frame first) and the exchange that is under way."""
    if any(part in frame.file for frame in frames for part in _COMPILERS):
        return "compiles"
    at = next((frame for frame in frames if Path(frame.file).name not in _PAUSES), None)
    if at is None:
        return "computes"
    if GENERATED in at.file:  # exchanges within compiled code have no frame of their own
        return "waits" if pending else "computes"
    if _READERS in at.file and is_own(at.file):
        return "reads"
    if any(part in at.file and (part.startswith("/torch") or is_own(at.file)) for part in _EXCHANGES):
        return "waits"
    return "computes"


def place(frames: Sequence[Frame]) -> Frame | None:
    """The innermost frame in the user's code; where there is none, in ours."""
    users = [frame for frame in frames if not is_own(frame.file) and not is_library(frame.file)]
    ours = [frame for frame in frames if is_own(frame.file)]
    return next(iter([*users[:1], *ours[:1]]), None)


def judge(before: Look, now: Look, *, ranks: Sequence[int], quiet_s: float) -> Finding | None:
    """Why no step has ended for `quiet_s`; None where nobody is stuck, or nobody can say."""
    if any(told.phase != "training" for look in (before, now) for told in look.told.values()):
        return None  # evaluation, checkpoints and recovery take as long as they take
    kinds = {rank: _kind(rank, before, now) for rank in ranks}
    if any(kind in ("moves", "unknown") for kind in kinds.values()):
        return None
    waiting = [rank for rank in ranks if kinds[rank] == "waits"]
    reading = [rank for rank in ranks if kinds[rank] == "reads"]
    stuck = [rank for rank in ranks if kinds[rank] in ("silent", "still")]
    step = max((told.step for told in now.told.values()), default=0)
    if not waiting or (stuck and reading):
        return None
    if stuck:
        message = _stuck(stuck, kinds, now, others=len(waiting), quiet_s=quiet_s, step=step)
        places = {rank: str(at) for rank in now.told if (at := place(now.told[rank].frames)) is not None}
        stacks = {rank: "\n".join(map(str, reversed(now.told[rank].frames))) for rank in now.told}
        return Finding(
            kind="stuck", ranks=tuple(stuck), step=step, message=message, places=places, stacks=stacks
        )
    if reading:
        message = (
            f"{_names(reading)} {_have(reading)} waited for data for {quiet_s:.1f} s in step {step}, and "
            f"{_others(len(waiting))} {_wait(len(waiting))} for {_it(reading)}"
        )
        return Finding(kind="data", ranks=tuple(reading), step=step, message=message)
    if len(waiting) > 1 and all(_idle(rank, before, now) for rank in waiting):
        names = sorted({told.pending for told in now.told.values()} - {""})
        where = f" in {', '.join(names)}" if names else ""
        message = (
            f"all {len(waiting)} ranks wait for each other{where} in step {step}, and nothing has moved for "
            f"{quiet_s:.1f} s: the connection between them hangs"
        )
        return Finding(kind="hang", ranks=tuple(waiting), step=step, message=message)
    return None


def _kind(rank: int, before: Look, now: Look) -> str:
    """What became of a rank between two looks: it `waits`, `reads`, is `silent` or `still`; or it `moves`, or
    it is `unknown` whether it could have.
    """
    between_s = now.at_s - before.at_s
    first, second = before.told.get(rank), now.told.get(rank)
    if first is None and second is None:
        return "silent" if _could_answer(rank, before, now) else "unknown"
    if first is None or second is None:
        return "unknown"  # late with an answer: a busy machine
    did, does = doing(first.frames, first.pending), doing(second.frames, second.pending)
    used_s = second.cpu_s - first.cpu_s
    asleep = used_s <= ASLEEP_SHARE * between_s + TICK_S
    if (first.step, first.begun) != (second.step, second.begun) or did != does or does == "compiles":
        return "moves"
    if does == "waits":
        return "waits" if asleep else "moves"
    if does == "reads":
        return "reads"
    if _function(first.frames) != _function(second.frames):
        return "moves"
    wants = "R" in (first.state, second.state)
    held_up = "D" in (first.state, second.state) or (wants and used_s < STARVED_SHARE * between_s - TICK_S)
    return "unknown" if held_up else "still"


def _function(frames: Sequence[Frame]) -> tuple[str, str]:
    at = place(frames)
    return (at.file, at.function) if at is not None else ("", "")


def _could_answer(rank: int, before: Look, now: Look) -> bool:
    """Whether a process that did not answer was able to: it had a processor, waits for no disk, and is not
    halted or dead, which others notice.
    """
    if rank not in before.seen or rank not in now.seen:
        return False
    first, second = before.seen[rank], now.seen[rank]
    if any(seen.state not in ("R", "S") for seen in (first, second)):
        return False
    enough_s = STARVED_SHARE * (now.at_s - before.at_s) - TICK_S
    return "R" not in (first.state, second.state) or second.cpu_s - first.cpu_s >= enough_s


def _idle(rank: int, before: Look, now: Look) -> bool:
    """Whether a whole process did nothing: bytes that come in cost a moment each."""
    if rank not in before.seen or rank not in now.seen:
        return False
    used_s = now.seen[rank].cpu_s - before.seen[rank].cpu_s
    return used_s <= ASLEEP_SHARE * (now.at_s - before.at_s) + TICK_S


def _stuck(
    ranks: Sequence[int], kinds: Mapping[int, str], now: Look, *, others: int, quiet_s: float, step: int
) -> str:
    """What follows the names of the ranks that are stuck."""
    where = {str(at) for rank in ranks if rank in now.told and (at := place(now.told[rank].frames))}
    if all(kinds[rank] == "silent" for rank in ranks):
        doing = f"{_have(ranks)} answered nothing"
        why = "native code holds the interpreter, "
    else:
        doing = f"{_have(ranks)} been in {' and '.join(sorted(where)) or 'unknown code'}"
        why = ""
    held_up = f"{_others(others)} {_wait(others)} for {_it(ranks)}"
    return f"{doing} for {quiet_s:.1f} s in step {step} while {held_up}: {why}alive but stuck"


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _have(ranks: Sequence[int]) -> str:
    return "have" if len(ranks) > 1 else "has"


def _it(ranks: Sequence[int]) -> str:
    return "them" if len(ranks) > 1 else "it"


def _wait(count: int) -> str:
    return "waits" if count == 1 else "wait"


def _others(count: int) -> str:
    return "the other" if count == 1 else f"the {count} others"
