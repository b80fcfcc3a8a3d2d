"""One worker of Ray Train as one rank of a run; see `train.py`.

Ray Train has made the process group, and starts all workers anew when one is lost. Each start is an epoch of
the run: the ranks take over what those of the epoch before left in the memory of their nodes. Rank 0 writes
the run's record, since there is no controller of ours.
"""

import os
import threading
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.torch import get_device
from ray.train.v2._internal.execution.context import get_train_context

from ..parallel.collectives import gather_json, share_json
from ..parallel.mesh import Axis
from ..runtime.config import ConfigError, RunConfig, write_toml
from ..runtime.journal import EVENTS, METRICS, Journal, read_lines, write_atomically
from ..runtime.place import SnapshotPlace
from ..runtime.plan import RunPlan, make_run_plan
from ..runtime.resume import check_goes_on
from ..runtime.trainer import Trainer
from .claim import claim, claim_record
from .home import Home
from .memory import Memory
from .train_report import Figures, Reporter
from .train_vault import folder_of, name_of, vault_of, vaults_of

VAULT_S = 120.0  # for the vault of a node to start and to end what is left of an epoch before
CLOSE_S = 30.0  # to give memory back, which takes milliseconds a GiB; its reaper does it otherwise


class NotBegun(RuntimeError):
    """Rank 0 could not begin; the message is its reason."""


def train_rank(config: RunConfig, home: Home) -> dict[str, Any] | None:
    """Train this worker's rank of `config` to the end; the summary of the run on rank 0.

    Raises ConfigError when the configuration does not fit the workers, and what training raises.
    """
    home.enter()
    device = get_device()
    workers = ray.train.get_context().get_world_size()
    plan = plan_for(config, num_workers=workers, device="cuda" if device.type == "cuda" else "cpu")
    return RankInTrain(plan, device).train()


def plan_for(config: RunConfig, *, num_workers: int, device: Literal["cpu", "cuda"]) -> RunPlan:
    """The plan of a run on the workers that Ray Train started, each on a `device`.

    Raises ConfigError when the configuration asks for others.
    """
    workers, asked = config.run.workers, config.run.device
    if workers not in ("auto", num_workers):
        raise ConfigError(
            f"run.workers = {workers}, but Ray Train started {num_workers} workers; set "
            f'ScalingConfig(num_workers={workers}), or run.workers="auto" to take as many as there are'
        )
    if asked not in ("auto", device):
        raise ConfigError(
            f'run.device = "{asked}", but Ray Train gave its workers the device "{device}"; set '
            f'ScalingConfig(use_gpu={asked == "cuda"}), or run.device="auto" to take what there is'
        )
    run = replace(config.run, workers=num_workers, device=device)
    gpus = num_workers if device == "cuda" else 0
    return make_run_plan(replace(config, run=run), cpus=num_workers, gpus=gpus)


