"""The report page: what it shows of a run and where, and what it does with files that are odd or missing."""

import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from reported import START, Page, Record, charts, event, page_of, paths, points, training, write_run

from rayfold.runtime.chart import XAxis, compact, duration
from rayfold.runtime.report import ReportError, write_report

RECOVERED = [training(s) for s in range(1, 21)]
RECOVERED += [training(s, 20 + s, attempt=2) for s in range(16, 21)]
RECOVERED += [training(s, 20 + s) for s in range(21, 61)]
EVENTS = [
    event("run_started", 0),
    event("formed", 0.5, epoch=1, world_size=4, layout="dp_shard=4", nodes={"0": "secret-node"}),
    event("snapshot", 15, 15),
    event("fault", 22, 20),
    event("verdict", 24, 20, sentence="Rank 3 on node-b was killed by signal 9."),
    event("remedy", 25, 20, action="replace"),
    event("restored", 33, 15, source="peer", from_step=15, lost_steps=5, seconds=1.5),
    event("run_finished", 80, 60),
]


def test_page_shows_every_quantity_of_a_run(tmp_path: Path) -> None:
    summary = {"status": "finished", "steps": 60, "tokens": 60_000, "final_loss": 4.4, "wall_s": 80.0}
    validation = {"step": 60, "time_unix": START + 80, "val_loss": 4.25, "val_bits_per_byte": 1.375}
    run = write_run(tmp_path / "tiny", [*RECOVERED, validation], EVENTS, summary)
    (run / "config.toml").write_text('[run]\nname = "my run"\nsteps = 60\n')
    page = page_of(run)
    titles = ["Loss", "Learning rate", "Gradient norm", "Throughput", "Step time", "Memory"]
    titles += ["Recoveries", "Events"]
    assert list(charts(page)) == list(charts(page, "step")) == titles
    text = Page(page).text
    for said in ("my run", "finished", "60k", "4.25", "1.375", "1 min 20 s", "dp_shard=4", "steps = 60"):
        assert said in text
    assert "Rank 3 on node-b was killed by signal 9." in text
    assert "source: peer" in text
    assert "secret-node" not in page  # a map of thousands of ranks does not belong in a table


def test_every_event_stands_where_its_time_is_on_every_chart(tmp_path: Path) -> None:
    """The last event is the end of the axis, so the place of each is its share of 80 seconds."""
    found = charts(page_of(write_run(tmp_path / "run", RECOVERED, EVENTS)))
    assert {(svg.get("data-lo"), svg.get("data-hi")) for svg in found.values()} == {("0.0", "80.0")}
    marks = [float(m.get("x", "")[:-1]) for m in found["Events"].iter("svg") if m.get("class") == "mark"]
    assert sorted(marks) == pytest.approx(sorted((e["time_unix"] - START) / 0.8 for e in EVENTS), abs=0.006)
    for title in ("Loss", "Throughput", "Step time", "Memory"):
        rules = [line.get("x1") for line in found[title].iter("line") if "rule" in line.get("class", "")]
        assert rules == ["27.50%", "41.25%"]  # fault and restored
    drawn = sorted({x for d in paths(found["Loss"], "line") for x, _ in points(d)})
    assert drawn == pytest.approx([(r["time_unix"] - START) / 0.08 for r in RECOVERED], abs=0.06)


@pytest.mark.parametrize("told", [True, False])
def test_steps_trained_again_are_a_segment_of_their_own(tmp_path: Path, told: bool) -> None:
    """Over steps, no stroke goes back; the first attempt at steps 16 to 20 is faint and below the second."""
    metrics = RECOVERED if told else [{k: v for k, v in r.items() if k != "attempt"} for r in RECOVERED]
    found = charts(page_of(write_run(tmp_path / "run", metrics, EVENTS if told else ())), "step")["Loss"]
    assert [
        css.get("class", "").split()[-1] for css in found.iter("path") if "line" in css.get("class", "")
    ] == [
        "stale",
        "tone-loss",
    ]
    for d in paths(found, "line"):
        for stroke in re.findall(r"M[^M]+", d):
            xs = [x for x, _ in points(stroke)]
            assert xs == sorted(xs)
    (live,) = [d for d in paths(found, "line") if d not in paths(found, "stale")]
    assert live.count("M") == 2


def test_the_line_has_a_gap_where_the_workers_were_formed_anew(tmp_path: Path) -> None:
    """No step was lost here, but nothing was trained between 10 s and 40 s either."""
    metrics = [training(s) for s in range(1, 11)] + [training(s, 30 + s) for s in range(11, 21)]
    run = write_run(tmp_path / "run", metrics, [event("restored", 35, 10)])
    (line,) = paths(charts(page_of(run))["Loss"], "line")
    assert line.count("M") == 2


