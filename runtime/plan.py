"""What a configuration comes to on given resources: every "auto" replaced, the layout fixed, all of it
checked.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..models.llama_config import LlamaConfig
from ..parallel.fit import LayoutError, fits, make_layout
from ..parallel.layout import AXES, Layout
from ..parallel.limits import Load, ModelLimits
from .config import ConfigError, RunConfig, Settings

CPU_COMPILERS = ("g++", "clang++", "c++")  # what torch's inductor looks for
MOST_AUTO_CPU_WORKERS = 8  # more ranks on one machine's cores only wait for each other


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A configuration without "auto", and the layout that it asks for."""

    config: RunConfig
    layout: Layout
    device: Literal["cpu", "cuda"]


def make_run_plan(config: RunConfig, *, cpus: int, gpus: int) -> RunPlan:
    """Fit `config` to the CPUs and GPUs at hand. Raises `ConfigError` with every problem found."""
    plan, problems = _fit(config, cpus=cpus, gpus=gpus)
    if plan is None or problems:
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems))
    return plan


def plan_settings(settings: Settings, *, cpus: int, gpus: int) -> RunPlan:
    """As `make_run_plan`, together with every problem that reading the settings found."""
    plan, problems = _fit(settings.config, cpus=cpus, gpus=gpus)
    said = [settings.say(key, message) for key, message in problems]
    if plan is None or said or settings.problems:
        raise ConfigError("\n".join([*settings.problems, *said]))
    return plan


def check_model(plan: RunPlan, model: ModelLimits | None) -> None:
    """Compare the layout of `plan` with what a model of the user's says once it is there; None: it has no
    plan. Raises `ConfigError` with every problem found.
    """
    load = replace(load_of(plan.config), model=model)
    try:
        make_layout(plan.config.parallel, world_size=plan.layout.world_size, load=load)
    except LayoutError as error:
        raise ConfigError(str(error)) from None


def _fit(config: RunConfig, *, cpus: int, gpus: int) -> tuple[RunPlan | None, list[tuple[str, str]]]:
    device: Literal["cpu", "cuda"] = "cuda" if config.run.device == "auto" and gpus else "cpu"
    if config.run.device != "auto":
        device = config.run.device
    most = gpus if device == "cuda" else min(cpus, MOST_AUTO_CPU_WORKERS)
    load, world_size = load_of(config), config.run.workers
    or_worlds = range(0)
    if world_size == "auto":
        world_size = _auto_workers(config, load, most)
        or_worlds = range(1, most + 1)
    problems = list(_disagreements(config))
    if device == "cuda" and not gpus:
        problems.append(("run.device", 'is "cuda", but no GPU is there; set run.device="cpu" or "auto"'))
    problems += [(f"kernels.{key}", message) for key, message in config.kernels.problems_on(device)]
    if config.kernels.compile and device == "cpu" and not any(map(shutil.which, CPU_COMPILERS)):
        wanted = " or ".join(CPU_COMPILERS)
        message = (
            f"is true, and torch.compile on the CPU needs {wanted}; install one, or set kernels.compile=false"
        )
        problems.append(("kernels.compile", message))
    try:
        layout = make_layout(config.parallel, world_size=world_size, load=load, or_worlds=or_worlds)
    except LayoutError as error:
        return None, [*problems, *error.problems]
    run = replace(config.run, workers=world_size, device=device)
    return RunPlan(config=replace(config, run=run), layout=layout, device=device), problems


def _disagreements(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys of different sections that do not fit together."""
    if config.kernels.compile and config.parallel.recompute == "selective":
        yield (
            "kernels.compile",
            'is true, and parallel.recompute = "selective" cannot choose what to keep in a compiled block; '
            'set parallel.recompute="full" or "none"',
        )
    if config.run.eval_every and not config.data.val_fraction:
        yield (
            "run.eval_every",
            f"is {config.run.eval_every}, but data.val_fraction = 0 holds out nothing to validate on; set "
            "data.val_fraction=0.05, or run.eval_every=0",
        )


def load_of(config: RunConfig) -> Load:
    """What a layout of `config` has to carry. A model of the user's own says its part when it is built."""
    seq_len = config.data.seq_len
    if isinstance(config.model, LlamaConfig):
        model = config.model.limits(seq_len)
    else:
        model = ModelLimits(family=config.model.family, seq_len=seq_len)
    batch = config.batch
    return Load(
        model=model,
        batch_size=batch.size,
        micro_size=batch.micro_size,
        compiled=config.kernels.compile,
    )


def _auto_workers(config: RunConfig, load: Load, most: int) -> int:
    parallel = config.parallel
    fixed = math.prod(getattr(parallel, axis) for axis in AXES if axis != "dp_shard")
    if parallel.dp_shard != -1:
        return fixed * parallel.dp_shard
    # the largest number of ranks that the axes, the model and the batch fit
    found = (n for n in range(most, 0, -1) if fits(parallel, world_size=n, load=load))
    return next(found, fixed)
