"""`rayfold report RUN`: one self-contained HTML page on how a run went.

Reads the run directory (metrics.jsonl, events.jsonl, summary.json, config.toml) and no more, so it works
while the run is going, after it was killed, and on another machine. The page needs no network and no script:
both x axes are drawn and CSS switches between them; the inline script adds only the readout under the
pointer. Whatever the files say is escaped, and what could not be read is counted on the page.
"""

import difflib
import json
import math
import os
import statistics
import time
import tomllib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .chart import (
    Array,
    Chart,
    Line,
    Mark,
    Track,
    XAxis,
    clipped,
    compact,
    draw,
    draw_events,
    duration,
    escape,
    is_log,
    shape,
)

KEYS = (
    *("time_unix", "step", "attempt", "loss", "val_loss", "val_bits_per_byte", "grad_norm", "lr", "tokens"),
    *("tokens_per_s", "step_time_s", "data_wait_s", "snapshot_stall_s", "exposed_comm_s"),
    *("memory_bytes", "mfu"),
)
READOUT = (
    *(("loss", "loss"), ("val_loss", "validation loss"), ("lr", "learning rate")),
    ("grad_norm", "gradient norm"),
    *(("tokens_per_s", "tokens/s"), ("step_time_s", "step time, s"), ("data_wait_s", "data wait, s")),
    *(("snapshot_stall_s", "snapshot stall, s"), ("exposed_comm_s", "exposed communication, s")),
)
WAITS = {
    "exposed_comm_s": ("exposed communication", "communication"),
    "snapshot_stall_s": ("snapshot stall", "snapshot"),
    "data_wait_s": ("data wait", "data"),
}
READOUT_ROWS = 800
READABLE_ROWS = 60  # of the event table, before it leaves out what is routine
TABLE_ROWS = 300
REFORMING = ("run_started", "formed", "restored", "resized")  # training did not run through these
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
    config: str
    notes: Sequence[str]  # what could not be read


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `run_dir`, by default to `run_dir/report.html`; returns where it is."""
    page = render(read_run(run_dir))
    out = out or run_dir / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise ReportError(f"The output {out} {problem}. Name a file in a folder that exists.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def read_run(run_dir: Path) -> RunLog:
    """Everything the run directory holds; only metrics.jsonl must be there."""
    if not (run_dir / "metrics.jsonl").is_file():
        raise ReportError(_no_run(run_dir))
    notes: list[str] = []
    trained, validated = array("d"), array("d")
    for record in _json_lines(run_dir / "metrics.jsonl", notes):
        values = [_number(record.get(key)) for key in KEYS]
        validation = "val_loss" in record or "val_bits_per_byte" in record
        if validation:
            validated.extend(values)
        if "loss" in record or not validation:
            trained.extend(values)
    train, val = _columns(trained), _columns(validated)
    events = sorted(_json_lines(run_dir / "events.jsonl", notes), key=lambda e: float(e["time_unix"]))
    config = _text(run_dir / "config.toml")
    times = np.concatenate([train["time_unix"], val["time_unix"], [e["time_unix"] for e in events[:1]]])
    return RunLog(
        name=_run_name(config) or run_dir.resolve().name,
        start=float(times.min(initial=math.inf)) if len(times) else 0.0,
        train=train,
        val=val,
        events=events,
        summary=_summary(run_dir / "summary.json", notes),
        config=config,
        notes=notes,
    )


def render(run: RunLog) -> str:
    """The page as text."""
    marks = _marks(run)
    body = [_header(run), _figures(run), _notes(run), _charts(run, marks), _event_table(run, marks)]
    if run.config:
        body.append(f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · rayfold</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(part for part in body if part)
        + f'\n<script type="application/json" id="readout">{_readout(run)}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
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
                if isinstance(record, dict) and all(math.isfinite(_number(record.get(k))) for k in needed):
                    yield record
                elif record is not None:
                    bad.append(number)
    if bad:
        lines_said = "1 line" if len(bad) == 1 else f"{len(bad):,} lines"
        why = "the last one, cut off while being written" if bad == [number] else f"first: line {bad[0]:,}"
        notes.append(f"{lines_said} of {path.name} could not be read ({why}).")


def _number(value: object) -> float:
    """A JSON number as a float; NaN for anything else, and for what is so large that arithmetic overflows."""
    if type(value) is float or type(value) is int:  # exact types: true is no number
        return float(value) if -1e300 < value < 1e300 else math.nan
    return math.nan


def _columns(rows: "array[float]") -> dict[str, Array]:
    table = np.frombuffer(rows, dtype=np.float64).reshape(-1, len(KEYS)) if rows else np.empty((0, len(KEYS)))
    return {key: table[:, i].copy() for i, key in enumerate(KEYS)}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _summary(path: Path, notes: list[str]) -> Record:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
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


def _track(run: RunLog, table: dict[str, Array], value: Array, *, reforms: Sequence[float] = ()) -> Track:
    """Cut where a step comes again, the clock goes back, or the workers were formed anew."""
    step, at, attempt = table["step"], table["time_unix"], np.nan_to_num(table["attempt"], nan=1.0)
    epoch = np.searchsorted(np.array(reforms, dtype=np.float64), at)
    again, since = np.diff(step) <= 0, np.diff(at) < 0
    cut = again | since | (np.diff(attempt) > 0) | (np.diff(epoch) > 0)
    segment = np.concatenate([[0], np.cumsum(cut)])[: len(step)].astype(np.int64)
    lowest_after = np.minimum.accumulate(np.append(step[1:], np.inf)[::-1])[::-1][: len(step)]
    return Track(time=at - run.start, step=step, value=value, segment=segment, stale=step >= lowest_after)


def _make_charts(run: RunLog) -> list[Chart]:
    reforms = [float(e["time_unix"]) for e in run.events if e.get("kind") in REFORMING]

    def line(label: str, tone: str, value: Array) -> Line:
        return Line(label=label, tone=tone, track=_track(run, run.train, value, reforms=reforms))

    train = run.train
    loss = [line("training loss", "loss", train["loss"])]
    if np.isfinite(run.val["val_loss"]).any():
        track = _track(run, run.val, run.val["val_loss"])
        loss.append(Line(label="validation loss", tone="val", track=track, dots=True))
    waits = [np.where(np.isfinite(train[key]), train[key], 0.0) for key in WAITS]
    areas = [line("compute", "compute", np.maximum(train["step_time_s"] - sum(waits), 0.0))]
    areas += [line(*names, value) for names, value in zip(WAITS.values(), waits, strict=True)]
    charts = [
        Chart(title="Loss", height=220, lines=loss),
        Chart(title="Learning rate", lines=[line("learning rate", "lr", train["lr"])], height=90),
        Chart(title="Gradient norm", lines=[line("gradient norm", "grad", train["grad_norm"])], height=90),
        Chart(
            title="Throughput",
            unit="tokens/s",
            lines=[line("tokens/s", "rate", train["tokens_per_s"])],
            from_zero=True,
        ),
        Chart(
            title="Step time",
            unit="s",
            height=150,
            from_zero=True,
            lines=[line("step time", "total", train["step_time_s"])],
            areas=areas,
        ),
        Chart(
            title="Memory",
            unit="GiB",
            height=80,
            from_zero=True,
            lines=[line("peak memory of a rank", "memory", train["memory_bytes"] / 2**30)],
        ),
    ]
    return [c for c in charts if c.title == "Loss" or np.isfinite(c.lines[0].track.value).any()]


def _marks(run: RunLog) -> list[Mark]:
    marks = []
    for event in run.events:
        at, step = float(event["time_unix"]), _number(event.get("step"))
        if not math.isfinite(step):
            before = run.train["step"][run.train["time_unix"] <= at]
            step = float(before[-1]) if len(before) else 0.0
        kind = str(event.get("kind", "event"))
        text = f"{kind.replace('_', ' ')}, step {step:,.0f}, {duration(at - run.start)}: {_describe(event)}"
        marks.append(Mark(kind=kind, time=at - run.start, step=step, text=text.removesuffix(": ")))
    return marks


def _axes(run: RunLog, marks: Sequence[Mark]) -> list[XAxis]:
    tables = (run.train, run.val)
    times = np.concatenate([*(t["time_unix"] - run.start for t in tables), [m.time for m in marks]])
    steps = np.concatenate([*(t["step"] for t in tables), [m.step for m in marks]])
    first, last = float(steps.min()), float(steps.max())
    by_time = XAxis(name="time", lo=0.0, hi=float(times.max()) or 1.0)
    return [by_time, XAxis(name="step", lo=first, hi=max(last, first + 1))]


def _charts(run: RunLog, marks: Sequence[Mark]) -> str:
    if not len(run.train["step"]) and not len(run.val["step"]) and not marks:
        return '<p class="empty">No step has been recorded yet.</p>'
    axes = _axes(run, marks)
    figures = []
    for chart in _make_charts(run) if len(run.train["step"]) or len(run.val["step"]) else ():
        drawn = "".join(draw(chart, axis=axis, marks=marks) for axis in axes)
        figures.append(f"<figure><figcaption>{_caption(chart)}</figcaption>{drawn}</figure>")
    if not figures:
        figures.append('<p class="empty">No step has been recorded yet.</p>')
    if marks:
        drawn = "".join(draw_events(marks, axis=axis) for axis in axes)
        figures.append(f"<figure><figcaption><b>Events</b></figcaption>{drawn}</figure>")
    switch = "".join(
        f'<input type="radio" name="axis" id="by-{axis.name}"{" checked" if axis.name == "time" else ""}>'
        f'<label for="by-{axis.name}">{axis.name}</label>'
        for axis in axes
    )
    charts = f'<div class="charts">{"".join(figures)}<div id="cross"></div></div>'
    return f'<main>{switch}{charts}<div id="box"></div></main>'


def _caption(chart: Chart) -> str:
    unit = f" <small>{chart.unit}</small>" if chart.unit else ""
    keys = [*chart.areas, *chart.lines] if len(chart.lines) + len(chart.areas) > 1 else []
    legend = "".join(f'<span class="key tone-{k.tone}">{k.label}</span>' for k in keys)
    said = ["log scale"] if is_log(chart) else []
    peak = clipped(chart)
    said += [f"cut off; highest {compact(peak)} {chart.unit}"] if peak is not None else []
    lost = sum(int((~np.isfinite(line.track.value)).sum()) for line in chart.lines)
    said += [f'<em class="bad">{lost:,} not finite</em>'] if lost else []
    if chart.title == "Loss" and chart.lines[0].track.stale.any():
        said.append("faint: trained again after a recovery")
    return f'<b>{chart.title}</b>{unit}{legend}<span class="said">{" · ".join(said)}</span>'


def _header(run: RunLog) -> str:
    status = str(run.summary.get("status") or "in progress")
    tone = {"finished": "good", "failed": "bad", "in progress": "going"}.get(status, "warn")
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.start)) if run.start else "not started"
    if not run.summary:
        started += " · no summary yet: the run is going on, or was killed"
    verdict = run.summary.get("verdict")
    sentence = str((verdict.get("sentence") if isinstance(verdict, Mapping) else verdict) or "")
    earlier = [e for e in run.events if e.get("kind") == "verdict" and e.get("sentence")]
    said = {str(e["sentence"]): ("warn", f"Verdict at step {_plain(e.get('step'))}") for e in earlier[-3:]}
    if sentence:
        said[sentence] = ("bad" if status == "failed" else "warn", said.get(sentence, ("", "Verdict"))[1])
    banners = "".join(
        f'<p class="verdict {kind}"><small>{escape(lead)}</small>{escape(text)}</p>'
        for text, (kind, lead) in reversed(said.items())
    )
    return (
        f'<header><h1>{escape(run.name)} <span class="status {tone}">{escape(status)}</span></h1>'
        f'<p class="when">Started {started}</p>{banners}</header>'
    )


def _figures(run: RunLog) -> str:
    """The key figures: the summary's where it has them, else what the metrics say so far."""
    train, val, summary = run.train, run.val, run.summary
    kept = ~_track(run, train, train["loss"]).stale
    formed: Record = next((e for e in reversed(run.events) if e.get("kind") == "formed"), {})
    so_far: dict[str, float] = {}
    if len(train["step"]):
        rates = train["tokens_per_s"][3:] if len(train["step"]) > 3 else train["tokens_per_s"]
        rate = statistics.median(rates[np.isfinite(rates)].tolist() or [math.nan])
        so_far = {"steps": train["step"].max(), "tokens": np.nansum(train["tokens"][kept])}
        so_far |= {"final_loss": train["loss"][-1], "tokens_per_s": rate, "mfu": train["mfu"][-1]}
        so_far |= {"wall_s": train["time_unix"].max() - run.start}
    if len(val["step"]):
        so_far |= {"val_loss": val["val_loss"][-1], "val_bits_per_byte": val["val_bits_per_byte"][-1]}
    known = {
        **{key: float(value) for key, value in so_far.items()},
        **formed,
        **{k: v for k, v in summary.items() if v is not None},
    }
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        *(("steps", "steps", lambda v: f"{v:,.0f}"), ("tokens", "tokens", compact)),
        ("final_loss", "final loss" if summary else "loss", compact),
        *(("val_loss", "validation loss", compact), ("val_bits_per_byte", "bits per byte", compact)),
        *(("tokens_per_s", "tokens/s", compact), ("wall_s", "wall time", duration)),
        *(("world_size", "world size", compact), ("layout", "layout", compact)),
        *(("restarts", "restarts", compact), ("lost_steps", "steps lost", compact)),
        *(("goodput", "goodput", lambda v: f"{v:.1%}"), ("mfu", "MFU", lambda v: f"{v:.1%}")),
    ]
    cells = []
    for key, label, say in shown:
        if key not in known or (key == "mfu" and not math.isfinite(_number(known[key]))):
            continue
        value = known[key]
        number = isinstance(value, int | float)
        text = say(_number(value)) if number else _plain(value)
        wide = "" if number else ' class="wide"'
        cells.append(f"<div{wide}><dt>{label}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl>{''.join(cells)}</dl>" if cells else ""


def _plain(value: object) -> str:
    """A value of any JSON type as short text; sizes of one are not worth saying."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_plain(v)}" for k, v in value.items() if v != 1) or "1 rank"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe(event: Record) -> str:
    if event.get("kind") == "verdict" and event.get("sentence"):
        return str(event["sentence"])[:500]
    hidden = ("time_unix", "kind", "step", "nodes", "pids", "evidence")
    said = [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in event.items() if key not in hidden]
    text = " · ".join(said)
    return text if len(text) <= 300 else text[:299] + "…"


def _notes(run: RunLog) -> str:
    said = list(run.notes)
    bad = run.train["step"][~np.isfinite(run.train["loss"])]
    if len(bad):
        steps = "1 step" if len(bad) == 1 else f"{len(bad):,} steps"
        said.append(f"The loss was not finite at {steps}, first at step {bad[0]:,.0f}: see the red ticks.")
    return f'<p class="note">{"<br>".join(map(escape, said))}</p>' if said else ""


def _event_table(run: RunLog, marks: Sequence[Mark]) -> str:
    if not marks:
        return ""
    pairs = list(zip(run.events, marks, strict=True))
    for routine in ("snapshot", "checkpoint"):
        if len(pairs) > READABLE_ROWS:
            pairs = [(event, mark) for event, mark in pairs if mark.kind != routine]
    pairs = pairs[-TABLE_ROWS:]
    rows = "".join(
        f'<tr><td>{duration(m.time)}</td><td>{m.step:,.0f}</td><td><svg class="icon">{shape(m.kind)}</svg>'
        f"{escape(m.kind.replace('_', ' '))}</td><td>{escape(_describe(e))}</td></tr>"
        for e, m in pairs
    )
    left = len(marks) - len(pairs)
    more = f'<p class="note">{left:,} more, routine or earlier, are only on the charts.</p>' if left else ""
    head = "<tr><th>time</th><th>step</th><th>event</th><th></th></tr>"
    return f'<section><h2>Events</h2><div class="scroll"><table>{head}{rows}</table></div>{more}</section>'


def _readout(run: RunLog) -> str:
    """Evenly spread steps for the readout, as JSON: numbers and our own labels, so nothing to escape."""
    count = len(run.train["step"])
    chosen = np.unique(np.linspace(0, count - 1, min(count, READOUT_ROWS)).round().astype(np.int64))
    table = {key: run.train[key][chosen] for key, _ in READOUT}
    if count and len(run.val["step"]):  # the last validation up to each step
        latest = np.searchsorted(run.val["time_unix"], run.train["time_unix"][chosen], side="right") - 1
        table["val_loss"] = np.where(latest >= 0, run.val["val_loss"][np.maximum(latest, 0)], np.nan)
    columns = [run.train["time_unix"][chosen] - run.start, run.train["step"][chosen], *table.values()]
    rows = [
        [float(f"{v:.6g}") if math.isfinite(v) else None for v in row] for row in zip(*columns, strict=True)
    ]
    return json.dumps({"names": [label for _, label in READOUT], "rows": rows}, separators=(",", ":"))


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#667085;--edge:#e3e7ee;
--grid:#eef0f4;--loss:#2f6bea;--val:#e8780c;--lr:#8450d8;--grad:#0e9aa7;--rate:#1f9d57;--memory:#0e8fb8;
--compute:#9db8ea;--communication:#ef7d72;--snapshot:#a98be8;--data:#f2bd42;--good:#1a8f4c;--bad:#d3312f;
--warn:#b86e00;--going:#2f6bea}@media(prefers-color-scheme:dark){:root{--page:#0f1319;--card:#171d26;
--ink:#e6eaf1;--soft:#93a0b4;--edge:#29313d;--grid:#222a35;--loss:#6d9dff;--val:#ff9f45;--lr:#b28cff;
--grad:#3fc5d0;--rate:#4dcb86;--memory:#48bfe6;--compute:#3f5f9c;--communication:#d9665c;--snapshot:#8668d0;
--data:#d3a02c;--good:#4dcb86;--bad:#ff6b66;--warn:#f0aa3c;--going:#6d9dff}}*{box-sizing:border-box}body{
margin:0 auto;padding:24px 20px 60px;max-width:1180px;background:var(--page);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}h1{font-size:26px;line-height:1.2;
margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 8px}.when{color:var(--soft);margin:4px 0 14px}
.status{font-size:13px;font-weight:600;padding:3px 11px;border-radius:99px;vertical-align:4px;
margin-left:6px;border:1px solid currentColor}.good{color:var(--good)}.bad{color:var(--bad)}.warn{
color:var(--warn)}.going{color:var(--going)}.verdict{margin:0 0 10px;padding:12px 16px;border-radius:8px;
background:var(--card);border:1px solid var(--edge);border-left:5px solid currentColor;font-size:16px;
font-weight:600;overflow-wrap:anywhere}.verdict small{display:block;font-size:12px;font-weight:400;
color:var(--soft)}dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:1px;
margin:0 0 14px;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:8px 6px}
dl div{padding:7px 12px}.wide{grid-column:span 2}dt{color:var(--soft);font-size:12px}dd{margin:0;
font-size:17px;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.wide dd{
font-size:15px;line-height:28px}.note,.empty{margin:0 0 10px;padding:8px 14px;border:1px dashed var(--edge);
border-radius:8px;color:var(--soft)}.empty{padding:40px;text-align:center}main,section,details{
background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 18px;margin:0 0 14px}
input[name=axis]{position:absolute;opacity:0}label{display:inline-block;padding:2px 14px;
border:1px solid var(--edge);cursor:pointer;color:var(--soft)}label[for=by-time]{border-radius:7px 0 0 7px}
label[for=by-step]{border-radius:0 7px 7px 0;border-left:0}input:checked+label{background:var(--grid);
color:var(--ink);font-weight:600}input:focus-visible+label{outline:2px solid var(--going)}
#by-time:checked~.charts .step,#by-step:checked~.charts .time{display:none}.charts{position:relative}figure{
margin:12px 0 4px}figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;
margin-bottom:6px}figcaption small{color:var(--soft);margin-left:-8px}.said{margin-left:auto;
color:var(--soft);font-size:12px}.said em{font-style:normal}.key{color:var(--soft);font-size:12px;
white-space:nowrap}.key::before{content:"";display:inline-block;width:12px;height:10px;border-radius:3px;
background:var(--tone);margin-right:5px;vertical-align:-1px}.key.tone-total::before{height:2px;
vertical-align:3px}svg.chart{display:block;overflow:visible;margin-left:84px;width:calc(100% - 104px)}
svg.plot,svg.mark,svg.icon{overflow:visible}svg.icon{width:10px;height:10px;margin-right:9px;
transform:translate(5px,4px)}text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}.y{
text-anchor:end}.x{text-anchor:middle}.grid{stroke:var(--grid)}.line{fill:none;stroke:var(--tone);
stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}.dots{
fill:none;stroke:var(--tone);stroke-width:5.5;stroke-linecap:round;vector-effect:non-scaling-stroke}.stale{
opacity:.45}.area{fill:var(--tone)}.hole{stroke:var(--bad);stroke-width:1.5;fill:none;
vector-effect:non-scaling-stroke}.line.tone-total{stroke-width:1}.rule{stroke-dasharray:3 3;
stroke:var(--kind);opacity:.75}.shape{fill:var(--kind);stroke:var(--card);stroke-width:.7}.tone-loss{
--tone:var(--loss)}.tone-val{--tone:var(--val)}.tone-lr{--tone:var(--lr)}.tone-grad{--tone:var(--grad)}
.tone-rate{--tone:var(--rate)}.tone-memory{--tone:var(--memory)}.tone-compute{--tone:var(--compute)}
.tone-communication{--tone:var(--communication)}.tone-snapshot{--tone:var(--snapshot)}.tone-data{
--tone:var(--data)}.tone-total{--tone:var(--soft)}.kind-fault{--kind:var(--bad)}.kind-verdict{
--kind:var(--val)}.kind-remedy{--kind:var(--lr)}.kind-restored,.kind-run_finished,.kind-run_started{
--kind:var(--good)}.kind-formed{--kind:var(--loss)}.kind-checkpoint{--kind:var(--memory)}
.kind-snapshot,.kind-other{--kind:var(--soft)}.kind-resized{--kind:var(--lr)}.kind-preempted{
--kind:var(--warn)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}th{text-align:left;
color:var(--soft);font-weight:500;font-size:12px}td,th{padding:5px 14px 5px 0;
border-top:1px solid var(--grid);vertical-align:top}tr:first-child th{border:0}td:nth-child(-n+3){
white-space:nowrap;font-variant-numeric:tabular-nums}td:last-child{overflow-wrap:anywhere;min-width:220px}
summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;
font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}#cross{position:absolute;top:0;bottom:0;width:1px;
background:var(--soft);pointer-events:none;display:none}#box{position:fixed;display:none;
pointer-events:none;background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 12px;
font-size:12px;box-shadow:0 4px 18px #0003;font-variant-numeric:tabular-nums}#box div{display:flex;
justify-content:space-between;gap:18px}#box span{color:var(--soft)}@media(max-width:640px){body{
padding:14px 10px 40px}main,section,details{padding:10px}svg.chart{margin-left:66px;width:calc(100% - 82px)}
.said{margin-left:0;width:100%}}
"""

SCRIPT = """
(() => {
  const charts = document.querySelector('.charts'), cross = document.getElementById('cross');
  const box = document.getElementById('box');
  const data = JSON.parse(document.getElementById('readout').textContent);
  if (!charts || !data.rows.length) return;
  const hide = () => { cross.style.display = box.style.display = 'none'; };
  const row = (name, value) => {
    const line = document.createElement('div'), label = document.createElement('span');
    label.textContent = name;
    line.append(label, value);
    return line;
  };
  charts.addEventListener('pointerleave', hide);
  charts.addEventListener('pointermove', (event) => {
    const svg = [...charts.querySelectorAll('svg.chart')].find((s) => s.getBoundingClientRect().width > 0);
    const area = svg.getBoundingClientRect(), column = svg.classList.contains('time') ? 0 : 1;
    const part = (event.clientX - area.left) / area.width;
    if (part < -0.01 || part > 1.01) return hide();
    const lo = +svg.dataset.lo, hi = +svg.dataset.hi, x = lo + part * (hi - lo);
    let best = data.rows[0];
    for (const r of data.rows) if (Math.abs(r[column] - x) <= Math.abs(best[column] - x)) best = r;
    const place = area.left + (best[column] - lo) / (hi - lo) * area.width;
    cross.style.left = (place - charts.getBoundingClientRect().left) + 'px';
    cross.style.display = box.style.display = 'block';
    const minutes = Math.floor(best[0] / 60), seconds = best[0] - 60 * minutes;
    const hours = Math.floor(minutes / 60), said = minutes ? seconds.toFixed(0) : seconds.toFixed(1);
    const clock = (hours ? `${hours} h ` : '') + (minutes ? `${minutes % 60} min ` : '') + `${said} s`;
    box.replaceChildren(row('step', best[1].toLocaleString('en')), row('time', clock), ...data.names.flatMap(
      (name, i) => best[i + 2] === null ? [] : [row(name, String(best[i + 2]))]));
    box.style.left = Math.min(event.clientX + 18, innerWidth - box.offsetWidth - 8) + 'px';
    box.style.top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8) + 'px';
  });
})();
"""
