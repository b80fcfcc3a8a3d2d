"""What the folder of a run says, read for people: whole lines as columns, and notes on what could not be
read.
"""

import difflib
import json
import math
import tomllib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .chart import Array

KEYS = (
    *("time_unix", "step", "attempt", "loss", "val_loss", "val_bits_per_byte", "grad_norm", "lr", "tokens"),
    *("tokens_per_s", "step_time_s", "data_wait_s", "snapshot_stall_s", "exposed_comm_s"),
    *("memory_bytes", "mfu"),
)
Record = Mapping[str, Any]


class ReportError(ValueError):
    """There is no run to report on, or no place to write to; the message names the nearest one."""


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What a run directory says. `train` and `val`: an array for each key of metrics.jsonl, NaN if absent."""

    name: str
    start: float  # unix time of the first thing known
    train: dict[str, Array]
    val: dict[str, Array]
    events: Sequence[Record]
    summary: Record
    campaign: Record  # promises and outcomes of faults on purpose; empty where there were none
    config: str
    notes: Sequence[str]  # what could not be read


def read_run(run_dir: Path) -> RunLog:
    """Everything the run directory holds; only metrics.jsonl must be there. What `rayfold chaos` injected is
    told among the events, as a fault.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise ReportError(_no_run(run_dir))
    notes: list[str] = []
    trained, validated = array("d"), array("d")
    for record in _json_lines(run_dir / "metrics.jsonl", notes):
        values = [as_number(record.get(key)) for key in KEYS]
        validation = "val_loss" in record or "val_bits_per_byte" in record
        if validation:
            validated.extend(values)
        if "loss" in record or not validation:
            trained.extend(values)
    train, val = _columns(trained), _columns(validated)
    told = (line for name in ("events.jsonl", "chaos.jsonl") for line in _json_lines(run_dir / name, notes))
    events = sorted(told, key=lambda e: float(e["time_unix"]))
    config = _text(run_dir / "config.toml")
    times = np.concatenate([train["time_unix"], val["time_unix"], [e["time_unix"] for e in events[:1]]])
    return RunLog(
        name=_run_name(config) or run_dir.resolve().name,
        start=float(times.min(initial=math.inf)) if len(times) else 0.0,
        train=train,
        val=val,
        events=events,
        summary=_summary(run_dir / "summary.json", notes, last_step=train["step"].max(initial=0.0)),
        campaign=_object(run_dir / "chaos.json", notes),
        config=config,
        notes=notes,
    )


def _json_lines(path: Path, notes: list[str]) -> Iterator[Record]:
    """The objects of a file that have a time (metrics: and a step); other lines are counted in `notes`."""
    needed = ("time_unix", "step") if path.name == "metrics.jsonl" else ("time_unix",)
    bad: list[int] = []
    number = 0
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):
                    record = ()
                if isinstance(record, dict) and all(math.isfinite(as_number(record.get(k))) for k in needed):
                    yield record
                elif record is not None:
                    bad.append(number)
    if bad:
        lines_said = "1 line" if len(bad) == 1 else f"{len(bad):,} lines"
        why = "the last one, cut off while being written" if bad == [number] else f"first: line {bad[0]:,}"
        notes.append(f"{lines_said} of {path.name} could not be read ({why}).")


def as_number(value: object) -> float:
    """A JSON number as a float; NaN for anything else, and for what is so large that arithmetic overflows."""
    if type(value) is float or type(value) is int:  # exact types: true is no number
        return float(value) if -1e300 < value < 1e300 else math.nan
    return math.nan


def _columns(rows: "array[float]") -> dict[str, Array]:
    table = np.frombuffer(rows, dtype=np.float64).reshape(-1, len(KEYS)) if rows else np.empty((0, len(KEYS)))
    return {key: table[:, i].copy() for i, key in enumerate(KEYS)}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _summary(path: Path, notes: list[str], *, last_step: float) -> Record:
    """The summary, unless the run went on after it was written."""
    found = _object(path, notes)
    if (steps := as_number(found.get("steps"))) < last_step:
        notes.append(f"{path.name} ends at step {steps:,.0f}, but the run went on after it: it is left out.")
        return {}
    return found


def _object(path: Path, notes: list[str]) -> Record:
    """The JSON object in a file; empty where there is no file, or none in it, which is noted."""
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} could not be read.")
        return {}
    return found


def _run_name(config: str) -> str:
    try:
        section = tomllib.loads(config).get("run")
    except tomllib.TOMLDecodeError:
        return ""
    return str(section.get("name") or "") if isinstance(section, dict) else ""


def _no_run(run_dir: Path) -> str:
    what = "There is no folder" if not run_dir.exists() else "There is no metrics.jsonl in"
    said = f"{what} {run_dir}, so there is no run to report on."
    folders = [run_dir.parent]
    for parent in (run_dir.parent, run_dir):
        folders += sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    names = {folder.name: folder for folder in reversed(folders) if (folder / "metrics.jsonl").is_file()}
    if not names:
        return f"{said} No folder beside it holds one either; name the folder that `run.dir` names."
    nearest = difflib.get_close_matches(run_dir.name, names, n=1, cutoff=0.0)
    return f"{said} The nearest run is {names[nearest[0]] if nearest else next(iter(names.values()))}."
