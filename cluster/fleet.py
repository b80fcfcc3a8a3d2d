"""The workers of a run on their machines: a placement group and one actor a rank, and spares beside them.

Every wait is bounded by `run.start_timeout_s`; what is missing when it ends is said in numbers.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..runtime.plan import RunPlan
from .home import Home
from .worker import Place, Seat, Worker

CONTROL_THREADS = 3  # one call may wait (joining the others) and be told to leave while a third is answered
LOOK_EVERY_S = 0.1  # between looks at whether the user has changed their mind, or a rank has died


SPARES_WAIT_S = 10.0  # spares start with the ranks, so they are there a moment later, or something is wrong


class FleetError(RuntimeError):
    """The workers could not be started; the message says what was missing."""


class StartGivenUp(RuntimeError):
    """The user asked to stop before the workers were up."""


class Interrupted(RuntimeError):
    """A rank was lost while the ranks were finding each other."""


@dataclass(frozen=True)
class Member:
    """A started worker."""

    actor: Any
    place: Place

    @property
    def id(self) -> str:
        """A name for it, unique within a run."""
        return f"{self.place.host}:{self.place.pid}"


class Fleet:
    """Started workers in rank order, and those that wait for one of them to be lost.

    A spare is outside the placement group and takes no CPU from the cluster: it only sleeps, and when it
    takes over a rank the place of the lost one is empty. GPUs cannot be shared like that, so it has its own.
    """

    def __init__(self, plan: RunPlan, home: Home, group: PlacementGroup) -> None:
        self.members: list[Member] = []
        self.spares_wanted = 0
        self._spares: list[Member] = []
        self._gpus = int(plan.device == "cuda")
        self._home = home
        self._group = group
        self._coming: dict[Any, Any] = {}  # reference to its place -> actor

    def start(self, bundle: int) -> Any:
        """Start the worker of a rank in its place of the placement group."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return self._start(cpus=1, strategy=strategy)

    def add_spares(self, count: int) -> None:
        """Start `count` more workers, where rank 0 is if there is room; nothing waits for them."""
        node = next(iter(placement_group_table(self._group)["bundles_to_node_id"].values()))
        for _ in range(count):
            actor = self._start(cpus=0, strategy=NodeAffinitySchedulingStrategy(node, soft=True))
            self._coming[actor.place.remote()] = actor

    def spares(self) -> list[Member]:
        """The spares that are ready this instant."""
        if self._coming:
            done, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)
            for ref in done:
                actor = self._coming.pop(ref)
                with contextlib.suppress(RayActorError, RayTaskError):  # no reason to stop a run
                    self._spares.append(Member(actor, ray.get(ref)))
        return self._spares

    def await_spares(self, deadline: float, given_up: Callable[[], bool]) -> None:
        """Wait until no spare is on its way."""
        while self._coming and time.monotonic() < deadline and not given_up():
            ray.wait(list(self._coming), num_returns=1, timeout=LOOK_EVERY_S)
            self.spares()

    @property
    def spares_in_all(self) -> int:
        """Those that are ready and those on their way."""
        return len(self._spares) + len(self._coming)

    def drop(self, member: Member) -> None:
        """End the process of a rank or a spare, dead or alive."""
        ray.kill(member.actor)
        self._spares = [spare for spare in self._spares if spare is not member]

    def rearrange(self, members: list[Member], *, lost: Collection[Member]) -> None:
        """Give rank numbers anew; ranks that get none become spares, but for the lost ones."""
        idle = [one for one in (*self.members, *self._spares) if one not in members and one not in lost]
        self.members, self._spares = members, idle

    def stop(self) -> None:
        """Ask every rank to stop after the step it is in; does not wait."""
        for member in self.members:
            member.actor.stop.remote()

    def end(self) -> None:
        """End every worker process and give the resources back."""
        for actor in [*(m.actor for m in (*self.members, *self._spares)), *self._coming.values()]:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _start(self, *, cpus: int, strategy: Any) -> Any:
        options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
            "num_cpus": cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": CONTROL_THREADS},
            "scheduling_strategy": strategy,
        }
        return ray.remote(**options)(Worker).remote(self._home)


