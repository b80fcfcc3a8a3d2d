"""The recoveries on the report page say what events.jsonl says, a campaign's promises stand beside them."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import START, Page, Record, charts, event, page_of, training, write_run

from rayfold.faulttol.outcome import PHASES
from rayfold.runtime.report_recovery import recoveries_of

SECONDS = [
    dict(zip(PHASES, times, strict=True))
    for times in (
        (0.048244, 0.001502, 0.005872, 0.009556, 0.117119, 0.085106),
        (0.512, 0.0031, 0.0902, 0.0104, 0.1203, 0.0912),
    )
]
DIED = "rank 1 died at step 17: its process was killed by SIGKILL, as the kernel sends when memory runs out"
SPARE = "rank 1 died at step 17; spare vm:21977 on node c9d4b453027f becomes rank 1"
STOPPED = "rank 0 stopped at step 31: its process was halted by a signal, as SIGSTOP does"


def restored(at_s: float, from_step: int, lost: int, times: dict[str, float], source: str) -> Record:
    """As the controller writes it when the interrupted step is done."""
    measured = {f"{phase}_s": value for phase, value in times.items()}
    told = {"source": source, "from_step": from_step, "lost_steps": lost, "seconds": 0.05}
    return event("restored", at_s, from_step, **told, **measured)


EVENTS = [
    event("run_started", 0, attempt=1),
    event("formed", 0.5, epoch=1, world_size=2, pids=[21902, 21976], spare_pids=[21977]),
    event("verdict", 16.2, 16, sentence=DIED, ranks=[1], **{"class": "died", "evidence": {"frames": []}}),
    event("remedy", 16.21, 16, sentence=SPARE, action="replace", ranks=[1], pids=[21977]),
    event("formed", 16.23, 16, epoch=2, world_size=2, pids=[21902, 21977], fenced_unix=START + 16.215),
    restored(16.35, 16, 0, SECONDS[0], "memory"),
    event("verdict", 30.8, 30, sentence=STOPPED, ranks=[0], **{"class": "stopped", "evidence": {}}),
    event("remedy", 30.81, 30, sentence="the run shrinks to 1 rank", action="shrink", world_size=1),
    event("formed", 30.9, 30, epoch=3, world_size=1, pids=[21977], fenced_unix=START + 30.85),
    restored(31.0, 28, 2, SECONDS[1], "peer"),
    event("run_finished", 41, 40, status="finished"),
]
METRICS = [training(step) for step in range(1, 31)]
METRICS += [training(step, step + 2.2, attempt=3) for step in (29, 30)]
METRICS += [training(step, step + 2.2) for step in range(31, 39)]


def table(page: str, name: str) -> list[list[str]]:
    """The texts of a table's cells, row by row, without its head."""
    body = page.split(f'<table class="{name}">')[1].split("</table>")[0].replace("<br>", "<br/>")
    rows = ET.fromstring(f"<table>{body}</table>").findall("tr")
    return [["".join(cell.itertext()) for cell in row.findall("td")] for row in rows if row.findall("td")]


def test_the_table_says_what_the_events_say(tmp_path: Path) -> None:
    """Source, steps lost, every phase and their sum of every `restored`, beside what was said of it."""
    page = page_of(write_run(tmp_path / "run", METRICS, EVENTS))
    rows = table(page, "recoveries")
    told = [e for e in EVENTS if e["kind"] == "restored"]
    assert len(rows) == len(told) + 2  # median and longest
    for row, said in zip(rows, told, strict=False):
        assert row[2:4] == [said["source"], str(said["lost_steps"])]
        seconds = [said[f"{phase}_s"] for phase in PHASES]
        assert [float(cell) for cell in row[4:11]] == pytest.approx([*seconds, sum(seconds)], abs=5e-4)
    assert rows[0][-1] == DIED + SPARE
    assert STOPPED in rows[1][-1]
    assert [row[1] for row in rows[:2]] == ["16", "30"]
    assert rows[3][0] == "longest"
    assert float(rows[3][4]) == pytest.approx(0.512)


def test_a_bar_is_as_long_as_the_recovery_and_cut_into_its_phases(tmp_path: Path) -> None:
    """The longest takes the whole width, and each phase its share."""
    page = page_of(write_run(tmp_path / "run", METRICS, EVENTS))
    bars = ET.fromstring(
        '<table class="bars">' + page.split('<table class="bars">')[1].split("</table>")[0] + "</table>"
    )
    drawn = [[float(r.get("width", "")) for r in row.iter("rect")] for row in bars.findall("tr")]
    longest = sum(SECONDS[1].values())
    for widths, times in zip(drawn, SECONDS, strict=True):
        assert widths == pytest.approx([1000 * value / longest for value in times.values()], abs=0.011)
    tones = [rect.get("class", "").split()[-1] for rect in bars.findall("tr")[0].iter("rect")]
    assert tones == [f"tone-{phase}" for phase in PHASES]


def test_the_charts_show_each_recovery_at_its_rank_its_time_and_its_steps(tmp_path: Path) -> None:
    """Over time from the last sign of life, over steps what was trained again."""
    page = page_of(write_run(tmp_path / "run", METRICS, EVENTS))
    by_time, by_step = charts(page)["Recoveries"], charts(page, "step")["Recoveries"]
    assert [text.text for text in by_time.iter("text") if text.get("class") == "y"] == ["rank 0", "rank 1"]
    lo, hi = float(by_time.get("data-lo", "")), float(by_time.get("data-hi", ""))
    first = next(rect for rect in by_time.iter("rect") if rect.get("y") == str(22 + 6))  # rank 1's lane
    began = 16.35 - sum(list(SECONDS[0].values())[:-1])
    assert float(first.get("x", "")) == pytest.approx(1000 * (began - lo) / (hi - lo), abs=0.02)
    (again,) = by_step.iter("rect")  # nothing was lost the first time
    lo, hi = float(by_step.get("data-lo", "")), float(by_step.get("data-hi", ""))
    place = [float(again.get(key, "")) * (hi - lo) / 1000 for key in ("x", "width")]
    assert [lo + place[0], place[1]] == pytest.approx([28, 2], abs=0.01)


