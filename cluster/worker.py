"""The actor around one rank: a training call that lasts as long as an epoch of the run, and control calls
that answer beside it.

It needs no controller to train. How its training ended it keeps until one has taken it, and it ends when
there is none any more (`lifeline.py`).

An epoch ends for all ranks when one is lost: `leave` breaks their connections, so that `train` returns
whatever it was waiting for; then they `join` the next epoch and train again in the same process. The
controller names this class without importing torch; the actor's own process imports it, as early as it can.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import get_placement_group, remove_placement_group

from ..faulttol.stuck import Told
from ..faulttol.untold import untold_in
from ..faulttol.verdict import failure_of
from ..runtime.config import check_config
from ..runtime.plan import make_run_plan
from .home import Home
from .imports import import_trainer
from .lifeline import Lifeline
from .memory import Memory
from .notice import Asked, Herald
from .outbox import EpochOver, Outbox
from .saboteur import Saboteur
from .sight import sight
from .signals import hear
from .sockets import break_connections_to, break_gloo, forget_groups

if TYPE_CHECKING:
    from ..runtime.place import Warm
    from ..runtime.trainer import Trainer

END_S = 5.0  # for giving a place back, which takes milliseconds
BREAK_AGAIN_S = 0.05  # a rank may have been between two groups when its connections were broken


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    host: str
    pid: int
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The place of a process among the ranks of an epoch."""

    epoch: int
    rank: int
    world_size: int
    store: tuple[str, int]  # host and port where the ranks meet
    threads: int


