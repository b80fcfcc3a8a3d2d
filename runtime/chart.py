"""Charts as inline SVG: one x axis for a whole page, lines that keep their extremes, lanes of events.

A chart is an <svg> without a viewBox, so that its text keeps its size at every page width. What stretches
with the page lies in an inner <svg> 1,000 units wide; what must not (ticks, markers) stands at a percentage
of the width, so that unit 250 and 25% are one place. A long line is thinned to the lowest and highest value
of each column of pixels: a spike of one step in 200,000 stays visible. Colours are classes (`tone-loss`,
`kind-fault`), left to the style sheet of the page.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

WIDTH = 1000
COLUMNS = 700  # two points each: at most about 1,400 points a line
MARKS = 300  # markers of one kind on a lane
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
TIME_STEPS = (*(s * m for s in (1, 60) for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 3, 6, 12)))
# Shapes about (0, 0), 10 wide: a kind is told by its shape as well as by its colour.
SHAPES = {
    "run_started": "M-4,-5L5,0L-4,5Z",
    "formed": "M0,-4.5A4.5,4.5 0 1 1 0,4.5A4.5,4.5 0 1 1 0,-4.5Z",
    "snapshot": "M-1,-4H1V4H-1Z",
    "checkpoint": "M-4,-4H4V4H-4Z",
    "preempted": "M-5,-4H5L0,5Z",
    "fault": "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
    "verdict": "M0,-6L5,0L0,6L-5,0Z",
    "remedy": "M-1.5,-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "restored": "M-5,4L0,-5L5,4Z",
    "resized": "M-5,-5L0,0L5,-5V5L0,0L-5,5Z",
    "run_finished": "M-3,-5H-1.5V-4.5H5L3,-1.5L5,1.5H-1.5V5H-3Z",
}
RING = "M0,-4.5A4.5,4.5 0 1 1 0,4.5A4.5,4.5 0 1 1 0,-4.5ZM0,-2A2,2 0 1 0 0,2A2,2 0 1 0 0,-2Z"
RULED = ("fault", "preempted", "restored", "resized")  # these also draw a line through every chart


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """The x axis that all charts share: seconds since the start, or optimizer steps."""

    name: Literal["time", "step"]
    lo: float
    hi: float

    def place(self, x: Array) -> Array:
        """Units from the left edge, 0 to WIDTH."""
        return (x - self.lo) / ((self.hi - self.lo) or 1.0) * WIDTH

    def ticks(self) -> list[tuple[float, str]]:
        """(unit, label) of some seven round values."""
        span = (self.hi - self.lo) or 1.0
        step = max(_round_step(span / 7), 1.0) if self.name == "step" else _time_step(span / 7)
        values = _multiples(step, self.lo, self.hi)
        labels = (f"{v:,.0f}" if self.name == "step" else duration(float(v)) for v in values)
        return list(zip(self.place(values).tolist(), labels, strict=True))


@dataclass(frozen=True, kw_only=True)
class Track:
    """One quantity over the run. No line joins two segments; what is `stale` was trained again later."""

    time: Array
    step: Array
    value: Array
    segment: Indices
    stale: npt.NDArray[np.bool_]

    def along(self, axis: XAxis) -> Array:
        """The x coordinate on `axis`."""
        return self.time if axis.name == "time" else self.step


@dataclass(frozen=True, kw_only=True)
class Line:
    """A track drawn as a line, with `dots` at its points where they are few."""

    label: str
    tone: str
    track: Track
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over stacked areas; the areas' tracks share their x coordinates and segments."""

    title: str
    lines: Sequence[Line]
    areas: Sequence[Line] = field(default=())
    height: int = 110
    from_zero: bool = False
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event where the charts have it, and its line of text."""

    kind: str
    time: float
    step: float
    text: str

    def at(self, axis: XAxis) -> float:
        """Units from the left edge of `axis`."""
        return float(axis.place(np.array([self.time if axis.name == "time" else self.step]))[0])


@dataclass(frozen=True, kw_only=True)
class YAxis:
    """The y axis of one chart; values above `hi` are cut off there."""

    lo: float
    hi: float
    log: bool
    height: int

    def place(self, y: Array) -> Array:
        """Units from the top edge, not finite where `y` is not."""
        lo, hi, values = self.lo, self.hi, y
        if self.log:
            lo, hi = math.log10(lo), math.log10(hi)
            values = np.log10(np.where(y > 0, y, np.nan))
        shown = np.where(np.isfinite(y), np.clip(values, lo, hi), np.nan)
        return (hi - shown) / (hi - lo) * self.height

    def ticks(self) -> list[tuple[float, str]]:
        """(unit, label) of a few round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.lo) - 1e-9), math.floor(math.log10(self.hi) + 1e-9)
            values = 10.0 ** np.arange(first, last + 1, max(1, (last - first) // 3), dtype=np.float64)
            return list(zip(self.place(values).tolist(), map(compact, values.tolist()), strict=True))
        step = _round_step((self.hi - self.lo) / (5 if self.height > 120 else 4))
        values = _multiples(step, self.lo, self.hi)
        labels = [_tick_label(v, step, max(abs(self.lo), abs(self.hi))) for v in values.tolist()]
        return list(zip(self.place(values).tolist(), labels, strict=True))


def escape(text: object) -> str:
    """Text safe between tags and in attributes; what cannot be printed (a lone surrogate) is replaced."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text)))


def compact(value: float) -> str:
    """A number as people say it: 1.24M, 312, 2.345, 3e-4."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")
    for size, letter in UNITS:
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.4g}{letter}" if abs(value) < 1e16 else f"{value:.3g}"
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as people say it: 4.2 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds else "0"
    if not math.isfinite(seconds):
        return "unknown"
    size, name, rest_size, rest_name = 60, "min", 1, "s"
    if seconds >= 86400:
        size, name, rest_size, rest_name = 86400, "d", 3600, "h"
    elif seconds >= 3600:
        size, name, rest_size, rest_name = 3600, "h", 60, "min"
    whole, rest = divmod(round(seconds / rest_size), size // rest_size)
    return f"{whole} {name} {rest} {rest_name}" if rest else f"{whole} {name}"


def thin(x: Array, y: Array, *, segment: Indices, axis: XAxis) -> Indices:
    """Indices to draw: all of a short line, else the lowest and the highest of each column, or one gap."""
    if len(x) <= 2 * COLUMNS:
        return np.arange(len(x))
    starts = _column_starts(x, segment=segment, axis=axis)
    keep: list[int] = []
    for start, stop in zip(starts, [*starts[1:], len(x)], strict=True):
        part = y[start:stop]
        if np.isfinite(part).any():
            part = np.where(np.isfinite(part), part, np.nan)
            keep.extend(sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}))
        else:
            keep.append(start)
    return np.array(keep, dtype=np.int64)


