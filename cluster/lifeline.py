"""The end of a process of a run whose controller is gone.

Workers and vaults are detached: no owner's end ends them, so that they live on while their controller is
started again. Each therefore looks for the controller by itself, and ends when there is none any more.
"""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

LOOK_EVERY_S = 2.0  # also how long an answer may take, which is there in milliseconds
GONE_AFTER_LOOKS = 30  # a minute: a controller is back within seconds, on a busy machine within half of it


class Lifeline:
    """Asks from a thread of its own whether there is a controller; calls `gone` once when there is none.

    Ray tells at once when it has given an actor up, and `gone(True)` is called: the run is over. One that
    answers nobody counts as gone after a bound, `gone(False)`: perhaps Ray itself is lost, and the run will
    go on from what it has left. It counts looks and not seconds: a machine that slept, with all of the run,
    has lost nobody.
    """

    def __init__(self, controller: Any, gone: Callable[[bool], None]) -> None:
        self._controller = controller
        self._gone = gone
        self._closed = threading.Event()
        threading.Thread(target=self._look_on, name="lifeline", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look_on(self) -> None:
        missed, told = 0, False
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                ray.get(self._controller.answers.remote(), timeout=LOOK_EVERY_S)
                missed = 0
            except (ActorUnavailableError, GetTimeoutError, RayTaskError):
                missed += 1  # being started again, or busy
            except RayActorError:
                missed, told = GONE_AFTER_LOOKS, True
            if missed >= GONE_AFTER_LOOKS:
                self._gone(told)
                return