def start_fleet(plan: RunPlan, home: Home, given_up: Callable[[], bool]) -> Fleet:
    """Place and start one worker a rank.

    Raises FleetError when that takes longer than `run.start_timeout_s`, StartGivenUp when `given_up()` comes
    true.
    """
    world_size, timeout_s = plan.layout.world_size, plan.config.run.start_timeout_s
    deadline = time.monotonic() + timeout_s
    bundle = {"CPU": 1, "GPU": 1} if plan.device == "cuda" else {"CPU": 1}
    group = placement_group([bundle] * world_size, strategy="PACK")
    fleet = Fleet(plan, home, group)
    try:
        get_all([group.ready()], deadline, given_up)
    except StartGivenUp:
        remove_placement_group(group)
        raise
    except GetTimeoutError:
        have = {name: int(n) for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        remove_placement_group(group)
        raise FleetError(
            f"run.workers = {world_size} ranks need {world_size} x {bundle}, and after {timeout_s:.0f} s the "
            f"cluster, which has {have} in all, had not that much free: lower run.workers, or wait for other "
            "jobs to end"
        ) from None
    workers = [fleet.start(i) for i in range(world_size)]
    fleet.spares_wanted = spares_wanted(plan)
    fleet.add_spares(fleet.spares_wanted)
    nowhere = Place("", "", 0, 0)
    fleet.members = [Member(worker, nowhere) for worker in workers]
    try:
        places = get_all([worker.place.remote() for worker in workers], deadline, given_up)
    except StartGivenUp:
        fleet.end()
        raise
    except (GetTimeoutError, RayActorError, RayTaskError) as error:
        fleet.end()
        raise FleetError(
            f"not all {world_size} workers started within {timeout_s:.0f} s: {last_line(error)}"
        ) from error
    fleet.await_spares(min(deadline, time.monotonic() + SPARES_WAIT_S), given_up)
    started = [replace(member, place=place) for member, place in zip(fleet.members, places, strict=True)]
    fleet.members = _in_node_order(started)
    return fleet


def spares_wanted(plan: RunPlan) -> int:
    """`snapshot.spares`; -1 is one if the cluster has room for it beside the ranks, which are placed."""
    snapshot = plan.config.snapshot
    if snapshot.enabled is False or snapshot.spares >= 0:
        return 0 if snapshot.enabled is False else snapshot.spares
    free = ray.available_resources()  # of the last heartbeat, which may be from before the ranks were placed
    have = ray.cluster_resources()
    needed = ("CPU", "GPU") if plan.device == "cuda" else ("CPU",)
    beside = {name: have.get(name, 0) - plan.layout.world_size for name in needed}
    return int(all(min(free.get(name, 0), beside[name]) >= 1 for name in needed))


def form(
    members: list[Member],
    plan: RunPlan,
    *,
    epoch: int,
    store: tuple[str, int],
    given_up: Callable[[], bool],
    lost: Callable[[], bool],
) -> None:
    """Let all ranks find each other in `epoch`.

    Raises FleetError and StartGivenUp as `start_fleet` does, and Interrupted when `lost()` comes true or a
    rank dies.
    """
    timeout_s = plan.config.run.start_timeout_s
    deadline = time.monotonic() + timeout_s
    on_node = Counter(member.place.node for member in members)
    values = plan.config.to_dict()
    joining = [
        member.actor.join.remote(
            Seat(
                epoch=epoch,
                rank=rank,
                world_size=plan.layout.world_size,
                store=store,
                threads=max(1, member.place.cpus // on_node[member.place.node]),
            ),
            values,
        )
        for rank, member in enumerate(members)
    ]
    try:
        get_all(joining, deadline, given_up, lost)
    except (GetTimeoutError, RayActorError, RayTaskError) as error:
        told = (
            f"the {plan.layout.world_size} ranks did not find each other within {timeout_s:.0f} s: "
            f"{last_line(error)}"
        )
        # one that dies takes the others' connections with it
        raise (FleetError if isinstance(error, GetTimeoutError) else Interrupted)(told) from error


def get_all(
    refs: list[Any],
    deadline: float,
    given_up: Callable[[], bool],
    lost: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """The values of `refs` as soon as all are there or one of them is an error, which is raised."""
    waiting = refs
    while waiting:
        if given_up():
            raise StartGivenUp("asked to stop while the workers were starting")
        if lost():
            raise Interrupted("a rank was lost while the others waited for it")
        done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY_S)
        ray.get(done)  # an error need not wait for those that are still on their way
        if not done and time.monotonic() > deadline:
            raise GetTimeoutError("their start took longer")
    return ray.get(refs)


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which in Ray's errors is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _in_node_order(members: list[Member]) -> list[Member]:
    """Neighbouring ranks on one machine: the inner axes talk most."""
    first_seen = {member.place.node: number for number, member in reversed(list(enumerate(members)))}
    order = sorted(range(len(members)), key=lambda i: (first_seen[members[i].place.node], i))
    return [members[i] for i in order]
