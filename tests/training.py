"""Train for real without Ray: the runtime's `Trainer` on forked gloo ranks, with a run folder, to its end or
to a `kill -9`.
"""

import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import run_ranks

from rayfold.runtime import trainer as trainer_module
from rayfold.runtime.checkpoint.format import read_index
from rayfold.runtime.checkpoint.shelf import Shelf
from rayfold.runtime.checkpoint.storage import read_chunk
from rayfold.runtime.config import RunConfig, read_config
from rayfold.runtime.journal import EventKind, Journal, read_lines
from rayfold.runtime.plan import RunPlan, make_run_plan
from rayfold.runtime.step import StepResult, train_step
from rayfold.runtime.trainer import Trainer

SMALL = (
    *("model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=47"),
    *("data.seq_len=24", "data.block_bytes=4096", "data.shuffle_blocks=3"),
    *("batch.size=8", "optim.lr=3e-3", "optim.warmup_steps=2", "checkpoint.every=0"),
)


STEP_BEGUN = 5  # tensors that the backward pass has asked for by then


@dataclass(frozen=True)
class RankEnd:
    """How one rank's loop ended."""

    status: str
    step: int


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
    told = samples_folder(run_dir)

    def on_rank() -> RankEnd:
        return _train(plan, told, stop_at=(stop_at or {}).get(dist.get_rank()))

    return run_ranks(world_size, on_rank)


def kill_on_ranks(
    world_size: int, run_dir: Path, source: Path, *overrides: str, step: int, after: int
) -> None:
    """Run the trainer on `world_size` ranks and `kill -9` all of them at once in the backward pass of `step`.

    By then the checkpoint of step `after` is committed.
    """
    config = small_config(run_dir, source, f"run.workers={world_size}", *overrides)
    plan = make_run_plan(config, cpus=world_size, gpus=0)
    told = samples_folder(run_dir)
    committed = Shelf(run_dir / "checkpoints", keep=1).path(after)

    def on_rank() -> RankEnd:
        if dist.get_rank() == world_size // 2:
            return _train(plan, told, wrap=lambda run: _dying_in(step, committed, run))
        return _train(plan, told)

    def in_a_group_of_its_own() -> None:
        os.setsid()  # one kill reaches every rank at the same instant, and nobody else
        tempfile.tempdir = str(run_dir.parent)  # what is left behind goes with the folder of the test
        run_ranks(world_size, on_rank)

    launcher = multiprocessing.get_context("fork").Process(target=in_a_group_of_its_own)
    launcher.start()
    launcher.join()  # bounded by the timeout of run_ranks
    assert launcher.exitcode == -signal.SIGKILL, f"the run ended by itself, with status {launcher.exitcode}"


Step = Callable[..., StepResult]


def _train(
    plan: RunPlan, told: Path, *, stop_at: int | None = None, wrap: Callable[[Trainer], Step] | None = None
) -> RankEnd:
    """The trainer of this rank; the samples of each step are written down before it begins."""
    rank, stop = dist.get_rank(), threading.Event()
    run_dir = plan.config.run_dir
    recorder = Told(Journal(run_dir) if rank == 0 else None, stop, stop_at)
    recorder.event("run_started", 0)
    trainer = Trainer(plan, recorder, stop)
    watch_samples(trainer, told, rank, wrap=wrap)
    end = trainer.run()
    return RankEnd(end.status, end.step)


def watch_samples(
    trainer: Trainer, told: Path, rank: int, *, wrap: Callable[[Trainer], Step] | None = None
) -> None:
    """Write the samples of each step down before it begins; `wrap(trainer)` is the step to make."""

    def watched_step(*args: Any, **kwargs: Any) -> StepResult:
        model, batches = args[0], args[2]
        ids = [i for batch in batches for i in batch.sample_ids]
        line = {"step": trainer.step, "place": model.mesh.data.rank, "ids": ids}
        with (told / f"{rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return (wrap(trainer) if wrap else train_step)(*args, **kwargs)

    trainer_module.train_step = watched_step  # in this forked process only


def _dying_in(step: int, committed: Path, trainer: Trainer) -> Step:
    """`train_step`, and in `step` one that kills this process group halfway through the backward pass."""
    if trainer.step != step:
        return train_step

    def deadly_step(*args: Any, **kwargs: Any) -> StepResult:
        deadline = time.monotonic() + 30
        while not committed.exists():
            assert time.monotonic() < deadline, f"{committed} was not written in 30 s"
            time.sleep(0.002)
        asked = itertools.count(1)

        def die(tensor: torch.Tensor) -> torch.Tensor:
            if next(asked) == STEP_BEGUN:
                os.killpg(0, signal.SIGKILL)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, die):
            return train_step(*args, **kwargs)

    return deadly_step


def samples_folder(run_dir: Path) -> Path:
    """A new folder for what one start of the run reads."""
    folder = run_dir / "samples"
    starts = len(list(folder.iterdir())) if folder.exists() else 0
    (folder / f"{starts:03d}").mkdir(parents=True)
    return folder / f"{starts:03d}"


def samples_read(run_dir: Path) -> list[dict[int, list[int]]]:
    """For each start of the run, the samples of each of its steps in order.

    Ranks that share samples must have read the same.
    """
    starts = []
    for folder in sorted((run_dir / "samples").iterdir()):
        steps: dict[int, dict[int, list[int]]] = {}
        for path in sorted(folder.iterdir()):
            for line in map(json.loads, path.read_text().splitlines()):
                ids = steps.setdefault(line["step"], {}).setdefault(line["place"], line["ids"])
                assert ids == line["ids"], f"ranks at place {line['place']} of the data differ: {path}"
        starts.append({step: [i for place in sorted(by) for i in by[place]] for step, by in steps.items()})
    return starts


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
