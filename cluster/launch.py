"""The command's side of a run: bring Ray up, start the controller, show what happens, pass on Ctrl-C."""

import os
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..faulttol.verdict import Verdict
from ..runtime.journal import Journal
from ..runtime.plan import RunPlan
from .controller import Controller
from .home import Home
from .interrupts import Interrupts, interrupts
from .progress import Progress
from .reaper import MARK
from .session import SessionLost, check_embedded, ray_session

LOOK_EVERY_S = 0.25
ANSWER_S = 60.0  # the controller answers in milliseconds; one silent this long is as good as gone


def launch(plan: RunPlan, *, home: Home, quiet: bool) -> dict[str, Any]:
    """Run `plan` to its end and return its summary.

    Raises SessionError when there is no Ray, StoppedAtOnce on a second Ctrl-C.
    """
    config = plan.config
    world_size = plan.layout.world_size
    with Progress(steps=config.run.steps, quiet=quiet) as progress, interrupts() as asked:
        progress.phase("starting Ray")
        cpus = max(world_size, os.cpu_count() or 1)
        spares = max(0, config.snapshot.spares) if config.snapshot.enabled is not False else 0
        gpus = world_size + spares if plan.device == "cuda" else 0
        try:
            with ray_session(config.run.address, cpus=cpus, gpus=gpus, namespace="rayfold"):
                asked.listen()  # ray.init has taken SIGTERM for itself
                options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
                    "num_cpus": 0,
                    "max_restarts": 0,
                    "concurrency_groups": {"control": 3, "record": 1},
                }
                actor = ray.remote(**options)(Controller)
                session = os.environ.get(MARK, "") if config.run.address == "local" else ""
                controller = actor.remote(config.to_dict(), home, session)
                return _watch(controller, progress, asked)
        except (RayActorError, GetTimeoutError, SessionLost) as error:
            return _close_record(plan, error)  # after the session: nobody else writes any more


def _watch(controller: Any, progress: Progress, asked: Interrupts) -> dict[str, Any]:
    """Show the news until the run has ended."""
    end = controller.run.remote()
    told, seen = False, 0
    while True:
        done, _ = ray.wait([end], timeout=LOOK_EVERY_S)
        if asked.poll() and not told:
            told = True
            controller.stop.remote()
            progress.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        seen = _show_news(controller, progress, seen, asked)
        check_embedded()
        if done:
            return _summary(end)


def _summary(end: Any) -> dict[str, Any]:
    """What the controller returned; raises an OSError of its own (a full disk) as such."""
    try:
        summary: dict[str, Any] = ray.get(end)
    except RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise error.cause from error
        raise
    return summary


def _show_news(controller: Any, progress: Progress, seen: int, asked: Interrupts) -> int:
    asked_for = controller.view.remote(seen)  # answered by a thread of its own; a dead controller raises
    deadline = time.monotonic() + ANSWER_S
    while not ray.wait([asked_for], timeout=LOOK_EVERY_S)[0]:
        asked.poll()
        if time.monotonic() > deadline:
            raise GetTimeoutError(f"the controller did not answer for {ANSWER_S:.0f} s")
    view = ray.get(asked_for)
    for item in view["news"]:
        progress.news(item)
    progress.phase(view["phase"])
    return seen + len(view["news"])


def _close_record(plan: RunPlan, error: Exception) -> dict[str, Any]:
    """Write the end of a run whose controller is gone in its stead, and return the summary."""
    journal = Journal(plan.config.run_dir)
    step = journal.last_step
    what = f"Ray ({error})" if isinstance(error, SessionLost) else "the controller of the run"
    verdict = Verdict(
        sentence=(
            f"{what} was lost after step {step}; the last durable checkpoint stands, and the same command "
            "goes on from it"
        ),
        ranks=[],
        cls="controller",
        step=step,
        evidence={"exception": type(error).__name__, "message": str(error)},
    )
    journal.event("verdict", step, **verdict.as_event())
    journal.event("run_finished", step, status="failed")
    layout = plan.layout
    summary = journal.summary(
        "failed", world_size=layout.world_size, layout=str(layout), verdict=verdict.sentence
    )
    journal.close()
    return summary
