"""Lives of a run without Ray: ranks are killed, others stay or go too, and all come together again in a new
epoch over the same files of state.
"""

import fcntl
import gc
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import Told, metrics, samples_folder, small_config, watch_samples

from rayfold.faulttol.vault import RankFiles, Vault
from rayfold.runtime.journal import Journal
from rayfold.runtime.place import SnapshotPlace, Warm
from rayfold.runtime.plan import RunPlan, make_run_plan
from rayfold.runtime.trainer import Trainer

_FORK = multiprocessing.get_context("fork")
RUN = "the run"
BUDGET = 1 << 30
ANSWER_S = 60.0  # longest wait for the ranks of one life; a life takes about a second
LOST_S = 20.0  # for survivors to notice a lost peer

Fault = Callable[[Trainer], None]  # called on a rank before its first step, in its own process


@dataclass(frozen=True)
class Life:
    """One epoch: the ranks that run, and what befalls them."""

    world_size: int
    overrides: tuple[str, ...] = ()
    faults: Mapping[int, Fault] | None = None  # by rank
    survivors: bool = False  # ranks that are left stay in their processes for the next life
    kill_all_after_s: float | None = None  # counted from the first step


class Lives:
    """The processes of a run; close it."""

    def __init__(self, run_dir: Path, source: Path, *overrides: str) -> None:
        self.run_dir, self._source, self._overrides = run_dir, source, overrides
        self._ranks: dict[int, _Rank] = {}
        self._epoch = 0

    @property
    def state_folder(self) -> Path:
        """Where arenas and slots lie."""
        return self.run_dir / "state"

    def live(self, life: Life) -> list[str]:
        """Run one life; how each rank ended: "finished", "stopped", "died" or "left"."""
        self._epoch += 1
        plan = make_run_plan(
            small_config(
                self.run_dir,
                self._source,
                f"run.workers={life.world_size}",
                *self._overrides,
                *life.overrides,
            ),
            cpus=life.world_size,
            gpus=0,
        )
        order = {
            "epoch": self._epoch,
            "store": str(self.run_dir / f"store-{self._epoch}"),
            "samples": samples_folder(self.run_dir),
            "recorded": max((line["step"] for line in metrics(self.run_dir)), default=0),
        }
        for rank in range(life.world_size):
            if rank not in self._ranks:
                self._ranks[rank] = _Rank(rank, self.state_folder, (life.faults or {}).get(rank))
            self._ranks[rank].begin(plan, order)
        if life.kill_all_after_s is not None:
            self._await_first_step(order["samples"])
            time.sleep(life.kill_all_after_s)
            for rank in self._ranks.values():
                rank.kill()
        ends = self._ends(life)
        for number, end in enumerate(ends):
            if end == "died" or not life.survivors:
                self._ranks.pop(number).kill()
        return ends

    def close(self) -> None:
        """Kill what is left."""
        for rank in self._ranks.values():
            rank.kill()
        self._ranks.clear()

    def _ends(self, life: Life) -> list[str]:
        ends: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER_S
        while len(ends) < life.world_size:
            for number, rank in self._ranks.items():
                if number not in ends and (end := rank.poll()) is not None:
                    ends[number] = end
                    if end == "died":
                        deadline = min(deadline, time.monotonic() + LOST_S)
                        if not life.survivors:  # a new process replaces each, wherever it stands now
                            for other in self._ranks.values():
                                other.kill()
            assert time.monotonic() < deadline, f"no end of ranks {set(self._ranks) - set(ends)}: {ends}"
            time.sleep(0.002)
        return [ends[number] for number in range(life.world_size)]

    def _await_first_step(self, samples: Path) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not list(samples.iterdir()):
            assert time.monotonic() < deadline, "the first step did not begin"
            time.sleep(0.002)


class _Rank:
    """One process, seen from the test."""

    def __init__(self, rank: int, folder: Path, fault: Fault | None) -> None:
        """`fault` is for its first life: functions travel by fork alone."""
        self._pipe, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_rank_main, args=(rank, folder, theirs, fault), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, plan: RunPlan, order: dict[str, Any]) -> None:
        """Start a life."""
        self._pipe.send((plan, order))

    def poll(self) -> str | None:
        """How the life ended, if it has."""
        if self._pipe.poll():
            try:
                end, detail = self._pipe.recv()
            except EOFError:
                return "died"
            assert end != "failed", detail
            return str(end)
        return None if self._process.is_alive() else "died"

    def kill(self) -> None:
        """As an operator would."""
        self._process.kill()
        self._process.join()


def _rank_main(rank: int, folder: Path, pipe: Any, fault: Fault | None) -> None:
    torch.set_num_threads(1)
    warm = Warm()
    while True:
        plan, order = pipe.recv()
        try:
            end = _one_life(rank, folder, plan, order, warm, fault)
            pipe.send((end, ""))
        except RuntimeError as error:
            lost = "onnection" in str(error) or "peer" in str(error) or "gloo" in str(error)
            pipe.send(("left" if lost else "failed", traceback.format_exc()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
        fault = None
        dist.destroy_process_group()
        gc.collect()


def _one_life(
    rank: int, folder: Path, plan: RunPlan, order: dict[str, Any], warm: Warm, fault: Fault | None
) -> str:
    store = dist.PrefixStore(
        f"epoch-{order['epoch']}", dist.FileStore(order["store"], plan.layout.world_size)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.layout.world_size)
    place = place_on(folder, order["epoch"], recorded=order["recorded"], slots=plan.config.snapshot.copies)
    stop = threading.Event()
    recorder = Told(Journal(plan.config.run_dir) if rank == 0 else None, stop, None)
    recorder.event("run_started", 0)
    trainer = Trainer(plan, recorder, stop, place=place, warm=warm)
    watch_samples(trainer, order["samples"], rank)
    if fault is not None:
        fault(trainer)
    return trainer.run().status


def place_on(folder: Path, epoch: int, *, recorded: int | None = None, slots: int = 2) -> SnapshotPlace:
    """The place of any rank whose node has `folder`."""

    def reserve(rank: int, nbytes: int) -> RankFiles:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name("vault.lock"), "w") as lock:  # a vault is one process's at a time
            fcntl.flock(lock, fcntl.LOCK_EX)
            return Vault(folder, BUDGET, run=RUN, slots=slots).reserve(rank, nbytes)

    return SnapshotPlace(run=RUN, node="here", folder=folder, epoch=epoch, reserve=reserve, recorded=recorded)


def die() -> None:
    """As the kernel or an operator would have it."""
    os.kill(os.getpid(), signal.SIGKILL)


def final_samples(run_dir: Path) -> dict[int, list[int]]:
    """The samples of each step as it was trained last."""
    steps: dict[int, dict[int, list[int]]] = {}
    for folder in sorted((run_dir / "samples").iterdir()):
        seen: dict[int, dict[int, list[int]]] = {}
        for path in sorted(folder.iterdir()):
            for line in map(json.loads, path.read_text().splitlines()):
                seen.setdefault(line["step"], {})[line["place"]] = line["ids"]
        steps |= seen
    return {step: [i for place in sorted(by) for i in by[place]] for step, by in sorted(steps.items())}
