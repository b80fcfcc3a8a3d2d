"""Time of a step with a snapshot at every one against none, in alternating blocks of steps of one run.

    python benchmarks/snapshots_in_training.py [--blocks 10] [--block 8] [--ranks 2] [KEY=VALUE ...]

Both kinds of steps train the same model in the same processes; a block with snapshots ends with its last copy
committed, so none is under way in the next. The first block of each kind warms up. Prints one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayfold.faulttol.vault import Vault
from rayfold.runtime.config import read_config
from rayfold.runtime.place import SnapshotPlace
from rayfold.runtime.plan import RunPlan, make_run_plan
from rayfold.runtime.trainer import Trainer

CONFIG = Path(__file__).parent / "throughput.toml"
FORK = multiprocessing.get_context("fork")
BUDGET = 8 << 30
RUN_TIMEOUT_S = 1200


class Alternating(Trainer):
    """A trainer that lets a block of steps go without snapshots, and one with them."""

    block = 1

    def _one_step(
        self, mesh: Any, corpus: Any, state: Any, checkpointer: Any, snapshots: Any, loader: Any
    ) -> bool:
        done = state.progress.step
        guard = snapshots if is_on(done + 1, self.block) else None
        stop = super()._one_step(mesh, corpus, state, checkpointer, guard, loader)
        if guard is not None and not is_on(done + 2, self.block):
            snapshots.finish(done + 1, state.progress_values())
        return stop


class Lines:
    """A recorder that keeps the metrics."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def metric(self, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def event(self, kind: str, step: int, **fields: Any) -> None: ...

    def flush(self) -> None: ...


def is_on(step: int, block: int) -> bool:
    """Whether this step is made with snapshots."""
    return (step - 1) // block % 2 == 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=10, help="of each kind")
    parser.add_argument("--block", type=int, default=8, help="steps")
    parser.add_argument("--ranks", type=int, default=2)
    args, overrides = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="rayfold-bench-"))
    state = Path(tempfile.mkdtemp(prefix="rayfold-bench-", dir="/dev/shm"))
    try:
        steps = 2 * args.blocks * args.block
        given = [f'run.dir="{folder / "run"}"', f"run.workers={args.ranks}", f"run.steps={steps}"]
        config = read_config(CONFIG, [*given, "checkpoint.every=0", "snapshot.every=1", *overrides])
        plan = make_run_plan(config, cpus=args.ranks, gpus=0)
        config.run_dir.mkdir()
        lines = train(plan, folder, state, args.block)
        report(lines, args, sum(path.stat().st_size for path in state.glob("*/*.arena")))
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(state)


def train(plan: RunPlan, folder: Path, state: Path, block: int) -> list[dict[str, Any]]:
    """The metrics of rank 0."""
    world_size = plan.layout.world_size
    results = FORK.Queue()
    ranks = [
        FORK.Process(target=on_rank, args=(rank, plan, folder, state, block, results), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while results.empty():
            if time.monotonic() > deadline or not all(rank.is_alive() for rank in ranks):
                raise RuntimeError(f"a rank failed, or the run took longer than {RUN_TIMEOUT_S} s")
            time.sleep(0.1)
        lines: list[dict[str, Any]] = results.get()
    finally:
        for rank in ranks:
            rank.join(timeout=10)
            rank.kill()
    return lines


def on_rank(rank: int, plan: RunPlan, folder: Path, state: Path, block: int, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), plan.layout.world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.layout.world_size)
    vault = Vault(state / str(rank), BUDGET, run="bench")
    place = SnapshotPlace(run="bench", node=str(rank), folder=vault.folder, epoch=1, reserve=vault.reserve)
    recorder = Lines()
    trainer = Alternating(plan, recorder, threading.Event(), place=place)
    trainer.block = block
    trainer.run()
    if rank == 0:
        results.put(recorder.lines)
    dist.barrier()  # nobody leaves before the results are on their way


def report(lines: list[dict[str, Any]], args: argparse.Namespace, arena_bytes: int) -> None:
    """Medians of pairs of blocks, so that a machine that changes its pace changes both."""
    kinds: dict[bool, list[float]] = {False: [], True: []}
    for start in range(0, len(lines), args.block):
        steps = [line["step_time_s"] for line in lines[start : start + args.block]]
        kinds[is_on(start + 1, args.block)].append(statistics.median(steps))
    ratios = [on / off for off, on in zip(kinds[False][1:], kinds[True][1:], strict=True)]
    settled = lines[2 * args.block : -1]  # the last step also writes the run's checkpoint
    # the first step of a block has no copy behind it
    copied = [
        line["snapshot_stall_s"]
        for line in settled
        if is_on(line["step"], args.block) and is_on(line["step"] - 1, args.block)
    ]
    stalls = sorted(copied)
    print(
        json.dumps(
            {
                "bench": "snapshots_in_training",
                "ranks": args.ranks,
                "state_mib": None if not arena_bytes else round(arena_bytes / 2**20, 1),
                "step_off_ms": round(1e3 * statistics.median(kinds[False][1:]), 2),
                "step_on_ms": round(1e3 * statistics.median(kinds[True][1:]), 2),
                "ratio_median": round(statistics.median(ratios), 4),
                "ratio_min": round(min(ratios), 4),
                "ratio_max": round(max(ratios), 4),
                "stall_p50_ms": round(1e3 * stalls[len(stalls) // 2], 3),
                "stall_p99_ms": round(1e3 * stalls[min(len(stalls) - 1, len(stalls) * 99 // 100)], 3),
                "steps": len(stalls),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
