"""What a checkpoint costs the steps: written by the vaults out of memory, beside the same by the ranks.

    python benchmarks/checkpoints.py [--pairs 3] [--steps 40] [--every 5] [KEY=VALUE ...]

The same run twice, two ranks, a checkpoint every five steps: with snapshots in memory, of which the vault of
the node writes those that are due, and without, where every rank copies its state and writes it from a
thread. Prints one JSON object a line, a pair being one run of each kind in alternating order:

    vaults, ranks   `stall_s`, how long a step with a checkpoint waited for it (with snapshots: for them too);
                    `due_step_s` and `step_s`, steps with a checkpoint beginning at their end, and all;
                    `durable_s`, from the beginning of a checkpoint until it stands
    ratio           the ranks' stall over the vaults', and the ranks' time of a step over the vaults'

Times are medians with the smallest and the largest. Keys such as `data.seq_len=256` change both runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from figures import median, spread, tell

BENCH = "checkpoints"
CONFIG = Path(__file__).parent / "throughput.toml"
KINDS = {"vaults": "snapshot.enabled=true", "ranks": "snapshot.enabled=false"}
SMALL = ["run.workers=2", "data.seq_len=128", "batch.size=4", "snapshot.spares=0", "checkpoint.keep=1"]
WARM = 3  # steps left out at the beginning
RUN_S = 900.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default 40)")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="put over the configuration")
    args = parser.parse_intermixed_args()
    found: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in KINDS}
    for pair in range(args.pairs):
        for kind in list(KINDS) if pair % 2 == 0 else reversed(list(KINDS)):
            run = measured([*SMALL, KINDS[kind], *args.settings], steps=args.steps, every=args.every)
            found[kind].append(run)
            print(f"pair {pair + 1}/{args.pairs}: {kind} {median(run['stall_s']):.4f} s", file=sys.stderr)
    for kind, runs in found.items():
        tell(BENCH, kind, **{name: spread([v for run in runs for v in run[name]]) for name in runs[0]})
    pairs = list(zip(found["ranks"], found["vaults"], strict=True))
    tell(
        BENCH,
        "ratio",
        stall=spread([median(ranks["stall_s"]) / median(vaults["stall_s"]) for ranks, vaults in pairs]),
        step=spread([sum(ranks["step_s"]) / sum(vaults["step_s"]) for ranks, vaults in pairs]),
    )


def measured(settings: Sequence[str], *, steps: int, every: int) -> dict[str, list[float]]:
    """Times of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        fixed = [f"run.dir={run_dir}", f"run.steps={steps}", f"checkpoint.every={every}"]
        command = [
            sys.executable,
            "-m",
            "rayfold.cluster.cli",
            "train",
            str(CONFIG),
            *fixed,
            *settings,
            "--quiet",
        ]
        subprocess.run(command, check=True, timeout=RUN_S, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        told = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    steady = [line for line in lines[WARM:] if line["step"] < steps]  # the last one validates
    due = [line for line in steady if line["step"] % every == 0]
    return {
        "stall_s": [line["snapshot_stall_s"] for line in due],
        "due_step_s": [line["step_time_s"] for line in due],
        "step_s": [line["step_time_s"] for line in steady],
        "durable_s": [event["seconds"] for event in told if event["kind"] == "checkpoint"],
    }


if __name__ == "__main__":
    main()