def draw(chart: Chart, *, axis: XAxis, marks: Sequence[Mark] = ()) -> str:
    """The chart on one axis, with a rule at each event that interrupts training."""
    y_axis = _y_axis(chart)
    rules = "".join(
        f'<line class="rule kind-{mark.kind}" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{chart.height}"/>'
        for mark in _thin_marks([m for m in marks if m.kind in RULED], axis)
        for at in [mark.at(axis) * 100 / WIDTH]
    )
    grid = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="y" x="-8" y="{y:.1f}" dy=".32em">{label}</text>'
        for y, label in y_axis.ticks()
    )
    inner = _areas(chart.areas, axis=axis, y_axis=y_axis)
    inner += "".join(_line(line, axis=axis, y_axis=y_axis) for line in chart.lines)
    stretched = (
        f'<svg class="plot" width="100%" height="{chart.height}" viewBox="0 0 {WIDTH} {chart.height}" '
        f'preserveAspectRatio="none">{inner}</svg>'
    )
    return frame(grid + stretched + rules, axis=axis, height=chart.height, title=chart.title)


def clipped(chart: Chart) -> float | None:
    """The highest value of the chart where it does not fit on its y axis."""
    highest = max((float(v.max()) for v in _finite(chart)), default=0.0)
    return highest if highest > _y_axis(chart).hi * 1.001 else None


def is_log(chart: Chart) -> bool:
    """Whether the chart's y axis is logarithmic."""
    return _y_axis(chart).log


