"""The recoveries of a run on its report page: where each lies on the charts, and where its time went.

Every figure is one that events.jsonl holds; nothing is measured or guessed here. A recovery begins with what
was told of it (`verdict`, `resized` or `preempted`) and ends with `restored`. Several verdicts before one
`restored` are one recovery: ranks were lost while the others were recovering.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..faulttol.outcome import PHASES
from .chart import WIDTH, Array, XAxis, duration, escape, frame, shape
from .runlog import Record, as_number

CAUSES = ("verdict", "resized", "preempted")
LANES = 12  # one a rank; of more ranks all recoveries share one
LANE = 22  # pixels
SHOWN = 60  # recoveries, the newest
LETTERS = 500  # of a sentence


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What was told of one recovery, in order; `restored` is empty where nothing was to be had."""

    causes: Sequence[Record]
    remedies: Sequence[Record] = ()
    restored: Record = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """Those that were lost."""
        told = [cause.get("ranks") for cause in self.causes]
        return sorted({r for ranks in told if isinstance(ranks, list) for r in ranks if type(r) is int})

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase that was measured."""
        seconds = {phase: as_number(self.restored.get(f"{phase}_s")) for phase in PHASES}
        return {phase: max(0.0, value) for phase, value in seconds.items() if math.isfinite(value)}

    @property
    def total_s(self) -> float:
        """Seconds from the last sign of life to the end of the step then under way; NaN if unknown."""
        return sum(self.phases.values()) if self.phases else math.nan

    @property
    def began_unix(self) -> float:
        """When what was lost was last seen well; when it was told, where that is not known."""
        before = [seconds for phase, seconds in self.phases.items() if phase != "catch_up"]
        told = as_number(self.causes[0].get("time_unix"))
        return min(told, as_number(self.restored["time_unix"]) - sum(before)) if before else told

    @property
    def step(self) -> float:
        """The last step in the record before the fault."""
        return as_number(self.causes[0].get("step"))

    @property
    def lost_steps(self) -> float:
        """Steps that were trained again; NaN where nobody said."""
        return as_number(self.restored.get("lost_steps"))

    def sentences(self) -> list[str]:
        """What happened, then what was done."""
        told = [str(e.get("sentence") or e.get("reason") or "") for e in (*self.causes, *self.remedies)]
        return [text[:LETTERS] for text in dict.fromkeys(told) if text]

    def outcome(self) -> str:
        """How it ended, in a few words."""
        if not self.restored:
            return "nothing was restored"
        lost = "" if math.isnan(self.lost_steps) else f", {_count(self.lost_steps)} steps lost"
        took = "" if math.isnan(self.total_s) else f", {self.total_s:.3f} s"
        return f"from {self.restored.get('source', 'an unknown source')}{lost}{took}"


def recoveries_of(events: Iterable[Record], *, step_times: Array) -> list[Recovery]:
    """The recoveries that `events` tell of, oldest first; `step_times` are when steps were done."""
    found: list[Recovery] = []
    causes: list[Record] = []
    remedies: list[Record] = []

    def end(restored: Record) -> None:
        if causes:
            found.append(Recovery(causes=tuple(causes), remedies=tuple(remedies), restored=restored))
        causes.clear()
        remedies.clear()

    formed_unix = math.inf
    for event in events:
        kind, at = event.get("kind"), float(event["time_unix"])
        if kind in CAUSES:
            # ranks that lost each other before their first step have nothing to restore, and train
            if causes and ((formed_unix < step_times) & (step_times < at)).any():
                end({})
            causes.append(event)
            formed_unix = math.inf
        elif kind == "remedy":
            remedies.append(event)
        elif kind == "formed":
            formed_unix = at
        elif kind == "restored":
            end(event)
        elif kind == "run_started":  # the command ended before the recovery did
            end({})
    end({})
    return found


def draw_recoveries(recoveries: Sequence[Recovery], *, axis: XAxis, start: float) -> str:
    """A lane for each rank that was lost. Over time a bar is the recovery by phase, over steps it is the
    steps that were trained again.
    """
    ranks = sorted({rank for recovery in recoveries for rank in recovery.ranks})
    lanes = [str(rank) for rank in ranks] if len(ranks) <= LANES else []
    if not lanes or any(not recovery.ranks for recovery in recoveries):
        lanes.append("all ranks")
    height = LANE * len(lanes)
    backs, bars, marks = [], [], []
    for row, lane in enumerate(lanes):
        y = LANE * row + LANE // 2
        label = f"rank {lane}" if lane.isdecimal() else lane
        backs.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        backs.append(f'<text class="y" x="-8" y="{y}" dy=".32em">{label}</text>')
        for recovery in recoveries:
            own = [str(rank) for rank in recovery.ranks if str(rank) in lanes] or ["all ranks"]
            if lane in own:
                bars.append(_bar_on_axis(recovery, axis=axis, start=start, y=y - 5))
                marks.append(_mark(recovery, axis=axis, start=start, y=y))
    plot = (
        f'<svg class="plot" width="100%" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'preserveAspectRatio="none">{"".join(bars)}</svg>'
    )
    return frame("".join(backs) + plot + "".join(marks), axis=axis, height=height, title="Recoveries")


def recovery_section(recoveries: Sequence[Recovery], *, start: float) -> str:
    """The time of each recovery as a bar, and all that was told of it as a table."""
    if not recoveries:
        return ""
    shown = recoveries[-SHOWN:]
    left = len(recoveries) - len(shown)
    more = f'<p class="note">{left:,} earlier ones are only on the charts.</p>' if left else ""
    return f"<section><h2>Recoveries</h2>{_bars(shown)}{_table(shown, start=start)}{more}</section>"


def phase_legend() -> str:
    """The colour of each phase."""
    return "".join(f'<span class="key tone-{phase}">{phase_name(phase)}</span>' for phase in PHASES)


def phase_name(phase: str) -> str:
    """As people say it."""
    return phase.replace("_", " ")


def phase_cells(phases: Mapping[str, object]) -> str:
    """A cell for the seconds of each phase."""
    return "".join(f"<td>{seconds(as_number(phases.get(phase)))}</td>" for phase in PHASES)


def seconds(value: float) -> str:
    """To the millisecond; a dash for what is not known."""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def _bars(recoveries: Sequence[Recovery]) -> str:
    timed = [recovery for recovery in recoveries if recovery.phases]
    longest = max((recovery.total_s for recovery in timed), default=0.0)
    if not longest:
        return ""
    rows = []
    for recovery in timed:
        who = f"rank {', '.join(map(str, recovery.ranks[:4]))}" if recovery.ranks else "all ranks"
        who += ", …" if len(recovery.ranks) > 4 else ""
        parts = _stack(recovery, place=lambda s: s / longest * WIDTH, y=0, height=14)
        bar = (
            f'<svg class="plot" width="100%" height="14" viewBox="0 0 {WIDTH} 14" '
            f'preserveAspectRatio="none">{parts}</svg>'
        )
        said = escape(recovery.outcome().removeprefix("from "))
        rows.append(f"<tr><td>step {_count(recovery.step)}, {who}</td><td>{bar}</td><td>{said}</td></tr>")
    return f'<p class="keys">{phase_legend()}</p><table class="bars">{"".join(rows)}</table>'


def _stack(recovery: Recovery, *, place: Callable[[float], float], y: int, height: int) -> str:
    """The phases side by side; `place` says where a second since the beginning is."""
    parts, before = [], 0.0
    for phase, length in recovery.phases.items():
        x, end = place(before), place(before + length)
        title = f"<title>{phase_name(phase)} {length:.3f} s</title>"
        parts.append(
            f'<rect class="area tone-{phase}" x="{x:.2f}" y="{y}" width="{end - x:.2f}" height="{height}">'
            f"{title}</rect>"
        )
        before += length
    return "".join(parts)


def _bar_on_axis(recovery: Recovery, *, axis: XAxis, start: float, y: int) -> str:
    def place(value: float) -> float:
        return float(axis.place(np.array([value]))[0])

    if axis.name == "time":
        began = recovery.began_unix - start
        return _stack(recovery, place=lambda s: place(began + s), y=y, height=10)
    first = as_number(recovery.restored.get("from_step"))
    if not (math.isfinite(first) and recovery.lost_steps > 0):
        return ""
    x, end = place(first), place(first + recovery.lost_steps)
    return f'<rect class="area tone-catch_up" x="{x:.2f}" y="{y}" width="{end - x:.2f}" height="10"/>'


def _mark(recovery: Recovery, *, axis: XAxis, start: float, y: int) -> str:
    step = recovery.step if math.isfinite(recovery.step) else axis.lo
    at = recovery.began_unix - start if axis.name == "time" else step
    x = float(axis.place(np.array([at]))[0]) * 100 / WIDTH
    text = " · ".join([*recovery.sentences(), recovery.outcome()])
    kind = "restored" if recovery.restored else "verdict"
    return f'<svg class="mark" x="{x:.2f}%" y="{y}">{shape(kind, text)}</svg>'


def _table(recoveries: Sequence[Recovery], *, start: float) -> str:
    names = ("time", "step", "source", "steps lost", *(f"{phase_name(p)}, s" for p in PHASES), "in all, s")
    head = "".join(f"<th>{name}</th>" for name in (*names, "verdict and remedy"))
    rows = "".join(_row(recovery, start=start) for recovery in recoveries)
    timed = [recovery for recovery in recoveries if len(recovery.phases) == len(PHASES)]
    if len(timed) > 1:
        rows += _sums("median", timed, statistics.median) + _sums("longest", timed, max)
    return f'<div class="scroll"><table class="recoveries"><tr>{head}</tr>{rows}</table></div>'


def _row(recovery: Recovery, *, start: float) -> str:
    source = escape(str(recovery.restored.get("source", "-"))[:LETTERS])
    began, lost = duration(recovery.began_unix - start), _count(recovery.lost_steps)
    cells = [began, _count(recovery.step), source, lost]
    told = "<br>".join(map(escape, recovery.sentences()))
    figures = "".join(f"<td>{cell}</td>" for cell in cells) + phase_cells(recovery.phases)
    return f"<tr>{figures}<td>{seconds(recovery.total_s)}</td><td>{told}</td></tr>"


def _sums(name: str, timed: Sequence[Recovery], of: Callable[[list[float]], float]) -> str:
    phases = {phase: of([recovery.phases[phase] for recovery in timed]) for phase in PHASES}
    in_all = of([recovery.total_s for recovery in timed])
    return (
        f'<tr class="sums"><td>{name}</td><td></td><td></td><td></td>{phase_cells(phases)}'
        f"<td>{seconds(in_all)}</td><td></td></tr>"
    )
