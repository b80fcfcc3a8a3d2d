"""The workers of a run on their machines: a placement group and one actor a rank, and spares beside them.

All are detached and named by the run, so that they outlive their controller, and the next one finds them.
Every wait is bounded by `run.start_timeout_s`; what is missing when it ends is said in numbers.
"""

import contextlib
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
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
NOWHERE = Place("", "", 0, 0)  # where a worker is that has not said it yet
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

    actor: Any  # None where the process was gone when its next controller looked for it
    place: Place
    name: str = ""  # of the actor

    @property
    def id(self) -> str:
        """A name for it, unique within a run."""
        return f"{self.place.host}:{self.place.pid}"


class Fleet:
    """Started workers in rank order, and those that wait for one of them to be lost.

    A spare is outside the placement group and takes no CPU from the cluster: it only sleeps, and when it
    takes over a rank the place of the lost one is empty. GPUs cannot be shared like that, so it has its own.
    """

    def __init__(
        self, plan: RunPlan, home: Home, group: PlacementGroup, *, run: str, controller: Any
    ) -> None:
        """`run` begins the names of all that belongs to it; `controller` is whom its processes look for."""
        self.members: list[Member] = []
        self.spares_wanted = 0
        self._spares: list[Member] = []
        self._gpus = int(plan.device == "cuda")
        self._home = home
        self._group = group
        self._run = run
        self._controller = controller
        self._coming: dict[Any, tuple[Any, str]] = {}  # reference to its place -> actor and its name

    @classmethod
    def found(
        cls, plan: RunPlan, home: Home, values: dict[str, Any], *, run: str, controller: Any
    ) -> "Fleet":
        """The fleet of a run whose controller was lost, as `as_values` told; who has no rank is a spare."""
        fleet = cls(plan, home, get_placement_group(group_name(run)), run=run, controller=controller)
        there = _workers(run)
        for member in values["members"]:
            name, place = member["name"], Place(**member["place"])
            fleet.members.append(Member(there.pop(name, None), place, name))
        fleet._coming = {actor.place.remote(): (actor, name) for name, actor in there.items()}
        fleet.spares_wanted = values["spares_wanted"]
        return fleet

    def as_values(self) -> dict[str, Any]:
        """What `found` takes, as plain values."""
        members = [{"name": member.name, "place": asdict(member.place)} for member in self.members]
        return {"members": members, "spares_wanted": self.spares_wanted}

    def start(self, bundle: int) -> Member:
        """Start the worker of a rank in its place of the placement group, wherever that is."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return self._start(cpus=1, strategy=strategy)

    def add_spares(self, count: int, *, avoid: Collection[str] = (), in_background: bool = False) -> None:
        """Start `count` more workers, on the nodes of the ranks in turn if there is room, but for those to
        `avoid`; nothing waits for them, and `in_background` they do not hold up who trains beside them.

        The first is where rank 0 is. A node that is lost takes its spares with it, so not all are on one.
        """
        if count <= 0:
            return
        places = [member.place.node for member in self.members if member.place.node]
        at = places or list(placement_group_table(self._group)["bundles_to_node_id"].values())
        there = Counter(spare.place.node for spare in self._spares)
        nodes = sorted(dict.fromkeys(node for node in at if node not in avoid), key=lambda node: there[node])
        for node in itertools.islice(itertools.cycle(nodes), count):
            strategy = NodeAffinitySchedulingStrategy(node, soft=True)
            spare = self._start(cpus=0, strategy=strategy, in_background=in_background)
            self._coming[spare.actor.place.remote()] = (spare.actor, spare.name)

    def spares(self) -> list[Member]:
        """The spares that are ready this instant."""
        if self._coming:
            done, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)
            for ref in done:
                actor, name = self._coming.pop(ref)
                with contextlib.suppress(RayActorError, RayTaskError):  # no reason to stop a run
                    self._spares.append(Member(actor, ray.get(ref), name))
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
        if member.actor is not None:
            ray.kill(member.actor)
        self._spares = [spare for spare in self._spares if spare is not member]

    def rearrange(self, members: list[Member], *, lost: Collection[Member]) -> None:
        """Give rank numbers anew; ranks that get none become spares, but for the lost ones."""
        idle = [one for one in (*self.members, *self._spares) if one not in members and one not in lost]
        self.members, self._spares = members, idle

    def stop(self) -> None:
        """Ask every rank to stop after the step it is in; does not wait."""
        for member in self.members:
            if member.actor is not None:
                member.actor.stop.remote()

    def end(self) -> None:
        """End every worker process and give the resources back."""
        known = (member.actor for member in (*self.members, *self._spares))
        for actor in (*known, *(actor for actor, _ in self._coming.values())):
            if actor is not None:
                ray.kill(actor)
        remove_placement_group(self._group)

    def _start(self, *, cpus: int, strategy: Any, in_background: bool = False) -> Member:
        name = f"{_worker_prefix(self._run)}{secrets.token_hex(4)}"
        options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
            "num_cpus": cpus,
            "num_gpus": self._gpus,
            # a byte for a spare: an actor that takes nothing is put anywhere, whatever its strategy says
            "memory": None if cpus else 1,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": CONTROL_THREADS},
            "scheduling_strategy": strategy,
            "lifetime": "detached",
            "name": name,
        }
        actor = ray.remote(**options)(Worker).remote(
            self._home, self._controller, group_name(self._run), in_background
        )
        return Member(actor, NOWHERE, name)


def group_name(run: str) -> str:
    """The name of a run's placement group."""
    return f"{run}-ranks"


def _worker_prefix(run: str) -> str:
    return f"{run}-worker-"


def _workers(run: str) -> dict[str, Any]:
    """The run's workers that are there, by name."""
    found = {}
    for name in list_named_actors():
        if name.startswith(_worker_prefix(run)):
            with contextlib.suppress(ValueError):  # gone meanwhile
                found[name] = ray.get_actor(name)
    return found


def _group(run: str, bundles: list[dict[str, float]]) -> PlacementGroup:
    """The run's placement group; one that a controller made before it was lost is taken as it is."""
    try:
        return get_placement_group(group_name(run))
    except ValueError:
        return placement_group(bundles, strategy="PACK", name=group_name(run), lifetime="detached")


def start_fleet(
    plan: RunPlan, home: Home, given_up: Callable[[], bool], *, run: str, controller: Any
) -> Fleet:
    """Place and start one worker a rank, after whatever an earlier start of `run` has left is ended.

    Raises FleetError when that takes longer than `run.start_timeout_s`, StartGivenUp when `given_up()` comes
    true.
    """
    world_size, timeout_s = plan.layout.world_size, plan.config.run.start_timeout_s
    deadline = time.monotonic() + timeout_s
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if plan.device == "cuda" else {"CPU": 1}
    for actor in _workers(run).values():
        ray.kill(actor)
    group = _group(run, [bundle] * world_size)
    fleet = Fleet(plan, home, group, run=run, controller=controller)
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
    fleet.members = [fleet.start(i) for i in range(world_size)]
    fleet.spares_wanted = spares_wanted(plan)
    fleet.add_spares(fleet.spares_wanted)
    try:
        places = get_all([member.actor.place.remote() for member in fleet.members], deadline, given_up)
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