def draw_events(marks: Sequence[Mark], *, axis: XAxis) -> str:
    """One lane a kind of event, in the order of SHAPES, unknown kinds last."""
    present = {mark.kind for mark in marks}
    kinds = [k for k in SHAPES if k in present] + sorted(present - set(SHAPES))
    lanes: list[str] = []
    for row, kind in enumerate(kinds):
        y = 22 * row + 11
        lanes.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        lanes.append(f'<text class="y" x="-8" y="{y}" dy=".32em">{escape(kind.replace("_", " "))}</text>')
        for mark in _thin_marks([m for m in marks if m.kind == kind], axis):
            x = mark.at(axis) * 100 / WIDTH
            lanes.append(f'<svg class="mark" x="{x:.2f}%" y="{y}">{shape(kind, mark.text)}</svg>')
    return frame("".join(lanes), axis=axis, height=22 * len(kinds), title="Events")


def shape(kind: str, text: str = "") -> str:
    """The marker of a kind of event about (0, 0), with its text shown on hovering."""
    tone = kind if kind in SHAPES else "other"
    title = f"<title>{escape(text)}</title>" if text else ""
    return f'<path class="shape kind-{tone}" d="{SHAPES.get(kind, RING)}">{title}</path>'


def frame(content: str, *, axis: XAxis, height: int, title: str) -> str:
    """`content`, `height` pixels high, over the ticks of the axis."""
    ticks = "".join(
        f'<line class="grid" x1="{x * 100 / WIDTH:.2f}%" x2="{x * 100 / WIDTH:.2f}%" y1="0" y2="{height}"/>'
        f'<text class="x" x="{x * 100 / WIDTH:.2f}%" y="{height + 16}">{label}</text>'
        for x, label in axis.ticks()
    )
    return (
        f'<svg class="chart {axis.name}" role="img" aria-label="{title} over {axis.name}" '
        f'height="{height + 22}" data-lo="{axis.lo!r}" data-hi="{axis.hi!r}">{ticks}{content}</svg>'
    )


def _line(line: Line, *, axis: XAxis, y_axis: YAxis) -> str:
    track = line.track
    x = track.along(axis)
    keep = thin(x, track.value, segment=track.segment, axis=axis)
    px, py = axis.place(x[keep]), y_axis.place(track.value[keep])
    segment, stale = track.segment[keep], track.stale[keep]
    paths = []
    for state, member in (("stale", stale), ("", ~stale)):
        path = _path(px, py, segment=segment, member=member)
        paths += [f'<path class="line tone-{line.tone} {state}" d="{path}"/>'] if path else []
    if len(keep) <= (200 if line.dots else 20):
        dots = "".join(f"M{a:.1f},{b:.1f}h0" for a, b in zip(px, py, strict=True) if math.isfinite(b))
        paths += [f'<path class="dots tone-{line.tone}" d="{dots}"/>'] if dots else []
    holes = np.unique(np.round(axis.place(x[~np.isfinite(track.value)])))
    if len(holes):
        ticks = "".join(f"M{a:.0f},0v7" for a in holes)
        paths.append(f'<path class="hole" d="{ticks}"/>')
    return "".join(paths)


def _path(px: Array, py: Array, *, segment: Indices, member: npt.NDArray[np.bool_]) -> str:
    """The strokes that end at a member point. `h0` makes a point without neighbours a round dot."""
    parts: list[str] = []
    pen = -1  # the point where the pen stands
    for i in np.flatnonzero(member & np.isfinite(py)).tolist():
        joined = i > 0 and segment[i] == segment[i - 1] and math.isfinite(py[i - 1])
        if not joined:
            parts.append(f"M{px[i]:.1f},{py[i]:.1f}h0")
        else:
            lead = "" if pen == i - 1 else f"M{px[i - 1]:.1f},{py[i - 1]:.1f}"
            parts.append(f"{lead}L{px[i]:.1f},{py[i]:.1f}")
        pen = i
    return "".join(parts)


