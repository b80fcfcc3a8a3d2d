"""The record of a run: whole lines whatever was killed, attempts told apart, figures that follow from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayfold.runtime.journal import Journal, drop_torn_line, read_lines, summarise, write_atomically


def metric(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "tokens": 100,
        "tokens_per_s": 50.0,
        "step_time_s": 2.0,
    } | fields


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("torn", ["", "{", '{"step": 9, "lo', "x" * 200_000])
def test_a_torn_last_line_is_removed(tmp_path: Path, whole: int, torn: str) -> None:
    """A kill in the middle of a line leaves half of it; the next line must not be glued to it."""
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(metric(n + 1)) + "\n" for n in range(whole))
    path.write_text(lines + torn)
    assert [line["step"] for line in read_lines(path)] == list(range(1, whole + 1))
    drop_torn_line(path)
    assert path.read_text() == lines


def test_a_missing_file_is_an_empty_record(tmp_path: Path) -> None:
    """A fresh run has none."""
    drop_torn_line(tmp_path / "none")
    assert list(read_lines(tmp_path / "none")) == []


def test_a_step_trained_again_carries_its_attempt(tmp_path: Path) -> None:
    """No step is told twice as the same: what was told stays, the repetition is marked."""
    journal = Journal(tmp_path)
    assert journal.attempt == 1
    journal.event("run_started", 0)
    for step in (1, 2, 3):
        assert "attempt" not in journal.metric(metric(step))
    journal.close()
    again = Journal(tmp_path)
    assert again.attempt == 2
    again.event("run_started", 0)
    assert [again.metric(metric(step)).get("attempt") for step in (2, 3, 4)] == [2, 2, None]
    again.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 2, 3, 4]
    figures = summarise(tmp_path)
    assert (figures["steps"], figures["tokens"], figures["lost_steps"], figures["restarts"]) == (4, 400, 2, 1)


def test_lines_are_on_disk_when_told(tmp_path: Path) -> None:
    """Whoever is killed the next instant has told it."""
    journal = Journal(tmp_path)
    journal.metric(metric(1))
    event = journal.event("checkpoint", 1, seconds=0.5)
    assert list(read_lines(tmp_path / "events.jsonl")) == [event]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    journal.close()


def write_record(run_dir: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    for name, rows in (("metrics", lines), ("events", events)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_figures_follow_from_the_record(tmp_path: Path) -> None:
    """By hand: the median leaves out three warm-up steps; a pause between two starts is no time at work."""
    lines = [metric(n, tokens_per_s=float(v)) for n, v in enumerate((1, 2, 3, 10, 30, 20), start=1)]
    lines[3] |= {"val_loss": 3.0, "val_bits_per_byte": 2.0}
    lines[5] |= {"val_loss": 2.5, "val_bits_per_byte": 1.5}
    events = [
        {"time_unix": 100.0, "kind": "run_started", "step": 0},
        {"time_unix": 106.0, "kind": "checkpoint", "step": 3},
        {"time_unix": 500.0, "kind": "run_started", "step": 3},
        {"time_unix": 510.0, "kind": "run_finished", "step": 6},
    ]
    write_record(tmp_path, lines, events)
    assert summarise(tmp_path) == {
        "steps": 6,
        "tokens": 600,
        "first_loss": 1.0,
        "final_loss": 1.0 / 6,
        "tokens_per_s": 20.0,
        "wall_s": 16.0,
        "restarts": 1,
        "lost_steps": 0,
        "skipped_data": 0,
        "goodput": pytest.approx(12.0 / 16.0),
        "val_loss": 2.5,
        "val_bits_per_byte": 1.5,
    }


def test_a_run_that_never_trained_has_figures_too(tmp_path: Path) -> None:
    """A failure before the first step writes a summary as any other end does."""
    journal = Journal(tmp_path)
    journal.event("run_started", 0)
    summary = journal.summary("failed", verdict="no data")
    journal.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "failed"
    assert (summary["steps"], summary["tokens"], summary["final_loss"]) == (0, 0, None)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Nobody ever reads half a summary, whatever letters it has."""
    path = tmp_path / "summary.json"
    write_atomically(path, "first")
    write_atomically(path, "zweite Fassung: größer 𝄞")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: größer 𝄞"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
