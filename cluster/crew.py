"""The ranks of a run through its epochs: form them, let them train, break an epoch off, put others in.

Nothing here decides: what failed is told as values, and a remedy is carried out as it is given.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..faulttol.remedy import Replace, Shrink, Spare
from ..faulttol.verdict import Failure
from ..runtime.plan import RunPlan
from .deaths import Deaths
from .fleet import Fleet, FleetError, Member, form, start_fleet
from .home import Home
from .recovery import with_layout
from .vault import Vaults
from .watch import Notice

ANSWER_S = 5.0  # a control thread answers in milliseconds; one that takes this long does not answer
LEAVE_S = 10.0  # a rank raises at its next exchange with others, which in a small model is milliseconds away
LEAVE_STEPS = 3  # in a large one it may compute for most of a step first
UNKNOWN = "its process ended without a Python error: killed from outside, or crashed in native code"
STOPPED = "its process was halted by a signal, as SIGSTOP does, and answers nobody"


class Crew:
    """Workers, spares, vaults and the store of a run."""

    def __init__(self, plan: RunPlan, home: Home, controller: Any, *, session: str) -> None:
        """`session` names the embedded session of the command, "" in a joined cluster."""
        self.plan = self._whole = plan
        self.epoch = 0
        self.lost_nodes: set[str] = set()
        self._controller = controller
        self._node = ray.get_runtime_context().get_node_id()
        self._fleet: Fleet | None = None
        self._home = home
        self._deaths = Deaths(self._node)
        self._vaults = Vaults(home, controller, plan.config.snapshot, own_node=self._node, session=session)
        self._running: dict[Any, int] = {}
        self._notices: list[Notice] = []
        self._lock = threading.Lock()
        self._store: Any = None
        self._store_at = ("", 0)
        self._status: Any = None
        self._dead_spares: list[int] = []  # process ids of those that nobody was told of yet
        self._killed: Any = None  # a vault's answer about the process it ended last

    @property
    def fleet(self) -> Fleet:
        """The workers; they are started by then."""
        assert self._fleet is not None, "start comes first"
        return self._fleet

    @property
    def recovers(self) -> bool:
        """Whether this run goes on after a fault."""
        return self.plan.config.snapshot.enabled is not False

    @property
    def nodes(self) -> list[str]:
        """Node of each rank."""
        return [_short(member.place.node) for member in self.fleet.members]

    def start(self, given_up: Callable[[], bool]) -> None:
        """Start the workers and the store where they meet. Raises FleetError and StartGivenUp."""
        opening = threading.Thread(target=self._open_store, name="store", daemon=True)
        opening.start()  # imports torch, as the workers do meanwhile
        self._fleet = start_fleet(self.plan, self._home, given_up)
        opening.join(self.plan.config.run.start_timeout_s)
        if self._store is None:
            raise FleetError("the store where the ranks meet could not be opened beside the controller")
        for member in self.fleet.members:
            self._follow(member)

    def form(self, given_up: Callable[[], bool], lost: Callable[[], bool]) -> dict[str, Any]:
        """Let the ranks find each other in a new epoch; what to tell of it. Raises as `fleet.form` does."""
        if not self.epoch:
            self.fence_off()
        form(
            self.fleet.members,
            self.plan,
            epoch=self.epoch,
            store=self._store_at,
            given_up=given_up,
            lost=lost,
        )
        return {
            "epoch": self.epoch,
            "world_size": self.plan.layout.world_size,
            "layout": str(self.plan.layout),
            "nodes": [member.place.node for member in self.fleet.members],
            "pids": [member.place.pid for member in self.fleet.members],
            "spare_pids": [member.place.pid for member in self.fleet.spares()],
        }

    def train(self, *, recorded: int) -> None:
        """Let every rank train in this epoch; `recorded` is the last step in the record of the run."""
        values = self.plan.config.to_dict()
        self._running = {
            member.actor.train.remote(
                epoch=self.epoch,
                rank=rank,
                plan=values,
                controller=self._controller,
                memory=self._vaults.memory(member.place.node, recorded=recorded) if self.recovers else None,
            ): rank
            for rank, member in enumerate(self.fleet.members)
        }

    @property
    def training(self) -> list[int]:
        """Ranks whose training has not ended."""
        return sorted(self._running.values())

    def ends(self, step: Callable[[], int], *, timeout_s: float) -> list[dict[str, Any] | Failure]:
        """How ranks have ended since the last call: outcomes, and failures that they told or that were seen.
        Waits for the first; `step()` is the one that the others are at, when something is found.
        """
        found: list[dict[str, Any] | Failure] = list(self._noticed(step()))
        if not found and self._running:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
            at = step()
            found += [self._result(ref, self._running.pop(ref), at) for ref in done]
            found += self._noticed(at)
        return [end for end in found if isinstance(end, Failure) or "left" not in end]

    def noticed_any(self) -> bool:
        """Whether something was noticed of a rank that nobody has asked about yet."""
        ranks = {member.place.pid for member in self.fleet.members}
        with self._lock:
            return any(notice.pid in ranks for notice in self._notices)

    def tell(self, notice: Notice) -> None:
        """Take in what a vault has seen; called by another thread."""
        with self._lock:
            self._notices.append(notice)

    def answers(self, rank: int) -> bool:
        """Whether a rank's process answers."""
        try:
            ray.get(self.fleet.members[rank].actor.status.remote(), timeout=ANSWER_S)
        except (GetTimeoutError, RayActorError):
            return False
        return True

    def phase(self) -> str | None:
        """What rank 0 was doing when it was asked last; asks again. Nobody waits for the answer."""
        phase = None
        if self._status is not None and ray.wait([self._status], timeout=0)[0]:
            try:
                phase = ray.get(self._status)["phase"]
            except RayActorError:
                phase = None  # its end will tell
            self._status = None
        if self._status is None:
            self._status = self.fleet.members[0].actor.status.remote()
        return phase

    def keep_up(self) -> list[int]:
        """Replace spares that were used or have died, and follow new ones; process ids of the dead."""
        for spare in self.fleet.spares():
            self._follow(spare)
        self._drop_dead_spares()
        dead, self._dead_spares = self._dead_spares, []
        wanted = self.fleet.spares_wanted + self.missing  # those that would make the run whole again
        self.fleet.add_spares(max(0, wanted - self.fleet.spares_in_all))
        return dead

    def fence_off(self) -> None:
        """Begin the next epoch: whoever belongs to the last can no longer join, commit or record."""
        from ..faulttol.epoch import bump

        self.epoch = bump(self._store, self.epoch)

    def break_off(self, lost: Iterable[int], *, step_s: float, step: int) -> list[Failure]:
        """End the lost ranks, and let the others leave what they wait in; those that do not are ended too and
        are the failures returned.
        """
        gone = set(lost)
        for rank in gone:
            self._killed = self._drop(self.fleet.members[rank])
        leaving = {
            member.actor.leave.remote(self.epoch - 1): rank
            for rank, member in enumerate(self.fleet.members)
            if rank not in gone
        }
        self._running = {ref: rank for ref, rank in self._running.items() if rank not in gone}
        budget_s = max(LEAVE_S, LEAVE_STEPS * step_s)
        ray.wait(list(leaving), num_returns=len(leaving), timeout=budget_s) if leaving else None
        late = []
        for ref, rank in leaving.items():
            try:
                ray.get(ref, timeout=0)
            except GetTimeoutError:
                told = f"its process did not come back from its step within {budget_s:.0f} s"
                late.append(Failure(rank, step, "stopped", told, time.time()))
            except (RayActorError, RayTaskError) as error:
                late.append(self._death(rank, step, error))
        for failure in late:
            self._drop(self.fleet.members[failure.rank])
        self._running = {}
        return late

    def last_well_unix(self) -> float | None:
        """When the process that was ended last had been seen well, if its vault has said so by now; told
        once.
        """
        asked, self._killed = self._killed, None
        if asked is None or not ray.wait([asked], timeout=0)[0]:
            return None
        try:
            seen: float | None = ray.get(asked)
        except (RayActorError, RayTaskError):
            return None
        return seen

    def spares(self) -> list[Spare]:
        """Processes that could take a rank's place this instant."""
        self._drop_dead_spares()
        return [Spare(spare.id, _short(spare.place.node)) for spare in self.fleet.spares()]

    def spare_pids(self) -> dict[str, int]:
        """Process id of each spare."""
        return {spare.id: spare.place.pid for spare in self.fleet.spares()}

    def carry_out(self, remedy: Replace | Shrink, *, lost: Collection[int]) -> None:
        """Give the ranks of the next epoch their processes; those of `lost` ranks have been ended."""
        idle = {spare.id: spare for spare in self.fleet.spares()}
        before = list(self.fleet.members)
        members = list(before)
        if isinstance(remedy, Replace):
            for rank, spare in remedy.spares.items():
                members[rank] = idle[spare.id]
        else:
            members = [before[rank] for rank in remedy.keep] + [idle[spare.id] for spare in remedy.spares]
            self.plan = with_layout(self.plan, remedy.layout)
        self.fleet.rearrange(members, lost=[before[rank] for rank in lost])
        for member in members:
            self._follow(member)

    @property
    def missing(self) -> int:
        """Ranks that the run was begun with and has not now."""
        return self._whole.layout.world_size - self.plan.layout.world_size

    def whole_again(self) -> Shrink | None:
        """How to go on as the run was begun, once there are enough spares; None where that is so, or not yet.

        A `Shrink` to more ranks: the present ones keep their numbers.
        """
        if not self.missing or len(spares := self.spares()) < self.missing:
            return None
        keep = tuple(range(self.plan.layout.world_size))
        return Shrink(layout=self._whole.layout, keep=keep, spares=tuple(spares[: self.missing]))

    def stop(self) -> None:
        """Ask every rank to stop after the step it is in."""
        self.fleet.stop()

    def close(self) -> None:
        """End all that was started and remove the files of the run's memory."""
        if self._fleet is not None:
            self._fleet.end()
        self._vaults.close()
        self._deaths.close()

    def _open_store(self) -> None:
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=self.plan.config.run.start_timeout_s)
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        self._store_at = host, self._store.port

    def _follow(self, member: Member) -> None:
        self._deaths.follow(member.place)
        if self.recovers:
            self._vaults.follow(member.place.node, member.place.pid)

    def _drop(self, member: Member) -> Any:
        """A reference to when its process was last seen well, or None."""
        seen = self._vaults.kill(member.place.node, member.place.pid)
        self.fleet.drop(member)
        return seen

    def _drop_dead_spares(self) -> None:
        ranks = {member.place.pid for member in self.fleet.members}
        with self._lock:
            others = {notice.pid for notice in self._notices if notice.pid not in ranks}
            self._notices = [notice for notice in self._notices if notice.pid in ranks]
        for spare in [one for one in self.fleet.spares() if one.place.pid in others]:
            self._dead_spares.append(spare.place.pid)
            self._drop(spare)

    def _noticed(self, step: int) -> list[Failure]:
        """What was noticed of the ranks, and of nodes that went silent."""
        ranks = {member.place.pid: rank for rank, member in enumerate(self.fleet.members)}
        with self._lock:
            mine = [notice for notice in self._notices if notice.pid in ranks]
            self._notices = [notice for notice in self._notices if notice.pid not in ranks]
        failures = []
        for notice in mine:
            how = STOPPED if notice.what == "stopped" else self._deaths.how(notice.pid) or UNKNOWN
            failures.append(Failure(ranks[notice.pid], step, notice.what, how, notice.last_well_unix))
        for node in self._vaults.silent(time.monotonic()) if self.recovers else []:
            self.lost_nodes.add(_short(node))
            self._vaults.lose(node)
            there = [rank for rank, member in enumerate(self.fleet.members) if member.place.node == node]
            failures += [
                Failure(rank, step, "died", "its machine does not answer", time.time()) for rank in there
            ]
        seen = {failure.rank for failure in failures}
        self._running = {ref: rank for ref, rank in self._running.items() if rank not in seen}
        return failures

    def _result(self, ref: Any, rank: int, step: int) -> dict[str, Any] | Failure:
        """The outcome of a rank, or its failure: told by itself, or seen from its death."""
        try:
            result: dict[str, Any] = ray.get(ref)
        except (RayActorError, RayTaskError) as error:
            return self._death(rank, step, error)
        return Failure(**result["failure"]) if "failure" in result else result

    def _death(self, rank: int, step: int, error: RayActorError | RayTaskError) -> Failure:
        if isinstance(error, RayTaskError):
            cause = error.cause
            return Failure(rank, step, type(cause).__name__, str(cause), time.time(), traceback=str(error))
        pid = self.fleet.members[rank].place.pid
        with self._lock:  # a vault may have seen it as well, and earlier
            seen = [n.last_well_unix for n in self._notices if n.pid == pid]
            self._notices = [n for n in self._notices if n.pid != pid]
        how = self._deaths.how(pid) or _why(error)
        return Failure(rank, step, "died", how, min([time.time(), *seen]), traceback=str(error))


def _short(node: str) -> str:
    """Enough of a node's id to tell it from others."""
    return node[:12]


def _why(error: RayActorError) -> str:
    """Why an actor's process ended, as far as Ray can tell."""
    text = str(error).lower()
    if "memory pressure" in text or "out_of_memory" in text:
        return "its process was killed by Ray, because its machine ran out of memory"
    if "node" in text and ("node has died" in text or "node died" in text or "node is dead" in text):
        return "its machine was lost"
    return UNKNOWN
