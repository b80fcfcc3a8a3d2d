"""`rayfold plan` tells what a run would be, and starts nothing."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from commands import Bench

PIPELINE = ("run.workers=4", "parallel.pp=2", "batch.size=8", "batch.micro_size=1")
WAITING = "1f1b: 2 stages on 2 ranks, 4 micro-batches, 20.0% of the time waiting"
ROWS = (
    "pp 0    F0 F1       B0--- F2 B1--- F3 B2---    B3---",
    "pp 1       F0 B0--- F1 B1--- F2 B2--- F3 B3---",
)


def test_a_plan_names_ranks_memory_and_schedule(bench: Bench, small: Path, run_dir: Path) -> None:
    """What each rank holds and does can be read before a queue is joined."""
    ended = bench.run("plan", small, *PIPELINE, "--schedule", timeout_s=60)
    assert ended.status == 0, ended.err
    said = [line.rstrip() for line in ended.out.splitlines()]
    assert "layout   dp_replicate=1 dp_shard=2 pp=2 pipeline_schedule=1f1b" in said
    assert "ranks    4 on cpu" in said
    assert "stages   ranks 2 to 3: stage 1 (layers 1)" in said
    assert any("activations" in line and line.endswith("MiB") for line in said)
    assert any(line.startswith(WAITING) for line in said)
    assert set(ROWS) < set(said)
    assert not run_dir.exists()


def test_json_and_image_hold_the_same_steps(bench: Bench, small: Path) -> None:
    """One for programs, one to look at; both of the order that the text shows."""
    image = bench.folder / "schedule.svg"
    ended = bench.run("plan", small, *PIPELINE, "--json", "--out", image, timeout_s=60)
    assert ended.status == 0, ended.err
    assert len(ended.out.splitlines()) == 1
    schedule = ended.result["schedule"]
    assert schedule["bubble"] == pytest.approx(0.2)
    assert schedule["held"] == [2, 1]
    assert schedule["steps"][1][:3] == [["1F0", 1, 2], ["1B0", 2, 4], ["1F1", 4, 5]]
    assert [rank["stages"] for rank in ended.result["ranks"]] == [[0], [0], [1], [1]]
    drawn = ElementTree.parse(image).iter("{http://www.w3.org/2000/svg}title")
    assert len(list(drawn)) == sum(map(len, schedule["steps"]))


def test_without_a_pipeline_it_says_how_to_get_one(bench: Bench, small: Path) -> None:
    """A schedule of nothing is a question, not a mistake; an image of nothing could not be written."""
    ended = bench.run("plan", small, "--schedule", timeout_s=60)
    assert ended.status == 0, ended.err
    assert "no pipeline: parallel.pp = 1" in ended.out
    assert "parallel.pp=2 run.workers=2" in ended.out
    there = bench.run("plan", small, "parallel.pp=2", "run.workers=2", timeout_s=60)
    assert there.status == 0, there.err
    assert "pp=2" in there.out
    refused = bench.run("plan", small, "--out", bench.folder / "a.svg", timeout_s=60)
    assert refused.status == 2
    assert "parallel.pp=2" in refused.err


def test_a_wrong_plan_is_answered_with_what_works(bench: Bench, small: Path) -> None:
    """Exit 2 and the nearest spelling, as for every verb."""
    ended = bench.run("plan", small, *PIPELINE, "--out", "schedule.png", timeout_s=60)
    assert ended.status == 2
    assert "write --out schedule.svg" in ended.err
    ended = bench.run("plan", small, "run.workers=3", "parallel.pp=3", timeout_s=60)
    assert ended.status == 2
    assert "parallel.pp" in ended.err
    assert "Traceback" not in ended.err


def test_a_terminal_shows_colours_and_what_fits(bench: Bench, small: Path) -> None:
    """A row that is broken over lines cannot be read from left to right."""
    bench.env["COLUMNS"] = "40"
    command = bench.start("plan", small, *PIPELINE, "--schedule", on_terminal=True)
    assert command.wait(60).status == 0
    shown = command.shown()
    assert "\x1b[" in shown
    assert "--out FILE.svg draws all of it" in shown


def test_a_plan_says_where_snapshots_have_no_room(bench: Bench, small: Path) -> None:
    """Before a run starts: told where they are automatic, refused as a mistake where they were asked for."""
    tiny = "snapshot.memory_share=1e-9"
    told = bench.run("plan", small, tiny, timeout_s=60)
    assert told.status == 0, told.err
    assert "no snapshots in memory here: 2 ranks with 4 copies" in told.out
    assert "raise snapshot.memory_share above" in told.out
    refused = bench.run("plan", small, tiny, "snapshot.enabled=true", timeout_s=60)
    assert refused.status == 2
    assert "snapshot.enabled: is true, and 2 ranks with 4 copies" in refused.err
