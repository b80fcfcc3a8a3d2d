"""The ranks of a run through its epochs: form them, let them train, break an epoch off, put others in.

Nothing here decides: what failed is told as values, and a remedy is carried out as it is given.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ..faulttol.remedy import Replace, Shrink
from ..faulttol.verdict import Failure
from ..runtime.checkpoint.shelf import Shelf
from ..runtime.config import check_config
from ..runtime.plan import RunPlan, make_run_plan
from .coldstart import Former, come_into_memory, give_back
from .durable import WRITER, Durable
from .fleet import Fleet, form, start_fleet
from .home import Home
from .losses import Losses, short_name
from .meeting import Meeting
from .notice import Asked, Unmanaged
from .protect import Protector
from .record import Record
from .recovery import with_layout
from .reserve import Reserve
from .vault import Vaults, node_name
from .watch import Notice, seen_of

ANSWER_S = 5.0  # a control thread answers in milliseconds; one that takes this long does not answer
LEAVE_S = 10.0  # a rank raises at its next exchange with others, which in a small model is milliseconds away
LEAVE_STEPS = 3  # in a large one it may compute for most of a step first
GONE = "its process was gone when its controller had been started again"
SETTLED = frozenset(  # all groups stand by then
    {"training", "saving a checkpoint", "validating", "writing the last checkpoint"}
)


class Crew:
    """Workers, spares, vaults and the store of a run."""

    def __init__(self, plan: RunPlan, home: Home, controller: Any, *, run: str, record: Record) -> None:
        """`run` begins the names of all that belongs to this run: the embedded session of the command, or a
        name that no other run in the cluster has.
        """
        self.plan = self._whole = plan
        self.epoch = self._before = 0  # epochs before the first of this run
        self._former = Former()
        self._controller = controller
        self._node = ray.get_runtime_context().get_node_id()
        self._fleet: Fleet | None = None
        self._reserve: Reserve | None = None
        self._home = home
        self._run = os.path.basename(run)
        self._vaults = Vaults(home, controller, plan.config.snapshot, own_node=self._node, session=run)
        turns = threading.Lock()
        self._protector = Protector(self._vaults, turns)
        shelf = Shelf(plan.config.run_dir / "checkpoints", keep=plan.config.checkpoint.keep, writer=WRITER)
        self._durable = Durable(self._vaults, shelf, record, turns)
        self._losses = Losses(self._vaults, own_node=self._node, recovers=self.recovers)
        self._running: dict[Any, int] = {}
        self._meeting: Meeting | None = None
        self._asked: set[str] = set()  # workers that were asked to leave, by name
        self._status: Any = None
        self._killed: Any = None  # a vault's answer about the process it ended last

    @property
    def fleet(self) -> Fleet:
        """The workers; they are started by then."""
        assert self._fleet is not None, "start comes first"
        return self._fleet

    @property
    def reserve(self) -> Reserve:
        """The processes beside the ranks; they are started by then."""
        assert self._reserve is not None, "start comes first"
        return self._reserve

    @property
    def recovers(self) -> bool:
        """Whether this run goes on after a fault."""
        return self.plan.config.snapshot.enabled is not False

    @property
    def nodes(self) -> list[str]:
        """Node of each rank."""
        return [short_name(member.place.node) for member in self.fleet.members]

    @property
    def lost_nodes(self) -> set[str]:
        """Nodes that are gone."""
        return self._losses.nodes

    def inherit(self, former: Former) -> None:
        """Count epochs on from a run in the same folder that came to no end; before `start`."""
        self.epoch = self._before = former.epoch
        self._former = former
        if self.recovers and not former.other:
            self._vaults.former = former.runs

    def come_into_memory(self, *, recorded: int) -> tuple[str, ...]:
        """Take over what that run has left on the nodes, or give it back; what there is to tell of it.
        `recorded` is the last step in the record. After `start`.
        """
        former, self._former = self._former, Former()
        if not former.runs:
            return ()
        if not self.recovers or former.other:
            return give_back(former, former.other or "snapshot.enabled = false").messages
        came = come_into_memory(self._vaults, former, recorded=recorded)
        self._vaults.untold = came.lines
        if came.left:
            self._former = former  # for the run after this one
        return came.messages

    def start(self, given_up: Callable[[], bool]) -> None:
        """Start the workers and the store where they meet. Raises FleetError and StartGivenUp."""
        self._meeting = self._open_meeting()  # imports torch, as the workers do meanwhile
        self._lead(start_fleet(self.plan, self._home, given_up, run=self._run, controller=self._controller))
        for member in self.fleet.members:
            self._losses.follow(member)

    def as_values(self) -> dict[str, Any]:
        """What `take_over` needs, as plain values."""
        if self._fleet is None:
            return {}
        plan = self.plan.config.to_dict()
        lost = sorted(self.lost_nodes)
        return {"epoch": self.epoch, "plan": plan, "lost_nodes": lost, "fleet": self._fleet.as_values()}

    def memory_values(self) -> dict[str, Any]:
        """What a run after this one needs to find its memory (`coldstart.py`), as plain values."""
        former = self._former
        return {
            "runs": [self._run, *former.runs],
            "folder": os.path.abspath(self.plan.config.run_dir),
            "plan": self.plan.config.to_dict(),
            "other": former.other,
            "epoch": self.epoch,
            "before": self._before,
        }

    def take_over(self, values: dict[str, Any], *, in_epoch: bool) -> list[int]:
        """Be the crew of a run whose controller was lost; the ranks whose processes are gone. Without
        `in_epoch` that controller may have begun another epoch than it wrote down.
        """
        self.epoch = values["epoch"] + (not in_epoch)
        config = check_config(values["plan"])
        self.plan = make_run_plan(config, cpus=1, gpus=int(config.run.device == "cuda"))
        self._losses.nodes |= set(values["lost_nodes"])
        self._meeting = self._open_meeting()
        self._lead(
            Fleet.found(self.plan, self._home, values["fleet"], run=self._run, controller=self._controller)
        )
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for member in self.fleet.members:
            if member.place.node in alive:
                self._losses.follow(member)
        for node in {member.place.node for member in self.fleet.members} - alive:
            self._losses.lose(self.fleet, node, 0)
        return [rank for rank, member in enumerate(self.fleet.members) if member.actor is None]

    def settled(self) -> bool:
        """Whether all ranks are past the point where they need the store of their epoch."""
        asked = [member.actor.status.remote() for member in self.fleet.members]
        try:
            return all(status["phase"] in SETTLED for status in ray.get(asked, timeout=ANSWER_S))
        except (GetTimeoutError, RayActorError):
            return False

    def form(self, given_up: Callable[[], bool], lost: Callable[[], bool]) -> dict[str, Any]:
        """Let the ranks find each other in a new epoch; what to tell of it. Raises as `fleet.form` does."""
        if self.epoch == self._before:
            self.fence_off()
        form(
            self.fleet.members,
            self.plan,
            epoch=self.epoch,
            store=self._met().place,
            given_up=given_up,
            lost=lost,
        )
        return {
            "epoch": self.epoch,
            **({"epochs_before": self._before} if self._before else {}),
            "world_size": self.plan.layout.world_size,
            "layout": str(self.plan.layout),
            "nodes": [member.place.node for member in self.fleet.members],
            "pids": [member.place.pid for member in self.fleet.members],
            "spare_pids": [member.place.pid for member in self.fleet.spares()],
        }

    def train(self, *, recorded: int) -> None:
        """Let every rank train in this epoch; `recorded` is the last step in the record of the run."""
        values = self.plan.config.to_dict()
        for spare in self.fleet.spares():  # before memory is given out: they may be on further nodes
            self._losses.follow(spare)
        homes = [node_name(member.place.node) for member in self.fleet.members]
        elsewhere = self._protector.elsewhere(homes) if self.recovers else []
        durable = self._durable.step
        self._running = {
            member.actor.train.remote(
                epoch=self.epoch,
                rank=rank,
                plan=values,
                controller=self._controller,
                memory=self._vaults.memory(
                    member.place.node, recorded=recorded, durable=durable, elsewhere=elsewhere
                )
                if self.recovers
                else None,
            ): rank
            for rank, member in enumerate(self.fleet.members)
        }
        self._losses.listen(self._running)
        if self.recovers:
            self._protector.begin(self.epoch, homes)
            self._durable.begin(self.epoch, homes)

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
            self._losses.await_news(timeout_s)
            done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            at = step()
            found += [self._result(ref, self._running.pop(ref), at) for ref in done]
            found += self._noticed(at)
        return [end for end in found if isinstance(end, Failure) or "left" not in end]

    def noticed_any(self) -> bool:
        """Whether something was noticed of a rank that nobody has asked about yet."""
        return self._losses.noticed_any(self.fleet)

    def tell(self, notice: Notice | Asked | Unmanaged) -> None:
        """Take in what a vault has seen, or that a worker was asked to leave; called by another thread."""
        match notice:
            case Asked():
                self._asked.add(notice.worker)
            case Unmanaged():
                self._losses.tell_unmanaged(notice.node, notice.what)
            case Notice():
                self._losses.tell(notice)

    def answers(self, rank: int) -> bool:
        """Whether a rank's process answers."""
        try:
            ray.get(self.fleet.members[rank].actor.status.remote(), timeout=ANSWER_S)
        except (GetTimeoutError, RayActorError):
            return False
        return True

    def seen(self, rank: int) -> Any:
        """What the kernel says of a rank's process: a `Seen`, a reference to it, or None if nobody asks."""
        place = self.fleet.members[rank].place
        seen = self._vaults.seen(place.node, place.pid)
        return seen_of(place.pid) if seen is None and place.node == self._node else seen

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

    def end(self, ranks: Iterable[int]) -> None:
        """End the processes of ranks that have left their epoch."""
        for rank in ranks:
            self._losses.drop(self.fleet, self.fleet.members[rank])

    def fence_off(self) -> None:
        """Begin the next epoch: whoever belongs to the last can no longer join, commit or record."""
        self._protector.pause()
        self._durable.pause()
        self.epoch = self._met().next_epoch()

    def halt(self, *, step_s: float) -> None:
        """Let the ranks end their epoch after the same step, so that all of them have it; those that do not
        in time, or fail, are for `break_off`.
        """
        for member in self.fleet.members:
            member.actor.halt.remote(self.epoch)
        budget_s = max(LEAVE_S, LEAVE_STEPS * step_s)
        ray.wait(list(self._running), num_returns=len(self._running), timeout=budget_s)

    def break_off(self, lost: Iterable[int], *, step_s: float, step: int) -> list[Failure]:
        """End the lost ranks, and let the others leave what they wait in; those that do not are ended too and
        are the failures returned.
        """
        gone = set(lost)
        for rank in gone:
            self._killed = self._losses.drop(self.fleet, self.fleet.members[rank])
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
                late.append(self._losses.death(self.fleet, rank, step, error))
        for failure in late:
            self._losses.drop(self.fleet, self.fleet.members[failure.rank])
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
        except RayError:
            return None
        return seen

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
            self._losses.follow(member)
        self._make_again()

    @property
    def missing(self) -> int:
        """Ranks that the run was begun with and has not now."""
        return self._whole.layout.world_size - self.plan.layout.world_size

    def whole_again(self) -> Shrink | None:
        """How to go on as the run was begun, once there are enough spares; None where that is so, or not yet.

        A `Shrink` to more ranks: the present ones keep their numbers.
        """
        if not self.missing or len(spares := self.reserve.ready()) < self.missing:
            return None
        keep = tuple(range(self.plan.layout.world_size))
        return Shrink(layout=self._whole.layout, keep=keep, spares=tuple(spares[: self.missing]))

    def stop(self) -> None:
        """Ask every rank to stop after the step it is in."""
        self.fleet.stop()

    @property
    def node_safe_step(self) -> int | None:
        """The newest step that outlives the loss of a node; None where there is none."""
        return self._protector.safe_step if self._protector.safe_step >= 0 else None

    def make_durable(self, step: int) -> str | None:
        """Have the last step on disk, as its ranks have ended; why it is not, or None."""
        self._protector.pause()
        return self._durable.finish(step)

    def rescue(self) -> None:
        """Have on disk what is in memory, if that is newer, as the run cannot go on."""
        self._protector.pause()
        self._durable.rescue()

    @property
    def in_doubt(self) -> bool:
        """Whether a node is silent and may turn out to be lost."""
        return self.recovers and self._vaults.in_doubt()

    def protection_news(self) -> list[dict[str, Any]]:
        """Changes of how well lost nodes could be made up for, as fields of events."""
        return self._protector.take_news()

    def close(self) -> None:
        """End all that was started and remove the files of the run's memory."""
        self._protector.close()
        self._durable.close()
        if self._fleet is not None:
            self._fleet.end()
        self._vaults.close()
        self._losses.close()

    def _lead(self, fleet: Fleet) -> None:
        drained = self.plan.config.run.address != "local"
        self._fleet = fleet
        self._reserve = Reserve(fleet, self._losses, asked=self._asked, drained=drained)

    def _open_meeting(self) -> Meeting:
        return Meeting(self.epoch, timeout_s=self.plan.config.run.start_timeout_s)

    def _met(self) -> Meeting:
        assert self._meeting is not None, "start comes first"
        return self._meeting

    def _noticed(self, step: int) -> list[Failure]:
        failures = self._losses.noticed(self.fleet, step)
        seen = {failure.rank for failure in failures}
        self._running = {ref: rank for ref, rank in self._running.items() if rank not in seen}
        return failures

    def _make_again(self) -> None:
        """Have the state of lost nodes made again, each where most of its ranks have gone."""
        left, emptied = self._vaults.actors(), self._losses.emptied
        if not emptied or not left:
            return
        now_at = Counter(node_name(member.place.node) for member in self.fleet.members)
        target = max(left, key=lambda node: (now_at[node], node))
        self._protector.make_again({node_name(node): target for node in emptied})
        emptied.clear()

    def _result(self, ref: Any, rank: int, step: int) -> dict[str, Any] | Failure:
        """The outcome of a rank, or its failure: told by itself, or seen from its death."""
        try:
            result: dict[str, Any] = ray.get(ref)
        except (RayActorError, RayTaskError) as error:
            return self._losses.death(self.fleet, rank, step, error)
        return Failure(**result["failure"]) if "failure" in result else result
