"""From what went wrong on the ranks to one sentence: who, where, when, why.

When a rank fails its peers fail too, later, with "connection closed". The verdict names the first cause: a
failure that is no consequence of a lost peer comes before one that is, and among equals the earlier comes
first.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FRAMES_SHOWN = 3
_PEER_KINDS = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "NonFinitePeer"})
# how gloo and NCCL report a peer that left or does not come; a user's own "timed out" is none of them
_PEER_LOST = re.compile(
    r"gloo|nccl|process ?group|connection (closed|reset) by peer|timed out waiting \d+ ?ms|socket closed"
    r"|pair closure",
    re.IGNORECASE,
)
_MEMORY_KINDS = frozenset({"MemoryError", "OutOfMemoryError"})
_NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory", re.IGNORECASE)
_ROOT = Path(__file__).resolve().parents[1]
_OWN_FOLDERS = tuple(
    f"{_ROOT / name}{os.sep}" for name in ("cluster", "faulttol", "kernels", "models", "parallel", "runtime")
)
GENERATED = "/torchinductor_"  # code that torch's compiler has written
_LIBRARIES = (
    "site-packages",
    "dist-packages",
    "<frozen",
    GENERATED,
    f"{sys.prefix}/lib/python",
    f"{sys.base_prefix}/lib/python",
)


@dataclass(frozen=True)
class Failure:
    """One rank's end: an exception, a death that left none, or a stop from which it tells nothing."""

    rank: int
    step: int
    kind: str  # the exception's type, "died", "stopped" or "stuck"
    message: str
    time_unix: float
    frames: list[str] = field(default_factory=list)  # last frames in the user's code, innermost last
    traceback: str = ""

    @property
    def lost_peer(self) -> bool:
        """Whether this looks like the consequence of what happened on another rank."""
        if self.kind in _PEER_KINDS:
            return True
        return self.kind == "RuntimeError" and _PEER_LOST.search(self.message) is not None

    @property
    def out_of_memory(self) -> bool:
        """Whether an allocation failed, on whatever device."""
        if self.kind in _MEMORY_KINDS:
            return True
        return self.kind == "RuntimeError" and _NO_MEMORY.search(self.message) is not None


@dataclass(frozen=True)
class Verdict:
    """What ended a run, for people (`sentence`) and for programs."""

    sentence: str
    ranks: list[int]
    cls: str  # a kind of failure, or "start", "disk" or "controller"
    step: int
    evidence: dict[str, Any]

    def as_event(self) -> dict[str, Any]:
        """The fields of a `verdict` event."""
        values = asdict(self)
        return {
            "sentence": self.sentence,
            "ranks": self.ranks,
            "class": self.cls,
            "evidence": values["evidence"],
        }


def failure_of(error: BaseException, *, rank: int, step: int, time_unix: float) -> Failure:
    """Describe an exception as a value that survives the process."""
    return Failure(
        rank=rank,
        step=step,
        kind=type(error).__name__,
        message=str(error).strip() or repr(error),
        time_unix=time_unix,
        frames=user_frames(error.__traceback__),
        traceback="".join(traceback.format_exception(error)),
    )


def user_frames(trace: TracebackType | None) -> list[str]:
    """The innermost frames that are not a library's; all frames count when every one is.

    None when Rayfold itself raised: its message says what to do, and where it was raised says nothing more.
    """
    frames = traceback.extract_tb(trace)
    if frames and is_own(frames[-1].filename):
        return []
    own = [f for f in frames if not is_library(f.filename)] or list(frames)
    return [f"{f.filename}:{f.lineno} in {f.name}: {(f.line or '').strip()}" for f in own[-FRAMES_SHOWN:]]


def is_own(filename: str) -> bool:
    """Whether a source file is Rayfold's."""
    return filename.startswith(_OWN_FOLDERS)


def is_library(filename: str) -> bool:
    """Whether it is a library's, the standard one and the interpreter's own among them."""
    return any(part in filename for part in _LIBRARIES)


def decide(failures: Iterable[Failure], *, missing: Mapping[int, bool] | None = None) -> Verdict:
    """Name the first cause among the failures of a run (at least one).

    `missing` are the ranks that have not failed, and whether each still answers: when all that failed only
    lost a peer, the missing ones are the culprits.
    """
    ranked = sorted(failures, key=lambda f: (f.lost_peer, f.time_unix))
    first = ranked[0]
    if first.lost_peer and missing:
        return _hang(first, missing)
    when = f"at step {first.step}" if first.step else "before the first step"
    # an error that every rank raises alike (unreadable data, a model that cannot be built) is nobody's own
    alike = sorted({f.rank for f in ranked if (f.kind, f.message) == (first.kind, first.message)})
    if first.lost_peer:
        alike = [first.rank]
    who = f"rank {alike[0]}" if len(alike) == 1 else f"ranks {', '.join(map(str, alike))}"
    if first.kind == "stuck":
        sentence = f"{who} {first.message}"
    elif first.kind in ("died", "stopped"):
        sentence = f"{who} {'died' if first.kind == 'died' else 'was stopped'} {when}: {first.message}"
    else:
        where = f" ({first.frames[-1]})" if first.frames else ""
        did = "ran out of memory" if first.out_of_memory else "failed"
        sentence = f"{who} {did} {when}: {first.kind}: {_one_line(first.message)}{where}"
    also = sorted({f.rank for f in ranked} - set(alike))
    return Verdict(
        sentence=sentence,
        ranks=alike,
        cls=_class_of(first),
        step=first.step,
        evidence={
            "exception": first.kind,
            "message": first.message,
            "frames": first.frames,
            "traceback": first.traceback,
            "followed_by_ranks": also,
        },
    )


def _class_of(first: Failure) -> str:
    if first.kind in ("died", "stopped", "stuck"):
        return first.kind
    return "oom" if first.out_of_memory else "exception"


def _hang(first: Failure, missing: Mapping[int, bool]) -> Verdict:
    ranks = sorted(missing)
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    how = "is alive but stuck" if all(missing.values()) else "does not answer"
    sentence = (
        f"{who} did not come to step {first.step} ({how}); rank {first.rank} waited until {first.kind}: "
        f"{_one_line(first.message)}"
    )
    evidence = {
        "exception": first.kind,
        "message": first.message,
        "answers": {str(r): missing[r] for r in ranks},
    }
    return Verdict(sentence, ranks, "silent", first.step, evidence)


def _one_line(text: str) -> str:
    return " ".join(text.split())
