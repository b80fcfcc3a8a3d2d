"""One actor on each node that has workers: it keeps the node's files of state and watches its processes.

It belongs to the run and not to the controller, which may be lost and started again, and it cleans up when
there will be none any more (`lifeline.py`). Where nobody answers, the files stay for the run that goes on
(`coldstart.py`). In an embedded session the reaper has the last word.
"""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..faulttol.config import SnapshotConfig
from ..faulttol.inheritance import inherit
from ..faulttol.listing import Listed
from ..faulttol.placement import Node, memory_factor, protection_for
from ..faulttol.stuck import Seen
from ..faulttol.untold import untold_in
from .home import Home
from .keeper import GROUPS, Keeper
from .lifeline import Lifeline
from .machine import machine_bytes
from .memory import Memory, lock_of
from .notice import Unmanaged
from .pulse import Pulse
from .reaper import has_reaper, memory_folder
from .watch import Notice, Watch, seen_of

CLOSE_S = 5.0  # removing files in memory takes milliseconds a gigabyte
ZONE_LABELS = ("zone", "ray.io/availability-zone")  # of a node: what is lost together with it


class VaultActor(Keeper):
    """Watches the processes of its node and keeps `folder`, the node's part of the run's memory."""

    def __init__(
        self,
        home: Home,
        folder: str,
        controller: Any,
        run: str,
        share: float,
        former: Sequence[str] = (),
    ) -> None:
        """Takes over what runs of the names `former` have left on this machine."""
        home.enter()
        path = Path(folder)
        super().__init__(path, run=run, node=path.name, budget=int(share * machine_bytes()))
        path.mkdir(parents=True, exist_ok=True)
        self._came, self._problem = 0, ""
        try:
            self._came = inherit(states_of(former), path, run=run)
        except OSError as error:
            self._problem = str(error)
        self._controller = controller
        self._myself = ray.get_runtime_context().current_actor
        self._pids: set[int] = set()
        self._watch = Watch(self._tell)
        self._raylet = _raylet()
        if self._raylet:
            self._watch.follow(self._raylet)
        self._lifeline = Lifeline(controller, self._end_alone)

    @ray.method(concurrency_group="serve")
    def read(self, path: str, start: int, length: int) -> bytes:
        """A part of one of the node's files, for a rank on another node; less, or nothing, at its end."""
        if Path(path).parent != self._folder:
            raise PermissionError(f"{path}: is no file of this vault, which keeps {self._folder}")
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, start)

    @ray.method(concurrency_group="serve")
    def came_into(self, recorded: int) -> tuple[int, list[dict[str, Any]], str]:
        """What it has taken over: bytes, lines of steps beyond `recorded`, and what was in the way, or ""."""
        return self._came, untold_in(self._folder, after=recorded), self._problem

    def follow(self, pids: Iterable[int]) -> None:
        """Watch these processes too."""
        for pid in pids:
            self._pids.add(pid)
            self._watch.follow(pid)
        if self._raylet:  # anew: what befell it may have been told to a controller that was lost just then
            self._watch.follow(self._raylet)

    def following(self) -> set[int]:
        """The processes that are watched; empty in a vault that Ray has started again."""
        return self._pids

    def seen(self, pid: int) -> Seen:
        """As `watch.seen_of`."""
        return seen_of(pid)

    def kill(self, pid: int) -> float | None:
        """As `Watch.end`: end a process of this node that may answer nobody."""
        self._pids.discard(pid)
        return self._watch.end(pid)

    def close(self, lost: Collection[str] = ()) -> None:
        """Stop watching and remove the node's files, and those of `lost` nodes that were on this machine."""
        self._lifeline.close()
        self._watch.close()
        for folder in (self._folder, *(self._folder.with_name(name) for name in lost)):
            shutil.rmtree(folder, ignore_errors=True)
            lock_of(folder).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other nodes of a run may be on the same machine
            self._folder.parent.rmdir()

    def abandon(self) -> None:
        """End the processes that are watched, remove the node's files, and end."""
        for pid in list(self._pids):
            self._watch.end(pid)
        self.close()
        threading.Timer(CLOSE_S, os._exit, (1,)).start()

    def _tell(self, notice: Notice) -> None:
        if notice.pid == self._raylet:
            node = ray.get_runtime_context().get_node_id()
            self._controller.notice.remote(Unmanaged(node, notice.what))
        else:
            self._controller.notice.remote(notice)

    def _end_alone(self, over: bool) -> None:
        for pid in list(self._pids):
            self._watch.end(pid)  # one that is stopped cannot end itself
        if over:
            self.close()
        threading.Timer(CLOSE_S, os._exit, (1,)).start()  # Ray itself may be lost, and not answer
        ray.kill(self._myself)  # an exit would have Ray start it again


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
        self._pulse = Pulse()
        self._lost: set[str] = set()
        self.former: tuple[str, ...] = ()  # runs whose memory vaults take over as they start
        self.untold: tuple[Mapping[str, Any], ...] = ()  # lines that one of them has left
        self._nodes: list[Node] = []
        self.slots = config.copies  # of each rank

    def memory(self, node: str, *, recorded: int, durable: int, elsewhere: Sequence[Listed] = ()) -> Memory:
        """What a rank on `node` is told; `elsewhere` are images on nodes without ranks."""
        groups = protection_for(self.nodes()) if self.slots > 2 else []
        beside = next((memory_factor(g) - 1 for g in groups if node_name(node) in g.ids), 0.0)
        return Memory(
            run=self._run,
            node=node_name(node),
            folder=str(self._folder / node_name(node)),
            slots=self.slots,
            share=self._config.memory_share,
            beside=beside,
            recorded=recorded,
            vaults=self.actors(),
            elsewhere=tuple(elsewhere),
            untold=tuple(line for line in self.untold if line["step"] > recorded),
            writes=True,
            durable=durable,
        )

    def actors(self) -> dict[str, Any]:
        """The vaults by the names that nodes have among themselves."""
        return {node_name(node): actor for node, actor in list(self._actors.items())}  # threads ask

    def nodes(self) -> list[Node]:
        """The nodes with a vault, and their zones."""
        nodes = list(self._actors)
        if {node.id for node in self._nodes} != {node_name(node) for node in nodes}:
            labels = {each["NodeID"]: each.get("Labels") or {} for each in ray.nodes()}
            self._nodes = [
                Node(node_name(node), next((of[key] for key in ZONE_LABELS if key in of), ""))
                for node, of in ((node, labels.get(node, {})) for node in nodes)
            ]
        return self._nodes

    def start_on(self, node: str) -> None:
        """Start the vault of a node that has none."""
        if node not in self._actors:
            self._actors[node] = self._start(node)

    def follow(self, node: str, pid: int) -> None:
        """Watch a process; starts the vault of a node that has none."""
        self.start_on(node)
        if pid not in (followed := self._pids.setdefault(node, set())):
            followed.add(pid)
            self._actors[node].follow.remote([pid])

    def kill(self, node: str, pid: int) -> Any:
        """End a process and watch it no longer; a reference to when it was last seen well, or None."""
        self._pids.get(node, set()).discard(pid)
        return self._actors[node].kill.remote(pid) if node in self._actors else None

    def seen(self, node: str, pid: int) -> Any:
        """A reference to what the kernel there says of a process; None where the node has no vault."""
        return self._actors[node].seen.remote(pid) if node in self._actors else None

    def silent(self, now: float, ranks: Mapping[str, Sequence[Any]]) -> list[str]:
        """Nodes of which nobody answers any more, by `Pulse`; `ranks` are the workers on each.

        The controller's own node cannot be lost without it. A vault that was started again follows anew.
        """
        others = {node: actor for node, actor in self._actors.items() if node != self._own_node}
        lost, watched = self._pulse.look(now, self._actors, ranks)
        for node, pids in watched.items():
            if missing := self._pids.get(node, set()) - pids:
                self._actors[node].follow.remote(sorted(missing))
        return [node for node in lost if node in others]

    def in_doubt(self) -> bool:
        """Whether a node may turn out to be lost."""
        return self._pulse.in_doubt(node for node in self._actors if node != self._own_node)

    def heard_since(self, node: str, since: float) -> bool:
        """Whether somebody there has answered what was asked after that time, or nobody there is asked."""
        return node not in self._actors or node == self._own_node or self._pulse.heard_since(node, since)

    def abandon(self, node: str) -> None:
        """Have all that the run has on a node ended while somebody there listens; then it is to be lost."""
        if node in self._actors:
            ray.wait([self._actors[node].abandon.remote()], timeout=CLOSE_S)

    def lose(self, node: str) -> None:
        """Forget a node that is gone; should it only have been cut off, its vault ends when it is back."""
        actor = self._actors.pop(node, None)
        if actor is not None:
            ray.kill(actor)
        self._pids.pop(node, None)
        self._pulse.forget(node)
        self._lost.add(node_name(node))

    def close(self) -> None:
        """Remove the files of all nodes and end the vaults."""
        closing = [actor.close.remote(sorted(self._lost)) for actor in self._actors.values()]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S) if closing else None
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _start(self, node: str) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 0,
            "lifetime": "detached",  # not owned by the controller, whose end must not leave files behind
            "name": f"{self._run}-{node_name(node)}",
            "get_if_exists": True,  # a controller that is started again finds those of its run
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            "concurrency_groups": GROUPS,
        }
        actor = ray.remote(**options)(VaultActor)
        return actor.remote(
            self._home,
            str(self._folder / node_name(node)),
            self._controller,
            self._run,
            self._config.memory_share,
            self.former,
        )


def _raylet() -> int:
    """The process of Ray's that manages this node, which has started this one; 0 where another has."""
    try:
        parent = os.getppid()
        return parent if Path(os.readlink(f"/proc/{parent}/exe")).name == "raylet" else 0
    except OSError:
        return 0


def states_of(runs: Sequence[str]) -> list[Path]:
    """Where the memory of runs lies, or was; not that of embedded sessions, which their reaper removes."""
    folders = [memory_folder(run) for run in runs]
    return [Path(folder) for folder in folders if not has_reaper(folder)]


def node_name(node: str) -> str:
    """What nodes are called among themselves and their folders: enough of Ray's id to tell them apart."""
    return node[:16]
