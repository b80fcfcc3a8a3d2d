"""The command's side of a run: bring Ray up, start the controller or find the one that is at work, show what
happens, pass on Ctrl-C.

In a joined cluster the run does not end with its command: the same command finds it again by its folder.
"""

import json
import os
import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..faulttol.verdict import Verdict
from ..runtime.config import write_toml
from ..runtime.journal import EVENTS, SUMMARY, Journal, read_lines, write_atomically
from ..runtime.plan import RunPlan
from .attach import check_same
from .claim import RunBusy, claim_record
from .controller import Controller, controller_name
from .home import Home
from .interrupts import Interrupts, StoppedAtOnce, interrupts
from .progress import Progress
from .reaper import MARK
from .session import JoinedHead, SessionLost, check_embedded, ray_session

NAMESPACE = "rayfold"
LOOK_EVERY_S = 0.25
ANSWER_S = 60.0  # the controller answers in milliseconds; one that is not back after this long is lost
MOST_RESTARTS = 100  # by Ray, which counts no time; `course.MOST_LIVES` is what bounds them


class ControllerError(RuntimeError):
    """The controller of a run failed, by a fault of its own."""


def launch(plan: RunPlan, *, home: Home, quiet: bool) -> dict[str, Any]:
    """Run `plan` to its end, or follow the run of its folder that is under way in the cluster; its summary.

    Raises SessionError when there is no Ray, RunBusy and RunDiffers when another run is at work in the
    folder, StoppedAtOnce on a second Ctrl-C.
    """
    config, begun_unix = plan.config, time.time()
    with Progress(steps=config.run.steps, quiet=quiet) as progress, interrupts() as asked:
        progress.phase("starting Ray")
        world_size = plan.layout.world_size
        spares = max(0, config.snapshot.spares) if config.snapshot.enabled is not False else 0
        cpus, gpus = max(world_size, os.cpu_count() or 1), world_size + spares if plan.device == "cuda" else 0
        if config.run.address == "local":
            claim_record(config.run_dir).close()  # no need of Ray to see that another run is at work there
        try:
            with ray_session(config.run.address, cpus=cpus, gpus=gpus, namespace=NAMESPACE):
                asked.listen()  # ray.init has taken SIGTERM for itself
                return _follow(plan, home, progress, asked)
        except (RayActorError, GetTimeoutError, SessionLost) as error:
            return _close_record(plan, error, begun_unix)  # after the session: nobody else writes any more


def _follow(plan: RunPlan, home: Home, progress: Progress, asked: Interrupts) -> dict[str, Any]:
    controller, seen = _find(plan), None
    if controller is None:
        controller, seen = _start(plan, home), 0
    try:
        return _watch(controller, progress, asked, seen)
    except (StoppedAtOnce, GetTimeoutError):
        _end(controller, plan)
        raise


def _find(plan: RunPlan) -> Any:
    """The controller that is at work in the run's folder, or None. Raises RunDiffers."""
    run_dir = plan.config.run_dir
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        try:
            controller = ray.get_actor(controller_name(run_dir), namespace=NAMESPACE)
        except ValueError:
            return None
        asked_for: Any = [controller.plan.remote(), controller.view.remote(None)]
        try:
            theirs, view = ray.get(asked_for, timeout=ANSWER_S)
        except RayActorError:
            time.sleep(LOOK_EVERY_S)  # being started again, or gone meanwhile
            continue
        if view["summary"] is None and view["error"] is None:
            check_same(theirs, plan.config.to_dict(), run_dir=run_dir)
            return controller
        ray.kill(controller)  # its run has ended, and nobody wanted to know
    raise GetTimeoutError(f"the controller of the run there did not answer for {ANSWER_S:.0f} s")


def _start(plan: RunPlan, home: Home) -> Any:
    """A new controller for the run."""
    config = plan.config
    claim_record(config.run_dir).close()  # an error here is told better than one of the actor's
    write_atomically(config.run_dir / "config.toml", write_toml(config))
    options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
        "num_cpus": 0,
        "memory": 1,  # a byte: an actor that takes nothing is put anywhere, whatever its strategy says
        "max_restarts": MOST_RESTARTS,
        "max_task_retries": 0,
        "concurrency_groups": {"control": 4, "record": 1},
        "name": controller_name(config.run_dir),
        "lifetime": "detached",
        # where the command is the run's folder is
        "scheduling_strategy": NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        ),
    }
    session = os.environ.get(MARK, "") if config.run.address == "local" else ""
    try:
        return ray.remote(**options)(Controller).remote(config.to_dict(), home, session)
    except ValueError as error:  # another command, on another machine, was faster
        raise RunBusy(f"{config.run_dir}: a run has just begun there; give the command again") from error


