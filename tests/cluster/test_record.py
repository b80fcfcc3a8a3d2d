"""The record of a run is written by whoever controls it, and has no seam where one took over from another."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rayfold.cluster.ledger import Ledger, LedgerDamaged
from rayfold.cluster.record import NEWS_KEPT, Record
from rayfold.runtime.journal import EVENTS, METRICS, read_lines

STEPS, KILLS = 3000, 25
FORK = multiprocessing.get_context("fork")


def line(step: int) -> tuple[str, dict[str, Any]]:
    """A step as rank 0 tells it."""
    figures = ("loss", "tokens_per_s", "step_time_s", "grad_norm", "lr", "memory_bytes", "tokens")
    figures += ("snapshot_stall_s",)
    return "metric", {"step": step, "time_unix": 1.0, **dict.fromkeys(figures, 1.0)}


def event(step: int) -> tuple[str, dict[str, Any]]:
    """Something that a rank has to tell."""
    return "event", {"kind": "checkpoint", "step": step, "seconds": 0.0}


def formed(epoch: int) -> dict[str, Any]:
    """What is told of ranks that have formed."""
    return {"epoch": epoch, "spare_pids": [7]}


def begin(run_dir: Path) -> None:
    """The record of a run whose ranks have formed."""
    record = Record(run_dir, "test", owner="a")
    record.event("run_started")
    record.begin_epoch(1, formed(1), came_unix=None)
    record.close()


def take_in_all(run_dir: Path, heard: Any) -> None:
    """A controller's life: hear what rank 0 tells from where it was acknowledged, in batches of any size."""
    record = Record(run_dir, "test", owner="a")
    told = [item for step in range(1, STEPS + 1) for item in (line(step), event(step))]
    draw = random.Random(os.getpid())
    number = heard.value
    while number < len(told):
        batch = told[number : number + draw.randint(1, 40)]
        assert record.take_in(batch, epoch=1, rank=0, number=number)
        number += len(batch)
        heard.value = number  # as the rank learns it; a kill may come before
    record.close()


def test_whenever_the_writer_is_killed_every_line_is_there_once_and_in_order(tmp_path: Path) -> None:
    """`kill -9` between a line and the word that it is written, many times over."""
    begin(tmp_path)
    heard, draw = FORK.Value("q", 0, lock=False), random.Random(5)
    for _ in range(KILLS):
        writer = FORK.Process(target=take_in_all, args=(tmp_path, heard))
        writer.start()
        time.sleep(draw.uniform(0.005, 0.03))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join(30)
    take_in_all(tmp_path, heard)
    assert [told["step"] for told in read_lines(tmp_path / METRICS)] == list(range(1, STEPS + 1))
    assert not any("attempt" in told for told in read_lines(tmp_path / METRICS))
    kinds = [told["kind"] for told in read_lines(tmp_path / EVENTS)]
    assert kinds == ["run_started", "formed", *["checkpoint"] * STEPS]


def test_what_is_told_again_is_written_once(tmp_path: Path) -> None:
    """The answer to a batch is lost with the controller, so the rank tells it again, and more with it."""
    begin(tmp_path)
    first = Record(tmp_path, "test", owner="a")
    assert first.take_in([line(1), line(2)], epoch=1, rank=0, number=0)
    first.close()
    second = Record(tmp_path, "test", owner="a")
    assert second.take_in([line(1), line(2), line(3)], epoch=1, rank=0, number=0)
    assert second.take_in([event(3)], epoch=1, rank=1, number=0)
    assert not second.take_in([line(4)], epoch=2, rank=0, number=0), "no such epoch has formed"
    second.close()
    assert [told["step"] for told in read_lines(tmp_path / METRICS)] == [1, 2, 3]


def test_a_record_that_another_run_left_is_gone_on_with_as_a_new_attempt(tmp_path: Path) -> None:
    """A bookmark of a run that ended long ago must cut nothing off, and lets nobody speak."""
    begin(tmp_path)
    first = Record(tmp_path, "test", owner="a")
    first.take_in([line(1)], epoch=1, rank=0, number=0)
    first.close()
    other = Record(tmp_path, "test", owner="b")
    assert other.attempt == 2
    assert not other.told_any
    assert not other.take_in([line(2)], epoch=1, rank=0, number=1)
    other.close()
    assert len(list(read_lines(tmp_path / METRICS))) == 1


def test_whoever_watches_sees_the_news_since_a_number_and_a_run_without_watchers_forgets_them(
    tmp_path: Path,
) -> None:
    """A run may last for weeks after its command is gone."""
    begin(tmp_path)
    record = Record(tmp_path, "test", owner="a")
    seen, news = record.news(None)
    assert news == []
    record.take_in([line(1), line(2)], epoch=1, rank=0, number=0)
    now, news = record.news(seen)
    assert [item["metric"]["step"] for item in news] == [1, 2]
    many = 3 * NEWS_KEPT
    record.take_in([line(step) for step in range(3, many)], epoch=1, rank=0, number=2)
    later, news = record.news(now)
    assert later == now + many - 3
    assert len(news) <= 2 * NEWS_KEPT
    assert news[-1]["metric"]["step"] == many - 1
    record.close()


def test_spares_are_told_when_others_are_ready_than_were_said_to_be(tmp_path: Path) -> None:
    """When the ranks form that is said too."""
    begin(tmp_path)
    record = Record(tmp_path, "test", owner="a")
    record.spares([8, 7])
    record.spares([7, 8])
    record.begin_epoch(2, formed(2), came_unix=None)  # one of them has a rank now
    record.spares([7])
    record.spares([])
    record.close()
    told = [event["pids"] for event in read_lines(tmp_path / EVENTS) if event["kind"] == "spares"]
    assert told == [[7, 8], []]


def test_a_ledger_is_read_by_its_owner_and_damage_is_noticed(tmp_path: Path) -> None:
    """A controller that went on from wrong values would end ranks that live."""
    path = tmp_path / "ledger.json"
    ledger = Ledger(path, owner="a")
    assert ledger.read() is None
    values = {"epoch": 3, "names": ["x"], "seconds": 0.1, "none": None}
    ledger.write(values)
    assert Ledger(path, owner="a").read() == values
    assert Ledger(path, owner="b").read() is None
    path.write_text(path.read_text().replace('"epoch": 3', '"epoch": 4'))
    with pytest.raises(LedgerDamaged, match=r"ledger\.json: its checksum"):
        ledger.read()
    path.write_text("{")
    with pytest.raises(LedgerDamaged, match="is not what a controller wrote"):
        ledger.read()