class Worker:
    """One rank of a run. `train` occupies the actor; the methods of the group "control" answer meanwhile."""

    def __init__(self, home: Home, controller: Any, group: str, in_background: bool = False) -> None:
        """`group` is the name of the run's placement group; `in_background`: while ranks train beside it."""
        home.enter()
        self._group = group
        asked = Asked(ray.get_runtime_context().get_actor_name() or "")
        heard = {int(signal.SIGTERM): Herald(controller, asked).tell}
        hear(heard | (Saboteur(self._in_step).signals() if home.sabotaged else {}))
        self._lifeline = Lifeline(controller, self._end_alone)
        import_trainer(in_background=in_background)
        self._epoch = 0  # that it trains in
        self._stop = threading.Event()  # of that epoch
        self._stopping = False
        self._halted = 0  # the last epoch that it was told to train no further in
        self._trainer: Trainer | None = None
        self._outbox: Outbox | None = None
        self._warm: Warm | None = None  # what stays of an epoch for the next
        self._store: Any = None  # held for as long as its groups are
        self._port = 0
        self._left = 0  # the last epoch that this process was told to leave
        self._busy = threading.Lock()  # held while it trains or joins
        self._thread: tuple[int, int] | None = None  # that trains: its id in Python, and the kernel's
        self._end: tuple[int, dict[str, Any]] | None = None  # of the last epoch that it trained in

    @ray.method(concurrency_group="control")
    def place(self) -> Place:
        """Where this worker runs."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), cpus)

    @ray.method(concurrency_group="control")
    def join(self, seat: Seat, plan: dict[str, Any]) -> None:
        """Form the process group of an epoch with the other ranks. Raises Fenced when that epoch is over."""
        import torch
        import torch.distributed as dist

        from ..faulttol.epoch import Fence, Fenced, scoped

        run = plan["run"]
        with self._busy:
            if seat.epoch <= self._left:
                raise Fenced(f"rank {seat.rank} was told to leave epoch {seat.epoch} before it had joined")
            torch.set_num_threads(seat.threads)
            if run["address"] == "local" and sys.platform == "linux":
                # one machine: no need to be reachable from outside
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            forget_groups()
            self._port = seat.store[1]
            self._store = dist.TCPStore(
                *seat.store, is_master=False, timeout=timedelta(seconds=run["start_timeout_s"])
            )
            Fence(self._store, seat.epoch, who=f"rank {seat.rank}").check()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if run["device"] == "cuda" else "gloo",
                store=scoped(self._store, seat.epoch),
                rank=seat.rank,
                world_size=seat.world_size,
                timeout=timedelta(seconds=run["collective_timeout_s"]),
            )

    def train(
        self, *, epoch: int, rank: int, plan: dict[str, Any], controller: Any, memory: Memory | None
    ) -> dict[str, Any]:
        """Train to the end of the run or of the epoch; returns an outcome, a failure, or that it left, as
        plain values, and raises nothing of the user's. Asked again in the same epoch, by a controller that
        was started again, it waits for the end and returns that.
        """
        with self._busy:
            if epoch <= self._left:
                return {"left": epoch}
            if self._end is None or self._end[0] != epoch:
                self._end = epoch, self._train(epoch, rank, plan, controller, memory)
            return self._end[1]

    def _train(
        self, epoch: int, rank: int, plan: dict[str, Any], controller: Any, memory: Memory | None
    ) -> dict[str, Any]:
        from ..runtime.place import LINES_KEPT, Warm
        from ..runtime.trainer import Trainer

        config = check_config(plan)
        gpus = int(config.run.device == "cuda")
        folder = Path(memory.folder) if memory is not None else None
        self._outbox = outbox = Outbox(controller, rank=rank, epoch=epoch, folder=folder)
        self._warm = self._warm or Warm()
        self._epoch, self._stop = epoch, (stop := threading.Event())
        if self._stopping or epoch <= self._halted:  # told so before it was here
            stop.set()
        if memory is not None and not self._warm.lines:  # who has trained knows its lines itself
            lines = (*memory.untold, *untold_in(Path(memory.folder), after=memory.recorded))
            self._warm.lines = deque(lines, maxlen=LINES_KEPT + len(lines))
        self._trainer = Trainer(
            make_run_plan(config, cpus=1, gpus=gpus),
            outbox,
            stop,
            place=memory.place(epoch, lambda: epoch <= self._left) if memory is not None else None,
            warm=self._warm if memory is not None else None,
        )
        self._thread = threading.get_ident(), threading.get_native_id()
        try:
            return {"outcome": asdict(self._trainer.run())}
        except BaseException as error:  # whatever the user's code raises, sys.exit too, becomes the verdict
            failure = failure_of(error, rank=rank, step=self._trainer.step, time_unix=time.time())
            if epoch <= self._left and (failure.lost_peer or isinstance(error, EpochOver)):
                return {"left": epoch}
            return {"failure": asdict(failure)}
        finally:
            self._thread = None
            outbox.close()

    @ray.method(concurrency_group="control")
    def leave(self, epoch: int) -> None:
        """Break off whatever waits for other ranks, and return when nothing does. Waits as long as the rank
        computes; the caller bounds it.
        """
        self._left = max(self._left, epoch)
        if self._outbox is not None:
            self._outbox.end_epoch()  # a rank without others waits for nobody
        wait_s = 0.0
        while not self._busy.acquire(timeout=wait_s):
            wait_s = BREAK_AGAIN_S
            _break_groups()
            if self._port:
                break_connections_to(self._port)
        self._busy.release()

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """What the rank is doing right now."""
        trainer = self._trainer
        return {"step": trainer.step, "phase": trainer.phase} if trainer else {"step": 0, "phase": "starting"}

    @ray.method(concurrency_group="control")
    def sight(self) -> Told:
        """Where the thread that trains is right now."""
        trainer, thread = self._trainer, self._thread
        if trainer is None or thread is None:
            return Told(step=0, phase="idle")
        return sight(*thread, step=trainer.step, phase=trainer.phase)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask the run to stop after the step it is in."""
        self._stopping = True
        self._stop.set()

    @ray.method(concurrency_group="control")
    def halt(self, epoch: int) -> None:
        """Ask the ranks to end their epoch after the step they are in, all after the same one."""
        self._halted = epoch
        if epoch == self._epoch:
            self._stop.set()

    def _in_step(self) -> int | None:
        """The thread that trains while it is in the middle of a step."""
        trainer, thread = self._trainer, self._thread
        return thread[0] if trainer and thread and trainer.phase == "training" else None

    def _end_alone(self, _over: bool) -> None:
        """Give its place back and end: there is no controller that would."""
        threading.Timer(END_S, os._exit, (1,)).start()  # Ray itself may be lost, and not answer
        try:
            with contextlib.suppress(ValueError):  # another rank was faster
                remove_placement_group(get_placement_group(self._group))
        finally:
            os._exit(1)


def _break_groups() -> None:
    """Let go of every collective of this process, on whatever device."""
    import torch
    from torch.distributed import distributed_c10d

    break_gloo()
    if torch.cuda.is_available() and distributed_c10d.is_initialized():
        distributed_c10d._abort_process_group()  # ends kernels of NCCL that wait for a lost peer