@pytest.mark.parametrize("own_line", [False, True])
def test_validation_is_drawn_from_its_own_line_or_from_the_step_it_followed(
    tmp_path: Path, own_line: bool
) -> None:
    metrics = []
    for step in range(1, 31):
        val = {"val_loss": 6.0 - step / 10, "val_bits_per_byte": 2.0} if step % 10 == 0 else {}
        metrics.append(training(step, **({} if own_line else val)))
        if own_line and val:
            metrics.append({"step": step, "time_unix": START + step + 0.5, **val})
    found = charts(page_of(write_run(tmp_path / "run", metrics)))
    (line,) = paths(found["Loss"], "tone-val")[:1]
    assert len(points(line)) == 3
    (training_line,) = [d for d in paths(found["Loss"], "line") if d != line]
    assert training_line.count("M") == 1  # the validation's own line is no gap in the training loss


def test_nan_is_shown_as_a_gap_and_counted(tmp_path: Path) -> None:
    metrics = [training(s, loss=math.nan if s in (10, 11) else 2.0) for s in range(1, 21)]
    page = page_of(write_run(tmp_path / "run", [*metrics, training(21, loss=math.inf), training(22)]))
    loss = charts(page)["Loss"]
    (line,) = paths(loss, "line")
    assert line.count("M") == 3
    assert len(points(line)) == 9 + 9 + 1
    assert len(paths(loss, "hole")) == 1
    assert "not finite at 3 steps, first at step 10" in Page(page).text
    assert "nan" not in line


