"""One actor on each node that has workers: it keeps the node's files of state and watches its processes.

It belongs to the run and not to the controller, since what it keeps must be cleaned up when the controller
dies; it looks for that itself. In an embedded session the reaper has the last word.
"""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..faulttol.config import SnapshotConfig
from .home import Home
from .memory import Memory, lock_of
from .reaper import memory_folder
from .watch import Notice, Watch

CONTROLLER_LOOK_S = 2.0  # between looks at whether there still is a controller
SILENT_S = 5.0  # a vault answers in milliseconds; a node that does not for this long is taken for lost


class VaultActor:
    """Watches the processes of its node and keeps `folder`, the node's part of the run's memory."""

    def __init__(self, home: Home, folder: str, controller: Any) -> None:
        home.enter()
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._controller = controller
        self._myself = ray.get_runtime_context().current_actor
        self._pids: set[int] = set()
        self._watch = Watch(self._tell)
        self._closed = threading.Event()
        threading.Thread(target=self._outlive, name="controller", daemon=True).start()

    def read(self, path: str, start: int, length: int) -> bytes:
        """A part of one of the node's files, for a rank on another node; less, or nothing, at its end."""
        if Path(path).parent != self._folder:
            raise PermissionError(f"{path}: is no file of this vault, which keeps {self._folder}")
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, start)

    def follow(self, pids: Iterable[int]) -> None:
        """Watch these processes too."""
        for pid in pids:
            self._pids.add(pid)
            self._watch.follow(pid)

    def following(self) -> set[int]:
        """The processes that are watched; empty in a vault that Ray has started again."""
        return self._pids

    def kill(self, pid: int) -> float | None:
        """As `Watch.end`: end a process of this node that may answer nobody."""
        self._pids.discard(pid)
        return self._watch.end(pid)

    def close(self) -> None:
        """Stop watching and remove the node's files."""
        self._closed.set()
        self._watch.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        lock_of(self._folder).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other nodes of a run may be on the same machine
            self._folder.parent.rmdir()

    def _tell(self, notice: Notice) -> None:
        self._controller.notice.remote(notice)

    def _outlive(self) -> None:
        while not self._closed.wait(CONTROLLER_LOOK_S):
            try:
                ray.get(self._controller.answers.remote(), timeout=CONTROLLER_LOOK_S)
            except RayActorError:
                self.close()
                ray.kill(self._myself)  # an exit would have Ray start it again
            except (GetTimeoutError, RayTaskError):
                continue  # busy


class Vaults:
    """The vaults of a run, by node."""

    def __init__(
        self, home: Home, controller: Any, config: SnapshotConfig, *, own_node: str, session: str
    ) -> None:
        """`session`: the folder of an embedded session, whose reaper knows where its memory lies."""
        self._home = home
        self._config = config
        self._controller = controller
        self._own_node = own_node
        self._run = os.path.basename(session) or f"rayfold-{secrets.token_hex(6)}"
        self._folder = Path(memory_folder(self._run))
        self._actors: dict[str, Any] = {}
        self._pids: dict[str, set[int]] = {}
        self._asked: dict[str, Any] = {}  # node -> a question under way
        self._since: dict[str, float] = {}

    def memory(self, node: str, *, recorded: int) -> Memory:
        """What a rank on `node` is told."""
        folder = str(self._folder / node[:16])
        return Memory(
            run=self._run,
            node=node[:16],
            folder=folder,
            slots=self._config.slots,
            share=self._config.memory_share,
            recorded=recorded,
            vaults={name[:16]: actor for name, actor in self._actors.items()},
        )

    def follow(self, node: str, pid: int) -> None:
        """Watch a process; starts the vault of a node that has none."""
        if node not in self._actors:
            self._actors[node] = self._start(node)
        if pid not in (followed := self._pids.setdefault(node, set())):
            followed.add(pid)
            self._actors[node].follow.remote([pid])

    def kill(self, node: str, pid: int) -> Any:
        """End a process and watch it no longer; a reference to when it was last seen well, or None."""
        self._pids.get(node, set()).discard(pid)
        return self._actors[node].kill.remote(pid) if node in self._actors else None

    def silent(self, now: float) -> list[str]:
        """Ask every vault whether it is there, without waiting; nodes that have not answered for `SILENT_S`.

        The controller's own node cannot be lost without it. A vault that was started again follows anew.
        """
        lost = []
        for node, actor in self._actors.items():
            asked = self._asked.get(node)
            if asked is None:
                self._asked[node], self._since[node] = actor.following.remote(), now
                continue
            if not ray.wait([asked], timeout=0)[0]:
                if node != self._own_node and now - self._since[node] > SILENT_S:
                    lost.append(node)
                continue
            del self._asked[node]
            with contextlib.suppress(RayActorError, RayTaskError):  # being started again, or its node is gone
                if missing := self._pids[node] - ray.get(asked):
                    actor.follow.remote(sorted(missing))
        return lost

    def lose(self, node: str) -> None:
        """Forget a node that is gone."""
        for known in (self._actors, self._pids, self._asked, self._since):
            known.pop(node, None)

    def close(self) -> None:
        """Remove the files of all nodes and end the vaults."""
        closing = [actor.close.remote() for actor in self._actors.values()]
        ray.wait(closing, num_returns=len(closing), timeout=SILENT_S) if closing else None
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _start(self, node: str) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 0,
            "lifetime": "detached",  # not owned by the controller, whose end must not leave files behind
            "name": f"{self._run}-{node[:16]}",
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        actor = ray.remote(**options)(VaultActor)
        return actor.remote(
            self._home,
            str(self._folder / node[:16]),
            self._controller,
        )
