"""Schedules as pictures: nothing lost, nothing moved."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from rayfold.parallel.layout import Layout, ScheduleName
from rayfold.parallel.schedules import order_of
from rayfold.parallel.timeline import Durations, Timeline, simulate
from rayfold.runtime.schedule_chart import draw_schedule, text_rows

SVG = "{http://www.w3.org/2000/svg}"


def timeline_of(name: ScheduleName, count: int, stages: tuple[float, ...] = ()) -> Timeline:
    layout = Layout(dp_replicate=1, dp_shard=1, pp=2, schedule=name)
    return simulate(order_of(layout, count), Durations(stages=stages))


def rows(timeline: Timeline) -> list[str]:
    return ["".join(cell.text for cell in row).rstrip() for row in text_rows(timeline)]


def test_a_column_is_a_unit_of_time() -> None:
    """What stands below each other happens at once."""
    assert rows(timeline_of("gpipe", 2)) == ["F0 F1          B0--- B1---", "   F0 F1 B0--- B1---"]
    assert rows(timeline_of("gpipe", 1, (1.0, 2.0))) == ["F0                   B0---", "   F0--- B0---------"]


def test_stages_of_one_rank_are_told_apart() -> None:
    """A micro-batch passes twice through the ranks of a V."""
    first, last = rows(timeline_of("zbv", 2))
    assert first.split()[:3] == ["0F0", "0F1", "3F0"]
    assert last.split()[:4] == ["1F0", "2F0", "1F1", "2F1"]


@pytest.mark.parametrize(("name", "count"), [("1f1b", 4), ("zbv", 6), ("gpipe", 400)])
def test_an_image_has_a_box_for_every_step_in_its_place(name: ScheduleName, count: int) -> None:
    """Boxes of one lane do not overlap, and the image stays of a size that can be opened."""
    timeline = timeline_of(name, count)
    image = ElementTree.fromstring(draw_schedule(timeline, title="a < b & c", labels=["one", "two"]))
    lanes: dict[str, list[tuple[float, float]]] = {}
    for box in image.iter(f"{SVG}rect"):
        if box.find(f"{SVG}title") is not None:
            lanes.setdefault(box.attrib["y"], []).append((float(box.attrib["x"]), float(box.attrib["width"])))
    assert [len(boxes) for boxes in lanes.values()] == [len(steps) for steps in timeline.ranks]
    for boxes in lanes.values():
        for (x, width), (following, _) in pairwise(boxes):
            assert x + width <= following
    assert float(image.attrib["width"]) < 4200
    assert image.attrib["aria-label"] == "a < b & c"
