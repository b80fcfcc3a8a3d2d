"""Train for real without Ray: the runtime's `Trainer` on forked gloo ranks, with a run folder."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import run_ranks

from rayfold.runtime import trainer as trainer_module
from rayfold.runtime.checkpoint.format import read_chunk, read_index
from rayfold.runtime.config import RunConfig, read_config
from rayfold.runtime.journal import EventKind, Journal, read_lines
from rayfold.runtime.plan import make_run_plan
from rayfold.runtime.step import StepResult, train_step
from rayfold.runtime.trainer import Trainer

SMALL = (
    *("model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=47"),
    *("data.seq_len=24", "data.block_bytes=4096", "data.shuffle_blocks=3"),
    *("batch.size=8", "optim.lr=3e-3", "optim.warmup_steps=2", "checkpoint.every=0"),
)


@dataclass(frozen=True)
class RankEnd:
    """How one rank's loop ended, and the samples that each of its steps read."""

    status: str
    step: int
    samples: dict[int, list[int]]


class Told:
    """A recorder that keeps a journal on rank 0 and asks its rank to stop after step `stop_at`."""

    def __init__(self, journal: Journal | None, stop: threading.Event, stop_at: int | None) -> None:
        self._journal = journal
        self._stop = stop
        self._stop_at = stop_at

    def metric(self, values: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.metric(values)
        if values["step"] == self._stop_at:
            self._stop.set()

    def event(self, kind: EventKind, step: int, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.event(kind, step, **fields)

    def flush(self) -> None: ...


def write_corpus(folder: Path, *, documents: int = 200) -> Path:
    """JSONL of different short documents, enough for several blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["rank", "step", "shard", "loss", "mesh", "axis", "norm", "token"]
    with (folder / "text.jsonl").open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choice(words, size=int(rng.integers(2, 30))))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    return folder


def small_config(run_dir: Path, source: Path, *overrides: str) -> RunConfig:
    """A model of some thousand parameters that trains a step in milliseconds."""
    given = (f'run.dir="{run_dir}"', f'data.source="{source}"', *SMALL, *overrides)
    return read_config(None, given)


def train_on_ranks(
    world_size: int, run_dir: Path, source: Path, *overrides: str, stop_at: Mapping[int, int] | None = None
) -> list[RankEnd]:
    """Run the trainer to its end on `world_size` ranks.

    `stop_at` maps a rank to the step after which it asks to stop; the step after that is the last.
    """
    config = small_config(run_dir, source, f"run.workers={world_size}", *overrides)
    plan = make_run_plan(config, cpus=world_size, gpus=0)

    def on_rank() -> RankEnd:
        rank, stop = dist.get_rank(), threading.Event()
        samples: dict[int, list[int]] = {}

        def watched_step(*args: Any, **kwargs: Any) -> StepResult:
            samples[trainer.step] = [i for batch in args[2] for i in batch.sample_ids]
            return train_step(*args, **kwargs)

        trainer_module.train_step = watched_step  # in this forked process only
        journal = Journal(run_dir) if rank == 0 else None
        recorder = Told(journal, stop, (stop_at or {}).get(rank))
        recorder.event("run_started", 0)
        trainer = Trainer(plan, recorder, stop)
        end = trainer.run()
        return RankEnd(end.status, end.step, samples)

    return run_ranks(world_size, on_rank)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return list(read_lines(run_dir / "metrics.jsonl"))


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


def checkpoint_values(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Progress and whole tensors of a committed checkpoint, read without torch's planners."""
    index = read_index(folder)
    values = {}
    for name, entry in index.tensors.items():
        tensor = torch.full(entry.shape, torch.nan)
        for chunk in entry.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            tensor[box] = read_chunk(folder, entry, chunk)
        values[name] = tensor.numpy()
    return index.progress, values
