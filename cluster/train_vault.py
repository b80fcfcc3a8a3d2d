"""The vault of a node inside Ray Train: an actor that keeps the memory of a run for the length of a `fit()`.

Ray Train's workers come and go; a group that lost one is ended whole and started anew. What the ranks keep
in shared memory must outlive them, and must not outlive the `fit()` that they belong to. So the actor is
detached, asks Ray Train's controller whether the run is over, and removes the files when it is or when the
controller is gone. Beside it stands a reaper (`reaper.py`), outside of Ray: it removes them when the actor
itself is ended, as everything is when the driver of a local Ray is killed.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import reaper

LOOK_EVERY_S = 0.5  # how long files may outlive a fit() that raised; the question costs a millisecond
REAPER_START_S = 30.0  # two starts of a bare interpreter, on a machine that may be busy
GONE_S = 10.0  # for a process to end that was sent SIGKILL; more is a kernel that cannot free its memory

NAMESPACE = "rayfold"  # of its names in the cluster, whatever that of the user's job is

# As a grandchild, so that Ray, which ends the children of a worker that it ends, does not know it.
_DETACHED = """
import subprocess, sys
subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])], start_new_session=True)
"""


class Writers:
    """The processes of one node that may write its files: those of the newest epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._handles: list[int] = []  # a number may be another process's by the time it is used

    def join(self, epoch: int, pid: int) -> None:
        """Let the process `pid` be one of `epoch`; those of epochs before are ended first.

        Ray Train has ended them already. One that it could not end, as it is stopped or in the kernel, would
        write into what the new group reads. Raises TimeoutError when it cannot be ended here either.
        """
        if not hasattr(os, "pidfd_open"):
            return  # not Linux
        if epoch > self._epoch:
            self._end_all()
            self._epoch = epoch
        self._handles.append(os.pidfd_open(pid))

    def _end_all(self) -> None:
        deadline = time.monotonic() + GONE_S
        while self._handles:
            handle = self._handles[-1]
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            gone = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not gone:
                raise TimeoutError(
                    f"a process of epoch {self._epoch} did not end within {GONE_S:.0f} s of SIGKILL"
                )
            os.close(self._handles.pop())


class TrainVault:
    """Keeps a node's files of state, and knows which processes may write them."""

    def __init__(self, name: str, controller: Any) -> None:
        """`controller` is Ray Train's; a handle in an actor that ends with the run keeps nothing alive."""
        self._folder = folder_of(name)
        os.makedirs(self._folder.parent, mode=0o700, exist_ok=True)
        self._controller = controller
        self._myself = ray.get_runtime_context().current_actor
        self._writers = Writers()
        self._pipe = _start_reaper(name)  # open for as long as this process lives
        self._closed = threading.Event()
        threading.Thread(target=self._outlive, name="controller", daemon=True).start()

    def join(self, epoch: int, pid: int) -> None:
        """As `Writers.join`, for a process of this node."""
        self._writers.join(epoch, pid)

    def read(self, path: str, start: int, length: int) -> bytes:
        """A part of one of the node's files, for a rank on another node; less, or nothing, at its end."""
        if Path(path).parent != self._folder:
            raise PermissionError(f"{path}: is no file of this vault, which keeps {self._folder}")
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, start)

    def close(self) -> None:
        """Remove the node's files: nobody will come back to them."""
        self._closed.set()
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _outlive(self) -> None:
        asked: Any = None
        while not self._closed.wait(LOOK_EVERY_S):
            if asked is None:
                asked = self._controller.__ray_call__.remote(_is_over)
            if not ray.wait([asked], timeout=0)[0]:
                continue  # it answers nobody while it starts a group
            try:
                over = ray.get(asked)
            except (ActorUnavailableError, RayTaskError):
                over = False  # asked again
            except RayActorError:
                over = True
            asked = None
            if over:
                self.close()
                ray.kill(self._myself)


def _is_over(controller: Any) -> bool:
    """Runs in Ray Train's controller: whether it will start no group any more."""
    return bool(controller.get_state().is_terminal())


def folder_of(name: str) -> Path:
    """Where the vault `name` keeps its files; beside it lie the ranks' lock and the reaper's claim."""
    return Path(reaper.memory_folder(name)) / "ranks"


def name_of(fit: str, node: str) -> str:
    """The name of the vault of a node (by its id in Ray) in a fit, one of the cluster's actors."""
    return f"rayfold-train-{fit[:12]}-{node[:16]}"


def vault_of(fit: str, node: str, controller: Any) -> Any:
    """The vault of a node; whoever asks first starts it."""
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": 0,  # its reaper has removed the files by then; the next group starts another one
        "lifetime": "detached",
        "name": name_of(fit, node),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    name = name_of(fit, node)
    return ray.remote(**options)(TrainVault).remote(name, controller)


def vaults_of(fit: str, nodes: Iterable[str]) -> dict[str, Any]:
    """The vaults of several nodes, all started by now, by the nodes' names in the run."""
    return {node[:16]: ray.get_actor(name_of(fit, node), namespace=NAMESPACE) for node in set(nodes)}


def _start_reaper(name: str) -> int:
    """Have the memory of `name` removed when this process ends; the end of the pipe that says it has not."""
    read_end, write_end = os.pipe()
    session = os.path.join(tempfile.gettempdir(), name)  # only a name: no process and no file belongs to it
    command = [sys.executable, "-I", reaper.__file__, session, str(read_end)]
    subprocess.run(
        [sys.executable, "-I", "-c", _DETACHED, str(read_end), *command],
        pass_fds=[read_end],
        stdin=subprocess.DEVNULL,
        timeout=REAPER_START_S,
        check=True,
    )
    os.close(read_end)
    return write_end