def test_breakdown_stacks_to_the_step_time(tmp_path: Path) -> None:
    found = charts(page_of(write_run(tmp_path / "run", [training(s) for s in range(1, 11)])))["Step time"]
    areas = [points(d) for d in paths(found, "area")]
    assert len(areas) == 4
    for below, above in pairwise(areas):
        assert min(y for _, y in below) == max(y for _, y in above)
    heights = [max(y for _, y in a) - min(y for _, y in a) for a in areas]
    assert [h / sum(heights) for h in heights] == pytest.approx([0.65, 0.2, 0.05, 0.1], abs=0.002)


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", RECOVERED, EVENTS))
    for tag, attrs in Page(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use", "a")
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & attrs.keys()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", page)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    """Names, verdicts, kinds and configuration come from users and machines: none of it becomes a tag."""
    hostile = "</script></title><script>alert(1)</script><img src=x onerror='alert(2)'>\"\x00\ud800"
    events = [event("verdict", 1, sentence=hostile), {**event(hostile, 2), hostile: {hostile: [hostile]}}]
    summary = {"status": hostile, "verdict": hostile, "layout": {hostile: hostile}, "steps": hostile}
    run = write_run(tmp_path / "run", [training(1)], events, summary)
    (run / "config.toml").write_text(f"[run]\nname = {json.dumps(hostile[:-2])}\n")
    page = page_of(run)
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert "<script>alert" not in page
    assert "alert(2)" in parsed.text
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert len(charts(page)) == 8


def test_a_truncated_last_line_is_tolerated_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training(s) for s in range(1, 6)])
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "time_un')
    page = page_of(run)
    assert "1 line of metrics.jsonl could not be read (the last one, cut off" in Page(page).text
    assert len(points(paths(charts(page)["Loss"], "line")[0])) == 5


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training(1)])
    with (run / "metrics.jsonl").open("ab") as lines:
        lines.write(
            b'[1]\n{"step": "x", "time_unix": 1}\n\n\xff\xfe\n' + json.dumps(training(2)).encode() + b"\n"
        )
    (run / "summary.json").write_text("{")
    text = Page(page_of(run)).text
    assert "3 lines of metrics.jsonl could not be read (first: line 2)" in text
    assert "summary.json could not be read" in text


def test_two_hundred_thousand_steps_stay_small_and_keep_their_spike(tmp_path: Path) -> None:
    metrics = (training(s, loss=9.0 if s == 77_777 else 2.0 + s % 10 / 100) for s in range(1, 200_001))
    snapshots = (event("snapshot", 10 * i, 10 * i) for i in range(1, 20_001))
    run = write_run(tmp_path / "run", metrics, [*snapshots, event("fault", 150_000, 150_000)])
    began = time.perf_counter()
    page = page_of(run)
    assert time.perf_counter() - began < 60  # some 4 s on two idle cores
    assert len(page) < 2_000_000
    for svg in charts(page).values():
        assert all(len(points(d)) <= 1500 for d in paths(svg, "line"))
    line = points(paths(charts(page)["Loss"], "line")[0])
    spike = min(line, key=lambda p: p[1])
    assert spike[0] == pytest.approx(77_777 / 200, abs=1)
    assert sorted(y for _, y in line)[1] > spike[1] + 150
    assert "fault" in Page(page).text


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param([training(1)], id="a single step"),
        pytest.param([training(s, loss=2.0) for s in range(9)], id="all equal"),
        pytest.param([training(s, loss=math.nan, step_time_s=math.inf) for s in range(9)], id="all NaN"),
        pytest.param(
            [training(s, loss=0.0, lr=0, tokens_per_s=0, step_time_s=0) for s in range(9)], id="all zero"
        ),
        pytest.param([training(s, loss=1e308 * (s % 2), grad_norm=10**400) for s in range(9)], id="overflow"),
        pytest.param([training(s, 0, loss=None) for s in range(9)], id="one moment, no loss"),
        pytest.param([training(s, loss=10.0**s, grad_norm=1e-30) for s in range(9)], id="nine decades"),
        pytest.param([{"step": 1, "time_unix": START, "val_loss": 3.0}], id="validation only"),
        pytest.param([{"step": 1, "time_unix": START, "loss": 3.0}], id="loss only"),
    ],
)
def test_odd_metrics_still_make_a_page_without_nan_coordinates(tmp_path: Path, metrics: list[Record]) -> None:
    page = page_of(write_run(tmp_path / "run", metrics))
    for axis in ("time", "step"):
        for svg in charts(page, axis).values():
            for node in svg.iter():
                assert not re.search(
                    r"\b(nan|inf)\b", " ".join(v for k, v in node.items() if k in ("d", "x", "y", "x1"))
                )


def test_a_run_without_steps_says_so(tmp_path: Path) -> None:
    assert "No step has been recorded yet." in page_of(write_run(tmp_path / "a", []))
    page = page_of(write_run(tmp_path / "b", [], [event("run_started", 0)]))
    assert "No step has been recorded yet." in page
    assert list(charts(page)) == ["Events"]


def test_figures_come_from_the_metrics_while_there_is_no_summary(tmp_path: Path) -> None:
    text = Page(page_of(write_run(tmp_path / "run", RECOVERED, EVENTS))).text
    assert "in progress" in text
    assert "no summary yet" in text
    assert re.search(r"tokens\s+60k\s", text)  # the five steps trained twice count once
    assert re.search(r"world size\s+4\s", text)


def test_a_summary_older_than_the_steps_is_left_out(tmp_path: Path) -> None:
    """A run that was stopped and goes on in its directory is not stopped."""
    text = Page(
        page_of(write_run(tmp_path / "run", RECOVERED, EVENTS, {"status": "stopped", "steps": 40}))
    ).text
    assert "in progress" in text
    assert "summary.json ends at step 40, but the run went on" in text


def test_the_verdict_of_a_failed_run_stands_out(tmp_path: Path) -> None:
    summary = {"status": "failed", "verdict": "Rank 0 ran out of memory."}
    page = page_of(write_run(tmp_path / "run", RECOVERED, EVENTS, summary))
    assert re.search(
        r'<p class="verdict bad">.*?Rank 0 ran out of memory\.</p><p class="verdict warn">.*?Rank 3', page
    )


def test_page_is_written_where_asked_and_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training(1)])
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]  # no temporary file is left
    for out, problem in ((tmp_path / "no" / "page.html", "no folder"), (tmp_path, "is a folder")):
        with pytest.raises(ReportError, match=problem):
            write_report(run, out)


def test_a_wrong_folder_is_answered_with_the_nearest_run(tmp_path: Path) -> None:
    near = write_run(tmp_path / "runs" / "llama-400m", [training(1)])
    write_run(tmp_path / "runs" / "evoformer", [training(1)])
    (tmp_path / "runs" / "llama").mkdir()
    for asked, problem in (("lama-400m", "no folder"), ("llama", "no metrics.jsonl in")):
        with pytest.raises(ReportError, match=problem) as error:
            write_report(tmp_path / "runs" / asked)
        assert str(tmp_path / "runs" / asked) in str(error.value)
        assert str(error.value).endswith(f"{near}.")
    with pytest.raises(ReportError, match="runs/"):  # the folder above the runs
        write_report(tmp_path / "runs")
    with pytest.raises(ReportError, match=r"llama-400m\.$"):  # a file of the run
        write_report(near / "metrics.jsonl")
    with pytest.raises(ReportError, match=r"run\.dir"):
        write_report(tmp_path / "nothing" / "here")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (2.34567, "2.346"),
        (312, "312"),
        (9876, "9,876"),
        (121_000, "121k"),
        (1_240_000, "1.24M"),
        (3e-4, "3e-4"),
    ],
)
def test_numbers_are_said_as_people_say_them(value: float, said: str) -> None:
    assert compact(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0"),
        (4.25, "4.25 s"),
        (59.99, "60 s"),
        (90, "1 min 30 s"),
        (3599.9, "60 min"),
        (7260, "2 h 1 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize("hi", [0.003, 1.0, 47.0, 3000.0, 90_000.0, 3e6, 1e9])
def test_time_axis_has_a_few_round_ticks_inside(hi: float) -> None:
    ticks = XAxis(name="time", lo=0.0, hi=hi).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(0 <= x <= 1000 for x, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
