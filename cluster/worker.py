"""The actor around one rank: a training call that lasts as long as the run, and control calls that answer
beside it.

The controller names this class without importing torch; the actor's own process imports it, as early as it
can.
"""

import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray

from ..faulttol.verdict import failure_of
from ..runtime.config import check_config
from ..runtime.plan import make_run_plan
from .home import Home
from .outbox import Outbox

if TYPE_CHECKING:
    from ..runtime.trainer import Trainer


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    host: str
    pid: int
    cpus: int


class Worker:
    """One rank of a run. `train` occupies the actor; the methods of the group "control" answer meanwhile."""

    def __init__(self, home: Home) -> None:
        home.enter()
        import torch  # noqa: F401 (seconds of imports, done while the controller waits for other workers)

        from ..runtime import trainer  # noqa: F401

        self._stop = threading.Event()
        self._trainer: Trainer | None = None
        self._store: Any = None

    @ray.method(concurrency_group="control")
    def place(self) -> Place:
        """Where this worker runs."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), cpus)

    @ray.method(concurrency_group="control")
    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Open the meeting point of all ranks in this process; returns its address."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        return host, self._store.port

    @ray.method(concurrency_group="control")
    def join(
        self, rank: int, world_size: int, store: tuple[str, int], plan: dict[str, Any], threads: int
    ) -> None:
        """Form the process group with the other ranks."""
        import torch
        import torch.distributed as dist

        run = plan["run"]
        torch.set_num_threads(threads)
        if run["address"] == "local" and sys.platform == "linux":
            os.environ.setdefault(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # one machine: no need to be reachable from outside
        meeting = dist.TCPStore(
            store[0], store[1], is_master=False, timeout=timedelta(seconds=run["start_timeout_s"])
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if run["device"] == "cuda" else "gloo",
            store=dist.PrefixStore("epoch-1", meeting),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=run["collective_timeout_s"]),
        )

    def train(self, *, rank: int, plan: dict[str, Any], controller: Any) -> dict[str, Any]:
        """Train to the end; returns an outcome or a failure as plain values, and raises nothing of the
        user's.
        """
        from ..runtime.trainer import Trainer

        config = check_config(plan)
        gpus = int(config.run.device == "cuda")
        outbox = Outbox(controller, rank=rank)
        self._trainer = Trainer(make_run_plan(config, cpus=1, gpus=gpus), outbox, self._stop)
        try:
            return {"outcome": asdict(self._trainer.run())}
        except BaseException as error:  # whatever the user's code raises, sys.exit too, becomes the verdict
            return {
                "failure": asdict(
                    failure_of(error, rank=rank, step=self._trainer.step, time_unix=time.time())
                )
            }
        finally:
            outbox.close()

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """What the rank is doing right now."""
        trainer = self._trainer
        return {"step": trainer.step, "phase": trainer.phase} if trainer else {"step": 0, "phase": "starting"}

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask the run to stop after the step it is in."""
        self._stop.set()
