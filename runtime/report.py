"""`rayfold report RUN`: one self-contained HTML page on how a run went.

Reads the run directory (metrics.jsonl, events.jsonl, summary.json, config.toml) and no more, so it works
while the run is going, after it was killed, and on another machine. The page needs no network and no script:
both x axes are drawn and CSS switches between them; the inline script adds only the readout under the
pointer. Whatever the files say is escaped, and what could not be read is counted on the page.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from .report_campaign import campaign_section
from .report_recovery import Recovery, draw_recoveries, phase_legend, recoveries_of, recovery_section
from .report_style import SCRIPT, STYLE
from .runlog import Record, ReportError, RunLog, as_number, read_run

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


def render(run: RunLog) -> str:
    """The page as text."""
    marks = _marks(run)
    recoveries = recoveries_of(run.events, step_times=run.train["time_unix"])
    body = [_header(run), _figures(run), _notes(run), _charts(run, marks, recoveries)]
    body += [recovery_section(recoveries, start=run.start), campaign_section(run.campaign)]
    body.append(_event_table(run, marks))
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
        at, step = float(event["time_unix"]), as_number(event.get("step"))
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


def _charts(run: RunLog, marks: Sequence[Mark], recoveries: Sequence[Recovery]) -> str:
    if not len(run.train["step"]) and not len(run.val["step"]) and not marks:
        return '<p class="empty">No step has been recorded yet.</p>'
    axes = _axes(run, marks)
    figures = []
    for chart in _make_charts(run) if len(run.train["step"]) or len(run.val["step"]) else ():
        drawn = "".join(draw(chart, axis=axis, marks=marks) for axis in axes)
        figures.append(f"<figure><figcaption>{_caption(chart)}</figcaption>{drawn}</figure>")
    if not figures:
        figures.append('<p class="empty">No step has been recorded yet.</p>')
    if recoveries:
        drawn = "".join(draw_recoveries(recoveries, axis=axis, start=run.start) for axis in axes)
        said = '<span class="said">over steps: what was trained again</span>'
        figures.append(
            f"<figure><figcaption><b>Recoveries</b>{phase_legend()}{said}</figcaption>{drawn}</figure>"
        )
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
        if key not in known or (key == "mfu" and not math.isfinite(as_number(known[key]))):
            continue
        value = known[key]
        number = isinstance(value, int | float)
        text = say(as_number(value)) if number else _plain(value)
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
    hidden = ("time_unix", "kind", "step", "nodes", "pids", "spare_pids", "fenced_unix", "evidence")
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
