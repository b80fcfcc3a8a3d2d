"""Where the thread that trains is, told by another thread of its process."""

import json
import sys
import time

from ..faulttol.stuck import Frame, Told
from .watch import thread_state

DEEPEST = 200  # frames that are told of a thread; a model's modules take two or three each


def sight(thread: int, native: int, *, step: int, phase: str) -> Told:
    """Where a thread of this process is: `thread` is its id in Python, `native` the kernel's."""
    frames: list[Frame] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and len(frames) < DEEPEST:
        code = frame.f_code
        frames.append(Frame(code.co_filename, frame.f_lineno or 0, code.co_name))
        frame = frame.f_back
    begun, pending = _exchanges()
    return Told(
        step=step,
        phase=phase,
        frames=tuple(frames),
        cpu_s=time.clock_gettime(time.pthread_getcpuclockid(thread)),
        state=thread_state("self", native),
        begun=begun,
        pending=pending,
    )


def _exchanges() -> tuple[int, str]:
    """How many exchanges this process has entered, and the name of the last if it is under way, from the
    recorder that torch keeps for every group; (0, "") where it keeps none.
    """
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    entries = json.loads(dump(includeCollectives=True)).get("entries", []) if dump is not None else []
    if not entries:
        return 0, ""
    last = max(entries, key=lambda entry: int(entry["record_id"]))
    over = last["retired"] or last["state"] == "completed"
    return int(last["record_id"]) + 1, "" if over else last["profiling_name"]
