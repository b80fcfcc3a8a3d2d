"""Lines that were on their way when all processes were killed."""

import os
from pathlib import Path
from typing import Any

import pytest

from rayfold.faulttol import untold
from rayfold.faulttol.untold import UNTOLD, Untold, untold_in


def line(step: int, time_unix: float = 0.0) -> dict[str, Any]:
    return {"step": step, "time_unix": time_unix or float(step), "loss": 1.0 / step}


def test_what_a_killed_process_had_not_told_is_found_by_the_next(tmp_path: Path) -> None:
    """Each line is in memory outside of the process before the next step begins."""
    if not (pid := os.fork()):
        file = Untold(tmp_path / "node")
        for step in range(1, 6):
            file.add(line(step))
        os._exit(0)
    os.waitpid(pid, 0)
    assert untold_in(tmp_path / "node", after=3) == [line(4), line(5)]
    assert untold_in(tmp_path / "node", after=5) == []
    assert untold_in(tmp_path / "nowhere", after=0) == []


def test_a_step_trained_again_counts_as_it_came_out_last(tmp_path: Path) -> None:
    """A run that went back told other lines of the same steps since."""
    for time_unix in (1.0, 3.0, 2.0):
        file = Untold(tmp_path)
        file.add(line(7, time_unix))
        file.close()
    assert untold_in(tmp_path, after=0) == [line(7, 3.0)]


def test_damaged_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    """A writer may be killed in the middle of a line; the next one begins a new one."""
    file = Untold(tmp_path)
    for step in (1, 2, 3):
        file.add(line(step))
    file.close()
    path = tmp_path / UNTOLD
    path.write_text(path.read_text().replace('"step": 2', '"step": 9')[:-10])
    again = Untold(tmp_path)
    again.add(line(4))
    again.close()
    assert untold_in(tmp_path, after=0) == [line(1), line(4)]


def test_the_file_begins_anew_when_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not grow with the run."""
    monkeypatch.setattr(untold, "MOST_BYTES", 1000)
    file = Untold(tmp_path)
    for step in range(1, 1000):
        file.add(line(step))
        file.all_told()
    file.close()
    assert (tmp_path / UNTOLD).stat().st_size < 2000


def test_no_room_for_a_line_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is kept for a fault must not be one."""
    (tmp_path / "node").write_text("a file where the folder should be")
    file = Untold(tmp_path / "node")
    file.add(line(1))
    file.all_told()
    file.close()
    assert "step=1 its line is not kept in memory" in caplog.text
