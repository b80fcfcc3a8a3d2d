"""The faults of a campaign on the report page of the run that bore them: each promise against its outcome.

Reads what `rayfold chaos` wrote down as plain values; a page of a run without a campaign has no such section.
"""

from collections.abc import Mapping

from ..faulttol.outcome import PHASES
from .chart import escape
from .report_recovery import LETTERS, phase_cells, phase_name, seconds
from .runlog import Record, as_number

SHOWN = 300  # faults, the first of the campaign


def campaign_section(campaign: Record) -> str:
    """A row for each fault that was planned; "" where there was no campaign."""
    told = campaign.get("faults")
    faults = [f for f in told if isinstance(f, Mapping)] if isinstance(told, list) else []
    if not faults:
        return ""
    names = ["fault", "rank", "kept", "steps lost", "noticed, s", "goes on, s"]
    names += [f"{phase_name(phase)}, s" for phase in PHASES]
    head = "".join(f"<th>{name}</th>" for name in (*names, "what was not kept"))
    rows = "".join(map(_row, faults[:SHOWN]))
    left = len(faults) - SHOWN
    more = f'<p class="note">{left:,} more are in chaos.json.</p>' if left > 0 else ""
    said = f"{_number(campaign.get('kept'))} of {_number(campaign.get('injected'))} injected faults kept"
    return (
        f"<section><h2>Faults on purpose</h2><p>{said} their promise; outcome / promise. "
        "Here the time counts from the injection.</p>"
        f'<div class="scroll"><table class="campaign"><tr>{head}</tr>{rows}</table></div>{more}</section>'
    )


def _row(fault: Record) -> str:
    promise, outcome = _mapping(fault.get("promise")), _mapping(fault.get("outcome"))
    phases = _mapping(outcome.get("phases"))
    rank = as_number(fault.get("rank"))
    kept = fault.get("kept")  # None: never injected
    lost = f"{_number(outcome.get('lost_steps'))} / {_number(promise.get('lost_steps'))}"
    problems = fault.get("problems")
    told = "; ".join(map(str, problems)) if isinstance(problems, list) else ""
    cells = [
        escape(str(fault.get("kind", "-"))),
        _number(rank) if rank >= 0 else "-",
        "yes" if kept is True else '<b class="bad">no</b>' if kept is False else "-",
        lost if promise.get("recovers", True) else "-",
        _against(phases.get("detect"), promise.get("detect_s")),
        _against(outcome.get("resume_s"), promise.get("resume_s")),
    ]
    figures = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr>{figures}{phase_cells(phases)}<td>{escape(told[:LETTERS])}</td></tr>"


def _against(came: object, promised: object) -> str:
    return f"{seconds(as_number(came))} / {seconds(as_number(promised))}"


def _number(value: object) -> str:
    number = as_number(value)
    return f"{number:,.0f}" if number == number else "-"


def _mapping(value: object) -> Record:
    return value if isinstance(value, Mapping) else {}
