"""How benchmarks of whole runs say what they found."""

import json
import os
import platform
from collections.abc import Sequence
from typing import Any


def median(values: Sequence[float]) -> float:
    """The middle one; NaN of none."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return float("nan")
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, smallest and largest; None of nothing."""
    if not values:
        return None
    return {"median": round(median(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def tell(bench: str, what: str, **values: Any) -> None:
    """Print one line."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"bench": bench, "what": what, **values, "machine": machine}), flush=True)
