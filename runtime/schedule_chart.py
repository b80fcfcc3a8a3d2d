"""The work of a pipeline's ranks over time: as rows of text, and as one SVG image that stands alone.

Text gives a unit of time one column, as wide as the longest name of a step. In the image a step that is too
narrow for its name still tells it to the pointer; later stages of a rank are paler.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..parallel.timeline import Timed, Timeline
from .chart import compact, escape

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, of the input",
    "W": "backward, of weights",
}
LANE, GAP, TOP, MARGIN = 30, 6, 44, 14  # pixels
UNIT, WIDEST = 34.0, 4000.0  # pixels of a unit of time, and of all of them
LETTER = 6.2  # pixels, about, of a letter of 11
STYLE = """
svg{color-scheme:light dark;--card:#fff;--ink:#1c2430;--soft:#667085;--grid:#eef0f4;--F:#2f6bea;--B:#1f9d57;
--I:#0e9aa7;--W:#8450d8;font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
@media(prefers-color-scheme:dark){svg{--card:#171d26;--ink:#e6eaf1;--soft:#93a0b4;--grid:#222a35;--F:#6d9dff;
--B:#4dcb86;--I:#3fc5d0;--W:#b28cff}}
.card{fill:var(--card)}text{fill:var(--soft);font-variant-numeric:tabular-nums}.title{fill:var(--ink);
font-size:13px;font-weight:600}.x,.in{text-anchor:middle}.in{fill:var(--card)}.grid{stroke:var(--grid)}
.F{fill:var(--F)}.B{fill:var(--B)}.I{fill:var(--I)}.W{fill:var(--W)}
"""


class Cell(NamedTuple):
    """Some text of a row, and the kind of step that it stands for; none where the rank waits."""

    text: str
    kind: str


def text_rows(timeline: Timeline) -> list[list[Cell]]:
    """A row of cells for each rank. Steps take whole units of time."""
    names = _names(timeline)
    width = max((len(name) for row in names for name in row), default=0) + 1
    rows = []
    for steps, row in zip(timeline.ranks, names, strict=True):
        cells, at = [], 0
        for timed, name in zip(steps, row, strict=True):
            start, end = round(timed.start), round(timed.end)
            if start > at:
                cells.append(Cell(" " * (width * (start - at)), ""))
            cells.append(Cell(name.ljust(width * (end - start) - 1, "-") + " ", timed.step.kind))
            at = end
        rows.append(cells)
    return rows


def draw_schedule(timeline: Timeline, *, title: str, labels: Sequence[str]) -> str:
    """An SVG image with a lane for each rank, named by `labels`."""
    length = timeline.length or 1.0
    place = _Place(
        left=2 * MARGIN + LETTER * max(map(len, labels)),
        unit=min(UNIT, WIDEST / length),
        bottom=TOP + len(timeline.ranks) * (LANE + GAP),
    )
    width, height = place.x(length) + MARGIN, place.bottom + 46
    parts = [
        f'<rect class="card" width="{width:.0f}" height="{height}"/>',
        f'<text class="title" x="{MARGIN}" y="24">{escape(title)}</text>',
        *_ticks(length, place),
    ]
    for number, (steps, names) in enumerate(zip(timeline.ranks, _names(timeline), strict=True)):
        y = TOP + number * (LANE + GAP)
        parts.append(f'<text x="{MARGIN}" y="{y + LANE / 2:.0f}" dy=".35em">{escape(labels[number])}</text>')
        stages = sorted({timed.step.stage for timed in steps})
        for timed, name in zip(steps, names, strict=True):
            paler = 1.0 - 0.35 * stages.index(timed.step.stage) / max(1, len(stages) - 1)
            parts.append(_box(timed, name, y=y, place=place, paler=paler))
    parts += _legend(timeline, place)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )


class _Place(NamedTuple):
    """Where the lanes lie in the image."""

    left: float
    unit: float
    bottom: int

    def x(self, time: float) -> float:
        """Pixels from the left edge."""
        return self.left + time * self.unit


def _names(timeline: Timeline) -> list[list[str]]:
    """What each step is called: F0, or 2F0 where a rank has several stages."""
    several = any(len({timed.step.stage for timed in steps}) > 1 for steps in timeline.ranks)
    return [
        [str(t.step) if several else f"{t.step.kind}{t.step.microbatch}" for t in steps]
        for steps in timeline.ranks
    ]


def _box(timed: Timed, name: str, *, y: int, place: _Place, paler: float) -> str:
    x, width = place.x(timed.start), (timed.end - timed.start) * place.unit
    step = timed.step
    told = f"stage {step.stage}, micro-batch {step.microbatch}: {KINDS[step.kind]}"
    box = (
        f'<rect class="{step.kind}" x="{x:.1f}" y="{y}" width="{max(width - 1, 0.5):.1f}" height="{LANE}" '
        f'rx="2" fill-opacity="{paler:.2f}"><title>{told}</title></rect>'
    )
    if width < LETTER * len(name) + 2:
        return box
    middle = f'x="{x + width / 2:.1f}" y="{y + LANE / 2:.0f}"'
    return f'{box}<text class="in" {middle} dy=".35em" pointer-events="none">{name}</text>'


def _ticks(length: float, place: _Place) -> list[str]:
    steps = (many * first for many in (1, 10, 100, 1000, 10_000, 100_000) for first in (1, 2, 5))
    step = next(step for step in steps if step * place.unit >= 40)
    ticks = []
    for number in range(int(length / step) + 1):
        x = place.x(number * step)
        ticks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{place.bottom}"/>')
        label = compact(number * step)
        ticks.append(f'<text class="x" x="{x:.1f}" y="{place.bottom + 12}">{label}</text>')
    return ticks


def _legend(timeline: Timeline, place: _Place) -> list[str]:
    present = {timed.step.kind for steps in timeline.ranks for timed in steps}
    parts, x, y = [], place.left, place.bottom + 38
    for kind, meaning in KINDS.items():
        if kind in present:
            parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y - 9}" width="10" height="10" rx="2"/>')
            parts.append(f'<text x="{x + 15:.0f}" y="{y}">{kind} {meaning}</text>')
            x += 40 + LETTER * len(meaning)
    return parts