class RankInTrain:
    """This worker's place among the ranks of a run, and what it knows of Ray Train."""

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        context = ray.train.get_context()
        self._plan, self._device = plan, device
        self._rank, size = context.get_world_rank(), context.get_world_size()
        self._first_of_node = context.get_local_rank() == 0
        self._node = ray.get_runtime_context().get_node_id()
        self._run_dir = plan.config.run_dir.absolute()
        # neither has a public name: the key of this fit(), the same at all starts of its workers, and the
        # actor that knows whether there will be another start
        inside = get_train_context()
        self._fit: str = inside.train_run_context.run_id
        self._controller = inside.controller_actor
        self._vault: Any = None
        self._world = Axis("world", size, self._rank, dist.group.WORLD, tuple(range(size)))

    def train(self) -> dict[str, Any] | None:
        """Train to the end; the summary of the run on rank 0."""
        found = next_epoch(self._run_dir, self._fit) if self._rank == 0 else 0
        epoch: int = share_json(found, self._world, self._device, 0)
        self._join(epoch)
        own = {"node": self._node, "pid": os.getpid()}
        members = gather_json(own, self._world, self._device)  # nobody of an epoch before is left after it
        with ExitStack() as held:
            journal, recorded = self._begin(epoch, members, held)
            figures = Figures(journal, last_line(self._run_dir) if journal is not None else {})
            with Reporter(figures, self._run_dir, rank=self._rank):
                place = self._place(epoch, recorded, [member["node"] for member in members])
                outcome = Trainer(self._plan, figures, threading.Event(), place=place).run()
                gather_json(None, self._world, self._device)  # no rank needs its memory any more after it
            summary = self._finish(journal, outcome.step) if journal is not None else None
        self._give_memory_back()
        return summary

    def _join(self, epoch: int) -> None:
        if self._plan.config.snapshot.enabled is not False:
            self._vault = vault_of(self._fit, self._node, self._controller)
            ray.get(self._vault.join.remote(epoch, os.getpid()), timeout=VAULT_S)

    def _begin(
        self, epoch: int, members: list[dict[str, Any]], held: ExitStack
    ) -> tuple[Journal | None, int]:
        """The run's record on rank 0, the last step in it on all ranks. Raises on all when rank 0 does."""
        journal: Journal | None = None
        error: Exception | None = None
        told: dict[str, Any] = {}
        if self._rank == 0:
            try:
                journal = self._open_record(epoch, members, held)
                told = {"recorded": journal.last_step}
            except (OSError, ValueError) as problem:  # a user's mistake is a ValueError in every folder
                error, told = problem, {"problem": str(problem)}
        told = share_json(told, self._world, self._device, 0)
        if "problem" in told:
            raise error or NotBegun(told["problem"])
        return journal, told["recorded"]

    def _open_record(self, epoch: int, members: list[dict[str, Any]], held: ExitStack) -> Journal:
        run_dir, config, layout = self._run_dir, self._plan.config, self._plan.layout
        check_goes_on(run_dir, config)
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(claim(run_dir))
        held.enter_context(claim_record(run_dir))
        write_atomically(run_dir / "config.toml", write_toml(config))
        journal = Journal(run_dir)
        held.callback(journal.close)
        step = journal.last_step
        if epoch == 1:
            journal.event("run_started", step, attempt=journal.attempt, layout=str(layout), fit=self._fit)
        else:
            message = "a worker was lost, and Ray Train started all workers anew"
            journal.event("fault", step, **{"class": "restart", "message": message})
        journal.event(
            "formed",
            step,
            epoch=epoch,
            world_size=layout.world_size,
            layout=str(layout),
            nodes=[member["node"] for member in members],
            pids=[member["pid"] for member in members],
            spare_pids=[],
        )
        return journal

    def _place(self, epoch: int, recorded: int, nodes: list[str]) -> SnapshotPlace | None:
        """Where this rank's state lies in memory; None where the configuration wants none of it."""
        if self._vault is None:
            return None
        config = self._plan.config.snapshot
        memory = Memory(
            run=f"rayfold-train-{self._fit}",
            node=self._node[:16],
            folder=str(folder_of(name_of(self._fit, self._node))),
            slots=config.slots or 2,  # the ranks write checkpoints themselves, from a copy of their own
            share=config.memory_share,
            beside=0.0,
            recorded=recorded,
            vaults=vaults_of(self._fit, nodes),
        )
        return memory.place(epoch)

    def _finish(self, journal: Journal, step: int) -> dict[str, Any]:
        layout = self._plan.layout
        journal.event("run_finished", step, status="finished")
        return journal.summary("finished", world_size=layout.world_size, layout=str(layout))

    def _give_memory_back(self) -> None:
        """Before `fit` returns, and not some time after it."""
        if self._vault is not None and self._first_of_node:
            with suppress(RayActorError, GetTimeoutError):  # its reaper does it in its stead
                ray.get(self._vault.close.remote(), timeout=CLOSE_S)
            ray.kill(self._vault)


def next_epoch(run_dir: Path, fit: str) -> int:
    """Which start of its workers this is within a fit, from 1, by the record of the run."""
    epoch, own = 1, False
    for event in read_lines(run_dir / EVENTS):
        if event["kind"] == "run_started":
            own, epoch = event.get("fit") == fit, 1
        elif event["kind"] == "run_finished":
            own, epoch = False, 1
        elif event["kind"] == "formed" and own:
            epoch += 1
    return epoch


def last_line(run_dir: Path) -> dict[str, Any]:
    """The newest line of metrics in the record; {} before the first."""
    newest = deque(read_lines(run_dir / METRICS), maxlen=1)
    return newest[0] if newest else {}