def _areas(areas: Sequence[Line], *, axis: XAxis, y_axis: YAxis) -> str:
    """Stacked areas of column means: unlike extremes, means keep each area's share of the time true."""
    if not areas:
        return ""
    track = areas[0].track
    shown = np.isfinite(np.sum([a.track.value for a in areas], axis=0))
    segment = track.segment
    if axis.name == "step":  # without the steps trained again, the others follow each other
        shown, segment = shown & ~track.stale, np.zeros_like(segment)
    if not shown.any():
        return ""
    x, segment = track.along(axis)[shown], segment[shown]
    starts = np.arange(len(x))
    if len(x) > 2 * COLUMNS:
        starts = _column_starts(x, segment=segment, axis=axis)
    count = np.diff(np.append(starts, len(x)))
    px, pieces = axis.place(np.add.reduceat(x, starts) / count), segment[starts]
    runs = np.split(np.arange(len(px)), np.flatnonzero(np.diff(pieces)) + 1)
    floor, drawn = np.zeros(len(px)), []
    for area in areas:
        top = floor + np.add.reduceat(area.track.value[shown], starts) / count
        path = "".join(_polygon(px[r], y_axis.place(floor[r]), y_axis.place(top[r])) for r in runs)
        drawn.append(f'<path class="area tone-{area.tone}" d="{path}"/>')
        floor = top
    return "".join(drawn)


def _polygon(px: Array, low: Array, high: Array) -> str:
    if len(px) == 1:  # a lone step still shows, as a narrow bar
        px, low, high = px + np.array([-2.0, 2.0]), low.repeat(2), high.repeat(2)
    there = [f"{a:.1f},{b:.1f}" for a, b in zip(px, high, strict=True)]
    back = [f"{a:.1f},{b:.1f}" for a, b in zip(px[::-1], low[::-1], strict=True)]
    return f"M{'L'.join(there + back)}Z"


def _column_starts(x: Array, *, segment: Indices, axis: XAxis) -> Indices:
    column = np.minimum(axis.place(x) / WIDTH * COLUMNS, COLUMNS - 1).astype(np.int64)
    changed = (np.diff(column, prepend=-1) != 0) | (np.diff(segment, prepend=-1) != 0)
    return np.flatnonzero(changed)


def _thin_marks(marks: Sequence[Mark], axis: XAxis) -> list[Mark]:
    if len(marks) <= MARKS:
        return list(marks)
    return list({(m.kind, int(m.at(axis) * MARKS / WIDTH)): m for m in marks}.values())


def _finite(chart: Chart) -> list[Array]:
    values = [line.track.value[np.isfinite(line.track.value)] for line in chart.lines]
    return [v for v in values if len(v)]


def _y_axis(chart: Chart) -> YAxis:
    found = _finite(chart)
    values = np.concatenate(found) if found else np.array([0.0, 1.0])
    lo, hi, middle = float(values.min()), float(values.max()), float(np.median(values))
    if chart.from_zero:
        usual = float(np.percentile(values, 98))  # one slow first step must not flatten all others
        hi = hi if hi <= 3 * usual or usual <= 0 else 1.5 * usual
        return YAxis(lo=min(0.0, lo), hi=hi * 1.05 or 1.0, log=False, height=chart.height)
    if lo > 0 and hi > 50 * middle:
        return YAxis(lo=lo / 1.2, hi=hi * 1.2, log=True, height=chart.height)
    pad = (hi - lo) * 0.06 or abs(hi) * 0.1 or 1.0
    return YAxis(lo=lo - pad if lo - pad > 0 or lo < 0 else 0.0, hi=hi + pad, log=False, height=chart.height)


def _multiples(step: float, lo: float, hi: float) -> Array:
    return np.arange(math.ceil(lo / step - 1e-6), math.floor(hi / step + 1e-6) + 1, dtype=np.float64) * step


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next((m * size for m in (1, 2, 5) if m * size >= rough * 0.999), 10 * size)


def _time_step(rough: float) -> float:
    if rough < 1:
        return _round_step(rough)
    return next((float(s) for s in TIME_STEPS if s >= rough), 86400 * _round_step(max(rough / 86400, 1.0)))


def _tick_label(value: float, step: float, largest: float) -> str:
    if largest < 1e-2:
        exponent = math.floor(math.log10(largest))
        return f"{value / 10.0**exponent:.3g}e{exponent}" if abs(value) > step / 2 else "0"
    size, letter = next(((s, n) for s, n in UNITS if largest >= 10 * s or (largest >= s > 1e3)), (1.0, ""))
    if largest >= 1e16:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return f"{value / size:.{decimals}f}{letter}" if abs(value) > step / 2 else "0"
