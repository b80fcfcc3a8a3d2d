"""What it costs the steps that other nodes keep what protects each node's copies.

    python benchmarks/protection.py [--nodes 3] [--pairs 3] [--steps 80] [KEY=VALUE ...]

The same run twice on so many Ray nodes of this machine, one rank each: with three copies of each rank, of
which one is made safe from the loss of a node again and again, and with two, of which none is. Both make a
copy at every step. Prints one JSON object a line, a pair being one run of each kind in alternating order:

    safe, unsafe   `step_s`, the time of a step; `stall_s`, how long it waited for its copy; `behind`, by how
                   many steps the newest safe one was behind at the end; `scheme`
    ratio          the time of a step with over that without

Times are medians with the smallest and the largest. All nodes share the cores of this machine, so that
whatever is done for safety is taken from the steps; where each node has its own, most of it is not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import from_tests  # noqa: F401
from figures import median, spread, tell

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))
from commands import Bench, events, lines
from nodes import Cluster, join

BENCH = "protection"
CONFIG = Path(__file__).parent / "throughput.toml"
KINDS = {"safe": "snapshot.slots=3", "unsafe": "snapshot.slots=2"}
SMALL = ["data.seq_len=128", "checkpoint.every=0", "snapshot.spares=0", "snapshot.every=1"]
WARM = 10  # steps left out at the beginning: until all kernels are made, and the first step is safe
RUN_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="2: copies; to 5: XOR; then P and Q (default 3)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=80, help="of a run (default 80)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="put over the configuration")
    args = parser.parse_intermixed_args()
    ranks = [f"run.workers={args.nodes}", f"batch.size={args.nodes}", f"run.steps={args.steps}"]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        (at := Path(folder) / "cluster").mkdir()
        cluster = Cluster(at, args.nodes)
        try:
            for pair in range(args.pairs):
                for kind in list(KINDS) if pair % 2 == 0 else reversed(list(KINDS)):
                    (place := Path(folder) / f"{kind}{pair}").mkdir()
                    run = measured(cluster, place, [*SMALL, *ranks, KINDS[kind], *args.settings])
                    found[kind].append(run)
                    said = f"{kind} {median(run['step_s']):.3f} s a step"
                    print(f"pair {pair + 1}/{args.pairs}: {said}", file=sys.stderr, flush=True)
        finally:
            cluster.close()
    for kind, runs in found.items():
        values = {name: spread([v for run in runs for v in run[name]]) for name in ("step_s", "stall_s")}
        behind = spread([run["behind"] for run in runs]) if kind == "safe" else None
        tell(BENCH, kind, nodes=args.nodes, scheme=runs[0]["scheme"], **values, behind=behind)
    ratios = [
        median(safe["step_s"]) / median(unsafe["step_s"])
        for safe, unsafe in zip(found["safe"], found["unsafe"], strict=True)
    ]
    tell(BENCH, "ratio", nodes=args.nodes, step=spread(ratios))


def measured(cluster: Cluster, folder: Path, settings: list[str]) -> dict[str, Any]:
    """What one run on these nodes took."""
    bench, run_dir = Bench(folder), folder / "run"
    try:
        command = bench.start("train", CONFIG, f"run.dir={run_dir}", join(bench, cluster), *settings)
        ended = command.wait(RUN_S)
    finally:
        bench.close()
    if ended.status:
        raise RuntimeError(f"the run failed: {ended.err[-4000:]}")
    told = lines(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    protected = [event for event in events(run_dir, "snapshot") if "scheme" in event]
    return {
        "step_s": [line["step_time_s"] for line in told[WARM:]],
        "stall_s": [line["snapshot_stall_s"] for line in told[WARM:]],
        "behind": told[-1]["step"] - summary.get("node_safe_step", 0),
        "scheme": protected[0]["scheme"] if protected else "none",
    }


if __name__ == "__main__":
    main()
