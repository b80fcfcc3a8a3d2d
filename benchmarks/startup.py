"""Seconds from the command to the first step on an embedded Ray, and where they go.

    python benchmarks/startup.py [--repeats 5]

Baseline in the same run: what importing the trainer costs a process by itself. Prints one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from throughput import CONFIG, execute


def main() -> None:
    """Start a two-step run several times and read the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    parts = [one_start() for _ in range(args.repeats)]
    medians = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
    totals = [part["command_to_first_step_s"] for part in parts]
    spread = {
        "min": min(totals),
        "max": max(totals),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps({"bench": "startup", "ranks": 2, **medians, **spread}))


def one_start() -> dict[str, float]:
    """Times of one run, from events.jsonl and metrics.jsonl."""
    folder = Path(tempfile.mkdtemp(prefix="rayfold-bench-"))
    try:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import rayfold.runtime.trainer"], check=True, timeout=120)
        import_s = time.perf_counter() - started
        begin = time.time()
        command = [
            str(Path(sys.executable).with_name("rayfold")),
            "train",
            str(CONFIG),
            f"run.dir={folder / 'run'}",
        ]
        execute([*command, "run.steps=2", "run.workers=2", "model.preset=tiny", "--quiet"])
        end = time.time()
        events = {
            e["kind"]: e["time_unix"]
            for e in map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
        }
        first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])["time_unix"]
        return {
            "import_alone_s": import_s,
            "command_to_first_step_s": first - begin,
            "command_to_controller_s": events["run_started"] - begin,
            "controller_to_formed_s": events["formed"] - events["run_started"],
            "formed_to_first_step_s": first - events["formed"],
            "end_of_run_to_end_of_command_s": end - events["run_finished"],
        }
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
