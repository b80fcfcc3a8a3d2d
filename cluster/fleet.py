"""The workers of a run on their machines: a placement group and one actor a rank.

Every wait is bounded by `run.start_timeout_s`; what is missing when it ends is said in numbers.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..runtime.plan import RunPlan
from .home import Home
from .worker import Place, Worker

CONTROL_THREADS = 2  # one call may wait (joining the others) while another is answered


LOOK_EVERY_S = 0.2  # between looks at whether the user has changed their mind


class FleetError(RuntimeError):
    """The workers could not be started; the message says what was missing."""


class StartGivenUp(RuntimeError):
    """The user asked to stop before the workers were up."""


@dataclass(frozen=True)
class Fleet:
    """Started workers in rank order."""

    workers: list[Any]
    places: list[Place]
    group: PlacementGroup

    def stop(self) -> None:
        """Ask every rank to stop after the step it is in; does not wait."""
        for worker in self.workers:
            worker.stop.remote()

    def end(self) -> None:
        """End every worker process and give the resources back."""
        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.group)


def start_fleet(plan: RunPlan, home: Home, given_up: Callable[[], bool]) -> Fleet:
    """Place and start one worker a rank.

    Raises FleetError when that takes longer than `run.start_timeout_s`, StartGivenUp when `given_up()` comes
    true.
    """
    world_size, timeout_s = plan.layout.world_size, plan.config.run.start_timeout_s
    deadline = time.monotonic() + timeout_s
    bundle = {"CPU": 1, "GPU": 1} if plan.device == "cuda" else {"CPU": 1}
    group = placement_group([bundle] * world_size, strategy="PACK")
    try:
        _get([group.ready()], deadline, given_up)
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
    options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
        "num_cpus": 1,
        "num_gpus": bundle.get("GPU", 0),
        "max_restarts": 0,
        "max_task_retries": 0,
        "concurrency_groups": {"control": CONTROL_THREADS},
    }
    actor = ray.remote(**options)(Worker)
    workers = [
        actor.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        ).remote(home)
        for i in range(world_size)
    ]
    try:
        places = _get([worker.place.remote() for worker in workers], deadline, given_up)
    except StartGivenUp:
        Fleet(workers, [], group).end()
        raise
    except (GetTimeoutError, RayActorError, RayTaskError) as error:
        Fleet(workers, [], group).end()
        raise FleetError(
            f"not all {world_size} workers started within {timeout_s:.0f} s: {_last_line(error)}"
        ) from error
    return _in_node_order(Fleet(workers, places, group))


def form(fleet: Fleet, plan: RunPlan, given_up: Callable[[], bool]) -> None:
    """Let all ranks find each other; raises as `start_fleet` does."""
    timeout_s = plan.config.run.start_timeout_s
    deadline = time.monotonic() + timeout_s
    on_node = Counter(place.node for place in fleet.places)
    values = plan.config.to_dict()
    try:
        (store,) = _get([fleet.workers[0].open_store.remote(timeout_s)], deadline, given_up)
        joining = [
            worker.join.remote(
                rank=rank,
                world_size=plan.layout.world_size,
                store=store,
                plan=values,
                threads=max(1, place.cpus // on_node[place.node]),
            )
            for rank, (worker, place) in enumerate(zip(fleet.workers, fleet.places, strict=True))
        ]
        _get(joining, deadline, given_up)
    except (GetTimeoutError, RayActorError, RayTaskError) as error:
        raise FleetError(
            f"the {plan.layout.world_size} ranks did not find each other within {timeout_s:.0f} s: "
            f"{_last_line(error)}"
        ) from error


def _get(refs: list[Any], deadline: float, given_up: Callable[[], bool]) -> list[Any]:
    """The values of `refs` as soon as all are there or one of them is an error, which is raised."""
    waiting = refs
    while waiting:
        if given_up():
            raise StartGivenUp("asked to stop while the workers were starting")
        done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY_S)
        ray.get(done)  # an error need not wait for those that are still on their way
        if not done and time.monotonic() > deadline:
            raise GetTimeoutError("their start took longer")
    return ray.get(refs)


def _in_node_order(fleet: Fleet) -> Fleet:
    """Neighbouring ranks on one machine: the inner axes talk most."""
    first_seen = {place.node: number for number, place in reversed(list(enumerate(fleet.places)))}
    order = sorted(range(len(fleet.places)), key=lambda i: (first_seen[fleet.places[i].node], i))
    return Fleet([fleet.workers[i] for i in order], [fleet.places[i] for i in order], fleet.group)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
