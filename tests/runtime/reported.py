"""A run directory written by hand, and the report page that comes of it, taken apart."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rayfold.runtime.report import write_report

START = 1_790_000_000.0
Record = dict[str, Any]


def training(step: int, at_s: float | None = None, **fields: Any) -> Record:
    """A line of metrics.jsonl; a step takes one second unless told otherwise."""
    usual: Record = {
        "step": step,
        "time_unix": START + (step if at_s is None else at_s),
        "loss": 5.0 - step / 100,
    }
    usual |= {"grad_norm": 1.0 + step % 3, "lr": 3e-4, "tokens": 1000, "tokens_per_s": 1000.0 + step % 7}
    usual |= {"step_time_s": 1.0, "data_wait_s": 0.1, "snapshot_stall_s": 0.05, "exposed_comm_s": 0.2}
    return {**usual, "memory_bytes": 2**30, **fields}


def event(kind: str, at_s: float, step: int = 0, **fields: Any) -> Record:
    """A line of events.jsonl."""
    return {"time_unix": START + at_s, "kind": kind, "step": step, **fields}


def write_run(
    run_dir: Path, metrics: Iterable[Record], events: Iterable[Record] = (), summary: Record | None = None
) -> Path:
    """A run directory as a run writes it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    (run_dir / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in events))
    if summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def page_of(run_dir: Path) -> str:
    """The page of a run, as text."""
    return write_report(run_dir).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data + " "


def charts(page: str, axis: str = "time") -> dict[str, ET.Element]:
    """Title -> chart over that axis, parsed as XML."""
    found = re.findall(rf'<svg class="chart {axis}".*?</svg>(?=<svg class="chart|</figure>)', page, re.DOTALL)
    return {str(svg.get("aria-label")).rpartition(" over ")[0]: svg for svg in map(ET.fromstring, found)}


def paths(svg: ET.Element, css: str) -> list[str]:
    """The `d` of each path that has that class."""
    return [p.get("d", "") for p in svg.iter("path") if css in p.get("class", "").split()]


def points(d: str) -> list[tuple[float, float]]:
    """The vertices of a path of M and L, 1,000 units wide."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", d)]
