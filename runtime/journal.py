"""The written record of a run: metrics.jsonl, events.jsonl and summary.json, one writer for all three.

Lines are appended whole and flushed. A line that a kill cut short is removed when the run goes on. A step
that is trained again carries `attempt`, so no step is ever told twice as the same.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

EventKind = Literal[
    "run_started",
    "formed",
    "snapshot",
    "checkpoint",
    "fault",
    "verdict",
    "remedy",
    "restored",
    "resized",
    "preempted",
    "spares",
    "run_finished",
]
METRICS, EVENTS, SUMMARY = "metrics.jsonl", "events.jsonl", "summary.json"
UNSETTLED_STEPS = 3  # the first steps of a run warm caches; the median speed leaves them out


class Journal:
    """Appends to the record in a run's folder; used by one process at a time."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        for name in (METRICS, EVENTS):
            drop_torn_line(run_dir / name)
        self.last_step = max((line["step"] for line in read_lines(run_dir / METRICS)), default=0)
        self.attempt = 1 + sum(begins_an_attempt(event) for event in read_lines(run_dir / EVENTS))
        self._metrics = open(run_dir / METRICS, "a")  # noqa: SIM115 (closed by close)
        self._events = open(run_dir / EVENTS, "a")  # noqa: SIM115

    def metric(self, values: dict[str, Any]) -> dict[str, Any]:
        """Record one optimizer step; returns the line as written."""
        line = values if values["step"] > self.last_step else values | {"attempt": self.attempt}
        self.last_step = max(self.last_step, values["step"])
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        return line

    def event(self, kind: EventKind, step: int, **fields: Any) -> dict[str, Any]:
        """Record what happened, now or at `time_unix` if that is given; returns the line as written."""
        line = {"time_unix": time.time(), "kind": kind, "step": step, **fields}
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()
        return line

    def summary(self, status: str, **fields: Any) -> dict[str, Any]:
        """Write summary.json from the record and `fields`; returns it."""
        made = {"status": status, **summarise(self._run_dir), **fields}
        write_atomically(self._run_dir / SUMMARY, json.dumps(made, indent=2) + "\n")
        return made

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of lines so far; see `cut_back`."""
        return {
            name: os.fstat(file.fileno()).st_size
            for name, file in ((METRICS, self._metrics), (EVENTS, self._events))
        }

    def flush(self) -> None:
        """Nothing waits: every line is written when it is told."""

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._events.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON lines file; nothing where it does not exist."""
    if path.exists():
        with open(path) as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without an end: its writer was killed in the middle of it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data_end = file.seek(0, os.SEEK_END)
        keep = data_end
        while keep:
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != data_end:
            file.truncate(keep)


def cut_back(run_dir: Path, sizes: Mapping[str, int]) -> None:
    """Remove what was written behind `sizes`, for a writer that died before it could tell that it had."""
    for name, size in sizes.items():
        if (path := run_dir / name).exists() and path.stat().st_size > size:
            os.truncate(path, size)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one instant."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def summarise(run_dir: Path) -> dict[str, Any]:
    """The figures of summary.json that follow from the record alone."""
    lines = list(read_lines(run_dir / METRICS))
    events = list(read_lines(run_dir / EVENTS))
    by_step = {line["step"]: line for line in lines}  # a step trained again counts once, as it came out last
    steps = [by_step[step] for step in sorted(by_step)]
    attempts = sum(begins_an_attempt(event) for event in events)
    wall = _time_at_work(events)
    speeds = [line["tokens_per_s"] for line in steps[UNSETTLED_STEPS:]] or [
        line["tokens_per_s"] for line in steps
    ]
    useful = sum(line["step_time_s"] for line in steps)
    figures: dict[str, Any] = {
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": sum(line["tokens"] for line in steps),
        "first_loss": steps[0]["loss"] if steps else None,
        "final_loss": steps[-1]["loss"] if steps else None,
        "tokens_per_s": statistics.median(speeds) if speeds else 0.0,
        "wall_s": wall,
        "restarts": max(0, attempts - 1),
        "lost_steps": len(lines) - len(by_step),
        "skipped_data": sum(e["count"] for e in events if e.get("class") == "unreadable_data"),
        "goodput": useful / wall if wall else 0.0,
    }
    if validated := [line for line in steps if "val_loss" in line]:
        figures |= {key: validated[-1][key] for key in ("val_loss", "val_bits_per_byte")}
    return figures


def begins_an_attempt(event: dict[str, Any]) -> bool:
    """Whether training begins anew with this event: a start of the command, or ranks that form again within
    one after a fault.
    """
    if event["kind"] == "formed":
        return bool(event.get("epoch", 1) > event.get("epochs_before", 0) + 1)
    return bool(event["kind"] == "run_started")


def _time_at_work(events: list[dict[str, Any]]) -> float:
    """Seconds between each start and the last thing heard of it; the pauses between a kill and a restart do
    not count.
    """
    total, start, last = 0.0, None, 0.0
    for event in events:
        if event["kind"] == "run_started":
            total += last - start if start is not None else 0.0
            start = event["time_unix"]
        last = event["time_unix"]
    return total + (last - start if start is not None else 0.0)
