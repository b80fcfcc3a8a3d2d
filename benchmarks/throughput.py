"""Tokens/s of Rayfold against plain torch: same model, data, dtype and ranks, in alternating pairs of whole
runs.

    python benchmarks/throughput.py [--pairs 5] [--steps 16] [--ranks 2] [--compute fp32 bf16] [KEY=VALUE ...]

Each run trains `--steps` steps; its figure is the median tokens/s after the first three. A pair's ratio is
Rayfold over plain torch, the two run one after the other, and the order changes from pair to pair. Prints one
JSON object a line.
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
from pathlib import Path

import torch

HERE = Path(__file__).parent
CONFIG = HERE / "throughput.toml"
UNSETTLED_STEPS = 3
RUN_TIMEOUT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compute", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    args, overrides = parser.parse_known_args()
    medians: dict[str, float] = {}
    for compute in args.compute:
        settings = [
            f"run.steps={args.steps}",
            f"run.workers={args.ranks}",
            f"precision.compute={compute}",
            *overrides,
        ]
        ratios: list[float] = []
        plain: list[float] = []
        ours: list[float] = []
        for pair in range(args.pairs):
            if pair % 2:
                ours.append(run_rayfold(settings))
            plain.append(run_plain(settings, args.ranks))
            if pair % 2 == 0:
                ours.append(run_rayfold(settings))
            ratios.append(ours[-1] / plain[-1])
            print(f"{compute} pair {pair + 1}/{args.pairs}: {ratios[-1]:.3f}", file=sys.stderr, flush=True)
        medians[compute] = statistics.median(ours)
        print(json.dumps(report(compute, args, ratios, plain, ours)), flush=True)
    if len(medians) == 2:
        print(
            json.dumps(
                {"bench": "bf16_over_fp32", "ratio": medians["bf16"] / medians["fp32"], "amx": has_amx()}
            )
        )


def run_plain(settings: list[str], ranks: int) -> float:
    """Median tokens/s of the hand-written loop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = execute([*command, str(HERE / "plain_torch.py"), str(CONFIG), *settings])
    return settled(json.loads(done.splitlines()[-1])["tokens_per_s"])


def run_rayfold(settings: list[str]) -> float:
    """Median tokens/s of the same run by the command."""
    folder = Path(tempfile.mkdtemp(prefix="rayfold-bench-"))
    try:
        command = [
            str(Path(sys.executable).with_name("rayfold")),
            "train",
            str(CONFIG),
            f"run.dir={folder / 'run'}",
        ]
        execute([*command, *settings, "--quiet"])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        return settled([json.loads(line)["tokens_per_s"] for line in lines])
    finally:
        shutil.rmtree(folder)


def execute(command: list[str]) -> str:
    """Run to the end; its output on failure is the error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def settled(speeds: list[float]) -> float:
    """Median after the first steps, which warm caches."""
    return statistics.median(speeds[UNSETTLED_STEPS:])


def report(
    compute: str, args: argparse.Namespace, ratios: list[float], plain: list[float], ours: list[float]
) -> dict:
    """One line of the result."""
    return {
        "bench": "throughput",
        "compute": compute,
        "ranks": args.ranks,
        "pairs": args.pairs,
        "steps": args.steps,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rayfold_tokens_per_s": statistics.median(ours),
        "plain_tokens_per_s": statistics.median(plain),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, amx={has_amx()}",
        "torch": torch.__version__,
    }


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


if __name__ == "__main__":
    main()
