"""The command's side of a run: bring Ray up, start the controller, show what happens, pass on Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayActorError

from ..runtime.plan import RunPlan
from .controller import Controller
from .progress import Progress
from .session import ray_session

LOOK_EVERY_S = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedAtOnce(KeyboardInterrupt):
    """A second Ctrl-C: end now, without a checkpoint of this step."""


class ControllerLost(RuntimeError):
    """The controller's process ended before the run did."""


def launch(plan: RunPlan, *, search_path: list[str], quiet: bool) -> dict[str, Any]:
    """Run `plan` to its end and return its summary.

    Raises SessionError when there is no Ray, ControllerLost when the controller dies, StoppedAtOnce on a second
    Ctrl-C.
    """
    config = plan.config
    world_size = plan.layout.world_size
    with Progress(steps=config.run.steps, quiet=quiet) as progress, _interrupts() as asked:
        progress.phase("starting Ray")
        cpus = max(world_size, os.cpu_count() or 1)
        gpus = world_size if plan.device == "cuda" else 0
        with ray_session(config.run.address, cpus=cpus, gpus=gpus, namespace="rayfold"):
            asked.listen()  # ray.init has taken SIGTERM for itself
            options: dict[str, Any] = {  # a dict, because Ray's stubs leave concurrency_groups out
                "num_cpus": 0,
                "max_restarts": 0,
                "concurrency_groups": {"control": 2, "record": 1},
            }
            actor = ray.remote(**options)(Controller)
            controller = actor.remote(config.to_dict(), search_path)
            try:
                return _watch(controller, progress, asked)
            except RayActorError as error:
                raise ControllerLost(
                    f"the controller of the run died ({' '.join(str(error).split())}); the last durable checkpoint "
                    f"stands, and the same command goes on from it"
                ) from error


def _watch(controller: Any, progress: Progress, asked: "_Asked") -> dict[str, Any]:
    """Show the news until the run has ended."""
    end = controller.run.remote()
    told, seen = False, 0
    while True:
        done, _ = ray.wait([end], timeout=LOOK_EVERY_S)
        if asked.count >= 2:
            raise StoppedAtOnce
        if asked.count and not told:
            told = True
            controller.stop.remote()
            progress.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        if not done:
            seen = _show_news(controller, progress, seen)
            continue
        summary: dict[str, Any] = ray.get(end)
        _show_news(controller, progress, seen)
        return summary


def _show_news(controller: Any, progress: Progress, seen: int) -> int:
    view = ray.get(controller.view.remote(seen))  # answered by a thread of its own; a dead controller raises
    for item in view["news"]:
        progress.news(item)
    progress.phase(view["phase"])
    return seen + len(view["news"])


class _Asked:
    """How often the user asked to stop."""

    def __init__(self) -> None:
        self.count = 0

    def listen(self) -> None:
        """Be the handler of the signals that ask; they belong to the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count >= 2:
            raise StoppedAtOnce


@contextmanager
def _interrupts() -> Iterator[_Asked]:
    """Count Ctrl-C and SIGTERM instead of dying of them; the handlers before come back at the end."""
    asked = _Asked()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    asked.listen()
    try:
        yield asked
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
