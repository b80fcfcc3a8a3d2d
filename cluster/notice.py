"""Notice to leave: machines that will be taken away, as the cloud or an operator tells Ray
(`ray drain-node`), and processes that got SIGTERM, which orchestrators send some time before they kill.
"""

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

TELL_AGAIN_S = 1.0  # a controller that was lost has forgotten it, and one that is busy need not be asked more


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Ranks that must leave where they are."""

    node: str  # the id of one that must be left as a whole; "" where only the processes of the ranks must go
    ranks: tuple[int, ...]
    deadline_unix: float | None  # None where nobody said


@dataclass(frozen=True)
class Asked:
    """A worker whose process was asked to leave."""

    worker: str  # the name of its actor


@dataclass(frozen=True)
class Unmanaged:
    """A node on which Ray's own process, the raylet, was stopped or has died: nothing new can be started
    there, and nothing large be sent from there, though its ranks may live.
    """

    node: str
    what: str  # "died" or "stopped"


def draining_nodes() -> dict[str, float | None]:
    """Ids of the nodes that are being drained, and when they will be gone (unix time)."""
    told: dict[str, int] = ray._private.state.state.get_draining_nodes()  # milliseconds; 0: nobody said
    return {node: at / 1000 or None for node, at in told.items()}


class Herald:
    """Tells the controller that this process was asked to leave, by a thread of its own.

    It tells it again and again: the controller may be another by then. That ends with the process, which the
    controller ends when it has given its place away.
    """

    def __init__(self, controller: Any, asked: Asked) -> None:
        self._controller = controller
        self._asked = asked
        self._thread: threading.Thread | None = None

    def tell(self) -> None:
        """Begin, unless it has; does not wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._tell, name="notice", daemon=True)
            self._thread.start()

    def _tell(self) -> None:
        while True:
            with contextlib.suppress(RayError):  # being started again, or gone: then so is this process soon
                ray.get(self._controller.notice.remote(self._asked), timeout=TELL_AGAIN_S)
            time.sleep(TELL_AGAIN_S)