def test_what_came_to_nothing_is_shown_as_that(tmp_path: Path) -> None:
    """A run that ended at a verdict has no figures to show, and no bar."""
    events = [*EVENTS[:2], event("verdict", 9, 9, sentence="rank 0 raised ValueError", ranks=[0])]
    page = page_of(
        write_run(tmp_path / "run", METRICS[:9], [*events, event("run_finished", 10, 9, status="failed")])
    )
    (row,) = table(page, "recoveries")
    assert row[2:11] == ["-"] * 9
    assert row[-1] == "rank 0 raised ValueError"
    assert 'class="bars"' not in page


def test_a_run_without_a_fault_has_no_such_section(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", METRICS, [*EVENTS[:2], EVENTS[-1]]))
    assert "Recoveries" not in Page(page).text
    assert "Faults on purpose" not in Page(page).text


@pytest.mark.parametrize(
    ("events", "verdicts", "ends"),
    [
        pytest.param(EVENTS, [1, 1], ["memory", "peer"], id="two recoveries"),
        pytest.param([*EVENTS[2:5], EVENTS[2], *EVENTS[3:6]], [2], ["memory"], id="a fault in a recovery"),
        pytest.param([EVENTS[2], EVENTS[3], EVENTS[0]], [1], [None], id="the command was started again"),
        pytest.param([EVENTS[0], EVENTS[5]], [], [], id="a resumed run recovered from nothing"),
        pytest.param(
            [EVENTS[2], EVENTS[4], {**EVENTS[6], "time_unix": START + 18.5}, EVENTS[9]],
            [1, 1],
            [None, "peer"],
            id="steps between two verdicts, and nothing to restore for the first",
        ),
    ],
)
def test_verdicts_belong_to_the_recovery_that_answers_them(
    events: list[Record], verdicts: list[int], ends: list[Any]
) -> None:
    """Ranks that are lost while the others recover are made up for by one recovery."""
    times = np.array([line["time_unix"] for line in METRICS])
    found = recoveries_of(sorted(events, key=lambda e: float(e["time_unix"])), step_times=times)
    assert [len(recovery.causes) for recovery in found] == verdicts
    assert [recovery.restored.get("source") for recovery in found] == ends


def test_injected_faults_and_their_promises_are_on_the_page(tmp_path: Path) -> None:
    """What `rayfold chaos` wrote, where it stands in the run's folder."""
    run = write_run(tmp_path / "run", METRICS, EVENTS)
    told = event("fault", 16.1, 16, planned=0, rank=1, pids=[21976], signal="SIGKILL", **{"class": "kill"})
    (run / "chaos.jsonl").write_text(json.dumps(told) + "\n")
    promise = {"recovers": True, "lost_steps": 1, "detect_s": 0.3, "resume_s": 1.0}
    kill = {"index": 0, "kind": "kill", "rank": 1, "promise": promise, "kept": True, "problems": []}
    kill["outcome"] = {"source": "memory", "lost_steps": 0, "resume_s": 0.41, "phases": SECONDS[0]}
    never = {
        **kill,
        "index": 1,
        "kind": "stop",
        "outcome": {},
        "kept": None,
        "problems": ["not injected: late"],
    }
    campaign = {"status": "finished", "injected": 1, "kept": 1, "faults": [kill, never]}
    (run / "chaos.json").write_text(json.dumps(campaign))
    page = page_of(run)
    first, second = table(page, "campaign")
    assert first[:6] == ["kill", "1", "yes", "0 / 1", "0.048 / 0.300", "0.410 / 1.000"]
    assert [float(cell) for cell in first[6:12]] == pytest.approx(list(SECONDS[0].values()), abs=5e-4)
    assert (second[2], second[-1]) == ("-", "not injected: late")
    lanes = charts(page)["Events"]
    assert "fault" in [text.text for text in lanes.iter("text") if text.get("class") == "y"]
    assert "signal: SIGKILL" in Page(page).text


HOSTILE = "<script>alert(1)</script>"


@pytest.mark.parametrize("value", [HOSTILE, None, [HOSTILE], {HOSTILE: HOSTILE}, 1e999, -3, True])
def test_odd_values_make_no_tag_and_no_wrong_figure(tmp_path: Path, value: Any) -> None:
    """Records come from machines, and a campaign's report may be anybody's."""
    fields = ("source", "from_step", "lost_steps", *(f"{phase}_s" for phase in PHASES))
    odd = event("restored", 12, 9, **dict.fromkeys(fields, value))
    cause = event("verdict", 11, 9, sentence=value, ranks=value)
    run = write_run(tmp_path / "run", METRICS[:20], [cause, odd])
    fault = dict.fromkeys(("kind", "rank", "kept", "promise", "outcome", "problems"), value)
    (run / "chaos.json").write_text(json.dumps({"faults": [fault, value], "kept": value}))
    page = page_of(run)
    assert "<script>alert" not in page
    for axis in ("time", "step"):
        for node in charts(page, axis)["Recoveries"].iter():
            assert not {"nan", "inf"} & {node.get(key, "") for key in ("x", "y", "width")}