def _watch(controller: Any, progress: Progress, asked: Interrupts, seen: int | None) -> dict[str, Any]:
    """Show the news from number `seen` on until the run has ended; None: from now on."""
    told, answered, head = False, time.monotonic(), JoinedHead(ray.get_runtime_context().gcs_address)
    while True:
        stop = asked.poll()
        if stop and not told:
            told = True
            progress.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        if (view := _view(controller, seen, asked, head)) is not None:
            if seen is None:
                progress.say(f"the run is under way, after step {view['step']}; Ctrl-C stops it")
            answered, seen = time.monotonic(), view["seen"]
            _show(view, progress)
            if view["error"] is not None or view["summary"] is not None:
                ray.kill(controller)
                return _result(view)
            if stop and not view["stopping"]:
                controller.stop.remote()  # again, if it is one that has not heard of it
        elif time.monotonic() - answered > ANSWER_S:
            raise GetTimeoutError(f"the controller did not come back within {ANSWER_S:.0f} s")
        else:
            head.check()
        check_embedded()
        time.sleep(LOOK_EVERY_S)


def _view(controller: Any, seen: int | None, asked: Interrupts, head: JoinedHead) -> dict[str, Any] | None:
    """What the controller shows; None while it is being started again. One that is dead for good raises."""
    asked_for = controller.view.remote(seen)  # answered by a thread of its own
    deadline = time.monotonic() + ANSWER_S
    while not ray.wait([asked_for], timeout=LOOK_EVERY_S)[0]:
        asked.poll()
        check_embedded()
        head.check()
        if time.monotonic() > deadline:
            raise GetTimeoutError(f"the controller did not answer for {ANSWER_S:.0f} s")
    try:
        view: dict[str, Any] = ray.get(asked_for)
    except ActorUnavailableError:
        return None
    return view


def _show(view: dict[str, Any], progress: Progress) -> None:
    for item in view["news"]:
        progress.news(item)
    progress.phase(view["phase"])


def _result(view: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that has ended. Raises OSError (a full disk) and ControllerError for what ended
    its controller's course instead.
    """
    if (error := view["error"]) is None:
        summary: dict[str, Any] = view["summary"]
        return summary
    if error["kind"] == "OSError":
        raise OSError(error["message"])
    raise ControllerError(f"the controller failed: {error['kind']}: {error['message']}\n{error['traceback']}")


def _end(controller: Any, plan: RunPlan) -> None:
    """End a run at once that would not end with this command; its processes look for their controller."""
    if plan.config.run.address != "local":
        ray.kill(controller)


def _close_record(plan: RunPlan, error: Exception, begun_unix: float) -> dict[str, Any]:
    """Write the end of a run whose controller is gone in its stead, and return the summary; this command has
    watched since `begun_unix`.
    """
    run_dir, layout = plan.config.run_dir, plan.layout
    with claim_record(run_dir):
        last = [{}, *read_lines(run_dir / EVENTS)][-1]
        if last.get("kind") == "run_finished" and last["time_unix"] >= begun_unix:
            # it came to its end while this command was halted
            found: dict[str, Any] = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
            return found
        journal = Journal(run_dir)
        step = journal.last_step
        verdict = _lost(step, error, embedded=plan.config.run.address == "local")
        journal.event("verdict", step, **verdict.as_event())
        journal.event("run_finished", step, status="failed")
        summary = journal.summary(
            "failed", world_size=layout.world_size, layout=str(layout), verdict=verdict.sentence
        )
        journal.close()
    return summary


def _lost(step: int, error: Exception, *, embedded: bool) -> Verdict:
    memory = "" if embedded else ", or from memory on a cluster of the same machines"
    what = f"Ray ({error})" if isinstance(error, SessionLost) else "the controller of the run"
    return Verdict(
        sentence=(
            f"{what} was lost after step {step}; the last durable checkpoint stands, and the same command "
            f"goes on from it{memory}"
        ),
        ranks=[],
        cls="controller",
        step=step,
        evidence={"exception": type(error).__name__, "message": str(error)},
    )
