"""Tokens/s, memory and traffic of each layout of 2 and 4 ranks against plain torch doing the same.

    python benchmarks/layouts.py [--pairs 3] [--steps 6] [--ranks 2 4] [--only tp=2] [--operators auto]

Plain torch is `plain_llama.py`: DTensor tensor parallelism, torch's pipelining, FSDP2, plain operators; with
`--operators reference` Rayfold computes with the same plain operators, so that the layouts alone are
compared. Both train the same model on the same packed rows on forked gloo ranks of one thread, in alternating
pairs. Peak memory is what a rank takes beyond what it had before it built the model. Traffic is counted in a
step and compared with `parallel/traffic.py`. Prints one JSON object a line.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import from_tests  # noqa: F401 (first: it lets the tests' harness be found)
import numpy as np
import torch
import torch.distributed as dist
from counted import Counted, by_group
from harness import run_ranks
from peak import resident, watch_peak
from plain_llama import plain_run

from rayfold.kernels.config import KernelsConfig
from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.layout import CONTEXTS, Layout
from rayfold.parallel.legal import legal_layouts
from rayfold.parallel.limits import Load
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import Workings, parallelize
from rayfold.parallel.traffic import Passes, bytes_by_axis, stages_of
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.step import train_step

SHAPE = LlamaShape(dim=256, layers=4, heads=8, kv_heads=4, ffn_dim=704, vocab_size=4096)
ROWS, SEQ_LEN, MICRO_SIZE, MEAN_DOCUMENT = 8, 512, 1, 128
WARM_UP = 2
RUN_TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="layouts whose description contains this")
    parser.add_argument("--operators", choices=["auto", "reference"], default="auto")
    args = parser.parse_args()
    for layout in chosen(args.ranks, args.only):
        ours, plain = [], []
        for pair in range(args.pairs):
            sides: list[tuple[list[Any], Callable[[], Any]]] = [
                (ours, lambda: rayfold_rank(layout, args.steps, args.operators)),  # noqa: B023 (called now)
                (plain, lambda: plain_rank(layout, args.steps)),  # noqa: B023
            ]
            for found, run in sides if pair % 2 else sides[::-1]:
                found.append(run_ranks(layout.world_size, run, timeout_s=RUN_TIMEOUT_S))
        print(json.dumps(report(layout, args, ours, plain)), flush=True)


def chosen(world_sizes: list[int], only: str) -> Iterator[Layout]:
    """Every legal layout with the default schedule."""
    load = Load(model=SHAPE.limits(SEQ_LEN), batch_size=ROWS, micro_size=MICRO_SIZE)
    for world_size in world_sizes:
        for layout in legal_layouts(load, world_size=world_size, contexts=CONTEXTS):
            if only in str(layout):
                yield layout


def packed_batch(step: int) -> Batch:
    """Rows of random tokens, cut into documents at random."""
    rng = np.random.default_rng(step)
    tokens = torch.from_numpy(rng.integers(0, SHAPE.vocab_size, (ROWS, SEQ_LEN)))
    starts = torch.from_numpy(rng.random((ROWS, SEQ_LEN)) < 1 / MEAN_DOCUMENT)
    starts[:, 0] = True
    places = torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN)
    first = torch.where(starts, places, 0).cummax(1).values
    ids = starts.cumsum(1).int()
    return Batch(
        tokens=tokens,
        labels=(7 * tokens + 3) % SHAPE.vocab_size,
        positions=places - first,
        document_ids=ids,
        sample_ids=tuple(range(ROWS)),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    names = ("tokens", "labels", "positions", "document_ids")
    return Batch(**{name: getattr(batch, name)[rows] for name in names}, sample_ids=batch.sample_ids[rows])


def rayfold_rank(layout: Layout, steps: int, operators: str) -> dict[str, Any]:
    """One rank of Rayfold: seconds of each step, memory, traffic."""
    mesh = make_mesh(layout, torch.device("cpu"))
    before = watch_peak()
    kernels = KernelsConfig(default=operators)  # type: ignore[arg-type]
    model = parallelize(lambda: Llama(SHAPE, kernels), mesh, seed=0, workings=Workings())
    optimizer = ShardedAdamW(model, OptimConfig())
    part = ROWS // layout.dp_size

    def step(number: int) -> None:
        batch, first = packed_batch(number), mesh.data.rank * part
        starts = range(first, first + part, MICRO_SIZE)
        micro = [rows_of(batch, slice(start, start + MICRO_SIZE)) for start in starts]
        train_step(model, optimizer, micro, lr=1e-3, clip_norm=1.0)

    seconds = timed(step, steps)
    found = {"seconds": seconds, "memory": resident("VmHWM") - before}
    with Counted() as counted:
        step(0)
    passes = Passes(
        microbatches=part // MICRO_SIZE,
        rows=MICRO_SIZE,
        seq_len=SEQ_LEN,
        width=SHAPE.dim,
        heads=SHAPE.heads,
        kv_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        bytes_per_number=4,
    )
    expected = bytes_by_axis(layout, passes, stages_of(model))
    sent = {group: size for group, size in counted.sent.items() if size}
    found["traffic"] = expected
    found["as_the_formula_says"] = all(
        abs(sent.get(group, 0) - size) <= 1 for group, size in by_group(mesh, expected).items()
    )
    return found


def plain_rank(layout: Layout, steps: int) -> dict[str, Any]:
    """One rank of plain torch."""
    before = watch_peak()
    run = plain_run(SHAPE, layout, MICRO_SIZE)
    part = ROWS // layout.dp_size
    first = run.mesh.get_local_rank("dp") * part
    seconds = timed(lambda number: run.step(rows_of(packed_batch(number), slice(first, first + part))), steps)
    return {"seconds": seconds, "memory": resident("VmHWM") - before}


def timed(step: Callable[[int], Any], steps: int) -> list[float]:
    """Seconds of each step but the first ones, all ranks beginning together."""
    seconds = []
    for number in range(WARM_UP + steps):
        dist.barrier()
        started = time.perf_counter()
        step(number)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def report(
    layout: Layout, args: argparse.Namespace, ours: list[list[Any]], plain: list[list[Any]]
) -> dict[str, Any]:
    """One line of the result."""

    def step_s(run: list[Any]) -> float:
        return statistics.median(run[0]["seconds"])

    def memory(run: list[Any]) -> float:
        return max(rank["memory"] for rank in run) / 2**20

    ratios = [step_s(p) / step_s(o) for o, p in zip(ours, plain, strict=True)]
    memory_ratios = [memory(o) / memory(p) for o, p in zip(ours, plain, strict=True)]
    return {
        "bench": "layouts",
        "layout": str(layout),
        "operators": args.operators,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "tokens_per_s": ROWS * SEQ_LEN / statistics.median(map(step_s, ours)),
        "plain_tokens_per_s": ROWS * SEQ_LEN / statistics.median(map(step_s, plain)),
        "peak_mib": statistics.median(map(memory, ours)),
        "plain_peak_mib": statistics.median(map(memory, plain)),
        "memory_ratio_median": statistics.median(memory_ratios),
        "bytes_sent_by_rank_0": ours[0][0]["traffic"],
        "traffic_as_the_formula_says": all(rank["as_the_formula_says"] for run in ours for rank in run),
        "pairs": args.pairs,
        "steps": args.steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
