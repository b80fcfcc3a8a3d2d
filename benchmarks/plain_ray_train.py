"""The baseline of `recovery.py`: the same model and data trained inside Ray Train, as its documentation says.

FSDP2 (`plain_llama.py`) in a function that `TorchTrainer` runs on gloo workers; every five steps a checkpoint
on disk by `torch.distributed.checkpoint`, and the newest whole one is read when Ray Train starts the group
again. Everything else is as Ray Train has it by default. Nothing is reported to Ray Train while training:
reports are taken every two seconds and would hold up steps of 0.2 s. Each rank writes a line when it starts,
rank 0 one when a step is done.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

STARTED, STEPS = "started.jsonl", "steps.jsonl"
CHECKPOINT_EVERY = 5
KEEP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_intermixed_args()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(
        num_cpus=args.ranks + 1,
        include_dashboard=False,
        _temp_dir=str(args.folder / "ray"),
        object_store_memory=128 << 20,
    )
    given = {"config": str(args.config.resolve()), "settings": args.settings, "folder": str(args.folder)}
    TorchTrainer(
        train,
        train_loop_config=given,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=args.ranks),
        run_config=RunConfig(
            storage_path=str(args.folder / "storage"), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


def train(given: dict[str, Any]) -> None:
    """On each worker: train until the process is ended."""
    import torch
    import torch.distributed as dist
    from plain_llama import plain_run

    from rayfold.models.registry import llama_shape
    from rayfold.parallel.layout import Layout
    from rayfold.runtime.config import read_config
    from rayfold.runtime.data.dataset import Dataset
    from rayfold.runtime.data.index import build_index
    from rayfold.runtime.data.loader import Loader
    from rayfold.runtime.data.tokenizer import resolve_tokenizer

    folder = Path(given["folder"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tell(folder / STARTED, rank=rank, pid=os.getpid())
    torch.set_num_threads(1)
    config = read_config(Path(given["config"]), given["settings"])
    tokenizer = resolve_tokenizer(config.data)
    dataset = Dataset(config.data, build_index(config.data, tokenizer), tokenizer, config.run.seed)
    rows = config.batch.size // world_size
    run = plain_run(
        llama_shape(config.model, tokenizer.vocab_size), Layout(dp_replicate=1, dp_shard=world_size), rows
    )
    step = load(run, folder / "checkpoints")
    loader = Loader(
        dataset,
        cursor=step * config.batch.size,
        batch_size=config.batch.size,
        dp_rank=rank,
        dp_size=world_size,
        micro_size=rows,
        prefetch=config.data.prefetch,
    )
    with loader:
        while True:
            started = time.perf_counter()
            (batch,) = loader.next()
            run.step(batch)
            step += 1
            if step % CHECKPOINT_EVERY == 0:
                save(run, step, folder / "checkpoints")
            if rank == 0:
                tell(folder / STEPS, step=step, step_time_s=time.perf_counter() - started)


def save(run: Any, step: int, shelf: Path) -> None:
    """A checkpoint that counts when all of it is there."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(run.model, run.optimizer)
    partial = shelf / f"{step}.partial"
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(shelf / str(step))
        for old in steps_of(shelf)[:-KEEP]:
            shutil.rmtree(shelf / str(old))


def load(run: Any, shelf: Path) -> int:
    """Read the newest whole checkpoint; its step, 0 where there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if not (steps := steps_of(shelf)):
        return 0
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=shelf / str(steps[-1]))
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return steps[-1]


def steps_of(shelf: Path) -> list[int]:
    """Steps of the whole checkpoints, in order."""
    return sorted(int(path.name) for path in shelf.glob("*") if path.name.isdigit())


def tell(path: Path, **values: Any) -> None:
    """Add a line."""
    with open(path, "a") as file:
        file.write(json.dumps({"time_unix": time.time(), **values}) + "\n")


if __name__ == "__main__":
    main()
