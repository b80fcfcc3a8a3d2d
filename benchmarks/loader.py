"""Tokens/s that one reader thread delivers, against what a training step consumes in the same run.

    python benchmarks/loader.py [--seconds 3] [--repeats 5]

The consumer is the fastest there is here: the smallest preset on one rank. Prints one JSON object a line.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch
from throughput import run_rayfold

from rayfold.runtime.data.config import DataConfig
from rayfold.runtime.data.dataset import Dataset
from rayfold.runtime.data.index import build_index
from rayfold.runtime.data.loader import Loader
from rayfold.runtime.data.tokenizer import resolve_tokenizer

BATCH = 16


def main() -> None:
    """Time every sample length, then the training step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    consumed = run_rayfold(["run.steps=16", "run.workers=1", "model.preset=tiny", f"batch.size={BATCH}"])
    for seq_len in (256, 2048):
        config = DataConfig(seq_len=seq_len)
        started = time.perf_counter()
        index = build_index(config)
        index_s = time.perf_counter() - started
        dataset = Dataset(config, index, resolve_tokenizer(config), seed=0)
        speeds = [loader_speed(dataset, seq_len, args.seconds) for _ in range(args.repeats)]
        line = {
            "bench": "loader",
            "source": config.source,
            "seq_len": seq_len,
            "tokens_per_s": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "step_consumes_tokens_per_s": consumed,
            "ratio": statistics.median(speeds) / consumed,
            "index_s": index_s,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)


def loader_speed(dataset: Dataset, seq_len: int, seconds: float) -> float:
    """Tokens/s through the loader's thread and queue, from wherever the source starts."""
    settings = {"batch_size": BATCH, "dp_rank": 0, "dp_size": 1, "micro_size": BATCH, "prefetch": 2}
    with Loader(dataset, cursor=0, **settings) as loader:
        loader.next()
        steps, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            loader.next()
            steps += 1
    return steps * BATCH * seq_len / elapsed


if __name__ == "__main__":
    main()
