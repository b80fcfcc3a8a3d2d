"""What a configuration comes to on given resources: every "auto" replaced, the layout fixed, all of it
checked.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ..parallel.layout import Layout, LayoutError, make_layout
from .config import ConfigError, RunConfig

MOST_AUTO_CPU_WORKERS = 8  # more ranks on one machine's cores only wait for each other


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A configuration without "auto", and the layout that it asks for."""

    config: RunConfig
    layout: Layout
    device: Literal["cpu", "cuda"]


def make_run_plan(config: RunConfig, *, cpus: int, gpus: int) -> RunPlan:
    """Fit `config` to the CPUs and GPUs at hand. Raises `ConfigError` with every problem found."""
    device: Literal["cpu", "cuda"] = "cuda" if config.run.device == "auto" and gpus else "cpu"
    if config.run.device != "auto":
        device = config.run.device
    if device == "cuda" and not gpus:
        raise ConfigError('run.device: is "cuda", but no GPU is there; set run.device="cpu" or "auto"')
    world_size = (
        config.run.workers
        if isinstance(config.run.workers, int)
        else _auto_workers(config, device, cpus, gpus)
    )
    problems = []
    layout = None
    try:
        layout = make_layout(config.parallel, world_size=world_size)
    except LayoutError as error:
        problems.append(str(error))
    if layout is not None:
        problems += [f"batch.{key}: {message}" for key, message in config.batch.problems_with(layout.dp_size)]
    if config.run.eval_every and not config.data.val_fraction:
        problems.append(
            f"run.eval_every: is {config.run.eval_every}, but data.val_fraction = 0 holds out nothing to "
            "validate on; set data.val_fraction=0.05, or run.eval_every=0"
        )
    if config.optim.warmup_steps > config.run.steps:
        problems.append(
            f"optim.warmup_steps: is {config.optim.warmup_steps}, longer than run.steps = "
            f"{config.run.steps}; "
            f"use {config.run.steps // 10}"
        )
    if problems or layout is None:
        raise ConfigError("\n".join(problems))
    run = replace(config.run, workers=world_size, device=device)
    return RunPlan(config=replace(config, run=run), layout=layout, device=device)


def _auto_workers(config: RunConfig, device: str, cpus: int, gpus: int) -> int:
    parallel = config.parallel
    if parallel.dp_shard != -1:
        return parallel.dp_replicate * parallel.dp_shard
    most = gpus if device == "cuda" else min(cpus, MOST_AUTO_CPU_WORKERS)
    # the largest number of ranks that the copies and the batch divide
    fits = (
        n for n in range(most, 0, -1) if n % parallel.dp_replicate == 0 and not config.batch.problems_with(n)
    )
    return next(fits, max(1, parallel.dp_replicate))
